"""Triton kernels of the mLSTM: matrix products between, across and inside chunks, forward and backward.

The two levels of TFLA (arXiv 2503.14376): `carry` walks the chunks of a block of the memory C and keeps what
it was at each chunk's start; the other kernels do one tile of one chunk each, over all tiles that it sees. A
sequence that is one chunk needs no `carry`. The backward is the gradient of the formulas in
`mlstm_chunkwise`, of which `mlstm_triton_gates` prepares everything that is one number a step (its rows are
read here). With P_ts = scale (q_t . k_s) exp(u_s - M_t), G_t = dh_t / divisor_t and delta_t the gradient of
the normaliser s_t:

    dS_ts = (dh_t . v_s + delta_t divisor_t) scale exp(u_s - M_t - log divisor_t)
    dQ = dS K + start (G C^T + delta n^T)      dC_before = keep dC + (start Q)^T G
    dK = dS^T Q + write (V dC^T + dn^T)        dn_before = keep dn + (start Q)^T delta
    dV = P^T G + write K dC

Shapes: B batch, H heads, N = B * H, T steps, chunks of L steps, NC chunks, Dk and Dv head sizes. Tiles: BT
steps of the rows, BS steps of the columns, BK and BV of the head sizes. The last axis of every tensor has
stride 1. Steps are counted in the order in which they are run; only addresses know of `reverse`. A loop adds
one product to an accumulator in an iteration: two of them were seen to be compiled wrongly on Blackwell.
"""

import triton
import triton.language as tl

from .mlstm_triton_gates import (
    DELTA,
    DEN,
    FLOOR,
    GAP,
    INVERSE,
    M_LOW,
    SEGMENT,
    SHIFTED,
    START,
    U_LOW,
    WRITE,
    M,
    U,
    _head,
)


@triton.jit
def _tile(
    X, r0, end, T, stride, d0, D: tl.constexpr, REVERSE: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Steps r0, ... and features d0, ... of X, whose batch and head are chosen; zero from step `end` on."""
    j = tl.arange(0, ROWS)
    d = d0 + tl.arange(0, COLUMNS)
    first = tl.cast(T - 1 - r0 if REVERSE else r0, tl.int64) * stride
    step = -stride if REVERSE else stride
    mask = (r0 + j < end)[:, None]
    if D % COLUMNS != 0:
        mask = mask & (d < D)[None, :]
    x = tl.load(X + first + j[:, None] * step + d[None, :], mask=mask, other=0.0)
    # the interpreter computes garbage from bfloat16
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(
    X, x, r0, end, T, stride, d0, D: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, ROWS)
    d = d0 + tl.arange(0, COLUMNS)
    first = tl.cast(T - 1 - r0 if REVERSE else r0, tl.int64) * stride
    step = -stride if REVERSE else stride
    mask = (r0 + j < end)[:, None]
    if D % COLUMNS != 0:
        mask = mask & (d < D)[None, :]
    tl.store(X + first + j[:, None] * step + d[None, :], x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def _read_block(X, k0, v0, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """A block of one memory (Dk, Dv), float32."""
    k = k0 + tl.arange(0, BK)
    v = v0 + tl.arange(0, BV)
    at = X + k[:, None] * DV + v[None, :]
    # a mask costs registers and keeps loads from being asynchronous
    if DK % BK == 0 and DV % BV == 0:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(k < DK)[:, None] & (v < DV)[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def _write_block(X, x, k0, v0, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    k = k0 + tl.arange(0, BK)
    v = v0 + tl.arange(0, BV)
    at = X + k[:, None] * DV + v[None, :]
    if DK % BK == 0 and DV % BV == 0:
        tl.store(at, x.to(X.dtype.element_ty))
    else:
        tl.store(at, x.to(X.dtype.element_ty), mask=(k < DK)[:, None] & (v < DV)[None, :])


@triton.jit
def _row(rows, AT: tl.constexpr, T, r, end):
    """One row's numbers of steps r; anything from `end` on.

    A mask instead would take predicates, of which a thread has seven: kernels spilled over it.
    """
    return tl.load(rows + AT * T + tl.minimum(r, end - 1))


@triton.jit
def _gates_of(
    rows, T, r, end, AT: tl.constexpr, LOW: tl.constexpr, SPLIT: tl.constexpr, RESET: tl.constexpr
):  # fmt: skip
    """u or M of steps r, its low part and the steps' sequences (both anything where there are none)."""
    x = tl.load(rows + AT * T + r, mask=r < end, other=0.0)
    low = x
    segment = x
    if SPLIT:
        low = tl.load(rows + LOW * T + r, mask=r < end, other=0.0)
    if RESET:
        segment = tl.load(rows + SEGMENT * T + r, mask=r < end, other=-1.0)
    return x, low, segment


@triton.jit
def _gate_tile(
    m, m_low, of_t, t, u, u_low, of_s, s, SPLIT: tl.constexpr, RESET: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """scale exp(u_s - M_t) where t sees s, else 0: (t, s), or (s, t) when TRANSPOSED."""
    at: tl.constexpr = 0 if TRANSPOSED else 1
    x = tl.expand_dims(u, 1 - at) - tl.expand_dims(m, at)
    if SPLIT:
        x += tl.expand_dims(u_low, 1 - at) - tl.expand_dims(m_low, at)
    sees = tl.expand_dims(s, 1 - at) <= tl.expand_dims(t, at)
    if RESET:
        sees = sees & (tl.expand_dims(of_s, 1 - at) == tl.expand_dims(of_t, at))
    return tl.exp2(tl.where(sees, x, float("-inf")))


@triton.jit(do_not_specialize=["heads", "T", "L", "NC", "NT", "rows_n", "eps"])
def forward_tile(
    Q, K, V, H, ROWS, C, N, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt, shb, shh, sht,
    heads, T, L, NC, NT, rows_n, eps, DK: tl.constexpr, DV: tl.constexpr, FIRST_STATE: tl.constexpr,
    NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, RESET: tl.constexpr, SPLIT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """BT steps of BV features of h, and their s_t.

    C (N, NC, Dk, Dv) and N (N, NC, Dk): memory at chunk starts. FIRST_STATE: the first chunk that has one, -1
    when none has.
    """
    jv = tl.program_id(0) % ((DV + BV - 1) // BV)
    tile = tl.program_id(0) // ((DV + BV - 1) // BV)
    n = tile // (NC * NT)
    # the last tiles of a chunk have the most to do: start them first
    tile = NC * NT - 1 - tile % (NC * NT)
    c = tile // NT
    end = tl.minimum(c * L + L, T)
    r0 = c * L + (tile % NT) * BT
    if r0 >= end:
        return
    q_n, k_n = Q + _head(n, heads, sqb, sqh), K + _head(n, heads, skb, skh)
    v_n, h_n = V + _head(n, heads, svb, svh), H + _head(n, heads, shb, shh)
    rows = ROWS + tl.cast(n, tl.int64) * rows_n
    t = r0 + tl.arange(0, BT)
    v0 = jv * BV
    ONE_K: tl.constexpr = BK >= DK

    acc = tl.zeros([BT, BV], tl.float32)
    den = tl.zeros([BT], tl.float32)
    if ONE_K:
        q = _tile(q_n, r0, end, T, sqt, 0, DK, REVERSE, UPCAST, BT, BK)
    if FIRST_STATE >= 0:  # noqa: SIM102 - known when compiled, the chunk is not
        if c >= FIRST_STATE:
            chunk = tl.cast(n, tl.int64) * NC + c
            for k0 in tl.range(0, DK, BK, disable_licm=True):
                q_k = q if ONE_K else _tile(q_n, r0, end, T, sqt, k0, DK, REVERSE, UPCAST, BT, BK)
                memory = _read_block(C + chunk * DK * DV, k0, v0, DK, DV, BK, BV).to(q_k.dtype)
                acc = tl.dot(q_k, memory, acc, input_precision=PRECISION)
                if NORMALIZE:
                    dk = k0 + tl.arange(0, BK)
                    n_k = tl.load(N + chunk * DK + dk, mask=dk < DK, other=0.0)
                    den += tl.sum(q_k.to(tl.float32) * n_k[None, :], 1)
            start = tl.load(rows + START * T + t, mask=t < end, other=0.0)
            acc *= start[:, None]
            den *= start

    m, m_low, of_t = _gates_of(rows, T, t, end, M, M_LOW, SPLIT, RESET)
    for s0 in tl.range(c * L, tl.minimum(r0 + BT, end), BS, disable_licm=True):
        s = s0 + tl.arange(0, BS)
        u, u_low, of_s = _gates_of(rows, T, s, end, U, U_LOW, SPLIT, RESET)
        if ONE_K:
            k = _tile(k_n, s0, end, T, skt, 0, DK, REVERSE, UPCAST, BS, BK)
            p = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            p = tl.zeros([BT, BS], tl.float32)
            for k0 in tl.range(0, DK, BK, disable_licm=True):
                q_k = _tile(q_n, r0, end, T, sqt, k0, DK, REVERSE, UPCAST, BT, BK)
                k = _tile(k_n, s0, end, T, skt, k0, DK, REVERSE, UPCAST, BS, BK)
                p = tl.dot(q_k, tl.trans(k), p, input_precision=PRECISION)
        p *= _gate_tile(m, m_low, of_t, t, u, u_low, of_s, s, SPLIT, RESET, False)
        if NORMALIZE:
            den += tl.sum(p, 1)
        v = _tile(v_n, s0, end, T, svt, v0, DV, REVERSE, UPCAST, BS, BV)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

    divisor = _row(rows, FLOOR, T, t, end)
    if NORMALIZE:
        divisor = tl.maximum(tl.abs(den), divisor) + eps
        if jv == 0:
            tl.store(rows + DEN * T + t, den, mask=t < end)
    _store(h_n, acc / divisor[:, None], r0, end, T, sht, v0, DV, REVERSE, BT, BV)


@triton.jit(do_not_specialize=["heads", "T", "L", "NC", "rows_n", "grads_n"])
def carry(
    X, Y, ROWS, GRAD_ROWS, MARKS, C0, N0, C, N, C_LAST, N_LAST, C_FORWARD, N_FORWARD, PRODUCT,
    sxb, sxh, sxt, syb, syh, syt, heads, T, L, NC, rows_n, grads_n, DK: tl.constexpr, DV: tl.constexpr,
    BACKWARD: tl.constexpr, NORMALIZE: tl.constexpr, HAS_C0: tl.constexpr, HAS_N0: tl.constexpr,
    KEEP: tl.constexpr, LAST: tl.constexpr, PRODUCTS: tl.constexpr, REVERSE: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Memory from chunk to chunk, a (BK, BV) block of it.

    Forward: X = k, Y = v, from the first chunk to the last. BACKWARD: X = q, Y = dh, the gradient of the
    memory from the last chunk to the first. KEEP stores into C (N, NC, Dk, Dv) and N (N, NC, Dk) what it is
    before a chunk is walked: C_c, or the gradient of C_{c + 1}. LAST stores what is left after all of them,
    float32. PRODUCTS stores this block's part of <C, dC> + <n, dn> at each chunk's end, (N, NC, blocks).
    """
    blocks: tl.constexpr = ((DK + BK - 1) // BK) * ((DV + BV - 1) // BV)
    block = tl.program_id(0) % blocks
    n = tl.cast(tl.program_id(0) // blocks, tl.int64)
    k0 = (block // ((DV + BV - 1) // BV)) * BK
    jv = block % ((DV + BV - 1) // BV)
    v0 = jv * BV
    x_n = X + _head(n, heads, sxb, sxh)
    y_n = Y + _head(n, heads, syb, syh)
    rows = ROWS + n * rows_n
    if BACKWARD:
        grad_rows = GRAD_ROWS + n * grads_n
    dk = k0 + tl.arange(0, BK)
    of_n = tl.where(jv == 0, DK, 0)  # one of the blocks of the same features has n

    acc = tl.zeros([BK, BV], tl.float32)
    n_acc = tl.zeros([BK], tl.float32)
    if HAS_C0:
        acc = _read_block(C0 + n * DK * DV, k0, v0, DK, DV, BK, BV)
    if HAS_N0:
        n_acc = tl.load(N0 + n * DK + dk, mask=dk < DK, other=0.0)
    # one loop over all tiles, which can be pipelined across chunks
    tiles = tl.cdiv(L, BT)
    for walked in tl.range(0, NC * tiles, disable_licm=True):
        c = NC - 1 - walked // tiles if BACKWARD else walked // tiles
        chunk = n * NC + c
        first = walked % tiles == 0
        if KEEP:  # noqa: SIM102
            if first:
                _write_block(C + chunk * DK * DV, acc, k0, v0, DK, DV, BK, BV)
                tl.store(N + chunk * DK + dk, n_acc, mask=dk < of_n)
        if PRODUCTS:  # noqa: SIM102
            if first:
                # what follows the last chunk is not kept
                after = n * NC + tl.minimum(c + 1, NC - 1)
                memory = _read_block(C_FORWARD + after * DK * DV, k0, v0, DK, DV, BK, BV)
                n_memory = tl.load(N_FORWARD + after * DK + dk, mask=dk < of_n, other=0.0)
                product = tl.sum(tl.sum(acc * memory, 1) + n_acc * n_memory, 0)
                tl.store(PRODUCT + chunk * blocks + block, tl.where(c < NC - 1, product, 0.0))
        keep = tl.where(first, tl.load(MARKS + n * 2 * (NC + 1) + NC + 1 + c), 1.0)
        acc *= keep
        n_acc *= keep
        end = tl.minimum(c * L + L, T)
        r0 = c * L + (walked % tiles) * BT
        r = r0 + tl.arange(0, BT)
        x = _tile(x_n, r0, end, T, sxt, k0, DK, REVERSE, UPCAST, BT, BK)
        y = _tile(y_n, r0, end, T, syt, v0, DV, REVERSE, UPCAST, BT, BV)
        if BACKWARD:
            start = _row(rows, START, T, r, end)
            weight = start * _row(grad_rows, INVERSE, T, r, end)
            if NORMALIZE:
                delta = weight * _row(grad_rows, DELTA, T, r, end)
                n_acc += tl.sum(x.to(tl.float32) * delta[:, None], 0)
        else:
            weight = tl.load(rows + WRITE * T + r, mask=r < end, other=0.0)
            n_acc += tl.sum(x.to(tl.float32) * weight[:, None], 0)
        weighted = (x.to(tl.float32) * weight[:, None]).to(y.dtype)
        acc = tl.dot(tl.trans(weighted), y, acc, input_precision=PRECISION)
    if LAST:
        _write_block(C_LAST + n * DK * DV, acc, k0, v0, DK, DV, BK, BV)
        if jv == 0:
            tl.store(N_LAST + n * DK + dk, n_acc, mask=dk < DK)


@triton.jit(do_not_specialize=["heads", "T", "L", "NC", "NT", "rows_n", "grads_n", "eps"])
def grad_q_tile(
    Q, K, V, H, DH, DQ, ROWS, GRAD_ROWS, QDQ, C, N, sqb, sqh, sqt, skb, skh, skt, svb, svh, svt,
    shb, shh, sht, sdb, sdh, sdt, sob, soh, sot, heads, T, L, NC, NT, rows_n, grads_n, eps,
    DK: tl.constexpr, DV: tl.constexpr, FIRST_STATE: tl.constexpr, NORMALIZE: tl.constexpr,
    REVERSE: tl.constexpr, RESET: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BT steps of BK features of dq, and their part of q . dq, QDQ (blocks, N, T).

    The program of the first features also writes what the later kernels need of each step, into GRAD_ROWS.
    """
    NK: tl.constexpr = (DK + BK - 1) // BK
    jk = tl.program_id(0) % NK
    tile = tl.program_id(0) // NK
    heads_all = tl.num_programs(0) // (NK * NC * NT)
    n = tile // (NC * NT)
    tile = NC * NT - 1 - tile % (NC * NT)
    c = tile // NT
    end = tl.minimum(c * L + L, T)
    r0 = c * L + (tile % NT) * BT
    if r0 >= end:
        return
    k0 = jk * BK
    k_n, v_n = K + _head(n, heads, skb, skh), V + _head(n, heads, svb, svh)
    h_n, dh_n = H + _head(n, heads, shb, shh), DH + _head(n, heads, sdb, sdh)
    rows = ROWS + tl.cast(n, tl.int64) * rows_n
    grad_rows = GRAD_ROWS + tl.cast(n, tl.int64) * grads_n
    t = r0 + tl.arange(0, BT)
    ONE_V: tl.constexpr = BV >= DV

    if ONE_V:
        dh = _tile(dh_n, r0, end, T, sdt, 0, DV, REVERSE, UPCAST, BT, BV)
    divisor = tl.load(rows + FLOOR * T + t, mask=t < end, other=1.0)
    delta = tl.zeros([BT], tl.float32)
    if NORMALIZE:
        gap = tl.zeros([BT], tl.float32)
        for v0 in tl.range(0, DV, BV, disable_licm=True):
            dh_v = dh if ONE_V else _tile(dh_n, r0, end, T, sdt, v0, DV, REVERSE, UPCAST, BT, BV)
            h = _tile(h_n, r0, end, T, sht, v0, DV, REVERSE, UPCAST, BT, BV)
            gap += tl.sum(dh_v.to(tl.float32) * h.to(tl.float32), 1)
        den = tl.load(rows + DEN * T + t, mask=t < end, other=0.0)
        delta = tl.where(tl.abs(den) > divisor, tl.where(den > 0.0, -gap, gap), 0.0)
        divisor = tl.maximum(tl.abs(den), divisor) + eps
        if jk == 0:
            tl.store(grad_rows + DELTA * T + t, delta, mask=t < end)
            tl.store(grad_rows + GAP * T + t, gap / divisor, mask=t < end)
    inverse = 1.0 / divisor
    m, m_low, of_t = _gates_of(rows, T, t, end, M, M_LOW, SPLIT, RESET)
    if SPLIT:
        m_low += tl.log2(divisor)
    else:
        m += tl.log2(divisor)
    if jk == 0:
        tl.store(grad_rows + INVERSE * T + t, inverse, mask=t < end)
        tl.store(grad_rows + SHIFTED * T + t, m_low if SPLIT else m, mask=t < end)

    acc = tl.zeros([BT, BK], tl.float32)
    if FIRST_STATE >= 0:  # noqa: SIM102 - known when compiled, the chunk is not
        if c >= FIRST_STATE:
            chunk = tl.cast(n, tl.int64) * NC + c
            for v0 in tl.range(0, DV, BV, disable_licm=True):
                dh_v = dh if ONE_V else _tile(dh_n, r0, end, T, sdt, v0, DV, REVERSE, UPCAST, BT, BV)
                memory = _read_block(C + chunk * DK * DV, k0, v0, DK, DV, BK, BV).to(dh_v.dtype)
                acc = tl.dot(dh_v, tl.trans(memory), acc, input_precision=PRECISION)
            if NORMALIZE:
                dk = k0 + tl.arange(0, BK)
                n_k = tl.load(N + chunk * DK + dk, mask=dk < DK, other=0.0)
                acc += delta[:, None] * n_k[None, :]
            start = tl.load(rows + START * T + t, mask=t < end, other=0.0)
            acc *= (start * inverse)[:, None]

    for s0 in tl.range(c * L, tl.minimum(r0 + BT, end), BS, disable_licm=True):
        s = s0 + tl.arange(0, BS)
        u, u_low, of_s = _gates_of(rows, T, s, end, U, U_LOW, SPLIT, RESET)
        if ONE_V:
            v = _tile(v_n, s0, end, T, svt, 0, DV, REVERSE, UPCAST, BS, BV)
            ds = tl.dot(dh, tl.trans(v), input_precision=PRECISION)
        else:
            ds = tl.zeros([BT, BS], tl.float32)
            for v0 in tl.range(0, DV, BV, disable_licm=True):
                dh_v = _tile(dh_n, r0, end, T, sdt, v0, DV, REVERSE, UPCAST, BT, BV)
                v = _tile(v_n, s0, end, T, svt, v0, DV, REVERSE, UPCAST, BS, BV)
                ds = tl.dot(dh_v, tl.trans(v), ds, input_precision=PRECISION)
        if NORMALIZE:
            ds += delta[:, None]
        ds *= _gate_tile(m, m_low, of_t, t, u, u_low, of_s, s, SPLIT, RESET, False)
        k = _tile(k_n, s0, end, T, skt, k0, DK, REVERSE, UPCAST, BS, BK)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)

    _store(DQ + _head(n, heads, sob, soh), acc, r0, end, T, sot, k0, DK, REVERSE, BT, BK)
    q = _tile(Q + _head(n, heads, sqb, sqh), r0, end, T, sqt, k0, DK, REVERSE, UPCAST, BT, BK)
    part = (tl.cast(jk, tl.int64) * heads_all + n) * T
    tl.store(QDQ + part + t, tl.sum(acc * q.to(tl.float32), 1), mask=t < end)


@triton.jit(do_not_specialize=["heads", "T", "L", "NC", "NT", "rows_n", "grads_n", "last_state"])
def grad_kv_tile(
    Q, K, V, DH, DK_OUT, DV_OUT, ROWS, GRAD_ROWS, KDK, DC, DN, sqb, sqh, sqt, skb, skh, skt,
    svb, svh, svt, sdb, sdh, sdt, sob, soh, sot, spb, sph, spt, heads, T, L, NC, NT, rows_n, grads_n,
    last_state, DK: tl.constexpr, DV: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    CARRIED: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr, RESET: tl.constexpr,
    SPLIT: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BS steps of dk (BK features), of dv (BV features), or of both where each is one block.

    DC, DN: gradient of the memory at chunk ends, as `carry` keeps it, if CARRIED; chunks up to `last_state`
    have one. KDK (blocks, N, T): part of k . dk.
    """
    NK: tl.constexpr = (DK + BK - 1) // BK
    NV: tl.constexpr = (DV + BV - 1) // BV
    parts: tl.constexpr = (1 if WANT_V else NK) if WANT_K else NV
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts
    heads_all = tl.num_programs(0) // (parts * NC * NT)
    n = tile // (NC * NT)
    tile = tile % (NC * NT)
    c = tile // NT
    end = tl.minimum(c * L + L, T)
    s0 = c * L + (tile % NT) * BS
    if s0 >= end:
        return
    q_n, k_n = Q + _head(n, heads, sqb, sqh), K + _head(n, heads, skb, skh)
    v_n, dh_n = V + _head(n, heads, svb, svh), DH + _head(n, heads, sdb, sdh)
    rows = ROWS + tl.cast(n, tl.int64) * rows_n
    grad_rows = GRAD_ROWS + tl.cast(n, tl.int64) * grads_n
    s = s0 + tl.arange(0, BS)
    ONE_K: tl.constexpr = BK >= DK
    ONE_V: tl.constexpr = BV >= DV
    # the features of the output; the others are summed over
    k_out = part * BK if WANT_K else 0
    v_out = part * BV if WANT_V else 0
    if WANT_K and WANT_V:
        k_out = 0
        v_out = 0

    if ONE_K:
        k = _tile(k_n, s0, end, T, skt, 0, DK, REVERSE, UPCAST, BS, BK)
    if ONE_V:
        v = _tile(v_n, s0, end, T, svt, 0, DV, REVERSE, UPCAST, BS, BV)
    if WANT_K:
        acc_k = tl.zeros([BS, BK], tl.float32)
    if WANT_V:
        acc_v = tl.zeros([BS, BV], tl.float32)
    if CARRIED:  # noqa: SIM102
        if c <= last_state:
            chunk = tl.cast(n, tl.int64) * NC + c
            write = tl.load(rows + WRITE * T + s, mask=s < end, other=0.0)
            if WANT_K:
                for v0 in tl.range(0, DV, BV, disable_licm=True):
                    v_v = v if ONE_V else _tile(v_n, s0, end, T, svt, v0, DV, REVERSE, UPCAST, BS, BV)
                    memory = _read_block(DC + chunk * DK * DV, k_out, v0, DK, DV, BK, BV).to(v_v.dtype)
                    acc_k = tl.dot(v_v, tl.trans(memory), acc_k, input_precision=PRECISION)
                dk = k_out + tl.arange(0, BK)
                acc_k += tl.load(DN + chunk * DK + dk, mask=dk < DK, other=0.0)[None, :]
                acc_k *= write[:, None]
            if WANT_V:
                for k0 in tl.range(0, DK, BK, disable_licm=True):
                    k_k = k if ONE_K else _tile(k_n, s0, end, T, skt, k0, DK, REVERSE, UPCAST, BS, BK)
                    memory = _read_block(DC + chunk * DK * DV, k0, v_out, DK, DV, BK, BV).to(k_k.dtype)
                    acc_v = tl.dot(k_k, memory, acc_v, input_precision=PRECISION)
                acc_v *= write[:, None]

    u, u_low, of_s = _gates_of(rows, T, s, end, U, U_LOW, SPLIT, RESET)
    for t0 in tl.range(c * L + ((s0 - c * L) // BT) * BT, end, BT, disable_licm=True):
        t = t0 + tl.arange(0, BT)
        m = tl.load(grad_rows + SHIFTED * T + t, mask=t < end, other=0.0)
        m_low, of_t = m, m
        if SPLIT:
            m = tl.load(rows + M * T + t, mask=t < end, other=0.0)
        if RESET:
            of_t = tl.load(rows + SEGMENT * T + t, mask=t < end, other=-1.0)
        seen = tl.where(t < end, t, -1)  # steps beyond the end see nothing
        gate = _gate_tile(m, m_low, of_t, seen, u, u_low, of_s, s, SPLIT, RESET, True)
        if WANT_K:
            q = _tile(q_n, t0, end, T, sqt, k_out, DK, REVERSE, UPCAST, BT, BK)
        if WANT_V:
            dh = _tile(dh_n, t0, end, T, sdt, v_out, DV, REVERSE, UPCAST, BT, BV)
            if ONE_K:
                q_k = q if WANT_K else _tile(q_n, t0, end, T, sqt, 0, DK, REVERSE, UPCAST, BT, BK)
                p = tl.dot(k, tl.trans(q_k), input_precision=PRECISION)
            else:
                p = tl.zeros([BS, BT], tl.float32)
                for k0 in tl.range(0, DK, BK, disable_licm=True):
                    k_k = _tile(k_n, s0, end, T, skt, k0, DK, REVERSE, UPCAST, BS, BK)
                    q_k = _tile(q_n, t0, end, T, sqt, k0, DK, REVERSE, UPCAST, BT, BK)
                    p = tl.dot(k_k, tl.trans(q_k), p, input_precision=PRECISION)
            p *= gate
            acc_v = tl.dot(p.to(dh.dtype), dh, acc_v, input_precision=PRECISION)
        if WANT_K:
            if ONE_V:
                dh_v = dh if WANT_V else _tile(dh_n, t0, end, T, sdt, 0, DV, REVERSE, UPCAST, BT, BV)
                ds = tl.dot(v, tl.trans(dh_v), input_precision=PRECISION)
            else:
                ds = tl.zeros([BS, BT], tl.float32)
                for v0 in tl.range(0, DV, BV, disable_licm=True):
                    v_v = _tile(v_n, s0, end, T, svt, v0, DV, REVERSE, UPCAST, BS, BV)
                    dh_v = _tile(dh_n, t0, end, T, sdt, v0, DV, REVERSE, UPCAST, BT, BV)
                    ds = tl.dot(v_v, tl.trans(dh_v), ds, input_precision=PRECISION)
            if NORMALIZE:
                ds += tl.load(grad_rows + DELTA * T + t, mask=t < end, other=0.0)[None, :]
            ds *= gate
            acc_k = tl.dot(ds.to(q.dtype), q, acc_k, input_precision=PRECISION)

    if WANT_V:
        _store(DV_OUT + _head(n, heads, spb, sph), acc_v, s0, end, T, spt, v_out, DV, REVERSE, BS, BV)
    if WANT_K:
        _store(DK_OUT + _head(n, heads, sob, soh), acc_k, s0, end, T, sot, k_out, DK, REVERSE, BS, BK)
        if not ONE_K:
            k = _tile(k_n, s0, end, T, skt, k_out, DK, REVERSE, UPCAST, BS, BK)
        at = (tl.cast(part, tl.int64) * heads_all + n) * T
        tl.store(KDK + at + s, tl.sum(acc_k * k.to(tl.float32), 1), mask=s < end)
