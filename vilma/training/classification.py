"""Training an image classifier: mixing, loss and distillation around any timm model.

Every draw of a sample is fixed by its seed (``batch["seed"]``), so that neither the number of processes nor a
resume moves the losses. Shapes: B samples, K classes, (H, W) pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilma.extras import require_timm

from .images import AugmentConfig, Normalize, layer_groups, sample_drop_paths, set_draws

__all__ = ["Classifier", "DistillConfig", "LossConfig", "MixConfig", "Teacher", "save_timm"]


@dataclass(frozen=True)
class MixConfig:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of timm, within groups of a batch.

    Args:
        mixup, cutmix: alpha of the Beta distribution; 0 switches one off.
        prob: of mixing a group at all.
        switch_prob: of CutMix where both are on.
        group: samples that are mixed with each other, the first with the last and so on, by one draw. The
            samples that a process has at once must be a multiple of it.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    group: int = 32

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0:
            raise ValueError(f"mix.mixup and mix.cutmix are {self.mixup} and {self.cutmix}, wanted 0 or more")
        if self.group < 2 or self.group % 2:
            raise ValueError(f"mix.group is {self.group}, wanted an even number")

    @property
    def enabled(self) -> bool:
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class LossConfig:
    """``ce`` is cross-entropy (with soft targets where samples are mixed), ``bce`` binary for each class.

    Args:
        smoothing: label smoothing.
    """

    name: Literal["ce", "bce"] = "ce"
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"loss.smoothing is {self.smoothing}, wanted a share in [0, 1)")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation from a timm model.

    Args:
        teacher: name of the model; none trains without one.
        weights: file of its weights; none takes those that timm has for the name.
        kind: ``hard`` (DeiT, arXiv 2012.12877: the teacher's class is a second label) or ``soft`` (Hinton et
            al., arXiv 1503.02531: its distribution at ``temperature``).
        alpha: share of the teacher's term in the loss.
    """

    teacher: str | None = None
    weights: str | None = None
    kind: Literal["hard", "soft"] = "hard"
    alpha: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.temperature <= 0:
            raise ValueError(
                f"distill.alpha and distill.temperature are {self.alpha} and {self.temperature}, wanted a "
                "share in [0, 1] and more than 0"
            )


class Teacher:
    """A frozen model that sees what the student sees. It is no part of the student: nothing copies it.

    Args:
        model: in evaluation mode; takes images normalised by ``mean`` and ``std``.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        self.model = model.eval().requires_grad_(False)
        self.mean, self.std = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self

    @torch.no_grad()
    def logits(self, images: Tensor, normalize: Normalize) -> Tensor:
        """(B, K) for images that ``normalize`` prepared."""
        self.model.to(images.device)
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return self.model((images * normalize.std + normalize.mean - mean) / std)


class Classifier(nn.Module):
    """``model(batch) -> (loss, logs)`` around a backbone with K logits.

    Args:
        backbone: a timm model.
        classes: K names, kept beside the weights.
        options: arguments that built the backbone, kept likewise.

    Raises:
        ValueError: the backbone has another number of logits than there are classes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: Sequence[str],
        augment: AugmentConfig,
        mix: MixConfig | None = None,
        loss: LossConfig | None = None,
        distill: DistillConfig | None = None,
        teacher: Teacher | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if backbone.num_classes != len(classes):
            raise ValueError(
                f"the data set has {len(classes)} classes, model.num_classes is {backbone.num_classes}: "
                "give the model as many as the data"
            )
        self.backbone, self.classes, self.augment = backbone, tuple(classes), augment
        self.options, self.distill, self.teacher = dict(options or {}), distill or DistillConfig(), teacher
        self.normalize = Normalize(augment.mean, augment.std)
        self.drop_paths = sample_drop_paths(backbone)
        self.mix, self.mixer = mix or MixConfig(0, 0), None
        loss = loss or LossConfig()
        require_timm()
        from timm.data import Mixup
        from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        if self.mix.enabled:
            self.mixer = Mixup(
                mixup_alpha=self.mix.mixup,
                cutmix_alpha=self.mix.cutmix,
                prob=self.mix.prob,
                switch_prob=self.mix.switch_prob,
                label_smoothing=loss.smoothing,
                num_classes=len(classes),
            )
        if loss.name == "bce":
            self.criterion = BinaryCrossEntropy(0.0 if self.mixer else loss.smoothing)
        elif self.mixer is not None:
            self.criterion = SoftTargetCrossEntropy()
        else:
            self.criterion = LabelSmoothingCrossEntropy(loss.smoothing)

    def compile(self, *arguments: Any, **options: Any) -> None:
        """The backbone alone: drawing and mixing are for the interpreter."""
        self.backbone.compile(*arguments, **options)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return layer_groups(self.backbone, "backbone")

    def logits(self, images: Tensor) -> Tensor:
        """(B, K) for pixels (B, 3, H, W)."""
        return self.backbone(self.normalize(images))

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch["label"]
        images, targets = self.normalize(batch["image"]), labels
        drawn = self.training and "seed" in batch
        if drawn:
            set_draws(self.drop_paths, batch["seed"], images.device)
        if self.mixer is not None and drawn:
            images, targets = self.mixed(images, labels, batch["seed"])
        elif self.mixer is not None:
            targets = F.one_hot(labels, len(self.classes)).float()
        output = self.backbone(images)
        loss = self.criterion(output.float(), targets)
        logs = {"accuracy": (output.detach().argmax(1) == labels).float().mean()}
        if self.teacher is not None:
            distance = self._distance(output.float(), self.teacher.logits(images, self.normalize).float())
            logs |= {"loss_labels": loss.detach(), "loss_teacher": distance.detach()}
            loss = (1 - self.distill.alpha) * loss + self.distill.alpha * distance
        return loss, logs

    def mixed(self, images: Tensor, labels: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Images (in place) and soft targets (B, K), each group mixed by the draws of its first sample."""
        size = self.mix.group
        if len(images) % size:
            raise ValueError(
                f"a process has {len(images)} samples at once, which groups of mix.group {size} do not "
                "divide; choose a group that does"
            )
        targets = []
        for part, some, seed in zip(images.split(size), labels.split(size), seeds[::size].tolist()):
            np.random.seed(seed & 0xFFFFFFFF)  # timm draws from numpy's global generator
            targets.append(self.mixer(part, some)[1])
        return images, torch.cat(targets)

    def _distance(self, output: Tensor, teacher: Tensor) -> Tensor:
        if self.distill.kind == "hard":
            return F.cross_entropy(output, teacher.argmax(1))
        scale = self.distill.temperature
        target = F.log_softmax(teacher / scale, 1)
        student = F.log_softmax(output / scale, 1)
        return scale**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """What ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads."""
        save_timm(self.backbone, folder, self.classes, self.augment.data_config(), self.options)


def save_timm(
    model: nn.Module,
    folder: str | Path,
    classes: Sequence[str] = (),
    data_config: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Weights (safetensors) and ``config.json`` in timm's form, with the names of the classes in it."""
    require_timm()
    from safetensors.torch import save_file
    from timm.models._hub import save_config_for_hf

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Channels-last weights are not contiguous, which the format wants.
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    labels = {"label_names": list(classes)} if classes else {}
    arguments = {key: value for key, value in (options or {}).items() if key not in _NOT_ARGUMENTS}
    save_config_for_hf(
        model, folder / "config.json", labels, model_args=arguments, data_config=dict(data_config or {})
    )


# What only a training uses.
_NOT_ARGUMENTS = ("drop_path_rate", "drop_rate", "num_classes")
