"""The `cpu` backend of the mLSTM: mlstm_cpu.cpp, compiled when it is first used, and how it is called.

float16 is converted as a whole, float32 and bfloat16 are read in place, with any strides.

Shapes: B batch, H heads, T steps, Dk and Dv head sizes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import cpu_build
from .cpu_build import address, bits_of, contiguous
from .mlstm_chunkwise import Form, Saved, chunk_of, dense_like, saved_shapes

SOURCE = Path(__file__).with_name("mlstm_cpu.cpp")
HEADER = SOURCE.with_name("mlstm_cpu_tiles.h")
SAVES_H = False
_DTYPES = (torch.float32, torch.bfloat16)
_BLOCK = 64  # rows for which the gate matrix is formed at once
_SERIAL = 1 << 20  # multiplications below which threads cost more than they give

_EXTENSION = cpu_build.Extension(
    "the mLSTM", SOURCE, (HEADER,), "vilma_mlstm_", ("forward", "backward", "step")
)
BuildError = cpu_build.BuildError
library, is_available, _call = _EXTENSION.library, _EXTENSION.is_available, _EXTENSION.call


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    form: Form,
    return_state: bool,
    save: bool,
) -> tuple[Tensor, tuple, Saved]:
    """As `vilma.xlstm.mlstm_chunkwise.forward`; i, f and the state float32."""
    if q.dtype not in _DTYPES:
        single = (x.float() for x in (q, k, v))
        h, *rest = forward(*single, i, f, state, starts, form, return_state, save)
        return h.to(q.dtype), *rest
    state = contiguous(state)
    h, (c, n, m) = dense_like(v), (None, None, None)
    batch, heads, _, dim_qk = q.shape
    if return_state:
        c, n = i.new_empty(batch, heads, dim_qk, v.shape[-1]), i.new_empty(batch, heads, dim_qk)
        m = i.new_empty(batch, heads) if form.exponential else None
    saved = Saved()
    if save:
        saved = Saved(
            *(None if shape is None else i.new_empty(shape) for shape in saved_shapes(q, v, starts, form))
        )
    arguments = _problem(q, k, v, i, f, state, starts, form, saved)
    _call("forward", (*arguments, *_layout(h), *map(address, (c, n, m))))
    return h, (c, n, m), saved


def backward(
    grads: Sequence[Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    h: Tensor | None,
    last: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    form: Form,
) -> tuple[Tensor | None, ...]:
    """As `vilma.xlstm.mlstm_chunkwise.backward`."""
    if q.dtype not in _DTYPES:
        single = (x.float() for x in (q, k, v))
        dq, dk, dv, *rest = backward(grads, *single, i, f, state, starts, h, last, saved, form)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), *rest
    state = contiguous(state)
    dh = None if grads[0] is None else grads[0].to(q.dtype)
    d_last = contiguous(None if x is None else x.float() for x in grads[1:])
    dq, dk, dv = dense_like(q), dense_like(k), dense_like(v)
    di, df = (x.new_empty(x.shape) for x in (i, f))
    d_state = [None if x is None else x.new_empty(x.shape) for x in state]
    arguments = _problem(q, k, v, i, f, state, starts, form, saved)
    for x in (dh, dq, dk, dv):
        arguments += _layout(x)
    _call("backward", (*arguments, *map(address, (*last[:2], *d_last, di, df, *d_state))))
    return dq, dk, dv, di, df, *d_state


def step(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: Sequence[Tensor | None], form: Form
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor | None]]:
    """One step: q, k (B, H, Dk), v (B, H, Dv), i, f (B, H) -> h in q's dtype and the next state."""
    dtype = q.dtype
    if dtype not in _DTYPES:
        q, k, v = q.float(), k.float(), v.float()
    c0, n0, m0 = contiguous(state)
    batch, heads, dim_qk = q.shape
    dim_v = v.shape[-1]
    h = v.new_empty(batch, heads, dim_v)
    c, n = i.new_empty(batch, heads, dim_qk, dim_v), i.new_empty(batch, heads, dim_qk)
    m = i.new_empty(batch, heads) if form.exponential else None
    threads = torch.get_num_threads() if c.numel() >= _SERIAL else 1
    arguments = [batch, heads, 1, dim_qk, dim_v, 1, 1, form.exponential, form.normalize, False]
    arguments += (q.dtype == torch.bfloat16, threads, bits_of(form.eps))
    for x in (q, k, v, i, f):
        size, (b, h_, *d) = x.element_size(), x.stride()
        arguments += (x.data_ptr(), b * size, h_ * size, 0, d[0] * size if d else 0)
    arguments += (*_layout(None), *map(address, (c0, n0, m0)), 0, 0, 0, 0)
    size = h.element_size()
    arguments += (h.data_ptr(), heads * dim_v * size, dim_v * size, 0, size, *map(address, (c, n, m)))
    _call("step", arguments)
    return h.to(dtype), (c, n, m)


def _problem(q, k, v, i, f, state, starts, form: Form, saved) -> list[int]:
    """The arguments that `Problem` reads, in its order."""
    batch, heads, steps, dim_qk = q.shape
    dim_v = v.shape[-1]
    chunk = chunk_of(steps, dim_qk, dim_v, form.chunk_size)
    products = batch * heads * steps * (chunk * (dim_qk + dim_v) // 2 + dim_qk * dim_v)
    threads = torch.get_num_threads() if products >= _SERIAL else 1
    arguments = [batch, heads, steps, dim_qk, dim_v, chunk, _BLOCK]
    arguments += (form.exponential, form.normalize, form.reverse, q.dtype == torch.bfloat16, threads)
    arguments.append(bits_of(form.eps))
    for x in (q, k, v, i, f):
        arguments += _layout(x)
    arguments += _layout(None if starts is None else starts[:, None])
    arguments += map(address, (*state, *saved))
    return arguments


def _layout(x: Tensor | None) -> tuple[int, ...]:
    """Address and strides in bytes of (B, H, T, D) or (B, H, T)."""
    if x is None:
        return (0,) * 5
    size = x.element_size()
    strides = [s * size for s in x.stride()]
    return (x.data_ptr(), *strides) if len(strides) == 4 else (x.data_ptr(), *strides, 0)
