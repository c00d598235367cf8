"""A view rendered anew from a slightly moved camera: pixels splatted with a z-buffer, planes kept plane.

M: views; H, W: rows, columns; s, t: source and target camera. Each source pixel stands for the plane through
its point and its neighbours (1 / depth is affine in the pixels of a plane). A target pixel takes the nearest
surface that falls on it, the depth where its own ray meets that plane, and the colour from where that point
lies in the source picture. What no source pixel saw stays a hole.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .camera import Camera, compose, invert_rigid, transform_planes

_INDEX_BITS = 31
_EMPTY = torch.iinfo(torch.int64).max
# A plane seen at a grazing angle runs off to nowhere within a pixel: beyond this change the depth of the
# source point itself is taken.
_MOST_CHANGE = 0.1


def repose(
    rgb: Tensor | None, depth: Tensor, camera: Camera, pose: Tensor
) -> tuple[Tensor | None, Tensor, Camera]:
    """Picture, depth and camera as seen from ``pose`` (..., 4, 4), camera -> the same reference frame.

    rgb (..., 3, H, W), uint8 or float, or None; depth (..., H, W), metres, 0 or non-finite = no reading; the
    leading dimensions are the camera's or broadcast with them. Returned depth is 0 where the new camera sees
    what the old one did not; the picture is filled there from its surroundings.
    """
    size, lead = camera.size, depth.shape[:-2]
    if depth.shape[-2:] != size or (rgb is not None and rgb.shape != (*lead, 3, *size)):
        got = None if rgb is None else tuple(rgb.shape)
        raise ValueError(f"rgb and depth must have the camera's size {size}, got {got}, {tuple(depth.shape)}")
    if depth.dtype in (torch.float16, torch.bfloat16):
        depth = depth.float()
    target = replace(camera, pose=pose.to(camera.pose), check=False)
    s, t = (_flat(c, lead).to(depth) for c in (camera, target))
    flat = depth.reshape(-1, *size)
    valid = torch.isfinite(flat) & (flat > 0)
    # Holes of the depth get a guess, so that the picture moves there too; a view without any depth is moved
    # as a picture at 1 m.
    inverse = _filled((1 / flat).masked_fill(~valid, 0)[:, None], valid[:, None])[:, 0]
    inverse = torch.where(valid.any((1, 2), keepdim=True), inverse, 1)
    to_target = compose(invert_rigid(t.pose), s.pose)
    plane = _tangent_planes(inverse, valid, s, to_target)
    points = (s.rays() / inverse[..., None]).movedim(-1, 1).flatten(2)
    points = transform_planes(to_target[:, None], points, 1)
    winner, hit = _splat(points, valid, plane, inverse, s, t)

    ray = t.rays().movedim(-1, 1).flatten(2)
    plane = plane.gather(2, winner[:, None].expand(-1, 4, -1))
    distance = _meet(plane, ray[:, 0], ray[:, 1], points[2].gather(1, winner))
    seen = hit & valid.flatten(1).gather(1, winner)
    moved = torch.where(seen, distance, 0).view_as(flat).view(depth.shape)
    if rgb is None:
        return None, moved, target
    back = invert_rigid(to_target)
    x, y, z = transform_planes(back[:, None], ray * distance[:, None], 1)
    colors = _sampled(rgb.reshape(-1, 3, *size).to(depth), x / z, y / z, s)
    colors = _filled(colors.masked_fill(~hit[:, None], 0).unflatten(2, size), hit.view_as(flat)[:, None])
    colors = colors.view(rgb.shape)
    return colors.to(rgb.dtype) if rgb.is_floating_point() else colors.round().to(rgb.dtype), moved, target


def _flat(camera: Camera, lead: torch.Size) -> Camera:
    """(M,) cameras for views with leading dimensions ``lead``."""
    intrinsics = camera.intrinsics.expand(*lead, 3, 3).reshape(-1, 3, 3)
    pose = camera.pose.expand(*lead, 4, 4).reshape(-1, 4, 4)
    return replace(camera, intrinsics=intrinsics, pose=pose, check=False)


def _tangent_planes(inverse: Tensor, valid: Tensor, camera: Camera, to_target: Tensor) -> Tensor:
    """(M, 4, H W) with a X + b Y + c Z = d on the plane through each pixel's point, in the target's frame.

    Along each image axis the smaller of the two one-sided slopes: at an edge the one on the pixel's own side.
    """
    slopes = []
    for axis in (-1, -2):
        length = inverse.shape[axis]
        step = inverse.diff(dim=axis)
        usable = valid.narrow(axis, 1, length - 1) == valid.narrow(axis, 0, length - 1)
        padding = (0, 0) * (-axis - 1)
        step = step.masked_fill(~usable, torch.inf)
        ahead, behind = (F.pad(step, (*padding, *p), value=torch.inf) for p in ((0, 1), (1, 0)))
        slope = torch.where(ahead.abs() <= behind.abs(), ahead, behind)
        slopes.append(torch.where(slope.isfinite(), slope, 0))
    by_column, by_row = slopes
    fx, skew = (camera.intrinsics[:, 0, k, None, None] for k in (0, 1))
    fy = camera.intrinsics[:, 1, 1, None, None]
    a, b = by_column * fx, by_column * skew + by_row * fy
    x, y, _ = camera.rays().unbind(-1)
    normal = torch.stack([a, b, inverse - a * x - b * y], dim=1).flatten(2)
    # n . (R' X + o) = 1 with o the target camera's centre in the source's frame.
    origin = invert_rigid(to_target)[:, :3, 3, None]
    turned = [(to_target[:, k, :3, None] * normal).sum(1) for k in range(3)]
    return torch.stack([*turned, 1 - (normal * origin).sum(1)], dim=1)


def _meet(plane: Tensor, x: Tensor, y: Tensor, nearest: Tensor) -> Tensor:
    """Depth (M, P) at which rays (x, y, 1) of the target meet planes (M, 4, P), a X + b Y + c Z = d.

    ``nearest`` (M, P), the target depth of a plane's own source point, stands in where the plane is too
    steep.
    """
    a, b, c, d = plane.unbind(1)
    distance = d / (a * x + b * y + c)
    tame = (distance - nearest).abs() <= _MOST_CHANGE * nearest
    return torch.where(tame, distance, nearest)


def _splat(
    points: tuple[Tensor, ...], valid: Tensor, plane: Tensor, inverse: Tensor, s: Camera, t: Camera
) -> tuple[Tensor, Tensor]:
    """For each target pixel the index (M, H W) of the source pixel that it shows, and whether there is one.

    The nearest surface wins, a measured one before a guessed one, then the lower index: the same on every
    device and in every order of execution.
    """
    height, width = t.size
    x, y, z = points
    in_front = z > 1e-6
    closer = torch.where(in_front, 1 / z, 1)
    k = t.intrinsics[..., None]
    u = (k[:, 0, 0] * x + k[:, 0, 1] * y) * closer + k[:, 0, 2] - t.pixel_center
    v = k[:, 1, 1] * y * closer + k[:, 1, 2] - t.pixel_center
    # A source pixel covers its square, larger when the camera came closer or rolled; at most 2 x 2 pixels.
    grown = (k[:, 0, 0] / s.intrinsics[:, 0, 0, None]).abs() * closer / inverse.flatten(1)
    radius = (0.6 * grown).clamp(0.55, 1.0)
    source = torch.arange(z.shape[1], device=z.device)
    guessed = (~valid).flatten(1).long() << 62
    keys = torch.full((len(z), height * width), _EMPTY, device=z.device)
    for down in (0, 1):
        for right in (0, 1):
            column, row = u.floor() + right, v.floor() + down
            inside = in_front & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            inside &= ((column - u).abs() <= radius) & ((row - v).abs() <= radius)
            pixel = torch.where(inside, row * width + column, 0).long()
            y_ray = (row + t.pixel_center - k[:, 1, 2]) / k[:, 1, 1]
            x_ray = (column + t.pixel_center - k[:, 0, 2] - k[:, 0, 1] * y_ray) / k[:, 0, 0]
            reached = _meet(plane, x_ray, y_ray, z)
            # Positive float32 numbers sort as their bits do.
            bits = reached.float().contiguous().view(torch.int32).long()
            key = torch.where(inside, guessed | (bits << _INDEX_BITS) | source, _EMPTY)
            keys.scatter_reduce_(1, pixel, key, "amin")
    hit = keys != _EMPTY
    return torch.where(hit, keys & ((1 << _INDEX_BITS) - 1), 0), hit


def _sampled(images: Tensor, x: Tensor, y: Tensor, camera: Camera) -> Tensor:
    """Colours (M, C, P) of images (M, C, H, W) where rays (x, y, 1), (M, P), meet the picture; bilinear."""
    height, width = images.shape[-2:]
    k = camera.intrinsics[..., None]
    u = k[:, 0, 0] * x + k[:, 0, 1] * y + k[:, 0, 2] - camera.pixel_center
    v = k[:, 1, 1] * y + k[:, 1, 2] - camera.pixel_center
    grid = torch.stack([(2 * u + 1) / width - 1, (2 * v + 1) / height - 1], dim=-1)
    return F.grid_sample(images, grid[:, None], padding_mode="border", align_corners=False)[:, :, 0]


def _filled(images: Tensor, known: Tensor) -> Tensor:
    """images (M, C, H, W) with what is not known (M, 1, H, W) averaged from ever wider surroundings."""
    if images.shape[-2:] == (1, 1):
        return images.masked_fill(~known, 0)
    weight = F.avg_pool2d(known.to(images), 2, ceil_mode=True)
    small = F.avg_pool2d(images.masked_fill(~known, 0), 2, ceil_mode=True)
    small = _filled(small / weight.clamp_min(1e-6), weight > 0)
    grown = F.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(known, images, grown)
