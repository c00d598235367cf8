"""Clouds on disk: PLY files, written in binary or as text, read back, and open3d's clouds.

N: points.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from vilma.extras import require

Array = np.ndarray | Tensor

_AXES, _NORMALS, _COLORS = ("x", "y", "z"), ("nx", "ny", "nz"), ("red", "green", "blue")
_TYPES = {
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("int", "int32"), "i4"),
}


class Cloud(NamedTuple):
    """points (N, 3) float; colors (N, 3) uint8 or None; normals (N, 3) float or None."""

    points: np.ndarray
    colors: np.ndarray | None = None
    normals: np.ndarray | None = None


def write_ply(
    points: Array,
    colors: Array | None,
    path: str | os.PathLike,
    normals: Array | None = None,
    binary: bool = True,
) -> Path:
    """Write a cloud as PLY, little-endian binary or text; the file appears whole or not at all.

    points (N, 3) float, stored as float32; colors (N, 3), uint8 or float in [0, 1]; normals (N, 3).
    """
    points = numpy_array(points)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must have shape (N, 3), got {points.shape}")
    parts = [(_AXES, "<f4", points)]
    for name, fields, kind, values in (
        ("normals", _NORMALS, "<f4", normals),
        ("colors", _COLORS, "u1", colors),
    ):
        if values is None:
            continue
        values = numpy_array(values)
        if values.shape != points.shape:
            raise ValueError(f"{name} must have the shape of points, {points.shape}, got {values.shape}")
        parts.append((fields, kind, color_bytes(values) if name == "colors" else values))
    vertices = np.empty(len(points), dtype=[(name, kind) for fields, kind, _ in parts for name in fields])
    for fields, _, values in parts:
        for name, column in zip(fields, values.T, strict=True):
            vertices[name] = column
    words = {"<f4": "float", "u1": "uchar"}
    header = ["ply", f"format {'binary_little_endian' if binary else 'ascii'} 1.0"]
    header += [f"element vertex {len(points)}"]
    header += [f"property {words[kind]} {name}" for fields, kind, _ in parts for name in fields]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(("\n".join([*header, "end_header"]) + "\n").encode())
        if binary:
            file.write(vertices.tobytes())
        else:
            # Nine digits bring a float32 back.
            lines = [[f"{x:.9g}" for x in row] for row in vertices.tolist()]
            file.write("".join(" ".join(line) + "\n" for line in lines).encode())
    return path


def read_ply(path: str | os.PathLike) -> Cloud:
    """Read the vertices of a PLY file, text or binary of either byte order; faces are passed over.

    Raises ValueError for a file that is not PLY, is cut off, has no x, y, z, or other elements first.
    """
    data = Path(path).read_bytes()
    head, mark, body = data.partition(b"end_header")
    lines = head.decode("ascii", "replace").split("\n")
    if lines[0].strip() != "ply" or not mark:
        raise ValueError(f"{path} is not a PLY file: it begins with {data[:20]!r}")
    body = body[body.index(b"\n") + 1 :]
    order, count, fields, current = "", None, [], ""
    for line in lines[1:]:
        words = line.split()
        if words[:1] == ["format"]:
            order = words[1]
        elif words[:1] == ["element"]:
            if count is None and words[1] != "vertex":
                raise ValueError(f"{path} has {words[1]!r} before its vertices, which is not read")
            current, count = words[1], int(words[2]) if words[1] == "vertex" else count
        elif words[:1] == ["property"] and current == "vertex":
            if words[1] not in _TYPES:
                raise ValueError(f"{path}: vertices with a property of type {words[1]!r} are not read")
            fields.append((words[-1], _TYPES[words[1]]))
    if order not in ("ascii", "binary_little_endian", "binary_big_endian") or count is None:
        raise ValueError(f"{path}: format {order!r} with {count} vertices is not read")
    kind = np.dtype([(name, (">" if order == "binary_big_endian" else "<") + code) for name, code in fields])
    if order == "ascii":
        rows = [tuple(map(float, line.split())) for line in body.split(b"\n")[:count]]
        complete = len(rows) == count and all(len(row) == len(fields) for row in rows)
        vertices = np.array(rows, dtype=[(name, "f8") for name, _ in fields]) if complete else None
    else:
        complete = len(body) >= kind.itemsize * count
        vertices = np.frombuffer(body, kind, count) if complete else None
    if vertices is None:
        raise ValueError(f"{path} is cut off: its header promises {count} vertices")
    if not set(_AXES) <= set(kind.names or ()):
        raise ValueError(f"{path} has no x, y, z but {', '.join(kind.names or ())}")

    def columns(names: tuple[str, ...], dtype: Any) -> np.ndarray | None:
        if not set(names) <= set(kind.names):
            return None
        return np.stack([vertices[name] for name in names], -1).astype(dtype)

    single = kind["x"].itemsize == 4
    points = columns(_AXES, np.float32 if single else np.float64)
    return Cloud(points, columns(_COLORS, np.uint8), columns(_NORMALS, np.float32))


def to_open3d(points: Array, colors: Array | None = None, normals: Array | None = None) -> Any:
    """An ``open3d.geometry.PointCloud`` of points (N, 3), colors (N, 3) uint8 or [0, 1], normals (N, 3)."""
    open3d = require("open3d", "viz")
    cloud = open3d.geometry.PointCloud()
    vectors = open3d.utility.Vector3dVector
    cloud.points = vectors(numpy_array(points).astype(np.float64))
    if colors is not None:
        cloud.colors = vectors(color_bytes(numpy_array(colors)).astype(np.float64) / 255)
    if normals is not None:
        cloud.normals = vectors(numpy_array(normals).astype(np.float64))
    return cloud


def color_bytes(values: np.ndarray) -> np.ndarray:
    """uint8 colours from uint8 or from floats in [0, 1]."""
    return values if values.dtype == np.uint8 else (np.clip(values, 0, 1) * 255).round().astype(np.uint8)


def numpy_array(values: Array) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside ``path`` that moves into its place at the end: no half-written file carries the name."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
