"""Triton kernel of one mLSTM step, for control loops and decoding: one launch, state in, state out.

Shapes: B batch, H heads, N = B * H, Dk and Dv head sizes; BK and BV of them in a tile.
"""

import triton
import triton.language as tl

from .mlstm_triton_gates import _head, _log_sigmoid
from .mlstm_triton_kernels import _read_block, _write_block


@triton.jit(do_not_specialize=["heads", "sib", "sih", "sfb", "sfh", "eps"])
def step(
    Q, K, V, I, F, C0, N0, M0, H, C, N, M_OUT, sqb, sqh, skb, skh, svb, svh, sib, sih, sfb, sfh, heads, eps,
    scale, DK: tl.constexpr, DV: tl.constexpr, HAS_STATE: tl.constexpr, EXPONENTIAL: tl.constexpr,
    NORMALIZE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One step of BV features of one head: h and the new state, float32."""
    jv = tl.program_id(0) % ((DV + BV - 1) // BV)
    n = tl.program_id(0) // ((DV + BV - 1) // BV)
    row = tl.cast(n, tl.int64)
    i = tl.load(I + _head(n, heads, sib, sih)).to(tl.float32)
    f = tl.load(F + _head(n, heads, sfb, sfh)).to(tl.float32)
    log_f = _log_sigmoid(f)
    if EXPONENTIAL:
        decayed = log_f
        if HAS_STATE:
            decayed += tl.load(M0 + row)
        m = tl.maximum(decayed, i)
        f_gate = tl.exp(decayed - m)
        i_gate = tl.exp(i - m)
        floor = tl.exp(-m)
        if jv == 0:
            tl.store(M_OUT + row, m)
    else:
        f_gate = tl.exp(log_f)
        i_gate = tl.exp(_log_sigmoid(i))
        floor = tl.full((), 1.0, tl.float32)
    dv = jv * BV + tl.arange(0, BV)
    v = tl.load(V + _head(n, heads, svb, svh) + dv, mask=dv < DV, other=0.0).to(tl.float32)
    h = tl.zeros([BV], tl.float32)
    den = tl.full((), 0.0, tl.float32)
    for k0 in range(0, DK, BK):
        dk = k0 + tl.arange(0, BK)
        q = tl.load(Q + _head(n, heads, sqb, sqh) + dk, mask=dk < DK, other=0.0).to(tl.float32) * scale
        k = tl.load(K + _head(n, heads, skb, skh) + dk, mask=dk < DK, other=0.0).to(tl.float32) * i_gate
        c = k[:, None] * v[None, :]
        n_k = k
        if HAS_STATE:
            c += f_gate * _read_block(C0 + row * DK * DV, k0, jv * BV, DK, DV, BK, BV)
            n_k += f_gate * tl.load(N0 + row * DK + dk, mask=dk < DK, other=0.0)
        _write_block(C + row * DK * DV, c, k0, jv * BV, DK, DV, BK, BV)
        if jv == 0:
            tl.store(N + row * DK + dk, n_k, mask=dk < DK)
        h += tl.sum(q[:, None] * c, 0)
        den += tl.sum(q * n_k, 0)
    if NORMALIZE:
        h = h / (tl.maximum(tl.abs(den), floor) + eps)
    elif EXPONENTIAL:
        h = h / floor
    tl.store(H + row * DV + dv, h.to(H.dtype.element_ty), mask=dv < DV)
