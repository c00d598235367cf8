"""What a run tells about itself: metrics.jsonl, TensorBoard, and one line or bar on the console."""

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint import replace_text

__all__ = ["Display", "MetricsFile", "TensorBoard", "WeightsAndBiases", "Window"]


class Window:
    """Running means of named values; `state` survives a checkpoint, so that means do not depend on kills."""

    def __init__(self, state: Mapping[str, tuple[float, int]] | None = None):
        self.sums = {name: (float(total), int(count)) for name, (total, count) in (state or {}).items()}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + value, count + 1)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items()}

    def clear(self) -> None:
        self.sums = {}

    def state(self) -> dict[str, list[float]]:
        return {name: [total, count] for name, (total, count) in self.sums.items()}


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, each with its ``step``.

    Args:
        restored: the step a run goes on from; lines beyond it are dropped, as are half-written ones.
    """

    def __init__(self, path: Path, restored: int = 0):
        self.path = path
        if path.is_file():
            text = path.read_text(errors="replace")
            lines = text.splitlines()
            kept = "".join(f"{line}\n" for line in lines if (_step(line) or restored + 1) <= restored)
            if kept != text:
                replace_text(path, kept)
        self._file = open(path, "a")  # noqa: SIM115 (closed by close)

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"could not write {self.path}: {error}. The checkpoints are safe; see to the cause (a full "
                "disk?) and run the same command again: it goes on from the last one"
            ) from error

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # already reported by write
            self._file.close()


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class TensorBoard:
    """Scalars under ``train/``; says once why when it cannot write, and never stops a run."""

    def __init__(self, folder: Path, restored: int, say: Any):
        self._writer = None
        self._say = say
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("no TensorBoard log: its package is absent (pip install 'vilma[train]'); see metrics.jsonl")
            return
        self._try(lambda: self._open(SummaryWriter, folder, restored))

    def _open(self, writer: type, folder: Path, restored: int) -> None:
        self._writer = writer(str(folder), purge_step=restored + 1 if restored else None)

    def write(self, record: Mapping[str, Any]) -> None:
        if self._writer is not None:
            step = record["step"]
            scalars = {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}
            self._try(lambda: [self._writer.add_scalar(f"train/{k}", v, step) for k, v in scalars.items()])

    def sync(self) -> None:
        if self._writer is not None:
            self._try(self._writer.flush)

    def close(self) -> None:
        if self._writer is not None:
            self._try(self._writer.close)

    def _try(self, action: Any) -> None:
        try:
            action()
        except (OSError, RuntimeError, ValueError) as error:
            self._writer = None
            self._say(f"TensorBoard logging stopped: {error}; metrics.jsonl goes on")


class WeightsAndBiases:
    """Metrics to a project of Weights & Biases; says once why when it cannot, and never stops a run.

    The run's name there is kept in ``wandb_id.txt``, so that a resumed run goes on in the same place.
    """

    def __init__(self, project: str, run_dir: Path, description: Mapping[str, Any], say: Any):
        self._run, self._say = None, say
        try:
            import wandb
        except ImportError:
            say("no Weights & Biases log: its package is absent (pip install wandb); see metrics.jsonl")
            return
        kept = run_dir / "wandb_id.txt"
        if not kept.is_file():
            replace_text(kept, secrets.token_hex(6))
        options = {"id": kept.read_text().strip(), "resume": "allow", "config": dict(description)}
        self._try(lambda: self._open(wandb, project=project, name=run_dir.name, dir=str(run_dir), **options))

    def _open(self, wandb: Any, **options: Any) -> None:
        self._run = wandb.init(**options)

    def write(self, record: Mapping[str, Any]) -> None:
        if self._run is not None:
            values = {k: v for k, v in record.items() if k != "step"}
            self._try(lambda: self._run.log(values, step=record["step"]))

    def sync(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        if self._run is not None:
            self._try(self._run.finish)

    def _try(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # the service's own errors have no common class
            self._run = None
            self._say(f"Weights & Biases logging stopped: {error}; metrics.jsonl goes on")


class Display:
    """A rich progress bar on a terminal; elsewhere a plain line every ``interval`` seconds.

    Args:
        total: updates of the run.
        done: updates finished before.
        quiet: print nothing (all but the main process).
    """

    def __init__(self, total: int, done: int = 0, quiet: bool = False, interval: float = 10.0):
        self.total, self.quiet, self.interval = total, quiet, interval
        self._done, self._begun, self._printed = done, None, None
        self._bar = self._task = None

    def __enter__(self) -> "Display":
        self._begun = self._printed = time.monotonic()
        self._first = self._done
        if not self.quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=self.total, completed=self._done, text="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def step(self, done: int, record: Mapping[str, float] | None) -> None:
        """Show that ``done`` updates are finished; ``record`` is a new line of metrics, if there is one."""
        if self.quiet:
            return
        self._done = done
        if self._bar is not None:
            fields = {"text": _summary(record)} if record else {}
            self._bar.update(self._task, completed=done, **fields)
            return
        now = time.monotonic()
        if record and (now - self._printed >= self.interval or done == self.total):
            self._printed = now
            rest = (now - self._begun) / max(1, done - self._first) * (self.total - done)
            left = f"{int(rest // 60)}:{int(rest % 60):02d} left"
            print(f"step {done}/{self.total}  {_summary(record)}  {left}", flush=True)


def _summary(record: Mapping[str, float]) -> str:
    return (
        f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['samples_per_s']:,.0f} samples/s  "
        f"data wait {record['data_wait']:.0%}"
    )
