"""How others write depth and cameras, as typed values with one door in and one door out.

Inside the house: depth in metres along the optical axis, rows from the top, OpenCV axes, camera -> reference
poses, pixel centres at +0.5 (see `camera.py`). `CameraConvention` names each of these choices for a source;
the functions below read and write the matrices of OpenGL renderers (PyBullet, MuJoCo).

H, W: rows, columns; "...": any leading dimensions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .camera import Camera, Values, as_tensor, check_rigid, invert_rigid, opencv_from_opengl
from .depth import depth_from_zbuffer, zbuffer_from_depth

AXES = ("opencv", "opengl")
EXTRINSICS = ("camera_to_reference", "reference_to_camera")
DEPTHS = ("metric", "millimetres", "zbuffer", "distance")


@dataclass(frozen=True)
class CameraConvention:
    """What the numbers of one source mean.

    axes: camera axes, "opencv" (x right, y down, z forward) or "opengl" (x right, y up, z backward: MuJoCo,
    PyBullet, Blender). extrinsics: "camera_to_reference" (a pose) or "reference_to_camera" (a view matrix,
    OpenCV's [R | t]). transposed: the 4 x 4 matrix is stored by columns (PyBullet's tuples, flat OpenGL).
    pixel_center: where K puts the centre of the first pixel, 0.5 (MuJoCo, OpenGL) or 0 (OpenCV).
    depth: "metric", "millimetres" (sensors), "zbuffer" (needs near and far), or "distance" (metres along the
    ray: lidars, ray casters). bottom_up, mirrored: images and depth are stored from the last row, from the
    last column; K belongs to the upright picture.
    """

    axes: str = "opencv"
    extrinsics: str = "camera_to_reference"
    transposed: bool = False
    pixel_center: float = 0.5
    depth: str = "metric"
    near: float | None = None
    far: float | None = None
    bottom_up: bool = False
    mirrored: bool = False

    def __post_init__(self) -> None:
        for name, known in (("axes", AXES), ("extrinsics", EXTRINSICS), ("depth", DEPTHS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.pixel_center not in (0, 0.5):
            raise ValueError(f"pixel_center must be 0.5 or 0, got {self.pixel_center}")
        planes = self.near is not None and self.far is not None
        if planes != (self.depth == "zbuffer"):
            raise ValueError(
                "near and far are the clipping planes of depth='zbuffer' and belong to it alone; got "
                f"depth={self.depth!r}, near={self.near}, far={self.far}"
            )

    def upright(self, image: Tensor | np.ndarray, height_axis: int = -2) -> Tensor:
        """An image (or depth) with the first row on top and the first column on the left; undoes itself.

        height_axis: of the rows, the columns follow: -2 for (..., H, W), -3 for (..., H, W, C).
        """
        image = torch.as_tensor(np.ascontiguousarray(image) if isinstance(image, np.ndarray) else image)
        axes = [height_axis] * self.bottom_up + [height_axis + 1] * self.mirrored
        return image.flip(axes) if axes else image

    def read(self, depth: Values, intrinsics: Values, extrinsics: Values) -> tuple[Tensor, Camera]:
        """This source's depth (..., H, W), K (..., 3, 3) and matrix (..., 4, 4) in the house's convention.

        Readings that are not there (not finite, not positive, a z-buffer at its far plane) become 0. Colour
        images go through `upright`. Raises ValueError for a matrix that is not rigid and for z-buffer values
        outside [0, 1].
        """
        depth = self.upright(as_tensor(depth))
        matrix = as_tensor(extrinsics)
        if matrix.shape[-1:] == (16,):
            matrix = matrix.unflatten(-1, (4, 4))
        matrix = matrix.mT if self.transposed else matrix
        check_rigid(matrix, "extrinsics", hint="; is it stored transposed?")
        pose = invert_rigid(matrix) if self.extrinsics == "reference_to_camera" else matrix
        pose = opencv_from_opengl(pose) if self.axes == "opengl" else pose
        camera = Camera(intrinsics, pose, tuple(depth.shape[-2:]), self.pixel_center).with_pixel_center()
        if self.depth == "zbuffer":
            background = depth >= 1
            depth = depth_from_zbuffer(depth, self.near, self.far).masked_fill(background, 0)
        elif self.depth == "millimetres":
            depth = depth / 1000
        elif self.depth == "distance":
            depth = depth_from_distance(depth, camera)
        return torch.where(torch.isfinite(depth) & (depth > 0), depth, 0), camera

    def write(self, depth: Tensor, camera: Camera) -> tuple[Tensor, Tensor, Tensor]:
        """The way back: depth, K and the 4 x 4 matrix as this source stores them. Holes become 0, in a
        z-buffer the far plane (1)."""
        camera = camera.with_pixel_center(self.pixel_center)
        hole = ~(torch.isfinite(depth) & (depth > 0))
        if self.depth == "zbuffer":
            depth = zbuffer_from_depth(depth.masked_fill(hole, self.far), self.near, self.far)
        elif self.depth == "millimetres":
            depth = (depth * 1000).masked_fill(hole, 0)
        elif self.depth == "distance":
            depth = distance_from_depth(depth, camera).masked_fill(hole, 0)
        else:
            depth = depth.masked_fill(hole, 0)
        matrix = opencv_from_opengl(camera.pose) if self.axes == "opengl" else camera.pose
        matrix = invert_rigid(matrix) if self.extrinsics == "reference_to_camera" else matrix
        return self.upright(depth), camera.intrinsics, matrix.mT if self.transposed else matrix


def depth_from_distance(distance: Tensor, camera: Camera) -> Tensor:
    """Metres along the optical axis from metres along each pixel's ray, (..., H, W)."""
    return distance / _ray_length(camera).to(distance)


def distance_from_depth(depth: Tensor, camera: Camera) -> Tensor:
    """Metres along each pixel's ray from metres along the optical axis, (..., H, W)."""
    return depth * _ray_length(camera).to(depth)


def intrinsics_from_projection(projection: Values, size: tuple[int, int]) -> Tensor:
    """K (..., 3, 3), pixel centres at +0.5, of an OpenGL projection matrix (..., 4, 4) and a viewport (H, W).

    The matrix acts on columns (the last row is 0 0 -1 0); PyBullet's flat 16 numbers and their
    ``reshape(4, 4)``, its transpose, are told by that row and taken as well.
    """
    matrix = _projection(projection)
    height, width = size
    intrinsics = torch.zeros(*matrix.shape[:-2], 3, 3, dtype=matrix.dtype, device=matrix.device)
    intrinsics[..., 0, 0] = matrix[..., 0, 0] * width / 2
    intrinsics[..., 0, 1] = -matrix[..., 0, 1] * width / 2
    intrinsics[..., 0, 2] = (1 - matrix[..., 0, 2]) * width / 2
    intrinsics[..., 1, 1] = matrix[..., 1, 1] * height / 2
    intrinsics[..., 1, 2] = (1 + matrix[..., 1, 2]) * height / 2
    intrinsics[..., 2, 2] = 1
    return intrinsics


def projection_from_camera(camera: Camera, near: float, far: float) -> Tensor:
    """The OpenGL projection matrix (..., 4, 4), acting on columns, of a camera and its clipping planes."""
    if not 0 < near < far:
        raise ValueError(f"clipping planes must satisfy 0 < near < far, got near={near}, far={far}")
    intrinsics = camera.with_pixel_center(0.5).intrinsics
    height, width = camera.size
    matrix = torch.zeros(*intrinsics.shape[:-2], 4, 4, dtype=intrinsics.dtype, device=intrinsics.device)
    matrix[..., 0, 0] = 2 * intrinsics[..., 0, 0] / width
    matrix[..., 0, 1] = -2 * intrinsics[..., 0, 1] / width
    matrix[..., 0, 2] = 1 - 2 * intrinsics[..., 0, 2] / width
    matrix[..., 1, 1] = 2 * intrinsics[..., 1, 1] / height
    matrix[..., 1, 2] = 2 * intrinsics[..., 1, 2] / height - 1
    matrix[..., 2, 2] = -(far + near) / (far - near)
    matrix[..., 2, 3] = -2 * far * near / (far - near)
    matrix[..., 3, 2] = -1
    return matrix


def clip_planes(projection: Values) -> tuple[Tensor, Tensor]:
    """near, far (...) of an OpenGL projection matrix in any of the layouts above.

    far is infinite for a matrix without a far plane. A float32 matrix knows far / near only to its digits:
    with near 0.01 and far 10 the far plane comes back to about 1e-4.
    """
    matrix = _projection(projection).double()
    slope, offset = matrix[..., 2, 2], matrix[..., 2, 3]
    return offset / (slope - 1), torch.where(slope == -1, torch.inf, offset / (slope + 1))


def camera_from_opengl(view_matrix: Values, projection: Values, size: tuple[int, int]) -> Camera:
    """A camera from OpenGL's two matrices acting on columns, view (..., 4, 4) and projection (..., 4, 4)."""
    view = as_tensor(view_matrix)
    check_rigid(view, "view_matrix", hint="; PyBullet's flat or reshaped tuple goes to camera_from_pybullet")
    return Camera(
        intrinsics_from_projection(projection, size).to(view), opencv_from_opengl(invert_rigid(view)), size
    )


def camera_from_pybullet(view_matrix: Values, projection: Values, size: tuple[int, int]) -> Camera:
    """A camera from what ``getCameraImage`` was given: the flat tuples of 16 or their ``reshape(4, 4)``."""
    view = as_tensor(view_matrix)
    if view.shape[-1:] == (16,):
        view = view.unflatten(-1, (4, 4))
    check_rigid(view.mT, "view_matrix (transposed)", hint="; an untransposed one goes to camera_from_opengl")
    return camera_from_opengl(view.mT, projection, size)


def opengl_view(camera: Camera) -> Tensor:
    """The view matrix (..., 4, 4), reference -> camera with OpenGL axes; PyBullet stores its transpose."""
    return invert_rigid(opencv_from_opengl(camera.pose))


def opencv_extrinsics(camera: Camera) -> Tensor:
    """OpenCV's [R | t] (..., 3, 4), reference -> camera; K: ``camera.with_pixel_center(0).intrinsics``."""
    return invert_rigid(camera.pose)[..., :3, :]


# The clipping planes of a z-buffer belong to a scene, so the renderers stand here with metric depth; for raw
# buffers: replace(CONVENTIONS["pybullet"], depth="zbuffer", near=0.01, far=10.0).
CONVENTIONS = {
    "vilma": CameraConvention(),
    "opencv": CameraConvention(extrinsics="reference_to_camera", pixel_center=0.0),
    "mujoco": CameraConvention(axes="opengl"),
    "robosuite": CameraConvention(bottom_up=True),
    "pybullet": CameraConvention(axes="opengl", extrinsics="reference_to_camera", transposed=True),
    "realsense": CameraConvention(pixel_center=0.0, depth="millimetres"),
}


def _projection(projection: Values) -> Tensor:
    matrix = as_tensor(projection)
    if matrix.shape[-1:] == (16,):
        matrix = matrix.unflatten(-1, (4, 4)).mT
    if matrix.shape[-2:] != (4, 4):
        raise ValueError(f"projection must have shape (..., 16) or (..., 4, 4), got {tuple(matrix.shape)}")
    bottom = matrix.new_tensor([0, 0, -1, 0])
    if not bool((matrix[..., 3, :] == bottom).all()):
        matrix = matrix.mT
    if not bool((matrix[..., 3, :] == bottom).all()):
        raise ValueError(
            "projection must be a perspective OpenGL matrix, its last row (or column) 0 0 -1 0; got "
            f"{matrix.reshape(-1, 4, 4)[0].tolist()}"
        )
    return matrix


def _ray_length(camera: Camera) -> Tensor:
    x, y, shear = camera.ray_grid()
    across = x[..., None, :] + (shear[..., None] * y)[..., None]
    return (across * across + (y * y)[..., None] + 1).sqrt()
