"""PLY files against an independent parser, both formats and back, and open3d where it is installed."""

import struct

import numpy as np
import pytest

from vilma.pointmap.ply import read_ply, to_open3d, write_ply


def cloud(count=57):
    generator = np.random.default_rng(0)
    points = generator.normal(size=(count, 3)).astype(np.float32)
    normals = points / np.linalg.norm(points, axis=-1, keepdims=True)
    return points, generator.integers(0, 255, (count, 3), dtype=np.uint8), normals.astype(np.float32)


def parse(path):
    """Rows of a PLY file, value by value with struct, as the format's description has it."""
    lines, rest, body = [], path.read_bytes(), None
    while body is None:
        line, _, rest = rest.partition(b"\n")
        lines.append(line.decode())
        body = rest if line == b"end_header" else None
    codes = {"float": "f", "uchar": "B"}
    properties = [line.split()[1:] for line in lines if line.startswith("property")]
    count = int(next(line for line in lines if line.startswith("element vertex")).split()[2])
    if lines[1] == "format ascii 1.0":
        return [name for _, name in properties], [
            [float(x) for x in line.split()] for line in body.splitlines()
        ]
    assert lines[0] == "ply" and lines[1] == "format binary_little_endian 1.0"
    record = struct.Struct("<" + "".join(codes[kind] for kind, _ in properties))
    assert len(body) == record.size * count
    return [name for _, name in properties], [list(row) for row in record.iter_unpack(body)]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("with_normals", [True, False])
@pytest.mark.parametrize("with_colors", [True, False])
def test_both_formats_hold_what_was_given(tmp_path, binary, with_normals, with_colors):
    points, colors, normals = cloud()
    path = write_ply(
        points,
        colors if with_colors else None,
        tmp_path / "sub" / "a.ply",
        normals if with_normals else None,
        binary,
    )
    names, rows = parse(path)
    expected = [points] + [normals] * with_normals + [colors] * with_colors
    assert (
        names == ["x", "y", "z"] + ["nx", "ny", "nz"] * with_normals + ["red", "green", "blue"] * with_colors
    )
    np.testing.assert_array_equal(np.array(rows, np.float32), np.concatenate(expected, -1).astype(np.float32))
    back = read_ply(path)
    np.testing.assert_array_equal(back.points, points)
    assert (back.colors is None) != with_colors and (back.normals is None) != with_normals
    if with_colors:
        np.testing.assert_array_equal(back.colors, colors)
    if with_normals:
        np.testing.assert_array_equal(back.normals, normals)


def test_files_of_others_are_read(tmp_path):
    path = tmp_path / "big.ply"
    head = "ply\nformat binary_big_endian 1.0\ncomment hand made\nelement vertex 2\nproperty double x\n"
    head += "property double y\nproperty double z\nproperty float confidence\nelement face 1\n"
    head += "property list uchar int vertex_indices\nend_header\n"
    body = struct.pack(">dddf", 1, 2, 3, 0.5) + struct.pack(">dddf", -1, 0.1, 9, 0.5)
    path.write_bytes(head.encode() + body + struct.pack(">Biii", 3, 0, 1, 0))
    np.testing.assert_array_equal(read_ply(path).points, [[1, 2, 3], [-1, 0.1, 9]])
    empty = write_ply(np.zeros((0, 3)), None, tmp_path / "empty.ply")
    assert read_ply(empty).points.shape == (0, 3)


def test_colors_in_unit_range_become_bytes(tmp_path):
    points, colors, _ = cloud()
    path = write_ply(points, colors / 255.0, tmp_path / "a.ply")
    np.testing.assert_array_equal(read_ply(path).colors, colors)


def test_wrong_files_are_named(tmp_path):
    points, colors, normals = cloud()
    path = write_ply(points, colors, tmp_path / "a.ply")
    whole = path.read_bytes()
    for data, message in (
        (whole[:-3], "cut off"),
        (b"obj\n" + whole, "not a PLY"),
        (whole.replace(b"float x", b"float q"), "no x, y, z but q"),
        (whole.replace(b"float x", b"list uchar int x"), "type 'list'"),
        (whole.replace(b"element vertex", b"element face 2\nelement vertex"), "'face' before its vertices"),
        (whole.replace(b"binary_little", b"middle"), "'middle_endian'"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_ply(path)
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        write_ply(points[:, :2], None, path)
    with pytest.raises(ValueError, match="normals must have the shape of points"):
        write_ply(points, None, path, normals[:-1])
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"], "nothing half written is left"


@pytest.mark.parametrize("binary", [True, False])
def test_open3d_reads_the_files(tmp_path, binary):
    open3d = pytest.importorskip("open3d", exc_type=ImportError)
    points, colors, normals = cloud()
    path = write_ply(points, colors, tmp_path / "a.ply", normals, binary)
    read, made = open3d.io.read_point_cloud(str(path)), to_open3d(points, colors, normals)
    for one in (read, made):
        np.testing.assert_allclose(np.asarray(one.points), points, atol=1e-7)
        np.testing.assert_allclose(np.asarray(one.colors) * 255, colors, atol=1e-4)
        np.testing.assert_allclose(np.asarray(one.normals), normals, atol=1e-6)


def test_without_open3d_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(ImportError, match=r"vilma\[viz\]"):
        to_open3d(cloud()[0])
