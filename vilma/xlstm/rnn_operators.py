"""The recurrent cells as operators of torch, the same ones for every backend.

``vilma::rnn``, its gradient ``vilma::rnn_backward`` and ``vilma::rnn_step`` (inference only) are what
torch.compile, torch.export and the FLOP counter see, each as one node. The backend is chosen when an operator
runs, so an exported program moves between devices.

A backend is a module with `forward`, `backward`, `step` and `saved_shapes`: see `rnn_torch`.

Shapes: B batch, T steps, H heads, D head size, G gates of wx. What a call does not have (a state that was not
asked for, a bias) is an empty tensor.
"""

import functools
import importlib
import warnings
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import rnn_cpu, rnn_torch
from .mlstm_chunkwise import dense_like
from .rnn_naive import CELLS
from .rnn_torch import Form, accumulation_dtype

_LIBRARY = torch.library.Library("vilma", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_STATES = 4  # at most
_STATE = ", ".join(f"Tensor? s{j}" for j in range(_STATES))
_LAST = ", ".join(f"Tensor last{j}" for j in range(_STATES))
_SAVED = ", ".join(f"Tensor kept{j}" for j in range(4))
_INPUTS = f"Tensor wx, Tensor r, Tensor? b, {_STATE}"
_FORM = "str cell, bool reverse, float? grad_clip, str backend"


def backend_for(backend: str, wx: Tensor) -> ModuleType:
    """The module that runs ``backend`` (auto, triton, cpu or torch) with these tensors.

    Raises:
        RuntimeError: a backend forced by name that cannot run here.
    """
    single = wx.dtype != torch.float64
    if backend == "triton" or (backend == "auto" and wx.is_cuda and single):
        why = _why_no_triton(wx.device) or _triton().why_not(wx)
        if not why:
            return _triton()
        if backend == "triton":
            raise RuntimeError(f"backend 'triton' is not available: {why}")
        _warn_of_the_loop(why)
    if backend == "cpu":
        if wx.device.type != "cpu":
            raise RuntimeError(
                f"backend 'cpu' is not available: tensors are on {wx.device}; use backend='auto' or move them"
            )
        try:
            rnn_cpu.library()
        except rnn_cpu.BuildError as error:
            raise RuntimeError(f"backend 'cpu' is not available: {error}") from error
    # float64 is there to check with, and takes the plain path
    compiled = backend in ("cpu", "auto") and wx.device.type == "cpu" and single
    return rnn_cpu if compiled and rnn_cpu.is_available() else rnn_torch


@functools.cache  # once for each reason
def _warn_of_the_loop(why: str) -> None:
    warnings.warn(
        f"the recurrent cell runs torch's slower loop on this GPU: {why}; install a triton that fits "
        "this torch (pip install triton), or pass backend='torch'",
        stacklevel=2,
    )


@functools.cache
def _triton() -> ModuleType | str:
    """The Triton backend, or why it cannot be imported."""
    try:
        return importlib.import_module(".rnn_triton_backend", __package__)
    except ImportError as error:
        return f"{error}"


@functools.cache
def _why_no_triton(device: torch.device) -> str:
    triton = _triton()
    return triton if isinstance(triton, str) else triton.why_not_on(device)


def _filled(tensors: Iterable[Tensor | None], like: Tensor, size: int) -> list[Tensor]:
    tensors = [like.new_empty(0, dtype=accumulation_dtype(like)) if x is None else x for x in tensors]
    return tensors + [like.new_empty(0, dtype=accumulation_dtype(like)) for _ in range(size - len(tensors))]


def _or_none(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [x if x is not None and x.numel() else None for x in tensors]


def _states(tensors: Iterable[Tensor | None], cell: str) -> tuple[Tensor | None, ...]:
    return tuple(tensors)[: len(CELLS[cell].states)]


_LIBRARY.define(
    f"rnn({_INPUTS}, Tensor? starts, {_FORM}, bool return_state, bool save) -> (Tensor h, {_LAST}, {_SAVED})",
    tags=_TAGS,
)


def _forward(wx, r, b, s0, s1, s2, s3, starts, cell, reverse, grad_clip, backend, return_state, save):
    state, form = _states((s0, s1, s2, s3), cell), Form(cell, reverse, grad_clip)
    run = backend_for(backend, wx).forward
    h, last, saved = run(wx, r, b, state, starts, form, return_state, save)
    return h, *_filled(last, wx, _STATES), *_filled(saved, wx, 4)


def _forward_fake(wx, r, b, s0, s1, s2, s3, starts, cell, reverse, grad_clip, backend, return_state, save):
    batch, steps, _, heads, dim = wx.shape
    h, acc = wx.new_empty(batch, steps, heads, dim), accumulation_dtype(wx)
    last = [wx.new_empty(batch, heads, dim, dtype=acc) for _ in CELLS[cell].states] if return_state else []
    saved = []
    if save:
        shapes = backend_for(backend, wx).saved_shapes(wx, Form(cell, reverse, grad_clip))
        saved = [None if x is None else wx.new_empty(x[0], dtype=x[1]) for x in shapes]
    return h, *_filled(last, wx, _STATES), *_filled(saved, wx, 4)


def _setup(ctx, inputs, output) -> None:
    *tensors, cell, reverse, grad_clip, backend, _, save = inputs
    ctx.form = cell, reverse, grad_clip, backend
    ctx.saved_for_backward = save
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1 + _STATES :])
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, *grads):
    saved = ctx.saved_tensors  # checkpointing lets them be read once
    tensors, rest = saved[:8], saved[8:]
    if not ctx.saved_for_backward:
        rest = torch.ops.vilma.rnn(*tensors, *ctx.form, True, True)
    found = torch.ops.vilma.rnn_backward(*tensors, *ctx.form, *grads[: 1 + _STATES], *rest)
    given = (None if x is None else grad for x, grad in zip(tensors[2:7], found[2:]))
    return *found[:2], *given, *(None,) * 7


_LIBRARY.impl("rnn", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("vilma::rnn", _forward_fake, lib=_LIBRARY)
torch.library.register_autograd("vilma::rnn", _autograd, setup_context=_setup, lib=_LIBRARY)


_GRADS = ", ".join(f"Tensor? dlast{j}" for j in range(_STATES))
_LIBRARY.define(
    f"rnn_backward({_INPUTS}, Tensor? starts, {_FORM}, Tensor? dh, {_GRADS}, Tensor h, {_LAST}, {_SAVED}) -> "
    f"(Tensor dwx, Tensor dr, Tensor db, {', '.join(f'Tensor ds{j}' for j in range(_STATES))})",
    tags=_TAGS,
)


def _backward(wx, r, b, s0, s1, s2, s3, starts, cell, reverse, grad_clip, backend, *rest):
    state, form = _states((s0, s1, s2, s3), cell), Form(cell, reverse, grad_clip)
    dh, *d_last = _or_none(rest[: 1 + _STATES])
    h, *last = rest[1 + _STATES : 2 + 2 * _STATES]
    grads, last = (dh, *_states(d_last, cell)), _states(_or_none(last), cell)
    saved = _or_none(rest[2 + 2 * _STATES :])
    run = backend_for(backend, wx).backward
    dwx, dr, db, d_state = run(grads, wx, r, b, state, starts, h, last, saved, form)
    return dwx, dr, *_filled((db,), r, 1), *_filled(d_state, wx, _STATES)


def _backward_fake(wx, r, b, s0, s1, s2, s3, *_):
    db = r.new_empty(0, dtype=accumulation_dtype(r)) if b is None else b.new_empty(b.shape)
    d_state = [None if x is None else x.new_empty(x.shape) for x in (s0, s1, s2, s3)]
    return dense_like(wx), r.new_empty(r.shape), db, *_filled(d_state, wx, _STATES)


def _refuse(*_):
    raise RuntimeError("this rnn backend has no second derivative; use backend='naive' where it is needed")


_LIBRARY.impl("rnn_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vilma::rnn_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("vilma::rnn_backward", _refuse, lib=_LIBRARY)


_LIBRARY.define(
    f"rnn_step({_INPUTS}, str cell, str backend) -> (Tensor h, {_LAST})",
    tags=_TAGS,
)


def _step(wx, r, b, s0, s1, s2, s3, cell, backend):
    run = backend_for(backend, wx).step
    h, state = run(wx, r, b, _states((s0, s1, s2, s3), cell), Form(cell, False, None))
    return h, *_filled(state, wx, _STATES)


def _step_fake(wx, r, b, s0, s1, s2, s3, cell, backend):
    batch, _, heads, dim = wx.shape
    acc = accumulation_dtype(wx)
    state = [wx.new_empty(batch, heads, dim, dtype=acc) for _ in CELLS[cell].states]
    return wx.new_empty(batch, heads, dim), *_filled(state, wx, _STATES)


_LIBRARY.impl("rnn_step", _step, "CompositeExplicitAutograd")
torch.library.register_fake("vilma::rnn_step", _step_fake, lib=_LIBRARY)


def _products(batch: int, r, steps: int) -> int:
    """Operations of ``steps`` products h R for each sequence and head."""
    heads, dim, gates, _ = r
    return 2 * batch * steps * heads * dim * gates * dim


@register_flop_formula(torch.ops.vilma.rnn)
def _flops(wx, r, b, s0, *_, out_shape=None, **__) -> int:
    """The products with r; the first step has none where the state is zero."""
    return _products(wx[0], r, wx[1] if s0 else wx[1] - 1)


@register_flop_formula(torch.ops.vilma.rnn_backward)
def _backward_flops(wx, r, b, s0, *_, out_shape=None, **__) -> int:
    return 2 * _products(wx[0], r, wx[1] if s0 else wx[1] - 1)


@register_flop_formula(torch.ops.vilma.rnn_step)
def _step_flops(wx, r, b, s0, *_, out_shape=None, **__) -> int:
    return _products(wx[0], r, 1 if s0 else 0)
