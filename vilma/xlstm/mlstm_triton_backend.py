"""The `triton` backend of the mLSTM as `vilma.xlstm.operators` calls one; triton is imported when it runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import mlstm_triton
from .mlstm_chunkwise import Form
from .mlstm_triton_launch import rowwise

SAVES_H = True


def why_not_on(device: torch.device) -> str:
    """Why the kernels cannot run on this device; empty where they can."""
    return mlstm_triton.available(device)[1]


def why_not(q: Tensor, v: Tensor, i: Tensor) -> str:
    """Why the kernels cannot take these tensors; empty where they can."""
    if i.dtype != torch.float32:
        return f"the Triton kernels compute in float32; gates of {i.dtype} need backend='torch'"
    return mlstm_triton.supports(q, v)[1]


def saved_shapes(q: Tensor, v: Tensor, starts: Tensor | None, form: Form) -> tuple[tuple | None, ...]:
    """Shapes of what `forward` keeps: rows and marks, two numbers a step and chunk."""
    return *mlstm_triton.saved_shapes(q, v, form.chunk_size, starts is not None), None, None


def forward(q, k, v, i, f, state, starts, form: Form, return_state: bool, save: bool) -> tuple:
    """As `vilma.xlstm.mlstm_chunkwise.forward`."""
    options = {**_options(form), "return_state": return_state}
    h, last, kept = mlstm_triton.forward(q, k, v, i, f, state, starts, **options)
    return h, last, (kept.rows, kept.marks, None, None) if save else (None,) * 4


def backward(grads, q, k, v, i, f, state, starts, h, last, saved, form: Form) -> tuple[Tensor | None, ...]:
    """As `vilma.xlstm.mlstm_chunkwise.backward`."""
    q, k, v = (rowwise(x) for x in (q, k, v))
    state = (None if x is None else x.contiguous() for x in state)
    kept = mlstm_triton.Saved(q, k, v, i, f, *state, h, last[0], last[1], *saved[:2])
    return tuple(mlstm_triton.backward(kept, grads[0], tuple(grads[1:]), **_options(form)))


def step(q, k, v, i, f, state: Sequence[Tensor | None], form: Form) -> tuple[Tensor, tuple]:
    """As `vilma.xlstm.mlstm_chunkwise.step`."""
    gate = "exp" if form.exponential else "sigmoid"
    return mlstm_triton.step(q, k, v, i, f, state, gate=gate, normalize=form.normalize, eps=form.eps)


def _options(form: Form) -> dict:
    options = form._asdict()
    return options | {"gate": "exp" if options.pop("exponential") else "sigmoid"}
