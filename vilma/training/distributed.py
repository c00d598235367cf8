"""One process, DDP or FSDP2: how a model lies on the processes, and whole tensors back out of shards.

Accelerate opens the processes, names the device and wraps DDP. FSDP2 is torch's own ``fully_shard``:
Accelerate's wrapping of it starts on accelerators only (gloo processes would silently train apart) and
exchanges the parameters under a finished optimiser, while here the optimiser is made of the shards.
"""

import contextlib
import copy
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from vilma.extras import require, require_timm

__all__ = [
    "agree",
    "broadcast",
    "distribute",
    "full",
    "full_tree",
    "local",
    "open_accelerator",
    "shard_optimizer_state",
    "sharding_blocks",
    "sync_batch_norms",
    "to_device",
    "unsynchronized",
]

# Layers with less than this share of a model are gathered with what contains them.
SMALLEST_BLOCK = 1e-3


def open_accelerator() -> Any:
    """Accelerate's view of the processes. Precision is our autocast: Accelerate would patch ``forward``.

    Raises:
        ValueError: the processes were launched for something that this trainer does not do.
    """
    accelerate = require("accelerate", "train")
    accelerator = accelerate.Accelerator(
        mixed_precision="no",
        # Unless told, it lets the processes of torchrun on a machine without accelerators train apart.
        cpu=not torch.accelerator.is_available(),
        # One copy of the gradients less.
        kwargs_handlers=[accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        advice = "; for FSDP launch plain processes and set train.sharding to fsdp2" if kind == "FSDP" else ""
        raise ValueError(
            f"Accelerate was launched as {kind}; this trainer runs one process or several (MULTI_GPU){advice}"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE is {launched}, but Accelerate joined {accelerator.num_processes}: the processes "
            "would train apart. Start them with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    return accelerator


def broadcast(values: Iterable[torch.Tensor], accelerator: Any) -> None:
    """Give the tensors of every process the first one's values."""
    if accelerator.num_processes == 1:
        return
    for value in values:
        sent = value.detach().to(accelerator.device, copy=True).contiguous()
        torch.distributed.broadcast(sent, src=0)
        value.copy_(sent)


def distribute(model: nn.Module, accelerator: Any) -> nn.Module:
    """A copy of ``model`` whose parameters are sharded over all processes (FSDP2); ``model`` stays as it is.

    Each module of `sharding_blocks` is gathered for its own forward and backward pass, the rest with the
    whole model. Buffers are not sharded: each process has its own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    sharded = copy.deepcopy(model)
    for block in sharding_blocks(sharded):
        fully_shard(block, mesh=mesh)
    return fully_shard(sharded, mesh=mesh)


def sharding_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that are gathered one at a time.

    A model may list them in a method ``sharding_blocks()``. Otherwise they are the outermost elements of its
    ModuleLists and Sequentials that hold at least a thousandth of its parameters: the blocks of a stack, the
    layers of a convolutional stage. They must be used by calling them: reading a weight of one from outside
    would find a shard.
    """
    if hasattr(model, "sharding_blocks"):
        return list(model.sharding_blocks())
    least = SMALLEST_BLOCK * sum(p.numel() for p in model.parameters())
    found: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        layers = isinstance(module, (nn.ModuleList, nn.Sequential))
        for child in module.children():
            container = isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict))
            size = sum(p.numel() for p in child.parameters())
            if layers and not container and size and size >= least:
                found.append(child)
            else:
                search(child)

    search(model)
    return found


def sync_batch_norms(model: nn.Module, accelerator: Any) -> tuple[nn.Module, str | None]:
    """``model`` with batch norms that share their statistics over all processes, and why if they cannot.

    Torch synchronises them on accelerators only; names and values of the state dict do not change.
    """
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if accelerator.num_processes == 1 or not norms:
        return model, None
    if accelerator.device.type == "cpu":
        return model, (
            f"the statistics of {norms} batch norms stay within each process: torch synchronises them on "
            "accelerators only"
        )
    require_timm()
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model), None


def unsynchronized(model: nn.Module) -> contextlib.AbstractContextManager:
    """Backward passes inside do not exchange gradients where DDP can put that off to a later one.

    Shards reduce theirs every time: to keep whole gradients would undo the sharding.
    """
    return model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext()


def agree(values: Mapping[str, float], accelerator: Any) -> dict[str, float]:
    """The means of ``values`` over all processes."""
    if accelerator.num_processes == 1:
        return dict(values)
    mine = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(mine, "mean").tolist()))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, which shares its memory."""
    return tensor.to_local() if _is_shard(tensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; of a shard on all processes at once."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor


def full_tree(tree: Any, keep: bool = True) -> Any:
    """Nested containers with whole tensors on the CPU in place of shards; all processes call it together.

    ``keep`` false drops each tensor once the others have its part.
    """
    if isinstance(tree, Mapping):
        return {key: full_tree(value, keep) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(full_tree(value, keep) for value in tree)
    if not _is_shard(tree):
        return tree
    whole = tree.full_tensor()
    return whole.cpu() if keep else None


def shard_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """An optimiser's whole state dict, cut like the parameters that ``optimizer`` holds."""
    from torch.distributed.tensor import distribute_tensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in state["param_groups"] for name in group["params"]]

    def cut(value: Any, parameter: torch.Tensor) -> Any:
        if not (torch.is_tensor(value) and _is_shard(parameter) and value.shape == parameter.shape):
            return value
        where = parameter.device_mesh, parameter.placements
        return distribute_tensor(value.to(parameter.device), *where, src_data_rank=None)

    cuts = {
        name: {key: cut(value, parameter) for key, value in state["state"][name].items()}
        for name, parameter in zip(names, parameters, strict=True)
        if name in state["state"]
    }
    return {**state, "state": cuts}


def to_device(batch: Any, device: torch.device) -> Any:
    if device.type == "cpu":
        return batch
    from accelerate.utils import send_to_device

    return send_to_device(batch, device, non_blocking=True)


def _is_shard(value: Any) -> bool:
    if not torch.distributed.is_available() or not isinstance(value, torch.Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
