"""Random shifts of images, alone or together with the depth and the camera they belong to.

The first axis holds the samples: all that follows it (time, cameras) moves together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_shift(images: Tensor, pad: int, generator: torch.Generator | None = None) -> Tensor:
    """Shift every sample of images (N, ..., C, H, W) by whole pixels in [-pad, pad], borders replicated.

    Shift augmentation of DrQ (arXiv 2004.13649). On images alone it breaks the pixel correspondence with a
    point map by up to ``pad`` pixels; that is what PointMapPolicy's published training does.
    `random_shift_rgbd` keeps it.
    """
    rows, columns = _draw(images, pad, generator)
    return _shifted(images, rows, columns, pad)


def random_shift_rgbd(
    images: Tensor, depth: Tensor, intrinsics: Tensor, pad: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same shift for images (N, ..., C, H, W), depth (N, ..., H, W) and intrinsics (N, ..., 3, 3).

    Images replicate their border; depth gets 0 there, no reading, since a replicated depth would lie on
    another ray. The principal point moves along, so every remaining pixel unprojects to the point it showed
    before.
    """
    if depth.shape[-2:] != images.shape[-2:] or depth.shape[0] != images.shape[0]:
        raise ValueError(
            f"images and depth must share samples and size, got {tuple(images.shape)}, {tuple(depth.shape)}"
        )
    if intrinsics.shape[0] != images.shape[0] or intrinsics.shape[-2:] != (3, 3):
        raise ValueError(
            f"intrinsics must have shape ({images.shape[0]}, ..., 3, 3), got {tuple(intrinsics.shape)}"
        )
    rows, columns = _draw(images, pad, generator)
    moved = intrinsics.clone()
    offset = torch.stack([columns, rows], dim=-1).to(moved)
    moved[..., :2, 2] -= offset.view(-1, *[1] * (moved.ndim - 3), 2)
    depth = _shifted(depth.unsqueeze(-3), rows, columns, pad, mode="constant").squeeze(-3)
    return _shifted(images, rows, columns, pad), depth, moved


def _draw(images: Tensor, pad: int, generator: torch.Generator | None) -> Tensor:
    """(2, N): new pixel (v, u) shows old pixel (v + rows, u + columns)."""
    if images.ndim < 4:
        raise ValueError(f"images must have shape (N, ..., C, H, W), got {tuple(images.shape)}")
    if not 0 <= pad < min(images.shape[-2:]):
        raise ValueError(
            f"pad must be at least 0 and smaller than the image {tuple(images.shape[-2:])}, got {pad}"
        )
    device = images.device if generator is None else generator.device
    return torch.randint(-pad, pad + 1, (2, len(images)), generator=generator, device=device).to(
        images.device
    )


def _shifted(images: Tensor, rows: Tensor, columns: Tensor, pad: int, mode: str = "replicate") -> Tensor:
    height, width = images.shape[-2:]
    flat = images.reshape(len(images), -1, height, width)
    if mode == "replicate":
        v = (torch.arange(height, device=images.device) + rows[:, None]).clamp(0, height - 1)
        u = (torch.arange(width, device=images.device) + columns[:, None]).clamp(0, width - 1)
    else:
        flat = F.pad(flat, (pad, pad, pad, pad))
        v = torch.arange(height, device=images.device) + rows[:, None] + pad
        u = torch.arange(width, device=images.device) + columns[:, None] + pad
    sample = torch.arange(len(flat), device=images.device)[:, None, None]
    # Advanced indices around a slice come out in front: (N, H, W, C).
    return flat[sample, :, v[:, :, None], u[:, None, :]].movedim(-1, 1).reshape(images.shape)
