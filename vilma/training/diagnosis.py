"""Why a loss or gradient is not finite: which inputs, gradients and weights to look at."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .distributed import full

__all__ = ["NonFiniteError", "describe_idle", "describe_nonfinite", "nonfinite_leaves"]


class NonFiniteError(ValueError):
    """Training stopped before an update that would have spoilt the weights."""


def nonfinite_leaves(tree: Any, name: str = "") -> Iterator[str]:
    """``name: n of N`` for each floating-point tensor in a nested batch that holds NaN or infinity."""
    if isinstance(tree, torch.Tensor):
        if tree.is_floating_point():
            bad = int((~torch.isfinite(tree)).sum())
            if bad:
                yield f"{name or 'batch'}: {bad} of {tree.numel()}"
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from nonfinite_leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        for i, value in enumerate(tree):
            yield from nonfinite_leaves(value, f"{name}[{i}]")


def describe_nonfinite(batch: Any, model: nn.Module) -> str:
    """Lines that name the non-finite inputs, gradients and weights; call it before gradients are cleared.

    With shards all processes call it together; the inputs are those of this process.
    """
    parameters = list(model.named_parameters())
    groups = {
        "inputs": list(nonfinite_leaves(batch)),
        "gradients": [n for n, p in parameters if p.grad is not None and not _finite(p.grad)],
        "weights": [n for n, p in parameters if not _finite(p)],
    }
    totals = {"gradients": f" of {len(parameters)}", "weights": f" of {len(parameters)}"}
    lines = []
    for kind, names in groups.items():
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        counted = f" ({len(names)}{totals.get(kind, '')})" if names else ""
        lines.append(f"  non-finite {kind}{counted}: {shown or 'none'}")
    return "\n".join(lines)


def describe_idle(model: nn.Module) -> str | None:
    """Which trainable parameters the loss did not reach, after a backward pass; none where it reached all."""
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if not idle:
        return None
    shown = ", ".join(idle[:5]) + (", ..." if len(idle) > 5 else "")
    return f"warning: the loss does not reach {len(idle)} trainable parameters: {shown}"


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(full(tensor.detach())).all())
