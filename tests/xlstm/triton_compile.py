"""Compiles the mLSTM's Triton kernels without a GPU and reports what they cost: `python triton_compile.py`.

Standard input: a JSON list of jobs (dictionaries, see `Job`). Standard output: one JSON line a kernel, with
registers, shared memory, and instructions that go to local memory (spills). Everything that `forward`,
`backward` and `step` launch for the job's shape is compiled, exactly as it would be launched there.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vilma.xlstm import mlstm_triton
from vilma.xlstm.mlstm_triton import Tile

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "sm80"),
    "sm_90": (GPUTarget("cuda", 90, 32), "sm90"),
    "sm_100": (GPUTarget("cuda", 100, 32), "sm90"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "gfx942"),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
}


@dataclasses.dataclass(frozen=True)
class Job:
    target: str = "sm_90"
    dtype: str = "bfloat16"
    steps: int = 196
    dim_qk: int = 96
    dim_v: int = 96
    gate: str = "exp"
    normalize: bool = True
    reverse: bool = False
    state: bool = False
    reset: bool = False
    precision: str = "ieee"
    kernels: tuple[str, ...] = ()  # all of them when empty
    tiles: dict | None = None  # {"grad_q": [64, 64, 128, 128, 4, 2]}: replaces the table's


def launches(job: Job) -> list[tuple]:
    """(kernel, arguments, constants, tile) of everything that is launched for the job's shape."""
    recorded = []
    mlstm_triton._launch = lambda kernel, programs, *args, tile, **constants: recorded.append(
        (kernel, args, constants, tile)
    )
    mlstm_triton._float32_precision = lambda: job.precision
    kind = TARGETS[job.target][1]
    dtype = getattr(torch, job.dtype)
    tiles = mlstm_triton.tiles_for(kind, dtype, job.dim_qk, job.dim_v)
    tiles = tiles._replace(**{name: tile and Tile(*tile) for name, tile in (job.tiles or {}).items()})
    batch, heads = 2, 4

    def new(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    q, k = (new(batch, heads, job.steps, job.dim_qk, dtype=dtype) for _ in range(2))
    v = new(batch, heads, job.steps, job.dim_v, dtype=dtype)
    i, f = (new(batch, heads, job.steps) for _ in range(2))
    state = last = (None, None, None)
    if job.state:
        last = (new(batch, heads, job.dim_qk, job.dim_v), new(batch, heads, job.dim_qk), None)
        state = (*last[:2], new(batch, heads) if job.gate == "exp" else None)
    starts = new(batch, job.steps, dtype=torch.bool) if job.reset else None
    options = {"gate": job.gate, "normalize": job.normalize, "eps": 1e-6}
    whole = {"reverse": job.reverse, "chunk_size": None, "tiles": tiles, **options}
    h, _, saved = mlstm_triton.forward(q, k, v, i, f, state, starts, return_state=job.state, **whole)
    mlstm_triton.backward(saved, h, last, **whole)
    mlstm_triton.step(*(x[:, :, 0] for x in (q, k, v, i, f)), state, **options)
    return [x for x in recorded if not job.kernels or x[0].fn.__name__ in job.kernels]


def source(kernel, args: tuple, constants: dict) -> ASTSource:
    """The kernel as the runtime would specialise it for these arguments."""
    signature, constexprs, attributes = {}, dict(constants), {}
    given = iter(args)
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            continue
        x = next(given)
        if x is None or (isinstance(x, int) and x == 1 and not parameter.do_not_specialize):
            signature[name], constexprs[name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name], attributes[(index,)] = TYPES[x.dtype], [["tt.divisibility", 16]]
        elif isinstance(x, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if x % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    assert next(given, None) is None
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def report(job: Job, kernel, args, constants, tile) -> dict:
    target = TARGETS[job.target][0]
    started = time.perf_counter()
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source(kernel, args, constants), target=target, options=options)
    found = {
        "target": job.target,
        "kernel": kernel.fn.__name__,
        "shape": f"{job.dtype} {job.precision} T{job.steps} {job.dim_qk}/{job.dim_v}",
        "tile": list(tile),
        "shared": compiled.metadata.shared,
    }
    wants = "".join(x for x, flag in (("k", "WANT_K"), ("v", "WANT_V")) if constants.get(flag))
    if wants:
        found["kernel"] += "_" + wants
    if constants.get("BACKWARD"):
        found["kernel"] += "_backward"
    found |= nvidia(compiled) if target.backend == "cuda" else amd(compiled)
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def nvidia(compiled) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        def tool(*command):
            return subprocess.run(
                [str(TOOLS / command[0]), *command[1:], str(cubin)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout

        usage = tool("cuobjdump", "--dump-resource-usage")
        code = tool("nvdisasm", "-c")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "matrix": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|DMMA)\b", code)),
    }


def amd(compiled) -> dict:
    text = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"),
        "matrix": text.count("v_mfma"),
    }


if __name__ == "__main__":
    for given in json.load(sys.stdin):
        job, seen = Job(**given), set()
        for kernel, args, constants, tile in launches(job):
            key = (kernel.fn.__name__, str(sorted(constants.items())), tile)
            if key not in seen:
                seen.add(key)
                try:
                    found = report(job, kernel, args, constants, tile)
                except Exception as error:
                    found = {"kernel": kernel.fn.__name__, "target": job.target, "tile": list(tile)}
                    found["error"] = f"{type(error).__name__}: {str(error)[-600:]}"
                print(json.dumps(found), flush=True)
