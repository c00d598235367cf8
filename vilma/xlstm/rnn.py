"""The recurrent cells as functions of tensors: arguments, checks and the choice of a backend.

Shapes: B batch, T steps, H heads, D head size, G gates.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .mlstm_chunkwise import no_autocast
from .mlstm_naive import sequence_starts
from .rnn_naive import CELLS, rnn_naive, rnn_step_naive
from .rnn_operators import backend_for
from .rnn_torch import accumulation_dtype

BACKENDS = ("auto", "triton", "cpu", "torch", "naive")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def rnn(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    state: Sequence[Tensor] | None = None,
    *,
    cell: str = "slstm",
    reverse: bool = False,
    return_state: bool = False,
    reset: Tensor | None = None,
    grad_clip: float | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
    """Run a recurrent cell with head-wise recurrence over a sequence (FlashRNN, arXiv 2412.07752).

    Each head reads its own h only: its gates are g = wx_t + R h_{t-1} + b with ``(R h)[g, o] = sum_i h[i]
    r[head, i, g, o]``. One head makes the recurrence dense. The cells, their gates and their states::

        slstm (i, f, z, o; h, c, n, m; xLSTM, arXiv 2405.04517, equations 8 to 18)
            m' = max(log sigmoid(f) + m, i), or i where n is 0;   I = exp(i - m'),  F = sigmoid(f) exp(m - m')
            c' = F c + I tanh(z),  n' = max(F n + I, 1),  h' = sigmoid(o) c' / n'
        lstm (i, f, z, o; h, c)
            c' = sigmoid(f) c + sigmoid(i) tanh(z),  h' = sigmoid(o) tanh(c')
        gru (wx: r, z, n; r: g, r, z; b: g, r, z, n; h): with r and z after their sigmoid
            h' = z h + (1 - z) tanh(wx_n + b_n + r (R_g h + b_g))
        elman (g; h)
            h' = tanh(g)

    Args:
        wx: (B, T, G, H, D) input projections of the gates, any strides.
        r: (H, D, G, D) recurrent weights: head, from, gate, to.
        b: (G, H, D) bias, for the GRU (4, H, D).
        state: the states before the first step, in the order above, (B, H, D) each; zero when None.
        cell: ``slstm``, ``lstm``, ``gru`` or ``elman``.
        reverse: run the sequence from its end; h_t then depends on the steps t, ..., T - 1.
        return_state: also return the states after the last step that was run.
        reset: (B, T) bool, True where a new sequence begins inside a row: the state starts again from zero.
            As in `vilma.xlstm.mlstm`, the mask means the same in both directions: each sequence of the row is
            run by itself, with ``reverse`` from its own end. Forward, ``reset[:, 0]`` drops ``state``; in
            reverse it has no effect.
        grad_clip: clamp the gradient that reaches h_{t-1} through r to [-grad_clip, grad_clip], element by
            element and at every step; 0 cuts it. What reaches h_{t-1} otherwise is not touched.
        backend: ``triton`` (CUDA, ROCm), ``cpu`` (compiled when it is first used), ``torch`` or ``naive``;
            ``auto`` picks the first of them that runs here. float64 takes ``torch`` on a CPU in any case. On
            Triton the products of h and r take both rounded to wx's dtype, and sum in float32.

    Returns:
        h (B, T, H, D) in wx's dtype and, with ``return_state``, the last states, a tuple in the order above.
        States are float32, or float64 where wx is, and sums likewise. Every gradient is exact but for
        ``grad_clip``, those of the first and last states included. Differentiation is reverse-mode and once;
        forward mode, second derivatives and torch.func need ``backend="naive"``. c and n of the sLSTM are in
        units of exp(m). max(F n + I, 1) passes the gradient at equality; below 1, which takes a given n
        between 0 and 1, it stops it.

    Raises:
        ValueError: arguments that do not fit together.
        RuntimeError: a backend forced by name that cannot run here.
    """
    _check(wx, r, b, cell, backend, sequence=True)
    if reset is not None:
        _check_reset(reset, wx)
    if grad_clip is not None:
        grad_clip = _check_grad_clip(grad_clip)
    if state is not None:
        state = _check_state(state, wx, cell)
    if backend == "naive":
        acc = accumulation_dtype(wx)
        given = state or _zero_state(wx, cell)
        with no_autocast(wx):
            b = None if b is None else b.to(acc)
            h, last = rnn_naive(wx.to(acc), r.to(acc), b, given, reset, cell, reverse, grad_clip)
        h = h.to(wx.dtype)
    else:
        starts = None if reset is None else sequence_starts(reset, reverse)
        given = _four(state)
        # a traced program is checked against a second trace that is made without gradients
        save = _needs_grad(wx, r, b, *given) and not torch.jit.is_tracing()
        h, *rest = torch.ops.vilma.rnn(
            wx, r, b, *given, starts, cell, reverse, grad_clip, backend, return_state, save
        )
        last = tuple(rest[: len(CELLS[cell].states)])
    return (h, last) if return_state else h


def rnn_step(
    wx_t: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    state: Sequence[Tensor] | None = None,
    *,
    cell: str = "slstm",
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of `rnn`.

    Args:
        wx_t: (B, G, H, D) input projections of this step.
        state: the states before this step; zero when None.
        r, b, cell, backend: as in `rnn`.

    Returns:
        h (B, H, D) in wx_t's dtype and the next states (new tensors; the given ones are not changed). Where a
        gradient is needed the step is taken with torch's own operators, whatever the backend.
    """
    _check(wx_t, r, b, cell, backend, sequence=False)
    if state is not None:
        state = _check_state(state, wx_t, cell)
    given = _four(state)
    if backend != "naive" and not _needs_grad(wx_t, r, b, *given):
        h, *rest = torch.ops.vilma.rnn_step(wx_t, r, b, *given, cell, backend)
        return h, tuple(rest[: len(CELLS[cell].states)])
    if not torch.compiler.is_compiling() and backend not in ("auto", "naive"):
        backend_for(backend, wx_t)  # raises where one that was forced cannot run
    acc = accumulation_dtype(wx_t)
    with no_autocast(wx_t):
        b = None if b is None else b.to(acc)
        state = rnn_step_naive(wx_t.to(acc), r.to(acc), b, state or _zero_state(wx_t, cell), cell, None)
    # a state is nobody's h: neither may change with the other
    return state[0].to(wx_t.dtype, copy=True), state


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _four(state: Sequence[Tensor] | None) -> tuple[Tensor | None, ...]:
    return (*(state or ()), None, None, None, None)[:4]


def _check(wx: Tensor, r: Tensor, b: Tensor | None, cell: str, backend: str, sequence: bool) -> None:
    if cell not in CELLS:
        raise ValueError(f"cell={cell!r}; known cells: {', '.join(CELLS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; known backends: {', '.join(BACKENDS)}")
    given = {"wx": wx, "r": r} if b is None else {"wx": wx, "r": r, "b": b}
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; pass a torch.Tensor")
        if x.dtype not in _DTYPES:
            raise ValueError(
                f"{name} has dtype {x.dtype}; pass float64, float32, bfloat16 or float16 ({name}.float())"
            )
        if x.device != wx.device:
            raise ValueError(f"{name} is on {x.device} but wx is on {wx.device}; move all to one device")
        if x.dtype == torch.float64 and wx.dtype != torch.float64:
            raise ValueError(
                f"{name} has dtype float64 but wx has {wx.dtype}; states would lose it (wx.double(), or "
                f"{name}.float())"
            )
    shape, legend = tuple(wx.shape), "(B, T, G, H, D)" if sequence else "(B, G, H, D)"
    kinds = CELLS[cell]
    if len(shape) != len(legend.split(", ")):
        hint = "a sequence" if sequence else "one step"
        raise ValueError(f"wx has shape {shape}; {hint} has {legend}")
    if 0 in shape:
        raise ValueError(f"wx has shape {shape}; every size must be at least 1")
    gates, heads, dim = shape[-3:]
    if gates != len(kinds.wx):
        raise ValueError(
            f"wx has shape {shape}, {gates} gates; cell={cell!r} has {len(kinds.wx)}: {legend} with G = "
            f"{', '.join(kinds.wx)}"
        )
    wanted = (heads, dim, len(kinds.r), dim)
    if tuple(r.shape) != wanted:
        raise ValueError(
            f"r has shape {tuple(r.shape)}; pass (H, D, G, D) = {wanted} with G = {', '.join(kinds.r)}"
        )
    wanted = (len(kinds.b), heads, dim)
    if b is not None and tuple(b.shape) != wanted:
        raise ValueError(
            f"b has shape {tuple(b.shape)}; pass (G, H, D) = {wanted} with G = {', '.join(kinds.b)}"
        )


def _check_grad_clip(grad_clip: float) -> float:
    try:
        bound = float(grad_clip)
    except (TypeError, ValueError):
        bound = math.nan
    if not bound >= 0.0 or math.isinf(bound):
        raise ValueError(f"grad_clip is {grad_clip!r}; pass a number of 0 or more, or None for no bound")
    return bound


def _check_reset(reset: Tensor, wx: Tensor) -> None:
    shape = tuple(wx.shape[:2])
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool or tuple(reset.shape) != shape:
        tensor = isinstance(reset, Tensor)
        got = f"{reset.dtype} {tuple(reset.shape)}" if tensor else f"a {type(reset).__name__}"
        raise ValueError(f"reset is {got}; pass a torch.bool tensor (B, T) = {shape}")
    if reset.device != wx.device:
        raise ValueError(f"reset is on {reset.device} but wx is on {wx.device}; move it there")


def _check_state(state: Sequence[Tensor], wx: Tensor, cell: str) -> tuple[Tensor, ...]:
    names = CELLS[cell].states
    legend = f"a tuple ({', '.join(names)}) of (B, H, D)"
    if not isinstance(state, (tuple, list)):
        raise ValueError(f"state is a {type(state).__name__}; cell={cell!r} takes {legend}, or None")
    if len(state) != len(names):
        raise ValueError(f"state has {len(state)} entries; cell={cell!r} takes {legend}")
    shape = (wx.shape[0], *wx.shape[-2:])
    for name, x in zip(names, state):
        if not isinstance(x, Tensor) or x.shape != shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"state {name} has shape {got}; pass (B, H, D) = {tuple(shape)}")
        if not x.is_floating_point():
            raise ValueError(f"state {name} has dtype {x.dtype}; pass a floating-point tensor")
        if x.device != wx.device:
            raise ValueError(f"state {name} is on {x.device} but wx is on {wx.device}; move it there")
    return tuple(x.to(accumulation_dtype(wx)) for x in state)


def _zero_state(wx: Tensor, cell: str) -> tuple[Tensor, ...]:
    zero = wx.new_zeros(wx.shape[0], *wx.shape[-2:], dtype=accumulation_dtype(wx))
    return (zero,) * len(CELLS[cell].states)
