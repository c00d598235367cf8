"""Compiles the recurrent cells' Triton kernels without a GPU: `python rnn_triton_compile.py`.

Standard input: a JSON list of jobs (dictionaries, see `Job`). Standard output: one JSON line a kernel, with
registers, shared memory and instructions that go to local memory (spills). What `forward`, `backward` and
`step` launch is compiled, exactly as it would be launched there.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from vilma.xlstm import rnn_triton
from vilma.xlstm.rnn_naive import CELLS
from vilma.xlstm.rnn_torch import Form
from vilma.xlstm.rnn_triton_tiles import Tile, plan_for

# PYTHONSAFEPATH leaves a script's own folder out
sys.path.append(str(Path(__file__).resolve().parent))
from triton_compile import TARGETS, report, source


@dataclasses.dataclass(frozen=True)
class Job:
    target: str = "sm_90"
    cell: str = "slstm"
    dtype: str = "bfloat16"
    dim: int = 64
    batch: int = 16
    steps: int = 3
    state: bool = True
    reset: bool = False
    clip: float | None = None
    reverse: bool = False
    form: str | None = None
    precision: str = "ieee"
    compile: bool = True  # False: only what tells the compiled kernels apart
    kernels: tuple[str, ...] = ()  # all of them when empty
    tiles: dict | None = None  # {"forward": [16, 128, 128, 8, 3]}: replaces the table's


def launches(job: Job) -> list[tuple]:
    """(kernel, arguments, constants, tile) of everything that is launched for the job's shape."""
    recorded = []
    rnn_triton.launch = lambda kernel, programs, *args, tile, **constants: recorded.append(
        (kernel, args, constants, tile)
    )
    rnn_triton.float32_precision = lambda *_: job.precision
    dtype, kinds = getattr(torch, job.dtype), CELLS[job.cell]
    plan = plan_for(TARGETS[job.target][1], dtype, job.cell, job.dim, job.form)
    plan = plan._replace(**{name: Tile(*tile) for name, tile in (job.tiles or {}).items()})
    batch, steps, heads = job.batch, job.steps, 4

    def new(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    wx = new(batch, steps, len(kinds.wx), heads, job.dim, dtype=dtype)
    r = new(heads, job.dim, len(kinds.r), job.dim, dtype=dtype)
    b = new(len(kinds.b), heads, job.dim)
    state = tuple(new(batch, heads, job.dim) if job.state else None for _ in kinds.states)
    starts = new(batch, steps, dtype=torch.bool) if job.reset else None
    form = Form(job.cell, job.reverse, job.clip)
    h, last = rnn_triton.forward(wx, r, b, state, starts, form, True, plan)
    dlast = last if job.state else (None,) * len(last)
    rnn_triton.backward((h, *dlast), wx, r, b, state, starts, h, last, form, plan)
    rnn_triton.step(wx[:, 0], r, b, state, form, plan.step)
    return [x for x in recorded if not job.kernels or x[0].fn.__name__ in job.kernels]


if __name__ == "__main__":
    seen = set()
    for given in json.load(sys.stdin):
        job = Job(**given)
        for kernel, args, constants, tile in launches(job):
            made = source(kernel, args, constants, TARGETS[job.target][0])
            key = str((job.target, kernel.fn.__name__, made.signature, made.constants, made.attrs, tile))
            if key in seen:
                continue
            seen.add(key)
            found = {
                "target": job.target,
                "kernel": kernel.fn.__name__,
                "shape": f"{job.cell} {job.dtype} {job.precision} {job.dim}",
                "tile": list(tile),
            }
            try:
                found |= report(job, made, tile) if job.compile else {"key": key}
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {str(error)[-600:]}"
            print(json.dumps(found), flush=True)
