"""The `torch` backend of the mLSTM: chunkwise, any length, with a hand-written exact backward.

The sequence is cut into chunks of L steps. Inside a chunk the quadratic form is used, between chunks the
state (C, n, m) is carried, so the work is linear in T (TFLA, arXiv 2503.14376, section 3). With b the running
sum of log f inside a chunk and u_s = log i_s - b_s, the row maximum of the gate matrix is a running maximum:

    M_t = max(m_c, max_{s <= t} u_s),   m_t = b_t + M_t,   D_ts = exp(u_s - M_t),   a_t = exp(m_c - M_t)
    num_t = sum_s scale (q_t . k_s) D_ts v_s + scale a_t q_t C_c,   den_t likewise with v = 1 and n_c
    h_t = num_t / (max(|den_t|, exp(-m_t)) + eps)

The sigmoid gate is the same with log i = logsigmoid(i) and m_t = 0, that is M_t = -b_t and a_t = exp(b_t).

u_s - M_t is a small difference of sums that grow with L: in float32 it would lose |b| / 2^24. The sums are
therefore float64 (two numbers a step), and the differences are taken in float32 in two exact halves.

The backward is the gradient of the recurrence, the normaliser and the last state included: the formulas
follow from those above, with the normaliser as one more column of h (v = 1). m is a choice of unit for C and
n: h depends on it only through eps, and the returned state by its definition. Both effects make up `mu`, the
gradient of m at fixed C exp(m) and n exp(m), which goes to the step that attains the maximum.

Shapes: B batch, H heads, N = B * H, T steps, L steps of one chunk, Dk and Dv head sizes. Kept for the
backward: the arguments, the normaliser of each row and the states between chunks, O(T) in all.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .mlstm_naive import mlstm_step_naive

SAVES_H = False  # whether `backward` reads h
# exp of either is zero in every dtype; sums of 256 of the former still have exact integer parts in float32
_MIN_LOG_F, _MIN_LOG_I = -1e4, -1e30


class Form(NamedTuple):
    """What an mLSTM computes, and in which chunks."""

    exponential: bool
    normalize: bool
    reverse: bool
    chunk_size: int | None
    eps: float


class Saved(NamedTuple):
    """What the backward needs beside the arguments, in the accumulation dtype; None where there is nothing.

    den (B, H, T): the normaliser of each row. c (B, H, N - 1, Dk, Dv), n (B, H, N - 1, Dk), m (B, H, N - 1):
    the states between the N chunks, in the order in which they are run.
    """

    den: Tensor | None = None
    c: Tensor | None = None
    n: Tensor | None = None
    m: Tensor | None = None


class _Gates(NamedTuple):
    """Gate quantities of one chunk, (N, L) in storage order; u and row_max in float64 where there is one."""

    u: Tensor
    row_max: Tensor
    floor: Tensor  # exp(-m_t)
    start: Tensor  # a_t: weight of the chunk's initial state at step t
    last_m: Tensor  # (N,)
    write: Tensor  # weight of step s in the chunk's last state
    keep: Tensor  # (N,), weight of the chunk's initial state in its last
    source: Tensor | None  # step that attains M_t; L stands for the initial m
    same: Tensor | None  # (N, L, L) bool, t and s in one sequence and s not after t; None without resets
    segment: Tensor | None


def chunk_of(steps: int, dim_qk: int, dim_v: int, chunk_size: int | None) -> int:
    """Steps of one chunk; unless given the whole sequence where that costs no more than carrying states."""
    if chunk_size is None:
        chunk_size = 256 if steps <= 256 else 64 if dim_qk * dim_v <= 128 * 128 else 128
    return min(chunk_size, steps)


def saved_shapes(q: Tensor, v: Tensor, starts: Tensor | None, form: Form) -> tuple[tuple | None, ...]:
    """Shapes of what `forward` keeps, as `Saved`."""
    batch, heads, steps, dim_qk = q.shape
    inner = (batch, heads, (steps - 1) // chunk_of(steps, dim_qk, v.shape[-1], form.chunk_size))
    den = (batch, heads, steps) if form.normalize else None
    if inner[2] == 0:
        return Saved(den)
    return Saved(den, (*inner, dim_qk, v.shape[-1]), (*inner, dim_qk), inner if form.exponential else None)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    form: Form,
    return_state: bool,
    save: bool,
) -> tuple[Tensor, tuple, Saved]:
    """h (B, H, T, Dv) in v's dtype, the last state (c, n, m), and what the backward needs.

    Args:
        q, k, v, i, f: as `vilma.xlstm.mlstm` takes them; i and f in the accumulation dtype, as the state.
        state: c, n, m before the first step; three None start from zero and cost nothing.
        starts: (B, T) bool, where the state is zeroed before step t, for the direction that is run.
        return_state: three None are returned as the last state when False.
        save: nothing is kept for `backward` when False.
    """
    with no_autocast(q):
        return _forward(q, k, v, i, f, state, starts, form, return_state, save)


def backward(
    grads: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    h: Tensor | None,
    last: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    form: Form,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, i, f and of the initial c, n, m (None where that was None).

    Args:
        grads: gradients of h, c, n, m; None where there is none.
        h: what `forward` returned, None where ``SAVES_H`` is False.
        last: the last state, read only where c or n has a gradient.
        saved: what `forward` kept, as `Saved`; the other arguments as it took them.
    """
    with no_autocast(q):
        return _backward(grads, q, k, v, i, f, state, starts, last, saved, form)


def step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: Sequence[Tensor | None], form: Form
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """One step: q, k (B, H, Dk), v (B, H, Dv), i, f (B, H) -> h in q's dtype and the next state."""
    q_, k_, v_ = (x.to(i.dtype) for x in (q, k, v))
    if state[0] is None:
        c = i.new_zeros(*q.shape, v.shape[-1])
        state = c, c[..., 0], torch.zeros_like(i) if form.exponential else None
    gate = "exp" if form.exponential else "sigmoid"
    with no_autocast(q):
        h, last = mlstm_step_naive(q_, k_, v_, i, f, state, gate, form.normalize, form.eps)
    h, *last = (x if x is None else x.contiguous() for x in (h.to(q.dtype), *last))
    return h, tuple(last)


def _forward(q, k, v, i, f, state, starts, form: Form, return_state: bool, save: bool):
    batch, heads, steps, dim_qk = q.shape
    scale = dim_qk**-0.5
    h = dense_like(v)
    acc = i.dtype
    log_f, log_i = _log_gates(i, f, form.exponential)
    c, n, m = _by_row(*state)
    dens, inner = i.new_empty(batch * heads, steps) if save and form.normalize else None, []
    form = form._replace(chunk_size=chunk_of(steps, dim_qk, v.shape[-1], form.chunk_size))
    spans = _spans(steps, form)
    for index, (lo, hi) in enumerate(spans):
        starts_ = _heads_of(starts, lo, hi, heads)
        gates = _chunk_gates(log_f[:, lo:hi], log_i[:, lo:hi], m, starts_, acc, form)
        q_, k_, v_ = (_chunk(x, lo, hi, acc) for x in (q, k, v))
        p = torch.bmm(q_, k_.mT).mul_(_gate_matrix(gates, acc, form))
        num = torch.bmm(p, v_)
        if c is not None:
            num.addcmul_(gates.start[..., None], torch.bmm(q_, c))
        den = None
        if form.normalize:
            den = p.sum(-1)
            if n is not None:
                den.addcmul_(gates.start, torch.bmm(q_, n[..., None]).squeeze(-1))
            den *= scale
            if dens is not None:
                dens[:, lo:hi] = den
        factor = _factor(den, gates.floor, scale, form)
        by_head = (batch, heads, hi - lo, -1)
        torch.mul(num.view(by_head), factor.view(by_head), out=h[:, :, lo:hi])
        if index + 1 < len(spans) or return_state:
            c, n, m = _next_state(gates, k_, v_, c, n, form)
            if index + 1 < len(spans):
                inner.append((c, n, m))
    last = (None, None, None)
    if return_state:
        last = (c.view(batch, heads, dim_qk, -1), n.contiguous().view(batch, heads, dim_qk), None)
        if m is not None:
            last = (*last[:2], m.view(batch, heads))
    if save:
        states = (
            None if x[0] is None else torch.stack(x, 1).unflatten(0, (batch, heads)) for x in zip(*inner)
        )
        saved = Saved(None if dens is None else dens.view(batch, heads, steps), *states)
    else:
        saved = Saved()
    return h, last, saved


def _backward(grads, q, k, v, i, f, state, starts, last, saved, form: Form):
    batch, heads, steps, dim_qk = q.shape
    scale = dim_qk**-0.5
    acc = i.dtype
    log_f, log_i = _log_gates(i, f, form.exponential)
    form = form._replace(chunk_size=chunk_of(steps, dim_qk, v.shape[-1], form.chunk_size))
    spans = _spans(steps, form)
    dens, *inner = (x if x is None else x.flatten(0, 1) for x in saved)
    inner = [x if x is None else x.unbind(1) for x in inner]
    states = [_by_row(*state)]
    states += [tuple(x if x is None else x[j] for x in inner) for j in range(len(spans) - 1)]
    whole = len(spans) == 1
    dq = dk = dv = None
    if not whole:
        dq, dk, dv = (dense_like(x) for x in (q, k, v))
    dlog_f, dlog_i = (i.new_empty(batch * heads, steps) for _ in range(2))
    dh = grads[0]
    dc, dn, mu = (x if x is None else x.to(acc) for x in _by_row(*grads[1:]))
    # mu: the gradient of m beside what the units of C and n carry of it
    product = _state_product(_by_row(*last), dc, dn)
    if form.exponential and product is not None:
        mu = -product if mu is None else mu - product

    for index in range(len(spans) - 1, -1, -1):
        lo, hi = spans[index]
        final = 0 if form.reverse else hi - lo - 1
        c, n, m = states[index]
        starts_ = _heads_of(starts, lo, hi, heads)
        gates = _chunk_gates(log_f[:, lo:hi], log_i[:, lo:hi], m, starts_, acc, form)
        q_, k_, v_ = (_chunk(x, lo, hi, acc) for x in (q, k, v))

        den = None if dens is None else dens[:, lo:hi]
        factor = _factor(den, gates.floor, scale, form)
        if dh is None:
            g = torch.zeros_like(v_)
        else:
            g = torch.empty(v_.shape, dtype=acc, device=v_.device)
            by_head = (batch, heads, hi - lo, -1)
            torch.mul(dh[:, :, lo:hi], factor.view(by_head), out=g.view(by_head))
        d = _gate_matrix(gates, acc, form)
        p = torch.bmm(q_, k_.mT).mul_(d)
        ds = torch.bmm(g, v_.mT)
        dv_ = torch.bmm(p.mT, g)
        read = None if c is None else torch.bmm(g, c.mT)

        delta = mu_row = None
        if form.normalize:
            # <dh, h>, from the pieces at hand
            r = p.mul_(ds).sum(-1)
            if read is not None:
                r.addcmul_(gates.start, (q_ * read).sum(-1))
            r *= factor
            delta = _normaliser_gradient(r, den, gates.floor)
            ds += delta[..., None]
            if form.exponential:
                mu_row = r.mul_(-form.eps / scale)
        ds *= d
        dq_ = torch.bmm(ds, k_)
        dk_ = torch.bmm(ds.mT, q_)
        if c is not None:
            if delta is not None:
                read.addcmul_(delta[..., None], n[:, None])
            dq_.addcmul_(read, gates.start[..., None])
        if product is not None:
            write = gates.write[..., None]
            if dc is not None:
                dv_.addcmul_(torch.bmm(k_, dc), write)
                dk_.addcmul_(torch.bmm(v_, dc.mT), write)
            if dn is not None:
                dk_.addcmul_(dn[:, None], write)

        dli = (k_ * dk_).sum(-1)
        dlf = (q_ * dq_).sum(-1).sub_(dli)
        mu_start = None
        if form.exponential:
            if mu is not None:
                mu_row = torch.zeros_like(dlf) if mu_row is None else mu_row
                mu_row[:, final] += mu
            if mu_row is not None:
                to_step, mu_start = _along_max(mu_row, gates)
                dli += to_step
                dlf += mu_row - to_step
        if product is not None:
            dlf[:, final] += product
        dlog_f[:, lo:hi] = _suffix_sum(dlf, gates, form)
        dlog_i[:, lo:hi] = dli
        if whole:
            dq, dk, dv = (dense_like(y).copy_(x.view(y.shape)) for x, y in zip((dq_, dk_, dv_), (q, k, v)))
        else:
            for x, y in zip((dq, dk, dv), (dq_, dk_, dv_)):
                x[:, :, lo:hi] = y.view(batch, heads, hi - lo, -1)

        if c is not None:
            keep = gates.keep
            q_start = q_ * gates.start[..., None]
            dc_ = torch.bmm(q_start.mT, g)
            dc = dc_ if dc is None else dc_.addcmul_(dc, keep[:, None, None])
            dn = None if dn is None else dn * keep[:, None]
            if delta is not None:
                dn_ = torch.bmm(q_start.mT, delta[..., None]).squeeze(-1)
                dn = dn_ if dn is None else dn + dn_
            product, mu = _state_product(states[index], dc, dn), mu_start

    df = dlog_f * torch.sigmoid(-f.flatten(0, 1))
    di = dlog_i if form.exponential else dlog_i * torch.sigmoid(-i.flatten(0, 1))
    d_state = (None, None, None)
    if state[0] is not None:
        dm = None
        if form.exponential:
            dm = (product if mu is None else product + mu).view(batch, heads)
        dn = torch.zeros_like(states[0][1]) if dn is None else dn
        d_state = (dc.view(batch, heads, dim_qk, -1), dn.contiguous().view(batch, heads, dim_qk), dm)
    return dq, dk, dv, di.view(i.shape), df.view(f.shape), *d_state


def _log_gates(i: Tensor, f: Tensor, exponential: bool) -> tuple[Tensor, Tensor]:
    """log f and log i, (N, T)."""
    if i.device.type != "mps":  # which has no float64
        i, f = i.double(), f.double()
    log_f = F.logsigmoid(f).clamp_min_(_MIN_LOG_F)
    log_i = i.clamp_min(_MIN_LOG_I) if exponential else F.logsigmoid(i).clamp_min_(_MIN_LOG_F)
    return log_f.flatten(0, 1), log_i.flatten(0, 1)


def _spans(steps: int, form: Form) -> list[tuple[int, int]]:
    """[lo, hi) of each chunk, in the order in which they are run; the chunk that runs last may be shorter."""
    spans = [(lo, min(lo + form.chunk_size, steps)) for lo in range(0, steps, form.chunk_size)]
    return [(steps - hi, steps - lo) for lo, hi in spans] if form.reverse else spans


def _chunk(x: Tensor, lo: int, hi: int, dtype: torch.dtype) -> Tensor:
    """Steps [lo, hi) of (B, H, T, D) as (N, L, D); copies only what its strides or dtype force it to."""
    return x[:, :, lo:hi].to(dtype).reshape(-1, hi - lo, x.shape[-1])


def _heads_of(starts: Tensor | None, lo: int, hi: int, heads: int) -> Tensor | None:
    return None if starts is None else starts[:, lo:hi].repeat_interleave(heads, 0)


def _running(x: Tensor, reverse: bool) -> Tensor:
    """Running sum along the last axis, from the first step that is run."""
    return x.flip(-1).cumsum(-1).flip(-1) if reverse else x.cumsum(-1)


def _chunk_gates(
    log_f: Tensor, log_i: Tensor, m: Tensor | None, starts: Tensor | None, acc: torch.dtype, form: Form
) -> _Gates:
    reverse, steps = form.reverse, log_f.shape[-1]
    last = 0 if reverse else steps - 1
    same = segment = source = None
    if starts is None:
        b = _running(log_f, reverse)
    else:
        segment = _running(starts.to(torch.int32), reverse)
        same = segment[:, :, None] == segment[:, None, :]
        same = same.triu_() if reverse else same.tril_()
        b = torch.where(same, log_f[:, None, :], 0.0).sum(-1)
    u = log_i - b
    initial = torch.zeros_like(u[:, :1]) if m is None else m.to(u.dtype)[:, None]
    if not form.exponential:
        row_max = -b
    else:
        if same is None:
            top, source = (u.flip(-1) if reverse else u).cummax(-1)
            if reverse:
                top, source = top.flip(-1), (steps - 1 - source).flip(-1)
        else:
            top, source = torch.where(same, u[:, None, :], float("-inf")).max(-1)
            initial = torch.where(segment == 0, initial, 0.0)
        row_max = torch.maximum(top, initial)
        source = torch.where(initial > top, steps, source)
    start = torch.exp(initial - row_max)
    floor = torch.exp(-b - row_max)
    # the last state is in units of m as it is handed on, rounded to its dtype
    last_m = (b + row_max)[:, last].to(acc).contiguous()
    unit = last_m - b[:, last]
    write, keep = torch.exp(u - unit[:, None]), torch.exp(initial[:, -1] - unit)
    if segment is not None:
        start = torch.where(segment == 0, start, 0.0)
        write = torch.where(same[:, last], write, 0.0)
        keep = torch.where(segment[:, last] == 0, keep, 0.0)
    start, floor, write, keep = (x.to(acc) for x in (start, floor, write, keep))
    return _Gates(u, row_max, floor, start, last_m, write, keep, source, same, segment)


def _gate_matrix(gates: _Gates, acc: torch.dtype, form: Form) -> Tensor:
    """D (N, L, L), row t and column s; zero where s comes after t or lies in another sequence."""
    u, row_max = gates.u[:, None, :], gates.row_max[:, :, None]
    if u.dtype == acc:
        d = u - row_max
    else:
        u_whole, max_whole = u.round(), row_max.round()
        d = u_whole.to(acc) - max_whole.to(acc)
        d.add_((u - u_whole).to(acc)).sub_((row_max - max_whole).to(acc))
    d.exp_()
    if gates.same is not None:
        return d.masked_fill_(~gates.same, 0.0)
    return d.triu_() if form.reverse else d.tril_()


def _factor(den: Tensor | None, floor: Tensor, scale: float, form: Form) -> Tensor:
    """scale over the divisor of h, one a row."""
    return scale / (torch.maximum(den.abs(), floor) + form.eps if form.normalize else floor)


def _normaliser_gradient(r: Tensor, den: Tensor, floor: Tensor) -> Tensor:
    """delta_t, the gradient of den: zero where the floor is active. r is <dh, h> scale / divisor."""
    return torch.where(den.abs() > floor, -den.sign(), 0.0).mul_(r)


def _along_max(mu: Tensor, gates: _Gates) -> tuple[Tensor, Tensor]:
    """Hand mu_t, (N, L), to what attains the maximum M_t: the steps (N, L) and the initial m (N,)."""
    steps = mu.shape[-1]
    spread = mu.new_zeros(mu.shape[0], steps + 1).scatter_add_(1, gates.source, mu)
    if gates.segment is None:
        return spread[:, :-1], spread[:, -1]
    initial = (gates.source == steps) & (gates.segment == 0)
    return spread[:, :-1], torch.where(initial, mu, 0.0).sum(-1)


def _next_state(
    gates: _Gates, k: Tensor, v: Tensor, c: Tensor | None, n: Tensor | None, form: Form
) -> tuple[Tensor, Tensor, Tensor | None]:
    key = k * gates.write[..., None]
    c_next, n_next = torch.bmm(key.mT, v), key.sum(1)
    if c is not None:
        c_next.addcmul_(c, gates.keep[:, None, None])
        n_next.addcmul_(n, gates.keep[:, None])
    return c_next, n_next, gates.last_m if form.exponential else None


def _state_product(state: tuple, dc: Tensor | None, dn: Tensor | None) -> Tensor | None:
    """<C, dC> + <n, dn> of each row, (N,); None when neither has a gradient."""
    total = None if dc is None else (state[0] * dc).sum((1, 2))
    if dn is None:
        return total
    with_n = (state[1] * dn).sum(1)
    return with_n if total is None else total + with_n


def _suffix_sum(x: Tensor, gates: _Gates, form: Form) -> Tensor:
    """Sum of x over the steps that are not run before t and belong to t's sequence."""
    if gates.same is None:
        return _running(x, not form.reverse)
    return torch.where(gates.same, x[:, :, None], 0.0).sum(1)


def _by_row(c: Tensor | None, n: Tensor | None, m: Tensor | None) -> tuple:
    """A state (B, H, ...) as (N, ...)."""
    return tuple(x if x is None else x.flatten(0, 1) for x in (c, n, m))


def dense_like(x: Tensor) -> Tensor:
    """Uninitialised, in x's order of axes where its last axis is the innermost one, else contiguous."""
    y = torch.empty_like(x)
    # with a last axis of one feature torch and its fake tensors order the axes differently
    return (
        y
        if x.shape[-1] > 1 and y.stride(-1) == 1
        else torch.empty_like(x, memory_format=torch.contiguous_format)
    )


def no_autocast(x: Tensor):
    """A context in which autocast does not turn float32 states and products into half precision."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
