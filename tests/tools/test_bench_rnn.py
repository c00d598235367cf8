"""``vilma bench-rnn``: right results only, peers under their own names, loops that compute the cells."""

import json
import sys
import types

import pytest
import torch

from vilma.bench import BOTH, FORWARD
from vilma.tools import bench_rnn as tool
from vilma.xlstm import rnn, rnn_operators
from vilma.xlstm.rnn_naive import CELLS

TOY = "2,2,12,8"


def run(*arguments):
    return tool.main([*arguments, "--rounds", "1", "--device", "cpu", "--quiet"])


def test_table_and_json(capsys, tmp_path):
    file = tmp_path / "results" / "toy.json"
    assert run(TOY, "--json", str(file)) == 0
    said = capsys.readouterr().out
    assert "torch.nn.LSTM" in said and "exact" in said and "kept MB" in said
    line = json.loads(said.splitlines()[-1])
    assert [line] == json.loads(file.read_text())
    assert line["sizes"] == [2, 2, 12, 8] and line["dtype"] == "float32" and line["cell"] == "slstm"
    assert line["commit"] and line["device"]["versions"]["torch"] == torch.__version__
    assert line["command"].startswith(f"vilma bench-rnn {TOY}")
    assert line["backends"]["torch"] == "rnn_torch"
    names = [result["name"] for result in line["results"] if "flashrnn" not in result["name"]]
    assert names == ["vilma auto", "vilma torch", "loop", "lean loop", "torch.nn.LSTM"]
    for result in line["results"]:
        assert result[FORWARD]["ms"] > 0 and result[BOTH]["ms"] > 0 and result["kept_bytes"] > 0
        assert result["ours"] == result["name"].startswith("vilma ")
        if result["ours"] or "loop" in result["name"]:
            assert result["exact"] and set(result["rms_ratios"]) == {"h", "dwx", "dr", "db"}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("row", ["loop", "lean loop"])
def test_the_loops_compute_the_cells(cell, row):
    shape = tool.SHAPES["vil_tiny_224"]
    found = tool.errors_of(tool.our_run(row, cell), shape, cell, torch.device("cpu"), torch.float32)
    assert all(error < 1e-5 for error in found.values())


@pytest.mark.parametrize(
    "cell, layer", [("slstm", "LSTM"), ("lstm", "LSTM"), ("gru", "GRU"), ("elman", "RNN")]
)
def test_layers_beside_it(cell, layer):
    row = tool.layer_of(tool._shape(TOY, 3), cell, "cpu", torch.float32)
    assert row.name == f"torch.nn.{layer}" and row.forward().shape == (3, 12, 16)


@pytest.mark.parametrize("wrong", ["h", "dr"])
def test_refuses_when_a_backend_is_wrong(monkeypatch, capsys, wrong):
    plain = rnn_operators.rnn_torch
    forward, backward = plain.forward, plain.backward

    def broken_forward(wx, *rest):
        h, last, saved = forward(wx, *rest)
        return (h * 1.001 if wrong == "h" and wx.dtype == torch.float32 else h), last, saved

    def broken_backward(grads, wx, *rest):
        dwx, dr, *others = backward(grads, wx, *rest)
        return dwx, dr * 1.001 if wrong == "dr" and wx.dtype == torch.float32 else dr, *others

    monkeypatch.setattr(plain, "forward", broken_forward)
    monkeypatch.setattr(plain, "backward", broken_backward)
    monkeypatch.setattr(tool, "measure", None)  # nothing may be timed
    assert run(TOY, "--backend", "torch") == 1
    assert f"vilma torch {wrong}" in capsys.readouterr().err


def test_flashrnn_beside_it(monkeypatch):
    """Its layout of r, and its error where it has one."""

    def flashrnn(wx, r, b, function, backend, dtype):
        assert backend == "vanilla" and dtype == "float32" and r.shape[0] == len(CELLS[function].r)
        h = rnn(wx, r.permute(1, 3, 0, 2), b, cell=function, backend="naive")
        return h[None], None

    monkeypatch.setitem(sys.modules, "flashrnn", types.SimpleNamespace(flashrnn=flashrnn))
    line = tool.bench(tool._shape(TOY, None), "gru", contenders=("vilma auto", "flashrnn"), rounds=1)
    assert line["results"][1]["name"] == "flashrnn vanilla" and line["results"][1]["exact"]

    def broken(*_, **__):
        raise RuntimeError("no kernel of this shape")

    monkeypatch.setitem(sys.modules, "flashrnn", types.SimpleNamespace(flashrnn=broken))
    line = tool.bench(tool._shape(TOY, None), contenders=("vilma auto", "flashrnn"), rounds=1)
    assert "no kernel of this shape" in line["results"][1]["error"]


def test_unknown_names():
    with pytest.raises(ValueError, match="row 'lean'; known"):
        run(TOY, "--only", "lean")
    with pytest.raises(ValueError, match="shape 'large'; known"):
        run("large")


def test_a_step_after_two_histories(monkeypatch, capsys, tmp_path):
    """The command with a small stack; the long history is prefilled in parts."""
    whole = tool.bench_stack_step
    monkeypatch.setattr(tool, "PREFILL", 4)
    monkeypatch.setattr(tool, "bench_stack_step", lambda *a, **k: whole(*a, width=16, histories=(3, 9), **k))
    file = tmp_path / "steps.json"
    assert run("stack_step", "--batch", "2", "--json", str(file)) == 0
    said = capsys.readouterr().out
    assert "step after 9" in said and "xlstm[7:1]" in said
    line = json.loads(said.splitlines()[-1])
    assert [line] == json.loads(file.read_text())
    assert line["shape"] == "stack_step" and line["sizes"] == [2, 16, 8] and line["commit"]
    assert line["command"].startswith("vilma bench-rnn stack_step")
    assert [(r["name"], r["history"]) for r in line["results"]] == [("step after 3", 3), ("step after 9", 9)]
    assert all(r[FORWARD]["ms"] > 0 and r["rms_ratios"]["y"] < 1e-5 for r in line["results"])


@pytest.mark.parametrize("history", [3, 9])
def test_a_wrong_step_is_not_timed(monkeypatch, history):
    plain = tool.xlstm_stack

    def broken(*arguments, **options):
        stack = plain(*arguments, **options)
        step = stack.step
        stack.step = lambda x_t, state: step(1.01 * x_t, state)
        return stack

    monkeypatch.setattr(tool, "xlstm_stack", broken)
    monkeypatch.setattr(tool, "PREFILL", 4)
    monkeypatch.setattr(tool, "interleave", None)
    with pytest.raises(tool.WrongResult, match=f"the sequence form.*step after {history} y"):
        tool.bench_stack_step(width=16, histories=(history,))
