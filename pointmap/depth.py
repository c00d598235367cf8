"""Depth readings: the renderers' depth buffer to metres, and what depth in wrong units looks like.

No torch here: numpy arrays and tensors go through the same arithmetic, so a simulator process stays light.
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)
else:
    Array = TypeVar("Array")


def depth_from_zbuffer(z: Array, near: float, far: float) -> Array:
    """Metres along the optical axis from depth-buffer values, any shape, dtype kept.

    MuJoCo (``near / (1 - z (1 - near / far))``, near/far = ``vis.map.znear/zfar * stat.extent``) and PyBullet
    (``far near / (far - (far - near) z)``) document the same function of z.

    Raises ValueError when the clipping planes are not ``0 < near < far`` or a value lies outside [0, 1] (NaN
    included).
    """
    if not 0 < near < far:
        raise ValueError(f"clipping planes must satisfy 0 < near < far, got near={near}, far={far}")
    if not bool(((z >= 0) & (z <= 1)).all()):
        raise ValueError(
            f"depth-buffer values must lie in [0, 1], got {_range_of(z)}: already metres, or a corrupt frame?"
        )
    # 1 - z is exact in floating point where the values crowd (z > 0.5); the documented forms round there.
    return near / ((1 - z) + z * (near / far))


def depth_problems(depth: Array) -> list[str]:
    """What suggests that ``depth`` (any shape) is not in metres along the axis; empty when nothing does.

    A heuristic for a first batch, to be warned about and not raised. Zero and non-finite values count as no
    reading.
    """
    values = np.asarray(depth.detach().cpu() if hasattr(depth, "detach") else depth).astype(
        np.float64, copy=False
    )
    read = values[np.isfinite(values) & (values > 0)]
    if read.size == 0:
        return ["no pixel has a reading (all zero, negative or non-finite)"]
    problems = []
    low, middle, high = (float(x) for x in (read.min(), np.median(read), read.max()))
    if high <= 1 and middle > 0.95:
        problems.append(
            f"values {low:.4g} to {high:.4g} with median {middle:.4g} look like a depth buffer, not metres: "
            "convert with depth_from_zbuffer(z, near, far)"
        )
    if middle > 100:
        problems.append(f"a median of {middle:.4g} looks like millimetres, not metres: divide by 1000")
    if (values < 0).any():
        problems.append("negative values: is the axis reversed (OpenGL z)?")
    return problems


def _range_of(z: Array) -> str:
    bad = np.asarray(z.detach().cpu() if hasattr(z, "detach") else z)
    finite = bad[np.isfinite(bad)]
    extent = f"{finite.min():.6g} to {finite.max():.6g}" if finite.size else "no finite value"
    lost = bad.size - finite.size
    return extent + (f" and {lost} non-finite" if lost else "")
