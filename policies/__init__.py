"""Policies: from observation to action, and their loss.

The names below load when they are first used; ``vilma.policies.edm``, ``.denoiser``, ``.normalization`` and
``.language`` are the parts.
"""

import importlib
from typing import TYPE_CHECKING

if __name__ != "vilma.policies":
    raise ImportError(
        f"this room is vilma.policies; it was imported as {__name__!r}: use `import vilma.policies`"
    )

if TYPE_CHECKING:
    from .pointmap_config import PointMapPolicyConfig
    from .pointmap_policy import PointMapPolicy
    from .policy import Policy, find_checkpoint, load_policy

__all__ = ["PointMapPolicy", "PointMapPolicyConfig", "Policy", "find_checkpoint", "load_policy"]

_HOME = {
    "PointMapPolicy": "pointmap_policy",
    "PointMapPolicyConfig": "pointmap_config",
    "Policy": "policy",
    "find_checkpoint": "policy",
    "load_policy": "policy",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
