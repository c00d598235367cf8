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


def zbuffer_from_depth(depth: Array, near: float, far: float) -> Array:
    """Depth-buffer values in [0, 1] from metres along the optical axis: the inverse of `depth_from_zbuffer`.

    Depth outside the clipping planes is clipped to them, as a renderer does; NaN stays NaN.
    """
    if not 0 < near < far:
        raise ValueError(f"clipping planes must satisfy 0 < near < far, got near={near}, far={far}")
    return ((1 - near / depth.clip(near, far)) / (1 - near / far)).clip(0, 1)


def depth_problems(depth: Array, intrinsics: Array | None = None) -> list[str]:
    """What suggests that ``depth`` (any shape) is not in metres along the axis; empty when nothing does.

    A heuristic for a first batch, to be warned about and not raised. Zero and non-finite values count as no
    reading. Images (..., H, W), at least 3 x 3, are also looked at as pictures of planes: 1 / depth of a
    plane is affine in the pixels, and so is a depth buffer, but not the depth itself; with ``intrinsics``
    (..., 3, 3), pixel centres at 0.5, distances along the ray can be told as well. Noise hides all of it.
    """
    raw = np.asarray(depth.detach().cpu() if hasattr(depth, "detach") else depth)
    values = raw.astype(np.float64, copy=False)
    read = values[np.isfinite(values) & (values > 0)]
    if read.size == 0:
        return ["no pixel has a reading (all zero, negative or non-finite)"]
    low, middle, high = (float(x) for x in (read.min(), np.median(read), read.max()))
    told = f"values {low:.4g} to {high:.4g} with median {middle:.4g}"
    whole = high >= 3 and bool((read == np.round(read)).all()) and len(np.unique(read[:10000])) > 2
    likely, crowded = _law_of_planes(values, intrinsics)
    problems = []
    if high <= 1 and (
        likely == "zbuffer" or (middle > 0.95 and likely != "metric") or (middle > 0.8 and crowded)
    ):
        problems.append(
            f"{told} look like a depth buffer, not metres: convert with depth_from_zbuffer(z, near, far)"
        )
    elif not np.issubdtype(raw.dtype, np.floating) or whole or middle > 20:
        why = f"{told}, whole numbers," if whole or not np.issubdtype(raw.dtype, np.floating) else told
        problems.append(f"{why} look like millimetres, not metres: divide by 1000")
    elif middle < 0.01:
        problems.append(f"{told}: closer than 1 cm; were they divided by 1000 twice?")
    elif likely == "distance":
        problems.append(
            "planes bend as they do for distances along each pixel's ray, not for depth along the optical "
            "axis: convert with vilma.pointmap.conventions.depth_from_distance"
        )
    negative = float((values < 0).mean())
    if negative:
        problems.append(
            f"negative values ({negative:.0%} of the pixels): such points lie behind the camera; is the axis "
            "reversed (OpenGL z)? Then negate the depth"
        )
    return problems


def _law_of_planes(values: np.ndarray, intrinsics: Array | None) -> tuple[str | None, bool]:
    """Which reading makes the surfaces plane: "metric", "zbuffer", "distance", None where it cannot be told.

    And whether a depth buffer, crowded near 1 where 1 / value is nearly affine in it, explains a clean
    picture about as well as metres do.
    """
    if values.ndim < 2 or min(values.shape[-2:]) < 3:
        return None, False
    height, width = values.shape[-2:]
    values = values.reshape(-1, height, width)[:8]
    values = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    laws = {"metric": 1 / values, "zbuffer": values}
    if intrinsics is not None:
        k = np.asarray(intrinsics.detach().cpu() if hasattr(intrinsics, "detach") else intrinsics)
        k = k.astype(np.float64).reshape(-1, 3, 3)[: len(values), :, :, None, None]
        y = (np.arange(height)[:, None] + 0.5 - k[:, 1, 2]) / k[:, 1, 1]
        x = (np.arange(width) + 0.5 - k[:, 0, 2]) / k[:, 0, 0]
        laws["distance"] = np.sqrt(1 + x * x + y * y) / values
    bends = {name: _bend(law, values) for name, law in laws.items()}
    if bends["metric"] is None:
        return None, False
    best = min(bends, key=bends.get)
    # The true law leaves rounding; each other must leave at least five times as much to be ruled out.
    sure = all(bends[best] < 0.2 * bend for name, bend in bends.items() if name != best)
    return best if sure else None, bends["zbuffer"] < min(2e-3, 2 * bends["metric"])


def _bend(law: np.ndarray, values: np.ndarray) -> float | None:
    """How far a law is from affine: median second over mean first difference, in rows and in columns.

    Counted are the pixels on smooth, tilted surfaces; None when there are too few.
    """
    firsts, seconds = [], []
    for f, v in ((law, values), (law.swapaxes(1, 2), values.swapaxes(1, 2))):
        step = np.abs(v[..., 2:] - v[..., :-2]) / v[..., 1:-1]
        usable = (step > 2e-4) & (step < 0.1)  # false for NaN
        firsts.append(np.abs(f[..., 2:] - f[..., :-2])[usable] / 2)
        seconds.append(np.abs(f[..., 2:] - 2 * f[..., 1:-1] + f[..., :-2])[usable])
    first, second = np.concatenate(firsts), np.concatenate(seconds)
    if second.size < max(50, 0.05 * values.size) or not first.any():
        return None
    return float(np.median(second) / first.mean())


def _range_of(z: Array) -> str:
    bad = np.asarray(z.detach().cpu() if hasattr(z, "detach") else z)
    finite = bad[np.isfinite(bad)]
    extent = f"{finite.min():.6g} to {finite.max():.6g}" if finite.size else "no finite value"
    lost = bad.size - finite.size
    return extent + (f" and {lost} non-finite" if lost else "")
