"""Pictures and clouds, and the tool that writes them from an episode file."""

import numpy as np
import pytest
import torch

from vilma.pointmap import Camera, PointMap
from vilma.pointmap.ply import read_ply
from vilma.pointmap.view import color_normals, colorize, figure


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


def test_normal_colors_follow_the_surface():
    _, depth, camera = scene()
    picture = color_normals(PointMap.from_depth(depth, camera, frame="world"))
    assert (picture[30, 10] == (128, 128, 255)).all(), "the table faces up: +z is blue"
    assert (picture[:, :3] < 30).all(), "holes have no normal"


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
    full = figure(rgb, depth, seen, tmp_path / "full.png", full=True)
    assert Image.open(full).width > 1.5 * Image.open(one).width
    own = figure(
        rgb, depth, PointMap.from_depth(depth, camera, frame="camera"), tmp_path / "own.png", full=True
    )
    assert own.stat().st_size > 10000
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
    out, ply, page = (tmp_path / name for name in ("picture.png", "cloud.ply", "page.html"))
    arguments = ["--frame", -1, "--out", out, "--ply", ply, "--html", page, "--every", 2]
    assert view(episodes, "--episode", "demo_1", *arguments) == 0
    assert out.read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "picture.png" in printed and f"{40 * 45} points" in printed and "warning" not in printed
    assert "2 moments" in printed
    rgb, depth, camera = scene()
    cloud = read_ply(ply)
    expected, colors = PointMap.from_depth(depth, camera).to_cloud(colors=rgb)
    np.testing.assert_allclose(cloud.points, expected, atol=1e-6)
    np.testing.assert_array_equal(cloud.colors, colors)
    assert cloud.normals[300].tolist() == [0, 0, 1]
    assert view(episodes, "--out", out, "--ply", ply, "--ascii") == 0
    assert ply.read_bytes().startswith(b"ply\nformat ascii") and len(read_ply(ply).points) == 40 * 45


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


def test_tool_shows_single_frames(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from PIL import Image

    rgb, depth, camera = scene()
    out, ply = tmp_path / "picture.png", tmp_path / "cloud.ply"
    arrays = {"rgb": rgb, "depth": depth, "intrinsics": camera.intrinsics.numpy()}
    expected = PointMap.from_depth(depth, camera).to_cloud()
    for pose in ({"pose": camera.pose.numpy()}, {}):
        np.savez(tmp_path / "frame.npz", **arrays, **pose)
        assert view(tmp_path / "frame.npz", "--out", out, "--ply", ply) == 0
        local = expected if pose else (expected - camera.pose[:3, 3]) @ camera.pose[:3, :3]
        np.testing.assert_allclose(read_ply(ply).points, local, atol=1e-6)
    Image.fromarray(rgb).save(tmp_path / "color.png")
    Image.fromarray((depth * 1000).round().astype(np.uint16)).save(tmp_path / "depth.png")
    k = camera.with_pixel_center(0).intrinsics
    pictures = [tmp_path / "color.png", "--depth", tmp_path / "depth.png"]
    numbers = ["--intrinsics", *(float(x) for x in (k[0, 0], k[1, 1], k[0, 2], k[1, 2]))]
    assert view(*pictures, *numbers, "--out", out, "--ply", ply) == 0
    np.testing.assert_allclose(read_ply(ply).points, local, atol=1e-4)
    assert "warning" not in capsys.readouterr().out
    np.savez(tmp_path / "bare.npz", rgb=rgb)
    np.savez(tmp_path / "odd.npz", rgb=rgb[1:], depth=depth, intrinsics=np.eye(3))
    for arguments, message in (
        (pictures, "needs --intrinsics"),
        ([tmp_path / "bare.npz"], "lacks depth, intrinsics; it has rgb"),
        ([tmp_path / "odd.npz"], "share one view"),
        ([tmp_path / "gone.npz"], "no such file"),
        ([tmp_path / "frame.npz", "--every", 2, "--html", tmp_path / "a.html"], "one moment"),
    ):
        with pytest.raises(ValueError, match=message):
            view(*arguments, "--out", out)


def test_disparity_is_inverse_depth():
    """A point at depth z seen from two places b apart: its columns differ by f b / z."""
    from vilma.pointmap.rgbd_files import depth_from_disparity

    depth = np.array([[2.0, 4.0], [0.5, np.inf]])
    disparity = 900 * 0.2 / depth - 30
    disparity[1, 1] = np.nan
    np.testing.assert_allclose(depth_from_disparity(disparity, 900, 0.2, 30), [[2, 4], [0.5, 0]], rtol=1e-6)


def test_the_motorcycle_is_a_scene(monkeypatch):
    import sys

    from vilma.pointmap.rgbd_files import motorcycle

    pytest.importorskip("skimage")
    rgb, depth, camera, frame = motorcycle()
    seen = PointMap.from_depth(depth, camera, frame=frame)
    assert rgb.shape == (500, 741, 3) and 0.9 < seen.valid.float().mean() < 0.95
    assert depth[depth > 0].min() > 1.5 and depth.max() < 10
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ImportError, match=r"vilma\[viz\]"):
        motorcycle()
