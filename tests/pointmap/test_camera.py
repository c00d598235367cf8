"""Cameras against other libraries and against arithmetic done another way."""

import contextlib

import numpy as np
import pytest
import torch

from vilma.pointmap import Camera, PointMap
from vilma.pointmap.camera import invert_rigid

SIZE = (24, 32)


def random_pose(*batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(*batch, 3, 3, generator=generator, dtype=torch.float64))
    rotation = rotation * torch.linalg.det(rotation)[..., None, None]
    pose = torch.eye(4, dtype=torch.float64).repeat(*batch, 1, 1)
    pose[..., :3, :3] = rotation
    pose[..., :3, 3] = torch.randn(*batch, 3, generator=generator, dtype=torch.float64)
    return pose


def skewed(pixel_center=0.5, pose=None):
    intrinsics = torch.tensor([[40.0, 1.5, 15.2], [0, 37.0, 11.1], [0, 0, 1]], dtype=torch.float64)
    return Camera(intrinsics, random_pose() if pose is None else pose, SIZE, pixel_center)


def pixels():
    v, u = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in SIZE), indexing="ij")
    return torch.stack([u, v], dim=-1)


@pytest.mark.parametrize("pixel_center", [0.0, 0.5])
def test_rays_are_inverse_intrinsics(pixel_center):
    camera = skewed(pixel_center)
    homogeneous = torch.cat([pixels() + pixel_center, torch.ones(*SIZE, 1, dtype=torch.float64)], dim=-1)
    torch.testing.assert_close(camera.rays(), homogeneous @ torch.linalg.inv(camera.intrinsics).T)


def test_project_undoes_unproject():
    depth = torch.rand(3, 2, *SIZE, dtype=torch.float64) + 0.5
    camera = Camera(skewed().intrinsics, random_pose(3, 2), SIZE)
    uv, z = camera.project(PointMap.from_depth(depth, camera).points)
    torch.testing.assert_close(z, depth)
    torch.testing.assert_close(uv, pixels().expand_as(uv), atol=1e-9, rtol=0)


def test_points_behind_the_camera_have_no_pixel():
    camera = Camera.from_fov(60.0, SIZE)
    uv, z = camera.project(torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]))
    assert z.tolist() == [-1, 0, 2]
    assert uv[:2].isnan().all() and uv[2].tolist() == [15.5, 11.5]


def test_opencv_projects_to_the_same_pixels():
    cv2 = pytest.importorskip("cv2")
    world_to_camera = random_pose(seed=3)
    camera = Camera.from_opencv(skewed().intrinsics, world_to_camera[:3], SIZE)
    camera = Camera(
        camera.intrinsics * torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 1]]), camera.pose, SIZE, 0.0
    )
    local = torch.randn(20, 3, dtype=torch.float64) * 0.3 + torch.tensor([0, 0, 2.0])
    world = local @ camera.pose[:3, :3].T + camera.pose[:3, 3]
    rotation, _ = cv2.Rodrigues(world_to_camera[:3, :3].numpy())
    expected, _ = cv2.projectPoints(
        world.numpy(), rotation, world_to_camera[:3, 3].numpy(), camera.intrinsics.numpy(), None
    )
    uv, depth = camera.project(world)
    np.testing.assert_allclose(uv, expected[:, 0], atol=1e-9)
    torch.testing.assert_close(depth, local[:, 2])


def test_mujoco_renders_what_the_camera_says():
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401  mujoco loads OSMesa, whose LLVM turns global: triton crashes when it comes later
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><statistic extent="1"/>
        <visual><quality offsamples="0"/><map znear="0.05" zfar="20"/></visual>
        <worldbody><light pos="0 0 3"/><geom name="floor" type="plane" size="3 3 .1" pos="0 0 .2"/>
        <geom name="ball" type="sphere" size=".06" pos=".1 -.15 .5"/>
        <camera name="eye" pos=".9 .3 1.2" xyaxes="-.3 .95 0 -.6 -.2 .8" fovy="50"/></worldbody></mujoco>"""
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    height, width = 96, 128
    try:
        renderer = mujoco.Renderer(model, height, width)
    except Exception as error:  # no OpenGL raises whatever the platform raises
        pytest.skip(f"no OpenGL: {error}")
    with renderer:
        renderer.update_scene(data, "eye")
        renderer.enable_depth_rendering()
        depth = renderer.render().copy()
        renderer.disable_depth_rendering()
        renderer.enable_segmentation_rendering()
        geoms = renderer.render()[..., 0].copy()
    camera = Camera.from_mujoco(model.cam_fovy[0], data.cam_xpos[0], data.cam_xmat[0], (height, width))
    points = PointMap.from_depth(depth, camera, (0.05, 10)).points
    floor = torch.from_numpy(geoms == model.geom("floor").id) & torch.from_numpy(depth < 10)
    assert floor.sum() > 1000
    assert (points[floor][:, 2] - 0.2).abs().max() < 2e-4
    ball = torch.from_numpy(geoms == model.geom("ball").id)
    center = torch.from_numpy(data.geom("ball").xpos.copy())
    assert ball.sum() > 20
    # Every pixel drawn as the ball lies on its surface; half a pixel of offset would be 5 mm here.
    assert ((points[ball] - center).norm(dim=-1) - 0.06).abs().median() < 5e-4
    uv, _ = camera.project(center)
    rows, columns = ball.nonzero(as_tuple=True)
    assert abs(columns.double().mean() - uv[0]) < 0.3 and abs(rows.double().mean() - uv[1]) < 0.3


def test_crop_shift_and_flip_keep_the_points():
    camera = skewed()
    depth = torch.rand(*SIZE, dtype=torch.float64) + 0.5
    points = PointMap.from_depth(depth, camera).points
    cropped = PointMap.from_depth(depth[3:15, 5:25], camera.crop(3, 5, 12, 20)).points
    torch.testing.assert_close(cropped, points[3:15, 5:25])
    shifted = PointMap.from_depth(depth.roll((-2, 3), (0, 1)), camera.shift(2, -3)).points
    torch.testing.assert_close(shifted[:-2, 3:], points[2:, :-3])
    for axis, dim in (("rows", 0), ("columns", 1)):
        for center in (0.0, 0.5):
            mirrored = camera.with_pixel_center(center).flip(axis)
            torch.testing.assert_close(
                PointMap.from_depth(depth.flip(dim), mirrored).points.flip(dim), points
            )
            torch.testing.assert_close(
                mirrored.flip(axis).intrinsics, camera.with_pixel_center(center).intrinsics
            )


def test_resize_keeps_the_view():
    camera = skewed()
    small = camera.resize((12, 8))
    points = (
        torch.randn(30, 3, dtype=torch.float64) + camera.pose[:3, :3] @ torch.tensor([0, 0, 5.0]).double()
    )
    uv, depth = camera.project(points)
    uv_small, depth_small = small.project(points)
    torch.testing.assert_close(depth_small, depth)
    torch.testing.assert_close(uv_small + 0.5, (uv + 0.5) * torch.tensor([8 / 32, 12 / 24]), equal_nan=True)
    assert small.size == (12, 8)


def test_to_frame_and_batches():
    camera = Camera(skewed().intrinsics, random_pose(4), SIZE)
    transform = random_pose(seed=5)
    torch.testing.assert_close(camera.to_frame(transform).pose, transform @ camera.pose)
    torch.testing.assert_close(invert_rigid(camera.pose), torch.linalg.inv(camera.pose))
    assert camera.batch_shape == (4,)
    single = camera.to(torch.float32)
    assert single.pose.dtype == single.intrinsics.dtype == torch.float32


def test_simulator_buffers_are_copied():
    intrinsics, pose = np.eye(3), np.eye(4)
    camera = Camera(intrinsics, pose, SIZE)
    pose[0, 3] = 7
    assert camera.pose[0, 3] == 0


GOOD = torch.tensor([[40.0, 0, 16], [0, 40, 12], [0, 0, 1]])


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: Camera(GOOD[:2], torch.eye(4), SIZE),
            r"intrinsics must have shape \(\.\.\., 3, 3\), got \(2, 3\)",
        ),
        (lambda: Camera(GOOD, torch.eye(3), SIZE), r"pose must have shape \(\.\.\., 4, 4\), got \(3, 3\)"),
        (lambda: Camera(GOOD, torch.eye(4), (0, 3)), "size must be"),
        (lambda: Camera(GOOD, torch.eye(4), 84), "size must be"),
        (lambda: Camera(GOOD.expand(2, 3, 3), torch.eye(4).expand(3, 4, 4), SIZE), "must broadcast"),
        (lambda: Camera(GOOD * torch.nan, torch.eye(4), SIZE), "intrinsics must be finite"),
        (lambda: Camera(GOOD * torch.tensor([0, 1, 1]), torch.eye(4), SIZE), "singular"),
        (lambda: Camera(GOOD.T, torch.eye(4), SIZE), "intrinsics must be"),
        (lambda: Camera(GOOD, torch.eye(4) * 2, SIZE), "pose must be rigid"),
        (lambda: Camera(GOOD, torch.diag(torch.tensor([1.0, 1, -1, 1])), SIZE), "right-handed"),
        (lambda: Camera(GOOD, torch.full((4, 4), torch.inf), SIZE), "pose must be finite"),
        (lambda: Camera.from_fov(0.0, SIZE), "fovy must lie between 0 and 180 degrees"),
        (lambda: Camera.from_fov(60.0, SIZE, degrees=False), "pi radians"),
        (lambda: Camera.from_fov(60.0, SIZE, principal="middle"), "half, center, intdiv"),
        (lambda: Camera.from_opengl(random_pose().T, 60.0, SIZE), "from_pybullet"),
        (lambda: Camera.from_pybullet(random_pose(), 60.0, SIZE), "from_opengl"),
        (lambda: Camera.from_pybullet([0.0] * 15, 60.0, SIZE), r"\(15,\)"),
        (lambda: Camera.from_mujoco(45.0, [0, 0, 0], np.eye(2), SIZE), "cam_xmat must have shape"),
        (lambda: Camera.from_opencv(GOOD, torch.eye(3), SIZE), "world_to_camera must have shape"),
        (lambda: skewed().crop(20, 0, 5, 5), "leaves the image of size 24 x 32"),
        (lambda: skewed().flip("vertical"), "'rows' or 'columns'"),
        (lambda: skewed().to_frame(torch.eye(3)), "transform must have shape"),
        (lambda: skewed().project(torch.zeros(5, 2)), "points must have shape"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
