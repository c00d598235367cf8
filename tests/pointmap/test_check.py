"""The look at a first batch: a right one passes in silence, each wrong one is named with its key."""

import warnings

import numpy as np
import pytest
import torch

from vilma.pointmap import Camera, GeometryWarning, depth_problems, warn_about_geometry, zbuffer_from_depth
from vilma.pointmap.camera import invert_rigid, opencv_from_opengl
from vilma.pointmap.check import geometry_problems
from vilma.pointmap.conventions import distance_from_depth

from .test_augment import ray_cast
from .test_conventions import look_at

SIZE = (48, 64)
WORKSPACE = ((-0.3, -0.3, 0.0), (0.3, 0.3, 0.4))
BOX = torch.tensor([[-0.1, -0.12, 0.0], [0.08, 0.05, 0.12]]).double()


def camera_at(*eyes, size=SIZE, fov=50.0):
    """Cameras (N,) that look at a point beside the box from each eye."""
    poses = [
        np.linalg.inv(look_at(np.array(eye), np.array([0.03, 0.01, 0.05]), np.array([0, 0, 1.0])))
        for eye in eyes
    ]
    return Camera.from_fov(fov, size, opencv_from_opengl(torch.from_numpy(np.stack(poses))))


FRONT = [(0.7, 0.15 * k - 0.2, 0.6) for k in range(4)]
WRIST = [(0.1 + 0.05 * k, -0.35, 0.45) for k in range(4)]


def batch(**views):
    """B = 4 samples of one step: a box on a table at z = 0, float32 as a data set holds it."""
    out = {"task": ["stack"] * 4, "observation.state": torch.zeros(4, 1, 3)}
    for name, eyes in (views or {"front": FRONT, "wrist": WRIST}).items():
        camera = camera_at(*eyes, fov=75.0 if name == "wrist" else 50.0)
        depth = torch.stack([ray_cast(Camera(camera.intrinsics, pose, SIZE), BOX) for pose in camera.pose])
        out[f"observation.images.{name}"] = torch.zeros(4, 1, 3, *SIZE, dtype=torch.uint8)
        out[f"observation.depth.{name}"] = depth[:, None].float()
        out[f"observation.intrinsics.{name}"] = camera.intrinsics.expand(4, 1, 3, 3).float()
        out[f"observation.pose.{name}"] = camera.pose[:, None].float()
    return out


def changed(part, function, names=("front", "wrist"), of=batch):
    values = of()
    for name in names:
        values[f"observation.{part}.{name}"] = function(values[f"observation.{part}.{name}"])
    return values


@pytest.mark.parametrize("frame", ["world", "base", "camera"])
@pytest.mark.parametrize("workspace", [None, WORKSPACE])
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_a_right_batch_passes_in_silence(frame, workspace, noise):
    generator = torch.Generator().manual_seed(0)
    values = changed("depth", lambda d: d * (1 + noise * torch.randn(d.shape, generator=generator)))
    values["observation.depth.front"][0, 0, 3:9] = 0
    values["observation.depth.wrist"][1, 0, 5:9, 4:8] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            warn_about_geometry(values, reference_frame=frame, workspace=workspace, depth_range=(0.05, 2.0))
            == {}
        )
    flipped = {**values}
    for name in ("front", "wrist"):
        flipped[f"observation.depth.{name}"] = values[f"observation.depth.{name}"].flip(-2)
        camera = Camera(values[f"observation.intrinsics.{name}"], torch.eye(4), SIZE).flip("rows")
        flipped[f"observation.intrinsics.{name}"] = camera.intrinsics
    assert geometry_problems(flipped, workspace=workspace) == {}


def test_one_warning_a_key_names_it_and_its_caller():
    values = changed("depth", lambda d: d * 1000, ["wrist"])
    values["observation.images.front"] = torch.zeros(4, 1, 3, 24, 32, dtype=torch.uint8)
    with pytest.warns(GeometryWarning) as caught:
        problems = warn_about_geometry(values)
    texts = [str(w.message) for w in caught]
    assert len(texts) == len(problems) == 2 and all(w.filename == __file__ for w in caught)
    by_key = {text.split(": ")[0]: text for text in texts}
    assert "divide by 1000" in by_key["observation.depth.wrist"]
    assert "24 x 32" in by_key["observation.images.front"] and "48 x 64" in by_key["observation.images.front"]


POSES = {
    "OpenGL axes": opencv_from_opengl,
    "an OpenCV view matrix": invert_rigid,
    "an OpenGL view matrix": lambda pose: invert_rigid(opencv_from_opengl(pose)),
}


@pytest.mark.parametrize("text", POSES)
@pytest.mark.parametrize("workspace", [None, WORKSPACE])
def test_poses_of_another_convention_are_told_by_name(text, workspace):
    problems = geometry_problems(changed("pose", POSES[text]), workspace=workspace)
    assert set(problems) == {"observation.pose.front", "observation.pose.wrist"}
    for said in problems.values():
        assert text in said[0].split("(or")[0], said


def test_one_camera_tells_opengl_axes_by_gravity_and_a_foreign_frame_by_the_workspace():
    one = lambda: batch(front=FRONT[:1] * 4)  # noqa: E731
    (said,) = geometry_problems(changed("pose", opencv_from_opengl, ["front"], one)).values()
    assert "OpenGL axes" in said[0] and "lower than the camera" in said[0]
    far = changed("pose", torch.clone, ["front"], one)
    far["observation.pose.front"][..., 0, 3] += 5
    (said,) = geometry_problems(far, workspace=WORKSPACE).values()
    assert "another frame" in said[0]
    assert geometry_problems(far) == {}
    assert (
        geometry_problems(changed("pose", opencv_from_opengl, ["front"], one), reference_frame="camera") == {}
    )


@pytest.mark.parametrize(
    "part, change, text",
    [
        ("depth", lambda d: d * 1000, "look like millimetres"),
        ("depth", lambda d: (d * 1000).to(torch.int32), "whole numbers"),
        ("depth", lambda d: (d * 30).round(), "whole numbers, look like millimetres"),
        ("depth", lambda d: d * 60, "look like millimetres"),
        ("depth", lambda d: d / 1000, "divided by 1000 twice"),
        ("depth", lambda d: -d, "no pixel has a reading"),
        ("depth", lambda d: torch.where(torch.arange(64) < 30, -d, d), "lie behind the camera"),
        ("depth", lambda d: d * 0, "no pixel has a reading"),
        ("depth", lambda d: d[..., None], "drop the axis"),
        ("depth", lambda d: d * 9, "depth range"),
        ("images", lambda x: x.movedim(2, -1), "move the last axis"),
        ("images", lambda x: x[:, :, :1], "no three colours"),
        ("images", lambda x: x.float() + 200, "divide by 255"),
        ("intrinsics", lambda k: k * torch.tensor([10, 10, 1.0])[:, None], "480 x 640"),
        ("intrinsics", lambda k: k * torch.tensor([0.5, 0.5, 1.0])[:, None], "24 x 32"),
        ("intrinsics", lambda k: k * torch.tensor([1 / 64, 1 / 48, 1])[:, None], "fractions of the image"),
        ("intrinsics", lambda k: k.mT, "transposed"),
        ("intrinsics", lambda k: k * torch.tensor([[0.05, 1, 1], [1, 0.05, 1], [1, 1, 1]]), "field of view"),
        ("intrinsics", lambda k: k * torch.tensor([[0.3, 1, 1], [1, 1, 1], [1, 1, 1]]), "as long as wide"),
        ("intrinsics", lambda k: k[..., :2, :], r"\(4, 1, 2, 3\)"),
        ("pose", lambda p: p.mT, "transposed"),
        ("pose", lambda p: p * 1.1, "must be rigid"),
        ("pose", lambda p: p[..., :3, :], r"\(4, 1, 3, 4\)"),
    ],
)
def test_each_wrong_value_is_named_with_its_key(part, change, text):
    problems = geometry_problems(changed(part, change, ["wrist"]), depth_range=(0.05, 2.0))
    key = f"observation.{part}.wrist"
    assert set(problems) == {key}
    with pytest.raises(ValueError, match=text):
        raise ValueError("; ".join(problems[key]))


@pytest.mark.parametrize("planes", [(0.01, 10.0), (0.01, 500.0), (0.05, 3.0), (0.1, 2.0)])
@pytest.mark.parametrize("name", ["front", "wrist"])
def test_depth_buffers_are_told_near_and_far(planes, name):
    problems = geometry_problems(changed("depth", lambda d: zbuffer_from_depth(d, *planes), [name]))
    assert list(problems) == [f"observation.depth.{name}"]
    assert "depth buffer" in problems[f"observation.depth.{name}"][0]


def test_a_close_depth_buffer_is_told_though_it_is_not_crowded_to_the_end():
    """A hand camera 16 cm over the table: the buffer's median is 0.94, and float32 leaves few digits."""
    close = ray_cast(Camera.from_fov(40.0, SIZE, camera_at((0.06, 0.015, 0.16)).pose[0]), BOX * 0.2)
    close = torch.where((close > 0) & (close < 0.3), close, 0).float()
    buffer = torch.where(close > 0, zbuffer_from_depth(close, 0.01, 500.0), 0)
    assert 0.8 < buffer[buffer > 0].median() < 0.95
    assert "depth buffer" in depth_problems(buffer)[0] and depth_problems(close) == []


@pytest.mark.parametrize("name", ["front", "wrist"])
def test_distances_along_the_ray_are_told_where_there_are_planes(name):
    values = batch()
    camera = Camera(values[f"observation.intrinsics.{name}"], torch.eye(4), SIZE)
    values[f"observation.depth.{name}"] = distance_from_depth(values[f"observation.depth.{name}"], camera)
    assert "depth_from_distance" in geometry_problems(values)[f"observation.depth.{name}"][0]
    # Without planes nothing is claimed.
    rough = torch.rand(4, 1, *SIZE, generator=torch.Generator().manual_seed(0)) + 0.3
    assert depth_problems(rough, values[f"observation.intrinsics.{name}"]) == []
    fine = ray_cast(Camera.from_fov(50.0, SIZE, camera_at((0.02, 0.0, 0.97)).pose[0]), BOX)
    assert fine.max() < 1 and fine.median() > 0.95 and depth_problems(fine) == [], (
        "a table at 97 cm is a table"
    )


def test_poses_do_not_matter_in_the_camera_frame():
    assert geometry_problems(changed("pose", lambda p: p.mT), reference_frame="camera") == {}


def test_parts_of_a_batch_and_named_cameras():
    values = changed("depth", lambda d: d * 1000)
    assert set(geometry_problems(values, ["front"])) == {"observation.depth.front"}
    pictures = {key: value for key, value in values.items() if "images" in key}
    assert geometry_problems(pictures) == {} and geometry_problems({"task": ["x"]}) == {}
    flat = {key: value[:, 0] for key, value in batch().items() if key.startswith("observation.")}
    assert geometry_problems(flat) == {}, "observations without the time axis are looked at, too"
    assert geometry_problems({key: value.numpy() for key, value in flat.items()}) == {}
    for useless in (None, "depth", torch.tensor(1.0), torch.ones(3), torch.ones(0, 1, 3, 3)):
        for key in flat:
            if useless is None or "state" not in key:
                assert not {key} & set(geometry_problems(flat | {key: useless})), "it must not raise"
