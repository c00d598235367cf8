"""A tiny training that uses every kind of state; as a script, a server that runs it in killable processes.

Each line on standard input is a JSON request, answered by one JSON line; a forked child does the training.
``kill_after`` SIGKILLs it so many seconds after its first update; ``kill_at_step`` within that update;
``kill_at_call`` at its n-th file-system step (a rename, link, sync or remove), which reaches every moment of
writing a checkpoint.
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vilma.training import EmaConfig, OptimConfig, ScheduleConfig, Trainer, TrainerConfig


class ToyData(torch.utils.data.Dataset):
    """A line with noise drawn by all three generators, as augmentation would."""

    def __init__(self, samples: int = 37, nan_at: int | None = None):
        self.samples, self.nan_at = samples, nan_at

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict:
        x = torch.linspace(-1, 1, 8) * (1 + index / self.samples) + 0.05 * torch.randn(8)
        x = x + 0.05 * float(np.random.randn()) + 0.05 * random.random()
        if index == self.nan_at:
            x[3] = float("nan")
        return {"x": x, "y": torch.tensor([index / self.samples]), "task": f"task {index % 2}"}


class ToyModel(nn.Module):
    """Dropout and noise draw from torch's generator; batch norm has buffers."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.inner = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width)
        self.outer = nn.Linear(width, 1)

    def forward(self, batch: dict) -> tuple[torch.Tensor, dict]:
        x = batch["x"] + 0.01 * torch.randn_like(batch["x"])
        h = nn.functional.dropout(torch.tanh(self.norm(self.inner(x))), 0.2, self.training)
        error = self.outer(h).float() - batch["y"]
        return (error**2).mean(), {"mae": error.detach().abs().mean(), "even": float(len(batch["task"]))}

    def save_pretrained(self, folder: Path) -> None:
        from safetensors.torch import save_file

        save_file(self.state_dict(), str(folder / "model.safetensors"))
        (folder / "config.yaml").write_text("policy: {type: toy}\n")
        (folder / "stats.json").write_text("{}")


def build(run_dir: str | Path, *, model: nn.Module | None = None, data=None, **options) -> Trainer:
    """A toy trainer; ``options`` are fields of TrainerConfig, sections, or arguments of Trainer."""
    fields = TrainerConfig.__dataclass_fields__
    train = {"steps": 30, "batch_size": 8, "checkpoint_every": 5, "log_every": 2, "tensorboard": False}
    train |= {k: options.pop(k) for k in list(options) if k in fields}
    sections = {
        "optim": OptimConfig(lr=1e-2, weight_decay=0.02),
        "schedule": ScheduleConfig(warmup=3, final_ratio=0.02),
        "ema": EmaConfig(decay=0.9, schedule="ratio"),
    }
    if model is None:
        torch.manual_seed(0)
        model = ToyModel()
    data = ToyData() if data is None else data
    return Trainer(TrainerConfig(**train), model, data, run_dir, **(sections | options))


class DieAtCall:
    """SIGKILL this process at its n-th file-system step below the run directory."""

    def __init__(self, count: int):
        self.left = count
        for name in ("rename", "replace", "symlink", "fsync", "mkdir", "unlink"):
            setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, function):
        def call(*arguments, **options):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call


def child(request: dict, started: int) -> None:
    torch.set_num_threads(1)
    options = request.get("options", {})
    if "largest_file" in request:
        limit = request["largest_file"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "kill_at_call" in request:
        DieAtCall(request["kill_at_call"])

    def on_step(step: int, values: dict) -> None:
        os.write(started, b".")
        if step == request.get("kill_at_step"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(request.get("sleep", 0))

    trained = build(request["run_dir"], on_step=on_step, **options).fit()
    print(f"RESUMED {trained.resumed_from}")


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        output = Path(request["run_dir"]).with_suffix(".output")
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            with open(output, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                try:
                    os.close(reading)
                    child(request, writing)
                    code = 0
                except BaseException as error:
                    print(f"{type(error).__name__}: {error}")
                sys.stdout.flush()
                os._exit(code)
        os.close(writing)
        if "kill_after" in request and os.read(reading, 1):
            time.sleep(request["kill_after"])
            os.kill(pid, request.get("signal", signal.SIGKILL))
        while os.read(reading, 4096):
            pass
        os.close(reading)
        _, status = os.waitpid(pid, 0)
        answer = {"killed": os.WIFSIGNALED(status), "code": os.waitstatus_to_exitcode(status)}
        print(json.dumps(answer | {"output": output.read_text()}), flush=True)


if __name__ == "__main__":
    import accelerate  # noqa: F401 (once, before the forks)
    import timm.optim
    import timm.scheduler
    import timm.utils  # noqa: F401

    print("ready", flush=True)
    serve()
