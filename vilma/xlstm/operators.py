"""The mLSTM as operators of torch, the same ones for every backend.

``vilma::mlstm``, its gradient ``vilma::mlstm_backward`` and ``vilma::mlstm_step`` (inference only) are what
torch.compile, torch.export and the FLOP counter see, each as one node. The backend is chosen when an operator
runs, so an exported program moves between devices.

A backend is a module with `forward`, `backward`, `step`, `saved_shapes`, `SAVES_H`: see `mlstm_chunkwise`.

Shapes: B batch, H heads, T steps, Dk and Dv head sizes. What a call does not have (a state that was not asked
for, a normaliser) is an empty tensor.
"""

import functools
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import mlstm_chunkwise, mlstm_cpu, mlstm_triton_backend
from .mlstm_chunkwise import Form, chunk_of, dense_like

_LIBRARY = torch.library.Library("vilma", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, Tensor? starts"
_FORM = "bool exponential, bool normalize, bool reverse, SymInt? chunk_size, float eps, str backend"


def backend_for(backend: str, q: Tensor, v: Tensor, i: Tensor) -> ModuleType:
    """The module that runs ``backend`` (auto, triton, cpu or torch) with these tensors.

    Raises:
        RuntimeError: a backend forced by name that cannot run here.
    """
    single = i.dtype == torch.float32
    if backend == "triton" or (backend == "auto" and q.is_cuda and single):
        why = _why_no_triton(q.device) or mlstm_triton_backend.why_not(q, v, i)
        if not why:
            return mlstm_triton_backend
        if backend == "triton":
            raise RuntimeError(f"backend 'triton' is not available: {why}")
    if backend == "cpu":
        if q.device.type != "cpu":
            raise RuntimeError(
                f"backend 'cpu' is not available: tensors are on {q.device}; use backend='auto' or move them"
            )
        try:
            mlstm_cpu.library()
        except mlstm_cpu.BuildError as error:
            raise RuntimeError(f"backend 'cpu' is not available: {error}") from error
    # float64 is there to check with, and takes the plain path
    compiled = backend in ("cpu", "auto") and q.device.type == "cpu" and single
    return mlstm_cpu if compiled and mlstm_cpu.is_available() else mlstm_chunkwise


@functools.cache
def _why_no_triton(device: torch.device) -> str:
    return mlstm_triton_backend.why_not_on(device)


def _filled(tensors: Iterable[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if x is None else x for x in tensors]


def _or_none(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [x if x is not None and x.numel() else None for x in tensors]


_LIBRARY.define(
    f"mlstm({_INPUTS}, {_FORM}, bool return_state, bool save) -> "
    "(Tensor h, Tensor c_last, Tensor n_last, Tensor m_last, Tensor s0, Tensor s1, Tensor s2, Tensor s3)",
    tags=_TAGS,
)


def _forward(q, k, v, i, f, c, n, m, starts, *form):
    *form, backend, return_state, save = form
    run = backend_for(backend, q, v, i).forward
    h, last, saved = run(q, k, v, i, f, (c, n, m), starts, Form(*form), return_state, save)
    return h, *_filled((*last, *saved), i)


def _forward_fake(q, k, v, i, f, c, n, m, starts, *form):
    *form, backend, return_state, save = form
    batch, heads, _, dim_qk = q.shape
    last = [(batch, heads, dim_qk, v.shape[-1]), (batch, heads, dim_qk), (batch, heads) if form[0] else 0]
    shapes = last if return_state else [0] * 3
    if save:
        saved_shapes = backend_for(backend, q, v, i).saved_shapes
        shapes += [shape or 0 for shape in saved_shapes(q, v, starts, Form(*form))]
    else:
        shapes += [0] * 4
    return dense_like(v), *(i.new_empty(shape) for shape in shapes)


def _setup(ctx, inputs, output) -> None:
    *tensors, exponential, normalize, reverse, chunk_size, eps, backend, _, save = inputs
    ctx.form = exponential, normalize, reverse, chunk_size, eps, backend
    ctx.saved_for_backward = save
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    q, _, v, i = tensors[:4]
    h = output[0] if backend_for(backend, q, v, i).SAVES_H else None
    ctx.save_for_backward(*tensors, h, *output[1:])


def _autograd(ctx, dh, dc, dn, dm, *_):
    saved = ctx.saved_tensors  # checkpointing lets them be read once
    tensors, rest = saved[:9], saved[9:]
    if not ctx.saved_for_backward:
        rest = torch.ops.vilma.mlstm(*tensors, *ctx.form, True, True)
    grads = torch.ops.vilma.mlstm_backward(*tensors, *ctx.form, dh, dc, dn, dm, *rest)
    initial = (None if x is None else grad for x, grad in zip(tensors[5:8], grads[5:]))
    return *grads[:5], *initial, *(None,) * 9


_LIBRARY.impl("mlstm", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("vilma::mlstm", _forward_fake, lib=_LIBRARY)
torch.library.register_autograd("vilma::mlstm", _autograd, setup_context=_setup, lib=_LIBRARY)


_LIBRARY.define(
    f"mlstm_backward({_INPUTS}, {_FORM}, Tensor? dh, Tensor? dc_last, Tensor? dn_last, Tensor? dm_last, "
    "Tensor? h, Tensor c_last, Tensor n_last, Tensor m_last, Tensor s0, Tensor s1, Tensor s2, Tensor s3) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor di, Tensor df, Tensor dc, Tensor dn, Tensor dm)",
    tags=_TAGS,
)


def _backward(q, k, v, i, f, c, n, m, starts, *rest):
    form, backend, h = Form(*rest[:5]), rest[5], rest[10]
    grads, last, saved = _or_none(rest[6:10]), _or_none(rest[11:14]), _or_none(rest[14:])
    run = backend_for(backend, q, v, i).backward
    return tuple(_filled(run(grads, q, k, v, i, f, (c, n, m), starts, h, last, saved, form), i))


def _backward_fake(q, k, v, i, f, c, n, m, *_):
    initial = (i.new_empty(0 if x is None else x.shape) for x in (c, n, m))
    return *(dense_like(x) for x in (q, k, v)), i.new_empty(i.shape), f.new_empty(f.shape), *initial


def _refuse(*_):
    raise RuntimeError("this mlstm backend has no second derivative; use backend='naive' where it is needed")


_LIBRARY.impl("mlstm_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("vilma::mlstm_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("vilma::mlstm_backward", _refuse, lib=_LIBRARY)


_LIBRARY.define(
    "mlstm_step(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, Tensor? c, Tensor? n, Tensor? m, "
    "bool exponential, bool normalize, float eps, str backend) -> (Tensor h, Tensor c, Tensor n, Tensor m)",
    tags=_TAGS,
)


def _step(q, k, v, i, f, c, n, m, exponential, normalize, eps, backend):
    run = backend_for(backend, q, v, i).step
    h, last = run(q, k, v, i, f, (c, n, m), Form(exponential, normalize, False, 1, eps))
    return h, *_filled(last, i)


def _step_fake(q, k, v, i, f, c, n, m, exponential, *_):
    batch, heads, dim_qk = q.shape
    c, n = i.new_empty(batch, heads, dim_qk, v.shape[-1]), i.new_empty(batch, heads, dim_qk)
    return v.new_empty(v.shape), c, n, i.new_empty((batch, heads) if exponential else 0)


_LIBRARY.impl("mlstm_step", _step, "CompositeExplicitAutograd")
torch.library.register_fake("vilma::mlstm_step", _step_fake, lib=_LIBRARY)


def _counts(q_shape, v_shape, state, chunk_size) -> tuple[int, int, int, int]:
    """Heads, pairs (t, s) that see each other, steps in chunks that read a state, and that write one."""
    batch, heads, steps, dim_qk = q_shape
    chunk = chunk_of(steps, dim_qk, v_shape[-1], chunk_size)
    whole, rest = divmod(steps, chunk)
    pairs = whole * chunk * (chunk + 1) // 2 + rest * (rest + 1) // 2
    read = steps if state else steps - chunk
    write = steps - (rest or chunk)
    return batch * heads, pairs, read, write


@register_flop_formula(torch.ops.vilma.mlstm)
def _flops(q, k, v, i, f, c, n, m, starts, *form, out_shape=None, **_) -> int:
    """Matrix products: the causal half inside chunks, and reading and writing the states between them."""
    rows, pairs, read, write = _counts(q, v, c, form[3])
    write = q[2] if form[6] else write
    return 2 * rows * (pairs * (q[3] + v[3]) + (read + write) * q[3] * v[3])


@register_flop_formula(torch.ops.vilma.mlstm_backward)
def _backward_flops(q, k, v, i, f, c, n, m, starts, *rest, out_shape=None, **_) -> int:
    rows, pairs, read, write = _counts(q, v, c, rest[3])
    write = q[2] if any(x is not None for x in rest[7:9]) else write
    return 2 * rows * (pairs * (3 * q[3] + 2 * v[3]) + 2 * (read + write) * q[3] * v[3])


@register_flop_formula(torch.ops.vilma.mlstm_step)
def _step_flops(q, k, v, *_, out_shape=None, **__) -> int:
    batch, heads, dim_qk = q
    return 4 * batch * heads * dim_qk * v[2]
