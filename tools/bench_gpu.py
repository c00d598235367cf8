"""Check every Triton kernel on a GPU against float64, then time kernels and models beside their peers.

One call, made to fit into ten minutes: the checks run side by side in several processes, which also fills
Triton's cache; where one is red, nothing is timed. Then sections are measured one after the other (see
vilma/bench.py), each row printed as it is known, and at the end a table and a JSON file. What does not fit
into the budget is named as not run. Nothing needs to be installed beside torch and triton (and timm for the
models): from a checkout, `PYTHONPATH=. python tools/bench_gpu.py` does it. Peers are found on PYTHONPATH.
"""

import argparse
import functools
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vilma.bench import BOTH, FORWARD, Contender, describe, interleave, measure
from vilma.report import source_commit
from vilma.testing import random_mlstm, random_mlstm_state, rms_ratio
from vilma.tools import _gpu_mix, bench_mlstm
from vilma.xlstm import MLSTMState, mlstm, mlstm_step, rnn
from vilma.xlstm.rnn_naive import CELLS

# RMS ratio to float64 that outputs, states and gradients may have
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 3e-3}
EXTREME = 2e-4  # float32 with gates of +-30
LOOSER = {"dm0": 2, "dn0": 2, "di_bias": 2}  # long sums of rounded products that cancel
RNN_BFLOAT16 = 2e-2  # h is rounded to bfloat16 at every step
BYTES_PER_SECOND = 3.0e12  # an H100's, of every floor; what the device itself copies stands in the JSON file
SECTIONS = (
    "check",
    "graphs",
    "mlstm",
    "step",
    "tfla",
    "rnn",
    "mix",
    "vil",
    "policy",
    "peers",
    "compiled-vil",
    "compiled-policy",
    "tiles",
)
PEERS = ("mlstm-kernels", "flash-linear-attention", "flashrnn", "mamba-ssm", "timm")
TOKENS = 65_536


@dataclass
class Run:
    """Where figures go, and until when there is time."""

    device: torch.device
    until: float
    toy: bool
    copy_rate: float = BYTES_PER_SECOND  # of the device itself
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def left(self, what: str, seconds: float = 15.0) -> bool:
        """Whether something that takes this long still fits; notes what does not."""
        if time.monotonic() + seconds < self.until:
            return True
        self.skipped.append(what)
        return False

    def add(self, section: str, what: str, **figures: Any) -> None:
        row = {"section": section, "what": what} | {k: _round(v) for k, v in figures.items()}
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vilma bench-gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS[:-1])
    parser.add_argument("--minutes", type=float, default=9.5, help="stop starting things after this long")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), help="of these kernels")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="of the checks")
    parser.add_argument("--json", type=Path, default=Path("bench_gpu.json"), metavar="FILE")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="toy sizes, without a GPU under TRITON_INTERPRET=1: no figure counts",
    )
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.dry_run:
        raise ValueError("torch sees no CUDA or ROCm device; --dry-run goes through the motions without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(device, time.monotonic() + 60 * options.minutes, options.dry_run)
    if options.shard:
        return check_shard(*map(int, options.shard.split("/")), run, options.checks)
    facts = describe(device, PEERS) | {"commit": source_commit(), "dry_run": options.dry_run}
    if device.type == "cuda":
        run.copy_rate = copy_rate(device)
        facts["copy_terabytes_per_second"] = round(run.copy_rate / 1e12, 2)
    print(json.dumps(facts), flush=True)
    wrong = 0
    if "check" in options.sections:
        wrong = check(run, options.processes, options.checks)
    for section in options.sections:
        if section != "check" and not wrong and run.left(section):
            try:
                BENCHES[section](run)
            except Exception as error:  # the other sections are still worth their time
                run.skipped.append(f"{section}: {type(error).__name__}: {str(error)[:300]}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps(facts | {"command": "vilma bench-gpu", "skipped": run.skipped})[:-1]
        + ', "rows": [\n '
        + ",\n ".join(map(json.dumps, run.rows))
        + "\n]}\n"
    )
    print_table(run)
    if wrong:
        print(f"{wrong} checks are red: nothing was timed")
    return 1 if wrong else 0


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 4 GiB on the device."""
    source = torch.empty(2**32, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    copied = interleave({"copy": lambda: target.copy_(source)}, rounds=5, device=device)["copy"]
    return 2 * source.numel() / copied.seconds


# Checks. A case is what mlstm or rnn is called with, as JSON, so that it can be named and run again.


def mlstm_cases(toy: bool) -> Iterator[dict[str, Any]]:
    whole = {"state": True, "last": True}
    if toy:
        yield {"sizes": (1, 2, 21, 16, 24), "dtype": "float32", "chunk": 9, **whole}
        yield {"sizes": (1, 1, 9, 16, 16), "dtype": "bfloat16", "gate": "sigmoid", "reverse": True}
        return
    for dtype, steps in itertools.product(("float32", "bfloat16"), (1, 7, 16, 64, 67, 196, 255, 256, 300)):
        yield {"sizes": (2, 2, steps, 96, 96), "dtype": dtype, **(whole if steps % 2 else {})}
    heads = (
        (16, 16),
        (32, 32),
        (48, 48),
        (64, 64),
        (80, 80),
        (96, 128),
        (128, 96),
        (128, 128),
        (33, 50),
        (24, 8),
    )
    for (dim_qk, dim_v), dtype in itertools.product(heads, ("float32", "bfloat16", "float16")):
        yield {"sizes": (2, 2, 196, dim_qk, dim_v), "dtype": dtype, "reverse": True, "transposed": True}
        yield {"sizes": (2, 2, 700, dim_qk, dim_v), "dtype": dtype, "transposed": True, **whole}
    forms = [(gate, norm) for gate in ("exp", "sigmoid") for norm in (True, False)]
    for (gate, normalize), reverse in itertools.product(forms, (False, True)):
        form = {"gate": gate, "normalize": normalize, "reverse": reverse, **whole}
        for dtype in TOLERANCES:
            yield {"sizes": (2, 2, 333, 64, 96), "dtype": dtype, "reset": True, **form}
            yield {"sizes": (2, 2, 784, 96, 96), "dtype": dtype, **form}
        yield {"sizes": (1, 2, 700, 192, 384), "dtype": "bfloat16", **form}
    wide = ((192, 192), (256, 256), (256, 512), (384, 384), (512, 512), (1024, 512))
    for (dim_qk, dim_v), chunk in itertools.product(wide, (None, 128, 256, 512)):
        yield {"sizes": (1, 2, 1100, dim_qk, dim_v), "dtype": "bfloat16", "chunk": chunk, **whole}
        if dim_qk <= 256:
            yield {"sizes": (1, 1, 1100, dim_qk, dim_v), "dtype": "float32", "chunk": chunk, **whole}
    for gates, dtype in itertools.product(
        ("ip30", "im30", "fp30", "fm30", "mixed30"), ("float32", "bfloat16")
    ):
        yield {"sizes": (1, 2, 300, 32, 32), "dtype": dtype, "gates": gates}
        yield {"sizes": (1, 2, 200, 32, 32), "dtype": dtype, "gates": gates, "gate": "sigmoid"}
    yield {"sizes": (1, 2, 16384, 64, 64), "dtype": "float32"}
    yield {"sizes": (1, 2, 16384, 96, 96), "dtype": "bfloat16"}


def rnn_cases(toy: bool) -> Iterator[dict[str, Any]]:
    whole = {"state": True, "last": True}
    if toy:
        yield {"cell": "slstm", "sizes": (2, 5, 1, 16), "dtype": "float32", **whole}
        yield {"cell": "gru", "sizes": (1, 4, 2, 24), "dtype": "bfloat16", "reverse": True}
        return
    for cell, dtype in itertools.product(CELLS, ("float32", "bfloat16")):
        for dim in (16, 40, 64, 96, 128, 192, 256, 768):
            yield {"cell": cell, "sizes": (5, 37, 2, dim), "dtype": dtype, **whole}
        yield {"cell": cell, "sizes": (17, 50, 2, 64), "dtype": dtype, "reverse": True, "reset": True}
        yield {"cell": cell, "sizes": (1, 1, 1, 96), "dtype": dtype, **whole}
        yield {"cell": cell, "sizes": (3, 300, 4, 96), "dtype": dtype, "bias": False}
    for cell in CELLS:  # in bfloat16 rounding decides what is clipped
        yield {"cell": cell, "sizes": (16, 33, 1, 384), "dtype": "float32", "clip": 0.01, **whole}
        yield {"cell": cell, "sizes": (5, 37, 2, 64), "dtype": "float16", **whole}


def check_mlstm(
    device, sizes, dtype, gate="exp", normalize=None, reverse=False, state=False, last=False, reset=False,
    chunk=None, gates="normal", transposed=False,
) -> dict[str, float]:  # fmt: skip
    """RMS ratio to float64 of h, last states and every gradient."""
    kind = getattr(torch, dtype)
    given = list(random_mlstm(*sizes, dtype=torch.float64, device=device, gates=gates, seed=1))
    given = [x.to(kind if i < 3 else torch.float32) for i, x in enumerate(given)]
    if transposed:
        given[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given[:3]]
    start = None
    if state:
        start = random_mlstm_state(sizes[0], sizes[1], *sizes[3:], device=device)
        start = [x.float() for x in (start if gate == "exp" else start[:2])]
    mask = torch.rand(sizes[0], sizes[2], device=device) < 0.05 if reset else None
    options = {"gate": gate, "normalize": normalize, "reverse": reverse, "reset": mask, "chunk_size": chunk}

    def call(backend: str, to: torch.dtype | None) -> list[Tensor]:
        leaves = [x.detach().to(to or x.dtype).requires_grad_() for x in (*given, *(start or ()))]
        s = MLSTMState(*leaves[5:7], leaves[7] if gate == "exp" else None) if state else None
        out = mlstm(*leaves[:5], s, backend=backend, return_state=last, **options)
        return _with_gradients([out[0], *out[1]] if last else [out], leaves)

    names = ["h", *("cnm" if last and gate == "exp" else "cn" if last else "")]
    names += [f"d{x}" for x in ("q", "k", "v", "i", "f", *(("c0", "n0", "m0") if state else ()))]
    exact, found = call("torch", torch.float64), call("triton", None)
    errors = dict(zip(names, map(rms_ratio, found, exact)))
    # df is a difference of terms of the size of di, and about zero where little is remembered
    at = names.index("df")
    scale = max(_rms(exact[at - 1]), _rms(exact[at]), 1e-30)
    errors["df"] = _rms(found[at].double() - exact[at]) / scale
    if not all(torch.isfinite(x).all() for x in found):
        errors["h"] = math.inf
    return errors


def check_rnn(
    device, cell, sizes, dtype, reverse=False, state=False, last=False, reset=False, bias=True, clip=None
) -> dict[str, float]:
    batch, steps, heads, dim = sizes
    kind, spec = getattr(torch, dtype), CELLS[cell]
    random = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(1), device=device)
    given = {
        "wx": random(batch, steps, len(spec.wx), heads, dim).to(kind),
        "r": (random(heads, dim, len(spec.wx), dim) * dim**-0.5).to(kind),
    }
    if bias:
        given["b"] = random(len(spec.b), heads, dim).to(kind)
    if state:
        start = [0.5 * random(batch, heads, dim) for _ in spec.states]
        if cell == "slstm":
            start[2] = start[2].abs() + 1
        given |= {f"{name}0": x for name, x in zip(spec.states, start)}
    mask = torch.rand(batch, steps, device=device) < 0.1 if reset else None
    options = {"cell": cell, "reverse": reverse, "reset": mask, "grad_clip": clip, "return_state": last}

    def call(backend: str, to: torch.dtype | None) -> list[Tensor]:
        leaves = {k: x.detach().to(to or x.dtype).requires_grad_() for k, x in given.items()}
        s = [leaves[f"{name}0"] for name in spec.states] if state else None
        out = rnn(leaves["wx"], leaves["r"], leaves.get("b"), s, backend=backend, **options)
        return _with_gradients([out[0], *out[1]] if last else [out], list(leaves.values()))

    names = ["h", *(f"{x}_last" for x in (spec.states if last else ())), *(f"d{x}" for x in given)]
    return dict(zip(names, map(rms_ratio, call("triton", None), call("torch", torch.float64))))


def _with_gradients(outputs: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor]:
    outputs = [x for x in outputs if x is not None]
    generator = torch.Generator(leaves[0].device).manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, device=x.device).to(x) for x in outputs]
    grads = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves))]


CHECKS: dict[str, Callable[..., dict[str, float]]] = {
    "mlstm": check_mlstm,
    "rnn": check_rnn,
    "mix": _gpu_mix.check,
}


def all_cases(toy: bool, kernels: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """With the kernel that each is of; those that take longest to compile first."""
    given = {"mix": _gpu_mix.cases(toy), "mlstm": mlstm_cases(toy), "rnn": rnn_cases(toy)}
    return [(kind, case) for kind, found in given.items() if kind in kernels for case in found]


def check_shard(shard: int, shards: int, first: int, run: Run, kernels: Sequence[str]) -> int:
    """Every shards-th case from the ``first`` of them on, a line each; an error of the device ends it."""
    for kind, case in all_cases(run.toy, kernels)[shard::shards][first:]:
        limit = TOLERANCES[case["dtype"]]
        if "gates" in case and case["dtype"] == "float32":
            limit = EXTREME
        if kind == "rnn" and case["dtype"] == "bfloat16":
            limit = RNN_BFLOAT16
        if kind == "mix":
            limit = 1.0  # of what is allowed, which it knows itself
        error = ""
        try:
            errors = CHECKS[kind](run.device, **case)
        except Exception as broken:  # one broken case must not hide the others
            error = f"{type(broken).__name__}: {str(broken)[:200]}"
            errors = {error: math.inf}
        limits = {name: LOOSER.get(name, 1) * limit for name in errors}
        wrong = {name: float(f"{x:.2g}") for name, x in errors.items() if not x <= limits[name]}
        worst = max(x / limits[name] for name, x in errors.items())
        line = {"kernel": kind, "case": case, "wrong": wrong, "of_limit": worst, "errors": _short(errors)}
        print(json.dumps(line), flush=True)
        if "CUDA error" in error or "Triton Error" in error:
            return 1  # nothing more runs in this process
    return 0


def check(run: Run, processes: int, kernels: Sequence[str]) -> int:
    """All cases of ``kernels``, side by side; the number of red ones."""
    command = [sys.executable, __file__, *(["--dry-run"] if run.toy else []), "--checks", *kernels, "--shard"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(x for x in sys.path if x)}

    def shard(index: int) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        while True:
            where = f"{index}/{processes}/{len(lines)}"
            done = subprocess.run([*command, where], stdout=subprocess.PIPE, text=True, env=environment)
            found = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
            lines += found
            if done.returncode == 0 or not found:
                return lines

    with ThreadPoolExecutor(processes) as pool:
        lines = [line for found in pool.map(shard, range(processes)) for line in found]
    expected = len(all_cases(run.toy, kernels))
    red = [line for line in lines if line["wrong"]]
    for line in red:
        print(json.dumps({k: line[k] for k in ("kernel", "case", "wrong")}), flush=True)
    for kernel in kernels:
        found = [x for x in lines if x["kernel"] == kernel]
        for dtype in TOLERANCES:
            of = [x for x in found if x["case"]["dtype"] == dtype]
            worst = max((x["of_limit"] for x in of), default=math.nan)
            wrong = sum(bool(x["wrong"]) for x in of)
            run.add("check", f"{kernel} {dtype}", cases=len(of), red=wrong, worst_of_limit=worst)
    return len(red) + expected - len(lines)


def _short(errors: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{x:.2g}") for name, x in errors.items()}


# Sections


def bench_mlstm_shape(run: Run, section: str, shape: bench_mlstm.Shape, contenders: list[Contender]) -> None:
    """One row: every contender's forward and backward, and ours over the floor of memory and arithmetic."""
    results = measure(contenders, device=run.device, rounds=3 if run.toy else 20)
    b, h, t, dk, dv = shape.sizes
    read = 2 * b * h * t * (2 * dk + 2 * dv) + 8 * b * h * t
    moved = {FORWARD: read, BOTH: read + 2 * b * h * t * (4 * dk + 4 * dv) + 24 * b * h * t}
    figures: dict[str, Any] = {"sizes": shape.sizes}
    for mode in (FORWARD, BOTH):
        figures[f"floor {mode}"] = moved[mode] / BYTES_PER_SECOND * 1e3
        for name, result in results.items():
            if mode in result.times:
                figures[f"{name} {mode}"] = result.times[mode].seconds * 1e3
            elif result.error:
                figures[f"{name} error"] = result.error[:120]
    for name, result in results.items():
        if result.peak_bytes:
            figures[f"{name} peak GiB"] = result.peak_bytes.get(BOTH, 0) / 2**30
    run.add(section, shape.name, **figures)


def _mlstm_contenders(run: Run, shape: bench_mlstm.Shape, *, kernels: bool = False) -> list[Contender]:
    """Ours, attention and simple_gla; or, where ``kernels``, ours and mlstm-kernels."""
    dtype = torch.bfloat16
    layout = (shape.batch, shape.steps, shape.heads)
    random = functools.partial(torch.randn, device=run.device)
    q, k = (random(*layout, shape.dim_qk, dtype=dtype).transpose(1, 2) for _ in range(2))
    v = random(*layout, shape.dim_v, dtype=dtype).transpose(1, 2)
    i, f = random(shape.sizes[:3]), random(shape.sizes[:3]) + 3
    given = [x.detach().requires_grad_() for x in (q, k, v, i, f)]
    backend = "triton"
    ours = [
        Contender("vilma exp", lambda: mlstm(*given, backend=backend), given),
        Contender("vilma sigmoid", lambda: mlstm(*given, gate="sigmoid", backend=backend), given),
    ]
    if kernels:
        dense = [x.detach().contiguous().requires_grad_() for x in given]
        paths = [bench_mlstm.peer_paths(shape, run.device, dtype, gate) for gate in ("exp", "sigmoid")]
        chosen = [x for x in itertools.chain(*paths) if "xl_chunk" in x.name and x.name.endswith("chunk 128")]
        return ours + [Contender(x.name, functools.partial(x.cell, *dense), dense) for x in chosen]
    contenders = ours + list(bench_mlstm.attention(shape, given))
    if run.toy:
        return contenders
    if (path := bench_mlstm.simple_gla()) is not None:
        theirs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in given]
        contenders.append(Contender("fla simple_gla", functools.partial(path.cell, *theirs), theirs))
    return contenders


def bench_mlstm_shapes(toy: bool) -> list[bench_mlstm.Shape]:
    if toy:
        return [bench_mlstm.Shape("toy", 1, 2, 20, 16, 16)]
    return [
        bench_mlstm.Shape(name, *sizes)
        for name, sizes in {
            "ViL-T 224, batch 256": (256, 4, 196, 96, 96),
            "ViL-T 256, batch 256": (256, 4, 256, 96, 96),
            "ViL-T 448, batch 64": (64, 4, 784, 96, 96),
            "ViL-S 224, batch 256": (256, 4, 196, 192, 192),
            "ViL-B 224, batch 128": (128, 4, 196, 384, 384),
            "policy chunk, batch 256": (256, 4, 50, 64, 64),
        }.items()
    ]


def bench_vision(run: Run) -> None:
    for shape in bench_mlstm_shapes(run.toy):
        if run.left(f"mlstm {shape.name}"):
            bench_mlstm_shape(run, "mlstm", shape, _mlstm_contenders(run, shape))


def bench_tfla(run: Run) -> None:
    """The table of TFLA (arXiv 2503.14376): 65,536 tokens, 8 heads of 256/512."""
    for steps in (24,) if run.toy else (512, 1024, 2048, 4096, 8192, 16384, 65536):
        tokens, heads, dims = (48, 1, (16, 32)) if run.toy else (TOKENS, 8, (256, 512))
        shape = bench_mlstm.Shape(f"TFLA {steps}", tokens // steps, heads, steps, *dims)
        if run.left(shape.name, 20):
            bench_mlstm_shape(run, "tfla", shape, _mlstm_contenders(run, shape))
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def bench_peers(run: Run) -> None:
    """mlstm-kernels, which compiles anew for every length, minutes at some head sizes; Mamba2 likewise."""
    shapes = {
        "ViL-S 224, batch 256": (256, 4, 196, 192, 192),
        "TFLA 8192": (8, 8, 8192, 256, 512),
        "TFLA 2048": (32, 8, 2048, 256, 512),
        "heads of 128, 512": (64, 8, 512, 128, 128),
    }
    for name, sizes in shapes.items():
        if not run.toy and run.left(f"peers {name}", 90):
            shape = bench_mlstm.Shape(name, *sizes)
            contenders = _mlstm_contenders(run, shape, kernels=True)
            if name == "TFLA 8192":
                contenders += _mamba2(run, shape)
            bench_mlstm_shape(run, "peers", shape, contenders)


def _mamba2(run: Run, shape: bench_mlstm.Shape) -> Iterator[Contender]:
    """Mamba2's scan at its own usual sizes and the same width of values: heads of 64, states of 128."""
    try:
        scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    except Exception:  # not installed, or broken
        return
    heads, random = shape.heads * shape.dim_v // 64, functools.partial(torch.randn, device=run.device)
    x = random(shape.batch, shape.steps, heads, 64, dtype=torch.bfloat16)
    dt = F.softplus(random(shape.batch, shape.steps, heads) - 4)
    b, c = (random(shape.batch, shape.steps, 1, 128, dtype=torch.bfloat16) for _ in range(2))
    given = [y.requires_grad_() for y in (x, dt, -torch.rand(heads, device=run.device) - 1, b, c)]
    name = f"Mamba2 scan, {heads} heads of 64, states of 128"
    yield Contender(name, lambda: scan(*given, chunk_size=256), given)


def bench_step(run: Run) -> None:
    """One step in a CUDA graph, so that only the device's time counts, beside what a copy moves."""
    shapes = {"7B": (8, 256, 512), "policy 8 x 64": (8, 64, 64), "policy 4 x 256": (4, 256, 256)}
    for (name, (heads, dim_qk, dim_v)), batch in itertools.product(shapes.items(), (1, 8, 64)):
        if run.toy and (name, batch) != ("policy 8 x 64", 1):
            continue
        x = random_mlstm(batch, heads, 1, dim_qk, dim_v, device=run.device)
        x = [y[:, :, 0].to(torch.bfloat16 if i < 3 else torch.float32).contiguous() for i, y in enumerate(x)]
        state = MLSTMState(
            *(y.float() for y in random_mlstm_state(batch, heads, dim_qk, dim_v, device=run.device))
        )
        took, issue = _captured(run, functools.partial(mlstm_step, *x, state, backend="triton"))
        moved = 2 * 4 * batch * heads * dim_qk * (dim_v + 1)
        figures = {"microseconds": took * 1e6, "issue_microseconds": issue * 1e6}
        run.add("step", f"{name}, batch {batch}", of_roof=moved / took / run.copy_rate, **figures)


def bench_rnn(run: Run) -> None:
    """The cells beside cuDNN's LSTM of the same width (dense R, input product included) and flashrnn."""
    shapes = [
        (16, 1024, heads, dim) for heads, dim in ((12, 64), (8, 96), (6, 128), (4, 192), (2, 384), (1, 768))
    ]
    for batch, steps, heads, dim in [(2, 5, 1, 16)] if run.toy else shapes:
        what = f"B {batch}, T {steps}, {heads} x {dim}"
        if not run.left(f"rnn {what}", 25):
            continue
        random = functools.partial(torch.randn, device=run.device, dtype=torch.bfloat16)
        contenders = []
        for cell in ("slstm", "lstm"):
            wx = random(batch, steps, 4, heads, dim).requires_grad_()
            r = (random(heads, dim, 4, dim) * dim**-0.5).detach().requires_grad_()
            b = random(4, heads, dim).requires_grad_()
            call = functools.partial(rnn, wx, r, b, cell=cell, backend="triton")
            contenders.append(Contender(f"vilma {cell}", call, (wx, r, b)))
        width = heads * dim
        theirs = torch.nn.LSTM(width, width, batch_first=True).to(run.device, torch.bfloat16)
        x = random(batch, steps, width).requires_grad_()
        name = "cuDNN LSTM" if run.device.type == "cuda" else "torch LSTM"
        contenders.append(Contender(name, functools.partial(theirs, x), (x, *theirs.parameters())))
        contenders += _flashrnn(batch, steps, heads, dim, run.device)
        results = measure(contenders, device=run.device, rounds=3 if run.toy else 8)
        figures = {f"{n} {m}": t.seconds * 1e3 for n, x in results.items() for m, t in x.times.items()}
        figures |= {f"{n} error": x.error[:120] for n, x in results.items() if x.error}
        run.add("rnn", what, **figures)


def _flashrnn(batch: int, steps: int, heads: int, dim: int, device: torch.device) -> Iterator[Contender]:
    try:
        from flashrnn import flashrnn
    except Exception:  # not installed, or broken
        return
    for cell in ("slstm", "lstm"):
        wx = torch.randn(batch, steps, 4, heads, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        r = (
            torch.randn(4, heads, dim, dim, device=device, dtype=torch.bfloat16) * dim**-0.5
        ).requires_grad_()
        b = torch.randn(4, heads, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        call = functools.partial(flashrnn, wx, r, b, function=cell, backend="triton_fused", dtype="bfloat16")
        yield Contender(f"flashrnn {cell}", lambda call=call: call()[0], (wx, r, b))


def bench_mix(run: Run) -> None:
    """What lies between a Vision-LSTM layer's projections, beside the floor of its memory traffic."""
    for size, inner in (("tiny", 384), ("small", 768), ("base", 1536)):
        if (run.toy and size != "tiny") or not run.left(f"mix {size}"):
            continue
        shape = (32, 2, 1) if run.toy else (inner, 14, 256)
        run.add("mix", f"{size} 224", **_gpu_mix.times(*shape, run.device, run.toy, run.copy_rate))


def bench_vil(run: Run, compiled: bool = False) -> None:
    """ViL2 beside DeiT with flash attention, bfloat16, batch 256."""
    import vilma.vil  # noqa: F401 - registers the family

    sizes = {"tiny": (224, 448), "small": (224, 448), "base": (224, 448)}
    for size, resolutions in sizes.items():
        for resolution in resolutions:
            if run.toy and (compiled or size != "tiny" or resolution != 224):
                continue
            if compiled and resolution != 224:
                continue
            what = f"{size} {resolution}{', compiled' if compiled else ''}"
            if not run.left(f"vil {what}", 100 if compiled else 25):  # compiling takes most of it
                continue
            batch = 1 if run.toy else 64 if (size, resolution) == ("base", 448) else 256
            results = {}
            for name in (f"vil2_{size}_patch16_224", f"deit_{size}_patch16_224"):
                results |= _model(run, name, resolution, batch, compiled)
            ours, theirs = list(results)[:2]
            figures = {f"{n} {m}": t.seconds * 1e3 for n, x in results.items() for m, t in x.times.items()}
            figures |= {f"{n} peak GiB": x.peak_bytes.get(BOTH, 0) / 2**30 for n, x in results.items()}
            for mode in (FORWARD, BOTH):
                if mode in results[ours].times and mode in results[theirs].times:
                    figures[f"ratio {mode}"] = results[ours].times[mode].over(results[theirs].times[mode])
            figures |= {f"{n} error": x.error[:200] for n, x in results.items() if x.error}
            run.add("vil", what, batch=batch, **figures)


def _model(run: Run, name: str, resolution: int, batch: int, compiled: bool) -> dict[str, Any]:
    import timm

    model = timm.create_model(name, img_size=resolution).to(run.device, torch.bfloat16).train()
    images = torch.randn(batch, 3, resolution, resolution, device=run.device, dtype=torch.bfloat16)
    call = torch.compile(model) if compiled else model
    labels = torch.zeros(batch, dtype=torch.long, device=run.device)
    loss = Contender(name, lambda: F.cross_entropy(call(images).float(), labels), list(model.parameters()))
    return measure([loss], device=run.device, rounds=2 if run.toy else 8)


def bench_policy(run: Run) -> None:
    """PointMapPolicy: latency of a whole chunk at batch 1, and training of the CALVIN model at batch 128."""
    from vilma.tools import _gpu_policy

    for recipe in _gpu_policy.RECIPES:
        if run.left(f"policy {recipe}", 20):
            run.add(
                "policy", f"chunk, {recipe}", **_gpu_policy.chunk_latency(recipe, run.device, toy=run.toy)
            )
    if run.left("policy training", 25):
        batch = 2 if run.toy else 128
        figures = _gpu_policy.training("CALVIN cat", run.device, batch, toy=run.toy)
        run.add("policy", "training, CALVIN cat", **figures)


def bench_tiles(run: Run) -> None:
    """Candidates for the tile table; only where it is asked for. They are compiled side by side first."""
    from vilma.tools import _gpu_tiles

    if run.toy:
        return
    processes = min(14, os.cpu_count() or 1)
    for name in _gpu_tiles.SHAPES:
        if not run.left(f"tiles {name}", 60):
            continue
        code = "import sys, torch; from vilma.tools._gpu_tiles import sweep; list(sweep({!r}, {}, ({}, {})))"
        where = "torch.device('cuda')"
        workers = [
            subprocess.Popen([sys.executable, "-c", code.format(name, where, index, processes)])
            for index in range(processes)
        ]
        for worker in workers:
            worker.wait()
        for row in _gpu_tiles.sweep(name, run.device):
            run.add("tiles", row.pop("shape"), **row)


def bench_compiled_policy(run: Run) -> None:
    """Chunks through torch.compile; compiling one takes minutes."""
    from vilma.tools import _gpu_policy

    for recipe in _gpu_policy.RECIPES:
        if run.left(f"compiled policy {recipe}", 120):
            figures = _gpu_policy.chunk_latency(recipe, run.device, toy=run.toy, compiled=True)
            run.add("policy", f"chunk, {recipe}, compiled", **figures)


def bench_graphs(run: Run) -> None:
    """Every operator captured in a CUDA graph gives what it gives eagerly."""
    if run.device.type != "cuda":
        return
    x = [y.requires_grad_() for y in random_mlstm(2, 2, 196, 96, 96, device=run.device)]
    step, state = (
        [y[:, :, 0].detach() for y in x],
        MLSTMState(*random_mlstm_state(2, 2, 96, 96, device=run.device)),
    )
    wx, r = torch.randn(2, 50, 4, 2, 64, device=run.device), torch.randn(2, 64, 4, 64, device=run.device) / 8
    wx, r = wx.requires_grad_(), r.requires_grad_()
    calls: dict[str, Callable[[], Any]] = {
        "mlstm": lambda: mlstm(*x).detach(),
        "mlstm and gradient": lambda: torch.autograd.grad(mlstm(*x).sum(), x),
        "mlstm_step": lambda: mlstm_step(*step, state)[0],
        "rnn": lambda: rnn(wx, r).detach(),
        "rnn and gradient": lambda: torch.autograd.grad(rnn(wx, r).sum(), (wx, r)),
    }
    for name, call in calls.items():
        try:
            expected = call()
            graph, out = _capture(call)
            graph.replay()
            torch.cuda.synchronize()
            pairs = zip(out, expected) if isinstance(out, tuple) else [(out, expected)]
            run.add("graphs", name, captured=True, equal=all(torch.equal(a, b) for a, b in pairs))
        except Exception as error:
            run.add("graphs", name, captured=False, error=str(error)[:200])


def _capture(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def _captured(run: Run, call: Callable[[], Any], repeats: int = 10) -> tuple[float, float]:
    """Seconds of one call inside a graph of several, and of issuing one from Python."""
    eager = interleave({"eager": call}, rounds=5, device=run.device)["eager"]
    if run.device.type != "cuda":
        return eager.seconds, eager.seconds
    graph, _ = _capture(lambda: [call() for _ in range(repeats)])
    replay = interleave({"graph": graph.replay}, rounds=20, device=run.device)["graph"]
    issue = sorted(eager.issue)[len(eager.issue) // 2]
    return replay.seconds / repeats, issue


BENCHES: dict[str, Callable[[Run], None]] = {
    "mlstm": bench_vision,
    "tfla": bench_tfla,
    "step": bench_step,
    "rnn": bench_rnn,
    "mix": bench_mix,
    "vil": bench_vil,
    "graphs": bench_graphs,
    "policy": bench_policy,
    "peers": bench_peers,
    "compiled-vil": functools.partial(bench_vil, compiled=True),
    "compiled-policy": bench_compiled_policy,
    "tiles": bench_tiles,
}


def print_table(run: Run) -> None:
    print()
    for section in SECTIONS:
        for row in (x for x in run.rows if x["section"] == section):
            figures = {k: v for k, v in row.items() if k not in ("section", "what")}
            print(f"{section:7}{row['what']}")
            for name, x in figures.items():
                print(f"         {name:44} {x}")
    for what in run.skipped:
        print(f"not run: {what}")


def _rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def _round(x: Any) -> Any:
    return (
        float(f"{x:.4g}")
        if isinstance(x, float) and math.isfinite(x)
        else str(x)
        if isinstance(x, float)
        else x
    )


if __name__ == "__main__":
    raise SystemExit(main())
