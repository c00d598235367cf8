"""The PointMap type: holes, frames, crops, layouts, and what a wrong input is told."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from vilma.pointmap import Camera, PointMap, depth_from_zbuffer, depth_problems
from vilma.pointmap.camera import invert_rigid

from .test_camera import SIZE, random_pose, skewed


def plane_depth(camera: Camera, height: float) -> torch.Tensor:
    """Depth of the plane z = height of the reference frame."""
    directions = camera.rays() @ camera.pose[:3, :3].T
    return (height - camera.pose[2, 3]) / directions[..., 2]


def looking_down() -> Camera:
    tilt = torch.tensor(0.4, dtype=torch.float64)
    c, s = tilt.cos(), tilt.sin()
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.stack(
        [torch.stack([c * 0 + 1, c * 0, c * 0]), torch.stack([c * 0, -c, s]), torch.stack([c * 0, -s, -c])]
    )
    pose[:3, 3] = torch.tensor([0.1, -0.3, 1.2])
    return Camera.from_fov(45.0, SIZE, pose)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_known_plane_is_flat(dtype, bound):
    camera = looking_down()
    depth = plane_depth(camera, 0.8).to(dtype)
    assert (depth > 0).all()
    points = PointMap.from_depth(depth, camera).points
    assert points.dtype == dtype
    assert (points[..., 2] - 0.8).abs().max() < bound
    # Pythagoras, another way to the same depth: distance along the axis.
    offset = points.double() - camera.pose[:3, 3]
    torch.testing.assert_close(offset @ camera.pose[:3, 2], depth.double(), rtol=1e-6, atol=1e-6)


def test_half_precision_depth_is_unprojected_in_float32():
    camera = looking_down()
    depth = plane_depth(camera, 0.8).half()
    seen = PointMap.from_depth(depth, camera)
    assert seen.points.dtype == torch.float32
    torch.testing.assert_close(seen.points, PointMap.from_depth(depth.float(), camera).points)


def test_holes_are_exact_zeros_and_never_nan():
    depth = torch.full((2, *SIZE), 1.0)
    bad = [0.0, -1.0, torch.nan, torch.inf, -torch.inf, 0.05, 3.0, 2.999, 0.051]
    depth[1, 4, : len(bad)] = torch.tensor(bad)
    camera = Camera(skewed().intrinsics, random_pose(2), SIZE)
    seen = PointMap.from_depth(depth, camera, (0.05, 3.0))
    expected = torch.ones(2, *SIZE, dtype=torch.bool)
    expected[1, 4, :7] = False
    assert torch.equal(seen.valid, expected)
    for other in (seen, seen.to_frame(random_pose(seed=9)), seen.resize((12, 16)), seen.crop((2, 0, 10, 20))):
        assert torch.isfinite(other.points).all()
        assert (other.points[~other.valid] == 0).all()
        assert other.valid.any() and not other.valid.all()
    assert not PointMap.from_depth(depth, camera).valid[1, 4, :5].any()
    nothing = PointMap.from_depth(torch.zeros(SIZE), skewed())
    assert not nothing.valid.any() and nothing.to_cloud().shape == (0, 3)


def test_frames_compose():
    camera = skewed()
    depth = torch.rand(5, *SIZE, dtype=torch.float64) - 0.2
    first, second = random_pose(5, seed=1), random_pose(seed=2)
    seen = PointMap.from_depth(depth, camera)
    steps = seen.to_frame(first, "base").to_frame(second)
    torch.testing.assert_close(steps.points, seen.to_frame(second @ first).points)
    moved = Camera(camera.intrinsics, first @ camera.pose, SIZE)
    torch.testing.assert_close(seen.to_frame(first).points, PointMap.from_depth(depth, moved).points)
    local = seen.to_frame(invert_rigid(camera.pose), "camera")
    torch.testing.assert_close(local.points[..., 2], depth.clamp_min(0))
    assert steps.frame is None and local.frame == "camera"


def test_autocast_does_not_touch_the_geometry():
    camera, depth = looking_down().to(torch.float32), plane_depth(looking_down(), 0.8).float()
    seen = PointMap.from_depth(depth, camera).to_frame(random_pose().float())
    with torch.autocast("cpu", torch.bfloat16):
        again = PointMap.from_depth(depth, camera).to_frame(random_pose().float())
    assert torch.equal(seen.points, again.points)


def test_gradients_reach_depth_and_pose():
    depth = torch.rand(4, 5, dtype=torch.float64) + 0.5
    intrinsics = torch.tensor([[9.0, 0.3, 2], [0, 8, 2], [0, 0, 1]], dtype=torch.float64)

    def points(depth, intrinsics, pose):
        return PointMap.from_depth(depth, Camera(intrinsics, pose, (4, 5), check=False), (0.6, 3)).points

    leaves = [x.requires_grad_() for x in (depth, intrinsics, random_pose())]
    assert torch.autograd.gradcheck(points, leaves)


def test_workspace_crop_marks_and_pixel_crop_cuts():
    camera = looking_down()
    seen = PointMap.from_depth(plane_depth(camera, 0.8), camera, frame="world")
    box = [[-0.2, -0.5, 0.7], [0.1, 0.0, 0.9]]
    inside = seen.crop(box)
    x, y = seen.points[..., 0], seen.points[..., 1]
    assert torch.equal(inside.valid, (x >= -0.2) & (x <= 0.1) & (y >= -0.5) & (y <= 0.0))
    assert 0 < inside.valid.sum() < inside.valid.numel()
    assert (inside.points[~inside.valid] == 0).all()
    assert torch.equal(inside.points[inside.valid], seen.points[inside.valid])
    assert torch.equal(inside.crop(np.array(box)).valid, inside.valid)
    corner = seen.points[4, 4]
    assert seen.crop(torch.stack([corner, corner + 1])).valid[4, 4], "bounds belong to the workspace"
    assert seen.crop(torch.stack([corner - 1, corner])).valid[4, 4]
    window = seen.crop((3, 5, 12, 20))
    assert window.points.shape == (12, 20, 3) and window.frame == "world"
    assert torch.equal(window.points, seen.points[3:15, 5:25])
    again = PointMap.from_depth(plane_depth(camera, 0.8)[3:15, 5:25], camera.crop(3, 5, 12, 20))
    torch.testing.assert_close(window.points, again.points)


@pytest.mark.parametrize("size", [(10, 50), (24, 7), (48, 64), (1, 1)])
def test_resize_picks_torchs_nearest_pixels(size):
    depth = torch.rand(2, *SIZE) - 0.1
    seen = PointMap.from_depth(depth, skewed())
    small = seen.resize(size)
    expected = torch.nn.functional.interpolate(seen.to_image(), size=size, mode="nearest")
    assert torch.equal(small.to_image(), expected)
    assert torch.equal(small.valid, (small.points != 0).any(-1))


@pytest.mark.parametrize("seed", range(3))
def test_normals_of_planes_are_exact_and_face_the_camera(seed):
    camera = Camera(skewed().intrinsics, random_pose(seed=seed), SIZE)
    normal = torch.nn.functional.normalize(torch.tensor([0.4, -0.3, -1.0]).double(), dim=0)
    depth = -0.8 / (camera.rays() @ normal)  # the plane normal . p = -0.8 of the camera's own frame
    depth[10:14, 5] = 0
    depth[3, 3:30:2] = torch.nan
    seen = PointMap.from_depth(depth, camera)
    normals, known = seen.normals()
    assert torch.equal(known, seen.valid & known) and known.sum() > 0.95 * seen.valid.sum()
    expected = camera.pose[:3, :3] @ normal
    torch.testing.assert_close(normals[known], expected.expand_as(normals[known]), atol=1e-9, rtol=0)
    assert (normals[~known] == 0).all()
    toward = ((camera.pose[:3, 3] - seen.points) * normals).sum(-1)
    assert (toward[known] > 0).all()


def test_normals_do_not_bend_at_an_edge():
    """A step of 10 cm across the columns: on both sides the normal is that of the flat surface."""
    camera = Camera.from_fov(45.0, SIZE, dtype=torch.float64)
    depth = torch.full(SIZE, 1.0, dtype=torch.float64)
    depth[:, 16:] = 0.9
    normals, known = PointMap.from_depth(depth, camera).normals()
    assert known.all()
    torch.testing.assert_close(normals, torch.tensor([0.0, 0, -1]).double().expand_as(normals))
    spike = torch.full(SIZE, 1.0, dtype=torch.float64)
    spike[5, 5] = 0.5
    one = PointMap.from_depth(spike[None].expand(2, *SIZE), camera)
    _, known = one.normals(max_step=0.1)
    assert known.shape == (2, *SIZE) and not known[1, 5, 5] and known.sum() == known.numel() - 2
    lonely = torch.zeros(SIZE, dtype=torch.float64)
    lonely[5, 5] = 1
    assert not PointMap.from_depth(lonely, camera).normals()[1].any()


def test_normals_of_a_sphere():
    camera = Camera.from_fov(40.0, (80, 80), dtype=torch.float64)
    rays = camera.rays()
    center = torch.tensor([0.02, -0.03, 1.0]).double()
    along = (rays @ center) / (rays * rays).sum(-1)
    reach = 0.25**2 - ((rays * along[..., None] - center) ** 2).sum(-1)
    depth = torch.where(reach > 0, along - (reach.clamp_min(0) / (rays * rays).sum(-1)).sqrt(), 0)
    seen = PointMap.from_depth(depth, camera)
    normals, known = seen.normals()
    truth = (seen.points - center) / 0.25
    cosine = (normals * truth).sum(-1)[known]
    facing = -(truth * seen.points).sum(-1)[known] / seen.points[known].norm(dim=-1) > 0.5
    assert torch.rad2deg(cosine[facing].clamp(-1, 1).acos()).median() < 2


def test_affine_normalisation_undoes_itself_and_spares_holes():
    depth = torch.rand(2, *SIZE, dtype=torch.float64) - 0.3
    seen = PointMap.from_depth(depth, skewed(), frame="world")
    center, scale = (0.1, -0.2, 0.8), (0.12, 0.3, 0.08)
    small = seen.normalize(center, scale)
    assert (small.points[~small.valid] == 0).all() and torch.equal(small.valid, seen.valid)
    expected = (seen.points[seen.valid] - torch.tensor(center).double()) / torch.tensor(scale).double()
    torch.testing.assert_close(small.points[small.valid], expected, rtol=1e-6, atol=1e-6)
    back = small.unnormalize(center, scale, "world")
    torch.testing.assert_close(back.points, seen.points)
    assert back.frame == "world" and small.frame is None
    rows = torch.tensor([[0.0, 0, 0], [1, 2, 3]]), torch.tensor([[1.0, 1, 1], [2, 2, 2]])
    torch.testing.assert_close(
        seen.normalize(*rows)[1].points, seen[1].normalize(rows[0][1], (2, 2, 2)).points
    )


def test_network_layout():
    depth = torch.rand(2, 3, *SIZE) - 0.1
    seen = PointMap.from_depth(depth, skewed())
    image = seen.to_image(mask=True)
    assert image.shape == (2, 3, 4, *SIZE)
    assert torch.equal(image[:, :, :3].movedim(2, -1), seen.points)
    assert torch.equal(image[:, :, 3], seen.valid.float())
    plain = seen.to_image()
    assert plain.is_contiguous() and plain.data_ptr() == seen.points.data_ptr(), "to_image must not copy"
    assert torch.equal(seen[1, 2].points, seen.points[1, 2])


def test_cloud_keeps_colors_with_their_points():
    depth = torch.rand(*SIZE) - 0.3
    seen = PointMap.from_depth(depth, skewed())
    rgb = torch.randint(0, 255, (3, *SIZE), dtype=torch.uint8)
    points, colors = seen.to_cloud(colors=rgb)
    assert torch.equal(points, seen.to_cloud())
    assert torch.equal(colors, rgb.movedim(0, -1)[seen.valid])
    assert torch.equal(seen.to_cloud(colors=rgb.movedim(0, -1).numpy())[1], colors)


def test_flipped_numpy_depth():
    depth = np.random.default_rng(0).random(SIZE, dtype=np.float32)
    upright = PointMap.from_depth(np.ascontiguousarray(depth[::-1]), skewed())
    assert torch.equal(PointMap.from_depth(depth[::-1], skewed()).points, upright.points)


def a_map():
    return PointMap.from_depth(torch.ones(2, *SIZE), skewed())


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: PointMap.from_depth(torch.ones(32, 24), skewed()),
            r"\(\.\.\., 24, 32\), the camera's size, got \(32, 24\)",
        ),
        (lambda: PointMap.from_depth(torch.ones(*SIZE, 1), skewed()), "drop the last axis"),
        (lambda: PointMap.from_depth(torch.ones(SIZE, dtype=torch.int32), skewed()), "millimetres"),
        (lambda: PointMap.from_depth(torch.ones(SIZE), skewed(), (2, 1)), "near < far"),
        (lambda: PointMap(torch.ones(4, 4), torch.ones(4, dtype=torch.bool)), r"\(\.\.\., H, W, 3\)"),
        (lambda: PointMap(torch.ones(4, 4, 3), torch.ones(4, 4)), "valid must be bool"),
        (lambda: a_map().crop([1, 2, 3]), "box must be bounds"),
        (lambda: a_map().crop([0.0, 0.0, 1.0, 1.0]), "box must be bounds"),
        (lambda: a_map().crop([[1, 1, 1], [0, 2, 2]]), "below its maximum"),
        (lambda: a_map().crop((20, 0, 12, 12)), "leaves the image"),
        (lambda: a_map().resize((0, 4)), "size must be"),
        (lambda: a_map().to_frame(torch.ones(4, 4)), "rigid"),
        (lambda: a_map().normalize((0, 0, 0), (1, 0, 1)), "scale positive"),
        (lambda: a_map().normalize((0, 0), (1, 1)), "three numbers"),
        (lambda: a_map().to_cloud(), "index it first"),
        (lambda: a_map()[0].to_cloud(colors=torch.ones(3, 5, 5)), "colors must be"),
        (lambda: depth_from_zbuffer(torch.tensor([1.2]), 0.1, 2), "already metres"),
        (lambda: depth_from_zbuffer(np.array([np.nan, 0.5]), 0.1, 2), "1 non-finite"),
        (lambda: depth_from_zbuffer(np.array([0.5]), 2, 0.1), "0 < near < far"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_zbuffer_keeps_its_digits_in_float32():
    near, far = 0.0106, 530.5  # robosuite's Lift: znear and zfar times extent
    metres = np.linspace(0.2, 3, 400)
    buffer = ((1 - near / metres) / (1 - near / far)).astype(np.float32)
    back = depth_from_zbuffer(buffer, near, far)
    assert back.dtype == np.float32
    # What is left is the rounding of the stored buffer itself: dz = z^2 / near * 2^-25.
    assert (np.abs(back - metres) <= metres**2 / near * 2**-25 * 1.1 + metres * 2**-22).all()
    assert depth_from_zbuffer(np.array([0.0, 1.0]), 0.1, 2.0) == pytest.approx([0.1, 2.0])


def test_depth_in_wrong_units_is_noticed():
    camera = looking_down()
    metres = plane_depth(camera, 0.8)
    assert depth_problems(metres) == [] and depth_problems(metres.numpy()) == []
    assert depth_problems(torch.where(torch.rand(SIZE) < 0.2, torch.nan, metres)) == []
    assert "millimetres" in depth_problems((metres * 1000).short())[0]
    buffer = (1 - 0.01 / metres) / (1 - 0.01 / 10)
    assert "depth buffer" in depth_problems(buffer)[0]
    assert "millimetres" in depth_problems(metres * 60)[0], "6 cm before the camera"
    assert "axis reversed" in depth_problems(torch.cat([metres, -metres]))[0]
    assert "no pixel" in depth_problems(torch.zeros(SIZE))[0]


def test_the_light_half_imports_nothing_heavy():
    heavy = "{'timm', 'torchvision', 'matplotlib', 'open3d', 'h5py'}"
    code = f"""
import sys
import vilma.pointmap
from vilma.pointmap.depth import depth_from_zbuffer
assert not {{'torch'}} & set(sys.modules), 'the depth conversion pulls torch'
from vilma.pointmap import Camera, PointMap
import vilma.pointmap.encoders, vilma.pointmap.augment, vilma.pointmap.view, vilma.pointmap.orbit
import vilma.pointmap.check, vilma.pointmap.point_cloud, vilma.pointmap.conventions
assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
