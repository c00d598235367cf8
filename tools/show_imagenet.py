"""Print the measured lines of the ImageNet tools: figure, target, met or missed."""

import argparse
import contextlib
import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vilma import config
from vilma.report import read_timings
from vilma.targets import ROOT, Group, Line, show
from vilma.tools import train_imagenet

RESULTS = ROOT / "docs" / "results" / "imagenet"
MINUTES = 8
SHAPE_MINUTES = 3
KEPT = (
    *("step", "model", "top1", "top5", "loss", "samples", "unreadable", "miou", "pixel_accuracy", "images"),
    *("iou", "cpu_seconds"),
)

RUNS = "tests/training/test_image_runs.py"
EXPORT = "tests/tools/test_export.py"
GROUPS = (
    Group("killed and resumed: the same bits", (RUNS, "-k", "bit_for_bit")),
    Group("two processes (DDP, FSDP2 on gloo) give the losses of one", (RUNS, "-k", "two_processes")),
    Group("exported programs and ONNX at two batch sizes", (EXPORT, "-k", "onnx or where_vilma_is_not")),
    Group(
        "a folder that is no data set, an empty class, a corrupt tar, a truncated JPEG: named, nothing lost",
        ("tests/datasets/test_imagenet.py", "tests/tools/test_train_imagenet.py"),
    ),
    Group(
        "segmentation: heads, windows, masks in step, layer decay",
        ("tests/vil/test_segmentation.py", "tests/training/test_segmentation.py"),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma show-imagenet", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only cite results, measure and test nothing")
    parser.add_argument(
        "--keep",
        nargs=2,
        metavar=("RUN", "NAME"),
        help="instead: keep the figures of a finished run as docs/results/imagenet/NAME.json",
    )
    options = parser.parse_args(arguments)
    if options.keep:
        print(keep(Path(options.keep[0]), options.keep[1]))
        return 0
    return show(all_lines(options.quick))


def keep(run_dir: Path, name: str) -> Path:
    """The figures of a run, with its command, commit and learning curve, as a small file."""
    results = [run_dir / "eval" / file for file in ("val.json", "masks.json")]
    path = next((p for p in results if p.is_file()), None)
    if path is None:
        raise ValueError(f"{run_dir} has no eval/val.json or eval/masks.json: is it finished?")
    found = json.loads(path.read_text())
    timing = read_timings(run_dir).get("train", {})
    curve = []
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        figure = record.get("val_top1", record.get("val_miou"))
        if figure is not None:
            curve.append([record["step"], round(figure, 5)])
    values = {key: found[key] for key in KEPT if key in found}
    values |= {"command": _command(timing.get("command", "")), "commit": timing.get("commit")}
    values |= {"wall_seconds": timing.get("seconds"), "curve": curve}
    values["threads"] = config.read(run_dir / "config.yaml")["train"]["threads"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps(values, indent=1) + "\n")
    return target


def _command(text: str) -> str:
    """Without the run directory, which is of no interest elsewhere."""
    words = shlex.split(text)
    for flag in ("--run", "--run-dir"):
        while flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    return shlex.join(words)


def all_lines(quick: bool) -> Iterator[Line]:
    yield digits_line(recorded("digits"))
    for name, title in (("digits_vit", "a ViT of its width and depth"), ("digits_deit", "DeiT-Tiny")):
        yield peer_line(title, recorded(name))
    yield shapes_line(recorded("shapes"))
    yield export_line(recorded("export"))
    yield plan_line()
    if not quick:
        yield from (group.line() for group in GROUPS)


def recorded(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) | {"file": f"{name}.json"} if path.is_file() else None


def digits_line(result: Mapping[str, Any] | None) -> Line:
    target = f">= 97 % in <= {MINUTES} minutes on 2 CPU cores"
    if result is None:
        return Line("top-1 on 1,000 held-out digits", "no result", target, False)
    met = result["top1"] >= 0.97 and result["cpu_seconds"] <= 60 * MINUTES and result["samples"] == 1000
    return Line("top-1 on 1,000 held-out digits", f"{result['top1']:.2%}{_cost(result)}", target, met)


def peer_line(title: str, result: Mapping[str, Any] | None) -> Line:
    name = f"the same recipe with {title}"
    if result is None:
        return Line(name, "no result", "printed", False)
    return Line(name, f"{result['top1']:.2%}{_cost(result)}", "printed", True)


def shapes_line(result: Mapping[str, Any] | None) -> Line:
    target = f">= 90 % in <= {SHAPE_MINUTES} minutes on 2 CPU cores"
    if result is None:
        return Line("mIoU on generated shapes", "no result", target, False)
    met = result["miou"] >= 0.9 and result["cpu_seconds"] <= 60 * SHAPE_MINUTES
    return Line("mIoU on generated shapes", f"{result['miou']:.2%}{_cost(result)}", target, met)


def export_line(result: Mapping[str, Any] | None) -> Line:
    name, target = "vil2_tiny_patch16_224 exported, largest difference", "<= 1e-4 at two batch sizes"
    if result is None:
        return Line(name, "no result", target, False)
    formats = result["formats"]
    figure = ", ".join(f"{kind} {made['error']:.1e}" for kind, made in formats.items())
    met = {"torch", "onnx"} <= formats.keys() and len(result["batches"]) > 1
    met = met and all(made["error"] <= 1e-4 for made in formats.values())
    return Line(
        name, f"{figure} at {result['batches']} [{result['file']} at {result['commit']}]", target, met
    )


def plan_line() -> Line:
    """The dry run of the published recipe on 8 GPUs x 4 nodes."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        path = str(config.find("configs/imagenet/vil2_tiny_patch16_224.yaml"))
        train_imagenet.main([path, "--dry-run", "8x4"])
    lines = said.getvalue().splitlines()
    wanted = ("effective batch", "learning rate", "steps", "memory of a process", "32 processes")
    figure = "; ".join(line for line in lines if line.startswith(("vil2", "memory of a process")))
    met = all(word in said.getvalue() for word in wanted)
    return Line("dry run for 8 GPUs x 4 nodes", figure, "batch, learning rate, steps, memory", met)


def _cost(result: Mapping[str, Any]) -> str:
    where = f" [{result['file']} at {result['commit']}]"
    if result.get("cpu_seconds") is None:
        return where
    beside = f"{result['wall_seconds'] / 60:.1f} beside other work"
    minutes = f"{result['cpu_seconds'] / 60:.1f} minutes of CPU time on {result['threads']} thread"
    return f" in {minutes} ({beside}){where}"


if __name__ == "__main__":
    raise SystemExit(main())
