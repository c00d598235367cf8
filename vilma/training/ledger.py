"""Where a run stands, besides its weights; stored in ``trainer.pt``."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointError
from .metrics import Window

__all__ = ["Clock", "Ledger", "read_state"]

FORMAT = 1


@dataclass
class Ledger:
    """Where a run stands, besides weights: finished updates, seconds, means begun, the best checkpoint."""

    step: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=lambda: {"step": 0, "score": -math.inf})
    window: Window = field(default_factory=Window)  # since the last line of metrics
    interval: Window = field(default_factory=Window)  # since the last regular checkpoint

    @classmethod
    def restore(cls, state: Mapping[str, Any] | None) -> "Ledger":
        if state is None:
            return cls()
        windows = Window(state["window"]), Window(state["interval"])
        return cls(state["step"], state["seconds"], dict(state["best"]), *windows)

    def state(self) -> dict[str, Any]:
        plain = {"format": FORMAT, "step": self.step, "seconds": self.seconds, "best": dict(self.best)}
        return plain | {"window": self.window.state(), "interval": self.interval.state()}

    def add(self, values: Mapping[str, float]) -> None:
        self.step += 1
        self.window.add(values)
        self.interval.add({"loss": values["loss"]})


class Clock:
    """Seconds of training; since the last `lap`, samples a second and the share of time waiting for data."""

    def __init__(self, before: float):
        self._before, self._begun = before, time.perf_counter()
        self._lap, self._waited, self.samples = self._begun, 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    def lap(self) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = max(now - self._lap, 1e-9)
        shares = {"samples_per_s": self.samples / elapsed, "data_wait": self._waited / elapsed}
        self._lap, self._waited, self.samples = now, 0.0, 0
        return shares

    def total(self) -> float:
        return self._before + time.perf_counter() - self._begun


def read_state(folder: Path) -> dict[str, Any]:
    """``trainer.pt`` of a checkpoint, as plain containers and tensors on the CPU."""
    try:
        state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no one exception for a broken file
        raise CheckpointError(f"{folder} is damaged: trainer.pt cannot be read: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {state.get('format')}, this version reads {FORMAT}")
    return state
