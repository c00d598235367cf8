"""Time Vision-LSTM beside timm's DeiT of the same width, and cite the official implementation's figures.

First the fast path is checked against the same model in float64; where it is wrong nothing is timed and the
exit status is 1. Then both models take turns in one process (see vilma/bench.py): float32 and one thread on a
CPU, bfloat16 autocast elsewhere. Quote the ratios, not the milliseconds.
"""

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vilma.bench import BOTH, FORWARD, Contender, describe, json_line, measure
from vilma.extras import require_timm
from vilma.report import source_commit
from vilma.testing import rms_ratio

TOLERANCE = 1e-4  # RMS ratio to float64; random weights amplify rounding


@dataclass(frozen=True)
class Case:
    """Two models on one batch.

    Args:
        modes: mode -> (time ratio of the official implementation, most that ours may be), on a CPU. None: not
            measured, no target. The official ones are those of torch 2.13, one thread, timm 1.0.29's DeiT.
        kept: MiB an image that the official implementation keeps for its backward pass, and the most we may.
    """

    name: str
    model: str
    peer: str
    size: int
    batch: int
    modes: Mapping[str, tuple[float | None, float | None]]
    kept: tuple[float | None, float | None] = (None, None)


TINY, SMALL = (
    ("vil2_tiny_patch16_224", "deit_tiny_patch16_224"),
    ("vil2_small_patch16_224", "deit_small_patch16_224"),
)
CASES = {
    case.name: case
    for case in (
        Case("tiny_224", *TINY, 224, 8, {FORWARD: (3.3, 1.8), BOTH: (2.7, 2.0)}, (161.6, 60.0)),
        Case("small_224", *SMALL, 224, 8, {FORWARD: (2.2, 1.5), BOTH: (2.1, None)}, (265.6, None)),
        Case("tiny_448", *TINY, 448, 8, {FORWARD: (8.0, 1.5)}),
        Case("tiny_448_train", *TINY, 448, 1, {BOTH: (4.1, None)}, (1334.0, None)),
        Case(
            "v1_tiny_224", "vil_tiny_patch16_224", TINY[1], 224, 8, {FORWARD: (3.4, None), BOTH: (3.2, None)}
        ),
    )
}


class WrongResult(ValueError):
    """The fast path does not compute what the model is in float64."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vilma bench-vil", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--batch", type=int, help="replace the batch of the cases")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, help="samples of each; default: 5 on a CPU, 30 elsewhere")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    parser.add_argument("--quiet", action="store_true", help="say nothing while measuring")
    options = parser.parse_args(arguments)
    command = shlex.join(["vilma", "bench-vil", *(sys.argv[1:] if arguments is None else arguments)])
    say = (
        (lambda text: None) if options.quiet else lambda text: print(f"# {text}", file=sys.stderr, flush=True)
    )
    lines = []
    for name in options.cases or CASES:
        if name not in CASES:
            raise ValueError(f"case {name!r} is not known; choose of {', '.join(CASES)}")
        try:
            line = bench(
                CASES[name],
                options.device,
                batch=options.batch,
                rounds=options.rounds,
                command=command,
                say=say,
            )
        except WrongResult as error:
            print(f"vilma bench-vil: {error}", file=sys.stderr)
            return 1
        lines.append(line)
        for text in table(line):
            print(text)
        print(json.dumps(line), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
    return 0


def bench(
    case: Case,
    device: str | torch.device = "cpu",
    *,
    batch: int | None = None,
    rounds: int | None = None,
    command: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure one case; returns the line that is printed as JSON."""
    timm = require_timm()
    import vilma.vil  # noqa: F401 - registers the family

    device, batch = torch.device(device), batch or case.batch
    torch.manual_seed(0)
    ours = timm.create_model(case.model, img_size=case.size).to(device).eval()
    peer = timm.create_model(case.peer, img_size=case.size).to(device).eval()
    image = torch.randn(batch, 3, case.size, case.size, device=device)
    say(f"{case.name}: checking {case.model} against float64")
    error = check(ours, image[:1])
    contenders = [contender(case.model, ours, image), contender(case.peer, peer, image)]
    with precision(device):
        results = measure(contenders, device=device, rounds=rounds, modes=tuple(case.modes), say=say)
    text = json_line(
        results,
        commit=source_commit(),
        device=describe(device, ("timm",)),
        bench="vil",
        command=command,
        case=case.name,
        batch=batch,
        size=case.size,
        dtype="float32" if device.type == "cpu" else "bfloat16 autocast",
        error=float(f"{error:.2e}"),
    )
    return json.loads(text)


def contender(name: str, model: nn.Module, image: torch.Tensor) -> Contender:
    return Contender(name, lambda: model(image), list(model.parameters()))


def precision(device: torch.device):
    return contextlib.nullcontext() if device.type == "cpu" else torch.autocast(device.type, torch.bfloat16)


def check(model: nn.Module, image: torch.Tensor) -> float:
    """RMS ratio of the features to those in float64. Raises `WrongResult`."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    with torch.no_grad():
        y = model.forward_features(image)
        exact = torch.func.functional_call(
            _features(model), {f"model.{k}": v for k, v in weights.items()}, image.double()
        )
    error = rms_ratio(y, exact)
    if not error <= TOLERANCE:
        raise WrongResult(
            f"features are off by {error:.1e} of float64 (at most {TOLERANCE:.0e}); nothing is timed"
        )
    return error


class _features(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(x)


def ratio(line: Mapping[str, Any], mode: str) -> float:
    """Time of ours over the peer's."""
    ours, peer = line["results"]
    return ours[mode]["ms"] / peer[mode]["ms"]


def kept(line: Mapping[str, Any]) -> list[float] | None:
    """MiB an image that both keep for the backward pass; None where it was not run."""
    if any("kept_bytes" not in result for result in line["results"]):
        return None
    return [result["kept_bytes"] / 2**20 / line["batch"] for result in line["results"]]


def table(line: Mapping[str, Any]) -> Iterator[str]:
    """Rows for people: ours, the peer, their ratio, the official implementation's, and the target."""
    case = CASES[line["case"]]
    on_cpu = line["device"]["type"] == "cpu"
    where = f"{line['dtype']}, {line['device']['device']}"
    yield f"{line['case']}: batch {line['batch']}, {line['size']} px, {where}"
    failed = [r for r in line["results"] if "error" in r]
    if failed:
        yield from (f"  {r['name']}: {r['error']}" for r in failed)
        return
    yield f"  {'':<18}{'vilma':>12}{'timm DeiT':>12}{'ratio':>8}{'official':>10}{'target':>9}"
    for mode, (official, target) in case.modes.items():
        times = [result[mode]["ms"] / line["batch"] for result in line["results"]]
        yield (
            f"  {mode:<18}{times[0]:>9.2f} ms{times[1]:>9.2f} ms{ratio(line, mode):>8.2f}"
            f"{_figure(official if on_cpu else None):>10}{_figure(target if on_cpu else None, '<= '):>9}"
        )
    if sizes := kept(line):
        official, target = case.kept
        yield (
            f"  {'kept for backward':<18}{sizes[0]:>8.1f} MiB{sizes[1]:>8.1f} MiB{sizes[0] / sizes[1]:>8.2f}"
            f"{_figure(official, unit=' MiB'):>10}{_figure(target, '<= '):>9}"
        )
    yield "  (an image; official: NX-AI/vision-lstm on a CPU, time over DeiT's)"


def _figure(value: float | None, before: str = "", unit: str = "") -> str:
    return "-" if value is None else f"{before}{value:g}{unit}"


if __name__ == "__main__":
    raise SystemExit(main())
