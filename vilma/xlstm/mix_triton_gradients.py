"""Triton kernels of what surrounds the mLSTM in a pre-up-projection block, backward.

Gradients of `mix_triton_kernels`, whose names and shapes these are; p is computed again there. Sums over
tokens are made by programs that walk a share of them each and write what they have, float32, into a row of
PARTS; `finish` adds the rows. So nothing is atomic, and a result is the same every time.
"""

import triton
import triton.language as tl

from .mix_triton_kernels import (
    _blocks,
    _channels,
    _gate_rows,
    _head_vector,
    _normalized,
    _sigmoid,
    _tile,
    _vector,
)


@triton.jit(do_not_specialize=["M", "N", "tiles", "eps"])
def behind_backward(
    DY, U, P, HIDDEN, NORM_WEIGHT, NORM_BIAS, SKIP, DU, DH, DC, PARTS, sdb, sdt, sub, sut, M, N, tiles, eps,
    E: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FIELD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """dz into du, dh, what comes to c here, and of ``tiles`` x BT tokens the sums of three parameters.

    PARTS (shares, 3 FIELD): norm_weight, norm_bias, skip.
    """
    HEADS: tl.constexpr = E // D
    share = tl.program_id(0) // HEADS
    d = tl.arange(0, DP)
    channel = (tl.program_id(0) % HEADS) * D + d
    weight = (1.0 + _head_vector(NORM_WEIGHT, channel, d, D, DP))[None, :]
    skip = _head_vector(SKIP, channel, d, D, DP)[None, :]
    of_weight = tl.zeros([BT, DP], tl.float32)
    of_bias = tl.zeros([BT, DP], tl.float32)
    of_skip = tl.zeros([BT, DP], tl.float32)
    for tile in tl.range(share * tiles, share * tiles + tiles):
        t = tile * BT + tl.arange(0, BT)
        mask = (t < M)[:, None] & (d < D)[None, :]
        b, n = tl.cast(t // N, tl.int64), tl.cast(t % N, tl.int64)
        at = tl.cast(t, tl.int64)[:, None] * E + channel[None, :]
        dy = _tile(DY, (b * sdb + n * sdt)[:, None] + channel[None, :], mask)
        z = _tile(U + E, (b * sub + n * sut)[:, None] + channel[None, :], mask)
        p = _tile(P, at, mask)
        hn, rstd = _normalized(_tile(HIDDEN, at, mask), mask, eps, D)
        c = p * _sigmoid(p)
        before_gate = hn * weight + c * skip
        if NORM_BIAS is not None:
            before_gate += _head_vector(NORM_BIAS, channel, d, D, DP)[None, :]
        opened = _sigmoid(z)
        dz = dy * before_gate * (opened * (1.0 + z * (1.0 - opened)))
        dt = dy * (z * opened)
        # du is contiguous
        of_z = tl.cast(t, tl.int64)[:, None] * (2 * E) + E + channel[None, :]
        tl.store(DU + of_z, dz.to(DU.dtype.element_ty), mask=mask)
        tl.store(DC + at, (dt * skip).to(DC.dtype.element_ty), mask=mask)
        dn = dt * weight
        moved = tl.sum(dn, 1) / D
        scaled = tl.sum(dn * hn, 1) / D
        dh = (dn - moved[:, None] - hn * scaled[:, None]) * rstd[:, None]
        tl.store(DH + at, dh.to(DH.dtype.element_ty), mask=mask)
        of_weight += dt * hn
        of_bias += dt
        of_skip += dt * c
    row = PARTS + tl.cast(share, tl.int64) * (3 * FIELD) + channel
    tl.store(row, tl.sum(of_weight, 0), mask=d < D)
    if NORM_BIAS is not None:
        tl.store(row + FIELD, tl.sum(of_bias, 0), mask=d < D)
    tl.store(row + 2 * FIELD, tl.sum(of_skip, 0), mask=d < D)


@triton.jit
def _gate_gradients(DI, DF, b, n, live, N, H: tl.constexpr, R: tl.constexpr):
    """(BT, R): gradients of i, of f, a column of ones, zeros. DI, DF (B, H, N), contiguous."""
    r = tl.arange(0, R)[None, :]
    of_i, of_f = live[:, None] & (r < H), live[:, None] & (r >= H) & (r < 2 * H)
    head = tl.cast(b, tl.int64)[:, None] * H + r
    g = tl.load(DI + head * N + n[:, None], mask=of_i, other=0.0)
    g += tl.load(DF + (head - H) * N + n[:, None], mask=of_f, other=0.0)
    return tl.where(live[:, None] & (r == 2 * H), 1.0, g)


@triton.jit
def _store_blocks(ROW, x, c0, E: tl.constexpr, W: tl.constexpr, BC: tl.constexpr):
    """The diagonal blocks of a (BC, BC) tile, where `_blocks` reads them."""
    o, i = tl.arange(0, BC)[:, None], tl.arange(0, BC)[None, :]
    mask = (o // W == i // W) & (c0 + o < E)
    tl.store(ROW + (c0 + o) * W + i % W, x, mask=mask)


@triton.jit
def _store_gate_rows(
    ROW, sums, of_g, WEIGHT, BIAS, part: tl.constexpr, c0, AT_I: tl.constexpr, AT_F: tl.constexpr,
    E: tl.constexpr, W: tl.constexpr, H: tl.constexpr, BC: tl.constexpr, R: tl.constexpr,
    GT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_t g_t (W x_t + b) from sum_t g_t x_t: the gates' weights for one of q, k, v."""
    weight = tl.trans(_blocks(WEIGHT, c0, E, W, BC, GT))
    high = sums.to(GT)
    grad = tl.dot(high, weight, input_precision=PRECISION)
    if not (GT == tl.float32):  # noqa: SIM201, SIM300 - a Triton type is compared from the left
        low = (sums - high.to(tl.float32)).to(GT)
        grad += tl.dot(low, weight, input_precision=PRECISION)
    c = c0 + tl.arange(0, BC)
    if BIAS is not None:
        grad += of_g[:, None] * _vector(BIAS, c, E, BC)[None, :]
    r = tl.arange(0, R)[:, None]
    column = (part * E + c)[None, :]
    exists = (c < E)[None, :]
    tl.store(ROW + AT_I + r * (3 * E) + column, grad, mask=(r < H) & exists)
    tl.store(ROW + AT_F + (r - H) * (3 * E) + column, grad, mask=(r >= H) & (r < 2 * H) & exists)


@triton.jit
def _bias_of(sums, H: tl.constexpr, R: tl.constexpr):
    """The row of the ones."""
    return tl.sum(tl.where((tl.arange(0, R) == 2 * H)[:, None], sums, 0.0), 0)


@triton.jit(do_not_specialize=["M", "N", "tiles"])
def project_backward(
    X, DY, DK, DC, DI, DF, WEIGHT, BIAS, WK, BK, WI, WF, OUT, PARTS, sxb, sxt, M, N, tiles,
    QUERIES: tl.constexpr, E: tl.constexpr, W: tl.constexpr, H: tl.constexpr, R: tl.constexpr,
    AT_BIAS: tl.constexpr, AT_I: tl.constexpr, AT_F: tl.constexpr, AT_GATES: tl.constexpr,
    LINE: tl.constexpr, ROW: tl.constexpr, FIELD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Back through the projections of ``tiles`` x BT tokens of BC channels, with sums for their parameters.

    QUERIES: q and k (DY, DK) of c, where X is p, and OUT (M, E) receives dp, with DC from behind the mLSTM.
    Else v (DY) of a (X), and OUT receives what comes to a.

    PARTS (shares, ROW): weights of q, k, v (E W each), their biases from AT_BIAS (FIELD each), weights of the
    gates from AT_I and AT_F (H, 3 E), their biases from AT_GATES (LINE each). R columns are the gates and a
    one.
    """
    DT: tl.constexpr = tl.float32 if UPCAST else X.dtype.element_ty
    # gradients of the gates are larger than those of q, k, v: float16 might not hold them
    GT: tl.constexpr = DT if DT == tl.bfloat16 else tl.float32  # noqa: SIM300
    TILES: tl.constexpr = (E + BC - 1) // BC
    PART: tl.constexpr = 0 if QUERIES else 2
    jc = tl.program_id(0) % TILES
    share = tl.program_id(0) // TILES
    c0 = jc * BC
    c = c0 + tl.arange(0, BC)
    of_weight = tl.zeros([BC, BC], tl.float32)
    with_x = tl.zeros([R, BC], tl.float32)
    with_y = tl.zeros([R, BC], tl.float32)
    of_g = tl.zeros([BT, R], tl.float32)
    weight = _blocks(WEIGHT, c0, E, W, BC, DT)
    gate_weight = _gate_rows(WI, WF, PART, c0, E, H, BC, R, R, GT)
    if QUERIES:
        of_k = tl.zeros([BC, BC], tl.float32)
        with_k = tl.zeros([R, BC], tl.float32)
        weight_k = _blocks(WK, c0, E, W, BC, DT)
        gate_weight_k = _gate_rows(WI, WF, 1, c0, E, H, BC, R, R, GT)
    # held in registers: as invariants of the loop they would be held as operands, which takes more of them
    for tile in tl.range(share * tiles, share * tiles + tiles, disable_licm=True):
        t = tile * BT + tl.arange(0, BT)
        live = t < M
        b, n = t // N, t % N
        mask = _channels(c, live, E, BC)
        at = tl.cast(t, tl.int64)[:, None] * E + c[None, :]
        rows = tl.cast(b, tl.int64) * sxb + tl.cast(n, tl.int64) * sxt
        x = _tile(X, rows[:, None] + c[None, :], mask)
        g = _gate_gradients(DI, DF, b, n, live, N, H, R)
        of_g += g
        g = g.to(GT)
        turned = tl.trans(g)
        if QUERIES:
            opened = _sigmoid(x)
            slope = opened * (1.0 + x * (1.0 - opened))
            x = x * opened
        x = x.to(DT)
        with_x = tl.dot(turned, x.to(GT), with_x, input_precision=PRECISION)

        # with what comes through the gates
        dy = tl.dot(g, gate_weight, input_precision=PRECISION)
        dy = (dy + _tile(DY, at, mask)).to(DT)
        of_weight = tl.dot(tl.trans(dy), x, of_weight, input_precision=PRECISION)
        if BIAS is not None:
            with_y = tl.dot(turned, dy.to(GT), with_y, input_precision=PRECISION)
        dx = tl.dot(dy, weight, input_precision=PRECISION)
        if QUERIES:
            dk = tl.dot(g, gate_weight_k, input_precision=PRECISION)
            dk = (dk + _tile(DK, at, mask)).to(DT)
            of_k = tl.dot(tl.trans(dk), x, of_k, input_precision=PRECISION)
            if BK is not None:
                with_k = tl.dot(turned, dk.to(GT), with_k, input_precision=PRECISION)
            dx += tl.dot(dk, weight_k, input_precision=PRECISION)
            dx = (dx + _tile(DC, at, mask)) * slope
        tl.store(OUT + at, dx.to(OUT.dtype.element_ty), mask=mask)

    row = PARTS + tl.cast(share, tl.int64) * ROW
    BLOCKS: tl.constexpr = AT_BIAS // 3
    exists = c < E
    _store_blocks(row + PART * BLOCKS, of_weight, c0, E, W, BC)
    if QUERIES:
        _store_blocks(row + BLOCKS, of_k, c0, E, W, BC)
        if BK is not None:
            tl.store(row + AT_BIAS + FIELD + c, _bias_of(with_k, H, R), mask=exists)
    if BIAS is not None:
        tl.store(row + AT_BIAS + PART * FIELD + c, _bias_of(with_y, H, R), mask=exists)
    total = tl.sum(of_g, 0)
    _store_gate_rows(row, with_x, total, WEIGHT, BIAS, PART, c0, AT_I, AT_F, E, W, H, BC, R, GT, PRECISION)
    if QUERIES:
        _store_gate_rows(row, with_x, total, WK, BK, 1, c0, AT_I, AT_F, E, W, H, BC, R, GT, PRECISION)
        if jc == 0:
            r = tl.arange(0, R)
            tl.store(row + AT_GATES + r, total, mask=r < H)
            tl.store(row + AT_GATES + LINE + r - H, total, mask=(r >= H) & (r < 2 * H))


@triton.jit(do_not_specialize=["M", "N", "Y", "X"])
def convolve_backward(
    U, DP, DA, CONV, CONV_BIAS, DU, PARTS, sub, sut, M, N, Y, X, E: tl.constexpr, KY: tl.constexpr,
    KX: tl.constexpr, OY: tl.constexpr, OX: tl.constexpr, SIGN: tl.constexpr, AT_BIAS: tl.constexpr,
    ROW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """da into du for BT tokens of BC channels, and their sums for the kernel and its bias.

    PARTS (token tiles, ROW): the kernel (E, KY KX), its bias from AT_BIAS. What a token gave to its
    neighbour at a tap comes back from there: a token sees dp at the taps' mirror images.
    """
    TILES: tl.constexpr = (E + BC - 1) // BC
    c0 = (tl.program_id(0) % TILES) * BC
    tile = tl.program_id(0) // TILES
    c = c0 + tl.arange(0, BC)
    t = tile * BT + tl.arange(0, BT)
    live = t < M
    n = t % N
    y, x = n // X, n % X
    mask = _channels(c, live, E, BC)
    at = tl.cast(t, tl.int64)[:, None] * E + c[None, :]
    rows = tl.cast(t // N, tl.int64) * sub + tl.cast(n, tl.int64) * sut
    a = _tile(U, rows[:, None] + c[None, :], mask)
    da = _tile(DA, at, mask)
    row = PARTS + tl.cast(tile, tl.int64) * ROW
    exists = c < E
    if CONV_BIAS is not None:
        tl.store(row + AT_BIAS + c, tl.sum(_tile(DP, at, mask), 0), mask=exists)
    for i in tl.range(0, KY):
        dy = -SIGN * (i - OY)
        for j in tl.static_range(KX):
            dx = -SIGN * (j - OX)
            inside = live & (y + dy >= 0) & (y + dy < Y) & (x + dx >= 0) & (x + dx < X)
            dp = _tile(DP, at + (dy * X + dx) * E, _channels(c, inside, E, BC))
            tap = i * KX + j
            da += dp * _vector(CONV + tap * E, c, E, BC)[None, :]
            tl.store(row + c * (KY * KX) + tap, tl.sum(a * dp, 0), mask=exists)
    of_a = tl.cast(t, tl.int64)[:, None] * (2 * E) + c[None, :]
    tl.store(DU + of_a, da.to(DU.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def finish(PARTS, OUT, rows, ROW: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """OUT (ROW) = sum of the rows of PARTS (rows, ROW), always in the same order."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    acc = tl.zeros([BR, BC], tl.float32)
    for r0 in tl.range(0, rows, BR):
        r = r0 + tl.arange(0, BR)
        at = tl.cast(r, tl.int64)[:, None] * ROW + c[None, :]
        acc += tl.load(PARTS + at, mask=(r < rows)[:, None] & (c < ROW)[None, :], other=0.0)
    tl.store(OUT + c, tl.sum(acc, 0).to(OUT.dtype.element_ty), mask=c < ROW)
