"""The `triton` backend of the mLSTM: buffers and launches around the kernels of `mlstm_triton_kernels`.

A short sequence is one chunk: no memory is ever written down, h costs two launches and its gradient three. A
longer one is cut into chunks; the memory at their starts is the only thing of size Dk x Dv a chunk, and is
computed again in the backward. Kept for the backward: the arguments, h, and `rows` and `marks`, seven to ten
numbers a step and two a chunk. triton is imported when a kernel is launched, not with this module.

Batch, heads, length, chunk size and strides are run-time numbers of every kernel. A new one compiles nothing
but for a few thresholds: one chunk or several, the blocks of `block_of`, few or many heads (`carry_tile`),
and strides that are multiples of 16 or not (they are, where head sizes are).

Shapes: B batch, H heads, N = B * H, T steps, NC chunks, Dk and Dv head sizes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .mlstm_chunkwise import dense_like
from .mlstm_triton_launch import interpreting, launch, on_device, rowwise, strides
from .mlstm_triton_tiles import (
    Tile,
    Tiles,
    block_of,
    carry_tile,
    chunk_of,
    fit,
    float32_precision,
    kind_of,
    tiles_for,
)

State = tuple[Tensor | None, Tensor | None, Tensor | None]

MAX_DIM = 1024
_ROWS, _ROWS_SPLIT, _ROWS_RESET, _GRAD_ROWS = 7, 9, 10, 4


class Saved(NamedTuple):
    """What `backward` needs. rows (N, rows, T), marks (N, 2, NC + 1); c, n: last state, if returned."""

    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor
    f: Tensor
    c0: Tensor | None
    n0: Tensor | None
    m0: Tensor | None
    h: Tensor
    c: Tensor | None
    n: Tensor | None
    rows: Tensor
    marks: Tensor


class Gradients(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    i: Tensor
    f: Tensor
    c0: Tensor | None
    n0: Tensor | None
    m0: Tensor | None


def available(device: torch.device | str | None = None) -> tuple[bool, str]:
    """Whether the kernels can run (on ``device``), and if not, why."""
    try:
        import triton
    except Exception as error:  # a broken installation raises what it likes
        return False, f"triton cannot be imported ({type(error).__name__}: {error})"
    if interpreting():
        return True, ""
    if device is not None and torch.device(device).type != "cuda":
        return False, f"Triton kernels run on CUDA and ROCm devices, the tensors are on {device}"
    if not torch.cuda.is_available():
        return False, f"triton {triton.__version__} is installed, but torch sees no CUDA or ROCm device"
    return True, ""


def supports(q: Tensor, v: Tensor) -> tuple[bool, str]:
    """Whether the kernels take tensors of this dtype and these head sizes, and if not, why."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False, f"the Triton kernels compute in float32; {q.dtype} needs backend='torch'"
    if max(q.shape[-1], v.shape[-1]) > MAX_DIM:
        return False, f"head sizes are {q.shape[-1]} and {v.shape[-1]}; the Triton kernels go up to {MAX_DIM}"
    return True, ""


def saved_shapes(
    q: Tensor, v: Tensor, chunk_size: int | None, reset: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `Saved.rows` and `Saved.marks`, both float32."""
    batch, heads, steps, dim_qk = q.shape
    chunk = chunk_of(steps, chunk_size, tiles_for(kind_of(q.device), q.dtype, dim_qk, v.shape[-1]))
    rows = _ROWS_RESET if reset else _ROWS_SPLIT if q.dtype == torch.float32 else _ROWS
    return (batch * heads, rows, steps), (batch * heads, 2, -(-steps // chunk) + 1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State = (None, None, None),
    starts: Tensor | None = None,
    *,
    gate: str,
    normalize: bool,
    reverse: bool,
    chunk_size: int | None,
    eps: float,
    return_state: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, State, Saved]:
    """h (B, H, T, Dv), the last state (three None unless asked for) and what `backward` needs.

    Arguments as `vilma.xlstm.mlstm` has checked them; ``starts`` (B, T) bool is `sequence_starts` of its
    reset. ``tiles`` replaces the table's.
    """
    from . import mlstm_triton_kernels as kernels

    q, k, v = (rowwise(x) for x in (q, k, v))
    c0, n0, m0 = (None if x is None else x.float().contiguous() for x in state)
    form = _Form(q, v, gate, normalize, reverse, chunk_size, eps, tiles)
    h = dense_like(v)
    with on_device(q):
        rows, marks = _gates(i, f, m0, starts, form)
        c = n = None
        last: State = (None, None, None)
        if form.chunks > 1 or return_state:
            c, n, c_last, n_last, _ = _carry(form, k, v, rows, None, marks, c0, n0, return_state)
            if return_state:
                last = (c_last, n_last, marks[:, 0, -1].reshape(q.shape[:2]).clone())
                if gate != "exp":
                    last = (c_last, n_last, None)
        if form.chunks == 1 and c0 is not None:
            c, n = c0, n0
        tile = form.tiles.forward
        bk, bv = form.blocks(tile)
        tiles_in_chunk = -(-form.chunk // tile.bt)
        launch(
            kernels.forward_tile,
            form.heads_all * form.chunks * tiles_in_chunk * -(-form.dim_v // bv),
            *(q, k, v, h, rows, c, n),
            *strides(q, k, v, h),
            *(form.heads, form.steps, form.chunk, form.chunks, tiles_in_chunk, rows.stride(0), eps),
            DK=form.dim_qk,
            DV=form.dim_v,
            FIRST_STATE=form.first_state(c0),
            NORMALIZE=normalize,
            RESET=starts is not None,
            BT=tile.bt,
            BS=tile.bs,
            BK=bk,
            BV=bv,
            tile=tile,
            **form.flags,
        )
    return h, last, Saved(q, k, v, i, f, c0, n0, m0, h, last[0], last[1], rows, marks)


def backward(
    saved: Saved,
    dh: Tensor | None,
    dstate: State = (None, None, None),
    *,
    gate: str,
    normalize: bool,
    reverse: bool,
    chunk_size: int | None,
    eps: float,
    tiles: Tiles | None = None,
) -> Gradients:
    """Gradients of the arguments of `forward`, from those of h and of the last state.

    dstate needs `forward` to have been called with ``return_state``. The gradient of a state that was not
    given is None.
    """
    from . import mlstm_triton_kernels as kernels

    q, k, v, i, f, c0, n0, m0, h, c_last, n_last, rows, marks = saved
    form = _Form(q, v, gate, normalize, reverse, chunk_size, eps, tiles)
    reset = rows.shape[1] == _ROWS_RESET
    dh = torch.zeros_like(h) if dh is None else rowwise(dh.to(h.dtype))
    dc, dn, dm = (None if x is None else x.float().contiguous() for x in dstate)
    heads, steps, dim_qk = q.shape[1:]
    first_state = form.first_state(c0)
    dq, dk, dv = (dense_like(x) for x in (q, k, v))
    shared = {"DK": dim_qk, "DV": form.dim_v, "NORMALIZE": normalize, "RESET": reset, **form.flags}
    grad_rows = torch.empty(form.heads_all, _GRAD_ROWS, steps, dtype=torch.float32, device=q.device)
    strided = (rows.stride(0), grad_rows.stride(0))
    with on_device(q):
        c, n = c0, n0
        if form.chunks > 1:
            c, n, *_ = _carry(form, k, v, rows, None, marks, c0, n0, False)

        tile = form.tiles.grad_q
        bk, bv = form.blocks(tile)
        in_chunk, parts_q = -(-form.chunk // tile.bt), -(-dim_qk // bk)
        qdq = torch.empty(parts_q, form.heads_all, steps, dtype=torch.float32, device=q.device)
        launch(
            kernels.grad_q_tile,
            form.heads_all * form.chunks * in_chunk * parts_q,
            *(q, k, v, h, dh, dq, rows, grad_rows, qdq, c, n),
            *strides(q, k, v, h, dh, dq),
            *(heads, steps, form.chunk, form.chunks, in_chunk, *strided, eps),
            FIRST_STATE=first_state,
            BT=tile.bt,
            BS=tile.bs,
            BK=bk,
            BV=bv,
            tile=tile,
            **shared,
        )

        dc0 = dn0 = product = None
        dc_end, dn_end = dc, dn
        if form.chunks > 1 or c0 is not None:
            kept_c, kept_n, dc0, dn0, product = _carry(
                form, q, dh, rows, grad_rows, marks, dc, dn, c0 is not None, (c, n)
            )
            if form.chunks > 1:
                dc_end, dn_end = kept_c, kept_n
        given = dc is not None or dn is not None
        if form.chunks == 1 and given:
            dc_end = torch.zeros_like(c_last) if dc is None else dc
            dn_end = torch.zeros_like(n_last) if dn is None else dn
        passes = [(form.tiles.grad_k, True, False), (form.tiles.grad_v, False, True)]
        if form.tiles.grad_kv is not None:
            assert form.tiles.grad_kv.bk >= dim_qk and form.tiles.grad_kv.bv >= form.dim_v
            passes = [(form.tiles.grad_kv, True, True)]
        kdk = None
        for tile, want_k, want_v in passes:
            bk, bv = form.blocks(tile)
            in_chunk = -(-form.chunk // tile.bs)
            parts = 1 if want_k and want_v else -(-dim_qk // bk) if want_k else -(-form.dim_v // bv)
            if want_k:
                kdk = torch.empty(parts, form.heads_all, steps, dtype=torch.float32, device=q.device)
            launch(
                kernels.grad_kv_tile,
                form.heads_all * form.chunks * in_chunk * parts,
                *(q, k, v, dh, dk, dv, rows, grad_rows, kdk, dc_end, dn_end),
                *strides(q, k, v, dh, dk, dv),
                *(heads, steps, form.chunk, form.chunks, in_chunk, *strided),
                form.chunks - 1 if given else form.chunks - 2,
                WANT_K=want_k,
                WANT_V=want_v,
                CARRIED=form.chunks > 1 or given,
                BT=tile.bt,
                BS=tile.bs,
                BK=bk,
                BV=bv,
                tile=tile,
                **shared,
            )

        end = None if product is None else product.sum(-1)
        end, mu_last = _at_the_end(end, (c_last, n_last), (dc, dn, dm), form)
        di, df, mu = _grad_gates(i, f, rows, grad_rows, qdq, kdk, end, mu_last, m0 is not None, reset, form)
        dm0 = None
        if m0 is not None:
            dm0 = (c0 * dc0).flatten(2).sum(-1) + (n0 * dn0).sum(-1)
            if mu is not None:
                dm0 += mu[:, 0].view_as(dm0)
    return Gradients(dq, dk, dv, di, df, dc0, dn0, dm0)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: State = (None, None, None),
    *,
    gate: str,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, State]:
    """One step in one launch: q, k (B, H, Dk), v (B, H, Dv), i, f (B, H) -> h (B, H, Dv) and a new state."""
    from .mlstm_triton_step import step as kernel

    batch, heads, dim_qk = q.shape
    dim_v = v.shape[-1]
    q, k, v = (rowwise(x) for x in (q, k, v))
    c0, n0, m0 = (None if x is None else x.float().contiguous() for x in state)
    exponential = gate == "exp"
    h = torch.empty(batch, heads, dim_v, dtype=q.dtype, device=q.device)
    c = torch.empty(batch, heads, dim_qk, dim_v, dtype=torch.float32, device=q.device)
    n = torch.empty(batch, heads, dim_qk, dtype=torch.float32, device=q.device)
    m = torch.empty(batch, heads, dtype=torch.float32, device=q.device) if exponential else None
    bk, bv = fit(64, dim_qk), fit(32, dim_v)
    with on_device(q):
        launch(
            kernel,
            batch * heads * -(-dim_v // bv),
            *(q, k, v, i, f, c0, n0, m0, h, c, n, m),
            *strides(q, k, v, i, f, axes=2),
            *(heads, eps, dim_qk**-0.5),
            DK=dim_qk,
            DV=dim_v,
            HAS_STATE=c0 is not None,
            EXPONENTIAL=exponential,
            NORMALIZE=normalize,
            BK=bk,
            BV=bv,
            tile=Tile(0, 0, bk, bv, 4, 1),
        )
    return h, (c, n, m)


class _Form:
    """What all launches of one call share."""

    def __init__(self, q, v, gate, normalize, reverse, chunk_size, eps, tiles):
        self.batch, self.heads, self.steps, self.dim_qk = q.shape
        self.heads_all = self.batch * self.heads
        self.dim_v = v.shape[-1]
        self.device, self.dtype = q.device, q.dtype
        self.tiles = tiles or tiles_for(kind_of(q.device), q.dtype, self.dim_qk, self.dim_v)
        self.chunk = chunk_of(self.steps, chunk_size, self.tiles)
        self.chunks = -(-self.steps // self.chunk)
        self.block = block_of(self.chunk)
        self.gates = Tile(0, 0, 0, 0, 1 if self.block == 64 else 4, 1)
        self.exponential, self.normalize, self.eps = gate == "exp", normalize, eps
        self.reverse = reverse
        half = q.dtype != torch.float32
        self.flags = {
            "REVERSE": reverse,
            "SPLIT": not half,
            "UPCAST": half and interpreting(),
            "PRECISION": "ieee" if half else float32_precision(q.device, normalize),
        }
        # bfloat16 is what the memory is multiplied in; float16 might overflow
        self.memory_dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32

    def blocks(self, tile: Tile) -> tuple[int, int]:
        """Features of keys and of values that a program holds at a time."""
        least = self.tiles.least
        return fit(tile.bk, self.dim_qk, least), fit(tile.bv, self.dim_v, least)

    def first_state(self, c0: Tensor | None) -> int:
        """The first chunk that starts from something; -1 when none does."""
        return 0 if c0 is not None else 1 if self.chunks > 1 else -1


def _gates(i, f, m0, starts, form: _Form) -> tuple[Tensor, Tensor]:
    from . import mlstm_triton_gates as kernels

    n, steps, chunks = form.heads_all, form.steps, form.chunks
    split = form.flags["SPLIT"]
    count = _ROWS_RESET if starts is not None else _ROWS_SPLIT if split else _ROWS
    rows = torch.empty(n, count, steps, dtype=torch.float32, device=form.device)
    marks = torch.empty(n, 2, chunks + 1, dtype=torch.float32, device=form.device)
    if starts is not None:
        starts = starts.contiguous().view(torch.uint8)
    where = (form.heads, *strides(i, f), steps, form.chunk, chunks)
    flags = {"REVERSE": form.reverse, "RESET": starts is not None, "SPLIT": split, "BLOCK": form.block}
    chained = form.exponential and chunks > 1
    if chained:
        decay, level = (torch.empty(n, chunks, dtype=torch.float64, device=form.device) for _ in range(2))
        launch(
            kernels.summarise_chunks,
            n * chunks,
            *(i, f, starts, decay, level, *where),
            tile=form.gates,
            **flags,
        )
        launch(
            kernels.chain_stabiliser,
            n,
            *(decay, level, m0, marks, chunks),
            HAS_M0=m0 is not None,
            BLOCK=64,
            tile=Tile(0, 0, 0, 0, 1, 1),
        )
    launch(
        kernels.gates,
        n * chunks,
        *(i, f, starts, m0, rows, marks, *where, rows.stride(0)),
        -0.5 * math.log2(form.dim_qk),
        EXPONENTIAL=form.exponential,
        HAS_M0=m0 is not None,
        CHAINED=chained,
        tile=form.gates,
        **flags,
    )
    return rows, marks


def _carry(form: _Form, x, y, rows, grad_rows, marks, c0, n0, return_last: bool, forward_memory=None):
    """The memory before each chunk (None for one chunk), after all of them (if asked for), and products."""
    from . import mlstm_triton_kernels as kernels

    backward_ = grad_rows is not None
    n, chunks, dim_qk, dim_v = form.heads_all, form.chunks, form.dim_qk, form.dim_v
    tile = carry_tile(form.tiles, n, dim_qk, dim_v)
    bk, bv = form.blocks(tile)
    blocks = -(-dim_qk // bk) * -(-dim_v // bv)
    new = {"dtype": torch.float32, "device": form.device}
    kept_c = kept_n = c_last = n_last = product = None
    if chunks > 1:
        kept_c = torch.empty(n, chunks, dim_qk, dim_v, dtype=form.memory_dtype, device=form.device)
        kept_n = torch.empty(n, chunks, dim_qk, **new)
        if backward_:
            product = torch.empty(n, chunks, blocks, **new)
    if return_last:
        c_last = torch.empty(form.batch, form.heads, dim_qk, dim_v, **new)
        n_last = torch.empty(form.batch, form.heads, dim_qk, **new)
    forward_c, forward_n = forward_memory or (None, None)
    launch(
        kernels.carry,
        n * blocks,
        *(x, y, rows, grad_rows, marks, c0, n0, kept_c, kept_n, c_last, n_last),
        *(forward_c, forward_n, product),
        *strides(x, y),
        *(form.heads, form.steps, form.chunk, chunks, rows.stride(0)),
        grad_rows.stride(0) if backward_ else 0,
        DK=dim_qk,
        DV=dim_v,
        BACKWARD=backward_,
        NORMALIZE=form.normalize,
        HAS_C0=c0 is not None,
        HAS_N0=n0 is not None,
        KEEP=chunks > 1,
        LAST=return_last,
        PRODUCTS=product is not None,
        REVERSE=form.flags["REVERSE"],
        UPCAST=form.flags["UPCAST"],
        PRECISION=form.flags["PRECISION"],
        BT=tile.bt,
        BK=bk,
        BV=bv,
        tile=tile,
    )
    return kept_c, kept_n, c_last, n_last, product


def _at_the_end(end, last, dstate, form: _Form) -> tuple[Tensor | None, Tensor | None]:
    """<C, dC> + <n, dn> at each chunk's end (N, NC), and the gradient of the last m beside it (N,)."""
    dc, dn, dm = dstate
    product = None
    if dc is not None:
        product = (last[0] * dc).flatten(2).sum(-1)
    if dn is not None:
        with_n = (last[1] * dn).sum(-1)
        product = with_n if product is None else product + with_n
    if product is not None:
        if end is None:
            end = product.view(-1, 1)
        else:
            end[:, -1] += product.flatten()
    mu_last = None
    if form.exponential and (product is not None or dm is not None):
        mu_last = dm if product is None else -product if dm is None else dm - product
        mu_last = mu_last.contiguous()
    return end, mu_last


def _grad_gates(i, f, rows, grad_rows, qdq, kdk, end, mu_last, want_m0: bool, reset: bool, form: _Form):
    from . import mlstm_triton_gates as kernels

    n, steps, chunks = form.heads_all, form.steps, form.chunks
    di, df = i.new_empty(i.shape), f.new_empty(f.shape)
    strided = (rows.stride(0), grad_rows.stride(0), form.eps)
    mu = None
    moves = form.exponential and (form.normalize or mu_last is not None)
    if moves and (chunks > 1 or want_m0 or mu_last is not None):
        mu = torch.empty(n, chunks + 1, dtype=torch.float32, device=form.device)
        launch(
            kernels.chain_gradient,
            n,
            *(rows, grad_rows, mu_last, mu, steps, form.chunk, chunks, *strided),
            NORMALIZE=form.normalize,
            HAS_MU_LAST=mu_last is not None,
            BLOCK=form.block,
            tile=form.gates,
        )
    launch(
        kernels.grad_gates,
        n * chunks,
        *(i, f, di, df, rows, grad_rows, qdq, kdk, end, mu, form.heads),
        *strides(i, f, di, df),
        *(steps, form.chunk, chunks, n, *strided),
        PARTS_Q=qdq.shape[0],
        PARTS_K=kdk.shape[0],
        EXPONENTIAL=form.exponential,
        NORMALIZE=form.normalize,
        REVERSE=form.reverse,
        RESET=reset,
        HAS_END=end is not None,
        HAS_MU=mu is not None,
        BLOCK=form.block,
        tile=form.gates,
    )
    return di, df, mu
