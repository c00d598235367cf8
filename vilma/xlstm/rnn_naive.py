"""The recurrent cells written as the papers write them: the twin that every faster form is tested against.

sLSTM (xLSTM, arXiv 2405.04517, equations 8 to 18), LSTM, GRU and Elman with head-wise recurrence (FlashRNN,
arXiv 2412.07752), one step after another, differentiated by autograd and exact in float64.

Shapes: B batch, T steps, H heads, D head size. wx (B, T, G, H, D) input projections, r (H, D, G, D) recurrent
weights, b (Gb, H, D) bias or None, every state (B, H, D). Everything has one dtype.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mlstm_naive import sequence_starts

MAX_LOG = 80.0  # of the forget factor, which passes 1 only where n is 0: finite in float32


class Cell(NamedTuple):
    """Gates of wx, r and b, in their order, and the states, in theirs."""

    wx: tuple[str, ...]
    r: tuple[str, ...]
    b: tuple[str, ...]
    states: tuple[str, ...]


_IFZO = ("i", "f", "z", "o")
CELLS = {
    "slstm": Cell(_IFZO, _IFZO, _IFZO, ("h", "c", "n", "m")),
    "lstm": Cell(_IFZO, _IFZO, _IFZO, ("h", "c")),
    "gru": Cell(("r", "z", "n"), ("g", "r", "z"), ("g", "r", "z", "n"), ("h",)),
    "elman": Cell(("g",), ("g",), ("g",), ("h",)),
}


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clamped element by element."""

    @staticmethod
    def forward(ctx, x, bound):
        ctx.bound = bound
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.bound, ctx.bound), None


def rnn_step_naive(
    wx: Tensor, r: Tensor, b: Tensor | None, state: Sequence[Tensor], cell: str, grad_clip: float | None
) -> tuple[Tensor, ...]:
    """One step: wx (B, G, H, D) -> the next state, whose first tensor is h.

    ``grad_clip`` clamps what of h's gradient comes through r.
    """
    h = state[0]
    read = h if grad_clip is None else _ClipGradient.apply(h, grad_clip)
    recurrent = torch.einsum("bhi,higo->bgho", read, r)
    if cell == "gru":
        g, rr, rz = recurrent.unbind(1)
        xr, xz, xn = wx.unbind(1)
        if b is not None:
            g, rr, rz, xn = g + b[0], rr + b[1], rz + b[2], xn + b[3]
        z = torch.sigmoid(xz + rz)
        return (z * h + (1 - z) * torch.tanh(xn + torch.sigmoid(xr + rr) * g),)
    gates = wx + recurrent if b is None else wx + recurrent + b
    if cell == "elman":
        return (torch.tanh(gates[:, 0]),)
    i, f, z, o = gates.unbind(1)
    z, o = torch.tanh(z), torch.sigmoid(o)
    c = state[1]
    if cell == "lstm":
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * z
        return o * torch.tanh(c), c
    n, m = state[2:]
    kept = F.logsigmoid(f) + m
    # exp(i - m) and exp(kept - m), one of which is 1: not from m, which is infinite where i is
    takes, d = (n == 0) | (i >= kept), i - kept
    m = torch.where(takes, i, kept)
    e = torch.exp(torch.where(takes, -d, d).clamp(max=MAX_LOG))
    f, i = torch.where(takes, e, 1.0), torch.where(takes, 1.0, e)
    c, n = f * c + i * z, (f * n + i).clamp(min=1.0)
    return o * c / n, c, n, m


def rnn_naive(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: Sequence[Tensor],
    reset: Tensor | None,
    cell: str,
    reverse: bool,
    grad_clip: float | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The recurrence, step by step; returns h (B, T, H, D) and the last state."""
    steps = wx.shape[1]
    inputs = wx.unbind(1)  # once: indexing wx[:, t] in the loop would make the backward quadratic in T
    starts = None if reset is None else sequence_starts(reset, reverse).unbind(1)
    outputs: list[Tensor | None] = [None] * steps
    for t in range(steps - 1, -1, -1) if reverse else range(steps):
        if starts is not None:
            state = tuple(torch.where(starts[t][:, None, None], 0.0, x) for x in state)
        state = rnn_step_naive(inputs[t], r, b, state, cell, grad_clip)
        outputs[t] = state[0]
    return torch.stack(outputs, 1), tuple(state)
