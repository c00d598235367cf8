"""Options of environments as they come from Python, YAML or a command line: checked, and named in errors."""

from typing import Any

__all__ = ["flag", "names", "number"]


def number(name: str, value: Any, kind: type) -> Any:
    """An option as int or float. A text may spell it; a truth value, or a fraction for an int, is refused."""
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, bool) or not (isinstance(value, str) or number == value):
        wanted = "a whole number" if kind is int else "a number"
        raise ValueError(f"got {name}={value!r}, wanted {wanted}")
    return number


def flag(name: str, value: Any) -> bool:
    """An option that is true or false; nothing else stands for it."""
    if not isinstance(value, bool):
        raise ValueError(f"got {name}={value!r}, wanted true or false")
    return value


def names(option: str, values: Any) -> tuple[str, ...]:
    """A tuple of names; a text alone would be taken for its letters."""
    if isinstance(values, (tuple, list)) and all(isinstance(value, str) for value in values):
        return tuple(values)
    example = f", e.g. [{values!r}]" if isinstance(values, str) else ""
    raise ValueError(f"got {option}={values!r}, wanted a list of names{example}")
