"""Configuration: YAML values into frozen dataclasses and back. The only file that knows the config library.

A config is a complete YAML file (no includes, no interpolation, no class paths). It is decoded into the
dataclass that stands beside the code it configures; dotted overrides come from the command line.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

__all__ = ["ConfigError", "decode", "dump", "encode", "find", "load", "override", "read"]


class ConfigError(ValueError):
    """A configuration that cannot be used: says what was got, what is possible and where."""


def find(path: str | Path) -> Path:
    """The file ``path``: as given, or among the configs that come with the package (``configs/...``)."""
    path = Path(path)
    if path.is_file():
        return path
    import vilma

    for root in vilma.__path__:
        shipped = Path(root) / path
        if not path.is_absolute() and shipped.is_file():
            return shipped
    there = [path.parent / p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    if not path.is_absolute():
        for root in vilma.__path__:
            there += [p.relative_to(root) for p in sorted(Path(root, "configs").rglob("*.yaml"))]
    near = difflib.get_close_matches(path.name, {p.name for p in there})
    close = dict.fromkeys(str(p) for name in near for p in there if p.name == name)
    hint = f"; close: {', '.join(close)}" if close else ""
    raise ConfigError(f"no config file {str(path)!r}{hint}")


def read(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    path = find(path)
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, wanted a mapping of fields to values")
    return values


def override(values: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """A copy of ``values`` with dotted command-line overrides applied: ``["--optim.lr", "3e-4"]``.

    ``--key=value`` works too. Values are read as YAML, so lists and booleans can be given.
    """
    values = _copy(values)
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument {word!r}: overrides look like --section.field value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key} needs a value")
            text = rest.pop(0)
        *sections, name = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"--{key}: {section!r} is a value, not a section")
        try:
            node[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key}: {text!r} is not valid YAML") from error
    return values


def decode(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """``values`` as an instance of ``cls``; unknown fields are errors that name close matches."""
    import draccus

    _check_fields(cls, values, where)
    try:
        return draccus.decode(cls, values)
    except draccus.utils.DraccusException as error:
        # A dataclass that refuses its values says why; the library's own sentence only says where.
        reason = f": {error.__cause__}" if isinstance(error.__cause__, ValueError) else ""
        raise ConfigError(f"{where or cls.__name__}: {error}{reason}") from error


def encode(config: Any) -> dict[str, Any]:
    """A dataclass as plain YAML values."""
    import draccus

    return draccus.encode(config)


def load(cls: type[T], path: str | Path, arguments: Sequence[str] = ()) -> T:
    """Read a YAML file into ``cls`` with command-line overrides applied."""
    return decode(cls, override(read(path), arguments), where=str(path))


def dump(config: Any, path: str | Path) -> None:
    """Write a dataclass (or a mapping) as YAML."""
    values = encode(config) if dataclasses.is_dataclass(config) else config
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100))


def _copy(node: Any) -> Any:
    return {k: _copy(v) for k, v in node.items()} if isinstance(node, dict) else node


def _check_fields(cls: type, values: Any, where: str) -> None:
    """Raise for the first field of ``values`` that ``cls`` does not have, naming the closest ones it has."""
    annotation, cls = cls, _dataclass_in(cls)
    if cls is None:
        return
    if not isinstance(values, dict):
        others = {*typing.get_args(annotation)} - {cls}
        if isinstance(values, cls) or others - {type(None)} or (values is None and others):
            return
        where = where or cls.__name__
        names = ", ".join(f.name for f in dataclasses.fields(cls))
        section = where.rpartition(".")[2]
        raise ConfigError(f"{where} is {values!r}, but {section!r} is a section; its fields are: {names}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=3, cutoff=0.5)
            known = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has: {', '.join(names)}"
            raise ConfigError(
                f"{where + ': ' if where else ''}unknown field {key!r} in {cls.__name__}; {known}"
            )
        path = f"{where}.{key}" if where else key
        if isinstance(value, str) and typing.get_origin(hints[key]) in (tuple, list):
            # The library would take the text for a sequence of letters.
            raise ConfigError(f"{path} is the text {value!r}, wanted a list, e.g. [{value}]")
        _check_fields(hints[key], value, path)


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass behind an annotation such as ``X`` or ``X | None``."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for part in typing.get_args(annotation) if is_union else ():
        if part is not type(None) and dataclasses.is_dataclass(part):
            return part
    return None
