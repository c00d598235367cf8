"""The moving average of a model's weights and buffers, whole or in the same shards as the model."""

import torch
from torch import nn

from .distributed import local

__all__ = ["check_untied", "update_average"]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average <- decay average + (1 - decay) model for floating values of the state dict; others are copied.

    It works on this process's parts: shards cost no communication.
    """
    mine, theirs = [], []
    for kept, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        kept, value = local(kept), local(value)
        if kept.is_floating_point():
            mine.append(kept)
            theirs.append(value)
        else:
            kept.copy_(value)
    torch._foreach_lerp_(mine, theirs, weight=1.0 - decay)


def check_untied(model: nn.Module) -> None:
    """Raise ValueError if two names of the state dict share memory: their average would count twice."""
    seen: dict[int, str] = {}
    for name, value in model.state_dict().items():
        twin = seen.setdefault(value.data_ptr(), name) if value.numel() else name
        if twin != name:
            raise ValueError(
                f"{twin} and {name} share memory, so the moving average would count them twice a step; untie "
                "them or set ema.enabled to false"
            )
