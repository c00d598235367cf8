"""Print the measured lines of point maps and PointMapPolicy: figure, target, met or missed."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vilma.targets import ROOT, Group, Line, show
from vilma.tools import bench_policy
from vilma.tools._robosuite_show import camera_shift, compare
from vilma.tools._robosuite_table import CELLS, LIFT, MOVED, STACK, Setting
from vilma.tools.reproduce import read_cell

RESULTS = ROOT / "docs" / "results" / "pointmap"
TABLE = RESULTS / "table"
# What must at least be in the table.
MODALITIES = {LIFT: ("rgb", "xyz", "cat", "dp3"), STACK: ("rgb", "cat"), MOVED: ("rgb", "xyz", "cat")}

POLICIES, POINTMAP = "tests/policies", "tests/pointmap"
GROUPS = (
    Group(
        "every pmp vector: geometry, FiLM, EDM, schedules, the denoiser's output, loss and sample",
        (
            f"{POINTMAP}/test_golden.py",
            f"{POLICIES}/test_edm.py",
            f"{POLICIES}/test_denoiser.py",
            "tests/training/test_schedule.py",
        ),
    ),
    Group(
        "parameters: CALVIN Cat 144.40 M (every one with a gradient), RoboCasa xyz 111.09 M",
        (f"{POLICIES}/test_recipes.py",),
    ),
    Group(
        "every fusion x head x backbone builds, overfits one batch, survives save and load",
        (f"{POLICIES}/test_design_space.py",),
    ),
    Group(
        "causal; parallel = recurrent = chunkwise; the prefix read once gives the same to 1e-5",
        (f"{POLICIES}/test_backbones.py", f"{POLICIES}/test_denoiser.py"),
    ),
    Group(
        "wrong camera conventions are caught on the first batch and the key is named",
        (f"{POINTMAP}/test_check.py", f"{POLICIES}/test_first_batch.py"),
    ),
    Group("two processes, DDP and FSDP2, follow one", ("tests/training/test_distributed.py",)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma show-pointmap", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only cite results, measure and test nothing")
    options = parser.parse_args(arguments)
    return show(all_lines(options.quick))


def all_lines(quick: bool) -> Iterator[Line]:
    yield from table_lines()
    yield from speed_lines(quick)
    if not quick:
        yield from (group.line() for group in GROUPS)


def table_lines() -> Iterator[Line]:
    """From the files of the finished cells."""
    made = {cell.name: figures for cell in CELLS if (figures := read_cell(TABLE / f"{cell.name}.json"))}
    for setting, modalities in MODALITIES.items():
        yield setting_line(setting, modalities, made)
    clear = [f"{a} over {b}" for setting in MODALITIES for a, b, *_, p in compare(setting, made) if p < 0.05]
    yield Line(
        "differences that are significant", "; ".join(clear) or "none", "named, losses included", bool(made)
    )
    lost = camera_shift(made, 5)
    for modality in ("xyz", "cat", "rgb"):
        values = lost.get(modality, {})
        figure = " / ".join(f"{name or 'plainly'} {value:.0f}" for name, value in values.items())
        name = f"{modality}: of 100 episodes, lost when the camera moves by 5 cm"
        if modality == "rgb":
            yield Line(name, figure or "not run", "shown beside", bool(values))
        else:
            lost_plainly = values.get("", 0)
            if len(values) == 2 and lost_plainly <= 0:
                figure += ": nothing was lost plainly, so there is nothing to halve"
            met = len(values) == 2 and 0 < lost_plainly >= 2 * values["reposed"]
            yield Line(name, figure or "not run", "re-posed at most half of plainly", met)


def setting_line(setting: Setting, modalities: Sequence[str], made: Mapping[str, Any]) -> Line:
    """Every cell that is there; wanted are those trained by the plain recipe."""
    cells = [c for c in CELLS if c.setting is setting and c.modality in modalities]
    figures = [
        f"{c.row}, seed {c.seed}: {made[c.name]['successes']}/{made[c.name]['episodes']}"
        for c in cells
        if c.name in made
    ]
    missing = [c.name for c in cells if c.name not in made and not c.variant]
    text = "; ".join(figures) + (f"; missing: {', '.join(missing)}" if missing else "")
    return Line(f"success, {setting.title}", text, "every cell with its interval in the docs", not missing)


def speed_lines(quick: bool) -> Iterator[Line]:
    path = RESULTS / "bench_policy.json"
    if quick:
        measured = json.loads(path.read_text())
        for name, figure, target, met in bench_policy.lines(measured):
            source = f" [{path.relative_to(ROOT).as_posix()} at {measured[0]['commit']}]"
            yield Line(name, figure + source, target, met)
        return
    yield from bench_policy.lines([bench_policy.bench(n, case) for n, case in bench_policy.CASES.items()])
