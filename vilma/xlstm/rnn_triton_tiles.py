"""Which form and tiles the Triton kernels of the recurrent cells take: a table, nothing is timed."""

from typing import NamedTuple

import torch

from .rnn_naive import CELLS


class Tile(NamedTuple):
    """Rows of the batch, features that are made, features that are read at a time, warps, pipeline stages.

    The resident form makes and reads all features at once and takes no notice of bd and bk. It keeps r of
    ``hold`` gates in registers, and of the others in shared memory; the other forms take no notice of that.
    """

    bb: int = 16
    bd: int = 32
    bk: int = 64
    warps: int = 4
    stages: int = 2
    hold: int = 4


class Plan(NamedTuple):
    """The form that a sequence is run in (resident, whole or alternating), and its tiles.

    resident: `rnn_triton_kernels`, r in registers. whole: `rnn_triton_tiled`, all steps in one launch, r from
    the cache. alternating: the same, one launch a step. A single step is always an alternating one.
    """

    form: str
    forward: Tile
    backward: Tile
    replay: Tile
    step: Tile


# Bytes of r, every gate's, that a program may keep on its multiprocessor: half of the registers on NVIDIA; on
# AMD Triton 3.9 spills two thousand registers beyond a quarter
RESIDENT = {"sm80": 128 * 1024, "sm90": 128 * 1024, "gfx942": 64 * 1024}
# Bytes of one gate's r, which passes through shared memory
_SHARED = {"sm80": 96 * 1024, "sm90": 224 * 1024, "gfx942": 64 * 1024}
# The largest head size that is run whole; beyond it a launch a step costs less than r from the cache (on an
# H200, 16 sequences of 4 heads of 192: 18 microseconds a step whole, 9 for 2 heads of 384 step by step). None
# on AMD: the barrier that Triton makes there was not seen to wait for what was stored to memory.
WHOLE = {"sm80": 256, "sm90": 128, "gfx942": 0}

# Rows: the largest bytes of r for which a row is taken; then forward and backward.
_RESIDENT = {
    "sm80": (
        (4 * 1024, Tile(warps=2, stages=3), Tile(warps=2, stages=3)),
        (32 * 1024, Tile(warps=4, stages=3), Tile(warps=4, stages=2)),
        (128 * 1024, Tile(warps=8, stages=2, hold=3), Tile(warps=8, stages=2)),
    ),
    "sm90": (
        (4 * 1024, Tile(warps=2, stages=3), Tile(warps=2, stages=3)),
        (32 * 1024, Tile(warps=4, stages=3), Tile(warps=4, stages=3)),
        (64 * 1024, Tile(warps=8, stages=3), Tile(warps=8, stages=3)),
        (128 * 1024, Tile(warps=8, stages=3, hold=1), Tile(warps=8, stages=3)),
    ),
    "gfx942": (
        (4 * 1024, Tile(warps=2, stages=1), Tile(warps=2, stages=1)),
        (64 * 1024, Tile(warps=4, stages=1), Tile(warps=4, stages=1)),
    ),
}
_WHOLE = {
    "sm80": (Tile(16, 64, 64, 8, 2), Tile(16, 64, 64, 8, 2)),
    "sm90": (Tile(16, 64, 64, 8, 3), Tile(16, 64, 64, 8, 3)),
    "gfx942": (Tile(16, 64, 64, 8, 1), Tile(16, 64, 64, 8, 1)),
}
_ALTERNATING = {
    "sm80": (Tile(16, 32, 64, 4, 3), Tile(16, 32, 64, 4, 2)),
    "sm90": (Tile(16, 32, 64, 4, 4), Tile(16, 32, 64, 4, 3)),
    "gfx942": (Tile(16, 32, 64, 4, 1), Tile(16, 32, 64, 4, 1)),
}
# Where bk holds all features r is read once, else at every step
_REPLAY = Tile(16, 32, 128, 4, 3)


def plan_for(kind: str, dtype: torch.dtype, cell: str, dim: int, form: str | None = None) -> Plan:
    """The table. ``kind`` as `mlstm_triton_tiles.kind_of`; ``form`` replaces the table's choice."""
    if kind == "sm100":
        kind = "sm90"
    half, hip = dtype != torch.float32, kind == "gfx942"
    # a float32 product of TF32 ones takes a high and a low part
    width = 2 if half else 4 if hip else 8
    held = len(CELLS[cell].r) * padded(dim) ** 2 * width
    fits = held <= RESIDENT[kind] and padded(dim) ** 2 * dtype.itemsize <= _SHARED[kind]
    if form is None:
        form = "resident" if fits else "whole" if dim <= WHOLE[kind] else "alternating"
    step = _ALTERNATING[kind][0]
    replay = _REPLAY._replace(stages=1) if hip else _REPLAY
    if form == "resident":
        forward, backward = next((x[1:] for x in _RESIDENT[kind] if held <= x[0]), _RESIDENT[kind][-1][1:])
    else:
        forward, backward = (_WHOLE if form == "whole" else _ALTERNATING)[kind]
    if not half:
        step, replay = step._replace(bk=32, stages=1), replay._replace(bk=64, stages=1)
        if form != "resident":
            forward, backward = (x._replace(bk=32, stages=1) for x in (forward, backward))
    return Plan(form, *(_cut(x, dim) for x in (forward, backward, replay, step)))


def padded(dim: int) -> int:
    """The power of two that holds the head; a matrix product needs 16."""
    return max(16, 1 << (dim - 1).bit_length())


def _cut(tile: Tile, dim: int) -> Tile:
    """The tile no wider than the head."""
    return tile._replace(bd=min(tile.bd, padded(dim)), bk=min(tile.bk, padded(dim)))
