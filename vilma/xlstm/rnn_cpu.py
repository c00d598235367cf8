"""The `cpu` backend of the recurrent cells: rnn_cpu.cpp, compiled when first used, and how it is called.

float16 and bfloat16 are converted as a whole, float32 is read in place, with any strides.

Shapes: B batch, T steps, H heads, D head size, G gates of wx, S gates of b.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import cpu_build
from .cpu_build import address, bits_of, contiguous, in_large_pages
from .mlstm_chunkwise import dense_like
from .rnn_naive import CELLS
from .rnn_torch import Form, Grads

SOURCE = Path(__file__).with_name("rnn_cpu.cpp")
HEADERS = tuple(SOURCE.with_name(name) for name in ("rnn_cpu_cells.h", "mlstm_cpu_tiles.h"))
_KEPT = {"slstm": 6, "lstm": 5, "gru": 4, "elman": 0}
_ALIGN = 16  # sizes of what is kept are padded to it
_TILE = 32  # rows of the batch that share one reading of r
_SERIAL = 1 << 20  # multiplications below which threads cost more than they give
_NAMES = tuple(CELLS)
_EXTENSION = cpu_build.Extension(
    "the recurrent cell", SOURCE, HEADERS, "vilma_rnn_", ("forward", "backward", "step")
)
BuildError = cpu_build.BuildError
library, is_available, _call = _EXTENSION.library, _EXTENSION.is_available, _EXTENSION.call


def saved_shapes(wx: Tensor, form: Form) -> tuple[tuple[tuple, torch.dtype] | None, ...]:
    """What a cell keeps (H, T, B, K, D padded), and h (B, T, H, D) where wx is not float32."""
    batch, steps, _, heads, dim = wx.shape
    kept = h = None
    if _KEPT[form.cell]:
        padded = (dim + _ALIGN - 1) // _ALIGN * _ALIGN
        kept = (heads, steps, batch, _KEPT[form.cell], padded), torch.float32
    if wx.dtype != torch.float32:
        h = (batch, steps, heads, dim), torch.float32
    return kept, h, None, None


def forward(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    form: Form,
    return_state: bool,
    save: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """As `vilma.xlstm.rnn_torch.forward`."""
    dtype, wx_ = wx.dtype, wx.float()
    batch, steps, _, heads, dim = wx.shape
    r, b, *state = contiguous((r.float(), None if b is None else b.float(), *state))
    h = wx_.new_empty(batch, steps, heads, dim)
    last = tuple(wx_.new_empty(batch, heads, dim) if return_state else None for _ in state)
    kept = None
    if save:
        shape, *_ = saved_shapes(wx, form)
        kept = None if shape is None else in_large_pages(wx_.new_empty(shape[0]))
    arguments, _ = _problem(wx_, r, b, state, starts, kept, h, form)
    _call("forward", (*arguments, *_four(last)))
    single = dtype == torch.float32
    saved = (kept, None if single or not save else h, None, None)
    return h if single else h.to(dtype), last, saved


def backward(
    grads: Sequence[Tensor | None],
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    state: Sequence[Tensor | None],
    starts: Tensor | None,
    h: Tensor,
    last: Sequence[Tensor | None],
    saved: Sequence[Tensor | None],
    form: Form,
) -> Grads:
    """As `vilma.xlstm.rnn_torch.backward`."""
    wx_ = wx.float()
    r_, b_, *state = contiguous((r.float(), None if b is None else b.float(), *state))
    d_last = contiguous(None if x is None else x.float() for x in grads[1:])
    dh = None if grads[0] is None else grads[0].float()
    kept, h = saved[0], (h if saved[1] is None else saved[1]).contiguous()
    if kept is not None and kept.data_ptr() % (4 * _ALIGN):
        kept = kept.clone()  # handed back by somebody's hooks at an address that vectors cannot have
    arguments, tiles = _problem(wx_, r_, b_, state, starts, kept, h, form)
    dwx = in_large_pages(dense_like(wx_))
    dr = r_.new_empty(tiles, *r.shape)
    db = None if b_ is None else b_.new_empty(tiles, *b.shape)
    d_state = [None if x is None else torch.empty_like(x) for x in state]
    arguments += (*_layout(dh, "bthd"), *_layout(dwx, "btghd"), *_four(d_last), address(dr), address(db))
    arguments += (*_four(d_state), bits_of(-1.0 if form.grad_clip is None else form.grad_clip))
    _call("backward", arguments)
    dr, db = (x if x is None else x[0] if tiles == 1 else x.sum(0) for x in (dr, db))
    if wx_ is not wx:
        # laid out as dense_like(wx), which a conversion may not be
        dwx = dense_like(wx).copy_(dwx)
    return dwx, dr.to(r.dtype), None if b is None else db.to(b.dtype), tuple(d_state)


def step(
    wx: Tensor, r: Tensor, b: Tensor | None, state: Sequence[Tensor | None], form: Form
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `vilma.xlstm.rnn_torch.step`."""
    wx_ = wx.float()
    batch, _, heads, dim = wx.shape
    r, b, *state = contiguous((r.float(), None if b is None else b.float(), *state))
    h, *last = (wx_.new_empty(batch, heads, dim) for _ in (None, *state))
    arguments, _ = _problem(wx_[:, None], r, b, state, None, None, h, form)
    _call("step", (*arguments, *_four(last)))
    return h.to(wx.dtype), tuple(last)


def _problem(wx, r, b, state, starts, kept, h, form: Form) -> tuple[list[int], int]:
    """The cell and the arguments that `Problem` reads, in its order; tiles of the batch."""
    batch, steps, _, heads, dim = wx.shape
    threads = torch.get_num_threads() if wx.numel() * dim >= _SERIAL else 1
    # each head should have its r read for as many rows as possible, and each thread something to do
    tile = min(batch, _TILE)
    while tile > 8 and heads * -(-batch // tile) < threads:
        tile = -(-tile // 2)
    arguments = [_NAMES.index(form.cell), batch, steps, heads, dim, form.reverse, tile, threads]
    arguments += (*_layout(wx, "btghd"), *_layout(starts, "bt"), address(r), address(b))
    arguments += (*_four(state), address(kept), address(h))
    return arguments, -(-batch // tile)


def _layout(x: Tensor | None, axes: str) -> tuple[int, ...]:
    """Address and strides in bytes of the axes (B, T, G, H, D), 0 where there is none."""
    if x is None:
        return (0,) * 6
    strides = dict(zip(axes, x.stride()))
    return x.data_ptr(), *(strides.get(axis, 0) * x.element_size() for axis in "btghd")


def _four(tensors: Sequence[Tensor | None]) -> list[int]:
    return [address(x) for x in (*tensors, None, None, None, None)[:4]]
