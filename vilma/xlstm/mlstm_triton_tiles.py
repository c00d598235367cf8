"""Which tiles the mLSTM's Triton kernels take: a table by head sizes, dtype and device, nothing is timed."""

from functools import cache
from typing import NamedTuple

import torch

WHOLE_SEQUENCE = 256
MAX_CHUNK = 1024


class Tile(NamedTuple):
    """Steps of the rows and of the columns, features of keys and values, warps and pipeline stages.

    A kernel that has no such axis takes no notice of the size; it is 0 in the table. ``registers`` bounds
    those of a thread (NVIDIA; 0 does not), so that more programs run at once on a multiprocessor.
    """

    bt: int
    bs: int
    bk: int
    bv: int
    warps: int = 4
    stages: int = 2
    registers: int = 0


class Tiles(NamedTuple):
    """Of each kernel. `grad_kv` makes dk and dv where a tile holds both head sizes, else the last two do.

    `carry` has one program a head and (bk, bv) block; where these are less than `_MANY`, `carry_few` it is.
    No block of features is narrower than ``least``.
    """

    chunk: int
    forward: Tile
    carry: Tile
    grad_q: Tile
    grad_kv: Tile | None
    grad_k: Tile | None
    grad_v: Tile | None
    carry_few: Tile | None = None
    least: int = 16


# about as many as the multiprocessors of the devices in the table
_MANY = 128
# Hopper's and Blackwell's matrix units read rows of 128 bytes (64 features of a half type) from shared
# memory. For narrower ones Triton takes other layouts, of whose addresses ptxas 12.8 makes wrong ones in some
# kernels: garbage, or a read out of bounds, where the same kernel is right with 64 features. So none is
# narrower (float32: 32 features).
_LEAST = 64
# Tiles are (bt, bs, bk, bv, warps, stages, registers). "narrow": both head sizes up to 128, each held by one
# tile. "middle": up to 256, where it differs from "wide".
# sm90: the fastest that spill nothing, measured on an H100 and, for wide heads, on an H200 (`vilma bench-gpu
# --sections tiles`). The others are what compiles without spilling.
_TABLE = {
    ("sm80", "narrow"): Tiles(
        chunk=128,
        forward=Tile(64, 64, 128, 128, 8, 2),
        carry=Tile(64, 0, 64, 128, 8, 2),
        grad_q=Tile(64, 64, 128, 128, 8, 2),
        grad_kv=Tile(64, 32, 128, 128, 8, 2),
        grad_k=None,
        grad_v=None,
    ),
    ("sm80", "wide"): Tiles(
        chunk=256,
        forward=Tile(64, 64, 64, 128, 8, 2),
        carry=Tile(64, 0, 64, 128, 8, 2),
        grad_q=Tile(64, 64, 128, 64, 8, 2),
        grad_kv=None,
        grad_k=Tile(64, 64, 128, 64, 8, 2),
        grad_v=Tile(64, 64, 64, 128, 8, 2),
    ),
    ("sm80", "float32"): Tiles(
        chunk=128,
        forward=Tile(64, 32, 32, 64, 4, 1),
        carry=Tile(32, 0, 32, 64, 4, 1),
        grad_q=Tile(64, 32, 64, 32, 4, 1),
        grad_kv=None,
        grad_k=Tile(32, 32, 64, 32, 4, 1),
        grad_v=Tile(32, 32, 32, 64, 4, 1),
    ),
    ("sm90", "narrow"): Tiles(
        chunk=128,
        forward=Tile(64, 32, 128, 128, 4, 3, 168),
        carry=Tile(64, 0, 64, 128, 4, 2),
        grad_q=Tile(64, 32, 128, 128, 4, 3, 168),
        grad_kv=Tile(32, 64, 128, 128, 4, 1),
        grad_k=None,
        grad_v=None,
        carry_few=Tile(128, 0, 64, 64, 4, 2),
        least=_LEAST,
    ),
    ("sm90", "wide"): Tiles(
        chunk=128,
        forward=Tile(64, 64, 64, 128, 4, 4),
        carry=Tile(128, 0, 64, 128, 4, 1),
        grad_q=Tile(64, 64, 128, 64, 4, 3),
        grad_kv=None,
        grad_k=Tile(64, 64, 256, 64, 8, 2),
        grad_v=Tile(64, 64, 64, 128, 4, 3),
        carry_few=Tile(128, 0, 64, 64, 4, 2),
        least=_LEAST,
    ),
    ("sm90", "float32"): Tiles(
        chunk=128,
        forward=Tile(64, 32, 32, 128, 4, 1),
        carry=Tile(32, 0, 64, 64, 4, 1),
        grad_q=Tile(64, 32, 128, 32, 4, 1),
        grad_kv=None,
        grad_k=Tile(32, 32, 64, 32, 4, 1),
        grad_v=Tile(32, 32, 32, 128, 4, 1),
        least=32,
    ),
    ("gfx942", "narrow"): Tiles(
        chunk=128,
        forward=Tile(64, 64, 128, 128, 4, 1),
        carry=Tile(64, 0, 64, 64, 4, 2),
        grad_q=Tile(64, 64, 128, 128, 4, 1),
        grad_kv=None,
        grad_k=Tile(64, 64, 128, 128, 4, 1),
        grad_v=Tile(64, 64, 128, 128, 4, 1),
    ),
    ("gfx942", "wide"): Tiles(
        chunk=256,
        forward=Tile(64, 64, 64, 128, 4, 2),
        carry=Tile(64, 0, 64, 128, 8, 1),
        grad_q=Tile(64, 64, 128, 64, 4, 2),
        grad_kv=None,
        grad_k=Tile(64, 64, 128, 64, 4, 2),
        grad_v=Tile(64, 64, 64, 128, 4, 2),
    ),
    ("gfx942", "float32"): Tiles(
        chunk=128,
        forward=Tile(64, 32, 32, 64, 4, 1),
        carry=Tile(32, 0, 32, 64, 4, 1),
        grad_q=Tile(64, 32, 64, 32, 4, 1),
        grad_kv=None,
        grad_k=Tile(32, 32, 64, 32, 4, 1),
        grad_v=Tile(32, 32, 32, 64, 4, 1),
    ),
}
# Blackwell keeps accumulators in a memory of their own: there some of these spill, and Triton 3.7 does not
# compile the gradient of carry in one stage.
_CARRY_100 = {"carry": Tile(64, 0, 64, 128, 8, 2), "carry_few": Tile(64, 0, 64, 64, 4, 2)}
# Beyond 256 this one spills.
_TABLE["sm90", "middle"] = _TABLE["sm90", "wide"]._replace(grad_k=Tile(64, 64, 128, 64, 4, 3))
_TABLE |= {
    ("sm100", "narrow"): _TABLE["sm90", "narrow"]._replace(
        forward=Tile(64, 64, 128, 128, 4, 2), grad_q=Tile(64, 64, 128, 128, 4, 2), **_CARRY_100
    ),
    ("sm100", "wide"): _TABLE["sm90", "wide"]._replace(**_CARRY_100),
    ("sm100", "float32"): _TABLE["sm90", "float32"]._replace(carry=Tile(32, 0, 64, 64, 4, 2)),
}


def tiles_for(kind: str, dtype: torch.dtype, dim_qk: int, dim_v: int) -> Tiles:
    """The table. ``kind``: sm80 (and whatever is not named here), sm90, sm100 or gfx942."""
    if dtype == torch.float32:
        return _TABLE[kind, "float32"]
    largest = max(dim_qk, dim_v)
    if 128 < largest <= 256 and (kind, "middle") in _TABLE:
        return _TABLE[kind, "middle"]
    return _TABLE[kind, "narrow" if largest <= 128 else "wide"]


def carry_tile(tiles: Tiles, heads: int, dim_qk: int, dim_v: int) -> Tile:
    """The tile of `carry` for so many heads of the whole batch."""
    tile = tiles.carry
    programs = heads * -(-dim_qk // fit(tile.bk, dim_qk)) * -(-dim_v // fit(tile.bv, dim_v))
    return tile if programs >= _MANY or tiles.carry_few is None else tiles.carry_few


def chunk_of(steps: int, chunk_size: int | None, tiles: Tiles) -> int:
    """Steps of a chunk: all of a short sequence, else what was asked for or the table has."""
    if chunk_size is None:
        return steps if steps <= WHOLE_SEQUENCE else tiles.chunk
    return max(1, min(chunk_size, steps, MAX_CHUNK))


def block_of(chunk: int) -> int:
    """The block that holds a chunk's steps in the kernels of the gates; one for all up to 64."""
    return max(64, 1 << (chunk - 1).bit_length())


def fit(block: int, size: int, least: int = 16) -> int:
    """The block cut to the power of two that holds ``size``; a matrix product needs 16, some more."""
    return max(least, min(block, 1 << (size - 1).bit_length()))


@cache
def kind_of(device: torch.device) -> str:
    """The devices of the table: those with the shared memory and matrix instructions of what it names.

    sm_86, sm_89 and sm_120 have as little shared memory as the tiles of sm80 take, and its instructions.
    """
    if torch.version.hip is not None:
        return "gfx942"
    if device.type != "cuda":
        return "sm80"
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(torch.cuda.get_device_capability(device)[0], "sm80")


def float32_precision(device: torch.device, normalize: bool) -> str:
    """How float32 products are made: of three TF32 ones, as accurate as float32, where there are any.

    Of a single one where torch's own were allowed that (``torch.backends.cuda.matmul.fp32_precision`` is
    "tf32") and there is no normaliser; the RMS error is 1.5e-3 then. With a normaliser, s_t is a sum of
    scores q . k that cancel, and the gradient goes with 1 / s_t^2: single products left an error of 3e-2.
    """
    if not _has_tf32(device):
        return "ieee"
    single = torch.backends.cuda.matmul.fp32_precision == "tf32" and not normalize
    return "tf32" if single else "tf32x3"


@cache
def _has_tf32(device: torch.device) -> bool:
    if torch.version.hip is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8
