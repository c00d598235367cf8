"""Two processes (DDP over gloo) follow one process at equal global batch."""

import json
import os
import subprocess
import sys

import pytest
import torch

# The processes meet at a file: a port that is free when it is chosen may be taken when it is used.
SCRIPT = """
import os, sys
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
world = int(os.environ.get("WORLD_SIZE", 1))
if world > 1:
    place = {"rank": int(os.environ["RANK"]), "world_size": world}
    torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[4], **place)
from toy_run import ToyData, build
from torch import nn
from vilma.training import ScheduleConfig

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, batch):
        error = self.line(batch["x"]) - batch["y"]
        return (error**2).mean(), {"mae": error.detach().abs().mean()}

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), folder / "weights.pt")

torch.manual_seed(0)
options = {"schedule": ScheduleConfig(name="constant", warmup=3), "describe": {}, "log_every": 1}
build(sys.argv[2], model=Plain(), steps=int(sys.argv[3]), accumulate=2, **options).fit()
"""


def launch(folder, run_dir, steps, world):
    meeting = run_dir.with_name(f"{run_dir.name}-{steps}.meeting")
    processes = []
    for rank in range(world):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if world > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        command = [sys.executable, "-c", SCRIPT, *map(str, (folder, run_dir, steps, meeting))]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)


@pytest.mark.long
def test_two_processes_equal_one(request, tmp_path):
    folder = request.path.parent
    launch(folder, tmp_path / "one", 20, 1)
    launch(folder, tmp_path / "two", 10, 2)  # and a resume of a distributed run
    launch(folder, tmp_path / "two", 20, 2)
    curves = {}
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves[name] = [(line["step"], line["loss"], line["mae"]) for line in map(json.loads, lines)]
    assert [row[0] for row in curves["one"]] == [row[0] for row in curves["two"]] == list(range(1, 21))
    torch.testing.assert_close(torch.tensor(curves["two"]), torch.tensor(curves["one"]), rtol=1e-5, atol=1e-7)
