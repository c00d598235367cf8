"""Print what was measured on GPUs beside what was asked for, from the committed results."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vilma.targets import ROOT, Line, show

__all__ = ["main", "rows"]

RESULTS = ROOT / "docs" / "results" / "gpu" / "h200.json"
OURS, SIGMOID, GLA = "vilma exp", "vilma sigmoid", "fla simple_gla"
KERNELS = "mlstm-kernels chunkwise--triton_xl_chunk, chunk 128"
FORWARD, BOTH = "forward", "forward+backward"
FLOOR, PEER, LINEAR, CHUNK_MS = 3.0, 3.0, 1.0, 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma show-gpu", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    measured = json.loads(options.json.read_text())
    versions = measured["versions"]
    print(
        f"{measured['device']}, torch {versions['torch']}, Triton {versions['triton']}: {options.json.name}"
    )
    for run in measured["runs"]:
        print(f"  at {run['commit']}: {run['command']}{'; ' * bool(run['note'])}{run['note']}")
    return show(lines(measured))


def rows(measured: dict[str, Any], section: str, what: str = "") -> list[dict[str, Any]]:
    """Rows of a section whose name begins with ``what``, in the order in which they were measured."""
    found = [row for run in measured["runs"] for row in run["rows"]]
    return [row for row in found if row["section"] == section and row["what"].startswith(what)]


def lines(measured: dict[str, Any]) -> Iterator[Line]:
    yield from correctness(measured)
    yield from sequences(measured)
    yield from cells(measured)
    yield from models(measured)


def correctness(measured: dict[str, Any]) -> Iterator[Line]:
    found = rows(measured, "check")
    red, cases = (sum(row[key] for row in found) for key in ("red", "cases"))
    yield Line("checks against float64 on the GPU", f"{cases - red} of {cases} green", "all", not red)
    graphs = rows(measured, "graphs")
    same = sum(bool(row.get("equal")) for row in graphs)
    yield Line(
        "operators that give the same from a CUDA graph",
        f"{same} of {len(graphs)}",
        "all",
        same == len(graphs),
    )


def sequences(measured: dict[str, Any]) -> Iterator[Line]:
    (vision,) = rows(measured, "mlstm", "ViL-T 224")
    for mode in (FORWARD, BOTH):
        over = vision[f"{OURS} {mode}"] / vision[f"floor {mode}"]
        figure = f"{vision[f'{OURS} {mode}']:.3f} ms, {over:.2f} times the floor at 3.0 TB/s"
        yield Line(f"mLSTM, ViL-T 224, batch 256, {mode}", figure, f"at most {FLOOR:g}", over <= FLOOR)
    (small,) = rows(measured, "peers", "ViL-S 224")
    for mode in (FORWARD, BOTH):
        gain = small[f"{KERNELS} {mode}"] / small[f"{OURS} {mode}"]
        figure = f"mlstm-kernels takes {gain:.1f} times as long"
        yield Line(f"mLSTM, ViL-S 224, batch 256, {mode}", figure, f"at least {PEER:g}", gain >= PEER)
    for row in rows(measured, "tfla"):
        if row["sizes"][2] >= 2048:
            gain = row[f"{GLA} {FORWARD}"] / row[f"{SIGMOID} {FORWARD}"]
            figure = (
                f"{row[f'{SIGMOID} {FORWARD}']:.2f} ms (exponential gate {row[f'{OURS} {FORWARD}']:.2f}), "
                f"simple_gla takes {gain:.2f} times as long; it refuses its backward here"
            )
            name = f"{row['what']}, sigmoid gate, {FORWARD}"
            yield Line(name, figure, f"at least {LINEAR:g}", gain >= LINEAR)
    (long,) = rows(measured, "peers", "TFLA 8192")
    for name in (KERNELS, "Mamba2 scan, 64 heads of 64, states of 128"):
        gain = long[f"{name} {BOTH}"] / long[f"{OURS} {BOTH}"]
        figure = f"{long[f'{OURS} {BOTH}']:.1f} ms, {name} takes {gain:.2f} times as long"
        yield Line(f"TFLA 8192, {BOTH}", figure, f"at least {LINEAR:g}", gain >= LINEAR)
    missing = [steps for steps in (16_384, 65_536) if not rows(measured, "tfla", f"TFLA {steps}")]
    yield Line(
        "the rest of the TFLA table", f"not run: {missing}" if missing else "run", "all run", not missing
    )
    text = "; ".join(f"{row['what']}: {row['microseconds']:.1f} us" for row in rows(measured, "step"))
    yield Line("mlstm_step in a graph", text, "shown; its work does not depend on the past", True)


def cells(measured: dict[str, Any]) -> Iterator[Line]:
    for row in rows(measured, "rnn", "B 16"):
        ours = row[f"vilma slstm {BOTH}"]
        text = f"sLSTM {row[f'vilma slstm {FORWARD}']:.2f} / {ours:.2f} ms; "
        text += f"cuDNN LSTM {row[f'cuDNN LSTM {FORWARD}']:.2f} / {row[f'cuDNN LSTM {BOTH}']:.2f}"
        if f"flashrnn slstm {BOTH}" in row:
            text += f"; flashrnn {row[f'flashrnn slstm {FORWARD}']:.2f} / {row[f'flashrnn slstm {BOTH}']:.2f}"
        yield Line(f"cells, {row['what']}", text, "shown beside cuDNN and flashrnn", True)


def models(measured: dict[str, Any]) -> Iterator[Line]:
    seen = {row["what"]: row for row in rows(measured, "vil")}  # the last one of a name
    for what, row in seen.items():
        ratios = [f"{row[f'ratio {m}']:.2f} ({m})" for m in (FORWARD, BOTH) if f"ratio {m}" in row]
        yield Line(f"ViL2 over DeiT, {what}, batch {row['batch']}", ", ".join(ratios), "shown", bool(ratios))
    chunks = {}
    for section in ("policy", "compiled"):
        for row in rows(measured, section, "chunk"):
            chunks.setdefault(row["what"].removesuffix(", compiled"), []).append(row)
    for what, found in chunks.items():
        times = {k: v for row in found for k, v in row.items() if k.endswith("CUDA graph ms")}
        times |= {"eager ms": min(row["eager ms"] for row in found)}
        best = min(v for k, v in times.items() if "graph" in k)
        text = ", ".join(f"{name} {value:.1f}" for name, value in times.items())
        met = best <= CHUNK_MS
        yield Line(f"a whole {what}, batch 1", text, f"at most {CHUNK_MS:g} ms from a CUDA graph", met)
    last = rows(measured, "policy", "training")[-1]
    text = f"{last['samples a second']:.0f} samples a second, {last['peak GiB']:.1f} GiB"
    yield Line(f"training of the CALVIN Cat model, batch {last['batch']}", text, "shown", True)


if __name__ == "__main__":
    raise SystemExit(main())
