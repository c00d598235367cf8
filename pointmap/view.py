"""Pictures and files of point maps: false colours, a PNG beside RGB and depth, PLY clouds.

Arrays may be numpy or tensors. Nothing here is imported by the rest of the room, and matplotlib only when it
draws.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from vilma.extras import require

from .point_map import PointMap

Array = np.ndarray | Tensor


def colorize(
    point_map: PointMap, bounds: tuple[np.ndarray, np.ndarray] | None = None, hole: float = 0.08
) -> np.ndarray:
    """x, y, z as red, green, blue: uint8 (H, W, 3), each axis stretched over the valid points, holes dark.

    ``bounds`` (low (3,), high (3,)) fixes the stretch instead, so that several cameras share their colours.
    """
    points, valid = _single(point_map)
    low, high = _bounds([point_map]) if bounds is None else bounds
    color = (points - low) / np.maximum(np.subtract(high, low), 1e-6)
    color = np.where(valid[..., None], np.clip(color, 0, 1) * 0.88 + 0.12, hole)
    return (color * 255).round().astype(np.uint8)


def figure(
    rgb: Array | Mapping[str, Array],
    depth: Array | Mapping[str, Array],
    point_map: PointMap | Mapping[str, PointMap],
    path: str | os.PathLike,
    title: str | None = None,
) -> Path:
    """Write a PNG: for each camera a row RGB | depth | point map | its points in 3-D.

    rgb (3, H, W) or (H, W, 3), uint8 or float in [0, 1]; depth (H, W) or (H, W, 1), metres; one of each or
    mappings by camera name with the same keys. Point maps share their colours, so equal colours are equal
    places.
    """
    make_figure = require("matplotlib.figure", "robot").Figure
    rgb, depth, maps = ({"": x} if not isinstance(x, Mapping) else x for x in (rgb, depth, point_map))
    if not maps or not rgb.keys() == depth.keys() == maps.keys():
        raise ValueError(
            f"rgb, depth and point_map must name the same cameras: {[*rgb]}, {[*depth]}, {[*maps]}"
        )
    bounds = _bounds(list(maps.values()))
    canvas = make_figure(figsize=(16, 3.8 * len(maps)), dpi=100, layout="constrained")
    grid = canvas.add_gridspec(len(maps), 4, width_ratios=(1, 1.2, 1, 1.4))
    for row, (name, one) in enumerate(maps.items()):
        points, valid = _single(one)
        image, metres = _rgb(rgb[name]), _numpy(depth[name]).squeeze()
        axes = [canvas.add_subplot(grid[row, k]) for k in range(3)]
        axes[0].imshow(image)
        shown = axes[1].imshow(np.where(valid, metres, np.nan), cmap="viridis")
        axes[1].set_facecolor("black")
        canvas.colorbar(shown, ax=axes[1], shrink=0.8, label="m")
        axes[2].imshow(colorize(one, bounds))
        for axis, label in zip(axes, ("RGB", "depth", f"point map, {valid.mean():.0%} valid"), strict=True):
            axis.set(title=f"{name}: {label}" if name else label, xticks=[], yticks=[])
        space = canvas.add_subplot(grid[row, 3], projection="3d")
        colors = image if image.shape[:2] == valid.shape else colorize(one, bounds)
        _scatter(space, points[valid], colors[valid], bounds)
        space.set_title(f"points in frame {one.frame}" if one.frame else "points")
    if title:
        canvas.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as file:
        canvas.savefig(file, format="png")
    return path


def write_ply(points: Array, colors: Array | None, path: str | os.PathLike) -> Path:
    """Write a cloud as binary PLY: points (N, 3) float, colors (N, 3) uint8 or float in [0, 1], or None."""
    points = _numpy(points)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must have shape (N, 3), got {points.shape}")
    fields = [("x", "<f4"), ("y", "<f4"), ("z", "<f4")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    if colors is not None:
        colors = _bytes(_numpy(colors))
        if colors.shape != points.shape:
            raise ValueError(f"colors must have the shape of points, {points.shape}, got {colors.shape}")
        fields += [("red", "u1"), ("green", "u1"), ("blue", "u1")]
        header += [f"property uchar {name}" for name in ("red", "green", "blue")]
    vertices = np.empty(len(points), dtype=fields)
    columns = [*points.T] if colors is None else [*points.T, *colors.T]
    for (name, _), column in zip(fields, columns, strict=True):
        vertices[name] = column
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as file:
        file.write(("\n".join([*header, "end_header"]) + "\n").encode())
        file.write(vertices.tobytes())
    return path


def _scatter(axis, points: np.ndarray, colors: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]) -> None:
    locator = require("matplotlib.ticker", "robot").MaxNLocator
    low, high = bounds
    extent = np.maximum(high - low, 1e-3)
    inside = ((points >= low) & (points <= high)).all(-1)
    points, colors = points[inside], colors[inside]
    stride = max(1, len(points) // 6000)
    axis.scatter(*points[::stride].T, c=colors[::stride] / 255, s=4, linewidths=0, depthshade=False)
    for name, start, length in zip("xyz", low, extent, strict=True):
        getattr(axis, f"set_{name}lim")(start, start + length)
        getattr(axis, f"{name}axis").set_major_locator(locator(3))
    # True proportions, but a flat scene keeps room for its labels.
    axis.set_box_aspect(np.maximum(extent / extent.max(), 0.15), zoom=1.1)
    axis.set(xlabel="x", ylabel="y", zlabel="z")
    axis.tick_params(labelsize=7)


def _bounds(maps: list[PointMap]) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the scene: a far wall or floor must not flatten what lies near.

    The box of all points within 2.5 median distances of the median point.
    """
    cloud = np.concatenate([points[valid] for points, valid in map(_single, maps)])
    if len(cloud) == 0:
        return np.zeros(3), np.ones(3)
    distance = np.linalg.norm(cloud - np.median(cloud, axis=0), axis=-1)
    near = cloud[distance <= 2.5 * np.median(distance)]
    return near.min(axis=0), near.max(axis=0)


def _single(point_map: PointMap) -> tuple[np.ndarray, np.ndarray]:
    if point_map.valid.ndim != 2:
        raise ValueError(
            f"a picture shows one map (H, W, 3), got {tuple(point_map.points.shape)}: index it first"
        )
    return _numpy(point_map.points), _numpy(point_map.valid)


def _rgb(image: Array) -> np.ndarray:
    image = _numpy(image)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an RGB image must be (3, H, W) or (H, W, 3), got {image.shape}")
    return _bytes(image)


def _bytes(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.uint8 else (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


def _numpy(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` that moves into its place at the end: no half-written file carries the name."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
