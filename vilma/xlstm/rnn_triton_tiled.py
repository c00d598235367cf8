"""Triton kernels of the recurrent cells for any head size: a step over tiles of its features.

FlashRNN's alternating form (arXiv 2412.07752) with the product and the cell in one launch. A program makes BD
features of a step, of all gates, from all of h. Two ways to run a sequence:

* one launch a step, a program a tile (STEPS of a launch is 1): the next launch reads what this one wrote;
* all steps in one launch, one program for all tiles of a head and a batch tile (TILES is 1): r streams from
  the cache at every step, and a barrier of the program keeps steps apart.

No program ever reads what another one writes in the same launch: h (and the gradients of gates) are written
beside what is read, a state is read by the one that writes it. `replay` makes the planes of
`rnn_triton_cells`, once all h are known: no step waits for the product of another.

Shapes and layouts as in `rnn_triton_kernels`.
"""

import triton
import triton.language as tl

from .rnn_triton_cells import ELMAN, GRU, LSTM, SLSTM, advance, advance_planes, retreat
from .rnn_triton_kernels import (
    _load,
    _time,
    add,
    biases,
    either,
    inputs,
    load_planes,
    load_states,
    products,
    store_gates,
    store_states,
    weights_of,
)


@triton.jit
def _recurrent(
    x0, x1, x2, x3, H_B, live, R_H, d, D: tl.constexpr, CELL: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x0, ..., x3 with their recurrent part. H_B: addresses (BB, 1) of the h that is read; R_H: of r."""
    GATES: tl.constexpr = 1 if CELL == ELMAN else 3 if CELL == GRU else 4
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        h = _load(H_B + k[None, :], live & (k < D)[None, :], UPCAST)
        r0, r1, r2, r3 = weights_of(R_H + k[:, None] * (GATES * D) + d[None, :], k, d, D, CELL, UPCAST)
        x0, x1, x2, x3 = products(h, r0, r1, r2, r3, x0, x1, x2, x3, CELL, PRECISION)
    return x0, x1, x2, x3


@triton.jit
def _back(
    X_B, gate, DG, dg_b, live, R_H, d, D: tl.constexpr, CELL: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What the gradients of a step's gates send back to features d of h. X_B: addresses (BB, 1),
    dg_b of DG."""
    GATES: tl.constexpr = 1 if CELL == ELMAN else 3 if CELL == GRU else 4
    a0 = tl.zeros([BB, BD], tl.float32)
    a1, a2, a3 = a0, a0, a0
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        mask = live & (k < D)[None, :]
        r0, r1, r2, r3 = weights_of(R_H + k[:, None] + d[None, :] * (GATES * D), k, d, D, CELL, UPCAST)
        if CELL == GRU:
            d0 = _load(DG + dg_b + k[None, :], mask, UPCAST)
            d1, d2, d3 = (
                _load(X_B + k[None, :], mask, UPCAST),
                _load(X_B + gate + k[None, :], mask, UPCAST),
                d0,
            )
        else:
            d0 = _load(X_B + k[None, :], mask, UPCAST)
            d1, d2, d3 = d0, d0, d0
            if CELL != ELMAN:
                d1 = _load(X_B + gate + k[None, :], mask, UPCAST)
                d2 = _load(X_B + 2 * gate + k[None, :], mask, UPCAST)
                d3 = _load(X_B + 3 * gate + k[None, :], mask, UPCAST)
        a0 = tl.dot(d0, r0, a0, input_precision=PRECISION)
        if CELL != ELMAN:
            a1 = tl.dot(d1, r1, a1, input_precision=PRECISION)
            a2 = tl.dot(d2, r2, a2, input_precision=PRECISION)
        if GATES == 4:
            a3 = tl.dot(d3, r3, a3, input_precision=PRECISION)
    if CELL != ELMAN:
        a0 += a1
        a0 += a2
    if GATES == 4:
        a0 += a3
    return a0


@triton.jit(do_not_specialize=["sxb", "sxt", "sxg", "sxh", "B", "T", "heads", "first"])
def forward_tiled(
    WX, R, BIAS, STARTS, READ, H_IN, C_IN, N_IN, M_IN, H, H_OUT, C_OUT, N_OUT, M_OUT, sxb, sxt, sxg, sxh, B,
    T, heads, first, D: tl.constexpr, CELL: tl.constexpr, HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr,
    KEEP: tl.constexpr, RESET: tl.constexpr, REVERSE: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Step `first` of BD features, or WHOLE: all steps and features, of BB sequences of one head.

    READ (2, B, H, D) in the dtype of h: what step s reads is at s % 2, what it writes (unless not KEEP) at
    the other. The states are read from *_IN and written to *_OUT, which may be the same, and are when WHOLE.
    """
    FINE: tl.constexpr = H.dtype.element_ty == tl.float32
    GATES: tl.constexpr = 1 if CELL == ELMAN else 3 if CELL == GRU else 4
    TILES: tl.constexpr = 1 if WHOLE else (D + BD - 1) // BD
    tile = tl.program_id(0) % TILES
    head = tl.cast(tl.program_id(0) // TILES % heads, tl.int64)
    b = tl.cast(tl.program_id(0) // (TILES * heads) * BB + tl.arange(0, BB), tl.int64)
    live = (b < B)[:, None]
    state_b = ((b * heads + head) * D)[:, None]
    zero = tl.zeros([BB, BD], tl.float32)
    side = tl.cast(B, tl.int64) * heads * D
    r_h = R + head * (D * GATES * D)
    # fetching ahead of this loop would pass the barrier
    for k in tl.range(0, T if WHOLE else 1, num_stages=1):
        s = first + k
        t = _time(s, T, REVERSE)
        at_t = ((b * T + t) * heads + head)[:, None]
        read = live
        begins = live
        if RESET:
            begins = tl.load(STARTS + b * T + t, mask=b < B, other=0)[:, None] != 0
            read = live & (begins == 0)
        for j in tl.range(0, D if WHOLE else BD, BD, num_stages=1):
            d = tile * BD + j + tl.arange(0, BD)
            mask = live & (d < D)[None, :]
            b0, b1, b2, b3 = biases(BIAS, head, heads, d, D, CELL, HAS_BIAS)
            x = WX + head * sxh * ALIGN + (b * sxb * ALIGN)[:, None] + t * sxt * ALIGN + d[None, :]
            x0, x1, x2, x3 = inputs(x, sxg * ALIGN, mask, CELL)
            x0, x1, x2, x3 = add(x0, x1, x2, x3, b0, b1, b2, b3, CELL)
            x0, x1, x2, x3 = _recurrent(
                x0, x1, x2, x3, READ + (s % 2) * side + state_b, read, r_h, d, D, CELL, UPCAST, PRECISION, BK
            )
            at = state_b + d[None, :]
            h, c, n, m = load_states(H_IN, C_IN, N_IN, M_IN, at, mask, CELL)
            if RESET:
                h, c, n, m = either(begins, zero, zero, zero, zero, h, c, n, m)
            h, c, n, m = advance(x0, x1, x2, x3, h, c, n, m, CELL, FINE)
            store_states(H_OUT, C_OUT, N_OUT, M_OUT, at, mask, h, c, n, m, CELL)
            rounded = h.to(H.dtype.element_ty)
            tl.store(H + at_t * D + d[None, :], rounded, mask=mask)
            if KEEP:
                tl.store(READ + (1 - s % 2) * side + at, rounded, mask=mask)
        if WHOLE:
            tl.debug_barrier()


@triton.jit(do_not_specialize=["sxb", "sxt", "sxg", "sxh", "B", "T", "heads"])
def replay(
    WX, R, BIAS, READ, STARTS, H0, C0, N0, M0, PLANES, sxb, sxt, sxg, sxh, B, T, heads,
    D: tl.constexpr, CELL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
    RESET: tl.constexpr, REVERSE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The planes of BD features of BB sequences of one head. READ (B, T, H, D): the h that each step read."""
    FINE: tl.constexpr = READ.dtype.element_ty == tl.float32
    GATES: tl.constexpr = 1 if CELL == ELMAN else 3 if CELL == GRU else 4
    PARTS: tl.constexpr = 1 if CELL == ELMAN else 6 if CELL == SLSTM else 5
    TILES: tl.constexpr = (D + BD - 1) // BD
    d = tl.program_id(0) % TILES * BD + tl.arange(0, BD)
    head = tl.cast(tl.program_id(0) // TILES % heads, tl.int64)
    b = tl.cast(tl.program_id(0) // (TILES * heads) * BB + tl.arange(0, BB), tl.int64)
    live = (b < B)[:, None]
    mask = live & (d < D)[None, :]
    b0, b1, b2, b3 = biases(BIAS, head, heads, d, D, CELL, HAS_BIAS)
    zero = tl.zeros([BB, BD], tl.float32)
    h, c, n, m = zero, zero, zero, zero
    if HAS_STATE:
        state = ((b * heads + head) * D)[:, None] + d[None, :]
        h, c, n, m = load_states(H0, C0, N0, M0, state, mask, CELL)
    r_h = R + head * (D * GATES * D)
    k = tl.arange(0, BK)
    r0, r1, r2, r3 = weights_of(r_h + k[:, None] * (GATES * D) + d[None, :], k, d, D, CELL, UPCAST)
    x_b = WX + head * sxh * ALIGN + (b * sxb * ALIGN)[:, None] + d[None, :]
    for s in tl.range(0, T, num_stages=STAGES):
        t = _time(s, T, REVERSE)
        x0, x1, x2, x3 = inputs(x_b + t * sxt * ALIGN, sxg * ALIGN, mask, CELL)
        x0, x1, x2, x3 = add(x0, x1, x2, x3, b0, b1, b2, b3, CELL)
        at_t = ((b * T + t) * heads + head)[:, None]
        if RESET:
            begins = tl.load(STARTS + b * T + t, mask=b < B, other=0)[:, None] != 0
            h, c, n, m = either(begins, zero, zero, zero, zero, h, c, n, m)
        if BK >= D:
            read = _load(READ + at_t * D + k[None, :], live & (k < D)[None, :], UPCAST)
            x0, x1, x2, x3 = products(read, r0, r1, r2, r3, x0, x1, x2, x3, CELL, PRECISION)
        else:
            x0, x1, x2, x3 = _recurrent(
                x0, x1, x2, x3, READ + at_t * D, live, r_h, d, D, CELL, UPCAST, PRECISION, BK
            )
        p0, p1, p2, p3, p4, p5, h, c, n, m = advance_planes(x0, x1, x2, x3, h, c, n, m, CELL, FINE)
        p = PLANES + at_t * (PARTS * D) + d[None, :]
        tl.store(p, p0, mask=mask)
        if CELL != ELMAN:
            tl.store(p + D, p1, mask=mask)
            tl.store(p + 2 * D, p2, mask=mask)
            tl.store(p + 3 * D, p3, mask=mask)
            tl.store(p + 4 * D, p4, mask=mask)
        if CELL == SLSTM:
            tl.store(p + 5 * D, p5, mask=mask)


@triton.jit(do_not_specialize=["sxb", "sxt", "sxg", "sxh", "B", "T", "heads", "last", "clip"])
def backward_tiled(
    PLANES, R, STARTS, DH, DIRECT, DC, DN, MU_, DWX, DG, sxb, sxt, sxg, sxh, B, T, heads, last, clip,
    D: tl.constexpr, CELL: tl.constexpr, HAS_DH: tl.constexpr, HAS_STATE: tl.constexpr, MU: tl.constexpr,
    CLIP: tl.constexpr, WHOLE: tl.constexpr, RESET: tl.constexpr, REVERSE: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Step `last` of BD features, or WHOLE: all steps and features, of BB sequences of one head.

    WHOLE: from step `last` to step -1, which is what the first one sends back to the state before it. DIRECT,
    DC, DN, MU_ (B, H, D): gradients of the states after the step, but for what passes through r; each element
    belongs to one program.
    """
    FINE: tl.constexpr = DWX.dtype.element_ty == tl.float32
    GATES: tl.constexpr = 1 if CELL == ELMAN else 3 if CELL == GRU else 4
    PARTS: tl.constexpr = 1 if CELL == ELMAN else 6 if CELL == SLSTM else 5
    TILES: tl.constexpr = 1 if WHOLE else (D + BD - 1) // BD
    tile = tl.program_id(0) % TILES
    head = tl.cast(tl.program_id(0) // TILES % heads, tl.int64)
    b = tl.cast(tl.program_id(0) // (TILES * heads) * BB + tl.arange(0, BB), tl.int64)
    live = (b < B)[:, None]
    state_b = ((b * heads + head) * D)[:, None]
    zero = tl.zeros([BB, BD], tl.float32)
    x_b = DWX + head * sxh * ALIGN + (b * sxb * ALIGN)[:, None]
    r_h = R + head * (D * GATES * D)
    # fetching ahead of this loop would pass the barrier
    for k in tl.range(0, (last + 2 if HAS_STATE else last + 1) if WHOLE else 1, num_stages=1):
        s = last - k
        t, later = _time(s, T, REVERSE), _time(s + 1, T, REVERSE)
        at_t, at_later = ((b * T + t) * heads + head)[:, None], ((b * T + later) * heads + head)[:, None]
        for j in tl.range(0, D if WHOLE else BD, BD, num_stages=1):
            d = tile * BD + j + tl.arange(0, BD)
            mask = live & (d < D)[None, :]
            at = state_b + d[None, :]
            # only the GRU has a second way from h to h, else this is the gradient of the last state
            given = mask
            if CELL != GRU:
                given = (b < tl.where(s == T - 1, B, 0))[:, None] & (d < D)[None, :]
            dh = tl.load(DIRECT + at, mask=given, other=0.0)
            if s < T - 1:
                through = _back(
                    x_b + later * sxt * ALIGN, sxg * ALIGN, DG, at_later * D, live, r_h, d, D, CELL, UPCAST,
                    PRECISION, BB, BD, BK,
                )  # fmt: skip
                if CLIP:
                    through = tl.minimum(tl.maximum(through, -clip), clip)
                if RESET:
                    begins = tl.load(STARTS + b * T + later, mask=b < B, other=0)[:, None] != 0
                    through = tl.where(begins, 0.0, through)
                dh += through
            if s < 0:
                tl.store(DIRECT + at, dh, mask=mask)
            else:
                dc, dn, mu = dh, dh, dh
                if CELL <= LSTM:
                    dc = tl.load(DC + at, mask=mask, other=0.0)
                if CELL == SLSTM:
                    dn = tl.load(DN + at, mask=mask, other=0.0)
                    mu = tl.load(MU_ + at, mask=mask, other=0.0)
                if HAS_DH:
                    dh += tl.load(DH + at_t * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
                p0, p1, p2, p3, p4, p5 = load_planes(PLANES + at_t * (PARTS * D) + d[None, :], mask, D, CELL)
                d0, d1, d2, d3, direct, dc, dn, mu = retreat(
                    p0, p1, p2, p3, p4, p5, dh, dc, dn, mu, s == 0, CELL, MU, FINE
                )
                gates = x_b + t * sxt * ALIGN + d[None, :]
                store_gates(gates, sxg * ALIGN, mask, d0, d1, d2, d3, CELL)
                if RESET:
                    begins = tl.load(STARTS + b * T + t, mask=b < B, other=0)[:, None] != 0
                    direct, dc, dn, mu = either(begins, zero, zero, zero, zero, direct, dc, dn, mu)
                if CELL == GRU:
                    tl.store(DG + at_t * D + d[None, :], d0.to(DG.dtype.element_ty), mask=mask)
                    tl.store(DIRECT + at, direct, mask=mask)
                if CELL <= LSTM:
                    tl.store(DC + at, dc, mask=mask)
                if CELL == SLSTM:
                    tl.store(DN + at, dn, mask=mask)
                    tl.store(MU_ + at, mu, mask=mask)
        if WHOLE:
            tl.debug_barrier()
