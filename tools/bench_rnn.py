"""Time the recurrent cells beside plain loops, torch.nn's layer and, where installed, flashrnn.

First every backend and loop is checked against the recurrence in float64, values and gradients; where one is
wrong nothing is timed and the exit status is 1. Then all take turns in one process (see vilma/bench.py).
"""

import argparse
import importlib
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilma.bench import BOTH, FORWARD, Contender, Result, describe, interleave, json_line, measure
from vilma.report import source_commit
from vilma.testing import rms_ratio
from vilma.tools.bench_mlstm import as_rows, time_of
from vilma.xlstm import rnn, xlstm_stack
from vilma.xlstm.rnn_naive import CELLS
from vilma.xlstm.rnn_operators import backend_for

EPILOG = """\
shapes, as (batch, heads, steps, head size):
{shapes}
or one of your own: 8,4,196,96

"stack_step" is one step of an xLSTM[7:1] of 8 blocks and width 512, after a history of 16 and of 16,384
steps; of the options it takes --batch, --device, --dtype and --rounds.

"loop" indexes wx[:, t] and is quadratic in steps when it is differentiated, as public code is; "lean loop" is
linear (unbind and stack). torch.nn has dense recurrence of the same width and its input projection inside.
flashrnn is optional, found on PYTHONPATH and never installed by vilma; it is under the NXAI Community License
(read it first):
  pip install --target PEERS --no-deps flashrnn
  PYTHONPATH=PEERS vilma bench-rnn
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# RMS ratio to float64 that h and every gradient may have
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CHECKED_STEPS = 40
OURS = ("vilma auto",)
LOOPS = ("loop", "lean loop")
STACK_STEP = "stack_step"
PATTERN, WIDTH, BLOCKS = "7:1", 512, 8
HISTORIES = (16, 16_384)
PREFILL = 1024  # steps at once
# RMS ratio that a step may have to the sequence form
STEP_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Shape:
    """Sizes of one call: batch, heads, steps, head size."""

    name: str
    batch: int
    heads: int
    steps: int
    dim: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.steps, self.dim


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("vil_tiny_224", 8, 4, 196, 96),
        Shape("vil_tiny_448", 8, 4, 784, 96),
        Shape("policy_chunk", 8, 4, 50, 128),
        Shape("dense_384", 16, 1, 196, 384),
        Shape("dense_768", 16, 1, 1024, 768),
    )
}

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


class WrongResult(ValueError):
    """A backend or loop of ours does not compute the cell; the message says how far off it is."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    names = options.shapes or _default_shapes(device)
    shapes = [None if name == STACK_STEP else _shape(name, options.batch) for name in names]
    command = shlex.join(["vilma", "bench-rnn", *(sys.argv[1:] if arguments is None else arguments)])
    contenders = [*(f"vilma {name}" for name in options.backend), *LOOPS, "torch.nn", "flashrnn"]
    lines = []
    for shape in shapes:
        shared = {
            "rounds": options.rounds,
            "command": command,
            "say": (lambda text: None) if options.quiet else _say,
        }
        try:
            if shape is None:
                line = bench_stack_step(device, dtype, batch=options.batch or 1, **shared)
            else:
                rows = options.only or contenders
                line = bench(shape, options.cell, device, dtype, contenders=rows, **shared)
        except WrongResult as error:
            print(f"vilma bench-rnn: {error}", file=sys.stderr)
            return 1
        lines.append(line)
        (print_steps if shape is None else print_table)(line)
        print(json.dumps(line), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(as_rows(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {shape.name:<14}{shape.sizes}" for shape in SHAPES.values())
    known += f"\n  {STACK_STEP:<14}(see below)"
    parser = argparse.ArgumentParser(
        prog="vilma bench-rnn",
        description=__doc__,
        epilog=EPILOG.format(shapes=known),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="default: all that suit the device")
    parser.add_argument("--cell", choices=CELLS, default="slstm")
    parser.add_argument("--batch", type=int, help="replace the batch of the shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=("auto", "triton", "cpu", "torch", "naive"),
        default=["auto", "torch"],
        help="of vilma.xlstm.rnn",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only these rows, as 'vilma cpu', 'lean loop', torch.nn"
    )
    parser.add_argument("--rounds", type=int, help="samples of each; default: 5 on a CPU, 30 elsewhere")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--quiet", action="store_true", help="say nothing while measuring")
    return parser


def bench(
    shape: Shape,
    cell: str = "slstm",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    contenders: Iterable[str] = (*OURS, *LOOPS, "torch.nn", "flashrnn"),
    rounds: int | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Check, then time one shape; returns what the JSON line holds.

    Args:
        contenders: ``vilma <backend>``, ``loop``, ``lean loop``, ``torch.nn``, ``flashrnn``. The last stands
            for every backend of it that this device has, and for none where it is not installed.

    Raises:
        WrongResult: a backend or loop of ours is wrong; nothing was timed.
    """
    device, contenders = torch.device(device), list(dict.fromkeys(contenders))
    runs = {name: our_run(name, cell) for name in contenders if name not in ("torch.nn", "flashrnn")}
    errors = {}
    for name, run in runs.items():
        say(f"checking {name}")
        errors[name] = errors_of(run, shape, cell, device, dtype)
    _refuse_wrong(errors, dtype, TOLERANCES[dtype])
    if "flashrnn" in contenders:
        for name, run in flashrnn_runs(cell, device):
            say(f"checking {name}")
            runs[name] = run
            errors[name] = _errors_of_peer(run, shape, cell, device, dtype)
    inputs = [x.to(device).requires_grad_() for x in draw(shape.sizes, cell, dtype)]
    rows = [Contender(name, _bound(run, inputs), inputs) for name, run in runs.items()]
    if "torch.nn" in contenders:
        rows.append(layer_of(shape, cell, device, dtype))
    results = measure(rows, device=device, rounds=rounds, say=say)
    ours = [name.removeprefix("vilma ") for name in contenders if name.startswith("vilma ")]
    modules = {
        name: "rnn_naive" if name == "naive" else backend_for(name, inputs[0]).__name__.split(".")[-1]
        for name in ours
    }
    line = json.loads(
        json_line(
            results,
            commit=source_commit(),
            device=describe(device, ("flashrnn",)),
            bench="rnn",
            command=command,
            cell=cell,
            shape=shape.name,
            sizes=shape.sizes,
            dtype=str(dtype).removeprefix("torch."),
            backends=modules,
        )
    )
    for result in line["results"]:
        result["ours"] = result["name"].startswith("vilma ")
        if found := errors.get(result["name"]):
            result["rms_ratios"] = {name: float(f"{x:.2g}") for name, x in found.items()}
            result["exact"] = all(x <= TOLERANCES[dtype] for x in found.values())
    return line


def bench_stack_step(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 1,
    width: int = WIDTH,
    histories: Sequence[int] = HISTORIES,
    rounds: int | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Check, then time one step of an xLSTM stack after each history; returns what the JSON line holds.

    Args:
        rounds: samples of each; 15 on a CPU and 30 elsewhere when None.

    Raises:
        WrongResult: a step differs from the sequence form at the same place; nothing was timed.
    """
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        stack = xlstm_stack(width, BLOCKS, PATTERN).to(device, dtype).eval()
    runs: dict[str, Callable[[], Any]] = {}
    errors = {}
    with torch.no_grad():
        x_t = normal(batch, width)
        for history in histories:
            name = f"step after {history}"
            say(f"checking {name}")
            state = None
            for begin in range(0, history, PREFILL):
                part, before = normal(batch, min(PREFILL, history - begin), width), state
                _, state = stack(part, before, return_state=True)
            whole = stack(torch.cat((part, x_t[:, None]), 1), before)[:, -1]
            y, _ = stack.step(x_t, state)
            errors[name] = {"y": rms_ratio(y.cpu().double(), whole.cpu().double())}
            runs[name] = lambda state=state: stack.step(x_t, state)
        _refuse_wrong(errors, dtype, STEP_TOLERANCES[dtype], "the sequence form")
        rounds = rounds or (15 if device.type == "cpu" else 30)
        say(f"timing a step: {rounds} rounds of {len(runs)}")
        times = interleave(runs, rounds=rounds, device=device)
    results = {name: Result(name, {FORWARD: timing}) for name, timing in times.items()}
    line = json.loads(
        json_line(
            results,
            commit=source_commit(),
            device=describe(device),
            bench="rnn",
            command=command,
            cell=f"xlstm[{PATTERN}]",
            shape=STACK_STEP,
            sizes=(batch, width, BLOCKS),
            dtype=str(dtype).removeprefix("torch."),
        )
    )
    for result, history in zip(line["results"], histories):
        result["history"] = history
        result["ours"] = result["exact"] = True
        result["rms_ratios"] = {name: float(f"{x:.2g}") for name, x in errors[result["name"]].items()}
    return line


def draw(sizes: Sequence[int], cell: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """wx and r in ``dtype``, b in float32, as a layer gives them."""
    batch, heads, steps, dim = sizes
    generator, kind = torch.Generator().manual_seed(seed), CELLS[cell]
    wx = torch.randn(batch, steps, len(kind.wx), heads, dim, generator=generator)
    r = torch.randn(heads, dim, len(kind.r), dim, generator=generator) * 0.5 * dim**-0.5
    b = torch.randn(len(kind.b), heads, dim, generator=generator)
    return [wx.to(dtype), r.to(dtype), b]


def our_run(name: str, cell: str) -> Run:
    """What a row of ours calls, by its name."""
    if name.startswith("vilma "):
        return lambda wx, r, b: rnn(wx, r, b, cell=cell, backend=name.removeprefix("vilma "))
    known = {"loop": loop, "lean loop": lean_loop}
    if name not in known:
        raise ValueError(f"row {name!r}; known: 'vilma <backend>', {', '.join(known)}, torch.nn, flashrnn")
    return lambda wx, r, b: known[name](wx, r, b, cell)


def _bound(run: Run, given: Sequence[Tensor]) -> Callable[[], Tensor]:
    return lambda: run(*given)


# -- the loops --------------------------------------------------------------------------------------------


def loop(wx: Tensor, r: Tensor, b: Tensor, cell: str) -> Tensor:
    """As public code is written: wx[:, t] in the loop, all states stacked, a test of n that reads it back."""
    state = _zeros(wx, cell)
    states = []
    for t in range(wx.shape[1]):
        empty = cell == "slstm" and bool((state[2] == 0).all())
        state = _loop_step(wx[:, t], r, b, state, cell, empty)
        states.append(torch.stack(state))
    return torch.stack(states, 2)[0].to(wx.dtype)


def lean_loop(wx: Tensor, r: Tensor, b: Tensor, cell: str) -> Tensor:
    """The same recurrence, linear in steps and without reading back: unbind, and h alone stacked."""
    state = _zeros(wx, cell)
    outputs = []
    for x in wx.unbind(1):
        state = _loop_step(x, r, b, state, cell)
        outputs.append(state[0])
    return torch.stack(outputs, 1).to(wx.dtype)


def _zeros(wx: Tensor, cell: str) -> tuple[Tensor, ...]:
    zero = wx.new_zeros(
        wx.shape[0], *wx.shape[3:], dtype=torch.float64 if wx.dtype == torch.float64 else None
    )
    return (zero.to(torch.promote_types(wx.dtype, torch.float32)),) * len(CELLS[cell].states)


def _loop_step(
    x: Tensor, r: Tensor, b: Tensor, state: Sequence[Tensor], cell: str, empty: bool | None = None
) -> tuple[Tensor, ...]:
    """x (B, G, H, D) -> the next state. ``empty``: whether n is 0 everywhere; None looks at each element."""
    h = state[0]
    read = torch.einsum("bhi,higo->bgho", h.to(r.dtype), r)
    if cell == "gru":
        g, rr, rz = (read + b[:3]).unbind(1)
        z = torch.sigmoid(x[:, 1] + rz)
        n = torch.tanh(x[:, 2] + b[3] + torch.sigmoid(x[:, 0] + rr) * g)
        return (z * h + (1.0 - z) * n,)
    gates = x + read + b
    if cell == "elman":
        return (torch.tanh(gates[:, 0]),)
    i, f, z, o = gates.unbind(1)
    c = state[1]
    if cell == "lstm":
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        return torch.sigmoid(o) * torch.tanh(c), c
    n, m = state[2:]
    kept = F.logsigmoid(f) + m
    if empty is None:
        m = torch.where(n == 0, i, torch.maximum(i, kept))
    else:
        m = i if empty else torch.maximum(i, kept)
    f, i = torch.exp(kept - m), torch.exp(i - m)
    c = f * c + i * torch.tanh(z)
    n = torch.maximum(f * n + i, torch.ones_like(n))
    return torch.sigmoid(o) * c / n, c, n, m


# -- correctness ------------------------------------------------------------------------------------------


def errors_of(
    run: Run, shape: Shape, cell: str, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """RMS ratio to the recurrence in float64 of h and of each gradient, at the heads of the shape."""
    sizes = (min(shape.batch, 3), min(shape.heads, 2), min(shape.steps, CHECKED_STEPS), shape.dim)
    given = draw(sizes, cell, dtype, seed=7)
    w = torch.randn(sizes[0], sizes[2], sizes[1], sizes[3], generator=torch.Generator().manual_seed(8))

    def outcome(run: Run, given: Sequence[Tensor], w: Tensor) -> list[Tensor]:
        given = [x.detach().requires_grad_() for x in given]
        h = run(*given)
        return [x.detach().cpu().double() for x in (h, *torch.autograd.grad(h, given, w.to(h)))]

    actual = outcome(run, [x.to(device) for x in given], w.to(dtype))
    exact = our_run("vilma naive", cell)
    expected = outcome(exact, [x.double() for x in given], w.to(dtype).double())
    return {name: rms_ratio(x, y) for name, x, y in zip(("h", "dwx", "dr", "db"), actual, expected)}


def _errors_of_peer(
    run: Run, shape: Shape, cell: str, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    try:
        return errors_of(run, shape, cell, device, dtype)
    except Exception:  # it is tried again, and its error told, when it is timed
        return {}


def _refuse_wrong(
    errors: dict[str, dict[str, float]], dtype: torch.dtype, limit: float, reference: str = "float64"
) -> None:
    wrong = [
        f"{row} {name} {error:.1e}"
        for row, found in errors.items()
        for name, error in found.items()
        if not error <= limit
    ]
    if wrong:
        raise WrongResult(
            f"wrong against {reference}, so nothing is timed; RMS ratios above "
            f"{limit:.0e} ({str(dtype).removeprefix('torch.')}): {', '.join(wrong)}"
        )


# -- what stands beside it --------------------------------------------------------------------------------


def layer_of(shape: Shape, cell: str, device: torch.device, dtype: torch.dtype) -> Contender:
    """torch.nn's layer of the same width; for the sLSTM, which it does not have, its LSTM."""
    kind = {"gru": nn.GRU, "elman": nn.RNN}.get(cell, nn.LSTM)
    width = shape.heads * shape.dim
    layer = kind(width, width, batch_first=True, device=device, dtype=dtype)
    x = torch.randn(shape.batch, shape.steps, width, device=device, dtype=dtype, requires_grad=True)
    return Contender(f"torch.nn.{kind.__name__}", lambda: layer(x)[0], (x, *layer.parameters()))


def flashrnn_runs(cell: str, device: torch.device) -> Iterator[tuple[str, Run]]:
    """Every backend of flashrnn that this device has."""
    try:
        flashrnn = importlib.import_module("flashrnn").flashrnn
        flashrnn = getattr(flashrnn, "flashrnn", flashrnn)
    except Exception:  # not installed, or broken
        return
    backends = ("cuda_fused", "cuda", "triton_fused") if device.type == "cuda" else ("vanilla",)
    for backend in backends:

        def run(wx: Tensor, r: Tensor, b: Tensor, backend: str = backend) -> Tensor:
            options = {"function": cell, "backend": backend, "dtype": str(wx.dtype).removeprefix("torch.")}
            # its r is (gate, head, to, from)
            states, _ = flashrnn(wx, r.permute(2, 0, 3, 1).contiguous(), b.to(wx.dtype), **options)
            return states[0]

        yield f"flashrnn {backend}", run


# -- what is printed --------------------------------------------------------------------------------------


def print_table(line: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    results, device = line["results"], line["device"]
    first = results[0]
    sizes = ", ".join(map(str, line["sizes"]))
    where = device["device"] + (", 1 thread" if device["type"] == "cpu" else "")
    table = Table(
        title=f"{line['cell']} {line['shape']} ({sizes}) {line['dtype']}, {where}, "
        f"torch {device['versions']['torch']}",
        caption=f"x: time over that of {first['name']}",
    )
    table.add_column("contender")
    table.add_column("gradient")
    for title in ("forward ms", "x", "fw+bw ms", "x", "kept MB"):
        table.add_column(title, justify="right")
    for result in results:
        if "error" in result:
            table.add_row(result["name"], f"cannot run: {result['error'][:60]}")
            continue
        told = {True: "exact", False: "differs", None: ""}[result.get("exact")]
        cells = [result["name"], told]
        for mode in (FORWARD, BOTH):
            took = time_of(result, mode)
            cells += [_number(took), _number(took / time_of(first, mode))]
        table.add_row(*cells, _number(result.get("kept_bytes", math.nan) / 1e6))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=130).print(table)


def print_steps(line: dict[str, Any]) -> None:
    results, device = line["results"], line["device"]
    batch, width, blocks = line["sizes"]
    where = device["device"] + (", 1 thread" if device["type"] == "cpu" else "")
    print(
        f"step of {line['cell']}, {blocks} blocks of width {width}, batch {batch}, {line['dtype']}, {where}"
    )
    for result in results:
        took = time_of(result, FORWARD)
        over = took / time_of(results[0], FORWARD)
        print(f"  {result['name']:<20}{took:8.3f} ms   x {over:.3f}")


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _default_shapes(device: torch.device) -> list[str]:
    return [*(name for name in SHAPES if device.type != "cpu" or name != "dense_768"), STACK_STEP]


def _shape(name: str, batch: int | None) -> Shape:
    if name in SHAPES:
        shape = SHAPES[name]
    elif re.fullmatch(r"\d+(,\d+){3}", name):
        shape = Shape(name, *(int(x) for x in name.split(",")))
    else:
        raise ValueError(f"shape {name!r}; known: {', '.join(SHAPES)}, {STACK_STEP}, or B,H,T,D")
    return shape if batch is None else replace(shape, batch=batch)


if __name__ == "__main__":
    raise SystemExit(main())
