"""Print the measured lines of the recurrent cells and the xLSTM stacks: figure, target, met or missed."""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vilma.bench import BOTH, FORWARD
from vilma.targets import ROOT, Group, Line, show
from vilma.tools.bench_mlstm import time_of
from vilma.tools.bench_rnn import HISTORIES, SHAPES, STACK_STEP, bench, bench_stack_step

RESULTS = ROOT / "docs" / "results" / "rnn"
TIMED = ("vil_tiny_224", "vil_tiny_448")
# what stands for public code that indexes wx[:, t]; the fastest of those that ran counts
PUBLIC = ("loop", "flashrnn vanilla")
STEP_RATIO = 1.1  # most that a step after the long history may cost over one after the short


class Target(NamedTuple):
    """One row over another at one shape: least ratios of the times, slow over fast.

    Args:
        module: what must have run as ``fast``.
    """

    name: str
    shape: str
    slow: tuple[str, ...]
    fast: str
    module: str
    least: dict[str, float]


TARGETS = (
    Target(
        "faster than the public loop",
        "vil_tiny_224",
        PUBLIC,
        "vilma auto",
        "rnn_cpu",
        {FORWARD: 4.5, BOTH: 12.0},
    ),
    Target(
        "faster than the public loop",
        "vil_tiny_448",
        PUBLIC,
        "vilma auto",
        "rnn_cpu",
        {FORWARD: 5.0, BOTH: 40.0},
    ),
    *(
        Target(
            "faster than the lean loop",
            name,
            ("lean loop",),
            "vilma auto",
            "rnn_cpu",
            {FORWARD: 1.8, BOTH: 6.0},
        )
        for name in TIMED
    ),
    *(
        Target(
            "without a compiler, faster than the lean loop",
            name,
            ("lean loop",),
            "vilma torch",
            "rnn_torch",
            {FORWARD: 1.0, BOTH: 2.0},
        )
        for name in TIMED
    ),
)
LAYER = 0.75  # most of the time of torch.nn.LSTM, forward+backward

CELLS, CPU = "tests/xlstm/test_rnn.py", "tests/xlstm/test_rnn_cpu.py"
TRITON, OPERATORS = "tests/xlstm/test_rnn_triton.py", "tests/xlstm/test_rnn_operators.py"
BLOCKS, CHECKPOINTS = "tests/xlstm/test_v1_blocks.py", "tests/xlstm/test_checkpoints.py"
GROUPS = (
    Group(
        "every slstm, lstm, gru and elman vector: output, states, gradients",
        ("tests/xlstm/test_rnn_golden.py",),
    ),
    Group("gradcheck in float64, every cell and flag", (CELLS, "-k", "gradcheck or second_derivatives")),
    Group(
        "float64 climbs to the fast paths: naive, plain, compiled, any head size",
        (CELLS, CPU, "-k", "equals_float64 or equals_naive or equals_torch or every_size or wide_heads"),
    ),
    Group("step x T = sequence, with gradients", (CELLS, "-k", "steps_equal or step_has_gradients")),
    Group("state split = whole; resets; reverse", (CELLS, "-k", "split or reset or reverse")),
    Group("extremes are finite, NaN is not hidden", (CELLS, "-k", "extreme or negative or nan")),
    Group("clipping clips the gradient through the recurrence", (CELLS, "-k", "grad_clip")),
    Group(
        "bytes kept for backward are linear in T; uninitialised memory is never read",
        (CELLS, CPU, "-k", "linear_in_time or uninitialised"),
    ),
    Group(
        "compile(fullgraph), export, FLOPs, second derivative refused",
        (OPERATORS, "-k", "not triton and not gpu"),
    ),
    Group(
        "no compiler or a failing build: one warning, how to fix it, right results",
        (CPU, "-k", "without_a_compiler or failing_build or cannot_be_imported"),
    ),
    Group("Triton in the interpreter against float64", (TRITON, "-k", "interpreter")),
    Group("Triton compiled for sm_80, sm_90, gfx942: fits on chip", (TRITON, "-k", "compiled_resources")),
    Group(
        "the newest Triton",
        ("tests/xlstm/test_newest_triton.py", "-k", "cells"),
    ),
    Group(
        "8 blocks of width 512, 7:1: prefill then steps = the full pass to 1e-4",
        (BLOCKS, "-k", "published_size and prefill"),
    ),
    Group(
        "a step runs the same operators on the same sizes after 16 and 16,384 steps",
        (BLOCKS, "-k", "same_work"),
    ),
    Group("the blocks: equations, states, patterns, inits", (BLOCKS, "tests/xlstm/test_blocks.py")),
    Group("state dictionaries of the public xlstm package", (CHECKPOINTS,)),
    Group("errors say what to pass", (CELLS, "-k", "errors or forced or bias_more or wants_one_step")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma show-rnn", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only cite results, measure and test nothing")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each timing of the cells")
    options = parser.parse_args(arguments)
    return show(all_lines(options.quick, options.rounds))


def all_lines(quick: bool, rounds: int) -> Iterator[Line]:
    measured = recorded()
    if not quick:
        measured |= {name: bench(SHAPES[name], rounds=rounds) for name in TIMED}
        measured[STACK_STEP] = bench_stack_step()
    for target in TARGETS:
        yield ratio_line(target, measured.get(target.shape))
    for name in TIMED:
        yield layer_line(name, measured.get(name))
    yield step_line(measured.get(STACK_STEP))
    if not quick:
        yield from (group.line() for group in GROUPS)


def recorded() -> dict[str, dict[str, Any]]:
    """The committed CPU results in float32 of the sLSTM and of the stack, by shape."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        for line in json.loads(path.read_text()):
            if (line["device"]["type"], line["dtype"]) != ("cpu", "float32"):
                continue
            if line["cell"] == "slstm" or line["shape"] == STACK_STEP:
                found[line["shape"]] = line | {"file": path.relative_to(ROOT).as_posix()}
    return found


def ratio_line(target: Target, line: dict[str, Any] | None) -> Line:
    title = f"sLSTM {target.name} at {SHAPES[target.shape].sizes}, " + " / ".join(target.least)
    wanted = ">= " + " / ".join(f"{x:g}x" for x in target.least.values())
    if line is None:
        return Line(title, "no result under docs/results/rnn", wanted, False)
    module = line["backends"].get(target.fast.removeprefix("vilma "))
    if module != target.module:
        return Line(title, f"{target.fast} ran {module}, not {target.module}{source(line)}", wanted, False)
    fast = time_in(line, target.fast)
    ran = [name for name in target.slow if name in names_in(line)]
    ratios = {
        mode: min(time_in(line, name)[mode] for name in ran) / fast[mode] if ran else math.nan
        for mode in target.least
    }
    figure = " / ".join(f"{x:.2f}x" for x in ratios.values())
    if target.slow == PUBLIC:
        figure += f" the fastest of {' and '.join(ran)}"
    met = all(ratios[mode] >= least for mode, least in target.least.items())
    return Line(title, figure + source(line), wanted, met)


def layer_line(name: str, line: dict[str, Any] | None) -> Line:
    title = f"sLSTM over torch.nn.LSTM at {SHAPES[name].sizes}, {BOTH}"
    wanted = f"<= {LAYER}"
    if line is None:
        return Line(title, "no result under docs/results/rnn", wanted, False)
    ratio = time_in(line, "vilma auto")[BOTH] / time_in(line, "torch.nn.LSTM")[BOTH]
    return Line(title, f"{ratio:.2f}{source(line)}", wanted, ratio <= LAYER)


def step_line(line: dict[str, Any] | None) -> Line:
    """A step after the long history over one after the short."""
    short, long = HISTORIES
    title = f"a step of 8 blocks of width 512, 7:1, after {long} steps over one after {short}"
    wanted = f"<= {STEP_RATIO}"
    if line is None:
        return Line(title, "no result under docs/results/rnn", wanted, False)
    times = [time_in(line, f"step after {history}")[FORWARD] for history in HISTORIES]
    ratio = times[1] / times[0]
    figure = f"{ratio:.3f} ({times[1]:.1f} ms / {times[0]:.1f} ms){source(line)}"
    return Line(title, figure, wanted, ratio <= STEP_RATIO)


def names_in(line: dict[str, Any]) -> list[str]:
    """Rows that ran."""
    return [result["name"] for result in line["results"] if "error" not in result]


def time_in(line: dict[str, Any], name: str) -> dict[str, float]:
    """Milliseconds of a row by mode; not a number where it was not measured."""
    result = next((x for x in line["results"] if x["name"] == name), {})
    return {mode: time_of(result, mode) for mode in (FORWARD, BOTH)}


def source(line: dict[str, Any]) -> str:
    """Where a figure was read, nothing for one measured now."""
    return f"; cited: {line['command']} at {line['commit']} ({line['file']})" if "file" in line else ""


if __name__ == "__main__":
    raise SystemExit(main())
