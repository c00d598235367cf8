"""Print the measured lines of the simulator suites and data formats: figure, target, met or missed."""

import argparse
import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from vilma import envs
from vilma.evaluation import evaluate
from vilma.targets import ROOT, Group, Line, show

RESULTS = ROOT / "docs" / "results" / "suites"
# Checked in environments of their own (`make check-...`): cited from what was recorded there.
RECORDED = ("robocasa", "robocasa02", "robomimic", "libero", "lerobot")
EPISODES = 10

GROUPS = (
    Group(
        "LeRobot v2.1 and v3.0 by their published layouts, frame for frame",
        ("tests/datasets/test_lerobot.py",),
    ),
    Group(
        "robomimic's published data sets train: low-dimensional and images",
        ("tests/datasets/test_published.py", "tests/policies/test_state_only.py"),
    ),
    Group(
        "RoboCasa's two layouts; depth added by replay, on generated files",
        ("tests/datasets/test_robocasa.py",),
    ),
    Group("served policies; no torch beside the simulator", ("tests/test_serving.py",)),
    Group("vilma compare: coverage and pairing", ("tests/test_summaries.py",)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma show-suites", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only cite results, measure and test nothing")
    options = parser.parse_args(arguments)
    return show(all_lines(options.quick))


def all_lines(quick: bool) -> Iterator[Line]:
    for suite in RECORDED:
        yield from recorded(suite)
    if not quick:
        yield metaworld()
        yield from (group.line() for group in GROUPS)


def recorded(suite: str) -> Iterator[Line]:
    path = RESULTS / f"{suite}.json"
    if not path.is_file():
        yield Line(suite, f"no {path.relative_to(ROOT)}: run make check-{suite}", "recorded", False)
        return
    result = json.loads(path.read_text())
    source = f" [{result['command']} at {result['commit']}]"
    for line in result["lines"]:
        yield Line(f"{suite}: {line['name']}", line["figure"] + source, line["target"], line["met"])


def metaworld() -> Line:
    """MetaWorld's own scripted policy through the runner."""
    task = "metaworld/pick-place-v3"
    policy = envs.scripted_policy(task)
    with tempfile.TemporaryDirectory() as folder:
        result = evaluate(
            functools.partial(envs.make, task, cameras=(), privileged=True),
            policy,
            episodes=EPISODES,
            seed=500_000,
            result_path=Path(folder) / "result.json",
        )
    won = result["summary"]["successes"]
    return Line(
        f"{task}, scripted, through the runner", f"{won} of {EPISODES}", f"{EPISODES}", won == EPISODES
    )


if __name__ == "__main__":
    raise SystemExit(main())
