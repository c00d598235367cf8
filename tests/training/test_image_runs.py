"""Trainings of a classifier by the real command: killed and resumed, one process and two."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/smoke/vil_digits.yaml"
TIMINGS = {"samples_per_s", "data_wait", "seconds"}
TINY = [
    *("--model.options", "{img_size: 28, patch_size: 7, embed_dim: 16, depth: 2, drop_path_rate: 0.2}"),
    *("--mix", "{mixup: 0.8, cutmix: 1.0, group: 4}", "--train.batch_size", "16", "--schedule.warmup", "5"),
    *("--train.log_every", "1", "--train.tensorboard", "false", "--augment.auto_augment", "3a"),
]


def command(run_dir: Path, *overrides: str, world: int = 1) -> list[str]:
    launch = [sys.executable]
    if world > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    tool = ["-m", "vilma.tools.train_imagenet", str(CONFIG), "--run-dir", str(run_dir)]
    return [*launch, *tool, *TINY, *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(run_dir: Path, *overrides: str, world: int = 1) -> str:
    result = subprocess.run(
        command(run_dir, *overrides, world=world), env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def lines(run_dir: Path) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in found]


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir) if "loss" in line]


def start_and_kill(run_dir: Path, overrides: list[str], moment) -> None:
    """SIGKILL the training once ``moment()`` is true."""
    process = subprocess.Popen(
        command(run_dir, *overrides), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not moment():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.long
def test_killed_and_resumed_bit_for_bit(tmp_path):
    """Killed between checkpoints and while one is written; sample order, draws and curve are the same."""
    overrides = ["--train.steps", "16", "--train.checkpoint_every", "6", "--train.num_workers", "1"]
    whole, run_dir = tmp_path / "whole", tmp_path / "killed"
    train(whole, *overrides)
    reached = run_dir / "checkpoints" / "step-00000006"
    start_and_kill(
        run_dir, overrides, lambda: reached.is_dir() and lines_of(run_dir)[-1:] and lines_of(run_dir)[-1] > 7
    )
    begun = time.monotonic()
    start_and_kill(run_dir, overrides, lambda: any(run_dir.glob("checkpoints/.tmp-step-*")))
    assert time.monotonic() - begun < 120
    said = train(run_dir, *overrides)
    assert "going on from step" in said
    assert lines(run_dir) == lines(whole)
    weights = [d / "checkpoints" / "last" / "model.safetensors" for d in (run_dir, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert not list(run_dir.rglob(".tmp-*")) and (run_dir / "report.html").is_file()


def lines_of(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line)["step"])
        except ValueError:
            continue
    return found


@pytest.mark.long
def test_two_processes_give_the_losses_of_one(tmp_path):
    """DDP and FSDP2 over gloo: mixing, augmentation and stochastic depth are seeded by sample."""
    overrides = ["--train.steps", "20", "--train.checkpoint_every", "20", "--optim.lr", "6e-3"]
    train(tmp_path / "one", *overrides)
    one = losses(tmp_path / "one")
    assert len(one) == 20 and max(one) - min(one) > 0.05
    for name, extra in (("ddp", []), ("fsdp2", ["--train.sharding", "fsdp2"])):
        train(tmp_path / name, *overrides, *extra, world=2)
        two = losses(tmp_path / name)
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5, name
        last = [lines(tmp_path / d)[-1] for d in ("one", name)]
        assert last[0]["val_top1"] == pytest.approx(last[1]["val_top1"], abs=2e-3)


@pytest.mark.long
def test_digits_are_learnt_by_the_smoke_recipe(tmp_path):
    """A sixth of configs/smoke/vil_digits.yaml; docs/results/imagenet has the whole."""
    run_dir = tmp_path / "digits"
    words = [sys.executable, "-m", "vilma.tools.train_imagenet", str(CONFIG), "--run-dir", str(run_dir)]
    words += ["--train.steps", "160", "--train.checkpoint_every", "160", "--train.tensorboard", "false"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((run_dir / "eval" / "val.json").read_text())
    assert result["samples"] == 1000 and result["top1"] > 0.88
    assert len(list((run_dir / "eval" / "val_worst").glob("*.png"))) == len(result["worst"])
