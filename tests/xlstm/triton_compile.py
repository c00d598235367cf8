"""Compiles the mLSTM's Triton kernels without a GPU and reports what they cost: `python triton_compile.py`.

Standard input: a JSON list of jobs (dictionaries, see `Job`). Standard output: one JSON line a kernel, with
registers, shared memory, and instructions that go to local memory (spills). Everything that `forward`,
`backward` and `step` launch for the job's shape is compiled, exactly as it would be launched there; what an
earlier job has compiled is left out. A job with ``compile`` false only names what it would compile.
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
from vilma.xlstm.mlstm_triton_launch import options_of

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "sm80"),
    "sm_90": (GPUTarget("cuda", 90, 32), "sm90"),
    "sm_100": (GPUTarget("cuda", 100, 32), "sm100"),
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
    batch: int = 64
    dtype: str = "bfloat16"
    steps: int = 196
    dim_qk: int = 96
    dim_v: int = 96
    gate: str = "exp"
    normalize: bool = True
    reverse: bool = False
    state: bool = False
    reset: bool = False
    precision: str | None = None  # of float32 products; what the device has when None
    compile: bool = True
    kernels: tuple[str, ...] = ()  # all of them when empty
    tiles: dict | None = None  # {"grad_q": [64, 64, 128, 128, 4, 2]}: replaces the table's


def launches(job: Job) -> list[tuple]:
    """(kernel, arguments, constants, tile) of everything that is launched for the job's shape."""
    recorded = []
    mlstm_triton.launch = lambda kernel, programs, *args, tile, **constants: recorded.append(
        (kernel, args, constants, tile)
    )
    kind = TARGETS[job.target][1]
    precision = job.precision or ("ieee" if kind == "gfx942" else "tf32x3")
    mlstm_triton.float32_precision = lambda *_: precision
    dtype = getattr(torch, job.dtype)
    tiles = mlstm_triton.tiles_for(kind, dtype, job.dim_qk, job.dim_v)
    tiles = tiles._replace(**{name: tile and Tile(*tile) for name, tile in (job.tiles or {}).items()})

    def new(*shape, dtype=torch.float32):
        return torch.empty(job.batch, *shape, dtype=dtype, device="meta")

    heads = 4
    q, k = (new(heads, job.steps, job.dim_qk, dtype=dtype) for _ in range(2))
    v = new(heads, job.steps, job.dim_v, dtype=dtype)
    i, f = (new(heads, job.steps) for _ in range(2))
    state = last = (None, None, None)
    if job.state:
        last = (new(heads, job.dim_qk, job.dim_v), new(heads, job.dim_qk), None)
        state = (*last[:2], new(heads) if job.gate == "exp" else None)
    starts = new(job.steps, dtype=torch.bool) if job.reset else None
    options = {"gate": job.gate, "normalize": job.normalize, "eps": 1e-6}
    whole = {"reverse": job.reverse, "chunk_size": None, "tiles": tiles, **options}
    h, _, saved = mlstm_triton.forward(q, k, v, i, f, state, starts, return_state=job.state, **whole)
    mlstm_triton.backward(saved, h, last, **whole)
    mlstm_triton.step(*(x[:, :, 0] for x in (q, k, v, i, f)), state, **options)
    return [x for x in recorded if not job.kernels or x[0].fn.__name__ in job.kernels]


def source(kernel, args: tuple, constants: dict, target: GPUTarget) -> ASTSource:
    """The kernel as the runtime would specialise it for these arguments."""
    aligned = [["tt.divisibility", 16]]
    # AMD addresses with 32 bits where a tensor has less than 2 GB
    of_tensor = aligned + [["tt.pointer_range", 32]] if target.backend == "hip" else aligned
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
            signature[name], attributes[(index,)] = TYPES[x.dtype], of_tensor
        elif isinstance(x, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            if x % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = aligned
    assert next(given, None) is None
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def name_of(kernel, constants: dict) -> str:
    wants = "".join(x for x, flag in (("k", "WANT_K"), ("v", "WANT_V")) if constants.get(flag))
    backward = "_backward" if constants.get("BACKWARD") else ""
    return kernel.fn.__name__ + (f"_{wants}" if wants else "") + backward


def report(job: Job, source: ASTSource, tile: Tile) -> dict:
    target = TARGETS[job.target][0]
    started = time.perf_counter()
    options = options_of(tile)
    compiled = triton.compile(source, target=target, options=options)
    found = {"shared": compiled.metadata.shared}
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
                "kernel": name_of(kernel, constants),
                "shape": f"{job.dtype} T{job.steps} {job.dim_qk}/{job.dim_v}",
                "form": f"{job.gate}{'' if job.normalize else ' plain'}",
                "tile": list(tile),
            }
            try:
                found |= report(job, made, tile) if job.compile else {"key": key}
            except Exception as error:
                found["error"] = f"{type(error).__name__}: {str(error)[-600:]}"
            print(json.dumps(found), flush=True)
