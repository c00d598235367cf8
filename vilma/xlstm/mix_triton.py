"""What surrounds the mLSTM in a pre-up-projection block, on GPUs: buffers and launches around the kernels of
`mix_triton_kernels` and `mix_triton_gradients`. triton is imported when a kernel is launched.

Four passes over memory take the place of some fifty operators: `before` and `behind` the mLSTM, and the
gradient of each. u is read where it lies, parameters in the dtype they have. Kept for the backward: u and h;
p, from which c follows, and q, k, v are computed again.

``w`` holds the parameters by name (`Parameters`). A convolution of weight (E, 1, k, k) is one over the (Y, X)
grid of tokens, with odd k; one of (E, 1, k) is causal along them. ``reverse`` mirrors both.

Shapes: B batch, N = Y X tokens, E = H D channels, H heads of D, W block width.
"""

from functools import cache
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .mlstm_triton import available
from .mlstm_triton_launch import interpreting, launch, on_device
from .mlstm_triton_tiles import Tile, float32_precision, kind_of

WIDTHS = (1, 2, 4, 8, 16, 32)  # of blocks; they divide the channels of a tile
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, *_HALF)
_MOST_HEADS, _MOST_DIM, _MOST_TAPS = 32, 1024, 64
_LINE = 64  # parts of a row of sums begin at multiples of it


class Parameters(Protocol):
    """As `vilma.vil.mixing.MixWeights`; None where a bias is not there."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    i_weight: Tensor
    i_bias: Tensor
    f_weight: Tensor
    f_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    skip: Tensor


class MixTiles(NamedTuple):
    """bt tokens and bk channels of each kernel with products or taps."""

    before: Tile
    project_backward: Tile
    convolve_backward: Tile


# What compiles without spilling, or next to it, and leaves room for several programs at once. On Hopper the
# operands of a product with 64 rows or more are read from rows of 128 bytes: 64 channels of a half type (see
# `mlstm_triton_tiles`). Of the gates' gradients, whose columns are few, it has 32 rows: those go to the older
# instructions.
_TABLE = {
    ("", "half"): MixTiles(Tile(32, 0, 32, 0, 4, 1), Tile(32, 0, 64, 0, 8, 1), Tile(64, 0, 64, 0, 8, 1)),
    ("sm90", "half"): MixTiles(
        Tile(64, 0, 64, 0, 8, 1, 128), Tile(32, 0, 64, 0, 8, 1, 128), Tile(64, 0, 64, 0, 8, 1)
    ),
    ("gfx942", "half"): MixTiles(
        Tile(32, 0, 32, 0, 4, 1), Tile(32, 0, 32, 0, 4, 1), Tile(64, 0, 64, 0, 8, 1)
    ),
    ("", "float32"): MixTiles(Tile(32, 0, 32, 0, 4, 1), Tile(32, 0, 32, 0, 4, 1), Tile(64, 0, 32, 0, 8, 1)),
}
# channels of a head times tokens that a program holds at a time, behind the mLSTM
_AREA, _AREA_BACKWARD = 2048, 1024
_PROGRAMS = 4  # that share the tokens, for each multiprocessor
_FINISH = Tile(128, 0, 32, 0, 4, 1)


def tiles_for(kind: str, dtype: torch.dtype) -> MixTiles:
    """The table. ``kind``: as in `mlstm_triton_tiles`."""
    name = "half" if dtype in _HALF else "float32"
    return _TABLE.get((kind, name), _TABLE["", name])


def supports(u: Tensor, w: Parameters) -> bool:
    """Whether the kernels take tensors of these dtypes and sizes; nothing is asked of the device."""
    inner, heads = u.shape[-1] // 2, w.i_weight.shape[0]
    kernel = tuple(w.conv_weight.shape[2:])
    return (
        u.dtype in _DTYPES
        and all(x is None or x.dtype in _DTYPES for x in w)
        and w.q_weight.shape[-1] in WIDTHS
        and heads <= _MOST_HEADS
        and inner // heads <= _MOST_DIM
        and prod(kernel) <= _MOST_TAPS
        and (len(kernel) == 1 or (kernel[0] == kernel[1] and kernel[0] % 2 == 1))
        and u.numel() > 0
    )


def serves(u: Tensor, w: Parameters) -> bool:
    """Whether the kernels run with these tensors where they are."""
    return u.device.type == "cuda" and supports(u, w) and _can_run(u.device)


@cache
def _can_run(device: torch.device) -> bool:
    return available(device)[0]


def rows(x: Tensor) -> Tensor:
    """(B, Y, X, C) as (B, N, C) with a last axis of stride 1; a copy only where no view is one."""
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def before(
    u: Tensor, w: Parameters, grid: tuple[int, int], reverse: bool, gates: bool, tiles: MixTiles | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """u (B, N, 2 E) -> c (B, N, E); q, k, v (B, N, 3, E); the gates (B, N, 2 H) in float32.

    Without ``gates`` the first is p instead, with c = SiLU(p), and the last None.
    """
    from . import mix_triton_kernels as kernels

    form = _Form(u, w, grid, reverse)
    tile = (tiles or form.tiles).before
    c = u.new_empty(form.batch, form.steps, form.inner)
    qkv = u.new_empty(form.batch, form.steps, 3, form.inner)
    found = u.new_empty(form.batch, form.steps, 2 * form.heads, dtype=torch.float32) if gates else None
    least = _power_of_two(2 * form.heads)
    split = form.half and not form.products["UPCAST"]
    columns = 2 * max(8, least) if split else max(16, least)
    with on_device(u):
        launch(
            kernels.before,
            -(-form.tokens // tile.bt),
            *(u, form.taps_first, w.conv_bias, w.q_weight, w.q_bias, w.k_weight, w.k_bias, w.v_weight),
            *(w.v_bias, w.i_weight, w.i_bias, w.f_weight, w.f_bias, c, qkv, found),
            *(*form.strides, form.tokens, form.steps, *form.grid),
            **form.sizes,
            **form.taps,
            **form.products,
            COLUMNS=columns,
            G=columns // 2 if split else columns,
            BT=tile.bt,
            BC=tile.bk,
            tile=tile,
        )
    return c, qkv, found


def behind(u: Tensor, w: Parameters, eps: float, c: Tensor, h: Tensor) -> Tensor:
    """c (B, N, E) and h (B, N, H, D) -> y (B, N, E)."""
    from . import mix_triton_kernels as kernels

    batch, steps, heads, dim = h.shape
    y = torch.empty_like(c)
    wide, length = _head_tile(dim, _AREA)
    with on_device(u):
        launch(
            kernels.behind,
            -(-batch * steps // length) * heads,
            *(u, c, h, w.norm_weight, w.norm_bias, w.skip, y, *u.stride()[:2], batch * steps, steps, eps),
            E=heads * dim,
            D=dim,
            DP=wide,
            BT=length,
            tile=Tile(0, 0, 0, 0, 4, 1),
        )
    return y


def behind_backward(
    dy: Tensor, u: Tensor, w: Parameters, eps: float, p: Tensor, h: Tensor, du: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """dy (B, N, E), p and h -> dh, what comes to c here, gradients of parameters by name.

    Writes z's half of du (B, N, 2 E), which is contiguous.
    """
    from . import mix_triton_gradients as kernels

    batch, steps, heads, dim = h.shape
    dh, dc = torch.empty_like(h), torch.empty_like(p)
    wide, length = _head_tile(dim, _AREA_BACKWARD)
    shares, tiles = _share(u.device, -(-batch * steps // length), heads)
    field = _whole_lines(heads * dim)
    parts = u.new_empty(shares, 3 * field, dtype=torch.float32)
    with on_device(u):
        launch(
            kernels.behind_backward,
            shares * heads,
            *(dy, u, p, h, w.norm_weight, w.norm_bias, w.skip, du, dh, dc, parts),
            *(*dy.stride()[:2], *u.stride()[:2], batch * steps, steps, tiles, eps),
            E=heads * dim,
            D=dim,
            DP=wide,
            FIELD=field,
            BT=length,
            tile=Tile(0, 0, 0, 0, 4, 1),
        )
        names = {"norm_weight": 0, "norm_bias": field, "skip": 2 * field}
        return dh, dc, _finish(parts, w, names)


def before_backward(
    u: Tensor,
    w: Parameters,
    grid: tuple[int, int],
    reverse: bool,
    p: Tensor,
    d_tokens: tuple[Tensor, Tensor, Tensor],
    d_gates: tuple[Tensor, Tensor],
    dc: Tensor,
    du: Tensor,
    tiles: MixTiles | None = None,
) -> dict[str, Tensor]:
    """Writes a's half of du (contiguous) and returns gradients of parameters by name.

    d_tokens: gradients of q, k, v (B, N, E); d_gates: of i and f (B, H, N) in float32; all contiguous. dc:
    what comes to c from behind the mLSTM.
    """
    from . import mix_triton_gradients as kernels

    form = _Form(u, w, grid, reverse)
    tiles = tiles or form.tiles
    inner, heads, blocks = form.inner, form.heads, form.inner * w.q_weight.shape[-1]
    dp, da = torch.empty_like(p), torch.empty_like(p)

    field = _whole_lines(inner)
    names, at = {}, 0
    for name, size in (("q_weight", blocks), ("k_weight", blocks), ("v_weight", blocks)):
        names[name], at = at, at + _whole_lines(size)
    for name in ("q_bias", "k_bias", "v_bias"):
        names[name], at = at, at + field
    for name in ("i_weight", "f_weight"):
        names[name], at = at, at + _whole_lines(3 * inner * heads)
    columns = max(16, _power_of_two(2 * heads + 1))
    names |= {"i_bias": at, "f_bias": at + _LINE}
    width = at + 2 * _LINE

    tile = tiles.project_backward
    in_width = -(-inner // tile.bk)
    shares, each = _share(u.device, -(-form.tokens // tile.bt), in_width)
    parts = u.new_empty(shares, width, dtype=torch.float32)
    with on_device(u):
        shared = {
            **form.sizes,
            "R": columns,
            "AT_BIAS": names["q_bias"],
            "AT_I": names["i_weight"],
            "AT_F": names["f_weight"],
            "AT_GATES": names["i_bias"],
            "LINE": _LINE,
            "ROW": width,
            "FIELD": field,
            **form.products,
            "BT": tile.bt,
            "BC": tile.bk,
        }
        dq, dk, dv = d_tokens
        of_q, of_v = (w.q_weight, w.q_bias, w.k_weight, w.k_bias), (w.v_weight, w.v_bias, None, None)
        for queries, *inputs, weights, out, strides in (
            (True, p, dq, dk, dc, of_q, dp, p.stride()[:2]),
            (False, u, dv, None, None, of_v, da, form.strides),
        ):
            launch(
                kernels.project_backward,
                shares * in_width,
                *(*inputs, *d_gates, *weights, w.i_weight, w.f_weight, out, parts),
                *(*strides, form.tokens, form.steps, each),
                QUERIES=queries,
                **shared,
                tile=tile,
            )
        grads = _finish(parts, w, names)

        tile = tiles.convolve_backward
        in_width, in_length = -(-inner // tile.bk), -(-form.tokens // tile.bt)
        at_bias = _whole_lines(w.conv_weight.numel())
        parts = u.new_empty(in_length, at_bias + field, dtype=torch.float32)
        launch(
            kernels.convolve_backward,
            in_length * in_width,
            *(u, dp, da, form.taps_first, w.conv_bias, du, parts),
            *(*form.strides, form.tokens, form.steps, *form.grid),
            E=inner,
            **form.taps,
            AT_BIAS=at_bias,
            ROW=at_bias + field,
            BT=tile.bt,
            BC=tile.bk,
            tile=tile,
        )
        return grads | _finish(parts, w, {"conv_weight": 0, "conv_bias": at_bias})


def _finish(parts: Tensor, w: Parameters, names: dict[str, int]) -> dict[str, Tensor]:
    """Sums of the rows, cut into the named parameters from where each begins in a row."""
    from . import mix_triton_gradients as kernels

    given = {name: x for name in names if (x := getattr(w, name)) is not None}
    dtypes = {x.dtype for x in given.values()}
    total = parts.new_empty(parts.shape[1], dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32)
    launch(
        kernels.finish,
        -(-parts.shape[1] // _FINISH.bk),
        *(parts, total, parts.shape[0]),
        ROW=parts.shape[1],
        BR=_FINISH.bt,
        BC=_FINISH.bk,
        tile=_FINISH,
    )
    return {
        name: total[names[name] : names[name] + x.numel()].view(x.shape).to(x.dtype)
        for name, x in given.items()
    }


class _Form:
    """What the launches of one call share."""

    def __init__(self, u: Tensor, w: Parameters, grid: tuple[int, int], reverse: bool):
        self.batch, self.steps = u.shape[:2]
        self.inner, self.heads = u.shape[2] // 2, w.i_weight.shape[0]
        self.tokens, self.strides = self.batch * self.steps, u.stride()[:2]
        kernel = tuple(w.conv_weight.shape[2:])
        causal = len(kernel) == 1
        self.grid = (1, self.steps) if causal else grid
        rows, columns = (1, *kernel) if causal else kernel
        self.taps = {
            "KY": rows,
            "KX": columns,
            "OY": rows // 2,
            "OX": columns - 1 if causal else columns // 2,
            "SIGN": -1 if reverse else 1,
        }
        self.taps_first = w.conv_weight.reshape(self.inner, rows * columns).mT.contiguous()
        self.half = u.dtype in _HALF
        self.tiles = tiles_for(kind_of(u.device), u.dtype)
        self.sizes = {"E": self.inner, "W": w.q_weight.shape[-1], "H": self.heads}
        bfloat16 = u.dtype == torch.bfloat16
        self.products = {
            "UPCAST": bfloat16 and interpreting(),
            "PRECISION": "ieee" if bfloat16 else float32_precision(u.device, True),
        }


def _head_tile(dim: int, area: int) -> tuple[int, int]:
    """The block of channels that holds a head, and tokens beside it."""
    wide = max(16, _power_of_two(dim))
    return wide, max(1, area // wide)


def _share(device: torch.device, tiles: int, beside: int) -> tuple[int, int]:
    """How many programs share ``tiles`` tiles of tokens, and tiles of each; ``beside``: programs a share."""
    each = -(-tiles * beside // (_PROGRAMS * _multiprocessors(device)))
    return -(-tiles // each), each


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter runs one program after another
    return torch.cuda.get_device_properties(device).multi_processor_count


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _whole_lines(size: int) -> int:
    return -(-size // _LINE) * _LINE
