"""Figures over several evaluations: tables by task and group, paired differences with their intervals.

Works on result files (``vilma.evaluation.read_result``). Episodes of two results that start from the same
seed in the same environment are a pair; everything that says "paired" rests on that.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Difference",
    "TaskRow",
    "compare",
    "environment_of",
    "labels",
    "mcnemar",
    "paired_interval",
    "table",
]

Z_95 = 1.959963984540054
RESAMPLES = 10_000


def paired_interval(only_a: int, only_b: int, pairs: int, both: int, z: float = Z_95) -> tuple[float, float]:
    """Newcombe's interval of the difference A - B of two success rates on the same episodes (R. G. Newcombe
    1998, Statistics in Medicine 17, 2635-2650, method 10: Wilson's intervals, their correlation, continuity
    corrected).

    Args:
        only_a, only_b: episodes that only A, only B solved. pairs: episodes in all. both: solved by both.
    """
    neither = pairs - only_a - only_b - both
    if pairs < 1 or min(only_a, only_b, both, neither) < 0:
        raise ValueError(f"got {only_a} + {only_b} + {both} of {pairs} episodes")
    rate_a, rate_b = (both + only_a) / pairs, (both + only_b) / pairs
    (low_a, high_a), (low_b, high_b) = _wilson(rate_a, pairs, z), _wilson(rate_b, pairs, z)
    cross = both * neither - only_a * only_b
    if cross > 0:
        cross = max(cross - pairs / 2, 0)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    phi = cross / math.sqrt(margins) if margins else 0.0

    def spread(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

    difference = rate_a - rate_b
    low = difference - spread(rate_a - low_a, high_b - rate_b)
    high = difference + spread(rate_b - low_b, high_a - rate_a)
    return max(-1.0, low), min(1.0, high)


def _wilson(rate: float, trials: int, z: float) -> tuple[float, float]:
    centre, share = rate + z * z / (2 * trials), z * z / trials
    margin = z * math.sqrt(rate * (1 - rate) / trials + share / (4 * trials))
    return (centre - margin) / (1 + share), (centre + margin) / (1 + share)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p value of McNemar's test: the chance of a split at least so uneven among equals."""
    discordant, rarer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(discordant, k) for k in range(rarer + 1)) / 2**discordant
    return min(1.0, 2 * tail)


class Difference(NamedTuple):
    """Two policies on the same episodes. ``value`` is the mean of A minus that of B, with its 95 % interval.

    Of successes, ``only_a`` and ``only_b`` count the episodes that one of them solved alone, and ``p`` is
    McNemar's; of other measures (a chain's length) they count the episodes in which one got further, and
    ``p`` is that of the sign test.
    """

    measure: str
    pairs: int
    mean_a: float
    mean_b: float
    value: float
    interval: tuple[float, float]
    only_a: int
    only_b: int
    p: float


def compare(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], measure: str = "success"
) -> Difference:
    """The paired difference of A and B.

    Args:
        pairs: results (A's, B's) of one environment each. With one pair of results the interval of successes
            is Newcombe's; with several (tasks, say) it is a bootstrap over episodes within each of them, as
            also for measures other than success.
        measure: a number that every episode has: "success", or "solved" of chains (their length).

    Raises:
        ValueError: results of different environments, or no episode in common.
    """
    strata = []
    for a, b in pairs:
        environments = [environment_of(result) for result in (a, b)]
        if environments[0] != environments[1]:
            raise ValueError(f"results of different environments: {environments[0]} and {environments[1]}")
        first, second = (outcomes(result, measure) for result in (a, b))
        common = sorted(first.keys() & second.keys())
        if common:
            strata.append(np.array([[first[seed], second[seed]] for seed in common]))
    if not strata:
        raise ValueError("no episode in common: evaluate both from the same seeds")
    values = np.concatenate(strata)
    difference = values[:, 0] - values[:, 1]
    only_a, only_b = int((difference > 0).sum()), int((difference < 0).sum())
    if measure == "success" and len(strata) == 1:
        both = int((values.sum(axis=1) == 2).sum())
        interval = paired_interval(only_a, only_b, len(values), both)
    else:
        interval = _stratified_interval([s[:, 0] - s[:, 1] for s in strata])
    mean_a, mean_b = values.mean(axis=0)
    return Difference(
        measure,
        len(values),
        float(mean_a),
        float(mean_b),
        float(difference.mean()),
        interval,
        only_a,
        only_b,
        mcnemar(only_a, only_b),
    )


def outcomes(result: Mapping[str, Any], measure: str) -> dict[int, float]:
    """Seed of an episode (number of a chain) -> the measure."""
    rows = result["chains"] if "chains" in result else result["episodes"]
    try:
        return {row["seed" if "seed" in row else "index"]: float(row[measure]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        known = ", ".join(k for k, v in rows[0].items() if isinstance(v, int | float))
        raise ValueError(f"not every episode has a number {measure!r}; they have: {known}") from error


def _stratified_interval(strata: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean over all values, each stratum (N_s,) resampled by itself."""
    rng = np.random.default_rng(seed)
    total = np.zeros(RESAMPLES)
    for values in strata:
        for start in range(0, RESAMPLES, 500):
            chosen = rng.integers(len(values), size=(500, len(values)))
            total[start : start + 500] += values[chosen].sum(axis=1)
    low, high = np.quantile(total / sum(map(len, strata)), (0.025, 0.975))
    return float(low), float(high)


def environment_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What two paired results must share: name and options. Cameras and state are the policy's own affair."""
    environment = result["description"].get("environment", {})
    own = ("cameras", "size", "state_keys", "privileged")
    return {key: value for key, value in environment.items() if key not in own}


def labels(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each result's environment, with its options where one name stands for several."""
    environments = [environment_of(result) for result in results]
    variants: dict[str, set[str]] = {}
    for environment in environments:
        variants.setdefault(environment.get("name", "?"), set()).add(json.dumps(environment, sort_keys=True))
    plain, found = ("name", "horizon", "hold", "group"), []
    for environment in environments:
        name = str(environment.get("name", "?"))
        options = [f"{k} {v}" for k, v in environment.items() if k not in plain]
        found.append(" ".join([name, *options]) if len(variants[environment.get("name", "?")]) > 1 else name)
    return found


class TaskRow(NamedTuple):
    """One task, one group or all: mean and standard deviation (over repeats) of success rates in [0, 1]."""

    name: str
    kind: str
    mean: float
    deviation: float | None
    episodes: int


def table(results: Iterable[Mapping[str, Any]]) -> list[TaskRow]:
    """Success by task, then by group, then over all tasks (each task counts the same).

    Results of one task that start from different seeds are its repeats; the deviation (population, as papers
    quote it) is over them: of a group, over the group's mean in each repeat. Other options of an environment
    make another task; of results that agree in everything (two checkpoints) the first counts.
    """
    rates: dict[str, dict[int, float]] = {}
    groups: dict[str, str] = {}
    counts: dict[str, int] = {}
    results = [r for r in results if r["episodes"] and "name" in r["description"].get("environment", {})]
    for task, result in zip(labels(results), results):
        told, summary = result["description"], result["summary"]
        if (seed := int(told.get("seed", 0))) in rates.get(task, {}):
            continue
        rates.setdefault(task, {})[seed] = summary["rate"]
        groups[task] = str(told["environment"].get("group", ""))
        counts[task] = counts.get(task, 0) + summary["episodes"]
    rows = [_row(task, "task", [task], rates, counts) for task in rates]
    names = [group for group in dict.fromkeys(groups.values()) if group]
    for group in names:
        rows.append(_row(group, "group", [t for t in rates if groups[t] == group], rates, counts))
    if len(rates) > 1:
        rows.append(_row("all tasks", "all", list(rates), rates, counts))
    return rows


def _row(
    name: str, kind: str, tasks: Sequence[str], rates: Mapping[str, Mapping[int, float]], counts: Mapping
) -> TaskRow:
    seeds = set.intersection(*(set(rates[task]) for task in tasks))
    repeats = [float(np.mean([rates[task][seed] for task in tasks])) for seed in sorted(seeds)]
    mean = float(np.mean([np.mean(list(rates[task].values())) for task in tasks]))
    deviation = float(np.std(repeats)) if len(repeats) > 1 else None
    return TaskRow(name, kind, mean, deviation, sum(counts[task] for task in tasks))
