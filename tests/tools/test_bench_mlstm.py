"""``vilma bench-mlstm`` and ``show-mlstm``: right results only, honest labels, lines that follow figures."""

import json
import subprocess
import sys
import types

import pytest
import torch

from vilma.bench import BOTH, FORWARD
from vilma.testing import assert_close, random_mlstm
from vilma.tools import bench_mlstm as tool
from vilma.tools import show_mlstm
from vilma.xlstm import mlstm, operators

TOY = "2,2,40,16,24"


def run(*arguments):
    return tool.main([*arguments, "--rounds", "1", "--device", "cpu", "--quiet"])


def test_table_and_json(capsys, tmp_path):
    file = tmp_path / "results" / "toy.json"
    assert run(TOY, "--no-peers", "--backend", "auto", "torch", "--json", str(file)) == 0
    said = capsys.readouterr().out
    assert "causal attention" in said and "exact" in said and "kept MB" in said
    line = json.loads(said.splitlines()[-1])
    assert [line] == json.loads(file.read_text())
    assert line["sizes"] == [2, 2, 40, 16, 24] and line["dtype"] == "float32" and line["gate"] == "exp"
    assert line["commit"] and line["device"]["versions"]["torch"] == torch.__version__
    assert line["command"].startswith(f"vilma bench-mlstm {TOY} --no-peers")
    assert line["backends"]["torch"] == "mlstm_chunkwise"
    auto, plain, attention = line["results"]
    assert (auto["name"], plain["name"], attention["name"]) == (
        "vilma auto",
        "vilma torch",
        "causal attention",
    )
    assert auto["ours"] and plain["ours"] and not attention["ours"]
    for result in line["results"]:
        assert result[FORWARD]["ms"] > 0 and result[BOTH]["ms"] > 0 and result["kept_bytes"] > 0
    assert set(auto["rms_ratios"]) == {"h", "dq", "dk", "dv", "di", "df"}
    assert all(x <= 1e-5 for x in auto["rms_ratios"].values())


def break_mlstm(monkeypatch, wrong):
    """Make the plain backend wrong in float32 alone; the reference, in float64, stays right."""
    chunkwise = operators.mlstm_chunkwise
    forward, backward = chunkwise.forward, chunkwise.backward

    def broken_forward(q, *rest):
        h, last, saved = forward(q, *rest)
        return (h * 1.001 if wrong == "h" and q.dtype == torch.float32 else h), last, saved

    def broken_backward(grads, q, *rest):
        found = list(backward(grads, q, *rest))
        if wrong == "df" and q.dtype == torch.float32:
            found[4] = found[4] + 1e-3 * found[3]
        return tuple(found)

    monkeypatch.setattr(chunkwise, "forward", broken_forward)
    monkeypatch.setattr(chunkwise, "backward", broken_backward)


@pytest.mark.parametrize("wrong", ["h", "df"])
def test_nothing_is_timed_where_a_result_is_wrong(monkeypatch, capsys, tmp_path, wrong):
    break_mlstm(monkeypatch, wrong)
    monkeypatch.setattr(tool, "measure", lambda *a, **k: pytest.fail("timed"))
    file = tmp_path / "toy.json"
    assert run(TOY, "--no-peers", "--backend", "torch", "--json", str(file)) == 1
    said = capsys.readouterr()
    assert not said.out and not file.exists()
    assert "nothing is timed" in said.err and f"vilma torch {wrong} 1" in said.err


def test_a_result_that_is_not_a_number_is_wrong(monkeypatch, capsys):
    def broken(*given, **_):
        return mlstm(*given) * torch.nan

    monkeypatch.setattr(tool, "our_path", lambda *_: tool.Variant("ours", broken))
    assert run(TOY, "--no-peers") == 1
    assert "ours h nan" in capsys.readouterr().err


def test_gradients_are_named_by_what_they_are():
    """The exact gradient, one without the normaliser's part, and another function."""
    shape = tool.Shape("toy", 1, 2, 40, 16, 24)

    def truncated(q, k, v, i, f):
        h = mlstm(q, k, v, i, f, backend="torch")
        plain = mlstm(q, k, v, i, f, backend="torch", normalize=False)
        factor = (h / plain).detach().nan_to_num()
        return h.detach() + factor * plain - (factor * plain).detach()

    def other(q, k, v, i, f):
        return mlstm(q, k, v, i, f, gate="sigmoid", backend="torch")

    def exact(*given):
        return mlstm(*given, backend="torch")

    for name, cell in (("exact", exact), ("truncated", truncated), ("wrong h", other)):
        variant = tool.Variant(name, cell)
        found = tool._errors_of_peer(variant, shape, torch.device("cpu"), torch.float32, "exp")
        assert tool.gradient_of(found, torch.float32) == name, found
    assert tool.gradient_of({}, torch.float32) == "not checked"


def test_shapes():
    cpu = torch.device("cpu")
    assert tool._shape("vil_tiny_224", None, cpu).sizes == (8, 4, 196, 96, 96)
    assert tool._shape("1,2,3,4", None, cpu).sizes == (1, 2, 3, 4, 4)
    assert tool._shape("1,2,3,4,5", 7, cpu).sizes == (7, 2, 3, 4, 5)
    assert tool._shape("tfla_7b", 1, cpu).sizes == (1, 8, 8192, 256, 512)
    assert tool._shape("tfla_7b", None, torch.device("cuda")).batch == 8
    for wrong in ("vil_tiny", "1,2,3", "1,2,3,4,5,6"):
        with pytest.raises(ValueError, match="known: vil_tiny_224"):
            tool._shape(wrong, None, cpu)
    with pytest.raises(ValueError, match="pass --batch 1"):
        tool._shape("tfla_7b", None, cpu)
    assert "tfla_7b" not in tool._default_shapes(cpu)


def test_chunks_of_a_peer_divide_the_length():
    assert [tool.chunk_near(64, steps) for steps in (196, 784, 4096, 50, 7)] == [49, 56, 64, 50, 7]


@pytest.fixture
def fake_peers(monkeypatch):
    """Packages with the peers' interfaces; what they were called with."""
    calls = []

    def chunkwise(q, k, v, i, f, chunk_size, **options):
        calls.append((chunk_size, options))
        assert q.shape[2] % chunk_size == 0
        return mlstm(q, k, v, i, f, backend="torch")

    def parallel(q, k, v, i, f, **options):
        return mlstm(q, k, v, i, f, backend="torch"), None

    kernels = {
        "chunkwise--native_autograd": chunkwise,
        "chunkwise--triton_xl_chunk": chunkwise,
        "parallel--native_custbw": parallel,
        "parallel--native_siging_custbw": parallel,
    }
    package, torch_part = types.ModuleType("mlstm_kernels"), types.ModuleType("mlstm_kernels.torch")
    torch_part.get_available_mlstm_kernels = lambda: list(kernels)
    torch_part.get_mlstm_kernel = kernels.__getitem__
    torch_part.get_mlstm_sequence_kernel = lambda name: parallel
    monkeypatch.setitem(sys.modules, "mlstm_kernels", package)
    monkeypatch.setitem(sys.modules, "mlstm_kernels.torch", torch_part)
    return calls


def test_every_path_of_a_peer_that_fits_is_measured(fake_peers, capsys):
    assert run("1,1,196,8") == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    peers = [r["name"].removeprefix("mlstm-kernels ") for r in show_mlstm.peers_in(line)]
    assert peers == [
        "chunkwise--native_autograd, chunk 49",
        "chunkwise--native_autograd, chunk 98",
        "parallel--native_custbw",
        "native_sequence__native",
    ]
    assert all(r["gradient"] == "exact" for r in show_mlstm.peers_in(line))
    assert {chunk for chunk, _ in fake_peers} == {49, 98}


def test_on_a_gpu_peers_are_kept_from_head_sizes_they_break_at(fake_peers):
    def names(dim):
        shape = tool.Shape("toy", 1, 1, 196, dim, dim)
        return [p.name for p in tool.peer_paths(shape, torch.device("cuda"), torch.bfloat16, "exp")]

    assert names(96) == []
    assert names(64) == [f"mlstm-kernels chunkwise--triton_xl_chunk, chunk {n}" for n in (64, 128)]


def test_simple_gla_is_given_the_sigmoid_cell(monkeypatch):
    def recurrence(q, k, v, g, scale):
        state, out = 0.0, []
        for t in range(q.shape[1]):
            state = g[:, t].exp()[..., None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
            out.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, t], state))
        return torch.stack(out, 1), state

    for name in ("fla", "fla.ops", "fla.ops.simple_gla"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fla.ops.simple_gla"].chunk_simple_gla = recurrence
    given = random_mlstm(2, 3, 9, 4, 5, dtype=torch.float64)
    h = tool.simple_gla().cell(*map(tool._swap, given)).transpose(1, 2)
    assert_close(h, mlstm(*given, gate="sigmoid"), 1e-12)


def test_wide_heads_stand_beside_attention_of_the_same_width():
    shape = tool.Shape("toy", 1, 2, 8, 128, 256)
    given = random_mlstm(*shape.sizes)
    same, narrow = tool.attention(shape, given)
    assert same.forward().shape == (1, 2, 8, 256) and narrow.forward().shape == (1, 4, 8, 128)


def test_help_says_how_peers_are_found():
    command = [sys.executable, "-m", "vilma.cli", "bench-mlstm", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "PYTHONPATH=PEERS vilma bench-mlstm" in said and "NXAI" in said and "policy_chunk" in said


def line_of(name, ours=(1.0, 2.0), attention=(2.0, 4.0), peers=(), kept=800):
    def result(name, times, **more):
        return {"name": name, FORWARD: {"ms": times[0]}, BOTH: {"ms": times[1]}, **more}

    return {
        **{"shape": name, "sizes": list(tool.SHAPES[name].sizes), "dtype": "float32", "gate": "exp"},
        **{"command": "vilma bench-mlstm", "commit": "abc", "device": {"type": "cpu"}},
        "results": [
            result("vilma auto", ours, ours=True, kept_bytes=kept),
            *(result(f"mlstm-kernels {peer}", times, gradient=grad) for peer, times, grad in peers),
            {"name": "mlstm-kernels broken", "error": "cannot", "gradient": "not checked"},
            result("causal attention", attention),
        ],
    }


def test_lines_over_attention():
    title, figure, target, met = show_mlstm.attention_line("vil_tiny_448", line_of("vil_tiny_448"))
    assert "(8, 4, 784)" in title and figure == "0.500 / 0.500" and target == "<= 0.55 / 0.6" and met
    for times in ((1.2, 2.0), (1.0, 2.5)):
        assert not show_mlstm.attention_line("vil_tiny_448", line_of("vil_tiny_448", times)).met
    assert not show_mlstm.attention_line("vil_tiny_448", None).met


def test_lines_over_peers():
    fast = [("native", (1.5, 2.5), "truncated"), ("autograd", (9.0, 3.2), "exact")]
    every, exact = show_mlstm.peer_lines("long_4096", line_of("long_4096", peers=fast))
    assert every.met and "1.50x" in every.figure and "1.25x" in every.figure and "of 2 paths" in every.figure
    assert exact.met and "1.60x (autograd)" in exact.figure and exact.target == ">= 1.5"
    slow = [("native", (1.5, 1.9), "truncated"), ("autograd", (9.0, 2.9), "exact")]
    every, exact = show_mlstm.peer_lines("long_4096", line_of("long_4096", peers=slow))
    assert not every.met and not exact.met
    (alone,) = show_mlstm.peer_lines("long_4096", line_of("long_4096"))
    assert not alone.met and "no result" in alone.figure
    assert len(list(show_mlstm.peer_lines("vil_tiny_224", line_of("vil_tiny_224", peers=fast)))) == 1


def test_line_of_kept_bytes():
    def line(*kept):
        heads = {"vil_tiny_224": 32, "vil_tiny_448": 32, "long_4096": 4}
        return show_mlstm.kept_line([line_of(name, kept=x * n) for (name, n), x in zip(heads.items(), kept)])

    assert line(196, 784 * 100, 4096 * 105).met and "T = 196: 196 (1 a step)" in line(196, 784, 4096).figure
    assert not line(196, 784 * 100, 4096 * 120).met
    assert not show_mlstm.kept_line([None]).met


def test_committed_results_are_cited(capsys):
    found = show_mlstm.recorded()
    assert set(show_mlstm.ATTENTION) <= set(found)
    for line in found.values():
        assert show_mlstm.peers_in(line) and line["commit"]
    assert show_mlstm.main(["--quick"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("cited: vilma bench-mlstm") and "docs/results/mlstm/" in first
    assert len(lines) == 9 and all(x.startswith("met ") and "(cited)" in x for x in lines)
