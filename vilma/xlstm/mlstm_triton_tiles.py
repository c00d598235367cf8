"""Which tiles the mLSTM's Triton kernels take: a table by head sizes, dtype and device, nothing is timed."""

from functools import cache
from typing import NamedTuple

import torch

WHOLE_SEQUENCE = 256
MAX_CHUNK = 1024


class Tile(NamedTuple):
    """Steps of the rows and of the columns, features of keys and values, warps and pipeline stages."""

    bt: int
    bs: int
    bk: int
    bv: int
    warps: int = 4
    stages: int = 2


class Tiles(NamedTuple):
    """Of each kernel. `grad_kv` makes dk and dv where a tile holds both head sizes, else the last two do."""

    chunk: int
    forward: Tile
    carry: Tile
    grad_q: Tile
    grad_kv: Tile | None
    grad_k: Tile | None
    grad_v: Tile | None


# Tiles are (bt, bs, bk, bv, warps, stages). "narrow": both head sizes up to 128, each held by one tile.
_TABLE = {
    ("sm80", "narrow"): Tiles(
        chunk=128,
        forward=Tile(64, 64, 128, 128, 8, 2),
        carry=Tile(64, 16, 64, 128, 8, 2),
        grad_q=Tile(64, 64, 128, 128, 8, 2),
        grad_kv=Tile(64, 32, 128, 128, 8, 2),
        grad_k=None,
        grad_v=None,
    ),
    ("sm80", "wide"): Tiles(
        chunk=256,
        forward=Tile(64, 64, 64, 128, 8, 2),
        carry=Tile(64, 16, 64, 128, 8, 2),
        grad_q=Tile(64, 64, 128, 64, 8, 2),
        grad_kv=None,
        grad_k=Tile(64, 64, 128, 64, 8, 2),
        grad_v=Tile(64, 64, 64, 128, 8, 2),
    ),
    ("sm90", "narrow"): Tiles(
        chunk=128,
        forward=Tile(64, 64, 128, 128, 4, 2),
        carry=Tile(64, 16, 64, 64, 4, 2),
        grad_q=Tile(64, 64, 128, 128, 4, 2),
        grad_kv=Tile(64, 64, 128, 128, 8, 2),
        grad_k=None,
        grad_v=None,
    ),
    ("sm90", "wide"): Tiles(
        chunk=256,
        forward=Tile(64, 64, 64, 128, 4, 2),
        carry=Tile(64, 16, 64, 128, 4, 2),
        grad_q=Tile(64, 64, 128, 64, 4, 2),
        grad_kv=None,
        grad_k=Tile(64, 64, 128, 64, 4, 2),
        grad_v=Tile(64, 64, 64, 128, 4, 2),
    ),
    ("gfx942", "narrow"): Tiles(
        chunk=128,
        forward=Tile(64, 64, 128, 128, 4, 1),
        carry=Tile(64, 16, 64, 64, 4, 2),
        grad_q=Tile(64, 64, 128, 128, 4, 1),
        grad_kv=None,
        grad_k=Tile(64, 64, 128, 128, 4, 1),
        grad_v=Tile(64, 64, 128, 128, 4, 1),
    ),
    ("gfx942", "wide"): Tiles(
        chunk=256,
        forward=Tile(64, 64, 64, 128, 4, 2),
        carry=Tile(64, 16, 64, 128, 8, 1),
        grad_q=Tile(64, 64, 128, 64, 4, 2),
        grad_kv=None,
        grad_k=Tile(64, 64, 128, 64, 4, 2),
        grad_v=Tile(64, 64, 64, 128, 4, 2),
    ),
}
# float32 products need three times the registers, on every device
_FLOAT32 = Tiles(
    chunk=128,
    forward=Tile(64, 32, 32, 64, 4, 1),
    carry=Tile(32, 16, 32, 64, 4, 1),
    grad_q=Tile(64, 32, 64, 32, 4, 1),
    grad_kv=None,
    grad_k=Tile(32, 32, 64, 32, 4, 1),
    grad_v=Tile(32, 32, 32, 64, 4, 1),
)


def tiles_for(kind: str, dtype: torch.dtype, dim_qk: int, dim_v: int) -> Tiles:
    """The table. ``kind``: sm80 (and everything older than sm90), sm90 (and newer) or gfx942."""
    if dtype == torch.float32:
        return _FLOAT32
    return _TABLE[kind, "narrow" if max(dim_qk, dim_v) <= 128 else "wide"]


def chunk_of(steps: int, chunk_size: int | None, tiles: Tiles) -> int:
    """Steps of a chunk: all of a short sequence, else what was asked for or the table has."""
    if chunk_size is None:
        return steps if steps <= WHOLE_SEQUENCE else tiles.chunk
    return max(1, min(chunk_size, steps, MAX_CHUNK))


def fit(block: int, size: int) -> int:
    """The block cut to the power of two that holds ``size``; a matrix product needs 16."""
    return max(16, min(block, 1 << (size - 1).bit_length()))


@cache
def kind_of(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    if device.type != "cuda":
        return "sm80"
    return "sm90" if torch.cuda.get_device_capability(device)[0] >= 9 else "sm80"
