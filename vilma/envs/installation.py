"""What a simulator suite needs on this machine: a line for each thing, and what to do when it is missing."""

import importlib.util
import shlex
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import NamedTuple

__all__ = ["Check", "check_packages"]


class Check(NamedTuple):
    """One thing that a suite needs.

    Args:
        name: what was looked for.
        found: what is there, in words.
        ok: whether that will do.
        remedy: a command or a sentence that helps when it will not.
        is_optional: the suite works without it.
    """

    name: str
    found: str
    ok: bool
    remedy: str = ""
    is_optional: bool = False


def check_packages(packages: Iterable[tuple[str, str, str]]) -> Iterator[Check]:
    """A check for each (module, distribution, requirement); nothing is imported.

    The requirement is what ``pip install`` takes, e.g. ``gym==0.26.2``.
    """
    for module, distribution, requirement in packages:
        if importlib.util.find_spec(module) is None:
            yield Check(distribution, "not installed", False, f"pip install {shlex.quote(requirement)}")
            continue
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            version = "installed, version unknown"
        yield Check(distribution, version, True)
