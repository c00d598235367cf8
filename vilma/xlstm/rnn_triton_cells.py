"""The recurrent cells inside Triton kernels: one step of each, and what its gradient is made of.

The equations are those of `rnn_naive`. A step takes the arguments x0, ..., x3 of its gates, bias and
recurrent product included:

    sLSTM, LSTM   i, f, z, o
    GRU           g = R_g h + b_g, r, z, wx_n + b_n
    Elman         g

The backward reads `planes`, written by `replay`: of every step the activated gates and the states before it.

    sLSTM   y, z, o, sigmoid(-f), c, n      y: the smaller of F and I (the other is 1), negative where it is F
    LSTM    i, f, z, o, c
    GRU     g, r, z, n, h
    Elman   h' (after the step)

Everything is float32. At small head sizes a step costs what its instructions take to issue, more than its
products: exp and division are written with the two functions that a GPU has as one instruction each, exp2 and
1 / sqrt(x), and log(1 + x), which is twenty otherwise, as a polynomial. FINE keeps the relative precision of
tanh near 0, which half precision does not show.
"""

import triton
import triton.language as tl

SLSTM = tl.constexpr(0)
LSTM = tl.constexpr(1)
GRU = tl.constexpr(2)
ELMAN = tl.constexpr(3)

_LOG2_E = tl.constexpr(1.4426950408889634)
_MAX_LOG = tl.constexpr(80.0)  # as rnn_naive.MAX_LOG
_TINY = tl.constexpr(1e-37)  # keeps the sign of y where the gate is 0


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _inverse(x):
    """1 / x for x >= 1, infinity included."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _sigmoid(x):
    return _inverse(1.0 + _exp(-x))


@triton.jit
def _tanh(x, FINE: tl.constexpr):
    y = 1.0 - 2.0 * _inverse(1.0 + tl.exp2(x * (2.0 * _LOG2_E)))
    if FINE:
        s = x * x
        near = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
        y = tl.where(s < 0.0625, near, y)
    return y


@triton.jit
def _log_sigmoid(x):
    e = _exp(-tl.abs(x))
    # log(1 + e) / e, interpolated at Chebyshev's points of [0, 1]: 2e-7 off at most
    p = -0.029074065387 + e * 0.0051261018962
    p = -0.1360224783421 + e * (0.0775160863996 + e * p)
    p = -0.2483539879322 + e * (0.1907688081265 + e * p)
    p = 0.9999999403954 + e * (-0.4999944567680 + e * (0.3331812024117 + e * p))
    return tl.minimum(x, 0.0) - e * p


@triton.jit
def _stabilised(i, f, n, m):
    """F, I, the next m, and whether that is i: one of F and I is 1, so that one exp makes both."""
    kept = _log_sigmoid(f) + m
    x = kept - i
    takes_i = (n == 0.0) | (x <= 0.0)
    e = _exp(tl.where(takes_i, tl.minimum(x, _MAX_LOG), -x))
    return tl.where(takes_i, e, 1.0), tl.where(takes_i, 1.0, e), tl.where(takes_i, i, kept), takes_i


@triton.jit
def advance(x0, x1, x2, x3, h, c, n, m, CELL: tl.constexpr, FINE: tl.constexpr):
    """The states after a step; those that the cell does not have come back as they were given."""
    if CELL == SLSTM:
        f_gate, i_gate, m, _ = _stabilised(x0, x1, n, m)
        c = f_gate * c + i_gate * _tanh(x2, FINE)
        n = tl.maximum(f_gate * n + i_gate, 1.0)
        h = c * _inverse(n + n * _exp(-x3))
    elif CELL == LSTM:
        c = _sigmoid(x1) * c + _sigmoid(x0) * _tanh(x2, FINE)
        h = _tanh(c, FINE) * _sigmoid(x3)
    elif CELL == GRU:
        z = _sigmoid(x2)
        new = _tanh(x3 + _sigmoid(x1) * x0, FINE)
        h = z * h + (1.0 - z) * new
    else:
        h = _tanh(x0, FINE)
    return h, c, n, m


@triton.jit
def advance_planes(x0, x1, x2, x3, h, c, n, m, CELL: tl.constexpr, FINE: tl.constexpr):
    """The six planes of a step (those that the cell has, first) and the states after it."""
    p0, p1, p2, p3, p4, p5 = x0, x0, x0, x0, x0, x0
    if CELL == SLSTM:
        f_gate, i_gate, m, takes_i = _stabilised(x0, x1, n, m)
        p0 = tl.where(takes_i, -tl.maximum(f_gate, _TINY), tl.maximum(i_gate, _TINY))
        p1, p2, p3, p4, p5 = _tanh(x2, FINE), _sigmoid(x3), _sigmoid(-x1), c, n
        c = f_gate * c + i_gate * p1
        n = tl.maximum(f_gate * n + i_gate, 1.0)
    elif CELL == LSTM:
        p0, p1, p2, p3, p4 = _sigmoid(x0), _sigmoid(x1), _tanh(x2, FINE), _sigmoid(x3), c
        c = p1 * c + p0 * p2
    elif CELL == GRU:
        p0, p1, p2, p4 = x0, _sigmoid(x1), _sigmoid(x2), h
        p3 = _tanh(x3 + p1 * x0, FINE)
        h = p2 * h + (1.0 - p2) * p3
    else:
        p0 = _tanh(x0, FINE)
    return p0, p1, p2, p3, p4, p5, h, c, n, m


@triton.jit
def retreat(
    p0, p1, p2, p3, p4, p5, dh, dc, dn, mu, first, CELL: tl.constexpr, MU: tl.constexpr,
    FINE: tl.constexpr,
):  # fmt: skip
    """Gradients of x0, ..., x3; of h where it is read other than through r; and of c, n and mu before.

    mu is the gradient of m at fixed c exp(m) and n exp(m): see `rnn_torch`. Where F n + I is below 1
    n stops the gradient; that happens at the first step only, with a state that was given.
    """
    d0, d1, d2, d3, direct = dh, dh, dh, dh, tl.zeros_like(dh)
    if CELL == SLSTM:
        takes_i = p0 < 0.0
        f_gate, i_gate = tl.where(takes_i, -p0, 1.0), tl.where(takes_i, 1.0, p0)
        n_next = f_gate * p5 + i_gate
        inverse = _inverse(tl.maximum(n_next, 1.0))
        ratio = (f_gate * p4 + i_gate * p1) * inverse
        to_c = p2 * inverse
        dc += dh * to_c
        dn -= dh * to_c * ratio
        if MU:
            stopped = tl.where(n_next < tl.where(first, 1.0, 0.0), dn, 0.0)
            mu += stopped
            dn -= stopped
        d0 = (dc * p1 + dn) * i_gate
        dc_kept, dn_kept = dc * f_gate, dn * f_gate
        d1 = (dc_kept * p4 + dn_kept * p5) * p3
        d2 = dc * i_gate * (1.0 - p1 * p1)
        d3 = dh * ratio * p2 * (1.0 - p2)
        if MU:
            d0 += tl.where(takes_i, mu, 0.0)
            mu = tl.where(takes_i, 0.0, mu)
            d1 += mu * p3
        dc, dn = dc_kept, dn_kept
    elif CELL == LSTM:
        tanh_c = _tanh(p1 * p4 + p0 * p2, FINE)
        dc += dh * p3 * (1.0 - tanh_c * tanh_c)
        d0 = dc * p2 * p0 * (1.0 - p0)
        d1 = dc * p4 * p1 * (1.0 - p1)
        d2 = dc * p0 * (1.0 - p2 * p2)
        d3 = dh * tanh_c * p3 * (1.0 - p3)
        dc = dc * p1
    elif CELL == GRU:
        d3 = dh * (1.0 - p2) * (1.0 - p3 * p3)
        d2 = dh * (p4 - p3) * p2 * (1.0 - p2)
        d1 = d3 * p0 * p1 * (1.0 - p1)
        d0 = d3 * p1
        direct = dh * p2
    else:
        d0 = dh * (1.0 - p0 * p0)
    return d0, d1, d2, d3, direct, dc, dn, mu
