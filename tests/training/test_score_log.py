"""Figures that come with a score are logged beside the losses; an absent logger says so and stops nothing."""

import importlib.util
import json

import pytest
import torch

from vilma.training import Trainer, TrainerConfig


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 1)

    def forward(self, batch):
        return (self.inner(batch["x"]) ** 2).mean(), {}


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"x": torch.full((3,), float(index))}


def trainer(run_dir, score, **options):
    config = TrainerConfig(
        steps=6, batch_size=4, log_every=3, checkpoint_every=2, tensorboard=False, **options
    )
    return Trainer(config, Line(), Points(), run_dir, score=score)


def test_figures_beside_a_score_are_logged(tmp_path):
    def score(model, step):
        return {"score": -abs(step - 4), "val_figure": 10 * step}

    trainer(tmp_path / "run", score).fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [(line["step"], line["val_figure"], line["score"]) for line in lines if "val_figure" in line]
    assert held_out == [(2, 20, -2), (4, 40, 0), (6, 60, -2)]
    assert [line["step"] for line in lines if "loss" in line] == [3, 6]
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step-00000004"


def test_a_plain_score_is_not_logged(tmp_path):
    trainer(tmp_path / "run", lambda model, step: float(step)).fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="Weights & Biases is installed")
def test_without_weights_and_biases_a_run_goes_on(tmp_path, capsys):
    trainer(tmp_path / "run", None, wandb="project").fit()
    assert "no Weights & Biases log: its package is absent" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "last").is_dir()
