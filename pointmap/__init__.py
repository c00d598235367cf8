"""Depth to structured point maps: cameras, unprojection, the PointMap type, encoders.

The names below are the light half of the room and load when they are first used: a simulator process that
only converts a z-buffer (`vilma.pointmap.depth`) imports no torch, and nothing here imports timm or
matplotlib. Encoders: `vilma.pointmap.encoders.build_encoder`; augmentation: `.augment`; pictures: `.view`.
"""

import importlib
from typing import TYPE_CHECKING

if __name__ != "vilma.pointmap":
    raise ImportError(
        f"this room is vilma.pointmap; it was imported as {__name__!r}: use `import vilma.pointmap`"
    )

if TYPE_CHECKING:
    from .camera import Camera
    from .depth import depth_from_zbuffer, depth_problems
    from .point_map import PointMap

__all__ = ["Camera", "PointMap", "depth_from_zbuffer", "depth_problems"]

_HOME = {
    "Camera": "camera",
    "PointMap": "point_map",
    "depth_from_zbuffer": "depth",
    "depth_problems": "depth",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
