"""Pictures of point maps: false colours, and a PNG beside RGB and depth (clouds: `.ply`, pages: `.orbit`).

Arrays may be numpy or tensors. Nothing here is imported by the rest of the room, and matplotlib only when it
draws.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from vilma.extras import require

from .ply import color_bytes, numpy_array, replacing, write_ply
from .point_map import PointMap

__all__ = ["color_normals", "colorize", "figure", "scene_bounds", "write_ply"]

Array = np.ndarray | Tensor


def colorize(
    point_map: PointMap, bounds: tuple[np.ndarray, np.ndarray] | None = None, hole: float = 0.08
) -> np.ndarray:
    """x, y, z as red, green, blue: uint8 (H, W, 3), each axis stretched over the valid points, holes dark.

    ``bounds`` (low (3,), high (3,)) fixes the stretch instead, so that several cameras share their colours.
    """
    points, valid = _single(point_map)
    low, high = scene_bounds([point_map]) if bounds is None else bounds
    color = (points - low) / np.maximum(np.subtract(high, low), 1e-6)
    color = np.where(valid[..., None], np.clip(color, 0, 1) * 0.88 + 0.12, hole)
    return (color * 255).round().astype(np.uint8)


def color_normals(point_map: PointMap, hole: float = 0.08) -> np.ndarray:
    """Normals as colours, uint8 (H, W, 3): a component from -1 to 1 is dark to bright; unknown ones dark."""
    _single(point_map)
    normals, known = (numpy_array(x) for x in point_map.normals())
    return (np.where(known[..., None], normals / 2 + 0.5, hole) * 255).round().astype(np.uint8)


def figure(
    rgb: Array | Mapping[str, Array],
    depth: Array | Mapping[str, Array],
    point_map: PointMap | Mapping[str, PointMap],
    path: str | os.PathLike,
    title: str | None = None,
    full: bool = False,
) -> Path:
    """Write a PNG: for each camera a row RGB | depth | point map | its points in 3-D.

    rgb (3, H, W) or (H, W, 3), uint8 or float in [0, 1]; depth (H, W) or (H, W, 1), metres; one of each or
    mappings by camera name with the same keys. Point maps share their colours, so equal colours are equal
    places. ``full`` adds normals, validity (white: a point, grey: a reading left out, black: no reading) and
    a second side of the points.
    """
    make_figure = require("matplotlib.figure", "robot").Figure
    rgb, depth, maps = ({"": x} if not isinstance(x, Mapping) else x for x in (rgb, depth, point_map))
    if not maps or not rgb.keys() == depth.keys() == maps.keys():
        raise ValueError(
            f"rgb, depth and point_map must name the same cameras: {[*rgb]}, {[*depth]}, {[*maps]}"
        )
    bounds = scene_bounds(list(maps.values()))
    flat, sides = (5, (-60, 30)) if full else (3, (-60,))
    width = 3.4 * flat + 4.6 * len(sides)
    canvas = make_figure(figsize=(width, 3.8 * len(maps)), dpi=100, layout="constrained")
    ratios = (1, 1.2, 1, 1, 1)[:flat] + (1.4,) * len(sides)
    grid = canvas.add_gridspec(len(maps), len(ratios), width_ratios=ratios)
    for row, (name, one) in enumerate(maps.items()):
        points, valid = _single(one)
        image, metres = _rgb(rgb[name]), numpy_array(depth[name]).squeeze()
        labels = ["RGB", "depth", f"point map, {valid.mean():.0%} valid", "normals", "validity"][:flat]
        axes = [canvas.add_subplot(grid[row, k]) for k in range(flat)]
        axes[0].imshow(image)
        shown = axes[1].imshow(np.where(valid, metres, np.nan), cmap="viridis")
        axes[1].set_facecolor("black")
        canvas.colorbar(shown, ax=axes[1], shrink=0.8, label="m")
        axes[2].imshow(colorize(one, bounds))
        if full:
            axes[3].imshow(color_normals(one))
            read = np.isfinite(metres) & (metres > 0)
            axes[4].imshow(np.where(valid, 1.0, 0.4 * read), cmap="gray", vmin=0, vmax=1)
        for k, (axis, label) in enumerate(zip(axes, labels, strict=True)):
            named = name and not (full and k)  # seven titles with a long name would overlap
            axis.set(title=f"{name}: {label}" if named else label, xticks=[], yticks=[])
        colors = image if image.shape[:2] == valid.shape else colorize(one, bounds)
        stood, box = _stood(one, points, bounds)
        for k, azimuth in enumerate(sides):
            space = canvas.add_subplot(grid[row, flat + k], projection="3d")
            _scatter(space, stood[valid], colors[valid], box)
            space.view_init(elev=25, azim=azimuth)
            if one.frame == "camera":
                space.set(ylabel="z", zlabel="-y")
            space.set_title(f"points in frame {one.frame}" if one.frame else "points")
    if title:
        canvas.suptitle(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        canvas.savefig(file, format="png")
    return path


def _stood(
    one: PointMap, points: np.ndarray, bounds: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Points and box with z up: a camera's own frame has y down and z forward."""
    if one.frame != "camera":
        return points, bounds
    corners = [corner[[0, 2, 1]] * (1, 1, -1) for corner in scene_bounds([one])]
    return points[..., [0, 2, 1]] * (1, 1, -1), (np.minimum(*corners), np.maximum(*corners))


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


def scene_bounds(maps: list[PointMap]) -> tuple[np.ndarray, np.ndarray]:
    """Corners (3,), (3,) of the scene: a far wall or floor must not flatten what lies near.

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
    return numpy_array(point_map.points), numpy_array(point_map.valid)


def _rgb(image: Array) -> np.ndarray:
    image = numpy_array(image)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"an RGB image must be (3, H, W) or (H, W, 3), got {image.shape}")
    return color_bytes(image)
