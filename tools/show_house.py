"""Print the measured lines of the house and its demo: figure, target, met or missed."""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vilma import config
from vilma.report import read_timings
from vilma.targets import ROOT, Group, Line, show

RESULTS = ROOT / "docs" / "results" / "house"
POLICY = ROOT / "tests" / "data" / "demo_policy"
WIDE, DEFAULT = "robosuite_Lift_placement-0.12", "robosuite_Lift"
MINUTES = 12


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vilma show-house", description=__doc__)
    parser.add_argument(
        "--record",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="first copy these runs' results to docs/results/house",
    )
    parser.add_argument("--quick", action="store_true", help="only cite results, run no tests")
    options = parser.parse_args(arguments)
    for run in options.record or ():
        print(f"recorded {record(run)}")
    return show(all_lines(options.quick))


def all_lines(quick: bool) -> Iterator[Line]:
    yield from demo_lines()
    yield from collection_lines()
    yield policy_line()
    if not quick:
        yield from (group.line() for group in TEST_GROUPS)


def record(run: Path) -> Path:
    """Keep what an uninterrupted demo measured. Refuses a run that is not the shipped demo as it is."""
    values, shipped = config.read(run / "config.yaml"), config.read("configs/policies/demo_lift.yaml")
    seed = values["train"]["seed"]
    timings = read_timings(run)
    for section, fields in shipped.items():
        for field, value in fields.items():
            if (section, field) not in (("train", "seed"), ("data", "path")) and values[section][
                field
            ] != value:
                raise ValueError(
                    f"{run} was trained with {section}.{field}={values[section][field]}, not {value}"
                )
    repeated = [phase for phase, entry in timings.items() if entry["runs"] != 1]
    if repeated:
        raise ValueError(f"{run} was interrupted in: {', '.join(repeated)}; its times do not tell one run")
    evaluations = {}
    for file in sorted((run / "eval").glob("*.json")):
        result = json.loads(file.read_text())
        if result["summary"]["episodes"] != 50:
            raise ValueError(f"{file} has {result['summary']['episodes']} episodes, wanted 50")
        evaluations[file.stem] = {"description": result["description"], "summary": result["summary"]}
    path = RESULTS / f"demo_seed{seed}.json"
    results = {
        "command": f"make demo SEED={seed}",
        "commit": _commit_of(run, timings),
        "timings": timings,
        "collection": _collected(run / "demos.hdf5"),
        "evaluations": evaluations,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def _commit_of(run: Path, timings: dict[str, Any]) -> str:
    """The one clean commit that ran every phase."""
    commits = {entry.get("commit", "unknown") for entry in timings.values()}
    if len(commits) != 1 or not re.fullmatch("[0-9a-f]{12}", *commits):
        raise ValueError(f"{run} was made at {', '.join(sorted(commits))}; wanted one commit without changes")
    return commits.pop()


def _collected(path: Path) -> dict[str, int]:
    import h5py

    with h5py.File(path) as file:
        rewards = [file[f"data/{name}/rewards"][:] for name in file["data"]]
    return {
        "episodes": len(rewards),
        "successes": sum(bool(r[-1] > 0) for r in rewards),
        "frames": sum(map(len, rewards)),
    }


def demo_lines() -> list[Line]:
    """Success and minutes of the recorded demo runs."""
    runs = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("demo_seed*.json"))]
    if not runs:
        return [Line("demo", "no result under docs/results/house", ">= 90 %", False)]
    lines = []
    seconds = [_wall(run["timings"]) for run in runs]
    lines.append(
        Line(
            f"minutes of make demo, {len(runs)} seeds",
            ", ".join(f"{s / 60:.1f}" for s in seconds),
            f"<= {MINUTES} each",
            max(seconds) <= 60 * MINUTES,
        )
    )
    for name, words, target in (
        (WIDE, "success, cube over 24 x 24 cm", 0.90),
        (DEFAULT, "success, robosuite's 6 x 6 cm", 0.96),
        (f"{WIDE}_blank-images-depth", "the same policy blind (images and depth zero)", None),
    ):
        summaries = [_summary(run, name) for run in runs]
        present = [s for s in summaries if s]
        rates = [s["successes"] / s["episodes"] for s in present]
        mean = sum(rates) / max(len(rates), 1)
        counts = ", ".join(f"{s['successes']}/{s['episodes']}" for s in present)
        lines.append(
            Line(
                words,
                f"mean {100 * mean:.1f} % ({counts})",
                f">= {100 * target:.0f} %, {len(runs)} seeds" if target else "shown beside it",
                len(present) == len(runs) >= (3 if target else 1) and (target is None or mean >= target),
            )
        )
    cited = ", ".join(sorted({f"{run['command']} at {run['commit']}" for run in runs}))
    print(f"cited: {cited}")
    return lines


def _wall(timings: dict[str, Any]) -> float:
    """Seconds from the start of the first phase to the end of the last."""
    return max(t["ended"] for t in timings.values()) - min(
        t["ended"] - t["seconds"] for t in timings.values()
    )


def _summary(run: dict[str, Any], name: str) -> dict[str, Any] | None:
    result = run["evaluations"].get(name)
    return result["summary"] if result else None


def collection_lines() -> list[Line]:
    """Demonstrations whose last step is rewarded: robosuite rewards the successful state alone."""
    runs = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("demo_seed*.json"))]
    lines = []
    for run in runs[:1]:
        kept, seconds = run["collection"], run["timings"]["collect"]["seconds"]
        rate = f"{kept['frames'] / seconds:.0f} frames/s, start-up included"
        figure = f"{kept['successes']}/{kept['episodes']}, {rate}"
        met = kept["successes"] == kept["episodes"] == 100
        lines.append(
            Line(
                "kept demonstrations that succeed (" + run["timings"]["collect"]["command"] + ")",
                figure,
                "100 %",
                met,
            )
        )
    return lines or [Line("kept demonstrations", "no result", "100 %", False)]


def policy_line() -> Line:
    size = sum(f.stat().st_size for f in POLICY.glob("*")) if POLICY.is_dir() else 0
    return Line("the committed demo policy", f"{size / 1e6:.2f} MB", "<= 8 MB, there", 0 < size <= 8e6)


TEST_GROUPS = (
    Group(
        "table plane within 0.01 mm, cube tops within 4 mm",
        ("-m", "not long", "tests/envs/test_robosuite.py"),
    ),
    Group(
        "pmp and mlstm vectors, the tiny denoiser among them",
        (
            "-m",
            "not long",
            "tests/pointmap",
            "tests/policies",
            "tests/training/test_schedule.py",
            "tests/xlstm/test_mlstm_golden.py",
        ),
    ),
    Group(
        "make demo killed in each phase, finished work not repeated",
        ("-m", "long", "tests/tools/test_demo.py"),
    ),
    Group("a wheel works from an empty folder", ("-m", "long", "tests/test_house.py")),
)


if __name__ == "__main__":
    raise SystemExit(main())
