"""Pinhole cameras in one convention, and the doors from the others.

H, W: image rows, columns; row 0 is the top. u: column, v: row. Inside the house a camera frame has OpenCV
axes (x right, y down, z forward), a pose maps camera to reference frame, and K counts pixel centres at +0.5
(the centre of pixel (v, u) is (u + 0.5, v + 0.5), so a centred camera has c = W / 2). `Camera.pixel_center`
names the other convention, 0.
"""

import math
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, replace

import numpy as np
import torch
from torch import Tensor

Values = Tensor | np.ndarray | Sequence

_PRINCIPAL = ("half", "center", "intdiv")


@dataclass(frozen=True, eq=False)
class Camera:
    """One camera or a batch of them.

    intrinsics: (..., 3, 3), pixels. pose: (..., 4, 4), camera -> reference frame, OpenCV axes; leading
    dimensions of the two broadcast. size: (H, W). pixel_center: where the centre of pixel 0 lies in K's
    coordinates, 0.5 or 0. ``check=False`` skips the look at the values (not at the shapes): for cameras that
    were checked before, since the look synchronises an accelerator.

    Raises ValueError for wrong shapes, non-finite values, a singular K and a pose that is not rigid.
    """

    intrinsics: Tensor
    pose: Tensor
    size: tuple[int, int]
    pixel_center: float = 0.5
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        intrinsics, pose = as_tensor(self.intrinsics), as_tensor(self.pose)
        dtype = torch.promote_types(intrinsics.dtype, pose.dtype)
        object.__setattr__(self, "intrinsics", intrinsics.to(dtype))
        object.__setattr__(self, "pose", pose.to(dtype))
        object.__setattr__(self, "size", _image_size(self.size))
        if intrinsics.shape[-2:] != (3, 3):
            raise ValueError(f"intrinsics must have shape (..., 3, 3), got {tuple(intrinsics.shape)}")
        if pose.shape[-2:] != (4, 4):
            raise ValueError(f"pose must have shape (..., 4, 4), got {tuple(pose.shape)}")
        try:
            torch.broadcast_shapes(intrinsics.shape[:-2], pose.shape[:-2])
        except RuntimeError:
            raise ValueError(
                "the leading dimensions of intrinsics and pose must broadcast, got "
                f"{tuple(intrinsics.shape)} and {tuple(pose.shape)}"
            ) from None
        if intrinsics.device != pose.device:
            raise ValueError(
                f"intrinsics on {intrinsics.device} and pose on {pose.device}: move them to one device"
            )
        if check:
            _check_intrinsics(self.intrinsics)
            check_rigid(self.pose, "pose")

    @classmethod
    def from_fov(
        cls,
        fovy: float | Tensor,
        size: tuple[int, int],
        pose: Values | None = None,
        principal: str = "half",
        degrees: bool = True,
        pixel_center: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Camera":
        """Square pixels from a vertical field of view: f = (H / 2) / tan(fovy / 2).

        principal: "half" c = (W/2, H/2) with centres at +0.5 (MuJoCo, exact); "center" c = ((W-1)/2, (H-1)/2)
        with centres at 0, the same rays; "intdiv" c = (W//2, H//2) with centres at 0 (CALVIN as published,
        half a pixel off). ``pixel_center`` overrides the centre that goes with the name; ``pose`` defaults to
        the identity, ``dtype`` to that of ``pose``, float64 for Python's numbers: a point map has that of its
        depth all the same.
        """
        if principal not in _PRINCIPAL:
            raise ValueError(f"principal must be one of {', '.join(_PRINCIPAL)}, got {principal!r}")
        height, width = size = _image_size(size)
        pose = as_tensor(torch.eye(4, dtype=torch.float64) if pose is None else pose, dtype)
        fovy = torch.as_tensor(fovy, dtype=torch.float64)
        angle = torch.deg2rad(fovy) if degrees else fovy
        if not bool(((angle > 0) & (angle < math.pi)).all()):
            unit, top = ("degrees", "180") if degrees else ("radians", "pi")
            raise ValueError(f"fovy must lie between 0 and {top} {unit}, got {fovy.tolist()}")
        focal = (height / 2) / torch.tan(angle / 2)
        cx, cy = {
            "half": (width / 2, height / 2),
            "center": ((width - 1) / 2, (height - 1) / 2),
            "intdiv": (width // 2, height // 2),
        }[principal]
        intrinsics = torch.zeros(*focal.shape, 3, 3, dtype=torch.float64)
        intrinsics[..., 0, 0] = intrinsics[..., 1, 1] = focal
        intrinsics[..., 0, 2], intrinsics[..., 1, 2], intrinsics[..., 2, 2] = cx, cy, 1
        if pixel_center is None:
            pixel_center = 0.5 if principal == "half" else 0.0
        return cls(intrinsics.to(pose), pose, size, pixel_center)

    @classmethod
    def from_mujoco(
        cls, fovy: float | Tensor, cam_xpos: Values, cam_xmat: Values, size: tuple[int, int]
    ) -> "Camera":
        """From ``model.cam_fovy`` (degrees), ``data.cam_xpos`` and ``data.cam_xmat``.

        cam_xpos: (..., 3). cam_xmat: (..., 9) or (..., 3, 3). MuJoCo's camera looks along -z with y up
        (OpenGL axes); the reference frame is MuJoCo's world.
        """
        rotation, position = as_tensor(cam_xmat), as_tensor(cam_xpos)
        if rotation.shape[-1:] == (9,):
            rotation = rotation.unflatten(-1, (3, 3))
        if rotation.shape[-2:] != (3, 3) or position.shape[-1:] != (3,):
            raise ValueError(
                "cam_xmat must have shape (..., 9) or (..., 3, 3) and cam_xpos (..., 3), got "
                f"{tuple(rotation.shape)} and {tuple(position.shape)}"
            )
        pose = torch.zeros(*rotation.shape[:-2], 4, 4, dtype=rotation.dtype, device=rotation.device)
        pose[..., :3, :3], pose[..., :3, 3], pose[..., 3, 3] = rotation, position, 1
        return cls.from_fov(fovy, size, opencv_from_opengl(pose))

    @classmethod
    def from_opengl(
        cls,
        view_matrix: Values,
        fovy: float | Tensor,
        size: tuple[int, int],
        principal: str = "half",
        **options,
    ) -> "Camera":
        """From a view matrix (..., 4, 4): reference -> camera, OpenGL axes, translation in the last column.

        ``fovy`` is vertical; ``options`` are those of `from_fov` (degrees, pixel_center, dtype).
        """
        view = as_tensor(view_matrix)
        if view.shape[-2:] != (4, 4):
            raise ValueError(f"view_matrix must have shape (..., 4, 4), got {tuple(view.shape)}")
        check_rigid(
            view, "view_matrix", hint="; a transposed (PyBullet, flat OpenGL) matrix goes to from_pybullet"
        )
        return cls.from_fov(fovy, size, opencv_from_opengl(invert_rigid(view)), principal, **options)

    @classmethod
    def from_pybullet(
        cls,
        view_matrix: Values,
        fovy: float | Tensor,
        size: tuple[int, int],
        principal: str = "intdiv",
        **options,
    ) -> "Camera":
        """From PyBullet's view matrix: the flat 16-tuple (column order) or its ``reshape(4, 4)``.

        The latter is V transposed; CALVIN stores it. ``principal="intdiv"`` is CALVIN's published
        unprojection; "half" has the exact rays.
        """
        view = as_tensor(view_matrix)
        if view.shape[-1:] == (16,):
            view = view.unflatten(-1, (4, 4))
        if view.shape[-2:] != (4, 4):
            raise ValueError(f"view_matrix must have shape (..., 16) or (..., 4, 4), got {tuple(view.shape)}")
        check_rigid(view.mT, "view_matrix (transposed)", hint="; an untransposed matrix goes to from_opengl")
        return cls.from_opengl(view.mT, fovy, size, principal, **options)

    @classmethod
    def from_opencv(
        cls, intrinsics: Values, world_to_camera: Values, size: tuple[int, int], pixel_center: float = 0.0
    ) -> "Camera":
        """From OpenCV's calibration: K with pixel centres at integers, and [R | t], world -> camera.

        world_to_camera: (..., 3, 4) or (..., 4, 4). A camera -> reference pose goes to ``Camera(...)``
        itself.
        """
        extrinsics = as_tensor(world_to_camera)
        if extrinsics.shape[-2:] == (3, 4):
            row = extrinsics.new_tensor([0, 0, 0, 1]).expand(*extrinsics.shape[:-2], 1, 4)
            extrinsics = torch.cat([extrinsics, row], dim=-2)
        if extrinsics.shape[-2:] != (4, 4):
            raise ValueError(
                f"world_to_camera must have shape (..., 3, 4) or (..., 4, 4), got {tuple(extrinsics.shape)}"
            )
        check_rigid(extrinsics, "world_to_camera")
        return cls(intrinsics, invert_rigid(extrinsics), size, pixel_center)

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions, intrinsics and pose broadcast."""
        return torch.broadcast_shapes(self.intrinsics.shape[:-2], self.pose.shape[:-2])

    def to(self, *args, **kwargs) -> "Camera":
        """To a device and/or floating dtype, as `torch.Tensor.to`."""
        return self._replace(
            intrinsics=self.intrinsics.to(*args, **kwargs), pose=self.pose.to(*args, **kwargs)
        )

    def with_pixel_center(self, pixel_center: float = 0.5) -> "Camera":
        """The same rays, K written for another pixel-centre convention."""
        move = pixel_center - self.pixel_center
        return self._replace(intrinsics=self._moved(move, move), pixel_center=pixel_center)

    def resize(self, size: tuple[int, int]) -> "Camera":
        """The camera of the image resized to (H, W): f' = s f, c' = s (c + e) - e, e = 0.5 - pixel_center."""
        new = _image_size(size)
        edge = 0.5 - self.pixel_center
        scale = self.intrinsics.new_tensor([new[1] / self.size[1], new[0] / self.size[0], 1.0])
        offset = self.intrinsics.new_tensor([edge, edge, 0.0])
        intrinsics = self.intrinsics * scale[:, None]
        intrinsics[..., 2] += offset * (scale - 1)
        return self._replace(intrinsics=intrinsics, size=new)

    def crop(self, top: int, left: int, height: int, width: int) -> "Camera":
        """The camera of those rows and columns; ValueError when they leave the image."""
        check_crop(self.size, top, left, height, width)
        return self._replace(intrinsics=self._moved(-left, -top), size=(height, width))

    def shift(self, rows: int | Tensor, columns: int | Tensor) -> "Camera":
        """The camera of an image whose pixel (v, u) shows what (v + rows, u + columns) showed."""
        return self._replace(intrinsics=self._moved(-columns, -rows))

    def flip(self, axis: str) -> "Camera":
        """The camera of the image mirrored along "rows" (a bottom-up buffer) or "columns": f < 0 there."""
        if axis not in ("rows", "columns"):
            raise ValueError(f"axis must be 'rows' or 'columns', got {axis!r}")
        row, length = (1, self.size[0]) if axis == "rows" else (0, self.size[1])
        intrinsics = self.intrinsics.clone()
        intrinsics[..., row, :] *= -1
        intrinsics[..., row, 2] += length - 1 + 2 * self.pixel_center
        return self._replace(intrinsics=intrinsics)

    def to_frame(self, transform: Values) -> "Camera":
        """The camera in another reference frame; ``transform`` (..., 4, 4) maps the present frame to it."""
        return self._replace(pose=compose(rigid(transform, self.pose), self.pose))

    def rays(self) -> Tensor:
        """Camera-frame directions (..., H, W, 3) through the pixel centres, scaled to z = 1."""
        x, y, shear = self.ray_grid()
        grid = torch.stack(
            torch.broadcast_tensors(x[..., None, :] + (shear[..., None] * y)[..., None], y[..., None])
        )
        return torch.cat([grid, torch.ones_like(grid[:1])]).movedim(0, -1)

    def ray_grid(self) -> tuple[Tensor, Tensor, Tensor]:
        """(..., W) x by column, (..., H) y by row, (...) shear: a pixel's ray is (x + shear y, y, 1)."""
        fx, skew, cx = self.intrinsics[..., 0, :].unbind(-1)
        fy, cy = self.intrinsics[..., 1, 1], self.intrinsics[..., 1, 2]
        u = torch.arange(self.size[1], dtype=fx.dtype, device=fx.device) + self.pixel_center
        v = torch.arange(self.size[0], dtype=fx.dtype, device=fx.device) + self.pixel_center
        return (u - cx[..., None]) / fx[..., None], (v - cy[..., None]) / fy[..., None], -skew / fx

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Points (..., *n, 3) of the reference frame to uv (..., *n, 2) and depth (..., *n) along the axis.

        The leading dimensions of ``points`` are those of the camera. uv are array coordinates (column, row):
        (0, 0) is the centre of the first pixel whatever ``pixel_center`` is. Points at or behind the camera
        plane get NaN.
        """
        points = as_tensor(points)
        dims = len(self.batch_shape)
        if points.shape[-1:] != (3,) or points.ndim < dims + 1:
            raise ValueError(
                f"points must have shape {(*self.batch_shape, '...', 3)} for this camera, "
                f"got {tuple(points.shape)}"
            )
        between = points.ndim - 1 - dims
        matrix = _unsqueeze(invert_rigid(self.pose).to(points.dtype), between)
        x, y, z = transform_planes(matrix, points.movedim(-1, 0), at=0)
        intrinsics = _unsqueeze(self.intrinsics.to(points.dtype), between)
        inverse = torch.where(z > 0, 1 / z, torch.nan)
        x, y = x * inverse, y * inverse
        u = (
            intrinsics[..., 0, 0] * x
            + intrinsics[..., 0, 1] * y
            + (intrinsics[..., 0, 2] - self.pixel_center)
        )
        v = intrinsics[..., 1, 1] * y + (intrinsics[..., 1, 2] - self.pixel_center)
        return torch.stack([u, v], dim=-1), z

    def _moved(self, x: float | Tensor, y: float | Tensor) -> Tensor:
        """K with the principal point moved."""
        principal = self.intrinsics[..., :2, 2]
        x, y = (torch.as_tensor(m, dtype=principal.dtype, device=principal.device) for m in (x, y))
        principal = principal + torch.stack(torch.broadcast_tensors(x, y), dim=-1)
        intrinsics = self.intrinsics.expand(*principal.shape[:-1], 3, 3).clone()
        intrinsics[..., :2, 2] = principal
        return intrinsics

    def _replace(self, **changes) -> "Camera":
        return replace(self, check=False, **changes)


def invert_rigid(transform: Tensor) -> Tensor:
    """Inverse of rigid transforms (..., 4, 4)."""
    rotation = transform[..., :3, :3].mT
    inverse = torch.zeros_like(transform)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -(rotation * transform[..., None, :3, 3]).sum(-1)
    inverse[..., 3, 3] = 1
    return inverse


def opencv_from_opengl(pose: Tensor) -> Tensor:
    """A camera -> reference pose (..., 4, 4) from OpenGL to OpenCV axes, or back: T diag(1, -1, -1, 1)."""
    return pose * pose.new_tensor([1, -1, -1, 1])


def compose(second: Tensor, first: Tensor) -> Tensor:
    """second @ first for small matrices, by element: autocast would run a matmul of poses in bfloat16."""
    return (second[..., :, :, None] * first[..., None, :, :]).sum(-2)


def transform_planes(matrix: Tensor, planes: Tensor, at: int = -3) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, z after rigid ``matrix`` (*b, 4, 4); ``planes`` has x, y, z along ``at``."""
    x, y, z = planes.unbind(at)
    rows = (matrix[..., k, :].unbind(-1) for k in range(3))
    x, y, z = (a * x + b * y + c * z + t for a, b, c, t in rows)
    return x, y, z


def rigid(transform: Values, like: Tensor) -> Tensor:
    """``transform`` as a checked rigid (..., 4, 4) tensor with the dtype and device of ``like``."""
    transform = as_tensor(transform)
    if transform.shape[-2:] != (4, 4):
        raise ValueError(f"a transform must have shape (..., 4, 4), got {tuple(transform.shape)}")
    check_rigid(transform, "transform")
    return transform.to(like)


def check_crop(size: tuple[int, int], top: int, left: int, height: int, width: int) -> None:
    """ValueError unless the rectangle is non-empty and inside an image of ``size``."""
    rows, columns = size
    if min(top, left) < 0 or min(height, width) < 1 or top + height > rows or left + width > columns:
        raise ValueError(
            f"crop (top {top}, left {left}, height {height}, width {width}) is empty or leaves the image of "
            f"size {rows} x {columns}"
        )


def _unsqueeze(matrix: Tensor, count: int) -> Tensor:
    """(*b, m, n) -> (*b, 1 x count, m, n)."""
    return matrix.reshape(*matrix.shape[:-2], *([1] * count), *matrix.shape[-2:])


def as_tensor(values: Values, dtype: torch.dtype | None = None) -> Tensor:
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(values.copy())  # simulators hand out views of buffers that they overwrite
    elif not isinstance(values, Tensor):
        values = torch.from_numpy(np.asarray(values, dtype=np.float64))  # as exact as they were written
    tensor = values if dtype is None else values.to(dtype)
    return tensor if tensor.is_floating_point() else tensor.float()


def _image_size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = (int(n) for n in size)
    except (TypeError, ValueError):
        raise ValueError(f"size must be (height, width), got {size!r}") from None
    if height < 1 or width < 1:
        raise ValueError(f"size must be (height, width) of at least 1 x 1, got {size!r}")
    return height, width


def _check_intrinsics(intrinsics: Tensor) -> None:
    if not bool(torch.isfinite(intrinsics).all()):
        raise ValueError(f"intrinsics must be finite, got {_first(intrinsics, ~torch.isfinite(intrinsics))}")
    bottom = intrinsics.new_tensor([0, 0, 1])
    wrong = (intrinsics[..., 2, :] != bottom).any(-1) | (intrinsics[..., 1, 0] != 0)
    wrong |= (intrinsics[..., 0, 0] == 0) | (intrinsics[..., 1, 1] == 0)
    if bool(wrong.any()):
        raise ValueError(
            "intrinsics must be [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with fx, fy not 0 (not singular), "
            f"got {intrinsics.reshape(-1, 3, 3)[int(wrong.reshape(-1).nonzero()[0])].tolist()}"
        )


def check_rigid(transform: Tensor, name: str, hint: str = "") -> None:
    """ValueError unless (..., 4, 4) is rigid; ``name`` and ``hint`` go into the message."""
    if not bool(torch.isfinite(transform).all()):
        raise ValueError(f"{name} must be finite, got {_first(transform, ~torch.isfinite(transform))}")
    rotation = transform[..., :3, :3]
    eye = torch.eye(3, dtype=transform.dtype, device=transform.device)
    error = (compose(rotation, rotation.mT) - eye).abs().amax((-2, -1))
    error = error.maximum((transform[..., 3, :] - transform.new_tensor([0, 0, 0, 1])).abs().amax(-1))
    first, second, third = rotation.unbind(-1)
    mirrored = (torch.linalg.cross(first, second) * third).sum(-1) < 0
    # 1e-3: matrices printed with four digits still count; a transposed or scaled one does not.
    wrong = (error > 1e-3) | mirrored
    if bool(wrong.any()):
        index = int(wrong.reshape(-1).nonzero()[0])
        raise ValueError(
            f"{name} must be rigid: orthonormal right-handed rotation, translation in the last column, and "
            f"the last row 0 0 0 1{hint}; got {transform.reshape(-1, 4, 4)[index].tolist()}"
        )


def _first(matrix: Tensor, wrong: Tensor) -> list:
    """The first matrix of a batch that has a wrong element."""
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    return flat[int(wrong.reshape(len(flat), -1).any(-1).nonzero()[0])].tolist()
