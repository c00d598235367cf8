"""Image and point-map encoders: one vector (or a row of tokens) for each picture.

N: pictures; C, H, W: channels, rows, columns; E: width of the condition. Sources: PointMapPolicy (arXiv
2510.20406, table 6) for the FiLM-ResNets, FiLM (arXiv 1709.07871), spatial softmax (arXiv 1504.00702, section
4.2).
"""

import difflib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilma.extras import require_timm

_COND_DIM = 512  # CLIP's text width, the condition of the paper


def build_encoder(
    name: str, in_chans: int, cond_dim: int | None = None, pretrained: bool = False, **options
) -> nn.Module:
    """An encoder: ``num_features`` and ``forward(x (N, C, H, W), cond (N, E) | None) -> (N, num_features)``.

    name: "spatial_softmax" (small, for CPUs; options of `SpatialSoftmaxEncoder`); "film_<timm name>", e.g.
    "film_resnet50": a timm ResNet or ConvNeXt with FiLM after each of its four stages (``cond_dim`` defaults
    to 512; options of `FiLMEncoder`); any timm name: pooled features, the condition unused (options of
    ``timm.create_model``). ``is_conditioned`` tells which of them look at ``cond``. ``pretrained`` needs the
    weights of timm's hub.

    Raises ValueError for unknown names and for options that the encoder lacks.
    """
    if name == "spatial_softmax":
        if pretrained:
            raise ValueError("spatial_softmax has no pretrained weights: set pretrained=False")
        return _construct(SpatialSoftmaxEncoder, name, in_chans, **options)
    if name.startswith("film_"):
        local = {key: options.pop(key) for key in ("local_tokens",) if key in options}
        network = _timm_model(name.removeprefix("film_"), in_chans, pretrained, options, prefix="film_")
        return FiLMEncoder(network, _COND_DIM if cond_dim is None else cond_dim, **local)
    return TimmEncoder(_timm_model(name, in_chans, pretrained, options))


class FiLM(nn.Module):
    """y = (1 + gamma(c)) x + beta(c) a channel; the identity at the start (both maps are zero).

    forward(x (N, C, ...), cond (N, E)) -> (N, C, ...).
    """

    def __init__(self, cond_dim: int, channels: int):
        super().__init__()
        self.gamma = nn.Linear(cond_dim, channels)
        self.beta = nn.Linear(cond_dim, channels)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shape = (*cond.shape[:-1], -1, *([1] * (x.ndim - 2)))
        gamma, beta = self.gamma(cond).view(shape), self.beta(cond).view(shape)
        return torch.addcmul(x + beta, x, gamma)


class TimmEncoder(nn.Module):
    """The pooled features of a timm model; the condition is not used, as in the paper's ConvNeXt-V2."""

    is_conditioned = False

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.num_features = network.num_features

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.network(x)


class FiLMEncoder(nn.Module):
    """A timm ResNet or ConvNeXt with FiLM after each of its four stages, then its own pooling.

    ``local_tokens``: return (N, 1 + h w, num_features), the pooled token followed by the last stage's grid,
    row by row.
    """

    is_conditioned = True

    def __init__(self, network: nn.Module, cond_dim: int = _COND_DIM, local_tokens: bool = False):
        super().__init__()
        if not (hasattr(network, "layer4") or hasattr(network, "stages")) or not hasattr(
            network, "forward_head"
        ):
            raise ValueError(
                f"FiLM goes after the stages of a timm ResNet or ConvNeXt; {type(network).__name__} has none"
            )
        self.network = network
        self.num_features = network.num_features
        self.cond_dim = cond_dim
        self.local_tokens = local_tokens
        self.films = nn.ModuleList(FiLM(cond_dim, stage["num_chs"]) for stage in network.feature_info[-4:])

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if cond is None or cond.shape != (len(x), self.cond_dim):
            got = None if cond is None else tuple(cond.shape)
            raise ValueError(f"cond must have shape {(len(x), self.cond_dim)}, got {got}")
        network = self.network
        if hasattr(network, "layer4"):
            x = network.maxpool(network.act1(network.bn1(network.conv1(x))))
            stages = (network.layer1, network.layer2, network.layer3, network.layer4)
        else:
            x = network.stem(x)
            stages = network.stages
        for stage, film in zip(stages, self.films, strict=True):
            x = film(stage(x), cond)
        if hasattr(network, "norm_pre"):
            x = network.norm_pre(x)
        pooled = network.forward_head(x)
        if not self.local_tokens:
            return pooled
        return torch.cat([pooled[:, None], x.flatten(2).mT], dim=1)


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


def _timm_model(name: str, in_chans: int, pretrained: bool, options: dict, prefix: str = "") -> nn.Module:
    timm = require_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        close = f"; close: {', '.join(prefix + n for n in near)}" if near else ""
        raise ValueError(
            f"unknown encoder {prefix + name!r}{close}. Encoders are spatial_softmax, film_<timm ResNet or "
            "ConvNeXt> and the models of timm.list_models()"
        )
    return _construct(
        timm.create_model,
        prefix + name,
        name,
        in_chans=in_chans,
        num_classes=0,
        pretrained=pretrained,
        **options,
    )


def _construct(make, encoder: str, *args, **options):
    try:
        return make(*args, **options)
    except TypeError as error:
        raise ValueError(f"encoder {encoder!r} does not take these options: {error}") from error
