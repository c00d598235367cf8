"""Learning-rate and EMA-decay schedules against the golden vectors and closed forms."""

import math

import numpy as np
import pytest
import torch

from vilma.testing import golden
from vilma.training import EmaConfig, ScheduleConfig, ema_decay, tristage_lr
from vilma.training.schedule import Schedule


def optimizer(lr=1e-3, scale=0.5):
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr_scale": scale}], lr=lr)


def curve(config, steps, points=None):
    made = optimizer()
    schedule = Schedule(config, made, steps)
    rows = []
    for step in points if points is not None else range(steps + 1):
        largest = schedule.set(step)
        assert largest == made.param_groups[0]["lr"]
        assert made.param_groups[1]["lr"] == pytest.approx(0.5 * largest, rel=1e-12)
        rows.append(largest)
    return np.array(rows)


def test_golden_tristage_and_ema():
    vectors = {k: v.numpy() for k, v in golden("pmp", "lr_ema_schedules.npz").items()}
    steps, total = vectors["step"].tolist(), int(vectors["total_steps"])
    lr = [tristage_lr(step, total, 1e-4) for step in steps]
    np.testing.assert_allclose(lr, vectors["lr"], rtol=1e-9)
    decay = [ema_decay(EmaConfig(decay=0.9999, schedule="power"), step) for step in steps]
    np.testing.assert_allclose(decay, vectors["ema_decay"], rtol=1e-9)


def test_tristage_in_a_schedule_spans_its_own_length():
    lr = curve(
        ScheduleConfig(name="tristage", length=1000), steps=500, points=[0, 10, 20, 99, 100, 550, 1000, 1200]
    )
    expected = np.array([0.1, 0.55, 1, 1, 1, 0.5 * (1 + 1e-6), 1e-6, 1e-6]) * 1e-3
    np.testing.assert_allclose(lr, expected, rtol=1e-9)


def test_cosine_is_a_warm_up_and_half_a_cosine():
    lr = curve(ScheduleConfig(warmup=20, initial_ratio=0.1, final_ratio=0.02), steps=120)
    step = np.arange(121)
    warm = 0.1 + 0.9 * step / 20
    decay = 0.02 + 0.98 * 0.5 * (1 + np.cos(math.pi * (step - 20) / 100))
    np.testing.assert_allclose(lr, 1e-3 * np.where(step < 20, warm, decay), rtol=1e-9)


def test_constant_after_its_warm_up():
    lr = curve(ScheduleConfig(name="constant", warmup=4, initial_ratio=0.2), steps=10)
    np.testing.assert_allclose(lr / 1e-3, [0.2, 0.4, 0.6, 0.8] + [1] * 7, rtol=1e-9)


def test_ema_decays():
    ratio, constant = EmaConfig(decay=0.998, schedule="ratio"), EmaConfig(decay=0.998, schedule="constant")
    assert [ema_decay(ratio, n) for n in (1, 90, 10**6)] == [2 / 11, 0.91, 0.998]
    assert ema_decay(constant, 1) == 0.998
    assert ema_decay(EmaConfig(), 1) == 0.0
    assert ema_decay(EmaConfig(decay=0.5), 10**6) == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScheduleConfig(phases=(0.5, 0.5, 0.5)),
        lambda: ScheduleConfig(final_ratio=2.0),
        lambda: ScheduleConfig(length=0),
        lambda: EmaConfig(decay=1.0),
        lambda: Schedule(ScheduleConfig(warmup=10), optimizer(), 10),
    ],
)
def test_impossible_values_are_errors(make):
    with pytest.raises(ValueError):
        make()
