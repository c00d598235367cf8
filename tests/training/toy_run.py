"""A tiny training that uses every kind of state; as a script, a server that runs it in killable processes.

Each line on standard input is a JSON request, answered by one JSON line; a forked child does the training.
``kill_after`` SIGKILLs it so many seconds after its first update; ``kill_at_step`` within that update;
``kill_at_call`` at its n-th file-system step (a rename, link, sync or remove), which reaches every moment of
writing a checkpoint. ``world`` processes of it train together (gloo on the CPU).
"""

import json
import os
import random
import resource
import signal
import sys
import time
from datetime import timedelta
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


class SampledModel(nn.Module):
    """Draws noise and drops layers by the seed of each sample; widths that two processes do not divide."""

    def __init__(self, width: int = 7):
        super().__init__()
        self.inner = nn.Linear(8, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.outer = nn.Linear(width, 1)

    def forward(self, batch: dict) -> tuple[torch.Tensor, dict]:
        generators = [torch.Generator().manual_seed(int(seed)) for seed in batch["seed"]]
        noise = torch.stack([torch.randn(8, generator=g) for g in generators])
        kept = torch.stack([torch.rand(len(self.blocks), generator=g) for g in generators]) < 0.8
        x = self.inner(batch["x"] + 0.1 * noise)
        for block, keep in zip(self.blocks, kept.unbind(1)):
            x = x + keep[:, None] * block(x)
        error = self.scale * self.outer(x + self.frozen(x)).float() - batch["y"]
        return (error**2).mean(), {"mae": error.detach().abs().mean()}

    def save_pretrained(self, folder: Path) -> None:
        ToyModel.save_pretrained(self, folder)


MODELS = {"toy": ToyModel, "sampled": SampledModel}


def build(run_dir: str | Path, *, model: nn.Module | str | None = None, data=None, **options) -> Trainer:
    """A toy trainer; ``options`` are fields of TrainerConfig, sections, or arguments of Trainer."""
    fields = TrainerConfig.__dataclass_fields__
    train = {"steps": 30, "batch_size": 8, "checkpoint_every": 5, "log_every": 2, "tensorboard": False}
    train |= {k: options.pop(k) for k in list(options) if k in fields}
    sections = {
        "optim": OptimConfig(lr=1e-2, weight_decay=0.02),
        "schedule": ScheduleConfig(warmup=3, final_ratio=0.02),
        "ema": EmaConfig(decay=0.9, schedule="ratio"),
    }
    if not isinstance(model, nn.Module):
        torch.manual_seed(int(os.environ.get("RANK", 0)))  # the first process's weights count
        model = MODELS[model or "toy"]()
    data = ToyData(nan_at=options.pop("nan_at", None)) if data is None else data
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

    sections = {"optim": OptimConfig, "schedule": ScheduleConfig, "ema": EmaConfig}
    options = {k: sections[k](**v) if k in sections else v for k, v in options.items()}
    trainer = build(request["run_dir"], on_step=on_step, **options)
    if request.get("scored"):
        trainer.score = distance
    trained = trainer.fit()
    print(f"RESUMED {trained.resumed_from}")
    if trained.resumed_from == trained.step:
        return
    state = torch.load(trained.checkpoint / "trainer.pt", weights_only=True)
    for name, model in (("model", trainer.model), ("ema", trainer.final_model)):
        assert all(torch.equal(v, state[name][k]) for k, v in model.named_parameters()), name


def distance(model: nn.Module, step: int) -> float:
    """A score that calls the model: the loss of a fixed batch, and best at step 10."""
    assert not model.training
    with torch.no_grad():
        loss, _ = model({"x": torch.ones(4, 8), "y": torch.zeros(4, 1), "seed": torch.arange(4)})
    print(f"SCORE {step} {loss:.4f}")
    return float(loss) - abs(step - 10)


def join(rank: int, world: int, meeting: str) -> None:
    """Make this process one of several, which meet at a file: a free port may be taken when it is used."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in places.items()}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )


def start(request: dict, rank: int, output: Path, started: int) -> int:
    """Fork a process that trains; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            if request.get("world", 1) > 1:
                join(rank, request["world"], f"{output.parent}/meeting-{os.getppid()}-{request['number']}")
            child(request, started)
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(code)


def serve() -> None:
    for number, line in enumerate(sys.stdin):
        request = json.loads(line) | {"number": number}
        path = Path(request["run_dir"])
        outputs = [path.with_suffix(f".output{rank}") for rank in range(request.get("world", 1))]
        reading, writing = os.pipe()
        pids = [start(request, rank, output, writing) for rank, output in enumerate(outputs)]
        os.close(writing)
        if "kill_after" in request and os.read(reading, 1):
            time.sleep(request["kill_after"])
            os.kill(pids[-1], request.get("signal", signal.SIGKILL))
        while os.read(reading, 4096):
            pass
        os.close(reading)
        ended = [os.waitpid(pid, 0)[1] for pid in pids]
        answer = {
            "killed": any(os.WIFSIGNALED(status) for status in ended),
            "code": max(map(os.waitstatus_to_exitcode, ended), key=abs),
            "output": outputs[0].read_text(),
            "outputs": [output.read_text() for output in outputs],
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    import accelerate  # noqa: F401 (once, before the forks)
    import timm.optim
    import timm.scheduler
    import timm.utils  # noqa: F401

    print("ready", flush=True)
    serve()
