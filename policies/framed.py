"""Numbers of a state or an action that are written in the reference frame, and what moves them along with it.

B samples; D: size of the vector.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Kind -> how many numbers. A vector has a direction and no place: a displacement, a velocity, a column of a
# rotation matrix, a small rotation as an axis-angle increment.
KINDS = {"position": 3, "vector": 3, "quaternion": 4, "rotation_vector": 3}

Parts = Mapping[str, Sequence[int]]


def check_parts(parts: Parts, dim: int, name: str) -> None:
    """ValueError unless ``parts`` (kind -> first indices) are known kinds, inside D = ``dim`` and apart."""
    unknown = [kind for kind in parts if kind not in KINDS]
    if unknown:
        raise ValueError(f"{name} names {', '.join(unknown)}; the kinds are {', '.join(KINDS)}")
    taken: set[int] = set()
    for kind, starts in parts.items():
        for start in starts:
            indices = set(range(start, start + KINDS[kind]))
            if start < 0 or start + KINDS[kind] > dim or indices & taken:
                raise ValueError(
                    f"{name}: the {kind} at {start} ({KINDS[kind]} numbers) leaves the {dim} numbers there "
                    "are, or overlaps another"
                )
            taken |= indices


def moved(x: Tensor, parts: Parts, motion: Tensor) -> Tensor:
    """x (B, ..., D), in its own units, after rigid ``motion`` (B, 4, 4) of the frame it is written in.

    Positions p become R p + t, vectors R v; quaternions (x, y, z, w) and rotation vectors (absolute
    orientations) become those of R times theirs, of the two numbers for one orientation the nearer to x.
    """
    x = x.clone()
    motion = motion.to(x).view(len(motion), *[1] * (x.ndim - 2), 4, 4)
    rotation, turn = motion[..., :3, :3], _quaternion(motion[..., :3, :3])
    for kind, starts in parts.items():
        for start in starts:
            part = slice(start, start + KINDS[kind])
            old = x[..., part]
            if kind == "quaternion":
                new = _product(turn, old)
                new = torch.where((new * old).sum(-1, keepdim=True) < 0, -new, new)
            elif kind == "rotation_vector":
                new = _turned_rotation_vector(turn, old)
            else:
                new = (rotation * old[..., None, :]).sum(-1)
                new = new + motion[..., :3, 3] if kind == "position" else new
            x[..., part] = new
    return x


def _turned_rotation_vector(turn: Tensor, old: Tensor) -> Tensor:
    angle = torch.linalg.vector_norm(old, dim=-1, keepdim=True)
    axis = old / angle.clamp_min(1e-12)
    new = _product(turn, torch.cat([axis * (angle / 2).sin(), (angle / 2).cos()], dim=-1))
    new = torch.where(new[..., 3:] < 0, -new, new)
    sine = torch.linalg.vector_norm(new[..., :3], dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, new[..., 3:])
    axis = torch.where(sine > 1e-9, new[..., :3] / sine.clamp_min(1e-12), axis)
    short, long = axis * angle, axis * (angle - 2 * torch.pi)
    nearer = (short - old).square().sum(-1, keepdim=True) <= (long - old).square().sum(-1, keepdim=True)
    return torch.where(nearer, short, long)


def _quaternion(rotation: Tensor) -> Tensor:
    """(..., 4), x y z w, of rotations (..., 3, 3): from the products 4 q_i q_j, divided by the largest."""
    (a, b, c), (d, e, f), (g, h, i) = (row.unbind(-1) for row in rotation.unbind(-2))
    products = torch.stack(
        [
            torch.stack([1 + a - e - i, b + d, c + g, h - f], dim=-1),
            torch.stack([b + d, 1 - a + e - i, f + h, c - g], dim=-1),
            torch.stack([c + g, f + h, 1 - a - e + i, d - b], dim=-1),
            torch.stack([h - f, c - g, d - b, 1 + a + e + i], dim=-1),
        ],
        dim=-2,
    )
    largest = products.diagonal(dim1=-2, dim2=-1).argmax(-1)
    row = products.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4))[..., 0, :]
    return row / torch.linalg.vector_norm(row, dim=-1, keepdim=True)


def _product(second: Tensor, first: Tensor) -> Tensor:
    """Quaternion product, x y z w: the rotation ``first``, then ``second``."""
    u, s = second[..., :3], second[..., 3:]
    v, t = first[..., :3], first[..., 3:]
    u, v = torch.broadcast_tensors(u, v)
    return torch.cat(
        [s * v + t * u + torch.linalg.cross(u, v), s * t - (u * v).sum(-1, keepdim=True)], dim=-1
    )
