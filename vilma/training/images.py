"""What image backbones share in training: timm's transforms, normalisation, and stochastic depth by sample.

Shapes: B samples, C channels, (H, W) pixels.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vilma.extras import require_timm

__all__ = [
    "AugmentConfig",
    "Normalize",
    "SampledDropPath",
    "eval_transform",
    "sample_drop_paths",
    "set_draws",
]


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation and preprocessing, in timm's names; the defaults are those of ViL's pre-training.

    Args:
        size: height and width of what the model sees.
        crop_mode: of a training image: ``rrc`` (random resized crop), ``rkrc``, ``rkrr`` (resize keeping the
            aspect ratio, then a central or random crop or padding).
        scale, ratio: of that crop or resize.
        hflip: probability of a mirrored image.
        auto_augment: a policy of timm (``3a`` is 3-Augment, ``rand-m9-mstd0.5-inc1`` a RandAugment).
        color_jitter: brightness, contrast, saturation and, as a fourth, hue.
        interpolation: of training crops and of evaluation.
        crop_pct: size over the short side that an evaluated image is resized to.
        mean, std: of the normalisation, for pixels in [0, 1].
    """

    size: int = 224
    crop_mode: Literal["rrc", "rkrc", "rkrr"] = "rrc"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    hflip: float = 0.5
    auto_augment: str | None = "3a"
    color_jitter: tuple[float, ...] | None = (0.3, 0.3, 0.3)
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"augment.size is {self.size}, wanted at least 1 pixel")
        if self.color_jitter is not None and len(self.color_jitter) not in (3, 4):
            raise ValueError(f"augment.color_jitter is {self.color_jitter}, wanted 3 or 4 numbers, or none")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"augment.crop_pct is {self.crop_pct}, wanted a share in (0, 1]")

    def train_transform(self) -> Callable[[Any], Tensor]:
        """RGB image -> (3, size, size) uint8, drawn from the global generators."""
        require_timm()
        from timm.data import create_transform

        return create_transform(
            self.size,
            is_training=True,
            train_crop_mode=self.crop_mode,
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            auto_augment=self.auto_augment,
            color_jitter=self.color_jitter,
            interpolation=self.interpolation,
            normalize=False,
        )

    def eval_transform(self) -> Callable[[Any], Tensor]:
        """RGB image -> (3, size, size) uint8: short side resized to size / crop_pct, then the centre."""
        return eval_transform(self.size, self.interpolation, self.crop_pct)

    def data_config(self) -> dict[str, Any]:
        """What timm keeps beside weights, so that they are evaluated as they were trained."""
        names = ("interpolation", "crop_pct", "mean", "std")
        return {"input_size": (3, self.size, self.size), **{name: getattr(self, name) for name in names}}


def eval_transform(size: int, interpolation: str, crop_pct: float) -> Callable[[Any], Tensor]:
    require_timm()
    from timm.data import create_transform

    return create_transform(size, interpolation=interpolation, crop_pct=crop_pct, normalize=False)


class Normalize(nn.Module):
    """Pixels (B, 3, H, W) uint8, or floating in [0, 1], to normalised float32, where the model is."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.float() / 255
        return (images - self.mean) / self.std


def layer_groups(backbone: nn.Module, prefix: str) -> dict[str, Any]:
    """timm's layer groups of a backbone, for a model that holds it as ``prefix``: layer decay reads them.

    Raises:
        ValueError: the backbone has none.
    """
    if not hasattr(backbone, "group_matcher"):
        raise ValueError(f"{type(backbone).__name__} has no layer groups, which optim.layer_decay needs")

    def moved(pattern: str) -> str:
        return rf"^{re.escape(prefix)}\.(?:{pattern.replace('^', '')})"

    groups = {}
    for name, patterns in backbone.group_matcher(coarse=False).items():
        if isinstance(patterns, (list, tuple)):
            groups[name] = [(moved(pattern), suffix) for pattern, suffix in patterns]
        else:
            groups[name] = None if patterns is None else moved(patterns)
    return groups


class SampledDropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016) whose factors (B,) are given, 0 or 1 / (1 - rate).

    timm's draws them where the layer runs, so a sample's fate would depend on the process that has it.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.factors: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.factors is None:
            return x
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def sample_drop_paths(model: nn.Module) -> list[SampledDropPath]:
    """Replace timm's DropPath layers of ``model`` by `SampledDropPath`; returns them."""
    require_timm()
    from timm.layers import DropPath

    made = []
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                layer = SampledDropPath(child.drop_prob) if child.drop_prob else nn.Identity()
                setattr(module, name, layer)
                made += [layer] if child.drop_prob else []
    return made


def set_draws(layers: Sequence[SampledDropPath], seeds: Tensor, device: torch.device) -> None:
    """Draw the factors of ``layers`` for samples with ``seeds`` (B,) int64."""
    if not layers:
        return
    generator = torch.Generator()
    draws = torch.stack([torch.rand(len(layers), generator=generator.manual_seed(s)) for s in seeds.tolist()])
    rates = torch.tensor([layer.rate for layer in layers])
    factors = ((draws >= rates) / (1 - rates)).to(device, non_blocking=True)
    for layer, column in zip(layers, factors.unbind(1)):
        layer.factors = column
