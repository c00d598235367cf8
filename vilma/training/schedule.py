"""Schedules of learning rate and EMA decay: pure functions of the number of updates, without state."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from vilma.extras import require_timm

__all__ = ["EmaConfig", "Schedule", "ScheduleConfig", "ema_decay", "tristage_lr"]


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves over the updates of a run.

    Args:
        name: ``cosine`` (linear warm-up, then half a cosine), ``tristage`` (warm-up, hold, half a cosine) or
            ``constant`` (after the warm-up).
        length: updates that the schedule spans; none = those of the run. A run may stop before its end, as
            PointMapPolicy does (25 k of 45 k).
        warmup: updates of linear warm-up of ``cosine`` and ``constant``.
        initial_ratio, final_ratio: learning rate at update 0 (with a warm-up) and at the end, over the peak.
        phases: shares of ``tristage`` spent in warm-up, hold and decay; they sum to 1.
    """

    name: Literal["cosine", "tristage", "constant"] = "cosine"
    length: int | None = None
    warmup: int = 0
    initial_ratio: float = 0.1
    final_ratio: float = 1e-6
    phases: tuple[float, float, float] = (0.02, 0.08, 0.9)

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError(
                f"schedule.length is {self.length}, wanted at least 1, or none for the whole run"
            )
        if self.warmup < 0:
            raise ValueError(f"schedule.warmup is {self.warmup}, wanted 0 or more updates")
        for name in ("initial_ratio", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"schedule.{name} is {getattr(self, name)}, wanted a share of the peak in [0, 1]"
                )
        if min(self.phases) < 0 or not math.isclose(sum(self.phases), 1.0, abs_tol=1e-6):
            raise ValueError(f"schedule.phases are {self.phases}, wanted three shares that sum to 1")


@dataclass(frozen=True)
class EmaConfig:
    """Moving average of the weights and buffers; the average is what a checkpoint's model.safetensors holds.

    Args:
        decay: the largest decay.
        schedule: decay after n updates: ``constant``; ``ratio`` = min(decay, (1 + n) / (10 + n));
            ``power`` = min(decay, 1 - (1 + t)^(-2/3)) with t = max(0, n - 1), as PointMapPolicy trains.
    """

    enabled: bool = True
    decay: float = 0.9999
    schedule: Literal["constant", "ratio", "power"] = "power"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}, wanted 0 <= decay < 1")


def ema_decay(config: EmaConfig, updates: int) -> float:
    """Decay of the average after ``updates`` optimiser updates, the latest included."""
    if config.schedule == "ratio":
        return min(config.decay, (1 + updates) / (10 + updates))
    if config.schedule == "power":
        return min(config.decay, 1.0 - (1.0 + max(0, updates - 1)) ** (-2 / 3))
    return config.decay


def tristage_lr(
    step: int,
    total: int,
    peak: float,
    phases: tuple[float, float, float] = (0.02, 0.08, 0.9),
    initial_ratio: float = 0.1,
    final_ratio: float = 1e-6,
) -> float:
    """Learning rate of update ``step`` (from 0): linear warm-up, hold, half a cosine to ``total``."""
    warmup, hold = (int(share * total) for share in phases[:2])
    if step < warmup:
        return peak * (initial_ratio + (1 - initial_ratio) * step / warmup)
    if step < warmup + hold:
        return peak
    decay = max(1, total - warmup - hold)
    past = min(step - warmup - hold, decay)
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * past / decay)))


class Schedule:
    """Sets the learning rate of an optimiser's groups, times their ``lr_scale``.

    Args:
        optimizer: a torch optimiser whose groups hold the peak learning rate.
        steps: updates of the run.
    """

    def __init__(self, config: ScheduleConfig, optimizer: Any, steps: int):
        length = config.length or steps
        if config.name != "tristage" and config.warmup >= length:
            raise ValueError(f"schedule.warmup is {config.warmup}, but the schedule spans {length} updates")
        self.config, self.optimizer, self.length = config, optimizer, length
        self.peak = max(group["lr"] for group in optimizer.param_groups)
        self._timm = None if config.name == "tristage" else self._build()

    def _build(self) -> Any:
        """timm's scheduler, counted in updates."""
        require_timm()
        from timm.scheduler import CosineLRScheduler, StepLRScheduler

        config = self.config
        options = {
            "warmup_t": config.warmup,
            "warmup_lr_init": config.initial_ratio * self.peak,
            "t_in_epochs": False,
        }
        if config.name == "constant":
            return StepLRScheduler(self.optimizer, decay_t=1, decay_rate=1.0, **options)
        return CosineLRScheduler(
            self.optimizer,
            t_initial=self.length - config.warmup,
            lr_min=config.final_ratio * self.peak,
            warmup_prefix=True,
            **options,
        )

    def set(self, updates: int) -> float:
        """Prepare the update that follows ``updates`` finished ones; returns the largest learning rate."""
        if self._timm is not None:
            self._timm.step_update(updates)
        else:
            config = self.config
            shape = (config.phases, config.initial_ratio, config.final_ratio)
            lr = tristage_lr(updates, self.length, self.peak, *shape)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
        return max(group["lr"] for group in self.optimizer.param_groups)
