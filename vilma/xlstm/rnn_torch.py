"""The `torch` backend of the recurrent cells: one loop of in-place operations, and a hand-written backward.

What a backend is. `vilma.xlstm.rnn_operators` calls a module with the functions of this one::

    forward(wx, r, b, state, starts, form, return_state, save) -> h, last, saved
    backward(grads, wx, r, b, state, starts, h, last, saved, form) -> dwx, dr, db, dstate
    step(wx, r, b, state, form) -> h, next state
    saved_shapes(wx, form) -> four of (shape, dtype) or None

* wx (B, T, G, H, D) of any strides; r (H, D, G, D) and b (Gb, H, D) or None, float tensors of any dtype. The
  gates of each and their order are in `rnn_naive.CELLS`.
* state: the states (B, H, D) before the first step in the accumulation dtype (float64 where wx is, else
  float32), or as many None for zeros. last: the same after the last step that is run, Nones unless asked for.
* starts: (B, T) bool or None, where the state is zeroed before step t, for the direction that is run.
* h (B, T, H, D) in wx's dtype, contiguous. saved: at most four tensors of the backend's choice, linear in T,
  of the shapes and dtypes that `saved_shapes` tells; (None,) * 4 when save is False.
* grads: of h and of each last state, None where there is none. dwx is laid out as `dense_like(wx)`, dr and db
  have the dtypes of r and b, dstate those of the state (as many None where that was None).

The backward is linear in T, and the gradient is that of the equations, the last state included. Two points of
the sLSTM: m is a choice of unit for c and n, on which h does not depend, so its gradient at fixed c exp(m)
and n exp(m), called mu, is zero unless the loss reads the last state; it goes to the argument of
m' = max(i, log f + m) that attains the maximum. max(F n + I, 1) passes the gradient at equality, where exact
arithmetic always is when n is 0, and stops it below 1, which needs a given n between 0 and 1.

Shapes: B batch, T steps, H heads, D head size, G gates of wx, S gates of b (GRU: one more than G).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mlstm_chunkwise import dense_like, no_autocast
from .rnn_naive import CELLS, MAX_LOG, rnn_step_naive

_BLOCK = 8  # steps whose intermediate results stay in the cache
Grads = tuple[Tensor, Tensor, Tensor | None, tuple[Tensor | None, ...]]


class Form(NamedTuple):
    """Which recurrence is run. grad_clip clamps the gradient that reaches h_{t-1} through r at each step."""

    cell: str
    reverse: bool
    grad_clip: float | None


def accumulation_dtype(wx: Tensor) -> torch.dtype:
    """The dtype of states and sums."""
    return torch.float64 if wx.dtype == torch.float64 else torch.float32


def saved_shapes(wx: Tensor, form: Form) -> tuple[tuple[tuple, torch.dtype] | None, ...]:
    """Gates (T, H, B, S, D), activated but for sLSTM's i and f, and the states beside h (T, N, H, B, D)."""
    batch, steps, _, heads, dim = wx.shape
    cell, acc = CELLS[form.cell], accumulation_dtype(wx)
    gates = (steps, heads, batch, len(cell.b), dim), acc
    others = len(cell.states) - 1
    return gates, ((steps, others, heads, batch, dim), acc) if others else None, None, None


def forward(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    form: Form,
    return_state: bool,
    save: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """h (B, T, H, D), the last state, and what the backward needs."""
    with no_autocast(wx):
        return _forward(wx, r, b, state, starts, form, return_state, save)


def backward(
    grads: Sequence[Tensor | None],
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    h: Tensor,
    last: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    form: Form,
) -> Grads:
    """Gradients of wx, r, b and of the initial state."""
    with no_autocast(wx):
        return _backward(grads, wx, r, b, state, starts, h, last, saved, form)


def step(
    wx: Tensor, r: Tensor, b: Tensor | None, state: Sequence[Tensor | None], form: Form
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step: wx (B, G, H, D) -> h in its dtype and the next state."""
    acc = accumulation_dtype(wx)
    if state[0] is None:
        zero = wx.new_zeros(wx.shape[0], *wx.shape[2:], dtype=acc)
        state = (zero,) * len(CELLS[form.cell].states)
    with no_autocast(wx):
        state = rnn_step_naive(
            wx.to(acc), r.to(acc), None if b is None else b.to(acc), state, form.cell, None
        )
    # a state is nobody's h: neither may change with the other
    return state[0].to(wx.dtype, copy=True), state


def _forward(wx, r, b, state, starts, form: Form, return_state: bool, save: bool):
    batch, steps, _, heads, dim = wx.shape
    cell, acc = CELLS[form.cell], accumulation_dtype(wx)
    saved = [
        wx.new_empty(shape[0], dtype=acc) if save and shape else None for shape in saved_shapes(wx, form)
    ]
    gates, others = saved[:2]
    if not save:  # two places for the states, used in turn
        others = wx.new_empty(2, len(cell.states) - 1, heads, batch, dim, dtype=acc)
    others_at = [] if others is None else [others[:, j].unbind(0) for j in range(others.shape[1])]
    work = wx.new_empty(min(steps, _BLOCK), heads, batch, len(cell.b), dim, dtype=acc)
    h_work = work.new_empty(*work.shape[:3], dim)
    h = wx.new_empty(batch, steps, heads, dim)
    weight = r.to(acc).flatten(2)
    bias = None if b is None else b.to(acc).transpose(0, 1)[:, None]
    zeroed = _zeroed(starts)
    current = _by_head(state, (heads, batch, dim), wx, acc, form)
    run = _FORWARD[form.cell]
    fresh = True  # whether n may be below 1
    for lo, hi in _spans(steps, form):
        block = gates[lo:hi] if save else work[: hi - lo]
        # the gates of wx are the last of b's, those of r the first
        block[:, :, :, -len(cell.wx) :] = wx[:, lo:hi].permute(1, 3, 0, 2, 4)
        block[:, :, :, : -len(cell.wx)] = 0.0
        if bias is not None:
            block += bias
        if form.cell == "slstm":
            block[:, :, :, 0].clamp_(*_finite(acc))
        read_at = block[:, :, :, : len(cell.r)].flatten(3).unbind(0)
        by_gate = [x.unbind(0) for x in block.unbind(3)]
        h_at = h_work.unbind(0)
        for t in range(hi - 1, lo - 1, -1) if form.reverse else range(lo, hi):
            if zeroed is not None:
                current = [x.masked_fill(zeroed[t], 0.0) for x in current]
            read_at[t - lo].baddbmm_(current[0], weight)
            into = [x[t % len(x)] for x in others_at]
            gates_t = [x[t - lo] for x in by_gate]
            run(gates_t, current, h_at[t - lo], into, fresh or zeroed is not None)
            current = [h_at[t - lo], *into]
            fresh = False
        h[:, lo:hi] = h_work[: hi - lo].permute(2, 0, 1, 3)
    last = (None,) * len(cell.states)
    if return_state:
        last = tuple(x.transpose(0, 1).clone(memory_format=torch.contiguous_format) for x in current)
    return h, last, tuple(saved)


def _slstm_forward(gates, state, h, into, may_be_empty: bool) -> None:
    i, f, z, o = gates
    _, c, n, m = state
    c_next, n_next, m_next = into
    z.tanh_(), o.sigmoid_()
    kept = F.logsigmoid(f).add_(m)
    if may_be_empty:
        m_next.copy_(torch.where((n == 0) | (i >= kept), i, kept))
        kept.sub_(m_next).clamp_(max=MAX_LOG)
    else:
        torch.maximum(i, kept, out=m_next)
        kept.sub_(m_next)
    f_gate, i_gate = kept.exp_(), (i - m_next).exp_()
    torch.mul(f_gate, c, out=c_next).addcmul_(i_gate, z)
    torch.addcmul(i_gate, f_gate, n, out=n_next)
    if may_be_empty:
        n_next.clamp_(min=1.0)
    torch.mul(o, c_next, out=h).div_(n_next)


def _lstm_forward(gates, state, h, into, _) -> None:
    i, f, z, o = gates
    i.sigmoid_(), f.sigmoid_(), z.tanh_(), o.sigmoid_()
    torch.mul(f, state[1], out=into[0]).addcmul_(i, z)
    torch.tanh(into[0], out=h).mul_(o)


def _gru_forward(gates, state, h, *_) -> None:
    g, r, z, n = gates
    r.sigmoid_(), z.sigmoid_(), n.addcmul_(r, g).tanh_()
    torch.lerp(n, state[0], z, out=h)


def _elman_forward(gates, _, h, *__) -> None:
    torch.tanh(gates[0], out=h)
    gates[0].copy_(h)


_FORWARD = {"slstm": _slstm_forward, "lstm": _lstm_forward, "gru": _gru_forward, "elman": _elman_forward}


def _backward(grads, wx, r, b, state, starts, h, last, saved, form: Form) -> Grads:
    batch, steps, _, heads, dim = wx.shape
    cell, acc = CELLS[form.cell], accumulation_dtype(wx)
    shape = (heads, batch, dim)
    gates, others = saved[0], saved[1]
    kept = [h.to(acc).permute(1, 2, 0, 3), *([] if others is None else others.unbind(1))]
    initial, zeroed = _by_head(state, shape, wx, acc, form), _zeroed(starts)
    dh = None if grads[0] is None else grads[0].permute(1, 2, 0, 3)
    # what the step at hand receives: through r, beside it, of c and n, and of m at fixed c exp(m), n exp(m)
    through = wx.new_zeros(shape, dtype=acc) if grads[1] is None else grads[1].to(acc).transpose(0, 1)
    direct = None
    carry = wx.new_zeros(len(grads[2:4]), *shape, dtype=acc)
    for x, dx in zip(carry, grads[2:4]):
        if dx is not None:
            x.copy_(dx.transpose(0, 1))
    mu = None
    if form.cell == "slstm" and (state[0] is not None or any(x is not None for x in grads[2:])):
        mu = wx.new_zeros(shape, dtype=acc) if grads[4] is None else grads[4].to(acc).transpose(0, 1).clone()
        if last[0] is not None:
            for x, dx in zip(last[1:3], carry):
                mu.addcmul_(x.transpose(0, 1), dx, value=-1.0)

    work = wx.new_empty(heads, min(steps, _BLOCK), batch, len(cell.b), dim, dtype=acc)
    dwx, dr = dense_like(wx), wx.new_zeros(heads, dim, len(cell.r) * dim, dtype=acc)
    db = None if b is None else wx.new_zeros(heads, len(cell.b), dim, dtype=acc)
    back = r.to(acc).flatten(2).mT.contiguous()
    run, parts = _BACKWARD[form.cell], _PARTS[form.cell]
    for lo, hi in reversed(_spans(steps, form)):
        rows = slice(lo, hi)
        before = [_before(x, x0, rows, zeroed, form) for x, x0 in zip(kept, initial)]
        local = _LOCAL[form.cell](gates[rows].unbind(3), [x[rows] for x in kept[1:]], before, mu is not None)
        dh_at = work.new_zeros(hi - lo, *shape)
        if dh is not None:
            dh_at.copy_(dh[rows])
        block = work[:, : hi - lo].transpose(0, 1)
        read = block[:, :, :, : len(cell.r)]
        into = [block[:, :, :, part] for part in parts]
        at_step = zip(dh_at.unbind(0), read.flatten(3).unbind(0), *(x.unbind(0) for x in (*into, *local)))
        at_step = list(at_step)
        for t in range(lo, hi) if form.reverse else range(hi - 1, lo - 1, -1):
            dh_, read_, *given = at_step[t - lo]
            dh_ += through
            if direct is not None:
                dh_ += direct
            direct = run(dh_, carry, mu, *given)
            through = torch.bmm(read_, back)
            if form.grad_clip is not None:
                through.clamp_(-form.grad_clip, form.grad_clip)
            if zeroed is not None:  # mu is zero there already: i is m where n is 0
                for x in (through, direct, carry):
                    if x is not None:
                        x.masked_fill_(zeroed[t], 0.0)
        dwx[:, rows] = block[:, :, :, -len(cell.wx) :].permute(2, 0, 3, 1, 4)
        by_head = work[:, : hi - lo].flatten(1, 2)
        h_before = before[0].transpose(0, 1).reshape(heads, -1, dim)
        dr.baddbmm_(h_before.mT, by_head[:, :, : len(cell.r)].flatten(2))
        if db is not None:
            db += by_head.sum(1)

    dr = dr.view(r.shape).to(r.dtype)
    db = None if db is None else db.transpose(0, 1).contiguous().to(b.dtype)
    if state[0] is None:
        return dwx, dr, db, (None,) * len(state)
    dstate = [through if direct is None else through + direct, *carry]
    if mu is not None:
        dstate.append(mu.addcmul(initial[1], carry[0]).addcmul_(initial[2], carry[1]))
    return dwx, dr, db, tuple(x.transpose(0, 1).contiguous() for x in dstate)


# What follows takes (T, H, B, ...) or, one step of it, (H, B, ...). `_LOCAL` makes what does not wait for a
# gradient, for a block of steps at once; gates of `_PARTS` are what its backward writes.
_PARTS = {
    "slstm": (slice(0, 3), slice(0, 2), 0, 1, 3),
    "lstm": (slice(0, 3), 3),
    "gru": (0, 1, 2, 3),
    "elman": (0,),
}


def _slstm_local(gates, others, before, with_mu: bool) -> list[Tensor]:
    i, f, z, o = gates
    c, n, m = others
    _, c_prev, n_prev, m_prev = before
    kept = F.logsigmoid(f).add_(m_prev)
    takes_i = (n_prev == 0) | (i >= kept) if with_mu else None
    f_gate, i_gate = kept.sub_(m).clamp_(max=MAX_LOG).exp_(), (i - m).exp_()
    of_f = torch.sigmoid(-f)
    to_f, ratio = f_gate * of_f, c / n
    to_carry = z.new_empty(len(z), 2, *z.shape[1:])
    to_c, to_n = to_carry.unbind(1)
    torch.div(o, n, out=to_c)
    torch.mul(to_c, ratio, out=to_n).neg_()
    to_o = ratio.mul_(o).mul_(1.0 - o)
    from_c = z.new_empty(*z.shape[:3], 3, z.shape[3])
    from_n = z.new_empty(*z.shape[:3], 2, z.shape[3])
    for x, y, into in (
        (i_gate, z, from_c[:, :, :, 0]),
        (to_f, c_prev, from_c[:, :, :, 1]),
        (i_gate, 1.0 - z * z, from_c[:, :, :, 2]),
        (to_f, n_prev, from_n[:, :, :, 1]),
    ):
        torch.mul(x, y, out=into)
    from_n[:, :, :, 0] = i_gate
    local = [to_carry, to_o, from_c, from_n, f_gate]
    if with_mu:
        # below 1 only where a given n between 0 and 1 is
        local += [takes_i, of_f, torch.addcmul(i_gate, f_gate, n_prev) < 1.0]
    return local


def _slstm_backward(
    dh, carry, mu, difz, dif, di, df, do, to_carry, to_o, from_c, from_n, f_gate, *of_m
) -> None:
    carry.addcmul_(dh, to_carry)
    dc, dn = carry
    if mu is not None:
        takes_i, of_f, below = of_m
        mu += torch.where(below, dn, 0.0)
        dn.masked_fill_(below, 0.0)
    torch.mul(dh, to_o, out=do)
    torch.mul(from_c, dc[:, :, None], out=difz)
    dif.addcmul_(from_n, dn[:, :, None])
    if mu is not None:
        di.add_(mu.masked_fill(~takes_i, 0.0))
        mu.masked_fill_(takes_i, 0.0)
        df.addcmul_(mu, of_f)
    carry *= f_gate


def _lstm_local(gates, others, before, _) -> list[Tensor]:
    i, f, z, o = gates
    tanh_c = torch.tanh(others[0])
    from_c = torch.stack((z * i * (1.0 - i), before[1] * f * (1.0 - f), i * (1.0 - z * z)), 3)
    return [o * (1.0 - tanh_c * tanh_c), tanh_c * o * (1.0 - o), from_c, f]


def _lstm_backward(dh, carry, _, difz, do, to_c, to_o, from_c, f) -> None:
    dc = carry[0]
    dc.addcmul_(dh, to_c)
    torch.mul(from_c, dc[:, :, None], out=difz)
    torch.mul(dh, to_o, out=do)
    dc *= f


def _gru_local(gates, _, before, __) -> list[Tensor]:
    g, r, z, n = gates
    return [(1.0 - z) * (1.0 - n * n), (before[0] - n) * z * (1.0 - z), g * r * (1.0 - r), r, z]


def _gru_backward(dh, _, __, dg, dr, dz, dn, to_n, to_z, to_r, r, z) -> Tensor:
    torch.mul(dh, to_n, out=dn)
    torch.mul(dh, to_z, out=dz)
    torch.mul(dn, to_r, out=dr)
    torch.mul(dn, r, out=dg)
    return dh * z


def _elman_local(gates, *_) -> list[Tensor]:
    return [1.0 - gates[0] * gates[0]]


def _elman_backward(dh, _, __, dg, to_g) -> None:
    torch.mul(dh, to_g, out=dg)


_LOCAL = {"slstm": _slstm_local, "lstm": _lstm_local, "gru": _gru_local, "elman": _elman_local}
_BACKWARD = {
    "slstm": _slstm_backward,
    "lstm": _lstm_backward,
    "gru": _gru_backward,
    "elman": _elman_backward,
}


def _spans(steps: int, form: Form) -> list[tuple[int, int]]:
    """[lo, hi) of the blocks whose intermediate results are in memory at once, in the order of running."""
    spans = [(lo, min(lo + _BLOCK, steps)) for lo in range(0, steps, _BLOCK)]
    return spans[::-1] if form.reverse else spans


def _zeroed(starts: Tensor | None) -> Tensor | None:
    """(B, T) as a mask of (H, B, D) for each step."""
    return None if starts is None else starts.t()[:, None, :, None]


def _by_head(state, shape, wx: Tensor, acc: torch.dtype, form: Form) -> list[Tensor]:
    """The states (B, H, D), or zeros, as (H, B, D)."""
    if state[0] is None:
        return [wx.new_zeros(shape, dtype=acc)] * len(state)
    by_head = [x.transpose(0, 1).contiguous() for x in state]
    if form.cell == "slstm":
        by_head[3] = by_head[3].clamp(*_finite(acc))
    return by_head


def _finite(acc: torch.dtype) -> tuple[float, float]:
    """Bounds of sLSTM's i and m that no finite gate comes near and whose differences are finite.

    Of an infinite i, i - m would be NaN where m is i.
    """
    bound = torch.finfo(acc).max / 8
    return -bound, bound


def _before(x: Tensor, x0: Tensor, rows: slice, zeroed: Tensor | None, form: Form) -> Tensor:
    """What the steps of a block read: x (T, H, B, D) of the steps that ran before them."""
    lo, hi = rows.start, rows.stop
    shift = 1 if form.reverse else -1
    inner = lo + shift >= 0 and hi + shift <= len(x)
    if inner and zeroed is None:
        return x[lo + shift : hi + shift]
    y = x0.new_empty(hi - lo, *x0.shape)
    if inner:
        y.copy_(x[lo + shift : hi + shift])
    elif form.reverse:
        y[:-1], y[-1] = x[lo + 1 : hi], x0
    else:
        y[1:], y[0] = x[lo : hi - 1], x0
    return y if zeroed is None else y.masked_fill_(zeroed[rows], 0.0)
