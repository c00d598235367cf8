"""Geometry and FiLM against the golden vectors."""

import numpy as np
import pytest
import torch

from vilma.pointmap import Camera, PointMap, depth_from_zbuffer
from vilma.pointmap.camera import opencv_from_opengl
from vilma.testing import golden

DTYPES = [torch.float64, torch.float32]


def close(actual, expected, dtype, atol32, rtol64=1e-10):
    tolerance = {"rtol": rtol64, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 0, "atol": atol32}
    np.testing.assert_allclose(actual.numpy(), expected.numpy(), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("principal", ["center", "half", "intdiv"])
def test_unproject_pinhole(principal, dtype):
    vectors = golden("pmp", "unproject_pinhole.npz")
    depth = vectors["depth"].to(dtype)
    world_from_camera = vectors["T_world_cam_opencv"]

    def camera(pose):
        return Camera.from_fov(
            float(vectors["fovy"]),
            depth.shape,
            pose,
            principal,
            degrees=False,
            pixel_center=0,
            dtype=torch.float64,
        )

    close(camera(None).intrinsics, vectors[f"K_{principal}"], torch.float64, 0)
    local = PointMap.from_depth(depth, camera(None))
    world = PointMap.from_depth(depth, camera(world_from_camera), frame="world")
    base = world.to_frame(vectors["T_base_world"], "base")
    assert world.frame == "world" and base.frame == "base"
    valid = depth > 0
    flip = torch.tensor([1, -1, -1])
    for name, points in (
        ("cam_opencv", local.points),
        ("cam_opengl", local.points * flip),
        ("world", world.points),
        ("base", base.points),
    ):
        if f"{name}_{principal}" in vectors:
            close(points[valid], vectors[f"{name}_{principal}"][valid], dtype, 2e-6)
        assert (points[~valid] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_unproject_pinhole_masked(dtype):
    vectors = golden("pmp", "unproject_pinhole.npz")
    depth = vectors["depth"].to(dtype)
    camera = Camera(vectors["K_center"], vectors["T_world_cam_opencv"], depth.shape, pixel_center=0)
    near_far = float(vectors["depth_min"]), float(vectors["depth_max"])
    seen = PointMap.from_depth(depth, camera, near_far)
    assert torch.equal(seen.valid, vectors["mask"])
    close(seen.points, vectors["world_center_masked"], dtype, 2e-6)
    # c = W/2 with centres at +0.5 are the rays of c = (W-1)/2 with centres at 0.
    half = Camera.from_fov(float(vectors["fovy"]), depth.shape, vectors["T_world_cam_opencv"], degrees=False)
    close(PointMap.from_depth(depth, half, near_far).points, seen.points, dtype, 2e-6)


def test_opengl_and_opencv_poses_of_the_vector_agree():
    vectors = golden("pmp", "unproject_pinhole.npz")
    pose = vectors["T_world_cam_opengl"]
    assert torch.equal(opencv_from_opengl(pose), vectors["T_world_cam_opencv"])
    view = torch.linalg.inv(pose)
    camera = Camera.from_opengl(view, float(vectors["fovy"]), (24, 32), degrees=False)
    close(camera.pose, vectors["T_world_cam_opencv"], torch.float64, 0)
    mujoco = Camera.from_mujoco(40.0, pose[:3, 3].numpy(), pose[:3, :3].reshape(9).numpy(), (24, 32))
    assert torch.equal(mujoco.pose, vectors["T_world_cam_opencv"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["flat", "stored"])
def test_unproject_calvin(layout, dtype):
    vectors = golden("pmp", "unproject_calvin.npz")
    stored, depth = vectors["view_matrix_stored"], vectors["depth"].to(dtype)
    view = tuple(stored.flatten().tolist()) if layout == "flat" else stored
    camera = Camera.from_pybullet(view, float(vectors["fov_deg"]), depth.shape)
    close(PointMap.from_depth(depth, camera).points, vectors["point_map"], dtype, 5e-6, rtol64=1e-9)
    assert torch.allclose(camera.pose[:3, 3], vectors["look_from"], rtol=1e-9)
    local = PointMap.from_depth(
        depth, Camera.from_fov(float(vectors["fov_deg"]), depth.shape, principal="intdiv")
    )
    close(local.points * torch.tensor([1, -1, -1]), vectors["cam_opengl"], dtype, 5e-6, rtol64=1e-9)


def test_gl_depth_buffer():
    vectors = golden("pmp", "gl_depth_buffer.npz")
    near, far = float(vectors["near"]), float(vectors["far"])
    for buffer in (vectors["buffer"], vectors["buffer"].numpy()):
        np.testing.assert_allclose(depth_from_zbuffer(buffer, near, far), vectors["z"].numpy(), rtol=1e-9)
    pybullet = near * far / (far - (far - near) * vectors["buffer"].double())
    np.testing.assert_allclose(pybullet, vectors["z"].numpy(), rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_resize_nearest(dtype):
    vectors = golden("pmp", "resize_nearest.npz")
    depth = vectors["depth_full"].to(dtype)
    camera = Camera(vectors["K_full"], torch.eye(4), depth.shape, pixel_center=0)
    small = PointMap.from_depth(depth, camera).resize((24, 32))
    close(small.points, vectors["points_gather"], dtype, 2e-6)
    scaled = camera.resize((24, 32))
    close(scaled.intrinsics, vectors["K_scaled"], torch.float64, 0)
    close(
        PointMap.from_depth(vectors["depth_small"].to(dtype), scaled).points,
        vectors["points_scaledK"],
        dtype,
        2e-6,
    )
    # The same camera in the house convention: c' = s c.
    half = camera.with_pixel_center(0.5)
    assert torch.allclose(half.resize((24, 32)).intrinsics[:2, 2], half.intrinsics[:2, 2] / 2, rtol=1e-12)


def test_film_layer():
    from vilma.pointmap.encoders import FiLM

    vectors = golden("pmp", "film_layer.npz")
    film = FiLM(vectors["cond"].shape[1], vectors["x"].shape[1])
    assert torch.equal(film(vectors["x"], vectors["cond"]), vectors["x"]), "must start as the identity"
    film.load_state_dict(
        {
            "gamma.weight": vectors["gw"],
            "gamma.bias": vectors["gb"],
            "beta.weight": vectors["bw"],
            "beta.bias": vectors["bb"],
        }
    )
    torch.testing.assert_close(film(vectors["x"], vectors["cond"]), vectors["y"], rtol=1e-6, atol=1e-6)
