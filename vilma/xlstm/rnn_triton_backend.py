"""The `triton` backend of the recurrent cells as `vilma.xlstm.rnn_operators` calls one."""

import torch
from torch import Tensor

from . import mlstm_triton, rnn_triton
from .rnn_torch import Form, Grads

step = rnn_triton.step


def why_not_on(device: torch.device) -> str:
    """Why the kernels cannot run on this device; empty where they can."""
    return mlstm_triton.available(device)[1]


def why_not(wx: Tensor) -> str:
    """Why the kernels cannot take these tensors; empty where they can."""
    return rnn_triton.supports(wx)[1]


def saved_shapes(wx: Tensor, form: Form) -> tuple[None, ...]:
    """Nothing is kept but h: the backward makes the gates and states again."""
    return (None,) * 4


def forward(wx, r, b, state, starts, form: Form, return_state: bool, save: bool) -> tuple:
    """As `vilma.xlstm.rnn_torch.forward`."""
    h, last = rnn_triton.forward(wx, r, b, state, starts, form, return_state)
    return h, last, (None,) * 4


def backward(grads, wx, r, b, state, starts, h, last, saved, form: Form) -> Grads:
    """As `vilma.xlstm.rnn_torch.backward`."""
    return rnn_triton.backward(grads, wx, r, b, state, starts, h, last, form)
