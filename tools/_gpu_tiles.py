"""Candidates for the tile table of the mLSTM's Triton kernels, for `vilma bench-gpu --sections tiles`.

What a maintainer runs on a device before touching `vilma/xlstm/mlstm_triton_tiles.py`: each row of the table
is replaced by its candidates, one kernel after another, each compared with the row that is there and timed
beside it; the fastest one stays for the kernels that follow. The forward is timed for the first two kernels,
forward and backward for the others.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vilma.bench import interleave
from vilma.testing import random_mlstm, rms_ratio
from vilma.xlstm import mlstm_triton
from vilma.xlstm.mlstm_triton_tiles import Tile, Tiles, kind_of, tiles_for

__all__ = ["SHAPES", "candidates", "prepare", "sweep"]

SHAPES = {
    "TFLA 4096": (16, 8, 4096, 256, 512),
    "ViL-S 224": (256, 4, 196, 192, 192),
    "ViL-B 224": (128, 4, 196, 384, 384),
    "ViL-T 224": (256, 4, 196, 96, 96),
    "ViL-T 448": (64, 4, 784, 96, 96),
}
TOLERANCE = 2e-2

# (bt, bs, bk, bv, warps, stages, registers)
_WIDE = {
    "chunk": (128, 256, 512),
    "forward": (
        (128, 64, 64, 128, 8, 2),
        (128, 64, 64, 128, 8, 3),
        (64, 64, 64, 256, 8, 2),
        (64, 64, 64, 256, 8, 3),
        (64, 64, 64, 256, 4, 2),
        (128, 64, 64, 256, 8, 2),
        (128, 64, 64, 256, 8, 3),
        (64, 64, 128, 128, 4, 2),
        (128, 64, 128, 128, 8, 2),
        (64, 64, 64, 128, 4, 2),
        (64, 64, 64, 128, 4, 4),
        (64, 128, 64, 128, 4, 2),
    ),
    "carry": (
        (64, 0, 128, 128, 8, 2),
        (64, 0, 128, 128, 8, 3),
        (128, 0, 128, 128, 8, 1),
        (128, 0, 128, 128, 8, 2),
        (64, 0, 64, 128, 4, 3),
        (64, 0, 64, 256, 8, 2),
        (64, 0, 64, 64, 4, 3),
    ),
    "grad_q": (
        (128, 64, 128, 64, 8, 3),
        (64, 64, 256, 64, 8, 2),
        (64, 64, 256, 64, 8, 3),
        (64, 64, 256, 64, 4, 2),
        (128, 64, 256, 64, 8, 2),
        (64, 64, 128, 128, 4, 2),
        (128, 64, 128, 128, 8, 2),
    ),
    "grad_k": (
        (64, 64, 256, 64, 8, 3),
        (64, 128, 256, 64, 8, 2),
        (64, 128, 128, 64, 8, 3),
        (64, 64, 128, 64, 4, 3),
        (64, 64, 128, 128, 4, 2),
        (64, 128, 128, 128, 8, 2),
    ),
    "grad_v": (
        (64, 64, 64, 256, 8, 2),
        (64, 64, 64, 256, 8, 3),
        (64, 128, 64, 256, 8, 2),
        (64, 128, 64, 128, 8, 3),
        (64, 64, 128, 128, 4, 2),
        (64, 128, 128, 128, 8, 2),
    ),
}
_NARROW = {
    "chunk": (128, 256),
    "forward": ((64, 64, 128, 128, 4, 2), (64, 64, 128, 128, 4, 3), (64, 32, 128, 128, 4, 2, 168)),
    "carry": ((64, 0, 64, 128, 4, 3), (64, 0, 128, 128, 8, 2), (128, 0, 64, 128, 4, 1)),
    "grad_q": ((64, 64, 128, 128, 4, 2), (64, 32, 128, 128, 4, 2, 168), (64, 64, 128, 128, 8, 2)),
    "grad_kv": (
        (64, 64, 128, 128, 8, 2),
        (64, 64, 128, 128, 4, 1),
        (32, 64, 128, 128, 4, 2),
        (64, 64, 128, 128, 8, 1),
        (32, 64, 128, 128, 8, 1),
    ),
}
_BACKWARD = ("grad_q", "grad_kv", "grad_k", "grad_v")


@dataclass
class Problem:
    """One shape, bfloat16 with float32 gates as the models call it."""

    arguments: list[Tensor]
    upstream: Tensor
    table: Tiles

    def forward(self, tiles: Tiles) -> tuple[Tensor, Any]:
        h, _, saved = mlstm_triton.forward(*self.arguments, tiles=tiles, return_state=False, **_FORM)
        return h, saved

    def both(self, tiles: Tiles) -> list[Tensor]:
        h, saved = self.forward(tiles)
        return [h, *mlstm_triton.backward(saved, self.upstream, tiles=tiles, **_FORM)[:5]]


_FORM = {"gate": "exp", "normalize": True, "reverse": False, "chunk_size": None, "eps": 1e-6}


def prepare(name: str, device: torch.device) -> Problem:
    sizes = SHAPES[name]
    batch, heads, steps, dim_qk, dim_v = sizes
    layout = (batch, steps, heads)
    q, k, v = (
        torch.randn(*layout, dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
        for dim in (dim_qk, dim_qk, dim_v)
    )
    i, f = random_mlstm(batch, heads, steps, 1, 1, device=device)[3:]
    table = tiles_for(kind_of(device), torch.bfloat16, dim_qk, dim_v)
    return Problem([q, k, v, i, f], torch.randn_like(v), table)


def candidates(table: Tiles) -> Iterator[tuple[str, Any]]:
    """(row of the table, what replaces it), in the order in which the rows are settled."""
    for row, values in (_NARROW if table.grad_kv is not None else _WIDE).items():
        for value in values:
            yield row, value if row == "chunk" else Tile(*value)


def replaced(table: Tiles, row: str, value: Any) -> Tiles:
    """``carry`` stands for both of its rows: which one is taken depends on the number of heads."""
    changes = {row: value} | ({"carry_few": value} if row == "carry" else {})
    return table._replace(**changes)


def sweep(name: str, device: torch.device, shard: tuple[int, int] | None = None) -> Iterator[dict[str, Any]]:
    """A row of figures for every candidate, then the table that is fastest.

    shard (of, many): compile its share of the candidates, beside other processes, and time nothing.
    """
    problem = prepare(name, device)
    best = problem.table
    if shard is not None:
        for index, (row, value) in enumerate(candidates(best)):
            if index % shard[1] == shard[0]:
                _try(partial(problem.both, replaced(best, row, value)))
        return
    exact = problem.both(best)
    settled = ""
    runs: dict[str, tuple[Callable[[], Any], Tiles]] = {}
    for row, value in [*candidates(best), ("", None)]:
        if row != settled and runs:
            best = yield from _settle(name, settled, runs, device, best)
            runs = {}
        settled = row
        if not row or (row == "chunk" and problem.arguments[0].shape[2] <= 256):
            continue
        tiles = replaced(best, row, value)
        error = _try(partial(_check, problem, tiles, exact))
        if error:
            yield {"shape": name, "row": row, "tile": _text(value), "error": error}
            continue
        call = problem.both if row in _BACKWARD or row == "chunk" else problem.forward
        if not runs:
            runs["as it is"] = partial(call, best), best
        runs[_text(value)] = partial(call, tiles), tiles
    yield {"shape": name, "row": "best", "tile": json.dumps(best._asdict())}


def _settle(name, row, runs, device, best) -> Iterator[dict[str, Any]]:
    with torch.no_grad():
        times = interleave({text: call for text, (call, _) in runs.items()}, rounds=12, device=device)
    for text, timing in times.items():
        yield {"shape": name, "row": row, "tile": text, "ms": 1e3 * timing.seconds}
    fastest = min(times, key=lambda text: times[text].seconds)
    # within the noise, what is there stays
    return runs[fastest][1] if times[fastest].seconds < 0.99 * times["as it is"].seconds else best


def _check(problem: Problem, tiles: Tiles, exact: list[Tensor]) -> None:
    worst = max(rms_ratio(x, y) for x, y in zip(problem.both(tiles), exact))
    if not worst <= TOLERANCE:
        raise ValueError(f"wrong by {worst:.1e}")


def _try(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # out of resources, or wrong: the others are still worth their time
        return f"{type(error).__name__}: {str(error)[:120]}"
    return ""


def _text(value: Any) -> str:
    return str(value if isinstance(value, int) else tuple(value))
