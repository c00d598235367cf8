"""Triton kernels of the recurrent cells for head sizes whose recurrent weights fit on one multiprocessor.

FlashRNN's fused form (arXiv 2412.07752): a program is one head and a tile of the batch, walks the whole
sequence, and holds r in its registers meanwhile. What a step reads from memory does not depend on the step
before it, so that it is fetched ahead (the loop's pipeline stages). Nothing but h is kept for the backward:
`rnn_triton_tiled.replay` makes the gates and states again, for all steps at once as far as products go.

Shapes: B batch, T steps, H heads, D head size, G gates of wx, S gates of r. Tiles: BB rows of the batch,
BD >= D features. wx and its gradient have stride 1 along D and any others, given in units of ALIGN elements
(so that a new B or T changes nothing that is compiled); all else is contiguous: h and its gradient
(B, T, H, D), states (B, H, D) float32, r (H, D, S, D), bias (S or 4, H, D), planes (B, T, H, P, D), starts
(B, T). Steps are counted in the order in which they are run; only addresses know of `reverse`.
"""

import triton
import triton.language as tl

from .rnn_triton_cells import ELMAN, GRU, LSTM, SLSTM, advance, retreat


@triton.jit
def _time(s, T, REVERSE: tl.constexpr):
    return tl.cast(T - 1 - s if REVERSE else s, tl.int64)


@triton.jit
def _load(X, mask, UPCAST: tl.constexpr):
    x = tl.load(X, mask=mask, other=0.0)
    # the interpreter computes garbage from bfloat16
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _bias(BIAS, gate, head, heads, d, D: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(1, BD) float32."""
    b = tl.zeros_like(d).to(tl.float32)
    if HAS_BIAS:
        b = tl.load(BIAS + (gate * heads + head) * D + d, mask=d < D, other=0.0).to(tl.float32)
    return b[None, :]


@triton.jit
def biases(BIAS, head, heads, d, D: tl.constexpr, CELL: tl.constexpr, HAS_BIAS: tl.constexpr):
    b0 = _bias(BIAS, 0, head, heads, d, D, HAS_BIAS)
    b1, b2, b3 = b0, b0, b0
    if CELL != ELMAN:
        b1 = _bias(BIAS, 1, head, heads, d, D, HAS_BIAS)
        b2 = _bias(BIAS, 2, head, heads, d, D, HAS_BIAS)
        b3 = _bias(BIAS, 3, head, heads, d, D, HAS_BIAS)
    return b0, b1, b2, b3


@triton.jit
def inputs(X, gate, mask, CELL: tl.constexpr):
    """The gates of wx as x0, ..., x3 of the cell. X: addresses of the first one."""
    x0 = tl.load(X, mask=mask, other=0.0).to(tl.float32)
    x1, x2, x3 = x0, x0, x0
    if CELL == GRU:
        x2 = tl.load(X + gate, mask=mask, other=0.0).to(tl.float32)
        x3 = tl.load(X + 2 * gate, mask=mask, other=0.0).to(tl.float32)
    elif CELL != ELMAN:
        x1 = tl.load(X + gate, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(X + 2 * gate, mask=mask, other=0.0).to(tl.float32)
        x3 = tl.load(X + 3 * gate, mask=mask, other=0.0).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def add(x0, x1, x2, x3, y0, y1, y2, y3, CELL: tl.constexpr):
    """wx + bias and product."""
    if CELL == ELMAN:
        return x0 + y0, x1, x2, x3
    if CELL == GRU:
        return tl.zeros_like(x0) + y0, x1 + y1, x2 + y2, x3 + y3
    return x0 + y0, x1 + y1, x2 + y2, x3 + y3


@triton.jit
def weights_of(R, k, d, D: tl.constexpr, CELL: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of r of each gate. R: addresses of the first gate's."""
    mask = (k < D)[:, None] & (d < D)[None, :]
    r0 = _load(R, mask, UPCAST)
    r1, r2, r3 = r0, r0, r0
    if CELL != ELMAN:
        r1 = _load(R + D, mask, UPCAST)
        r2 = _load(R + 2 * D, mask, UPCAST)
    if CELL <= LSTM:
        r3 = _load(R + 3 * D, mask, UPCAST)
    return r0, r1, r2, r3


@triton.jit
def held(r0, r1, r2, r3, HOLD: tl.constexpr):
    """The same, so that the first HOLD of them stay in registers.

    The result of an operation does, if it is used outside of the loop, too; what is only loaded Triton keeps
    in shared memory and loads at every use.
    """
    if HOLD > 0:
        r0 += 0.0
    if HOLD > 1:
        r1 += 0.0
    if HOLD > 2:
        r2 += 0.0
    if HOLD > 3:
        r3 += 0.0
    return r0, r1, r2, r3


@triton.jit
def products(h, r0, r1, r2, r3, y0, y1, y2, y3, CELL: tl.constexpr, PRECISION: tl.constexpr):
    """h times r, added to y0, ..., y3."""
    y0 = tl.dot(h, r0, y0, input_precision=PRECISION)
    if CELL != ELMAN:
        y1 = tl.dot(h, r1, y1, input_precision=PRECISION)
        y2 = tl.dot(h, r2, y2, input_precision=PRECISION)
    if CELL <= LSTM:
        y3 = tl.dot(h, r3, y3, input_precision=PRECISION)
    return y0, y1, y2, y3


@triton.jit
def sent_back(
    d0, d1, d2, d3, r0, r1, r2, r3, clip, CELL: tl.constexpr, CLIP: tl.constexpr, PRECISION: tl.constexpr
):
    """The gradient that reaches h through r."""
    dh = tl.dot(d0, r0, input_precision=PRECISION)
    if CELL != ELMAN:
        dh += tl.dot(d1, r1, input_precision=PRECISION)
        dh += tl.dot(d2, r2, input_precision=PRECISION)
    if CELL <= LSTM:
        dh += tl.dot(d3, r3, input_precision=PRECISION)
    if CLIP:
        dh = tl.minimum(tl.maximum(dh, -clip), clip)
    return dh


@triton.jit
def _rounded(x, X, UPCAST: tl.constexpr):
    """x in X's dtype, as products take it."""
    x = x.to(X.dtype.element_ty)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_gates(X, gate, mask, d0, d1, d2, d3, CELL: tl.constexpr):
    """The gradients of x0, ..., x3 that are gradients of wx."""
    dtype = X.dtype.element_ty
    if CELL == GRU:
        tl.store(X, d1.to(dtype), mask=mask)
        tl.store(X + gate, d2.to(dtype), mask=mask)
        tl.store(X + 2 * gate, d3.to(dtype), mask=mask)
    else:
        tl.store(X, d0.to(dtype), mask=mask)
        if CELL != ELMAN:
            tl.store(X + gate, d1.to(dtype), mask=mask)
            tl.store(X + 2 * gate, d2.to(dtype), mask=mask)
            tl.store(X + 3 * gate, d3.to(dtype), mask=mask)


@triton.jit
def load_planes(P, mask, D: tl.constexpr, CELL: tl.constexpr):
    p0 = tl.load(P, mask=mask, other=0.0)
    p1, p2, p3, p4, p5 = p0, p0, p0, p0, p0
    if CELL != ELMAN:
        p1 = tl.load(P + D, mask=mask, other=0.0)
        p2 = tl.load(P + 2 * D, mask=mask, other=0.0)
        p3 = tl.load(P + 3 * D, mask=mask, other=0.0)
        p4 = tl.load(P + 4 * D, mask=mask, other=0.0)
    if CELL == SLSTM:
        p5 = tl.load(P + 5 * D, mask=mask, other=0.0)
    return p0, p1, p2, p3, p4, p5


@triton.jit
def load_states(H, C, N, M, at, mask, CELL: tl.constexpr):
    h = tl.load(H + at, mask=mask, other=0.0)
    c, n, m = h, h, h
    if CELL <= LSTM:
        c = tl.load(C + at, mask=mask, other=0.0)
    if CELL == SLSTM:
        n = tl.load(N + at, mask=mask, other=0.0)
        m = tl.load(M + at, mask=mask, other=0.0)
    return h, c, n, m


@triton.jit
def store_states(H, C, N, M, at, mask, h, c, n, m, CELL: tl.constexpr):
    tl.store(H + at, h, mask=mask)
    if CELL <= LSTM:
        tl.store(C + at, c, mask=mask)
    if CELL == SLSTM:
        tl.store(N + at, n, mask=mask)
        tl.store(M + at, m, mask=mask)


@triton.jit
def either(which, x0, x1, x2, x3, y0, y1, y2, y3):
    return (
        tl.where(which, x0, y0),
        tl.where(which, x1, y1),
        tl.where(which, x2, y2),
        tl.where(which, x3, y3),
    )


@triton.jit(do_not_specialize=["sxb", "sxt", "sxg", "sxh", "B", "T", "heads"])
def forward_resident(
    WX, R, BIAS, STARTS, H0, C0, N0, M0, H, H_LAST, C_LAST, N_LAST, M_LAST, sxb, sxt, sxg, sxh, B, T, heads,
    D: tl.constexpr, CELL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    RETURN_STATE: tl.constexpr, RESET: tl.constexpr, REVERSE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
    HOLD: tl.constexpr,
):  # fmt: skip
    """h of BB sequences of one head."""
    FINE: tl.constexpr = H.dtype.element_ty == tl.float32
    GATES: tl.constexpr = 1 if CELL == ELMAN else 3 if CELL == GRU else 4
    head = tl.program_id(0) % heads
    b = tl.program_id(0) // heads * BB + tl.arange(0, BB)
    d = tl.arange(0, BD)
    mask = (b < B)[:, None] & (d < D)[None, :]
    b = tl.cast(b, tl.int64)
    head = tl.cast(head, tl.int64)

    weights = R + head * (D * GATES * D) + d[:, None] * (GATES * D) + d[None, :]
    r0, r1, r2, r3 = weights_of(weights, d, d, D, CELL, UPCAST)
    r0, r1, r2, r3 = held(r0, r1, r2, r3, HOLD)
    zero = tl.zeros([BB, BD], tl.float32)
    b0, b1, b2, b3 = biases(BIAS, head, heads, d, D, CELL, HAS_BIAS)
    b0, b1, b2, b3 = zero + b0, zero + b1, zero + b2, zero + b3

    state = (b * heads + head)[:, None] * D + d[None, :]
    h, c, n, m = zero, zero, zero, zero
    if HAS_STATE:
        h, c, n, m = load_states(H0, C0, N0, M0, state, mask, CELL)
    if RESET:
        begins = tl.load(STARTS + b * T + _time(0, T, REVERSE), mask=b < B, other=0)[:, None] != 0
        h, c, n, m = either(begins, zero, zero, zero, zero, h, c, n, m)
    # without a state, too: see `held`
    y0, y1, y2, y3 = products(_rounded(h, H, UPCAST), r0, r1, r2, r3, b0, b1, b2, b3, CELL, PRECISION)
    x_b = WX + head * sxh * ALIGN + (b * sxb * ALIGN)[:, None] + d[None, :]
    h_b = H + (b * T * heads * D)[:, None] + (head * D + d)[None, :]
    for s in tl.range(0, T, num_stages=STAGES):
        t = _time(s, T, REVERSE)
        x0, x1, x2, x3 = inputs(x_b + t * sxt * ALIGN, sxg * ALIGN, mask, CELL)
        x0, x1, x2, x3 = add(x0, x1, x2, x3, y0, y1, y2, y3, CELL)
        h, c, n, m = advance(x0, x1, x2, x3, h, c, n, m, CELL, FINE)
        tl.store(h_b + t * heads * D, h.to(H.dtype.element_ty), mask=mask)
        if RESET:
            live = b < tl.where(s + 1 < T, B, 0)
            begins = tl.load(STARTS + b * T + _time(s + 1, T, REVERSE), mask=live, other=0)[:, None] != 0
            h, c, n, m = either(begins, zero, zero, zero, zero, h, c, n, m)
        y0, y1, y2, y3 = products(_rounded(h, H, UPCAST), r0, r1, r2, r3, b0, b1, b2, b3, CELL, PRECISION)
    if RETURN_STATE:
        store_states(H_LAST, C_LAST, N_LAST, M_LAST, state, mask, h, c, n, m, CELL)


@triton.jit(do_not_specialize=["sxb", "sxt", "sxg", "sxh", "B", "T", "heads", "clip"])
def backward_resident(
    PLANES, R, STARTS, DH, DH_LAST, DC_LAST, DN_LAST, MU_LAST, DWX, DG, DH0, DC0, DN0, MU0, sxb, sxt, sxg,
    sxh, B, T, heads, clip, D: tl.constexpr, CELL: tl.constexpr, HAS_DH: tl.constexpr,
    HAS_DLAST: tl.constexpr, HAS_STATE: tl.constexpr, MU: tl.constexpr, CLIP: tl.constexpr,
    RESET: tl.constexpr, REVERSE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
    HOLD: tl.constexpr,
):  # fmt: skip
    """The gradient of wx (and of the GRU's g) of BB sequences of one head, and of their first states."""
    FINE: tl.constexpr = DWX.dtype.element_ty == tl.float32
    GATES: tl.constexpr = 1 if CELL == ELMAN else 3 if CELL == GRU else 4
    PARTS: tl.constexpr = 1 if CELL == ELMAN else 6 if CELL == SLSTM else 5
    head = tl.program_id(0) % heads
    b = tl.program_id(0) // heads * BB + tl.arange(0, BB)
    d = tl.arange(0, BD)
    mask = (b < B)[:, None] & (d < D)[None, :]
    b = tl.cast(b, tl.int64)
    head = tl.cast(head, tl.int64)

    # transposed: from the gates' features to those of h
    weights = R + head * (D * GATES * D) + d[:, None] + d[None, :] * (GATES * D)
    r0, r1, r2, r3 = weights_of(weights, d, d, D, CELL, UPCAST)
    r0, r1, r2, r3 = held(r0, r1, r2, r3, HOLD)
    state = (b * heads + head)[:, None] * D + d[None, :]
    zero = tl.zeros([BB, BD], tl.float32)
    none = _rounded(zero, DWX, UPCAST)
    dh, dc, dn, mu = zero, zero, zero, zero
    if HAS_DLAST:
        dh, dc, dn, mu = load_states(DH_LAST, DC_LAST, DN_LAST, MU_LAST, state, mask, CELL)
    # adds nothing: see `held`
    dh += sent_back(none, none, none, none, r0, r1, r2, r3, clip, CELL, CLIP, PRECISION)
    x_b = DWX + head * sxh * ALIGN + (b * sxb * ALIGN)[:, None] + d[None, :]
    h_at = (b * T * heads * D)[:, None] + (head * D + d)[None, :]
    p_b = PLANES + ((b * T * heads + head) * (PARTS * D))[:, None] + d[None, :]
    for k in tl.range(0, T, num_stages=STAGES):
        s = T - 1 - k
        t = _time(s, T, REVERSE)
        p0, p1, p2, p3, p4, p5 = load_planes(p_b + t * heads * (PARTS * D), mask, D, CELL)
        if HAS_DH:
            dh += tl.load(DH + h_at + t * heads * D, mask=mask, other=0.0).to(tl.float32)
        d0, d1, d2, d3, direct, dc, dn, mu = retreat(
            p0, p1, p2, p3, p4, p5, dh, dc, dn, mu, s == 0, CELL, MU, FINE
        )
        d0, d1 = _rounded(d0, DWX, UPCAST), _rounded(d1, DWX, UPCAST)
        d2, d3 = _rounded(d2, DWX, UPCAST), _rounded(d3, DWX, UPCAST)
        store_gates(x_b + t * sxt * ALIGN, sxg * ALIGN, mask, d0, d1, d2, d3, CELL)
        if CELL == GRU:
            tl.store(DG + h_at + t * heads * D, d0.to(DG.dtype.element_ty), mask=mask)
        dh = sent_back(d0, d1, d2, d3, r0, r1, r2, r3, clip, CELL, CLIP, PRECISION)
        if CELL == GRU:
            dh += direct
        if RESET:
            begins = tl.load(STARTS + b * T + t, mask=b < B, other=0)[:, None] != 0
            dh, dc, dn, mu = either(begins, zero, zero, zero, zero, dh, dc, dn, mu)
    if HAS_STATE:
        store_states(DH0, DC0, DN0, MU0, state, mask, dh, dc, dn, mu, CELL)
