"""Triton kernels of what surrounds the mLSTM in a pre-up-projection block, forward.

From u = [a, z] (xLSTM, arXiv 2405.04517, figure 11; Vision-LSTM, arXiv 2406.04303, section 3)::

    p = conv(a);  c = SiLU(p);  q = Wq c,  k = Wk c,  v = Wv a;  i, f = gates([q, k, v])        `before`
    y = ((1 + w) norm(h) + b + skip * c) * SiLU(z)                                              `behind`

The depthwise convolution is a gather: KY x KX taps around a token of a (Y, X) grid, of which tap (i, j) lies
at SIGN (i - OY, j - OX); a causal one along the tokens has a grid of one row and its last tap at the token.
Block products are made with zeros beside the blocks, which cost a matrix unit next to nothing.
Half-precision products of the gates have their weights in two parts, high and low, side by side: gates are as
accurate as float32 ones.

Everything between load and store is float32, but for the operands of matrix products. Parameters have any
dtype. Batch and grid are run-time integers.

Shapes: B batch, N tokens, M = B N, E = H D channels, H heads, W block width. Tiles: BT tokens, BC channels.
The last axis of every tensor has stride 1; sub, sut: strides of u's batch and tokens.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _channels(c, live, E: tl.constexpr, BC: tl.constexpr):
    """Mask of a (BT, BC) tile; one of tokens only where tiles hold whole channels, so that loads are wide."""
    mask = live[:, None]
    if E % BC != 0:
        mask = mask & (c < E)[None, :]
    return mask


@triton.jit
def _vector(X, c, E: tl.constexpr, BC: tl.constexpr):
    """One number a channel, float32; zero past the last."""
    x = tl.load(X + c) if E % BC == 0 else tl.load(X + c, mask=c < E, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _blocks(WEIGHT, c0, E: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, DT: tl.constexpr):
    """The blocks (E / W, out, in) of channels c0, ... on the diagonal of a (BC out, BC in) tile."""
    o, i = tl.arange(0, BC)[:, None], tl.arange(0, BC)[None, :]
    mask = o // W == i // W
    if E % BC != 0:
        mask = mask & (c0 + o < E)
    return tl.load(WEIGHT + (c0 + o) * W + i % W, mask=mask, other=0.0).to(DT)


@triton.jit
def _gate_rows(
    WI, WF, part, c0, E: tl.constexpr, H: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """Weights of both gates for channels c0, ... of q, k or v (part): (ROWS, BC), i's H rows, then f's.

    With ROWS = 2 G, rows G, ... hold what DT has cut off the first ones.
    """
    r = tl.arange(0, ROWS)
    g = r % G
    c = c0 + tl.arange(0, BC)
    of_i, of_f = (g < H)[:, None], ((g >= H) & (g < 2 * H))[:, None]
    if E % BC != 0:
        of_i, of_f = of_i & (c < E)[None, :], of_f & (c < E)[None, :]
    column = part * E + c[None, :]
    w = tl.load(WI + g[:, None] * (3 * E) + column, mask=of_i, other=0.0).to(tl.float32)
    w += tl.load(WF + (g - H)[:, None] * (3 * E) + column, mask=of_f, other=0.0).to(tl.float32)
    high = w.to(DT)
    if ROWS == 2 * G:
        low = (w - high.to(tl.float32)).to(DT)
        high = tl.where((r < G)[:, None], high, low)
    return high


@triton.jit
def _project(
    x, WEIGHT, BIAS, QKV, part: tl.constexpr, t, live, c0, E: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One of q, k, v for a tile; stored, and returned as a matrix operand."""
    c = c0 + tl.arange(0, BC)
    weight = _blocks(WEIGHT, c0, E, W, BC, x.dtype)
    y = tl.dot(x, tl.trans(weight), input_precision=PRECISION)
    if BIAS is not None:
        y += _vector(BIAS, c, E, BC)[None, :]
    at = tl.cast(t, tl.int64)[:, None] * (3 * E) + (part * E + c)[None, :]
    tl.store(QKV + at, y.to(QKV.dtype.element_ty), mask=_channels(c, live, E, BC))
    return y.to(x.dtype)


@triton.jit(do_not_specialize=["M", "N", "Y", "X"])
def before(
    U, CONV, CONV_BIAS, WQ, BQ, WK, BK, WV, BV, WI, BI, WF, BF, C, QKV, GATES, sub, sut, M, N, Y, X,
    E: tl.constexpr, W: tl.constexpr, H: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, OY: tl.constexpr,
    OX: tl.constexpr, SIGN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, G: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """c (M, E), q, k, v (M, 3, E) and the gates (M, 2 H) of BT tokens; where GATES is None, C receives p.

    CONV (KY KX, E): the kernel, taps first. COLUMNS of the gates' products: 2 G with low parts, else G.
    """
    DT: tl.constexpr = tl.float32 if UPCAST else U.dtype.element_ty
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    live = t < M
    n = t % N
    y, x = n // X, n % X
    rows = U + tl.cast(t // N, tl.int64) * sub + tl.cast(n, tl.int64) * sut
    if GATES is not None:
        from_q = tl.zeros([BT, COLUMNS], tl.float32)
        from_k = tl.zeros([BT, COLUMNS], tl.float32)
        from_v = tl.zeros([BT, COLUMNS], tl.float32)
    for c0 in tl.range(0, E, BC, disable_licm=True):
        c = c0 + tl.arange(0, BC)
        p = tl.zeros([BT, BC], tl.float32)
        if CONV_BIAS is not None:
            p += _vector(CONV_BIAS, c, E, BC)[None, :]
        for i in tl.range(0, KY):
            dy = SIGN * (i - OY)
            for j in tl.static_range(KX):
                dx = SIGN * (j - OX)
                inside = live & (y + dy >= 0) & (y + dy < Y) & (x + dx >= 0) & (x + dx < X)
                tap = rows + tl.cast(dy * X + dx, tl.int64) * sut
                a = tl.load(tap[:, None] + c[None, :], mask=_channels(c, inside, E, BC), other=0.0)
                p += a.to(tl.float32) * _vector(CONV + (i * KX + j) * E, c, E, BC)[None, :]
        mask = _channels(c, live, E, BC)
        a = tl.load(rows[:, None] + c[None, :], mask=mask, other=0.0).to(DT)
        activated = p * _sigmoid(p)
        kept = activated if GATES is not None else p
        at = tl.cast(t, tl.int64)[:, None] * E + c[None, :]
        tl.store(C + at, kept.to(C.dtype.element_ty), mask=mask)
        activated = activated.to(DT)
        q = _project(activated, WQ, BQ, QKV, 0, t, live, c0, E, W, BC, PRECISION)
        k = _project(activated, WK, BK, QKV, 1, t, live, c0, E, W, BC, PRECISION)
        v = _project(a, WV, BV, QKV, 2, t, live, c0, E, W, BC, PRECISION)
        if GATES is not None:
            # an accumulator each: two products into one were seen to be compiled wrongly on Blackwell
            weight = _gate_rows(WI, WF, 0, c0, E, H, BC, COLUMNS, G, DT)
            from_q = tl.dot(q, tl.trans(weight), from_q, input_precision=PRECISION)
            weight = _gate_rows(WI, WF, 1, c0, E, H, BC, COLUMNS, G, DT)
            from_k = tl.dot(k, tl.trans(weight), from_k, input_precision=PRECISION)
            weight = _gate_rows(WI, WF, 2, c0, E, H, BC, COLUMNS, G, DT)
            from_v = tl.dot(v, tl.trans(weight), from_v, input_precision=PRECISION)
    if GATES is not None:
        gates = from_q + from_k + from_v
        if COLUMNS == 2 * G:
            gates = tl.sum(tl.reshape(gates, [BT, 2, G]), 1)
        g = tl.arange(0, G)
        gates += tl.load(BI + g, mask=g < H, other=0.0).to(tl.float32)[None, :]
        gates += tl.load(BF + g - H, mask=(g >= H) & (g < 2 * H), other=0.0).to(tl.float32)[None, :]
        at = tl.cast(t, tl.int64)[:, None] * (2 * H) + g[None, :]
        tl.store(GATES + at, gates, mask=live[:, None] & (g < 2 * H)[None, :])


@triton.jit
def _tile(X, at, mask):
    return tl.load(X + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _head_vector(X, channel, d, D: tl.constexpr, DP: tl.constexpr):
    x = tl.load(X + channel) if D == DP else tl.load(X + channel, mask=d < D, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _normalized(h, mask, eps, D: tl.constexpr):
    """norm(h) over the last axis, zero where masked, and 1 over the standard deviation."""
    mean = tl.sum(h, 1) / D
    centred = tl.where(mask, h - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * rstd[:, None], rstd


@triton.jit(do_not_specialize=["M", "N", "eps"])
def behind(
    U, C, HIDDEN, NORM_WEIGHT, NORM_BIAS, SKIP, OUT, sub, sut, M, N, eps, E: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """BT tokens of one head of y; DP: the power of two that holds D."""
    HEADS: tl.constexpr = E // D
    d = tl.arange(0, DP)
    channel = (tl.program_id(0) % HEADS) * D + d
    t = (tl.program_id(0) // HEADS) * BT + tl.arange(0, BT)
    mask = (t < M)[:, None] & (d < D)[None, :]
    at = tl.cast(t, tl.int64)[:, None] * E + channel[None, :]
    rows = tl.cast(t // N, tl.int64) * sub + tl.cast(t % N, tl.int64) * sut
    h = _tile(HIDDEN, at, mask)
    c = _tile(C, at, mask)
    z = _tile(U + E, rows[:, None] + channel[None, :], mask)
    hn, _ = _normalized(h, mask, eps, D)
    y = hn * (1.0 + _head_vector(NORM_WEIGHT, channel, d, D, DP))[None, :]
    y += c * _head_vector(SKIP, channel, d, D, DP)[None, :]
    if NORM_BIAS is not None:
        y += _head_vector(NORM_BIAS, channel, d, D, DP)[None, :]
    tl.store(OUT + at, (y * z * _sigmoid(z)).to(OUT.dtype.element_ty), mask=mask)
