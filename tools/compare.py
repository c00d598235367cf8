"""Compare two policies on the same episodes: paired difference with its interval, by task and over all."""

import argparse
import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vilma.evaluation import EvaluationError, read_result
from vilma.summaries import Difference, compare, environment_of, labels


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vilma compare",
        description=__doc__,
        epilog="A and B are runs, folders of results or result files. Episodes are paired by their seed, "
        "within the same environment. The 95 % interval is Newcombe's for one task's successes, else a "
        "bootstrap.",
        allow_abbrev=False,
    )
    parser.add_argument("a", metavar="A", type=Path)
    parser.add_argument("b", metavar="B", type=Path)
    parser.add_argument(
        "--measure", help="a number that every episode has (default: success; of chains the length, solved)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON too")
    options = parser.parse_args(arguments)
    pairs = find_pairs(options.a, options.b)
    measure = options.measure or default_measure(pairs)
    lines = {name: compare(found, measure) for name, found in by_name(pairs).items()}
    if len(lines) > 1:
        lines["all"] = compare(pairs, measure)
    print(f"A = {options.a}, B = {options.b}; {measure}, A - B on the same episodes")
    width = max(map(len, lines))
    for name, difference in lines.items():
        print(f"{name:<{width}}  {describe(difference)}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figures = {name: difference._asdict() for name, difference in lines.items()}
        options.out.write_text(
            json.dumps({"a": str(options.a), "b": str(options.b), **figures}, indent=1) + "\n"
        )
    return 0


def find_pairs(a: Path, b: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The results of A and B that share an environment and what was blanked, in A's order.

    Raises:
        EvaluationError: a path without results, or nothing in common (with what each has).
    """
    if a.is_file() and b.is_file():
        return [(read(a), read(b))]
    first, second = results_in(a), results_in(b)
    pairs = [(first[key], second[key]) for key in first if key in second]
    if not pairs:
        names = [", ".join(sorted({_name(r) for r in found.values()})) for found in (first, second)]
        raise EvaluationError(
            f"no evaluation of both in the same environment: {a} has {names[0]}; {b} has {names[1]}. "
            "Options of the environment and the first seed must agree too"
        )
    return pairs


def read(path: Path) -> dict[str, Any]:
    """A result of single rollouts, or of chains."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        result = json.loads(path.read_text())
        if {"description", "chains"} <= set(result):
            return result
    return read_result(path)


def results_in(path: Path) -> dict[str, dict[str, Any]]:
    """The results of a run, of a folder or of one file, by what a partner must share."""
    folder = path / "eval" if (path / "eval").is_dir() else path
    files = [path] if path.is_file() else sorted(folder.glob("*.json"))
    found = {}
    for file in files:
        result = read(file)
        told = result["description"]
        key = [environment_of(result), sorted(told.get("blank", [])), told.get("seed")]
        found.setdefault(json.dumps(key, sort_keys=True), result)  # of two checkpoints, the last one
    if not found:
        raise EvaluationError(f"no results at {path}: give a run, a folder of results or a result file")
    return found


def by_name(pairs: Sequence[tuple[dict, dict]]) -> dict[str, list[tuple[dict, dict]]]:
    """Pairs of results by the environment's name (repeats together), with its options where names recur."""
    found: dict[str, list[tuple[dict, dict]]] = {}
    for label, (a, b) in zip(labels([a for a, _ in pairs]), pairs):
        blank = a["description"].get("blank")
        found.setdefault(f"{label} blank {', '.join(blank)}" if blank else label, []).append((a, b))
    return found


def default_measure(pairs: Sequence[tuple[Mapping, Mapping]]) -> str:
    """How many tasks of a chain were solved, else success."""
    return "solved" if all("chains" in result for pair in pairs for result in pair) else "success"


def describe(difference: Difference) -> str:
    percent, low, high = difference.measure == "success", *difference.interval
    scale, unit, digits = (100, " %", 1) if percent else (1, "", 2)
    return (
        f"{difference.pairs:>4} pairs  A {scale * difference.mean_a:.{digits}f}{unit}  "
        f"B {scale * difference.mean_b:.{digits}f}{unit}  "
        f"difference {scale * difference.value:+.{digits}f} "
        f"[{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]  "
        f"({'only' if percent else 'further'} A {difference.only_a}, B {difference.only_b}; "
        f"exact p {difference.p:.3g})"
    )


def _name(result: Mapping[str, Any]) -> str:
    return str(result["description"].get("environment", {}).get("name", "?"))


if __name__ == "__main__":
    raise SystemExit(main())
