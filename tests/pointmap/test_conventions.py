"""Foreign depth and cameras: round trips, the OpenGL pipeline done by hand, planes that stay planes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from vilma.pointmap import Camera, PointMap
from vilma.pointmap.camera import invert_rigid
from vilma.pointmap.conventions import (
    CONVENTIONS,
    CameraConvention,
    camera_from_opengl,
    camera_from_pybullet,
    clip_planes,
    depth_from_distance,
    distance_from_depth,
    intrinsics_from_projection,
    opencv_extrinsics,
    opengl_view,
    projection_from_camera,
)
from vilma.testing import golden

from .test_camera import SIZE, random_pose, skewed
from .test_point_map import looking_down, plane_depth

NEAR, FAR = 0.05, 6.0
EVERY = [
    CameraConvention(axes, extrinsics, transposed, center, depth, *planes, up, mirrored)
    for axes, extrinsics, transposed, center, (depth, planes), up, mirrored in itertools.product(
        ("opencv", "opengl"),
        ("camera_to_reference", "reference_to_camera"),
        (False, True),
        (0.0, 0.5),
        (
            ("metric", (None, None)),
            ("millimetres", (None, None)),
            ("zbuffer", (NEAR, FAR)),
            ("distance", (None, None)),
        ),
        (False, True),
        (False, True),
    )
]


def test_every_convention_round_trips():
    camera = Camera(skewed().intrinsics, random_pose(2), SIZE)
    depth = torch.rand(2, *SIZE, dtype=torch.float64) + 0.5
    depth[0, 3, 4], depth[1, 0, 0] = 0, torch.nan
    expected = PointMap.from_depth(depth, camera)
    seen = set()
    for convention in EVERY:
        written = convention.write(depth, camera)
        metres, back = convention.read(*written)
        again = PointMap.from_depth(metres, back)
        torch.testing.assert_close(again.points, expected.points, msg=str(convention))
        assert torch.equal(again.valid, expected.valid), convention
        torch.testing.assert_close(back.intrinsics, camera.intrinsics)
        torch.testing.assert_close(back.pose, camera.pose)
        seen.add(
            tuple(float(x.nan_to_num().double().mul(w).sum()) for x, w in zip(written, _weights(written)))
        )
    assert len(seen) == len(EVERY), "two conventions write the same numbers: one of them does nothing"


def _weights(written):
    """Fixed random weights, so that a flip or a transpose changes the sum."""
    return [
        torch.rand(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) for x in written
    ]


def gl_window(points, view, projection, size):
    """Window coordinates (u from the left, v from the top) and depth-buffer value, as the OpenGL
    specification has them: clip coordinates, division by w, viewport."""
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], -1)
    clip = homogeneous @ view.T @ projection.T
    ndc = clip[:, :3] / clip[:, 3:]
    height, width = size
    return (ndc[:, 0] + 1) / 2 * width, (1 - ndc[:, 1]) / 2 * height, (ndc[:, 2] + 1) / 2


def frustum(left, right, bottom, top, near, far):
    """glFrustum, as printed in the OpenGL specification."""
    return np.array(
        [
            [2 * near / (right - left), 0, (right + left) / (right - left), 0],
            [0, 2 * near / (top - bottom), (top + bottom) / (top - bottom), 0],
            [0, 0, -(far + near) / (far - near), -2 * far * near / (far - near)],
            [0, 0, -1, 0],
        ]
    )


def look_at(eye, target, up):
    """gluLookAt by its definition: the rows of the rotation are right, up and backward."""
    back = (eye - target) / np.linalg.norm(eye - target)
    right = np.cross(up, back) / np.linalg.norm(np.cross(up, back))
    view = np.eye(4)
    view[:3, :3] = right, np.cross(back, right), back
    view[:3, 3] = -view[:3, :3] @ eye
    return view


def test_opengl_matrices_agree_with_the_pipeline_of_the_specification():
    generator = np.random.default_rng(0)
    view = look_at(np.array([0.9, 0.3, 1.2]), np.array([0.1, -0.1, 0.5]), np.array([0, 0, 1.0]))
    projection = frustum(-0.03, 0.05, -0.02, 0.035, NEAR, FAR)
    points = np.array([0.1, -0.1, 0.5]) + generator.uniform(-0.2, 0.2, (50, 3))
    u, v, buffer = gl_window(points, view, projection, SIZE)
    flat_view, flat_projection = tuple(view.T.reshape(-1)), tuple(projection.T.reshape(-1))
    for camera in (
        camera_from_opengl(view, projection, SIZE),
        camera_from_pybullet(np.array(flat_view), np.array(flat_projection), SIZE),
        camera_from_pybullet(view.T, projection.T, SIZE),
    ):
        uv, depth = camera.project(torch.from_numpy(points))
        np.testing.assert_allclose(uv + 0.5, np.stack([u, v], -1), atol=1e-9)
        back = CameraConvention(depth="zbuffer", near=NEAR, far=FAR)
        metres, _ = back.read(torch.from_numpy(buffer).expand(1, -1), np.eye(3), np.eye(4))
        np.testing.assert_allclose(metres[0], depth, rtol=1e-9)
        np.testing.assert_allclose(opengl_view(camera), view, atol=1e-12)
        np.testing.assert_allclose(projection_from_camera(camera, NEAR, FAR), projection, atol=1e-12)
    skew = skewed()
    torch.testing.assert_close(
        intrinsics_from_projection(projection_from_camera(skew, NEAR, FAR), SIZE), skew.intrinsics
    )
    near, far = clip_planes(np.array(flat_projection))
    np.testing.assert_allclose([near, far], [NEAR, FAR], rtol=1e-9)
    endless = frustum(-0.03, 0.05, -0.02, 0.035, NEAR, 1e300)
    assert clip_planes(endless)[1] == torch.inf
    world = (
        torch.tensor([[0.1, 0.2, 3.0], [-0.4, 0.1, 2.0]]).double() @ skew.pose[:3, :3].T + skew.pose[:3, 3]
    )
    u, v, _ = gl_window(
        world.numpy(), opengl_view(skew).numpy(), projection_from_camera(skew, NEAR, FAR).numpy(), SIZE
    )
    np.testing.assert_allclose(skew.project(world)[0] + 0.5, np.stack([u, v], -1), atol=1e-9)


def test_pybullet_fov_and_projection_give_one_camera():
    """computeProjectionMatrixFOV: f = 1 / tan(fov / 2), square pixels through the aspect."""
    height, width = SIZE
    f = 1 / np.tan(np.deg2rad(75) / 2)
    top = NEAR / f
    side = top * width / height
    projection = frustum(-side, side, -top, top, NEAR, FAR)
    view = look_at(np.array([1.0, 0.2, 0.9]), np.zeros(3), np.array([0, 0, 1.0]))
    ours = camera_from_pybullet(view.T, projection.T, SIZE)
    by_fov = Camera.from_pybullet(view.T, 75.0, SIZE, principal="half", dtype=torch.float64)
    torch.testing.assert_close(ours.intrinsics, by_fov.intrinsics)
    torch.testing.assert_close(ours.pose, by_fov.pose)
    torch.testing.assert_close(ours.pose[:3, 3], torch.tensor([1.0, 0.2, 0.9]).double())


def test_calvin_vector_through_the_typed_door():
    vectors = golden("pmp", "unproject_calvin.npz")
    convention = replace(CONVENTIONS["pybullet"], pixel_center=0.0)
    height, width = vectors["depth"].shape
    focal = height / 2 / np.tan(np.deg2rad(float(vectors["fov_deg"])) / 2)
    intrinsics = np.array([[focal, 0, width // 2], [0, focal, height // 2], [0, 0, 1]])
    depth, camera = convention.read(vectors["depth"].double(), intrinsics, vectors["view_matrix_stored"])
    points = PointMap.from_depth(depth, camera).points
    np.testing.assert_allclose(points, vectors["point_map"], rtol=1e-9)


def test_ray_distance_of_a_sphere_is_its_radius():
    camera = skewed()
    depth = depth_from_distance(torch.full(SIZE, 0.7, dtype=torch.float64), camera)
    points = PointMap.from_depth(depth, camera).points
    torch.testing.assert_close(
        (points - camera.pose[:3, 3]).norm(dim=-1), torch.full(SIZE, 0.7, dtype=torch.float64)
    )
    torch.testing.assert_close(distance_from_depth(depth, camera), torch.full(SIZE, 0.7, dtype=torch.float64))


def test_pictures_turn_with_the_depth():
    image = torch.arange(2 * 3 * 4).view(2, 3, 4)
    up = CameraConvention(bottom_up=True, mirrored=True)
    assert torch.equal(up.upright(image), image.flip(-2, -1)) and torch.equal(
        up.upright(up.upright(image)), image
    )
    assert torch.equal(up.upright(image.movedim(0, -1), -3), image.movedim(0, -1).flip(0, 1))
    assert torch.equal(up.upright(image.numpy()[::-1]), image.flip(0).flip(-2, -1))
    # A bottom-up buffer read upright and the same buffer with a flipped camera show the same points.
    camera, depth = looking_down(), plane_depth(looking_down(), 0.8)
    flipped = PointMap.from_depth(depth.flip(0), camera.flip("rows")).points
    metres, back = CameraConvention(bottom_up=True).read(depth.flip(0), camera.intrinsics, camera.pose)
    torch.testing.assert_close(PointMap.from_depth(metres, back).points, flipped.flip(0))


def test_sensor_millimetres_and_background():
    depth, camera = looking_down(), None
    camera, depth = depth, (plane_depth(depth, 0.8) * 1000).round().to(torch.uint16)
    depth[0, 0] = 0
    metres, back = CONVENTIONS["realsense"].read(
        depth.numpy(), camera.with_pixel_center(0).intrinsics, camera.pose
    )
    seen = PointMap.from_depth(metres, back)
    assert not seen.valid[0, 0] and seen.valid.sum() == seen.valid.numel() - 1
    assert (seen.points[seen.valid][:, 2] - 0.8).abs().max() < 1e-3, "half a millimetre of rounding"
    buffer = torch.tensor([[0.5, 1.0]])
    metres, _ = CameraConvention(depth="zbuffer", near=NEAR, far=FAR).read(buffer, np.eye(3), np.eye(4))
    assert metres[0, 1] == 0 and metres[0, 0] > 0, "the far plane is background, no reading"
    odd = torch.tensor([[-1.0, torch.inf, torch.nan, 1.0]])
    assert CONVENTIONS["vilma"].read(odd, np.eye(3), np.eye(4))[0].tolist() == [[0, 0, 0, 1]]
    torch.testing.assert_close(opencv_extrinsics(skewed()), invert_rigid(skewed().pose)[:3])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CameraConvention(axes="maya"), "opencv, opengl; got 'maya'"),
        (lambda: CameraConvention(depth="zbuffer"), "near=None, far=None"),
        (lambda: CameraConvention(near=0.1, far=1.0), "belong to it alone"),
        (lambda: CameraConvention(pixel_center=0.3), "0.5 or 0"),
        (
            lambda: CONVENTIONS["vilma"].read(torch.ones(SIZE), np.eye(3), random_pose().mT),
            "stored transposed",
        ),
        (lambda: camera_from_opengl(skewed().pose.mT, np.eye(4), SIZE), "camera_from_pybullet"),
        (lambda: camera_from_pybullet(skewed().pose, np.eye(4), SIZE), "camera_from_opengl"),
        (lambda: intrinsics_from_projection(np.eye(4), SIZE), "perspective"),
        (lambda: intrinsics_from_projection(np.eye(3), SIZE), r"\(3, 3\)"),
        (lambda: projection_from_camera(skewed(), 2, 1), "0 < near < far"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
