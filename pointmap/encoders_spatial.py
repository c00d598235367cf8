"""The small encoder for CPUs: patches, two convolutions, then where the features are.

N: pictures; C, H, W: channels, rows, columns. Source: spatial softmax (arXiv 1504.00702, section 4.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpatialSoftmaxEncoder(nn.Module):
    """Patches, two convolutions, then where the features are: small enough to train on two CPU cores.

    The patch layer is a sine without normalisation (learned Fourier features, arXiv 2006.10739). On point
    maps this decides: "4 cm above the table" is a narrow band of a coordinate, which a sine selects at once
    and a normalised ramp only after long training. For the same reason point maps should come scaled to a
    workspace of about +-1 to +-3, and not as raw metres.

    Image coordinates join the input (as a map added to the patches, which are linear: the same function as
    two more channels, for one picture's work). Each of the ``channels[2]`` feature maps becomes a
    distribution over the grid; the output mixes its expected (u, v), its expectation of the first
    ``expect_channels`` input channels (for a point map: a 3-D point) and the mean features.

    ``mask_channel``: index of the 0/1 validity channel; expectations of the input then run over valid pixels
    only. ``stride``: pixels between patches, which overlap by one on each side. ``features``: output width.
    forward(x (N, C, H, W), cond unused) -> (N, features).
    """

    is_conditioned = False

    def __init__(
        self,
        in_chans: int,
        features: int = 128,
        channels: tuple[int, int, int] = (32, 32, 32),
        stride: int = 4,
        expect_channels: int = 0,
        mask_channel: int | None = None,
    ):
        super().__init__()
        if not 0 <= expect_channels <= in_chans:
            raise ValueError(
                f"expect_channels must lie between 0 and in_chans = {in_chans}, got {expect_channels}"
            )
        if mask_channel is not None and not 0 <= mask_channel < in_chans:
            raise ValueError(f"mask_channel must be one of the {in_chans} input channels, got {mask_channel}")
        if len(channels) != 3 or any(c % 8 for c in channels):
            raise ValueError(
                f"channels must be three multiples of 8 (normalisation groups), got {tuple(channels)}"
            )
        patch, middle, last = channels
        self.num_features = features
        self.stride = stride
        self.expect_channels = expect_channels
        self.mask_channel = mask_channel
        self.patches = nn.Conv2d(in_chans, patch, stride + 2, stride, padding=1)
        self.coordinates = nn.Conv2d(2, patch, stride + 2, stride, padding=1, bias=False)
        self.mix = nn.Sequential(nn.Conv2d(patch, middle, 1), nn.GroupNorm(8, middle), nn.SiLU())
        self.look = nn.Sequential(nn.Conv2d(middle, last, 3, padding=1), nn.GroupNorm(8, last), nn.SiLU())
        self.sharpness = nn.Parameter(torch.zeros(last))
        self.head = nn.Linear(last * (3 + expect_channels), features)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if min(x.shape[-2:]) < 2 * self.stride:
            raise ValueError(
                f"pictures must be at least {2 * self.stride} pixels a side, got {tuple(x.shape)}"
            )
        features = torch.sin(self.patches(x) + self.coordinates(_grid(x.shape[-2:], x)))
        features = self.look(self.mix(features))
        size = features.shape[-2:]
        flat = features.flatten(2)
        where = (flat * self.sharpness.exp()[:, None]).softmax(-1)
        position = where @ _grid(size, x).flatten(2).mT
        parts = [position, flat.mean(-1, keepdim=True)]
        if self.expect_channels:
            parts.append(self._expect(x, where, size))
        return self.head(torch.cat(parts, dim=-1).flatten(1))

    def _expect(self, x: Tensor, where: Tensor, size: torch.Size) -> Tensor:
        values = x[:, : self.expect_channels]
        if self.mask_channel is None:
            return where @ F.adaptive_avg_pool2d(values, size).flatten(2).mT
        mask = x[:, self.mask_channel, None]
        total = where @ F.adaptive_avg_pool2d(values * mask, size).flatten(2).mT
        share = where @ F.adaptive_avg_pool2d(mask, size).flatten(2).mT
        # A map that looks only at holes has no point: its expectation fades to 0 instead of blowing up.
        return total / share.clamp_min(1e-2)


def _grid(size: torch.Size, like: Tensor) -> Tensor:
    """(1, 2, H, W): column and row of the pixel centres, from -1 to 1 over the picture."""
    v, u = ((torch.arange(n, dtype=like.dtype, device=like.device) * 2 + 1) / n - 1 for n in size)
    return torch.stack(torch.meshgrid(u, v, indexing="xy"))[None]
