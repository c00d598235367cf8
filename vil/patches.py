"""From images to maps of patches, and which sizes are possible.

Shapes: B batch, C channels of the image, (Y, X) grid of tokens, d width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype, resample_patch_embed, to_2tuple
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

__all__ = ["PatchEmbed", "positive_pair"]


@register_notrace_module
class PatchEmbed(nn.Module):
    """Patches, overlapping where stride < patch_size: (B, C, height, width) -> (B, Y, X, d).

    Raises:
        ValueError: images that patches do not cover, and (unless dynamic) of another size than built for.
    """

    __jit_unused_properties__ = ("grid_size", "num_patches")

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        stride: tuple[int, int],
        in_chans: int,
        dim: int,
        dynamic_size: bool,
        dynamic_pad: bool,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.img_size, self.patch_size, self.stride = img_size, patch_size, stride
        self.dynamic_size, self.dynamic_pad = dynamic_size, dynamic_pad
        self.stride_is_patch = stride == patch_size
        check_sizes(img_size, patch_size, stride, dynamic_pad)
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride, device=device, dtype=dtype)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Of the position table: one entry a patch. Overlapping patches resize it (as published)."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))
        nn.init.zeros_(self.proj.bias)

    @torch.jit.ignore
    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Patches built without overlap stay so; the stride of overlapping ones is kept."""
        img_size = self.img_size if img_size is None else positive_pair("img_size", img_size)
        patch_size = self.patch_size if patch_size is None else positive_pair("patch_size", patch_size)
        stride = patch_size if self.stride_is_patch else self.stride
        check_sizes(img_size, patch_size, stride, self.dynamic_pad)
        if patch_size != self.patch_size:
            old = self.proj
            weight = resample_patch_embed(old.weight.detach(), list(patch_size))
            self.proj = nn.Conv2d(
                old.in_channels, old.out_channels, patch_size, stride, **get_device_dtype(self)
            )
            with torch.no_grad():
                self.proj.weight.copy_(weight)
                self.proj.bias.copy_(old.bias)
            self.proj.weight.requires_grad_(old.weight.requires_grad)
            self.proj.bias.requires_grad_(old.bias.requires_grad)
            self.proj.train(old.training)
        self.img_size, self.patch_size, self.stride = img_size, patch_size, stride

    def feat_ratio(self, as_scalar: bool = True):
        return max(self.stride) if as_scalar else self.stride

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of tokens of an image."""
        sizes = [0, 0]
        for j in range(2):
            size, patch, stride = img_size[j], self.patch_size[j], self.stride[j]
            beyond = max(size - patch, 0)
            sizes[j] = 1 + ((beyond + stride - 1) // stride if self.dynamic_pad else beyond // stride)
        return sizes[0], sizes[1]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"got an image batch of shape {x.shape}; pass (B, C, height, width) with C = "
                f"{self.proj.in_channels} (another number of channels: in_chans)"
            )
        height, width = x.shape[2], x.shape[3]
        if self.dynamic_pad:
            rows, columns = self.dynamic_feat_size((height, width))
            bottom = (rows - 1) * self.stride[0] + self.patch_size[0] - height
            right = (columns - 1) * self.stride[1] + self.patch_size[1] - width
            x = F.pad(x, (0, right, 0, bottom))
        else:
            check_size(height, self.patch_size[0], self.stride[0], "height")
            check_size(width, self.patch_size[1], self.stride[1], "width")
        if not self.dynamic_size and (height != self.img_size[0] or width != self.img_size[1]):
            raise ValueError(
                f"got an image of {height} x {width}, the model is built for {self.img_size[0]} x "
                f"{self.img_size[1]}; resize it, call set_input_size, or build with dynamic_img_size=True"
            )
        return self.proj(x).permute(0, 2, 3, 1)


def check_size(size: int, patch: int, stride: int, name: str) -> None:
    """Raise a ValueError that names the nearest sizes unless whole patches cover ``size`` pixels."""
    if size < patch or (size - patch) % stride != 0:
        below = patch + max(size - patch, 0) // stride * stride
        above = below + stride
        nearest = f"{patch}" if size < patch else f"{below} or {above}"
        raise ValueError(
            f"an image of {name} {size} is not covered by patches of {patch} every {stride} pixels; "
            f"the nearest {name} is {nearest}. Resize the image, or build with dynamic_img_pad=True"
        )


def check_sizes(
    img_size: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int], padded: bool
) -> None:
    """Raise a ValueError unless the position table has an entry along each axis and patches leave no gaps."""
    if any(size < patch for size, patch in zip(img_size, patch_size)):
        raise ValueError(f"img_size={img_size} is smaller than one patch of {patch_size}")
    if any(step > patch for step, patch in zip(stride, patch_size)):
        raise ValueError(
            f"stride={stride} would leave out pixels between patches of {patch_size}; pass at most patch_size"
        )
    if not padded:
        for size, patch, step, name in zip(img_size, patch_size, stride, ("height", "width")):
            check_size(size, patch, step, name)


def positive_pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = to_2tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name}={value}; pass an integer of at least 1, or two: (height, width)")
    return int(pair[0]), int(pair[1])
