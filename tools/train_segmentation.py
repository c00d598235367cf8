"""Train a segmenter: UPerNet over the features of ViL or any timm model, on ADE20K or generated shapes."""

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vilma import config
from vilma.datasets.ade20k import MaskDataConfig, MaskDataset, class_names, open_masks
from vilma.datasets.imagenet import BadImages
from vilma.report import record_time
from vilma.tools._backbone import checked_name, find_weights, weights_overlay
from vilma.tools._image_training import CpuClock, gpus_times_nodes, main_process
from vilma.tools._segmentation_report import write_segmentation_report
from vilma.training import (
    Checkpoints,
    EmaConfig,
    OptimConfig,
    ScheduleConfig,
    Trainer,
    TrainerConfig,
    backward_memory,
    describe_plan,
    find_trained,
    seed_all,
)
from vilma.training.checkpoint import replace_text
from vilma.training.scoring import share_loader
from vilma.training.segmentation import MaskAugmentConfig, SegmentationTask, mean_iou, score_segmenter
from vilma.vil.segmentation import Segmenter, create_segmenter, slide

__all__ = ["SegmentationRunConfig", "SegmenterConfig", "build_segmenter", "main"]

MAY_CHANGE = ("data.root", "data.names", "segmenter.weights")


@dataclass(frozen=True)
class SegmenterConfig:
    """The model.

    Args:
        backbone: a timm model.
        options: its arguments, as ``{drop_path_rate: 0.05, img_size: 512}``.
        weights: to begin with: a run, a checkpoint's folder, a file, or ``pretrained``.
        out_indices: blocks whose maps are used.
        channels: of the decoder.
        aux_level, aux_weight: the map of the auxiliary head (none: no such head), and its share in the loss.
        dropout: before the classifiers.
    """

    backbone: str = "vil2_tiny_patch16_224"
    num_classes: int = 150
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    out_indices: tuple[int, int, int, int] = (3, 5, 7, 11)
    channels: int = 192
    aux_level: int | None = 2
    aux_weight: float = 0.4
    dropout: float = 0.1


@dataclass(frozen=True)
class SegmentationRunConfig:
    """A complete training of a segmenter: the sections of its YAML file."""

    segmenter: SegmenterConfig
    data: MaskDataConfig
    augment: MaskAugmentConfig = field(default_factory=MaskAugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(enabled=False))
    train: TrainerConfig = field(default_factory=TrainerConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options, overrides = _parser().parse_known_args(arguments)
    if options.seed is not None:
        overrides = [*overrides, "--train.seed", str(options.seed)]
    run = config.load(SegmentationRunConfig, options.config, overrides)
    if options.dry_run:
        for line in plan(run, gpus_times_nodes(options.dry_run)):
            print(line)
        return 0
    run_dir = options.run or Path("runs") / Path(options.config).stem
    first = os.environ.get("RANK", "0") == "0"
    done = find_trained(run_dir, run.train.steps, run, MAY_CHANGE)
    if done is not None:
        if first:
            print(f"{run_dir} is already trained to step {done.step}: {run_dir}/report.html")
        return 0
    classes = class_names(run.data, run.segmenter.num_classes)
    bad = BadImages(run_dir / "bad_images.jsonl")
    augment, number = run.augment, len(classes)
    train = MaskDataset(open_masks(run.data, run.data.train), augment.train_transform(), number, bad)
    val = MaskDataset(
        open_masks(run.data, run.data.val), augment.eval_transform(), number, bad, replace=False
    )
    seed_all(run.train.seed)
    begun = Checkpoints(run_dir / "checkpoints").linked("last") is not None
    model = build_task(run, classes, begin=not begun)
    if first:
        count = sum(p.numel() for p in model.parameters())
        print(f"{len(train):,} images to train on, {len(val):,} held out, {number} classes")
        print(f"{run.segmenter.backbone} with UPerNet, {count / 1e6:.2f} M parameters, in {run_dir}")
    began, updates = time.perf_counter(), []
    validation = Validation(val, run, run_dir, begun)
    trainer = Trainer(
        run.train,
        model,
        train,
        run_dir,
        optim=run.optim,
        schedule=run.schedule,
        ema=run.ema,
        score=validation,
        on_step=lambda step, values: updates.append(step) if not updates else None,
        describe=run,
        may_change=MAY_CHANGE,
    )
    try:
        trained = trainer.fit()
    finally:
        if first and updates:
            command = shlex.join(["vilma", "train-segmentation", *arguments])
            with contextlib.suppress(OSError):  # a full disk must not hide why it ended
                record_time(run_dir, "train", time.perf_counter() - began, command)
    if first:
        print(f"trained to step {trained.step} in {trained.seconds:.0f} s: {trained.checkpoint}")
        if validation.result:
            print(f"held-out mIoU {validation.result['miou']:.2%} of {len(val):,} images")
        unusable = bad.read()
        if unusable:
            print(f"{len(unusable)} images could not be used: {run_dir}/bad_images.jsonl")
        final = trainer.final_model.eval()
        print(f"report: {write_segmentation_report(run_dir, val, final.logits, classes)}")
    return 0


def build_segmenter(c: SegmenterConfig, begin: bool = True) -> Segmenter:
    """The model of a config, with the weights it begins with if ``begin``."""
    import vilma.vil  # noqa: F401 - registers the family

    name = checked_name(c.backbone)
    options = dict(c.options)
    if begin and c.weights:
        options["pretrained"] = True
        if c.weights != "pretrained":
            options["pretrained_cfg_overlay"] = weights_overlay(find_weights(c.weights), name)
    return create_segmenter(name, c.num_classes, c.out_indices, c.channels, c.aux_level, c.dropout, **options)


def build_task(run: SegmentationRunConfig, classes: Sequence[str], begin: bool = True) -> SegmentationTask:
    def save(model: torch.nn.Module, folder: Path) -> None:
        values = {"segmenter": config.encode(run.segmenter), "classes": list(classes)}
        config.dump(
            values | {"mean": list(run.augment.mean), "std": list(run.augment.std)}, folder / "config.yaml"
        )

    model = build_segmenter(run.segmenter, begin)
    return SegmentationTask(model, classes, run.augment, run.segmenter.aux_weight, save)


class Validation:
    """The trainer's ``score``: mean intersection over union of the whole validation split.

    Images are seen in windows of the training size; each process takes its share.
    """

    def __init__(self, dataset: MaskDataset, run: SegmentationRunConfig, run_dir: Path, begun: bool = False):
        self.dataset, self.run, self.run_dir = dataset, run, run_dir
        self.clock = CpuClock(run_dir / "eval" / "masks.json", begun)
        self.result: dict[str, Any] = {}

    def __call__(self, model: SegmentationTask, step: int) -> dict[str, float]:
        run, number = self.run, self.run.segmenter.num_classes
        device = next(model.parameters()).device
        # Photographs have sizes of their own; generated images have one.
        batch_size = 32 if run.data.format == "shapes" else 1
        loader = share_loader(self.dataset, batch_size, run.train.num_workers, device.type == "cuda")

        def logits(images: Tensor) -> Tensor:
            return slide(model.logits, images, run.augment.size, run.augment.stride, number)

        counts, seconds = score_segmenter(logits, loader, number, device, run.train.precision)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            total = torch.from_numpy(counts).to(device)
            torch.distributed.all_reduce(total)
            counts = total.cpu().numpy()
        miou, each = mean_iou(counts)
        self.result = {
            "step": step,
            "model": run.segmenter.backbone,
            "miou": miou,
            "pixel_accuracy": float(counts.trace() / max(counts.sum(), 1)),
            "images": len(self.dataset),
            "seconds": seconds,
            "cpu_seconds": self.clock.seconds(),
            "iou": {name: None if x != x else float(x) for name, x in zip(model.classes, each)},
        }
        if main_process():
            (self.run_dir / "eval").mkdir(parents=True, exist_ok=True)
            replace_text(self.run_dir / "eval" / "masks.json", json.dumps(self.result, indent=1) + "\n")
        return {"score": miou, "val_miou": miou, "val_pixel_accuracy": self.result["pixel_accuracy"]}


def plan(run: SegmentationRunConfig, processes: int) -> list[str]:
    """What a run takes on so many processes; its data and weights are not needed."""
    number, size = run.segmenter.num_classes, run.augment.size
    model = build_task(run, [str(k) for k in range(number)], begin=False)

    def blank(samples: int) -> Mapping[str, Any]:
        images = torch.full((samples, 3, size, size), 128, dtype=torch.uint8)
        return {"image": images, "mask": torch.zeros(samples, size, size, dtype=torch.long)}

    with warnings.catch_warnings(action="ignore"):
        saved = backward_memory(model, blank, run.train.precision, compute=False)
    lines = describe_plan(
        model, run.train, run.optim, run.schedule, run.ema, processes=processes, saved=saved
    )
    return [
        f"{run.segmenter.backbone} with UPerNet at {size} px, {number} classes; effective batch "
        f"{run.train.batch_size}, peak learning rate {run.optim.lr:g}, {run.train.steps:,} steps",
        *lines,
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilma train-segmentation",
        usage="vilma train-segmentation CONFIG [--run DIR] [--seed N] [--dry-run [GPUSxNODES]] "
        "[--section.field VALUE ...]",
        description=__doc__,
        epilog="Any field of the config can be given. Sections: segmenter, data, augment, optim, schedule, "
        "ema, train. Run the same command again to go on after an interruption. Several GPUs: torchrun "
        "--nproc-per-node N -m vilma.tools.train_segmentation CONFIG ...",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. configs/smoke/vil_shapes.yaml")
    parser.add_argument("--run", "--run-dir", type=Path, metavar="DIR", help="default: runs/<config's name>")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="1",
        metavar="GPUSxNODES",
        help="tell batch, learning rate, steps, memory and disk for so many processes (8, or 8x4), and stop",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same as --train.seed N")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
