"""Training a segmenter: paired augmentation of torchvision, auxiliary loss, intersection over union.

Shapes: B samples, K classes, (H, W) pixels; a mask holds classes, and IGNORE where none counts.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import to_device
from .images import Normalize, layer_groups, sample_drop_paths, set_draws

__all__ = ["IGNORE", "MaskAugmentConfig", "SegmentationTask", "mask_loss", "mean_iou", "score_segmenter"]

IGNORE = 255


@dataclass(frozen=True)
class MaskAugmentConfig:
    """Augmentation of images with their masks; the defaults are those of ADE20K in the ViL paper.

    Args:
        size: side of a training crop, and of a window in evaluation.
        scale: range of the random resize, over the size that the short side is brought to (``short_side``).
        short_side: of an image before anything else; none keeps its size.
        hflip: probability of a mirrored image.
        distort: photometric distortion (brightness, contrast, saturation, hue).
        stride: between the windows of an evaluation.
    """

    size: int = 512
    scale: tuple[float, float] = (0.5, 2.0)
    short_side: int | None = 512
    hflip: float = 0.5
    distort: bool = True
    stride: int = 341
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1:
            raise ValueError(f"augment.size and .stride are {self.size} and {self.stride}, wanted at least 1")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augment.scale is {self.scale}, wanted a range of factors above 0")

    def train_transform(self) -> Callable[[Any, Any], tuple[Tensor, Tensor]]:
        """PIL image and mask -> (3, size, size) uint8 and (size, size) int64; draws are torch's."""
        from torchvision.transforms import v2

        steps: list[Any] = [v2.RandomHorizontalFlip(self.hflip)]
        if self.distort:
            steps.append(v2.RandomPhotometricDistort())
        fill = {v2_mask(): IGNORE, "others": 0}
        crop = v2.Compose([v2.RandomCrop(self.size, pad_if_needed=True, fill=fill), *steps])

        def transform(image: Any, mask: Any) -> tuple[Tensor, Tensor]:
            image, mask = self._sized(image, mask)
            low, high = self.scale
            factor = low + (high - low) * float(torch.rand(()))
            height, width = (max(1, round(side * factor)) for side in image.shape[-2:])
            image, mask = v2.Resize((height, width), antialias=True)(image, mask)
            image, mask = crop(image, mask)
            return torch.as_tensor(image), torch.as_tensor(mask)[0].long()

        return transform

    def eval_transform(self) -> Callable[[Any, Any], tuple[Tensor, Tensor]]:
        """PIL image and mask -> (3, H, W) uint8 resized, and (H, W) int64 likewise."""

        def transform(image: Any, mask: Any) -> tuple[Tensor, Tensor]:
            image, mask = self._sized(image, mask)
            return torch.as_tensor(image), torch.as_tensor(mask)[0].long()

        return transform

    def _sized(self, image: Any, mask: Any) -> tuple[Tensor, Tensor]:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        image = tv_tensors.Image(v2.functional.pil_to_tensor(image))
        mask = tv_tensors.Mask(torch.from_numpy(np.array(mask))[None])
        if self.short_side is not None:
            image, mask = v2.Resize(self.short_side, antialias=True)(image, mask)
        return image, mask


def v2_mask() -> type:
    from torchvision import tv_tensors

    return tv_tensors.Mask


class SegmentationTask(nn.Module):
    """``model(batch) -> (loss, logs)`` around a segmenter; batches hold ``image``, ``mask`` and ``seed``.

    Args:
        model: images (B, 3, H, W) to logits (B, K, H, W), in training also those of an auxiliary head.
        aux_weight: of its loss.
        save: what a checkpoint's folder holds: ``save(model, folder)``.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        augment: MaskAugmentConfig,
        aux_weight: float = 0.4,
        save: Callable[[nn.Module, Path], None] | None = None,
    ):
        super().__init__()
        self.model, self.classes, self.aux_weight = model, tuple(classes), aux_weight
        self.normalize = Normalize(augment.mean, augment.std)
        self.drop_paths = sample_drop_paths(model)
        self._save = save

    def compile(self, *arguments: Any, **options: Any) -> None:
        self.model.compile(*arguments, **options)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers of the backbone; what lies on it learns at the full rate."""
        inner = getattr(self.model.backbone, "model", None)  # timm wraps features of some models
        if inner is None:
            return layer_groups(self.model.backbone, "model.backbone")
        return layer_groups(inner, "model.backbone.model")

    def logits(self, images: Tensor) -> Tensor:
        return self.model(self.normalize(images))

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        masks = batch["mask"]
        if self.training and "seed" in batch:
            set_draws(self.drop_paths, batch["seed"], masks.device)
        output = self.model(self.normalize(batch["image"]))
        logits, auxiliary = output if isinstance(output, tuple) else (output, None)
        loss = mask_loss(logits, masks)
        counted = masks != IGNORE
        right = ((logits.detach().argmax(1) == masks) & counted).sum() / counted.sum().clamp_min(1)
        logs = {"pixel_accuracy": right}
        if auxiliary is not None:
            loss = loss + self.aux_weight * mask_loss(auxiliary, masks)
        return loss, logs

    def save_pretrained(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().contiguous() for name, value in self.model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        if self._save is not None:
            self._save(self.model, folder)


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, K, H, W) over the pixels that count: 0, not nan, where none does."""
    total = F.cross_entropy(logits.float(), masks, ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp_min(1)


@torch.no_grad()
def score_segmenter(
    logits: Callable[[Tensor], Tensor],
    batches: Iterable[Mapping[str, Tensor]],
    classes: int,
    device: torch.device,
    precision: str = "fp32",
) -> tuple[np.ndarray, float]:
    """Counts (K, K) of true x predicted pixels, and seconds; pixels that are IGNORE do not count."""
    confusion, begun = torch.zeros(classes * classes, dtype=torch.int64, device=device), time.perf_counter()
    for batch in batches:
        batch = to_device(dict(batch), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            predicted = logits(batch["image"]).argmax(1)
        counted = batch["mask"] != IGNORE
        pairs = batch["mask"][counted] * classes + predicted[counted]
        confusion += torch.bincount(pairs, minlength=classes * classes)
    return confusion.view(classes, classes).cpu().numpy(), time.perf_counter() - begun


def mean_iou(confusion: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean intersection over union and that of each class: nan, and not averaged, for one that is nowhere."""
    hit = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hit
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where(union > 0, hit / union, np.nan)
    return float(np.nanmean(each)) if np.isfinite(each).any() else 0.0, each
