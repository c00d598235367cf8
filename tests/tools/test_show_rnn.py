"""``vilma show-rnn``: lines that follow the figures, groups that hold tests, results that are cited."""

import itertools
import json
import math

import pytest

from vilma.bench import BOTH, FORWARD
from vilma.tools import bench_rnn, show_rnn

FAST = {"vilma auto": (1.0, 1.0), "vilma torch": (3.0, 3.0), "torch.nn.LSTM": (9.0, 2.0)}
SLOW = {"loop": (9.0, 90.0), "lean loop": (3.0, 6.0)}


def result(name, forward, both=math.nan):
    return {"name": name, FORWARD: {"ms": forward}, BOTH: {"ms": both}}


def line(name, backends=("rnn_cpu", "rnn_torch"), **times):
    rows = FAST | SLOW | {key.replace("_", " "): value for key, value in times.items()}
    return {
        **{"shape": name, "cell": "slstm", "dtype": "float32", "device": {"type": "cpu"}},
        **{"backends": dict(zip(("auto", "torch"), backends)), "command": "vilma bench-rnn", "commit": "abc"},
        "results": [
            *(result(row, *took) for row, took in rows.items()),
            {"name": "flashrnn broken", "error": "cannot"},
        ],
    }


def steps(short, long):
    rows = [result(f"step after {n}", ms) for n, ms in zip(bench_rnn.HISTORIES, (short, long))]
    return line(bench_rnn.STACK_STEP) | {"cell": "xlstm[7:1]", "results": rows}


def target(slow, fast, shape="vil_tiny_224"):
    return next(x for x in show_rnn.TARGETS if (x.slow[0], x.fast, x.shape) == (slow, fast, shape))


def test_lines_over_the_public_loop():
    short, long = (target("loop", "vilma auto", name) for name in show_rnn.TIMED)
    found = show_rnn.ratio_line(short, line("vil_tiny_224"))
    assert found.met and found.figure == "9.00x / 90.00x the fastest of loop"
    assert found.target == ">= 4.5x / 12x" and "(8, 4, 196, 96)" in found.name
    assert show_rnn.ratio_line(long, line("vil_tiny_448")).target == ">= 5x / 40x"
    assert not show_rnn.ratio_line(long, line("vil_tiny_448", loop=(9.0, 39.0))).met
    assert not show_rnn.ratio_line(short, line("vil_tiny_224", loop=(4.4, 90.0))).met
    # flashrnn's own, where it is faster
    found = show_rnn.ratio_line(short, line("vil_tiny_224", flashrnn_vanilla=(4.0, 99.0)))
    assert not found.met and found.figure == "4.00x / 90.00x the fastest of loop and flashrnn vanilla"


def test_lines_over_the_lean_loop():
    compiled, plain = target("lean loop", "vilma auto"), target("lean loop", "vilma torch")
    assert show_rnn.ratio_line(compiled, line("vil_tiny_224")).met
    assert not show_rnn.ratio_line(compiled, line("vil_tiny_224", lean_loop=(1.7, 6.0))).met
    assert not show_rnn.ratio_line(compiled, line("vil_tiny_224", lean_loop=(3.0, 5.9))).met
    found = show_rnn.ratio_line(plain, line("vil_tiny_224"))
    assert found.met and found.figure == "1.00x / 2.00x" and found.target == ">= 1x / 2x"
    assert not show_rnn.ratio_line(plain, line("vil_tiny_224", lean_loop=(2.9, 6.0))).met


def test_what_ran_is_looked_at():
    found = show_rnn.ratio_line(target("loop", "vilma auto"), line("vil_tiny_224", ("rnn_torch",) * 2))
    assert not found.met and found.figure == "vilma auto ran rnn_torch, not rnn_cpu"


def test_line_over_the_layer():
    found = show_rnn.layer_line("vil_tiny_224", line("vil_tiny_224"))
    assert found.met and found.figure == "0.50" and found.target == "<= 0.75"
    rows = line("vil_tiny_224")
    rows["results"][2][BOTH]["ms"] = 1.3
    assert not show_rnn.layer_line("vil_tiny_224", rows).met


def test_line_of_a_step():
    found = show_rnn.step_line(steps(10.0, 10.5))
    assert found.met and found.figure == "1.050 (10.5 ms / 10.0 ms)"
    assert not show_rnn.step_line(steps(10.0, 11.5)).met


def test_without_results_nothing_is_met(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(show_rnn, "RESULTS", tmp_path)
    assert show_rnn.main(["--quick"]) == 1
    said = capsys.readouterr().out
    assert said.count("MISSED") == said.count("no result under docs/results/rnn") == said.count("\n") == 9


def test_only_float32_of_a_cpu_is_cited(monkeypatch, tmp_path):
    monkeypatch.setattr(show_rnn, "ROOT", tmp_path)
    monkeypatch.setattr(show_rnn, "RESULTS", tmp_path)
    other = [
        line("dense_384") | {"dtype": "bfloat16"},
        line("policy_chunk") | {"device": {"type": "cuda"}},
        line("dense_768") | {"cell": "gru"},
    ]
    (tmp_path / "all.json").write_text(json.dumps([line("vil_tiny_224"), steps(1.0, 1.0), *other]))
    found = show_rnn.recorded()
    assert set(found) == {"vil_tiny_224", "stack_step"}
    cited = show_rnn.step_line(found["stack_step"]).figure
    assert cited.endswith("; cited: vilma bench-rnn at abc (all.json)")


def test_groups_name_files_and_tests_that_exist():
    for group in show_rnn.GROUPS:
        files = list(itertools.takewhile(lambda x: x != "-k", group.arguments))
        assert files and all((show_rnn.ROOT / file).is_file() for file in files)


committed = pytest.mark.skipif(
    not any(show_rnn.RESULTS.glob("*.json")),
    reason="no result under docs/results/rnn: write one with vilma bench-rnn --json on a quiet machine",
)


@committed
@pytest.mark.parametrize("name", [*show_rnn.TIMED, bench_rnn.STACK_STEP])
def test_committed_results(name):
    found = show_rnn.recorded()[name]
    assert found["commit"] and found["command"].startswith("vilma bench-rnn")


@committed
def test_committed_results_are_cited(capsys):
    assert show_rnn.main(["--quick"]) == 0
    said = capsys.readouterr().out
    assert said.count("cited: vilma bench-rnn") == said.count("\n") == 9 and "MISSED" not in said
