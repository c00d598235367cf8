"""Intervals against exact values and by their coverage; tables and comparisons of made-up results."""

import json
import math
from itertools import product

import numpy as np
import pytest

from vilma.chains import summarize_chains
from vilma.evaluation import summarize
from vilma.report import write_report
from vilma.summaries import compare, environment_of, mcnemar, paired_interval, table
from vilma.tools import compare as tool


def result(name, outcomes, seed=500_000, measure="success", **description):
    episodes = [{"index": i, "seed": seed + i, measure: x} for i, x in enumerate(outcomes)]
    environment = {"name": name, **description.pop("environment", {})}
    rate = sum(outcomes) / len(outcomes)
    return {
        "description": {"environment": environment, "seed": seed, **description},
        "planned": len(outcomes),
        "summary": {"rate": rate, "episodes": len(outcomes)},
        "incidents": [],
        "episodes": episodes,
    }


def chain_result(lengths):
    """As `vilma.chains` writes it."""
    return {
        "description": {"environment": {"name": "calvin/D"}, "seed": 0},
        "planned": len(lengths),
        "summary": summarize_chains([chain(i, n) for i, n in enumerate(lengths)]),
        "incidents": [],
        "chains": [chain(i, n) for i, n in enumerate(lengths)],
    }


def chain(index, solved):
    tasks, steps = ["a", "b", "c", "d", "e"], [9] * min(solved + 1, 5)
    told = {"tasks": tasks, "solved": solved, "steps": steps}
    return {"index": index, **told, "outcome": "finished", "seconds": 1.0}


def test_the_paired_interval_covers():
    """By enumeration: 30 pairs, correlated policies, all outcomes weighted by their probability."""
    chances = {(1, 1): 0.45, (1, 0): 0.25, (0, 1): 0.1, (0, 0): 0.2}
    truth, pairs, covered, total = 0.15, 30, 0.0, 0.0
    for both, only_a in product(range(pairs + 1), repeat=2):
        for only_b in range(pairs + 1 - both - only_a):
            neither = pairs - both - only_a - only_b
            if neither < 0:
                continue
            log = math.lgamma(pairs + 1) - sum(math.lgamma(n + 1) for n in (both, only_a, only_b, neither))
            log += sum(n * math.log(p) for n, p in zip((both, only_a, only_b, neither), chances.values()))
            low, high = paired_interval(only_a, only_b, pairs, both)
            covered += math.exp(log) * (low <= truth <= high)
            total += math.exp(log)
    assert total == pytest.approx(1, abs=1e-9) and 0.94 < covered < 0.98


def test_the_paired_interval_mirrors_and_narrows_with_agreement():
    low, high = paired_interval(12, 3, 50, 20)
    assert paired_interval(3, 12, 50, 20) == pytest.approx((-high, -low))
    assert low < 9 / 50 < high
    narrow = paired_interval(2, 1, 50, 25)
    wide = paired_interval(20, 19, 50, 7)
    assert narrow[1] - narrow[0] < 0.6 * (wide[1] - wide[0])
    low, high = paired_interval(0, 0, 50, 50)
    assert low < 0 < high and high - low < 0.2
    with pytest.raises(ValueError, match="of 5 episodes"):
        paired_interval(3, 3, 5, 0)


def test_mcnemar_is_the_binomial_tail():
    assert mcnemar(0, 0) == 1 and mcnemar(5, 5) == 1
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 2**8)


def test_comparisons_pair_by_seed():
    a = result("x/A", [1, 1, 0, 1], environment={"cameras": ["left"]})
    b = result("x/A", [0, 1, 0], seed=500_001, environment={"cameras": ["right"]})
    found = compare([(a, b)])
    # Seeds 500001..3: A 1 0 1, B 0 1 0.
    assert (found.pairs, found.only_a, found.only_b) == (3, 2, 1)
    assert found.value == pytest.approx(1 / 3) and found.interval[0] < 1 / 3 < found.interval[1]
    with pytest.raises(ValueError, match="no episode in common"):
        compare([(a, result("x/A", [1], seed=9))])
    with pytest.raises(ValueError, match="different environments"):
        compare([(a, result("x/B", [1, 1]))])
    assert environment_of(a) == {"name": "x/A"}


def test_several_tasks_are_resampled_within_each():
    # Within each task the difference is the same in every episode: nothing is left to resample.
    a = [result("x/A", [1] * 20), result("x/B", [0] * 20)]
    b = [result("x/A", [0] * 20), result("x/B", [0] * 20)]
    found = compare(list(zip(a, b)))
    assert found.value == 0.5 and found.interval == (0.5, 0.5)
    rng = np.random.default_rng(0)
    chains = [chain_result(rng.integers(0, 6, 300).tolist()) for _ in range(2)]
    found = compare([tuple(chains)], "solved")
    assert found.interval[0] < found.value < found.interval[1]
    assert found.interval[1] - found.interval[0] == pytest.approx(
        2 * 1.96 * 1.71 * math.sqrt(2 / 300), rel=0.1
    )


def test_the_table_averages_tasks_groups_and_repeats():
    group = {"environment": {"group": "drawers"}}
    results = [
        result("r/Open", [1, 1, 0, 0], 0, **{"environment": {"group": "drawers"}}),
        result("r/Open", [1, 1, 1, 1], 100, **{"environment": {"group": "drawers"}}),
        result("r/Close", [0, 0, 0, 0], 0, **{"environment": {"group": "drawers"}}),
        result("r/Close", [1, 1, 0, 0], 100, **group),
        result("r/Turn", [1, 1, 1, 1], 0, environment={"group": "knobs"}),
        result("r/Turn", [1, 1, 1, 1], 100, environment={"group": "knobs"}),
    ]
    rows = {(row.kind, row.name): row for row in table(results)}
    assert rows["task", "r/Open"].mean == 0.75 and rows["task", "r/Open"].deviation == 0.25
    # Repeats of the group: (0.5 + 0) / 2 and (1 + 0.5) / 2.
    assert rows["group", "drawers"].mean == 0.5 and rows["group", "drawers"].deviation == 0.25
    assert rows["all", "all tasks"].mean == pytest.approx(2 / 3)
    assert rows["all", "all tasks"].episodes == 24
    (alone,) = table([result("r/Open", [1, 0])])
    assert alone.deviation is None
    wide = result("r/Open", [0, 0], environment={"placement": 0.12})
    rows = table([result("r/Open", [1, 1]), result("r/Open", [0, 1]), wide])
    assert [(row.name, row.mean, row.episodes) for row in rows[:2]] == [
        ("r/Open", 1.0, 2),  # the first of two that agree in everything
        ("r/Open placement 0.12", 0.0, 2),
    ]


def test_the_command_pairs_runs_and_files(tmp_path, capsys):
    for run, outcomes in (("a", ([1] * 9 + [0], [1] * 10)), ("b", ([1] * 5 + [0] * 5, [0] * 10))):
        (tmp_path / run / "eval").mkdir(parents=True)
        for name, values in zip(("x/A", "x/B"), outcomes):
            file = tmp_path / run / "eval" / f"{name[2:]}.json"
            file.write_text(json.dumps(result(name, values)))
    (tmp_path / "a" / "eval" / "blank.json").write_text(json.dumps(result("x/A", [0] * 10, blank=["depth"])))
    out = tmp_path / "figures" / "ab.json"
    assert tool.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "10 pairs  A 90.0 %  B 50.0 %  difference +40.0 [" in lines[1] and "only A 4, B 0" in lines[1]
    assert lines[3].startswith("all") and "20 pairs  A 95.0 %  B 25.0 %  difference +70.0" in lines[3]
    assert json.loads(out.read_text())["x/A"]["only_a"] == 4
    files = [str(tmp_path / "a" / "eval" / name) for name in ("A.json", "blank.json")]
    assert tool.main(files) == 0, "a blanked policy beside itself"
    assert "difference +90.0" in capsys.readouterr().out
    for run, lengths in (("a", [5, 4, 3, 5]), ("b", [5, 1, 3, 2])):
        (tmp_path / run / "eval" / "calvin_D.json").write_text(json.dumps(chain_result(lengths)))
    files = [str(tmp_path / run / "eval" / "calvin_D.json") for run in "ab"]
    assert tool.main(files) == 0
    out = capsys.readouterr().out
    assert "4 pairs  A 4.25  B 2.75  difference +1.50 [" in out and "further A 2, B 0" in out
    with pytest.raises(ValueError, match="not every episode has a number 'joy'; they have: index, solved"):
        tool.main([*files, "--measure", "joy"])
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="no results at"):
        tool.main([str(tmp_path / "a"), str(tmp_path / "c")])
    (tmp_path / "c" / "z.json").write_text(json.dumps(result("x/Z", [1])))
    with pytest.raises(ValueError, match=r"has calvin/D, x/A, x/B; .* has x/Z"):
        tool.main([str(tmp_path / "a"), str(tmp_path / "c")])


def test_the_page_shows_groups_and_chains(tmp_path):
    folder = tmp_path / "run" / "eval"
    folder.mkdir(parents=True)
    (folder / "calvin_D.json").write_text(json.dumps(chain_result([5, 4, 3, 0])))
    page = write_report(tmp_path / "run").read_text()
    assert "3.00 [" in page and "75.0 [" in page and "4 of 4" in page and "<p>calvin/D</p>" in page
    for seed in (500_000, 501_000):
        for task, outcomes in (("Open", [1, 1, 0, 0]), ("Close", [1, 0, 0, 0])):
            made = result(f"robocasa/{task}", outcomes, seed, environment={"group": "drawers"})
            made["summary"] = summarize([{**e, "outcome": "failure", "steps": 1} for e in made["episodes"]])
            made["episodes"] = [{**e, "outcome": "failure", "steps": 1} for e in made["episodes"]]
            (folder / f"{task}_{seed}.json").write_text(json.dumps(made))
    page = write_report(tmp_path / "run").read_text()
    assert "<strong>drawers</strong></td><td>37.5&thinsp;%</td><td>± 0.0</td><td>16</td>" in page
    assert "Chains of instructions" in page and "cannot be read" not in page
