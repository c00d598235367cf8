"""Pictures and clouds, and the tool that writes them from an episode file."""

import numpy as np
import pytest
import torch

from vilma.pointmap import Camera, PointMap
from vilma.pointmap.view import colorize, figure, write_ply


def scene(height=40, width=48):
    """A cube of 6 x 6 pixels above a table, seen from straight above; the red cube is nearer by 5 cm."""
    pose = np.diag([1.0, -1, -1, 1])
    pose[2, 3] = 1.5
    depth = np.full((height, width), 0.7, np.float32)
    depth[10:16, 20:26] = 0.65
    depth[:, :3] = 0
    rgb = np.full((height, width, 3), 128, np.uint8)
    rgb[10:16, 20:26] = (255, 0, 0)
    return rgb, depth, Camera.from_fov(45.0, (height, width), pose)


def test_colors_follow_the_axes():
    _, depth, camera = scene()
    seen = PointMap.from_depth(depth, camera, frame="world")
    picture = colorize(seen)
    assert picture.shape == (40, 48, 3) and picture.dtype == np.uint8
    assert (picture[:, 0] == picture[0, 0]).all() and picture[0, 0].max() < 30, "holes are dark"
    row = picture[30, 3:].astype(int)
    assert (np.diff(row[:, 0]) >= 0).all() and row[-1, 0] > 240, "red grows with x"
    assert (np.diff(picture[:, 40, 1].astype(int)) <= 0).all(), "green falls with the row: y points up here"
    assert picture[12, 22, 2] > picture[20, 22, 2], "the cube is higher, so more blue"
    with pytest.raises(ValueError, match="index it first"):
        colorize(PointMap.from_depth(np.stack([depth, depth]), camera))


def test_ply_reads_back(tmp_path):
    rgb, depth, camera = scene()
    points, colors = PointMap.from_depth(depth, camera).to_cloud(colors=rgb)
    path = write_ply(points, colors, tmp_path / "sub" / "cloud.ply")
    header, _, body = path.read_bytes().partition(b"end_header\n")
    assert f"element vertex {len(points)}".encode() in header
    vertices = np.frombuffer(body, [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    np.testing.assert_array_equal(vertices["xyz"], points.numpy())
    np.testing.assert_array_equal(vertices["rgb"], colors.numpy())
    plain = write_ply(points, None, tmp_path / "plain.ply").read_bytes()
    assert len(plain.partition(b"end_header\n")[2]) == 12 * len(points)
    with pytest.raises(ValueError, match="shape of points"):
        write_ply(points, colors[:-1], tmp_path / "bad.ply")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain.ply", "sub"]


def test_figure_writes_one_row_a_camera(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    rgb, depth, camera = scene()
    seen = PointMap.from_depth(depth, camera, frame="world")
    one = figure(torch.from_numpy(rgb).movedim(-1, 0), depth, seen, tmp_path / "one.png")
    two = figure(
        {"a": rgb, "b": rgb / 255},
        {"a": depth, "b": depth},
        {"a": seen, "b": seen},
        tmp_path / "two.png",
        "title",
    )
    assert Image.open(two).height == 2 * Image.open(one).height
    with pytest.raises(ValueError, match="same cameras"):
        figure({"a": rgb}, {"b": depth}, {"a": seen}, tmp_path / "bad.png")


@pytest.fixture
def episodes(tmp_path):
    h5py = pytest.importorskip("h5py")
    rgb, depth, camera = scene()
    path = tmp_path / "lift.hdf5"
    with h5py.File(path, "w") as file:
        for demo in ("demo_0", "demo_1"):
            obs = file.create_group(f"data/{demo}/obs")
            obs["top_image"] = np.stack([rgb] * 3)
            obs["top_depth"] = np.stack([depth, depth + 0.1, depth])[..., None]
            obs["top_intrinsic"] = camera.intrinsics.expand(3, 3, 3).numpy()
            obs["top_extrinsic"] = camera.pose.expand(3, 4, 4).numpy()
            obs["side_image"] = np.stack([rgb] * 3)
        bare = file.create_group("data/demo_10/obs")
        bare["side_image"] = np.stack([rgb] * 3)
        odd = file.create_group("data/demo_11/obs")
        for key in ("top_image", "top_intrinsic", "top_extrinsic"):
            odd[key] = file[f"data/demo_0/obs/{key}"][:]
        odd["top_depth"] = np.ones((3, 20, 24, 1), np.float32)
    return path


def view(*arguments):
    from vilma.tools.view_pointmap import main

    return main([str(a) for a in arguments])


def test_tool_writes_picture_and_cloud(episodes, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, ply = tmp_path / "picture.png", tmp_path / "cloud.ply"
    assert view(episodes, "--episode", "demo_1", "--frame", -1, "--out", out, "--ply", ply) == 0
    assert out.read_bytes()[:4] == b"\x89PNG" and ply.stat().st_size > 40 * 45 * 15
    printed = capsys.readouterr().out
    assert "picture.png" in printed and f"{40 * 45} points" in printed and "warning" not in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--episode", "demo_7"], "no episode 'demo_7'; it has demo_0, demo_1, demo_10"),
        (["--episode", "demo_10"], r"no camera with depth and geometry \(of: side\)"),
        (["--episode", "demo_11"], r"image \(40, 48\) and depth \(20, 24\) differ in size"),
        (["--cameras", "side"], "lacks side_depth, side_intrinsic, side_extrinsic; complete cameras: top"),
        (["--frame", 3], "frames 0 to 2, got --frame 3"),
    ],
)
def test_tool_names_what_is_wrong(episodes, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        view(episodes, "--out", tmp_path / "picture.png", *arguments)
    assert not (tmp_path / "picture.png").exists()


def test_the_asked_frame_is_read(episodes):
    from vilma.tools.view_pointmap import read_frame

    depths = [read_frame(episodes, "demo_0", frame)["top"][1] for frame in (0, 1, -2)]
    np.testing.assert_allclose(depths[1], depths[0] + 0.1)
    np.testing.assert_array_equal(depths[2], depths[1])


def test_tool_names_a_file_that_is_not_there_or_broken(episodes, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        view(tmp_path / "none.hdf5")
    torn = tmp_path / "torn.hdf5"
    torn.write_bytes(episodes.read_bytes()[:3000])
    with pytest.raises(ValueError, match="truncated"):
        view(torn)
