"""Time the mLSTM beside causal attention and, where installed, mlstm-kernels and flash-linear-attention.

First every backend is checked against the recurrence in float64, values and gradients; where one is wrong
nothing is timed and the exit status is 1. Then all contenders take turns in one process (see vilma/bench.py).
"""

import argparse
import functools
import importlib
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vilma.bench import BOTH, FORWARD, Contender, describe, json_line, measure
from vilma.report import source_commit
from vilma.testing import random_mlstm, rms_ratio
from vilma.xlstm import mlstm
from vilma.xlstm.operators import backend_for

EPILOG = """\
shapes, as (batch, heads, steps, head size of keys and of values):
{shapes}
or one of your own: 8,4,196,96 or 1,8,8192,256,512

peers are optional, found on PYTHONPATH and never installed by vilma. mlstm-kernels is under the NXAI
Community License (read it first):
  pip install --target PEERS --no-deps mlstm-kernels einops
  PYTHONPATH=PEERS vilma bench-mlstm
flash-linear-attention (MIT, GPU only) likewise. Of mlstm-kernels, paths named custbw and the Triton kernels
leave the normaliser out of the gradient; the column "gradient" is measured, not taken from a name.
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# RMS ratio to float64 that h and every gradient may have
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TRUNCATED = 20  # times the tolerance: beyond it a gradient lacks a term, below it is rounded differently
# steps and chunk size of the checks: less than a chunk, a whole one, several with an unfinished one
CHECKS = ((37, None), (160, None), (150, 64))
PACKAGES = ("mlstm-kernels", "flash-linear-attention")


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: batch, heads, steps, head sizes of keys and values."""

    name: str
    batch: int
    heads: int
    steps: int
    dim_qk: int
    dim_v: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.batch, self.heads, self.steps, self.dim_qk, self.dim_v


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("vil_tiny_224", 8, 4, 196, 96, 96),
        Shape("vil_tiny_448", 8, 4, 784, 96, 96),
        Shape("policy_chunk", 8, 4, 50, 64, 64),
        Shape("long_4096", 1, 4, 4096, 96, 96),
        Shape("tfla_7b", 8, 8, 8192, 256, 512),
    )
}

Cell = Callable[..., Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to compute the mLSTM: ``cell`` maps (q, k, v, i, f) to h; ours takes a chunk_size, too."""

    name: str
    cell: Cell
    ours: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    shapes = [_shape(name, options.batch, device) for name in options.shapes or _default_shapes(device)]
    command = shlex.join(["vilma", "bench-mlstm", *(sys.argv[1:] if arguments is None else arguments)])
    lines = []
    for shape in shapes:
        try:
            line = bench(
                shape,
                device,
                dtype,
                backends=options.backend,
                gate=options.gate,
                peers=options.peers,
                rounds=options.rounds,
                command=command,
                say=(lambda text: None) if options.quiet else _say,
            )
        except WrongResult as error:
            print(f"vilma bench-mlstm: {error}", file=sys.stderr)
            return 1
        lines.append(line)
        print_table(line)
        print(json.dumps(line), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(as_rows(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {shape.name:<14}{shape.sizes}" for shape in SHAPES.values())
    parser = argparse.ArgumentParser(
        prog="vilma bench-mlstm",
        description=__doc__,
        epilog=EPILOG.format(shapes=known),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="default: all that suit the device")
    parser.add_argument("--batch", type=int, help="replace the batch of the shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--gate", choices=("exp", "sigmoid"), default="exp", help="sigmoid: no normaliser")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=("auto", "triton", "cpu", "torch"),
        default=["auto"],
        help="of vilma.xlstm.mlstm",
    )
    parser.add_argument("--rounds", type=int, help="samples of each; default: 5 on a CPU, 30 elsewhere")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="only vilma and attention")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--quiet", action="store_true", help="say nothing while measuring")
    return parser


class WrongResult(ValueError):
    """A backend of ours does not compute the mLSTM; the message says how far off it is."""


def bench(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    backends: Sequence[str] = ("auto",),
    gate: str = "exp",
    peers: bool = True,
    rounds: int | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Check, then time one shape; returns what the JSON line holds.

    Raises:
        WrongResult: a backend of ours is wrong; nothing was timed.
    """
    paths = [our_path(backend, gate) for backend in backends]
    errors = {}
    for path in paths:
        say(f"checking {path.name}")
        errors[path.name] = check(path, shape, device, dtype, gate)
    _refuse_wrong(errors, dtype)
    if peers:
        for path in peer_paths(shape, device, dtype, gate):
            say(f"checking {path.name}")
            paths.append(path)
            errors[path.name] = _errors_of_peer(path, shape, device, dtype, gate)
    inputs = random_mlstm(*shape.sizes, dtype=dtype, device=device)
    gates = [x.float() for x in inputs[3:]]  # as the layers give them
    given = [x.requires_grad_() for x in (*inputs[:3], *gates)]
    contenders = [Contender(path.name, functools.partial(path.cell, *given), given) for path in paths]
    contenders += attention(shape, given)
    if peers and device.type == "cuda" and (path := simple_gla()) is not None:
        swapped = Variant(path.name, lambda *x: path.cell(*map(_swap, x)).transpose(1, 2))
        errors[path.name] = _errors_of_peer(swapped, shape, device, dtype, "sigmoid")
        theirs = [_swap(x).detach().requires_grad_() for x in given]
        contenders.append(Contender(path.name, functools.partial(path.cell, *theirs), theirs))
    results = measure(contenders, device=device, rounds=rounds, say=say)
    which = {b: backend_for(b, given[0], given[2], given[3]).__name__.split(".")[-1] for b in backends}
    line = json.loads(
        json_line(
            results,
            commit=source_commit(),
            device=describe(device, PACKAGES),
            bench="mlstm",
            command=command,
            shape=shape.name,
            sizes=shape.sizes,
            dtype=str(dtype).removeprefix("torch."),
            gate=gate,
            backends=which,
        )
    )
    ours = {path.name for path in paths if path.ours}
    for result in line["results"]:
        result["ours"] = result["name"] in ours
        if result["name"] in errors:
            found = errors[result["name"]]
            result["gradient"] = gradient_of(found, dtype)
            result["rms_ratios"] = {name: float(f"{x:.2g}") for name, x in found.items()}
    return line


def our_path(backend: str, gate: str) -> Variant:
    def cell(*given: Tensor, chunk_size: int | None = None) -> Tensor:
        return mlstm(*given, gate=gate, backend=backend, chunk_size=chunk_size)

    return Variant(f"vilma {backend}", cell, ours=True)


def _swap(x: Tensor) -> Tensor:
    """(B, H, T, ...) -> (B, T, H, ...), dense."""
    return x.transpose(1, 2).contiguous()


def check(
    path: Variant, shape: Shape, device: torch.device, dtype: torch.dtype, gate: str
) -> dict[str, float]:
    """RMS ratio to float64 of h and of each gradient, the worst of several lengths.

    Short sequences against the recurrence, and one row of the shape's own length against the chunkwise form
    in float64, which tests hold to the recurrence. The head sizes are those of the shape.
    """
    worst: dict[str, float] = {}
    heads = 2 if shape.dim_qk * shape.dim_v <= 128 * 128 else 1
    for steps, chunk_size in CHECKS:
        cell = functools.partial(path.cell, chunk_size=chunk_size)
        sizes = (1, heads, steps, shape.dim_qk, shape.dim_v)
        _keep_worst(worst, _errors(cell, sizes, device, dtype, gate, reference="naive"))
    if shape.steps > max(steps for steps, _ in CHECKS):
        sizes = (1, 1, shape.steps, shape.dim_qk, shape.dim_v)
        _keep_worst(worst, _errors(path.cell, sizes, device, dtype, gate, reference="torch"))
    return worst


def _keep_worst(worst: dict[str, float], found: dict[str, float]) -> None:
    for name, error in found.items():
        before = worst.get(name, 0.0)
        worst[name] = error if not error <= before else before  # a NaN stays


def _errors(
    cell: Cell,
    sizes: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    gate: str,
    *,
    reference: str,
) -> dict[str, float]:
    given, w, expected = _expected(sizes, dtype, gate, reference)
    actual = _values(cell, [x.to(device) for x in given], w.to(device))
    names = ("h", "dq", "dk", "dv", "di", "df")
    found = {name: rms_ratio(x, y) for name, x, y in zip(names, actual, expected)}
    # df is a difference of terms of the size of di, and about zero where little is remembered
    scale = max(_rms(expected[4]), _rms(expected[5]))
    found["df"] = _rms(actual[5] - expected[5]) / scale
    return found


@functools.lru_cache(maxsize=4)
def _expected(
    sizes: tuple[int, ...], dtype: torch.dtype, gate: str, backend: str
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Arguments in ``dtype`` (gates float32), an upstream gradient, and what they give in float64."""
    q, k, v, i, f = random_mlstm(*sizes, seed=7)
    given = [*(x.to(dtype) for x in (q, k, v)), i, f]
    w = torch.randn(v.shape, generator=torch.Generator().manual_seed(8)).to(dtype)

    def exact(*given: Tensor) -> Tensor:
        return mlstm(*given, gate=gate, backend=backend)

    return given, w, _values(exact, [x.double() for x in given], w.double())


def _values(cell: Cell, given: Sequence[Tensor], w: Tensor) -> list[Tensor]:
    """h and the gradients of all arguments, in float64 on the CPU."""
    given = [x.detach().requires_grad_() for x in given]
    h = cell(*given)
    return [x.detach().cpu().double() for x in (h, *torch.autograd.grad(h, given, w.to(h)))]


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _refuse_wrong(errors: dict[str, dict[str, float]], dtype: torch.dtype) -> None:
    limit = TOLERANCES[dtype]
    wrong = [
        f"{path} {name} {error:.1e}"
        for path, found in errors.items()
        for name, error in found.items()
        if not error <= limit
    ]
    if wrong:
        raise WrongResult(
            "wrong against float64, so nothing is timed; RMS ratios above "
            f"{limit:.0e} ({str(dtype).removeprefix('torch.')}): {', '.join(wrong)}"
        )


def gradient_of(found: dict[str, float], dtype: torch.dtype) -> str:
    """``exact``, ``truncated``, or ``wrong h`` for a path that computes something else."""
    limit = TRUNCATED * TOLERANCES[dtype]
    if not found or not found["h"] <= limit:
        return "wrong h" if found else "not checked"
    return "exact" if all(error <= limit for error in found.values()) else "truncated"


def attention(shape: Shape, given: Sequence[Tensor]) -> Iterator[Contender]:
    """Causal attention of the same shape and, for wide heads, the same width in heads of 128."""
    q, k, v = (x.detach().clone().requires_grad_() for x in given[:3])
    yield Contender(
        "causal attention", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v)
    )
    if shape.dim_v > 128:
        heads = shape.heads * shape.dim_v // 128
        sizes = (shape.batch, heads, shape.steps, 128)
        a, b, c = (torch.randn(sizes, dtype=q.dtype, device=q.device).requires_grad_() for _ in range(3))
        yield Contender(
            f"causal attention, {heads} heads of 128",
            lambda: F.scaled_dot_product_attention(a, b, c, is_causal=True),
            (a, b, c),
        )


def simple_gla() -> Variant | None:
    """flash-linear-attention's simple_gla: the mLSTM with a sigmoid gate and no normaliser."""
    try:
        kernel = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    except Exception:  # not installed, or broken
        return None

    def cell(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        """All of them (B, T, H, ...), the kernel's own layout."""
        gated = k * i.sigmoid().to(k)[..., None]
        return kernel(q, gated, v, g=F.logsigmoid(f), scale=q.shape[-1] ** -0.5)[0]

    return Variant("simple_gla (sigmoid gate, no normaliser)", cell)


def peer_paths(shape: Shape, device: torch.device, dtype: torch.dtype, gate: str) -> Iterator[Variant]:
    """Every path of mlstm-kernels that computes this cell here, chunkwise ones with two chunk sizes.

    A CPU gets the native ones, with chunks that divide the length, and the loop over steps; CUDA the Triton
    ones, with the peer's own padding, but not at head sizes where they write out of bounds.
    """
    try:
        peer = importlib.import_module("mlstm_kernels.torch")
        kernels = {name: peer.get_mlstm_kernel(name) for name in peer.get_available_mlstm_kernels()}
        loops = {name: peer.get_mlstm_sequence_kernel(name) for name in ("native_sequence__native",)}
    except Exception:  # not installed, or broken
        return
    on_cuda = device.type == "cuda"
    for name, kernel in kernels.items():
        if ("siging" in name) != (gate == "sigmoid") or ("triton" in name) != on_cuda:
            continue
        if on_cuda and not (_safe(shape.dim_qk) and _safe(shape.dim_v)):
            continue
        options = {"autocast_kernel_dtype": dtype} if on_cuda else {}
        options |= {"normalize": False} if gate == "sigmoid" else {}
        if not name.startswith("chunkwise"):
            yield _peer(name, kernel, options)
            continue
        targets = (64,) if "limit_chunk" in name else (64, 128)
        chunks = targets if on_cuda else sorted({chunk_near(target, shape.steps) for target in targets})
        for chunk in chunks:
            yield _peer(f"{name}, chunk {chunk}", kernel, options, chunk)
    if gate == "exp" and not on_cuda:
        for name, loop in loops.items():
            yield _peer(name, loop, {})


def _safe(dim: int) -> bool:
    return dim % 64 == 0 or (dim < 64 and dim & (dim - 1) == 0)


def _peer(name: str, kernel: Callable[..., Any], options: dict[str, Any], chunk: int = 0) -> Variant:
    def cell(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        given = {"q": q, "k": k, "v": v, "i": i, "f": f, **options}
        if not chunk:
            h = kernel(**given)
        elif q.shape[2] % chunk == 0:
            h = kernel(**given, chunk_size=chunk)
        else:
            wrappers = importlib.import_module("mlstm_kernels.torch.kernel_wrappers")
            h = wrappers.wrap_chunkwise__pad_zeros(kernel, **given, chunk_size=chunk)
        return h[0] if isinstance(h, tuple) else h

    return Variant(f"mlstm-kernels {name}", cell)


def chunk_near(target: int, steps: int) -> int:
    """The divisor of ``steps`` nearest to ``target`` on a logarithmic scale."""
    return min((d for d in range(1, steps + 1) if steps % d == 0), key=lambda d: abs(math.log(d / target)))


def _errors_of_peer(
    path: Variant, shape: Shape, device: torch.device, dtype: torch.dtype, gate: str
) -> dict[str, float]:
    # several chunks, all of them whole; on CUDA an unfinished one is padded
    sizes = (1, 1, 2 * shape.steps if shape.steps <= 128 else shape.steps, shape.dim_qk, shape.dim_v)
    reference = "naive" if sizes[2] <= 256 else "torch"
    try:
        return _errors(path.cell, sizes, device, dtype, gate, reference=reference)
    except Exception:  # it is tried again, and its error told, when it is timed
        return {}


def time_of(result: dict[str, Any], mode: str) -> float:
    """Milliseconds; not a number where it was not measured."""
    return result.get(mode, {}).get("ms", math.nan)


def print_table(line: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    results = line["results"]
    ours = next(result for result in results if result["ours"])
    beside = next(result for result in results if result["name"] == "causal attention")
    sizes = ", ".join(map(str, line["sizes"]))
    device = line["device"]
    where = device["device"] + (", 1 thread" if device["type"] == "cpu" else "")
    table = Table(
        title=f"{line['shape']} ({sizes}) {line['dtype']}, gate {line['gate']}, {where}, "
        f"torch {device['versions']['torch']}",
        caption=f"x: time over that of {ours['name']}; attention: over that of causal attention",
    )
    table.add_column("contender")
    table.add_column("gradient")
    for title in ("forward ms", "x", "attention", "fw+bw ms", "x", "attention", "kept MB", "peak MB"):
        table.add_column(title, justify="right")
    for result in results:
        if FORWARD not in result:
            table.add_row(result["name"], f"cannot run: {result['error'][:60]}")
            continue
        cells = [result["name"], result.get("gradient", "")]
        for mode in (FORWARD, BOTH):
            took = time_of(result, mode)
            cells += [_number(took), _number(took / time_of(ours, mode))]
            cells.append(_number(took / time_of(beside, mode)))
        cells.append(_number(result.get("kept_bytes", math.nan) / 1e6))
        cells.append(_number(result.get("peak_bytes", {}).get(BOTH, math.nan) / 1e6))
        table.add_row(*cells)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    console.print(table)


def as_rows(lines: Sequence[dict[str, Any]]) -> str:
    """A JSON list with each result on a row of its own."""
    parts = []
    for line in lines:
        head = json.dumps({key: value for key, value in line.items() if key != "results"})
        results = ",\n  ".join(map(json.dumps, line["results"]))
        parts.append(f'{head[:-1]}, "results": [\n  {results}\n ]}}')
    return "[\n " + ",\n ".join(parts) + "\n]\n"


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _default_shapes(device: torch.device) -> list[str]:
    return [name for name in SHAPES if device.type != "cpu" or name != "tfla_7b"]


def _shape(name: str, batch: int | None, device: torch.device) -> Shape:
    if name in SHAPES:
        shape = SHAPES[name]
    elif re.fullmatch(r"\d+(,\d+){3,4}", name):
        sizes = [int(x) for x in name.split(",")]
        shape = Shape(name, *sizes, *sizes[-1:][: 5 - len(sizes)])
    else:
        raise ValueError(f"shape {name!r}; known: {', '.join(SHAPES)}, or B,H,T,D or B,H,T,Dk,Dv")
    if batch is not None:
        shape = replace(shape, batch=batch)
    if shape.name == "tfla_7b" and device.type == "cpu" and (batch is None or batch > 1):
        raise ValueError(f"tfla_7b with a batch of {shape.batch} is not for a CPU; pass --batch 1, or a GPU")
    return shape


if __name__ == "__main__":
    raise SystemExit(main())
