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
    from .augment import AugmentConfig, View, augment_view
    from .camera import Camera
    from .check import GeometryWarning, warn_about_geometry
    from .conventions import CONVENTIONS, CameraConvention
    from .depth import depth_from_zbuffer, depth_problems, zbuffer_from_depth
    from .point_map import PointMap

__all__ = [
    "CONVENTIONS",
    "AugmentConfig",
    "Camera",
    "CameraConvention",
    "GeometryWarning",
    "PointMap",
    "View",
    "augment_view",
    "depth_from_zbuffer",
    "depth_problems",
    "warn_about_geometry",
    "zbuffer_from_depth",
]

_HOME = {
    "AugmentConfig": "augment",
    "CONVENTIONS": "conventions",
    "Camera": "camera",
    "CameraConvention": "conventions",
    "GeometryWarning": "check",
    "PointMap": "point_map",
    "View": "augment",
    "augment_view": "augment",
    "depth_from_zbuffer": "depth",
    "depth_problems": "depth",
    "warn_about_geometry": "check",
    "zbuffer_from_depth": "depth",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
