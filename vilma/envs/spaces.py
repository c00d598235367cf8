"""The gymnasium spaces of the house's observations."""

import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vilma.extras import require

__all__ = ["observation_space"]

_ALPHABET = string.ascii_letters + string.digits + string.punctuation + " "


def observation_space(
    cameras: Sequence[str], size: int, state_size: int, others: Mapping[str, int] | None = None
) -> Any:
    """A ``gymnasium.spaces.Dict`` for square pictures of ``size`` pixels and a state (state_size,).

    others: further vectors, key -> length.
    """
    spaces = require("gymnasium", "robot").spaces
    entries: dict[str, Any] = {}
    for camera in cameras:
        entries |= {
            f"observation.images.{camera}": spaces.Box(0, 255, (3, size, size), np.uint8),
            f"observation.depth.{camera}": spaces.Box(0, np.inf, (size, size), np.float32),
            f"observation.intrinsics.{camera}": spaces.Box(-np.inf, np.inf, (3, 3), np.float32),
            f"observation.pose.{camera}": spaces.Box(-np.inf, np.inf, (4, 4), np.float32),
        }
    for key, length in {"observation.state": state_size, **(others or {})}.items():
        entries[key] = spaces.Box(-np.inf, np.inf, (length,), np.float32)
    entries["task"] = spaces.Text(256, min_length=0, charset=_ALPHABET)
    return spaces.Dict(entries)
