"""Print the measured lines of Vision-LSTM: figure, target, met or missed."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from vilma.bench import BOTH, FORWARD
from vilma.extras import require_timm
from vilma.targets import ROOT, Group, Line, show
from vilma.tools.bench_vil import CASES, bench, kept, ratio

RESULTS = ROOT / "docs" / "results" / "vil"
TIMED = (
    ("tiny_224", FORWARD),
    ("small_224", FORWARD),
    ("tiny_224", BOTH),
    ("tiny_448", FORWARD),
)
PARAMETERS = {
    "vil_tiny": 6_088_360,
    "vil_tinyplus": 7_277_840,
    "vil_small": 22_792_360,
    "vil_smallplus": 24_628_664,
    "vil_base": 88_050_856,
    "vil2_tiny": 6_391_528,
    "vil2_small": 23_398_696,
    "vil2_base": 89_263_528,
}
GMAC = {"vil2_tiny": 1.51, "vil2_small": 5.09, "vil2_base": 18.51}

FOLDER = "tests/vil"
GROUPS = (
    Group(
        "every vil vector: outputs, features, gradients, both generations", (f"{FOLDER}/test_vil_golden.py",)
    ),
    Group("the fast path against the plain one in float64", (f"{FOLDER}/test_vil_mixing.py",)),
    Group(
        "checkpoints: official names load unchanged, others are refused",
        (f"{FOLDER}/test_vil_checkpoints.py",),
    ),
    Group(
        "unsupported options and impossible sizes name what is possible",
        (f"{FOLDER}/test_vision_lstm.py", f"{FOLDER}/test_vil_options.py", "-k", "possible"),
    ),
    Group(
        "what a timm model owes, one small model a structural variant",
        (f"{FOLDER}/test_vision_lstm.py", f"{FOLDER}/test_vil_options.py", "-k", "not possible"),
    ),
    Group(
        "vilma bench-vil prints those rows beside the published figures, and no wrong ones",
        (f"{FOLDER}/test_vil_tools.py",),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma show-vil", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only cite results, measure and test nothing")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each timing")
    options = parser.parse_args(arguments)
    return show(all_lines(options.quick, options.rounds))


def all_lines(quick: bool, rounds: int) -> Iterator[Line]:
    yield from count_lines()
    measured = recorded()
    if not quick:
        measured |= {name: bench(CASES[name], rounds=rounds) for name in dict.fromkeys(n for n, _ in TIMED)}
    for name, mode in TIMED:
        yield time_line(name, mode, measured.get(name))
    yield kept_line("tiny_224", measured.get("tiny_224"))
    if not quick:
        yield from (group.line() for group in GROUPS)
        yield timm_line()


def recorded() -> dict[str, dict[str, Any]]:
    """The committed results of a CPU, by case."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        for line in json.loads(path.read_text()):
            if line["device"]["type"] == "cpu":
                found[line["case"]] = line | {"file": path.relative_to(ROOT).as_posix()}
    return found


def count_lines() -> Iterator[Line]:
    """Parameters and operations, counted here."""
    timm = require_timm()
    import torch

    import vilma.vil  # noqa: F401 - registers the family

    counted, operations = {}, {}
    for name in PARAMETERS:
        model = timm.create_model(f"{name}_patch16_224", device="meta").eval()
        counted[name] = sum(p.numel() for p in model.parameters())
        if name in GMAC:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(torch.empty(1, 3, 224, 224, device="meta"))
            operations[name] = counter.get_total_flops() / 2e9
    wrong = [name for name, count in counted.items() if count != PARAMETERS[name]]
    figure = "differ: " + ", ".join(wrong) if wrong else f"equal for {len(counted)} models"
    yield Line("parameters", figure, "the published counts", not wrong)
    figure = " / ".join(f"{value:.2f}" for value in operations.values())
    near = all(abs(value / GMAC[name] - 1) <= 0.02 for name, value in operations.items())
    yield Line("GMAC of tiny / small / base at 224", figure, "1.51 / 5.09 / 18.51 within 2 %", near)


def time_line(name: str, mode: str, line: Mapping[str, Any] | None) -> Line:
    case = CASES[name]
    official, limit = case.modes[mode]
    title = f"{case.model} over {case.peer} at {case.size} px, batch {case.batch}, {mode}"
    target = f"<= {limit}; the official implementation {official}"
    if line is None:
        return Line(title, "no result under docs/results/vil", target, False)
    value = ratio(line, mode)
    return Line(title, f"{value:.2f}{source(line)}", target, value <= limit)


def kept_line(name: str, line: Mapping[str, Any] | None) -> Line:
    case = CASES[name]
    official, limit = case.kept
    title = f"MiB an image kept for the backward pass of {case.model}"
    target = f"<= {limit:g}; the official implementation {official}"
    sizes = kept(line) if line else None
    if sizes is None:
        return Line(title, "no result under docs/results/vil", target, False)
    return Line(
        title, f"{sizes[0]:.1f} ({case.peer} {sizes[1]:.1f}){source(line)}", target, sizes[0] <= limit
    )


def source(line: Mapping[str, Any]) -> str:
    return f" [{line['file']} at {line['commit']}]" if "file" in line else ""


def timm_line() -> Line:
    """timm's own model tests, as `make test-timm` runs them."""
    began = time.perf_counter()
    command = [sys.executable, str(ROOT / FOLDER / "timm_suite.py"), "--durations=0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else result.stderr[-200:]
    figure = f"{last.strip('= ')} [{time.perf_counter() - began:.0f} s]"
    met = result.returncode == 0 and " skipped" not in last
    return Line("timm's own model tests for every vil* name", figure, "all pass, none skipped", met)


if __name__ == "__main__":
    raise SystemExit(main())
