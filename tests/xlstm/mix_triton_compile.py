"""Compiles the Triton kernels around the mLSTM without a GPU: `python mix_triton_compile.py`.

Standard input: a JSON list of jobs (dictionaries, see `Job`). Standard output: one JSON line a kernel, with
registers, shared memory, instructions that go to local memory (spills), and operands that Hopper's matrix
unit reads from rows of less than 128 bytes (narrow). What the four passes launch is compiled, exactly as it
would be launched there.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import triton

from vilma.xlstm import mix_triton
from vilma.xlstm.mlstm_triton_tiles import Tile

# PYTHONSAFEPATH leaves a script's own folder out
sys.path.append(str(Path(__file__).resolve().parent))
from triton_compile import TARGETS, options_of, report, source


class Parameters(SimpleNamespace):
    """By name, and as a sequence, like those of Vision-LSTM."""

    def __iter__(self):
        return iter(vars(self).values())


@dataclasses.dataclass(frozen=True)
class Job:
    target: str = "sm_90"
    dtype: str = "bfloat16"
    parameters: str | None = None  # their dtype, u's when None
    batch: int = 16
    grid: tuple[int, int] = (14, 14)
    inner: int = 384
    heads: int = 4
    width: int = 4
    conv: str = "2d"
    kernel: int = 3
    bias: bool = True
    reverse: bool = False
    compile: bool = True  # False: only what tells the compiled kernels apart
    kernels: tuple[str, ...] = ()  # all of them when empty
    tiles: dict | None = None  # {"before": [64, 0, 64, 0, 4, 1]}: replaces the table's


def launches(job: Job) -> list[tuple]:
    """(kernel, arguments, constants, tile) of everything that is launched for the job's shape."""
    recorded = []
    mix_triton.launch = lambda kernel, programs, *args, tile, **constants: recorded.append(
        (kernel, args, constants, tile)
    )
    kind = TARGETS[job.target][1]
    mix_triton.float32_precision = lambda *_: "ieee" if kind == "gfx942" else "tf32x3"
    mix_triton.kind_of = lambda *_: kind
    dtype = getattr(torch, job.dtype)
    own = getattr(torch, job.parameters or job.dtype)

    def new(*shape, dtype=own):
        return torch.empty(*shape, dtype=dtype, device="meta")

    inner, heads, steps = job.inner, job.heads, job.grid[0] * job.grid[1]
    taps = (job.kernel,) * (2 if job.conv == "2d" else 1)
    bias = new(inner) if job.bias else None
    values = {"conv_weight": new(inner, 1, *taps), "conv_bias": bias}
    for name in "qkv":
        values |= {f"{name}_weight": new(inner // job.width, job.width, job.width), f"{name}_bias": bias}
    for name in "if":
        values |= {f"{name}_weight": new(heads, 3 * inner), f"{name}_bias": new(heads)}
    w = Parameters(**values, norm_weight=new(inner), norm_bias=bias, skip=new(inner))
    u = mix_triton.rows(new(job.batch, *job.grid, 2 * inner, dtype=dtype))
    assert mix_triton.supports(u, w)
    tiles = mix_triton.tiles_for(kind, dtype)
    tiles = tiles._replace(**{name: Tile(*tile) for name, tile in (job.tiles or {}).items()})
    c, _, _ = mix_triton.before(u, w, job.grid, job.reverse, True, tiles)
    h = c.view(job.batch, steps, heads, -1)
    y = mix_triton.behind(u, w, 1e-5, c, h)
    p, _, _ = mix_triton.before(u, w, job.grid, job.reverse, False, tiles)
    du = torch.empty_like(u)
    _, dc, _ = mix_triton.behind_backward(y, u, w, 1e-5, p, h, du)
    gates = (new(job.batch, heads, steps, dtype=torch.float32),) * 2
    mix_triton.before_backward(u, w, job.grid, job.reverse, p, (y, y, y), gates, dc, du, tiles)
    return [x for x in recorded if not job.kernels or x[0].fn.__name__ in job.kernels]


def narrow(job: Job, made, tile: Tile) -> int:
    compiled = triton.compile(made, target=TARGETS[job.target][0], options=options_of(tile))
    return len(re.findall(r"swizzlingByteWidth = (?!128\b)\d+", compiled.asm["ttgir"]))


if __name__ == "__main__":
    seen = set()
    for number, given in enumerate(json.load(sys.stdin)):
        job = Job(**given)
        for kernel, args, constants, tile in launches(job):
            made = source(kernel, args, constants, TARGETS[job.target][0])
            key = str((job.target, kernel.fn.__name__, made.signature, made.constants, made.attrs, tile))
            if key in seen:
                continue
            seen.add(key)
            found = {
                "job": number,
                "target": job.target,
                "kernel": kernel.fn.__name__,
                "shape": f"{job.dtype} {job.inner}/{job.heads} {job.conv} {job.kernel}",
                "tile": list(tile),
            }
            try:
                found |= report(job, made, tile) | {"narrow": narrow(job, made, tile)} if job.compile else {}
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {str(error)[-600:]}"
            print(json.dumps(found), flush=True)
