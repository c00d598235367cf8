"""Semantic segmentation over the features of any timm backbone: UPerNet with a pyramid for isotropic ones.

UPerNet: Unified Perceptual Parsing for Scene Understanding (Xiao et al., arXiv 1807.10221), section 3; the
pyramid from maps of one resolution as in BEiT (arXiv 2106.08254), by which Vision-LSTM was evaluated.

Shapes: B batch, d width of the backbone, (Y, X) grid of tokens, C channels of the decoder, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilma.extras import require_timm

__all__ = ["FCNHead", "FeaturePyramid", "Segmenter", "UPerHead", "create_segmenter", "slide"]


def conv_bn(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class FeaturePyramid(nn.Module):
    """Four maps (B, d, Y, X) of one resolution to strides of 1/4, 1/2, 1 and 2 times theirs."""

    def __init__(self, dim: int):
        super().__init__()
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, 2),
        )
        self.up2 = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.down2 = nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, last = maps
        return [self.up4(first), self.up2(second), third, self.down2(last)]


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down path, and all levels fused at the finest.

    Args:
        in_channels: of the maps, finest first.
        channels: C.
        pool_scales: sides of the pooled maps of the coarsest level.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        num_classes: int,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ):
        super().__init__()
        *finer, coarsest = in_channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv_bn(coarsest, channels, 1))
            for scale in pool_scales
        )
        self.bottleneck = conv_bn(coarsest + len(pool_scales) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv_bn(inputs, channels, 1) for inputs in finer)
        self.smooths = nn.ModuleList(conv_bn(channels, channels, 3) for _ in finer)
        self.fuse = conv_bn(len(in_channels) * channels, channels, 3)
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, K) maps at the resolution of the finest level."""
        *finer, coarsest = maps
        pooled = [resize(pool(coarsest), coarsest.shape[2:]) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.laterals, finer)]
        levels.append(self.bottleneck(torch.cat([coarsest, *pooled], 1)))
        for k in reversed(range(len(finer))):
            levels[k] = levels[k] + resize(levels[k + 1], levels[k].shape[2:])
        smooth = [layer(x) for layer, x in zip(self.smooths, levels)] + levels[-1:]
        fused = self.fuse(torch.cat([resize(x, smooth[0].shape[2:]) for x in smooth], 1))
        return self.classify(self.drop(fused))


class FCNHead(nn.Module):
    """One convolution and a classifier on one map: the auxiliary head."""

    def __init__(self, inputs: int, channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        self.conv = conv_bn(inputs, channels, 3)
        self.drop = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.drop(self.conv(x)))


class Segmenter(nn.Module):
    """Images (B, 3, height, width) to logits (B, K, height, width).

    Args:
        backbone: of timm, made with ``features_only``; four maps, either of one resolution (then a
            `FeaturePyramid` follows) or of four.
        channels: C of the decoder and the auxiliary head.
        aux_level: the map that the auxiliary head sees; none leaves it out.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        channels: int = 192,
        aux_level: int | None = 2,
        dropout: float = 0.1,
    ):
        super().__init__()
        widths, strides = backbone.feature_info.channels(), backbone.feature_info.reduction()
        if len(widths) != 4:
            raise ValueError(f"the backbone gives {len(widths)} maps, wanted 4: choose four out_indices")
        self.backbone, self.num_classes = backbone, num_classes
        isotropic = len(set(strides)) == 1
        if isotropic and len(set(widths)) > 1:
            raise ValueError(f"maps of one stride have widths {widths}, wanted one width")
        self.pyramid = FeaturePyramid(widths[0]) if isotropic else None
        self.decoder = UPerHead(widths, channels, num_classes, dropout=dropout)
        self.auxiliary = None
        if aux_level is not None:
            self.auxiliary = FCNHead(widths[aux_level], channels, num_classes, dropout)
        self.aux_level = aux_level

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The logits; in training with those of the auxiliary head, if there is one."""
        maps = self.backbone(images)
        if self.pyramid is not None:
            maps = self.pyramid(maps)
        size = images.shape[2:]
        logits = resize(self.decoder(maps), size)
        if self.training and self.auxiliary is not None:
            return logits, resize(self.auxiliary(maps[self.aux_level]), size)
        return logits


def create_segmenter(
    name: str,
    num_classes: int,
    out_indices: Sequence[int] = (3, 5, 7, 11),
    channels: int = 192,
    aux_level: int | None = 2,
    dropout: float = 0.1,
    **options: Any,
) -> Segmenter:
    """A segmenter over a timm model; the default indices are those of Vision-LSTM's second generation.

    Args:
        out_indices: blocks whose maps are used (pairs of sub-blocks in the second generation).
        options: of the backbone, ``pretrained`` and the like.
    """
    timm = require_timm()
    backbone = timm.create_model(name, features_only=True, out_indices=tuple(out_indices), **options)
    return Segmenter(backbone, num_classes, channels, aux_level, dropout)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def slide(
    model: Callable[[Tensor], Tensor], images: Tensor, crop: int, stride: int, num_classes: int
) -> Tensor:
    """Logits (B, K, height, width) averaged over windows that cover the images, as ADE20K is evaluated.

    Args:
        crop, stride: side of a window, and from one to the next. Images smaller than a window are padded.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (0, max(crop - width, 0), 0, max(crop - height, 0)))
    # Pixels may come as uint8; logits of autocast are summed in float32.
    total = padded.new_zeros(len(images), num_classes, *padded.shape[2:], dtype=torch.float32)
    count = padded.new_zeros(1, 1, *padded.shape[2:], dtype=torch.float32)
    for top in _starts(padded.shape[2], crop, stride):
        for left in _starts(padded.shape[3], crop, stride):
            window = (..., slice(top, top + crop), slice(left, left + crop))
            total[window] += model(padded[window])
            count[window] += 1
    return (total / count)[..., :height, :width]


def _starts(size: int, crop: int, stride: int) -> list[int]:
    return sorted({min(start, size - crop) for start in range(0, size - crop + stride, stride)})
