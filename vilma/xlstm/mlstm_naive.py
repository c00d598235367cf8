"""The mLSTM written as the papers write it: the twins that every faster form is tested against.

Two independent formulations, both differentiated by autograd and exact in float64:

* `mlstm_recurrent_naive`: one step after another (xLSTM, arXiv 2405.04517, equations 19 to 27);
* `mlstm_parallel_naive`: the whole sequence at once, through a T x T matrix of gate products.

Shapes: B batch, H heads, T steps, Dk and Dv head sizes. q, k (B, H, T, Dk); v, h (B, H, T, Dv); gate
pre-activations i, f (B, H, T); state c (B, H, Dk, Dv), n (B, H, Dk), m (B, H) or None for the sigmoid gate.
Arguments are taken as `vilma.xlstm.mlstm` has checked and completed them; everything has one dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor | None]


def mlstm_step_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State,
    gate: str,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, State]:
    """One step: q, k (B, H, Dk), v (B, H, Dv), i, f (B, H) -> h (B, H, Dv) and the next state."""
    c, n, m = state
    scale = q.shape[-1] ** -0.5
    log_f = F.logsigmoid(f)
    if gate == "exp":
        decayed = log_f + m
        m = torch.maximum(decayed, i)
        f_gate, i_gate = torch.exp(decayed - m), torch.exp(i - m)
        floor = torch.exp(-m)
    else:
        # not torch.sigmoid, whose derivative s (1 - s) is 1e-3 off at 30 even in float64
        f_gate, i_gate = torch.exp(log_f), torch.exp(F.logsigmoid(i))
        floor = torch.ones_like(i)
    i_key = i_gate[..., None] * k
    c = f_gate[..., None, None] * c + i_key[..., :, None] * v[..., None, :]
    n = f_gate[..., None] * n + i_key
    h = scale * torch.einsum("bhk,bhkv->bhv", q, c)
    if normalize:
        s = scale * (q * n).sum(-1)
        h = h / (torch.maximum(s.abs(), floor) + eps)[..., None]
    elif gate == "exp":
        h = h / floor[..., None]
    return h, (c, n, m)


def mlstm_recurrent_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State,
    reset: Tensor | None,
    gate: str,
    normalize: bool,
    reverse: bool,
    eps: float,
) -> tuple[Tensor, State]:
    """The recurrence, step by step; returns h and the last state."""
    steps = q.shape[2]
    order = range(steps - 1, -1, -1) if reverse else range(steps)
    # unbind once: indexing x[:, :, t] in the loop would make the backward quadratic in T
    sequences = [x.unbind(2) for x in (q, k, v, i, f)]
    starts = None if reset is None else sequence_starts(reset, reverse).unbind(1)
    outputs: list[Tensor | None] = [None] * steps
    for t in order:
        if starts is not None:
            state = tuple(x if x is None else _zero_rows(x, starts[t]) for x in state)
        outputs[t], state = mlstm_step_naive(*(x[t] for x in sequences), state, gate, normalize, eps)
    return torch.stack(outputs, 2), state


def mlstm_parallel_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State,
    reset: Tensor | None,
    gate: str,
    normalize: bool,
    reverse: bool,
    eps: float,
) -> tuple[Tensor, State]:
    """The whole sequence through its T x T matrix (xLSTM appendix, parallel form), initial state included."""
    if reverse:
        reset = None if reset is None else sequence_starts(reset, True).flip(1)
        q, k, v, i, f = (x.flip(2) for x in (q, k, v, i, f))
    c0, n0, m0 = state
    steps, scale = q.shape[2], q.shape[-1] ** -0.5
    log_f = F.logsigmoid(f)
    if reset is None:
        segment = torch.zeros(1, 1, steps, dtype=torch.long, device=q.device)
    else:
        segment = reset.long().cumsum(1)[:, None]
    causal = torch.ones(steps, steps, dtype=torch.bool, device=q.device).tril()
    visible = causal & (segment[..., :, None] == segment[..., None, :])
    carried = segment == 0
    minus_inf = torch.full((), float("-inf"), dtype=q.dtype, device=q.device)

    # b_t: sum of log f from the start of t's own sequence to t; log D_ts = b_t - b_s + log i_s
    b = torch.where(visible, log_f[..., None, :], 0.0).sum(-1)
    log_i = i if gate == "exp" else F.logsigmoid(i)
    log_d = torch.where(visible, b[..., :, None] - b[..., None, :] + log_i[..., None, :], minus_inf)
    if gate == "exp":
        log_start = b + torch.where(carried, m0[..., None], 0.0)
        m = torch.maximum(log_d.amax(-1), log_start)
        floor = torch.exp(-m)
    else:
        log_start, m, floor = b, torch.zeros_like(b), torch.ones_like(b)
    d = torch.exp(log_d - m[..., None])
    start = torch.where(carried, torch.exp(log_start - m), 0.0)

    p = scale * (q @ k.transpose(-1, -2)) * d
    h = p @ v + scale * start[..., None] * (q @ c0)
    if normalize:
        s = p.sum(-1) + scale * start * (q * n0[:, :, None]).sum(-1)
        h = h / (torch.maximum(s.abs(), floor) + eps)[..., None]
    elif gate == "exp":
        h = h / floor[..., None]

    key = d[:, :, -1, :, None] * k
    c = start[:, :, -1, None, None] * c0 + key.transpose(-1, -2) @ v
    n = start[:, :, -1, None] * n0 + key.sum(2)
    return h.flip(2) if reverse else h, (c, n, m[..., -1] if gate == "exp" else None)


def sequence_starts(reset: Tensor, reverse: bool) -> Tensor:
    """Where the state is zeroed before step t, (B, T) bool, for the order in which the steps are run.

    ``reset[t]`` says that a sequence begins at t. Run from the end, the sequence before it starts at t - 1.
    """
    if not reverse:
        return reset
    return torch.cat((reset[:, 1:], torch.zeros_like(reset[:, :1])), 1)


def _zero_rows(x: Tensor, rows: Tensor) -> Tensor:
    return torch.where(
        rows.view(-1, *(1,) * (x.dim() - 1)), torch.zeros((), dtype=x.dtype, device=x.device), x
    )
