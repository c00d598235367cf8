"""The run directory: one writer at a time, and one configuration for its whole life."""

import fcntl
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vilma import config

from .checkpoint import replace_text

__all__ = ["check_config", "locked", "write_config"]


@contextmanager
def locked(run_dir: Path, patience: float = 10.0) -> Iterator[None]:
    """Hold the run directory; the lock ends with the process, however it ends.

    Raises:
        ValueError: another process still holds it after ``patience`` seconds.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(
                    file, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # unlike flock: forked workers do not inherit it
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise ValueError(
                        f"process {file.read().strip() or '?'} is training in {run_dir}; wait for it, "
                        "stop it, or choose another run directory"
                    ) from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks
        with suppress(OSError):  # a full disk is not this file's to report
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def check_config(run_dir: Path, values: Mapping[str, Any], may_change: Collection[str] = ()) -> None:
    """Raise ValueError if the run directory belongs to another configuration, listing the fields that differ.

    Args:
        values: plain YAML values.
        may_change: dotted fields, or sections, that may differ.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        return
    before, now = _flatten(config.read(path)), _flatten(values)
    differing = []
    for name in [*now, *(n for n in before if n not in now)]:
        old, new = before.get(name, "absent"), now.get(name, "absent")
        free = any(name == field or name.startswith(f"{field}.") for field in may_change)
        if old != new and not free:
            differing.append(f"  {name}: {old!r} in the run, {new!r} asked for")
    if differing:
        raise ValueError(
            f"{run_dir} was started with another configuration:\n"
            + "\n".join(differing)
            + f"\nUse another run directory, ask for what {path} says, or remove {run_dir} to start again"
        )


def write_config(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Write ``config.yaml`` of a run, atomically, unless it says the same already."""
    path = run_dir / "config.yaml"
    if path.is_file() and _flatten(config.read(path)) == _flatten(values):
        return
    aside = run_dir / ".tmp-config.yaml"
    config.dump(dict(values), aside)
    replace_text(path, aside.read_text())


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to leaves; lists are leaves, tuples are lists (as YAML reads them back)."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
