"""Triton kernels of the mLSTM's gates: sums, stabiliser, weights, and the gradients of both gates.

Everything here is one number a step. Sums and their differences are float64: the weight exp(u_s - M_t) of the
formulas in `mlstm_chunkwise` is a small difference of sums that grow with the chunk.

`gates` writes one row of float32 numbers a quantity, (N, rows, T), the steps in the order in which they are
run (`reverse` is nothing but the address from which a step is read). u and M are in units of log 2, so that
the matrix kernels need exp2 only, and M has log2(scale) taken off it: exp2(u_s - M_t) holds the scale of
q . k. For float32 inputs u and M are kept as a whole number and the rest of it.

Shapes: B batch, H heads, N = B * H, T steps, chunks of L steps. A program is one chunk of one head.
"""

import triton
import triton.language as tl

# the rows, in order; the last ones only where they are asked for
U = tl.constexpr(0)
M = tl.constexpr(1)
START = tl.constexpr(2)  # weight of the chunk's first state in h_t, the scale included
FLOOR = tl.constexpr(3)  # exp(-m_t)
WRITE = tl.constexpr(4)  # weight of step s in the chunk's last state
SOURCE = tl.constexpr(5)  # step of the chunk that attains M_t; -1: the chunk's first m, -2: a reset
DEN = tl.constexpr(6)  # s_t, written by the matrix kernel
U_LOW = tl.constexpr(7)
M_LOW = tl.constexpr(8)
SEGMENT = tl.constexpr(9)  # sequences begun since the chunk's first step

# rows of the backward
DELTA = tl.constexpr(0)  # gradient of s_t times the divisor of h_t
INVERSE = tl.constexpr(1)  # 1 over the divisor
GAP = tl.constexpr(2)  # <dh_t, h_t> over the divisor
SHIFTED = tl.constexpr(3)  # M_t (its low part where it has one) plus log2 of the divisor

LOG2_E = tl.constexpr(1.4426950408889634)
_MIN_LOG_F = tl.constexpr(-1e4)
# u and M of half types are single float32 numbers, of which each closed gate would take precision:
# just enough for zero beside memories that are exp(40) times smaller
_MIN_LOG_F_HALF = tl.constexpr(-128.0)
_MIN_LOG_I = tl.constexpr(-1e30)


@triton.jit
def _log_sigmoid(x):
    e = tl.exp(-tl.abs(x))
    y = 1.0 + e
    # log(1 + e) to the last bit: the rounding of 1 + e is divided out
    log1p = tl.where(y == 1.0, e, tl.log(y) * (e / (y - 1.0)))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def _exp2(x):
    """exp2 of a float64, as float32: an exact power of two times that of a number in [0, 1)."""
    whole = tl.floor(x)
    return tl.exp2(whole.to(tl.float32)) * tl.exp2((x - whole).to(tl.float32))


@triton.jit
def _sum_within(key1, x1, key2, x2):
    return key2, tl.where(key1 == key2, x1 + x2, x2)


@triton.jit
def _max_within(key1, x1, j1, key2, x2, j2):
    older = (key1 == key2) & (x1 > x2)
    return key2, tl.where(older, x1, x2), tl.where(older, j1, j2)


@triton.jit
def _then(g1, x1, g2, x2):
    """m -> max(m + g1, x1), then m -> max(m + g2, x2)."""
    return g1 + g2, tl.maximum(x1 + g2, x2)


@triton.jit
def _head(n, heads, stride_b, stride_h):
    return tl.cast(n // heads, tl.int64) * stride_b + tl.cast(n % heads, tl.int64) * stride_h


@triton.jit
def _scan(
    I, F, STARTS, n, c, heads, sib, sih, sit, sfb, sfh, sft, T, L,
    EXPONENTIAL: tl.constexpr, REVERSE: tl.constexpr, RESET: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each step of chunk c: sequence, sum of log f, u (natural log), its running maximum and its place."""
    j = tl.arange(0, BLOCK)
    live = (j < L) & (c * L + j < T)
    t = tl.cast(T - 1 - c * L - j if REVERSE else c * L + j, tl.int64)
    i = tl.load(I + _head(n, heads, sib, sih) + t * sit, mask=live, other=0.0).to(tl.float32)
    f = tl.load(F + _head(n, heads, sfb, sfh) + t * sft, mask=live, other=0.0).to(tl.float32)
    least = _MIN_LOG_F if SPLIT else _MIN_LOG_F_HALF
    log_f = _log_sigmoid(f)
    log_f = tl.where(live, tl.where(log_f < least, least, log_f), 0.0).to(tl.float64)
    if EXPONENTIAL:
        log_i = tl.where(i < _MIN_LOG_I, _MIN_LOG_I, i)
    else:
        log_i = _log_sigmoid(i)
        log_i = tl.where(log_i < least, least, log_i)
    if RESET:
        starts = tl.load(STARTS + tl.cast(n // heads, tl.int64) * T + t, mask=live, other=0).to(tl.int32)
        segment = tl.cumsum(starts, 0)
        _, b = tl.associative_scan((segment, log_f), 0, _sum_within)
    else:
        segment = tl.zeros_like(j)
        b = tl.cumsum(log_f, 0)
    u = tl.where(live, log_i.to(tl.float64) - b, float("-inf"))
    top, source = u, j
    if EXPONENTIAL:
        _, top, source = tl.associative_scan((segment, u, j), 0, _max_within)
    return j, live, segment, b, u, top, source


@triton.jit(do_not_specialize=["heads", "sib", "sih", "sit", "sfb", "sfh", "sft", "T", "L", "NC"])
def summarise_chunks(
    I, F, STARTS, DECAY, LEVEL, heads, sib, sih, sit, sfb, sfh, sft, T, L, NC,
    REVERSE: tl.constexpr, RESET: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a chunk does to m (exponential gate): m -> max(m + decay, level), both (N, NC) float64."""
    c = tl.program_id(0) % NC
    n = tl.program_id(0) // NC
    j, _, segment, b, _, top, _ = _scan(
        I, F, STARTS, n, c, heads, sib, sih, sit, sfb, sfh, sft, T, L, True, REVERSE, RESET, SPLIT, BLOCK
    )
    last = j == tl.minimum(L, T - c * L) - 1
    b = tl.sum(tl.where(last, b, 0.0), 0)
    top = tl.sum(tl.where(last, top, 0.0), 0)
    begun = tl.sum(tl.where(last, segment, 0), 0) > 0
    tl.store(DECAY + tl.cast(n, tl.int64) * NC + c, tl.where(begun, float("-inf"), b))
    tl.store(LEVEL + tl.cast(n, tl.int64) * NC + c, b + tl.where(begun, tl.maximum(top, 0.0), top))


@triton.jit(do_not_specialize=["NC"])
def chain_stabiliser(DECAY, LEVEL, M0, MARKS, NC, HAS_M0: tl.constexpr, BLOCK: tl.constexpr):
    """m at the start of every chunk and after the last one, MARKS[n, 0, :] of (N, 2, NC + 1)."""
    n = tl.cast(tl.program_id(0), tl.int64)
    marks = MARKS + n * 2 * (NC + 1)
    j = tl.arange(0, BLOCK)
    if HAS_M0:
        m = tl.load(M0 + n)
    else:
        m = tl.full((), 0.0, tl.float32)
    tl.store(marks, m)
    carried = m.to(tl.float64)
    for c0 in range(0, NC, BLOCK):
        live = c0 + j < NC
        decay = tl.load(DECAY + n * NC + c0 + j, mask=live, other=0.0)
        level = tl.load(LEVEL + n * NC + c0 + j, mask=live, other=float("-inf"))
        decay, level = tl.associative_scan((decay, level), 0, _then)
        ms = tl.maximum(decay + carried, level)
        tl.store(marks + 1 + c0 + j, ms.to(tl.float32), mask=live)
        carried = tl.sum(tl.where(j == BLOCK - 1, ms, 0.0), 0)


@triton.jit(do_not_specialize=["heads", "sib", "sih", "sit", "sfb", "sfh", "sft", "T", "L", "NC", "rows_n"])
def gates(
    I, F, STARTS, M0, ROWS, MARKS, heads, sib, sih, sit, sfb, sfh, sft, T, L, NC, rows_n, log2_scale,
    EXPONENTIAL: tl.constexpr, REVERSE: tl.constexpr, RESET: tl.constexpr, HAS_M0: tl.constexpr,
    CHAINED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of a chunk, and MARKS (N, 2, NC + 1): m at chunk starts, and `keep`.

    `keep` is the weight of a chunk's first state in its last.

    CHAINED: `chain_stabiliser` has written m. Otherwise there is one chunk, whose m are written here.
    """
    c = tl.program_id(0) % NC
    n = tl.program_id(0) // NC
    j, live, segment, b, u, top, source = _scan(
        I,
        F,
        STARTS,
        n,
        c,
        heads,
        sib,
        sih,
        sit,
        sfb,
        sfh,
        sft,
        T,
        L,
        EXPONENTIAL,
        REVERSE,
        RESET,
        SPLIT,
        BLOCK,
    )
    marks = MARKS + tl.cast(n, tl.int64) * 2 * (NC + 1) + c
    last = j == tl.minimum(L, T - c * L) - 1
    b_last = tl.sum(tl.where(last, b, 0.0), 0)
    segment_last = tl.sum(tl.where(last, segment, 0), 0)
    if EXPONENTIAL:
        if CHAINED:
            m = tl.load(marks)
        elif HAS_M0:
            m = tl.load(M0 + n)
        else:
            m = tl.full((), 0.0, tl.float32)
        m = m.to(tl.float64)
        initial = tl.where(segment == 0, m, 0.0)
        source = tl.where(initial > top, tl.where(segment == 0, -1, -2), source)
        top = tl.maximum(top, initial)
        if CHAINED:
            m_next = tl.load(marks + 1)
        else:
            m_next = tl.sum(tl.where(last, b + top, 0.0), 0).to(tl.float32)
            tl.store(marks, m.to(tl.float32))
            tl.store(marks + 1, m_next)
        unit = m_next.to(tl.float64) - b_last
        keep = _exp2((m - unit) * LOG2_E)
        start = _exp2((initial - top) * LOG2_E + log2_scale)
        floor = _exp2((-b - top) * LOG2_E)
        write = _exp2((u - unit) * LOG2_E)
    else:
        top = -b
        keep = _exp2(b_last * LOG2_E)
        start = _exp2(b * LOG2_E + log2_scale)
        floor = tl.full([BLOCK], 1.0, tl.float32)
        write = _exp2((u + b_last) * LOG2_E)
    if RESET:
        start = tl.where(segment == 0, start, 0.0)
        write = tl.where(segment == segment_last, write, 0.0)
        keep = tl.where(segment_last == 0, keep, 0.0)
    tl.store(marks + NC + 1, keep)

    row = ROWS + tl.cast(n, tl.int64) * rows_n + c * L + j
    u *= LOG2_E
    top = top * LOG2_E - log2_scale
    if SPLIT:
        u_whole = tl.floor(u).to(tl.float32)
        top_whole = tl.floor(top).to(tl.float32)
        tl.store(row + U * T, u_whole, mask=live)
        tl.store(row + M * T, top_whole, mask=live)
        tl.store(row + U_LOW * T, (u - u_whole.to(tl.float64)).to(tl.float32), mask=live)
        tl.store(row + M_LOW * T, (top - top_whole.to(tl.float64)).to(tl.float32), mask=live)
    else:
        tl.store(row + U * T, u.to(tl.float32), mask=live)
        tl.store(row + M * T, top.to(tl.float32), mask=live)
    tl.store(row + START * T, start, mask=live)
    tl.store(row + FLOOR * T, floor, mask=live)
    tl.store(row + WRITE * T, write, mask=live)
    if EXPONENTIAL:
        tl.store(row + SOURCE * T, source.to(tl.float32), mask=live)
    if RESET:
        tl.store(row + SEGMENT * T, segment.to(tl.float32), mask=live)


@triton.jit(do_not_specialize=["T", "L", "NC", "rows_n", "grads_n", "eps"])
def chain_gradient(
    ROWS, GRAD_ROWS, MU_LAST, MU, T, L, NC, rows_n, grads_n, eps,
    NORMALIZE: tl.constexpr, HAS_MU_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of m at the start of every chunk and after the last one, (N, NC + 1), for fixed C exp(m)."""
    n = tl.cast(tl.program_id(0), tl.int64)
    j = tl.arange(0, BLOCK)
    if HAS_MU_LAST:
        mu = tl.load(MU_LAST + n)
    else:
        mu = tl.full((), 0.0, tl.float32)
    tl.store(MU + n * (NC + 1) + NC, mu)
    for back in range(0, NC):
        c = NC - 1 - back
        size = tl.minimum(L, T - c * L)
        at = n * rows_n + SOURCE * T + c * L + j
        initial = tl.load(ROWS + at, mask=j < size, other=0.0) == -1.0
        here = tl.where(j == size - 1, mu, 0.0)
        if NORMALIZE:
            gap = tl.load(GRAD_ROWS + n * grads_n + GAP * T + c * L + j, mask=j < size, other=0.0)
            here -= eps * gap
        mu = tl.sum(tl.where(initial, here, 0.0), 0)
        tl.store(MU + n * (NC + 1) + c, mu)


@triton.jit(
    do_not_specialize=[
        "heads", "sib", "sih", "sit", "sfb", "sfh", "sft", "soib", "soih", "soit", "sofb", "sofh", "soft",
        "T", "L", "NC", "N", "rows_n", "grads_n", "eps",
    ]
)  # fmt: skip
def grad_gates(
    I, F, DI, DF, ROWS, GRAD_ROWS, QDQ, KDK, END, MU, heads, sib, sih, sit, sfb, sfh, sft,
    soib, soih, soit, sofb, sofh, soft, T, L, NC, N, rows_n, grads_n, eps, PARTS_Q: tl.constexpr,
    PARTS_K: tl.constexpr, EXPONENTIAL: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr,
    RESET: tl.constexpr, HAS_END: tl.constexpr, HAS_MU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """di and df of a chunk, from q . dq and k . dk (parts, N, T), float32.

    END (N, NC): <C, dC> + <n, dn> at the chunk's end. MU (N, NC + 1): see `chain_gradient`; None is zero.
    """
    c = tl.program_id(0) % NC
    n = tl.cast(tl.program_id(0) // NC, tl.int64)
    size = tl.minimum(L, T - c * L)
    back = tl.arange(0, BLOCK)  # from the chunk's end: a sum up to here is one over all later steps
    live = back < size
    j = size - 1 - back
    r = c * L + j
    qdq = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS_Q):
        qdq += tl.load(QDQ + (part * N + n) * T + r, mask=live, other=0.0)
    dlog_i = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS_K):
        dlog_i += tl.load(KDK + (part * N + n) * T + r, mask=live, other=0.0)
    x = qdq.to(tl.float64) - dlog_i.to(tl.float64)
    if EXPONENTIAL and (HAS_MU or NORMALIZE):
        mu = tl.zeros([BLOCK], tl.float32)
        if HAS_MU:
            mu += tl.where(back == 0, tl.load(MU + n * (NC + 1) + c + 1), 0.0)
        if NORMALIZE:
            mu -= eps * tl.load(GRAD_ROWS + n * grads_n + GAP * T + r, mask=live, other=0.0)
        source = tl.load(ROWS + n * rows_n + SOURCE * T + r, mask=live, other=-3.0).to(tl.int32)
        # the steps whose maximum is j follow each other from j on: their sum is complete at j
        _, run = tl.associative_scan((source, mu), 0, _sum_within)
        to_step = tl.where(source == j, run, 0.0)
        dlog_i += to_step
        x += (mu - to_step).to(tl.float64)
    if HAS_END:
        x += tl.where(back == 0, tl.load(END + n * NC + c), 0.0).to(tl.float64)
    if RESET:
        segment = tl.load(ROWS + n * rows_n + SEGMENT * T + r, mask=live, other=-1.0).to(tl.int32)
        _, x = tl.associative_scan((segment, x), 0, _sum_within)
    else:
        x = tl.cumsum(x, 0)
    t = tl.cast(T - 1 - r if REVERSE else r, tl.int64)
    f = tl.load(F + _head(n, heads, sfb, sfh) + t * sft, mask=live, other=0.0).to(tl.float32)
    df = x.to(tl.float32) / (1.0 + tl.exp(f))
    if not EXPONENTIAL:
        i = tl.load(I + _head(n, heads, sib, sih) + t * sit, mask=live, other=0.0).to(tl.float32)
        dlog_i = dlog_i / (1.0 + tl.exp(i))
    at_i = DI + _head(n, heads, soib, soih) + t * soit
    at_f = DF + _head(n, heads, sofb, sofh) + t * soft
    tl.store(at_i, dlog_i.to(DI.dtype.element_ty), mask=live)
    tl.store(at_f, df.to(DF.dtype.element_ty), mask=live)
