"""Print the measured lines of CALVIN: figure, target, met or missed."""

import argparse
import json
from collections.abc import Iterator, Sequence

from vilma.targets import ROOT, Group, Line, show
from vilma.tools import bench_data

RESULTS = ROOT / "docs" / "results" / "calvin"
GROUPS = (
    Group(
        "a generated mini data set: reader, restricted annotations, cameras, packer, its kill and its damage",
        ("tests/datasets/test_calvin.py",),
    ),
    Group(
        "the evaluator: scripted outcomes, shares of processes, kill and resume, a chain that crashes",
        ("tests/test_chains.py", "tests/tools/test_calvin_eval.py"),
    ),
    Group(
        "1000 chains and their initial states equal the public code's, bit for bit",
        ("tests/envs/test_calvin_protocol.py", "-m", "not long"),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma show-calvin", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only cite results, test nothing")
    options = parser.parse_args(arguments)
    return show(all_lines(options.quick))


def all_lines(quick: bool) -> Iterator[Line]:
    yield from check_lines()
    yield from bench_lines()
    if not quick:
        yield from (group.line() for group in GROUPS)


def check_lines() -> Iterator[Line]:
    """From what ``make check-calvin`` found on the real simulator, which is not installed here."""
    path = RESULTS / "check.json"
    if not path.is_file():
        yield Line("make check-calvin", f"{path.relative_to(ROOT)} is missing", "the real simulator", False)
        return
    found = json.loads(path.read_text())
    source = f" [{path.relative_to(ROOT).as_posix()} at {found['commit']}]"
    heights = found["table_height_m"]
    gap = 1000 * max(abs(a - b) for a, b in heights)
    yield Line(
        f"table height of both cameras, {len(heights)} poses",
        f"at most {gap:.2f} mm apart" + source,
        "5 mm",
        gap < 5,
    )
    off = found["gripper_pose_mm"]
    yield Line("gripper camera from the robot state", f"{off:.3f} mm off" + source, "below 0.1 mm", off < 0.1)
    fired = [task for task, (count, _) in found["oracle"].items() if count]
    yield Line(
        "the real oracle fires for scripted skills",
        f"{len(fired)} of {len(found['oracle'])} skills" + source,
        "at least 1",
        bool(fired),
    )
    if "public_code" in found:
        figure = found["public_code"]
        equal, _, count = figure.split()[:3]
        yield Line("chains drawn by the public code", figure + source, "all equal", equal == count)
    mini = found["mini"]
    yield Line(
        "mini data set recorded and packed",
        f"{mini['segments']} segments, {mini['frames']} frames" + source,
        "all",
        mini["frames"] > 0,
    )
    for name, which in (("protocol", "of the protocol"), ("learned", "made of the learned tasks")):
        result = found.get(name)
        if result is None:
            yield Line(f"real chains {which}", "not evaluated", "10 chains", False)
            continue
        rates = " ".join(f"{entry['rate']:.0%}" for entry in result["success"])
        length = result["mean_length"]
        low, high = length["interval"]
        yield Line(
            f"{result['chains']} real chains {which}, the small policy",
            f"1 to 5 in a row {rates}, mean length {length['value']:.2f} [{low:.2f}, {high:.2f}]" + source,
            "10 chains, the figure as it is",
            result["chains"] >= 10 and not result["lost"],
        )


def bench_lines() -> Iterator[Line]:
    path = RESULTS / "data.json"
    if not path.is_file():
        yield Line("vilma bench-data", f"{path.relative_to(ROOT)} is missing", "5 x", False)
        return
    found = json.loads(path.read_text())
    source = f" [{path.relative_to(ROOT).as_posix()} at {found['commit']}]"
    yield from (line._replace(figure=line.figure + source) for line in bench_data.lines(found))


if __name__ == "__main__":
    raise SystemExit(main())
