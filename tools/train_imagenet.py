"""Train an image classifier: ViL or any timm model, on folders, tar shards or Hugging Face data sets."""

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vilma import config
from vilma.datasets.imagenet import ImageDataset
from vilma.report import record_time
from vilma.tools._image_report import write_image_report
from vilma.tools._image_training import (
    ImageRunConfig,
    Validation,
    build_classifier,
    gpus_times_nodes,
    open_data,
    plan,
)
from vilma.training import Checkpoints, Trainer, find_trained, seed_all

__all__ = ["main"]

# A data set may be moved, and where a run began is history once it has begun.
MAY_CHANGE = ("data.root", "data.train", "data.val", "data.cache", "model.weights", "distill.weights")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options, overrides = _parser().parse_known_args(arguments)
    if options.seed is not None:
        overrides = [*overrides, "--train.seed", str(options.seed)]
    run = config.load(ImageRunConfig, options.config, overrides)
    if options.dry_run:
        for line in plan(run, gpus_times_nodes(options.dry_run)):
            print(line)
        return 0
    run_dir = options.run or Path("runs") / Path(options.config).stem
    main_process = os.environ.get("RANK", "0") == "0"
    done = find_trained(run_dir, run.train.steps, run, MAY_CHANGE)
    if done is not None:
        if main_process:
            print(f"{run_dir} is already trained to step {done.step}: {run_dir}/report.html")
        return 0
    train, val = open_data(run, run_dir)
    seed_all(run.train.seed)
    begun = Checkpoints(run_dir / "checkpoints").linked("last") is not None
    model = build_classifier(run, train.source.classes, begin=not begun)
    if main_process:
        count = sum(p.numel() for p in model.parameters())
        epochs = run.train.steps * run.train.batch_size / len(train)
        print(
            f"{len(train):,} images to train on, {len(val):,} held out, {len(train.source.classes)} classes"
        )
        print(
            f"{run.model.name}, {count / 1e6:.2f} M parameters; {run.train.steps:,} steps of "
            f"{run.train.batch_size} = {epochs:.1f} epochs in {run_dir}"
        )
    validation = Validation(val, run, run_dir, min(256, run.train.batch_size), begun)
    train_run(run, model, train, validation, run_dir, arguments, main_process)
    return 0


def train_run(
    run: ImageRunConfig,
    model: Any,
    train: ImageDataset,
    validation: Validation,
    run_dir: Path,
    arguments: Sequence[str],
    main_process: bool,
) -> None:
    began, updates = time.perf_counter(), []
    watch = BadWatch(train)

    def on_step(step: int, values: Any) -> None:
        if not updates:
            updates.append(step)
        if main_process and step % run.train.log_every == 0:
            watch.tell()

    trainer = Trainer(
        run.train,
        model,
        train,
        run_dir,
        optim=run.optim,
        schedule=run.schedule,
        ema=run.ema,
        score=validation,
        on_step=on_step,
        describe=run,
        may_change=MAY_CHANGE,
    )
    try:
        trained = trainer.fit()
    finally:
        if main_process and updates:
            command = shlex.join(["vilma", "train-imagenet", *arguments])
            with contextlib.suppress(OSError):  # a full disk must not hide why it ended
                record_time(run_dir, "train", time.perf_counter() - began, command)
    if main_process:
        watch.tell()
        print(f"trained to step {trained.step} in {trained.seconds:.0f} s: {trained.checkpoint}")
        if validation.last is not None:
            figures = validation.last.figures()
            print(
                f"held-out top-1 {figures['top1']:.2%}, top-5 {figures['top5']:.2%} of "
                f"{validation.last.count:,} images"
            )
        bad = train.bad.read()
        if bad:
            print(f"{len(bad)} images or shards could not be used: {run_dir}/bad_images.jsonl")
        print(f"report: {write_image_report(run_dir, validation.dataset)}")


class BadWatch:
    """Tells of images that could not be decoded as they come, whichever process met them."""

    def __init__(self, dataset: ImageDataset):
        self.bad, self.told, self.size = dataset.bad, set(), -1

    def tell(self) -> None:
        path = self.bad.path
        size = path.stat().st_size if path is not None and path.is_file() else 0
        if size == self.size:
            return
        self.size = size
        for name, reason in self.bad.read().items():
            if name not in self.told:
                self.told.add(name)
                print(f"skipped {name}: {reason}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilma train-imagenet",
        usage="vilma train-imagenet CONFIG [--run DIR] [--seed N] [--dry-run [GPUSxNODES]] "
        "[--section.field VALUE ...]",
        description=__doc__,
        epilog="Any field of the config can be given: --data.root DIR --optim.lr 1e-3 --augment.size "
        "192. Sections: model, data, augment, mix, loss, distill, optim, schedule, ema, train. Run the same "
        "command again to go on after an interruption. Several GPUs: torchrun --nproc-per-node N -m "
        "vilma.tools.train_imagenet CONFIG ... (or accelerate launch), with --train.sharding fsdp2 where a "
        "model and its optimiser are too much for one.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. configs/smoke/vil_digits.yaml")
    parser.add_argument(
        "--run",
        "--run-dir",  # torchrun takes --run for a short form of its own --run-path
        type=Path,
        metavar="DIR",
        help="run directory (default: runs/<config's name>); under torchrun write --run-dir",
    )
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
