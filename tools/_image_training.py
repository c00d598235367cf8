"""What a training of a classifier needs besides the trainer: its config, its parts, its validation."""

import contextlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vilma.datasets.imagenet import BadImages, ImageDataConfig, ImageDataset, open_images
from vilma.extras import require_timm
from vilma.tools._backbone import BackboneConfig, build_backbone
from vilma.training import (
    EmaConfig,
    OptimConfig,
    ScheduleConfig,
    TrainerConfig,
    backward_memory,
    describe_plan,
)
from vilma.training.checkpoint import replace_text
from vilma.training.classification import Classifier, DistillConfig, LossConfig, MixConfig, Teacher
from vilma.training.images import AugmentConfig
from vilma.training.scoring import Scores, gather, score_classifier, share_loader

__all__ = [
    "CpuClock",
    "ImageRunConfig",
    "Validation",
    "build_classifier",
    "gpus_times_nodes",
    "main_process",
    "open_data",
    "plan",
]


@dataclass(frozen=True)
class ImageRunConfig:
    """A complete training of a classifier: the sections of its YAML file."""

    model: BackboneConfig
    data: ImageDataConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(enabled=False))
    train: TrainerConfig = field(default_factory=TrainerConfig)


def open_data(run: ImageRunConfig, run_dir: Path) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation images; what cannot be read is recorded in ``RUN/bad_images.jsonl``.

    Raises:
        ValueError: there is no such data set, or the model has another number of classes.
    """
    bad = BadImages(run_dir / "bad_images.jsonl")
    train = open_images(run.data, run.data.train)
    if len(train.classes) != run.model.num_classes:
        raise ValueError(
            f"{run.data.root or run.data.format} has {len(train.classes)} classes "
            f"({', '.join(train.classes[:3])}, ...), model.num_classes is {run.model.num_classes}: give the "
            f"model as many (--model.num_classes {len(train.classes)}), or look at data.root"
        )
    val = open_images(run.data, run.data.val, train.classes)
    return (
        ImageDataset(train, run.augment.train_transform(), bad),
        ImageDataset(val, run.augment.eval_transform(), bad, replace=False),
    )


def build_classifier(
    run: ImageRunConfig, classes: Sequence[str], begin: bool = True, teach: bool = True
) -> Classifier:
    """The model that is trained, with the weights it begins with if ``begin``, its teacher if ``teach``."""
    return Classifier(
        build_backbone(run.model, begin),
        classes,
        run.augment,
        run.mix,
        run.loss,
        run.distill,
        load_teacher(run.distill, len(classes)) if teach else None,
        run.model.options,
    )


def load_teacher(c: DistillConfig, num_classes: int) -> Teacher | None:
    if c.teacher is None:
        return None
    timm = require_timm()
    model = build_backbone(
        BackboneConfig(name=c.teacher, num_classes=num_classes, weights=c.weights or "pretrained")
    )
    data = timm.data.resolve_model_data_config(model)
    return Teacher(model, data["mean"], data["std"])


class CpuClock:
    """CPU seconds of a run in this process, those of earlier sittings included; loader processes are not.

    Args:
        result: the file that keeps them as ``cpu_seconds``.
        begun: the run goes on from a checkpoint.
    """

    def __init__(self, result: Path, begun: bool):
        self.before = 0.0
        if begun:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self.before = float(json.loads(result.read_text())["cpu_seconds"])

    def seconds(self) -> float:
        return round(self.before + time.process_time(), 1)


class Validation:
    """The trainer's ``score``: top-1 of the whole validation split, each process taking its share.

    The last result is kept whole in ``RUN/eval/val.json``.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        run: ImageRunConfig,
        run_dir: Path,
        batch_size: int,
        begun: bool = False,
    ):
        self.dataset, self.run, self.run_dir, self.batch_size = dataset, run, run_dir, batch_size
        self.clock = CpuClock(run_dir / "eval" / "val.json", begun)
        self.last: Scores | None = None

    def __call__(self, model: Classifier, step: int) -> dict[str, float]:
        device = next(model.parameters()).device
        loader = share_loader(
            self.dataset, self.batch_size, self.run.train.num_workers, pin_memory=device.type == "cuda"
        )
        classes = self.dataset.source.classes
        precision = self.run.train.precision
        scores = gather(score_classifier(model.logits, loader, len(classes), device, precision))
        if not scores.count:
            raise ValueError(f"no image of {self.run.data.val} can be decoded; see bad_images.jsonl")
        self.last = scores
        if main_process():
            result = {"step": step, "split": self.run.data.val, "model": self.run.model.name}
            result |= scores.describe(classes, self.dataset.source.name)
            result["cpu_seconds"] = self.clock.seconds()
            (self.run_dir / "eval").mkdir(parents=True, exist_ok=True)
            replace_text(self.run_dir / "eval" / "val.json", json.dumps(result, indent=1) + "\n")
        figures = scores.figures()
        named = {f"val_{name}": figures[name] for name in ("top1", "top5", "loss")}
        return {"score": figures["top1"], **named}


def main_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def plan(run: ImageRunConfig, processes: int) -> list[str]:
    """What a run takes on so many processes; its data and weights are not needed."""
    names = [str(i) for i in range(run.model.num_classes)]
    classifier = build_classifier(run, names, begin=False, teach=False)
    share = run.train.batch_size // (processes * run.train.accumulate)
    if run.mix.enabled and share % run.mix.group:
        raise ValueError(
            f"a process has {share} samples at once, which groups of mix.group {run.mix.group} do not divide"
        )
    size = run.augment.size

    def blank(samples: int) -> Mapping[str, Any]:
        images = torch.full((samples, 3, size, size), 128, dtype=torch.uint8)
        return {"image": images, "label": torch.arange(samples) % run.model.num_classes}

    with warnings.catch_warnings(action="ignore"):
        saved = backward_memory(classifier, blank, run.train.precision, compute=False)
    lines = describe_plan(
        classifier, run.train, run.optim, run.schedule, run.ema, processes=processes, saved=saved
    )
    return [
        f"{run.model.name} at {size} px, {run.model.num_classes} classes; effective batch "
        f"{run.train.batch_size}, peak learning rate {run.optim.lr:g}, {run.train.steps:,} steps",
        *lines,
    ]


def gpus_times_nodes(text: str) -> int:
    """8 or 8x4 (GPUs x nodes)."""
    try:
        counts = [int(part) for part in text.lower().split("x")]
        total = 1
        for count in counts:
            total *= count
    except ValueError:
        total = 0
    if total < 1:
        raise ValueError(f"--dry-run is {text!r}, wanted a number of processes, or GPUs x nodes as 8x4")
    return total
