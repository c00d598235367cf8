"""What a run will take, against counting by hand and against what training really writes."""

import re

import pytest
import torch
from torch import nn

from vilma.training import (
    EmaConfig,
    OptimConfig,
    ScheduleConfig,
    TrainerConfig,
    backward_memory,
    describe_plan,
)


class Net(nn.Module):
    """1 M weights in four equal layers, and a layer of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))
        self.out = nn.Linear(512, 1)

    def forward(self, batch):
        loss = self.out(torch.tanh(self.blocks(batch["x"]))).square().mean()
        return loss, {}


def plan(processes=1, saved=None, optim=None, ema=None, schedule=None, **train):
    train = {"steps": 1001, "batch_size": 64, "keep": 3} | train
    sections = TrainerConfig(**train), optim or OptimConfig(), schedule or ScheduleConfig()
    return "\n".join(describe_plan(Net(), *sections, ema or EmaConfig(), processes=processes, saved=saved))


def mebibytes(text, name):
    return float(re.search(rf"{re.escape(name)} ([\d.]+) MiB", text).group(1))


WHOLE = 4 * (4 * 512 * 512 + 513) / 2**20  # MiB of weights


def test_one_process():
    text = plan(accumulate=2)
    assert "parameters: 1,049,089, of which 1,049,089 are trained, 1,049,088 with weight decay" in text
    assert "64 samples = 1 processes x 2 micro-batches x 32; 1,001 updates = 64,064 samples" in text
    assert mebibytes(text, "weights") == mebibytes(text, "gradients") == pytest.approx(WHOLE, abs=0.01)
    assert mebibytes(text, "state of adamw") == pytest.approx(2 * WHOLE, abs=0.01)
    assert mebibytes(text, "memory of a process:") == pytest.approx(5 * WHOLE, abs=0.02)
    assert mebibytes(text, "disk:") == pytest.approx(5 * WHOLE, abs=0.02)
    assert "average" not in plan(ema=EmaConfig(enabled=False))
    assert mebibytes(plan(optim=OptimConfig(name="sgd")), "state of sgd") == pytest.approx(WHOLE, abs=0.01)


def test_shards():
    text = plan(4, sharding="fsdp2", saved=(2**20, 2**18))
    assert mebibytes(text, "weights") == pytest.approx(WHOLE / 4, abs=0.01)
    assert mebibytes(text, "state of adamw") == pytest.approx(WHOLE / 2, abs=0.01)
    # Two of the four layers and the rest are whole at a time.
    assert mebibytes(text, "gathered weights") == pytest.approx(2 + 4 * 513 / 2**20, abs=0.01)
    assert mebibytes(text, "kept for the backward pass of 16 samples in fp32") == 5.0
    assert "gathered" not in plan(4) and "gathered" not in plan(1, sharding="fsdp2")


def test_the_schedule_is_shown():
    schedule = ScheduleConfig(warmup=100, initial_ratio=0.1, final_ratio=0.01)
    line = next(line for line in plan(schedule=schedule).splitlines() if line.startswith("learning rate"))
    assert "1e-05 at 0, " in line and "0.0001 at 100, " in line and line.endswith(" at 1,000")
    assert "learning rate: 0.0001 at 0, 0.0001 at 1,000" in plan(schedule=ScheduleConfig(name="constant"))


def test_what_cannot_run_is_refused():
    with pytest.raises(ValueError, match="batch_size is 64, which 3 processes x 2 accumulated"):
        plan(3, accumulate=2)
    with pytest.raises(ValueError, match="warmup is 2000"):
        plan(schedule=ScheduleConfig(warmup=2000))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_of_the_backward_pass(precision):
    """Saved: inputs of the layers, and in bf16 copies of the weights (not the first: its input is a leaf)."""
    fixed, each = backward_memory(Net(), lambda n: {"x": torch.ones(n, 512)}, precision)
    if precision == "fp32":
        assert (fixed, each) == (0, 4 * (5 * 512 + 1))  # x, three outputs, tanh; the output that is squared
    else:
        assert fixed == 2 * (3 * 512 * 512 + 512)
        assert 2 * 5 * 512 <= each <= 4 * 6 * 512
