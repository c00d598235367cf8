"""The point map: an image of 3-D points, one per pixel (PointMapPolicy, arXiv 2510.20406, section 3.3).

H, W: rows, columns of the depth image; "...": any leading dimensions (batch, time, camera).
"""

from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .camera import Camera, Values, as_tensor, check_crop, rigid, transform_planes


@dataclass(frozen=True, eq=False)
class PointMap:
    """points (..., H, W, 3), metres; valid (..., H, W), bool: the pixels that have a reading.

    Invalid points are exactly 0. ``frame`` names the frame of the points ("world", "base", "camera"),
    where the maker knows it. `from_depth` lays the memory out as the network reads it, so `to_image` costs no
    copy.
    """

    points: Tensor
    valid: Tensor
    frame: str | None = None

    def __post_init__(self) -> None:
        if self.points.shape[-1:] != (3,) or self.points.ndim < 3:
            raise ValueError(f"points must have shape (..., H, W, 3), got {tuple(self.points.shape)}")
        if self.valid.shape != self.points.shape[:-1] or self.valid.dtype != torch.bool:
            raise ValueError(
                f"valid must be bool of shape {tuple(self.points.shape[:-1])}, got {self.valid.dtype} "
                f"{tuple(self.valid.shape)}"
            )

    @classmethod
    def from_depth(
        cls,
        depth: Tensor | np.ndarray,
        camera: Camera,
        depth_range: tuple[float, float] | None = None,
        frame: str | None = None,
    ) -> "PointMap":
        """Unproject depth (..., H, W), metres along the optical axis, into the camera's reference frame.

        Valid are finite depths with near < depth < far (``depth_range``; without it, depth > 0). The camera's
        leading dimensions broadcast with the depth's. Points have the depth's dtype, float32 for half
        precision.

        Raises ValueError when the sizes of depth and camera differ or depth is not floating point.
        """
        if isinstance(depth, np.ndarray):
            depth = np.ascontiguousarray(depth)  # a flipped buffer has negative strides, which torch lacks
        depth = torch.as_tensor(depth)
        if not depth.is_floating_point():
            raise ValueError(
                f"depth must be floating point metres, got {depth.dtype} (millimetres? divide by 1000)"
            )
        if depth.shape[-2:] != camera.size:
            hint = "; drop the last axis" if depth.shape[-3:] == (*camera.size, 1) else ""
            raise ValueError(
                f"depth must have shape (..., {camera.size[0]}, {camera.size[1]}), the camera's size, "
                f"got {tuple(depth.shape)}{hint}"
            )
        near, far = (0.0, float("inf")) if depth_range is None else depth_range
        if not 0 <= near < far:
            raise ValueError(f"depth_range must satisfy 0 <= near < far, got {depth_range}")
        if depth.dtype in (torch.float16, torch.bfloat16):
            depth = depth.float()
        camera = camera.to(depth)
        valid = (depth > near) & (depth < far)  # false for NaN

        # Row-wise sums instead of a matmul: exact under autocast and TF32, and one pass over the memory.
        x, y, shear = camera.ray_grid()
        rotation, origin = camera.pose[..., :3, :3], camera.pose[..., :3, 3]
        right, down, forward = rotation.unbind(-1)
        down = down + right * shear[..., None]
        rows = down[..., :, None] * y[..., None, :] + forward[..., None]
        directions = right[..., :, None, None] * x[..., None, None, :] + rows[..., None]
        hole = ~valid[..., None, :, :]
        planes = torch.addcmul(origin[..., None, None], directions, depth[..., None, :, :])
        planes = planes.masked_fill(hole, 0) if planes.requires_grad else planes.masked_fill_(hole, 0)
        return cls(planes.movedim(-3, -1), valid.expand(planes.shape[:-3] + valid.shape[-2:]), frame)

    def to(self, *args, **kwargs) -> "PointMap":
        """To a device and/or floating dtype, as `torch.Tensor.to`."""
        points = self.points.to(*args, **kwargs)
        return replace(self, points=points, valid=self.valid.to(points.device))

    def to_frame(self, transform: Values, name: str | None = None) -> "PointMap":
        """The points in another frame, called ``name``; rigid ``transform`` maps the present frame to it.

        transform: (..., 4, 4), leading dimensions those of the map or broadcast with them.
        """
        matrix = rigid(transform, self.points)[..., None, None, :, :]
        planes = torch.stack(transform_planes(matrix, self._planes()), dim=-3)
        return PointMap(planes.movedim(-3, -1), self.valid, name)._without(~self.valid)

    def crop(self, box: Values) -> "PointMap":
        """To a workspace or to a rectangle of pixels.

        ``box`` (..., 2, 3), [[xmin, ymin, zmin], [xmax, ymax, zmax]] in the frame of the points: points
        outside become invalid, the size stays. ``box`` (top, left, height, width), whole numbers: those
        pixels.
        """
        bounds = box if isinstance(box, Tensor) else torch.as_tensor(np.asarray(box))
        if bounds.shape == (4,) and not bounds.is_floating_point():
            top, left, height, width = bounds.tolist()
            check_crop(tuple(self.valid.shape[-2:]), top, left, height, width)
            window = (..., slice(top, top + height), slice(left, left + width))
            return replace(self, points=self.points[(*window, slice(None))], valid=self.valid[window])
        if bounds.shape[-2:] != (2, 3):
            raise ValueError(
                "box must be bounds [[xmin, ymin, zmin], [xmax, ymax, zmax]] or whole numbers (top, left, "
                f"height, width), got shape {tuple(bounds.shape)} of {bounds.dtype}"
            )
        low, high = bounds.to(self.points).unbind(-2)
        if bool((low >= high).any()):
            raise ValueError(f"every minimum of a workspace must be below its maximum, got {bounds.tolist()}")
        hole = ~self.valid
        for axis in range(3):
            coordinate = self.points[..., axis]
            hole |= (coordinate < low[..., None, None, axis]) | (coordinate > high[..., None, None, axis])
        return self._without(hole)

    def resize(self, size: tuple[int, int]) -> "PointMap":
        """Nearest neighbour, source index floor(i in / out): every point stays a measured one."""
        for axis, length in zip((-2, -1), size, strict=True):
            if length < 1:
                raise ValueError(f"size must be (height, width) of at least 1 x 1, got {tuple(size)}")
            if length == self.valid.shape[axis]:
                continue
            index = torch.arange(length, device=self.valid.device) * self.valid.shape[axis] // length
            planes = self._planes().index_select(axis, index)
            self = replace(self, points=planes.movedim(-3, -1), valid=self.valid.index_select(axis, index))
        return self

    def normalize(self, center: Values, scale: Values) -> "PointMap":
        """(p - center) / scale of the valid points, holes stay 0; center, scale (3,) or one row a map.

        `unnormalize` undoes it. The result is no longer in metres: crop and re-frame before.
        """
        center, scale = self._affine(center, scale)
        planes = (self._planes() - center) / scale
        return PointMap(planes.movedim(-3, -1), self.valid, None)._without(~self.valid)

    def unnormalize(self, center: Values, scale: Values, frame: str | None = None) -> "PointMap":
        """p scale + center of the valid points: `normalize` undone."""
        center, scale = self._affine(center, scale)
        planes = self._planes() * scale + center
        return PointMap(planes.movedim(-3, -1), self.valid, frame)._without(~self.valid)

    def normals(self, max_step: float | None = None) -> tuple[Tensor, Tensor]:
        """Unit normals (..., H, W, 3) towards the camera, 0 where unknown, and the mask (..., H, W) of known.

        The cross product of the steps to the neighbours in the row and in the column, on each the nearer
        valid neighbour, so that an edge does not bend the surface beside it. ``max_step`` (metres): steps
        that are longer do not count. Towards the camera holds for pictures as the camera took them; a
        mirrored one has the opposite sign.
        """
        across, known_across = self._nearer_step(-1, max_step)
        down, known_down = self._nearer_step(-2, max_step)
        normal = torch.linalg.cross(down, across, dim=-3)
        length = torch.linalg.vector_norm(normal, dim=-3, keepdim=True)
        known = known_across & known_down & (length.squeeze(-3) > 0)
        normal = (normal / length.clamp_min(torch.finfo(normal.dtype).tiny)).masked_fill(
            ~known.unsqueeze(-3), 0
        )
        return normal.movedim(-3, -1), known

    def to_image(self, mask: bool = False) -> Tensor:
        """Network layout (..., 3, H, W), metres; ``mask=True`` appends ``valid`` as a fourth channel."""
        planes = self._planes()
        if not mask:
            return planes.contiguous()
        return torch.cat([planes, self.valid.unsqueeze(-3).to(planes.dtype)], dim=-3)

    @overload
    def to_cloud(self, colors: None = None) -> Tensor: ...
    @overload
    def to_cloud(self, colors: Tensor | np.ndarray) -> tuple[Tensor, Tensor]: ...

    def to_cloud(self, colors=None):
        """The valid points (N, 3) of one map; with ``colors`` (C, H, W) or (H, W, C) also theirs, (N, C)."""
        if self.valid.ndim != 2:
            raise ValueError(
                f"a cloud is made of one map (H, W, 3), got {tuple(self.points.shape)}: index it first"
            )
        cloud = self.points[self.valid]
        if colors is None:
            return cloud
        colors = torch.as_tensor(colors)
        if colors.ndim == 3 and colors.shape[1:] == self.valid.shape:
            colors = colors.movedim(0, -1)
        if colors.ndim != 3 or colors.shape[:2] != self.valid.shape:
            raise ValueError(
                f"colors must be (C, H, W) or (H, W, C) of size {tuple(self.valid.shape)}, "
                f"got {tuple(colors.shape)}"
            )
        return cloud, colors[self.valid.to(colors.device)]

    def __getitem__(self, index) -> "PointMap":
        """Index the leading dimensions."""
        return PointMap(self.points[index], self.valid[index], self.frame)

    def _affine(self, center: Values, scale: Values) -> tuple[Tensor, Tensor]:
        center, scale = (as_tensor(x).to(self.points)[..., None, None] for x in (center, scale))
        if center.shape[-3] != 3 or scale.shape[-3] != 3 or not bool((scale > 0).all()):
            raise ValueError(
                "center and scale must be three numbers each, scale positive; got "
                f"{center.flatten().tolist()} and {scale.flatten().tolist()}"
            )
        return center, scale

    def _nearer_step(self, axis: int, max_step: float | None) -> tuple[Tensor, Tensor]:
        """Steps (..., 3, H, W) along an image axis to the nearer valid neighbour, and where there is one."""
        planes, valid = self._planes(), self.valid
        length = valid.shape[axis]
        step = planes.diff(dim=axis)
        size = torch.linalg.vector_norm(step, dim=-3)
        usable = valid.narrow(axis, 1, length - 1) & valid.narrow(axis, 0, length - 1)
        if max_step is not None:
            usable = usable & (size <= max_step)
        size = size.masked_fill(~usable, torch.inf)
        # Before the first and after the last pixel there is no step.
        padding = (0, 0) * (-axis - 1)
        ahead, behind = (F.pad(size, (*padding, *p), value=torch.inf) for p in ((0, 1), (1, 0)))
        step_ahead, step_behind = (F.pad(step, (*padding, *p)) for p in ((0, 1), (1, 0)))
        step = torch.where((ahead <= behind).unsqueeze(-3), step_ahead, step_behind)
        return step, torch.minimum(ahead, behind) < torch.inf

    def _planes(self) -> Tensor:
        return self.points.movedim(-1, -3)

    def _without(self, hole: Tensor) -> "PointMap":
        planes = self._planes().masked_fill(hole.unsqueeze(-3), 0)
        return PointMap(planes.movedim(-3, -1), self.valid & ~hole, self.frame)
