"""Image and point-map encoders: one vector (or a row of tokens) for each picture.

N: pictures; C, H, W: channels, rows, columns; E: width of the condition; h, w: rows and columns of a feature
map; K: tokens of a picture. Sources: PointMapPolicy (arXiv 2510.20406, table 6) for the FiLM-ResNets, FiLM
(arXiv 1709.07871).
"""

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vilma.extras import require_timm

from .encoders_spatial import SpatialSoftmaxEncoder
from .point_cloud import PointCloudEncoder

__all__ = ["FiLM", "FiLMEncoder", "SpatialSoftmaxEncoder", "TimmEncoder", "build_encoder"]

_COND_DIM = 512  # CLIP's text width, the condition of the paper
_OWN = {"spatial_softmax": SpatialSoftmaxEncoder, "point_cloud": PointCloudEncoder}


def build_encoder(
    name: str,
    in_chans: int,
    cond_dim: int | None = None,
    pretrained: bool = False,
    weights: str | None = None,
    **options,
) -> nn.Module:
    """An encoder: ``num_features`` and ``forward(x (N, C, H, W), cond (N, E) | None) -> (N, num_features)``,
    or (N, K, num_features) with the option ``local_tokens``.

    name: "spatial_softmax" (small, for CPUs; options of `SpatialSoftmaxEncoder`); "point_cloud" (DP3's;
    options of `PointCloudEncoder`); "film_<timm name>", e.g. "film_resnet50": a timm ResNet, ConvNeXt or
    DaViT with FiLM after each of its four stages (``cond_dim`` defaults to 512); any timm name, the ``vil``
    family included: the condition is unused. Options of the last two: ``local_tokens`` and those of
    ``timm.create_model``. ``is_conditioned`` tells which of them look at ``cond``.

    pretrained: start from pretrained weights, of any number of input channels (timm adapts the first layer):
    those in the file ``weights``, else those of timm's hub.

    Raises ValueError for unknown names, for options that the encoder lacks, and when pretrained weights are
    asked for and cannot be had.
    """
    if name in _OWN:
        if pretrained:
            raise ValueError(f"{name} has no pretrained weights: set pretrained=False")
        return _construct(_OWN[name], name, in_chans, **options)
    local = bool(options.pop("local_tokens", False))
    if name.startswith("film_"):
        network = _timm_model(name, name.removeprefix("film_"), in_chans, pretrained, weights, options)
        return FiLMEncoder(network, _COND_DIM if cond_dim is None else cond_dim, local)
    if local and name.startswith("vil"):
        # The family's own pooling may be twice as wide as its tokens.
        options.setdefault("global_pool", "bilateral_avg")
    return TimmEncoder(_timm_model(name, name, in_chans, pretrained, weights, options), local)


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
    """The pooled features of a timm model; the condition is not used, as in the paper's ConvNeXt-V2.

    ``local_tokens``: the pooled token followed by the last feature map's grid, row by row.
    """

    is_conditioned = False

    def __init__(self, network: nn.Module, local_tokens: bool = False):
        super().__init__()
        self.network = network
        self.num_features = getattr(network, "head_hidden_size", network.num_features)
        if local_tokens and self.num_features != network.num_features:
            raise ValueError(
                f"the pooled features of {type(network).__name__} have {self.num_features} numbers and its "
                f"map's {network.num_features}: local_tokens must be false"
            )
        self.local_tokens = local_tokens

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if not self.local_tokens:
            return self.network(x)
        features = self.network.forward_features(x)
        return _with_grid(self.network, features)


class FiLMEncoder(nn.Module):
    """A timm ResNet, ConvNeXt or DaViT with FiLM after each of its four stages, then its own pooling.

    ``local_tokens``: return (N, 1 + h w, num_features), the pooled token followed by the last stage's grid,
    row by row.
    """

    is_conditioned = True

    def __init__(self, network: nn.Module, cond_dim: int = _COND_DIM, local_tokens: bool = False):
        super().__init__()
        stem = hasattr(network, "layer4") or (hasattr(network, "stages") and hasattr(network, "stem"))
        if not stem or not hasattr(network, "forward_head") or len(network.feature_info) < 4:
            raise ValueError(
                "FiLM goes after the four stages of a timm ResNet, ConvNeXt or DaViT; "
                f"{type(network).__name__} has none"
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
        return _with_grid(network, x) if self.local_tokens else network.forward_head(x)


def feature_layer(encoder: nn.Module) -> nn.Module | None:
    """The submodule whose output is the last map of features before pooling; None for an encoder without.

    For networks that pool a class token it is the last block but one, since the last patches are not read.
    """
    if isinstance(encoder, SpatialSoftmaxEncoder):
        return encoder.look
    if isinstance(encoder, FiLMEncoder):
        return encoder.films[-1]
    network = getattr(encoder, "network", None)
    for name in ("layer4", "stages", "blocks"):
        part = getattr(network, name, None)
        if part is not None:
            return part if name == "layer4" else part[-2 if name == "blocks" and len(part) > 1 else -1]
    return None


def as_feature_map(encoder: nn.Module, output: Tensor, size: tuple[int, int]) -> Tensor:
    """Output of `feature_layer` as (N, C, h, w), for pictures of ``size`` (H, W)."""
    network = getattr(encoder, "network", None)
    if output.ndim == 4:
        last = getattr(network, "output_fmt", "NCHW") == "NHWC" or _is_vil(network)
        return output.movedim(-1, 1) if last else output
    tokens = output[:, getattr(network, "num_prefix_tokens", 0) :]
    rows = max(1, round((tokens.shape[1] * size[0] / size[1]) ** 0.5))
    while tokens.shape[1] % rows:
        rows -= 1
    return tokens.mT.unflatten(2, (rows, -1))


def _with_grid(network: nn.Module, features: Tensor) -> Tensor:
    """(N, 1 + K, C): the pooled features and the map's positions, row by row."""
    if features.ndim == 4:
        last = getattr(network, "output_fmt", "NCHW") == "NHWC" or _is_vil(network)
        tokens = features.flatten(1, 2) if last else features.flatten(2).mT
    else:
        tokens = features[:, getattr(network, "num_prefix_tokens", 0) :]
    return torch.cat([network.forward_head(features)[:, None], tokens], dim=1)


def _is_vil(network: nn.Module | None) -> bool:
    return type(network).__name__ == "VisionLSTM"


def _timm_model(
    asked: str, name: str, in_chans: int, pretrained: bool, weights: str | None, options: dict[str, Any]
) -> nn.Module:
    timm = require_timm()
    if name.startswith("vil"):
        import vilma.vil  # noqa: F401  importing the room registers the family
    if not timm.is_model(name):
        prefix = asked.removesuffix(name)
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        close = f"; close: {', '.join(prefix + n for n in near)}" if near else ""
        raise ValueError(
            f"unknown encoder {asked!r}{close}. Encoders are spatial_softmax, point_cloud, film_<timm "
            "ResNet, ConvNeXt or DaViT> and the models of timm.list_models()"
        )
    if name.startswith("vit_"):
        # Any size of pictures, as with the other encoders; a fixed img_size is faster.
        options = {"dynamic_img_size": "img_size" not in options, **options}
    options = {"in_chans": in_chans, "num_classes": 0, **options}
    if not pretrained:
        return _construct(timm.create_model, asked, name, **options)
    if weights is not None:
        if not Path(weights).is_file():
            raise ValueError(f"no pretrained weights of {name} at {weights}: no such file")
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:  # of the network, the hub's client, the file: what to do is the same
        raise ValueError(
            f"the pretrained weights of {name} cannot be had ({type(error).__name__}: {error}). Fetch them "
            f"on a machine that reaches timm's hub (python -c \"import timm; timm.create_model('{name}', "
            'pretrained=True)") and copy its cache here, name a file with policy.rgb_weights, or train '
            "from scratch with policy.rgb_pretrained false"
        ) from error


def _construct(make, encoder: str, *args, **options):
    try:
        return make(*args, **options)
    except TypeError as error:
        raise ValueError(f"encoder {encoder!r} does not take these options: {error}") from error
