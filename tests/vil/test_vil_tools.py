"""`vilma bench-vil` and `vilma show-vil`: what they print, and that wrong results are not timed."""

import json

import pytest
import torch

from vilma.bench import BOTH, FORWARD
from vilma.tools import bench_vil, show_vil

CASE = bench_vil.Case(
    "tiny_224", "vil2_tiny_patch16_224", "deit_tiny_patch16_224", 32, 1, {FORWARD: (3.3, 1.8)}, (161.6, 60.0)
)


def result(name, forward, both, kept):
    times = {FORWARD: {"ms": forward}, BOTH: {"ms": both}}
    return {"name": name, **times, "kept_bytes": kept * 2**20 * 8}


def line(ours=(300.0, 900.0, 36.0), peer=(200.0, 600.0, 28.0), case="tiny_224"):
    results = [result("vilma", *ours), result("deit", *peer)]
    device = {"type": "cpu", "device": "a CPU"}
    facts = {"case": case, "batch": 8, "size": 224, "dtype": "float32", "commit": "abc", "file": "f.json"}
    return {**facts, "device": device, "results": results}


def test_bench_prints_rows_and_a_json_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(bench_vil.CASES, "tiny_224", CASE)
    file = tmp_path / "new" / "vil.json"
    assert (
        bench_vil.main(["tiny_224", "--rounds", "1", "--device", "cpu", "--quiet", "--json", str(file)]) == 0
    )
    text = capsys.readouterr().out.splitlines()
    assert "3.3" in text[2] and "<= 1.8" in text[2] and text[0].startswith("tiny_224: batch 1, 32 px")
    printed = json.loads(text[-1])
    assert printed["results"][0]["name"] == CASE.model and printed["error"] < 1e-4
    assert json.loads(file.read_text()) == [printed]
    assert 0.2 < bench_vil.ratio(printed, FORWARD) < 20


def test_bench_does_not_time_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setitem(bench_vil.CASES, "tiny_224", CASE)
    from vilma.vil import mixing_cpu

    right = mixing_cpu.behind
    monkeypatch.setattr(mixing_cpu, "behind", lambda u, w, eps, c, h, y: right(u, w, 1.0, c, h, y))
    assert bench_vil.main(["tiny_224", "--device", "cpu", "--quiet"]) == 1
    assert "nothing is timed" in capsys.readouterr().err


def test_table_of_a_full_line():
    text = "\n".join(bench_vil.table(line()))
    assert "1.50" in text and "161.6 MiB" in text and "36.0 MiB" in text and "37.50 ms" in text


def test_unknown_case_names_the_known():
    with pytest.raises(ValueError, match="tiny_224"):
        bench_vil.main(["huge"])


def test_show_lines_of_speed_and_memory():
    met = show_vil.time_line("tiny_224", FORWARD, line())
    assert met.met and met.figure == "1.50 [f.json at abc]" and "1.8" in met.target and "3.3" in met.target
    assert not show_vil.time_line("tiny_224", FORWARD, line(ours=(400.0, 900.0, 36.0))).met
    assert not show_vil.time_line("tiny_224", BOTH, line(ours=(300.0, 1300.0, 36.0))).met
    assert not show_vil.time_line("tiny_448", FORWARD, None).met
    assert show_vil.kept_line("tiny_224", line()).met
    assert not show_vil.kept_line("tiny_224", line(ours=(1.0, 1.0, 61.0))).met


def test_show_counts():
    lines = list(show_vil.count_lines())
    assert all(one.met for one in lines) and "11" not in lines[0].figure and "1.51" in lines[1].figure


def test_show_names_tests_that_exist():
    for group in show_vil.GROUPS:
        assert (show_vil.ROOT / group.arguments[0]).is_file()
    assert (show_vil.ROOT / show_vil.FOLDER / "timm_suite.py").is_file()
    assert torch.get_num_threads() == 1
