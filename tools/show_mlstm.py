"""Print the measured lines of the mLSTM kernels: figure, target, met or missed."""

import argparse
import importlib.util
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vilma.bench import BOTH, FORWARD
from vilma.targets import ROOT, Group, Line, show
from vilma.tools.bench_mlstm import SHAPES, bench, time_of

RESULTS = ROOT / "docs" / "results" / "mlstm"
# shape -> most that forward and forward+backward may cost, over causal attention
ATTENTION = {"vil_tiny_224": (1.15, 1.2), "vil_tiny_448": (0.55, 0.6), "long_4096": (0.17, 0.17)}
# shape -> least that the fastest peer with an exact gradient must cost over ours, forward+backward
EXACT_PEER = {"vil_tiny_448": 1.5, "long_4096": 1.5}
GROWTH = 1.1  # bytes kept a step, the longest sequence over the one before

MLSTM, CPU = "tests/xlstm/test_mlstm.py", "tests/xlstm/test_mlstm_cpu.py"
TRITON, OPERATORS = "tests/xlstm/test_mlstm_triton.py", "tests/xlstm/test_operators.py"
GROUPS = (
    Group(
        "every mlstm vector: forward, states, gradients",
        ("tests/xlstm/test_mlstm_golden.py", CPU, "-k", "golden or normaliser"),
    ),
    Group("gradcheck in float64, every path and flag, T <= 7", (MLSTM, "-k", "gradcheck")),
    Group(
        "float64 climbs to the fast paths: recurrence, chunkwise, compiled",
        (MLSTM, CPU, "-k", "equals_naive or equals_float64 or reset or reverse"),
    ),
    Group("split anywhere = whole; steps = sequence", (MLSTM, CPU, "-k", "split or steps_equal")),
    Group(
        "gates at +-30, infinite gates, forget gates near 1",
        (MLSTM, CPU, "-k", "extreme or infinit or near_one or eps_and_m"),
    ),
    Group(
        "strided, size-1 and expanded inputs, uncopied; poisoned memory",
        (MLSTM, CPU, "-k", "layout or copied or poisoned or uninitialised"),
    ),
    Group(
        "compile(fullgraph), export, FLOPs, second derivative refused",
        (OPERATORS, MLSTM, "-k", "not triton and not gpu and (test_operators or second_derivative)"),
    ),
    Group("the layers of both families", ("tests/xlstm/test_layers.py", "tests/xlstm/test_blocks.py")),
    Group(
        "Triton in the interpreter against float64, chunks of 256 and 512 at heads 256/512 among it",
        (TRITON, OPERATORS, "-k", "interpreter or triton_through"),
    ),
    Group("Triton compiled for sm_80, sm_90, gfx942: no spills", (TRITON, "-k", "compiled_resources")),
    Group("the newest Triton", ("tests/xlstm/test_newest_triton.py",)),
    Group(
        "without triton and without a compiler",
        (CPU, TRITON, "-k", "without_a_compiler or where_triton or no_triton or failing_build"),
    ),
    Group(
        "errors say what to pass",
        (MLSTM, CPU, TRITON, OPERATORS, "-k", "error or forced or unsupported or says_so"),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma show-mlstm", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only cite results, measure and test nothing")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each timing")
    options = parser.parse_args(arguments)
    return show(all_lines(options.quick, options.rounds))


def all_lines(quick: bool, rounds: int) -> Iterator[Line]:
    cited = recorded()
    fresh: dict[str, dict[str, Any]] = {}
    if not quick:
        peers = importlib.util.find_spec("mlstm_kernels") is not None
        for name in ATTENTION:
            fresh[name] = bench(SHAPES[name], torch.device("cpu"), torch.float32, peers=peers, rounds=rounds)
    measured = cited | fresh
    used = {name: line for name, line in cited.items() if name in ATTENTION and not peers_in(fresh.get(name))}
    for file, command, commit in sorted({(x["file"], x["command"], x["commit"]) for x in used.values()}):
        print(f"cited: {command} at {commit} ({file})", flush=True)
    for name in ATTENTION:
        yield attention_line(name, measured.get(name))
    for name in ATTENTION:
        with_peers = fresh.get(name) if peers_in(fresh.get(name)) else cited.get(name)
        yield from peer_lines(name, with_peers)
    yield kept_line([measured.get(name) for name in ATTENTION])
    if not quick:
        yield from (group.line() for group in GROUPS)


def recorded() -> dict[str, dict[str, Any]]:
    """The committed CPU results in float32 of the default gate, by shape; with peers where there are such."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        for line in json.loads(path.read_text()):
            if (line["device"]["type"], line["dtype"], line["gate"]) != ("cpu", "float32", "exp"):
                continue
            if peers_in(line) or line["shape"] not in found:
                found[line["shape"]] = line | {"file": path.relative_to(ROOT).as_posix()}
    return found


def peers_in(line: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Results of mlstm-kernels that ran."""
    results = line["results"] if line else []
    return [r for r in results if r["name"].startswith("mlstm-kernels") and "error" not in r]


def attention_line(name: str, line: dict[str, Any] | None) -> Line:
    limits = ATTENTION[name]
    title = f"time over causal attention at {SHAPES[name].sizes[:3]}, forward / forward+backward"
    target = f"<= {limits[0]} / {limits[1]}"
    if line is None:
        return Line(title, "no result under docs/results/mlstm", target, False)
    ours, beside = named(line, "vilma auto"), named(line, "causal attention")
    ratios = [time_of(ours, mode) / time_of(beside, mode) for mode in (FORWARD, BOTH)]
    figure = f"{ratios[0]:.3f} / {ratios[1]:.3f}{source(line)}"
    return Line(title, figure, target, all(x <= limit for x, limit in zip(ratios, limits)))


def peer_lines(name: str, line: dict[str, Any] | None) -> Iterator[Line]:
    title = f"faster than every CPU path of mlstm-kernels at {SHAPES[name].sizes[:3]}"
    peers = peers_in(line)
    if line is None or not peers:
        yield Line(title, "no result with mlstm-kernels", "> 1", False)
        return
    ours, figures, ratios = named(line, "vilma auto"), [], []
    for mode in (FORWARD, BOTH):
        peer = min(peers, key=lambda result: time_of(result, mode))
        ratios.append(time_of(peer, mode) / time_of(ours, mode))
        figures.append(f"{mode} {ratios[-1]:.2f}x the fastest ({path_of(peer)}, {peer['gradient']})")
    figure = f"{', '.join(figures)} of {len(peers)} paths{source(line)}"
    yield Line(title, figure, "> 1", min(ratios) > 1)
    if name in EXACT_PEER:
        exact = [result for result in peers if result["gradient"] == "exact"]
        peer = min(exact, key=lambda result: time_of(result, BOTH))
        ratio = time_of(peer, BOTH) / time_of(ours, BOTH)
        yield Line(
            f"forward+backward against its fastest exact path at {SHAPES[name].sizes[:3]}",
            f"{ratio:.2f}x ({path_of(peer)}){source(line)}",
            f">= {EXACT_PEER[name]}",
            ratio >= EXACT_PEER[name],
        )


def kept_line(lines: Sequence[dict[str, Any] | None]) -> Line:
    """Bytes that autograd keeps of one head of one sequence, beside its arguments."""
    title, target = (
        "bytes kept for backward, a head",
        f"a step at most {GROWTH} times that of the length before",
    )
    if None in lines:
        return Line(title, "no result under docs/results/mlstm", target, False)
    kept, steps = [], []
    for line in lines:
        batch, heads, length, *_ = line["sizes"]
        kept.append(named(line, "vilma auto")["kept_bytes"] // (batch * heads))
        steps.append(length)
    each = [x / length for x, length in zip(kept, steps)]
    figure = ", ".join(f"T = {t}: {x} ({y:.0f} a step)" for t, x, y in zip(steps, kept, each))
    # up to 256 steps no state is kept: the growth is that from the second length to the last
    return Line(title, figure + source(lines[-1]), target, each[-1] <= GROWTH * each[-2])


def named(line: dict[str, Any], name: str) -> dict[str, Any]:
    return next(result for result in line["results"] if result["name"] == name)


def path_of(peer: dict[str, Any]) -> str:
    return peer["name"].removeprefix("mlstm-kernels ")


def source(line: dict[str, Any]) -> str:
    """A mark behind a figure that was read, nothing behind one measured now."""
    return " (cited)" if "file" in line else ""


if __name__ == "__main__":
    raise SystemExit(main())
