"""What a run will take, told before it begins: samples, schedule, memory and disk. Nothing is trained."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .distributed import sharding_blocks
from .optim import OptimConfig, build_optimizer
from .schedule import EmaConfig, Schedule, ScheduleConfig
from .trainer import TrainerConfig

__all__ = ["backward_memory", "describe_plan"]

_FP32 = 4
_SHOWN = (0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1)


def describe_plan(
    model: nn.Module,
    config: TrainerConfig,
    optim: OptimConfig,
    schedule: ScheduleConfig,
    ema: EmaConfig,
    processes: int = 1,
    saved: tuple[float, float] | None = None,
) -> list[str]:
    """Lines that tell what training ``model`` on so many processes takes.

    Args:
        saved: what is kept for the backward pass (`backward_memory`), where known.

    Raises:
        ValueError: the batch does not divide, or schedule and optimiser do not fit the run.
    """
    share, rest = divmod(config.batch_size, processes * config.accumulate)
    if rest:
        raise ValueError(
            f"train.batch_size is {config.batch_size}, which {processes} processes x {config.accumulate} "
            "accumulated micro-batches do not divide"
        )
    groups = build_optimizer(optim, model).param_groups
    decayed = sum(p.numel() for group in groups if group["weight_decay"] for p in group["params"])
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [
        f"parameters: {total:,}, of which {trainable:,} are trained, {decayed:,} with weight decay",
        f"an update: {config.batch_size} samples = {processes} processes x {config.accumulate} micro-batches "
        f"x {share}; {config.steps:,} updates = {config.steps * config.batch_size:,} samples",
        "learning rate: "
        + ", ".join(f"{lr:.3g} at {step:,}" for step, lr in _rates(schedule, optim, config)),
    ]
    shards = config.sharding == "fsdp2" and processes > 1
    state = _state_of_a_weight(optim)
    pieces = {
        "weights": _FP32 * total,
        "gradients": _FP32 * trainable,
        f"state of {optim.name}": state * trainable,
        "average": _FP32 * total * ema.enabled,
    }
    kept = {name: size / (processes if shards else 1) for name, size in pieces.items()}
    if shards:
        sizes = sorted(sum(p.numel() for p in block.parameters()) for block in sharding_blocks(model))
        # The rest of the model stays gathered through a pass; a block is fetched while another one computes.
        kept["gathered weights"] = _FP32 * (total - sum(sizes) + sum(sizes[-2:]))
    if saved is not None:
        kept[f"kept for the backward pass of {share} samples in {config.precision}"] = (
            saved[0] + saved[1] * share
        )
    told = ", ".join(f"{name} {_gib(size)}" for name, size in kept.items() if size)
    lines.append(f"memory of a process: {_gib(sum(kept.values()))} = {told}; temporary tensors come besides")
    disk = sum(size for name, size in pieces.items() if name != "gradients") + _FP32 * total
    lines.append(
        f"disk: {_gib(disk)} a checkpoint, {config.keep} to {config.keep + 1} kept and one being written"
    )
    return lines


def backward_memory(
    model: nn.Module,
    batch: Callable[[int], Mapping[str, Any]],
    precision: str = "fp32",
    compute: bool = True,
) -> tuple[float, float]:
    """Bytes that ``model`` keeps for its backward pass: whatever the batch, and for each sample.

    Measured with ``batch(2)`` and ``batch(4)``. Parameters and buffers are not counted, but copies of them in
    another precision are. One backward pass runs too, in fp32, so that gradients are there to be looked at.
    ``compute`` false leaves out the numbers (seconds for any size): for a model that never reads a value.
    """
    with contextlib.ExitStack() as stack:
        if not compute:
            from torch._subclasses import FakeTensorMode

            mode = FakeTensorMode()
            model = _faked(model, mode)
            stack.enter_context(mode)
        two, four = (_kept(model, batch(samples), precision) for samples in (2, 4))
        if compute:  # bf16 is slow on processors that lack it, and forward passes are enough above
            model.train()(batch(2))[0].backward()
    each = (four - two) / 2
    return max(two - 2 * each, 0.0), each


def _faked(model: nn.Module, mode: Any) -> nn.Module:
    """A copy of ``model`` with the shapes and types of its tensors, and none of their values."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = mode.from_tensor(parameter.detach())
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
    return model


def _kept(model: nn.Module, batch: Mapping[str, Any], precision: str) -> int:
    """Bytes of the storages that autograd saves in one forward pass."""
    # Not data_ptr: a storage without values has none.
    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    held = []  # so that no address is used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in sizes:
            sizes[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    device = next(model.parameters()).device.type
    bf16 = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), bf16:
        model.train()(batch)
    return sum(sizes.values())


def _rates(
    schedule: ScheduleConfig, optim: OptimConfig, config: TrainerConfig
) -> Iterator[tuple[int, float]]:
    blank = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    made = Schedule(schedule, blank, config.steps)
    before = None
    for step in sorted({round(share * (config.steps - 1)) for share in _SHOWN}):
        rate = made.set(step)
        if rate != before or step == config.steps - 1:
            yield step, rate
        before = rate


def _state_of_a_weight(optim: OptimConfig) -> float:
    """Bytes of optimiser state for each weight of a matrix, as it really is after an update."""
    probe = nn.Linear(64, 64, bias=False)
    optimizer = build_optimizer(optim, probe)
    probe.weight.grad = torch.ones_like(probe.weight)
    optimizer.step()
    tensors = [v for v in optimizer.state[probe.weight].values() if torch.is_tensor(v) and v.numel() > 1]
    return sum(v.numel() * v.element_size() for v in tensors) / probe.weight.numel()


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"
