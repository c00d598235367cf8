"""``vilma bench-policy``: the peer is our network, wrong networks are not timed, lines follow the figures."""

import copy
import json

import pytest
import torch

from vilma.bench import FORWARD
from vilma.policies.denoiser import Denoiser
from vilma.testing import assert_close
from vilma.tools import bench_policy as tool

SIZES = {"latent_dim": 24, "goal_dim": 16, "action_dim": 7, "horizon": 10, "dim": 64, "num_blocks": 2}
ENCODER = {"features": 16, "channels": [8, 8, 8], "stride": 4}
TOY = {
    "denoiser": tool.Case(SIZES, {"backbone": "transformer", "num_blocks": 1}),
    "prefix": tool.Case(SIZES, observations=(4, 40)),
    "real": tool.Case(
        transformer={"backbone": "transformer", "ffn_factor": 2.6667},
        recipe="configs/policies/pointmap_real.yaml",
        changes={
            "rgb_encoder": "spatial_softmax",
            "rgb_encoder_options": ENCODER,
            "xyz_encoder": "spatial_softmax",
            "xyz_encoder_options": ENCODER,
            "dim": 32,
            "num_blocks": 2,
        },
    ),
}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(tool, "CASES", TOY)


@pytest.mark.parametrize("backbone", ["xlstm", "transformer"])
def test_the_reference_form_is_the_same_network(backbone):
    torch.manual_seed(0)
    net = Denoiser(num_obs_tokens=4, backbone=backbone, **SIZES).eval()
    for parameter in net.parameters():  # fresh gates are almost constant: make everything count
        torch.nn.init.normal_(parameter, std=0.15)
    obs, goal, x = tool._inputs(SIZES, 4)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
            ours = copy.deepcopy(net).to(dtype)
            plain = tool.in_plain_form(ours)
            given = x.to(dtype), torch.tensor([0.5], dtype=dtype), ours.context(obs.to(dtype), goal.to(dtype))
            assert_close(plain(*given), ours(*given), tolerance)
            assert plain(*given).shape == (1, 10, 7) and ours.stack is not plain.stack


def test_equal_sizes():
    def millions(name, of):
        case = tool.CASES[name]
        with torch.device("meta"):
            net = tool._denoiser({**case.sizes, **(case.transformer if of == "transformer" else {})}, 4)
        return tool._count(net) / 1e6

    assert millions("denoiser", "xlstm") == pytest.approx(34.6, abs=0.05)
    assert millions("denoiser", "transformer") == pytest.approx(36.0, abs=0.1)


def test_tables_lines_and_json(toy, capsys, tmp_path):
    file = tmp_path / "results" / "policy.json"
    tool.main(["--quick", "--json", str(file)])
    said = capsys.readouterr().out
    measured = json.loads(file.read_text())
    assert [line["case"] for line in measured] == list(TOY)
    for line in measured:
        assert line["commit"] and line["device"]["threads"] == 1 and line["errors"]
        assert line["command"] == f"vilma bench-policy --quick --json {file}"
        assert all(result[FORWARD]["rounds"] == 2 for result in line["results"])
        for name in tool.times(line):
            assert name in said
    assert set(tool.times(measured[0])) == {
        tool.OURS,
        tool.REFERENCE,
        tool.TRANSFORMER,
        tool.PLAIN_TRANSFORMER,
    }
    sizes = measured[2]["parameters"]
    assert sizes[tool.TRANSFORMER] == pytest.approx(sizes[tool.OURS], rel=0.02)
    lines = list(tool.lines(measured))
    assert len(lines) == 4 and all(line.name in said and line.figure in said for line in lines)


def measured(case, **times):
    return {"case": case, "results": [{"name": name, FORWARD: {"ms": ms}} for name, ms in times.items()]}


@pytest.mark.parametrize("ours, reference, met", [(10.0, 13.1, True), (10.0, 12.9, False)])
def test_speed_is_judged(ours, reference, met):
    times = {tool.OURS: ours, tool.REFERENCE: reference, tool.PLAIN_TRANSFORMER: reference / 0.91}
    speed, ratio = tool.lines([measured("denoiser", **times)])
    assert speed.met is met and speed.figure.startswith(f"{reference / ours:.2f}")
    assert ratio.met and ratio.figure == "0.91"


@pytest.mark.parametrize("ratio, met", [(0.76, False), (0.78, True), (1.04, True), (1.06, False)])
def test_a_crippled_or_improved_peer_is_told(ratio, met):
    times = {tool.OURS: 1.0, tool.REFERENCE: 10 * ratio, tool.PLAIN_TRANSFORMER: 10.0}
    assert [line.met for line in tool.lines([measured("denoiser", **times)])][1] is met


def test_nothing_is_timed_where_a_network_is_wrong(toy, monkeypatch, capsys):
    plain = tool._plain_mlstm
    monkeypatch.setattr(tool, "_plain_mlstm", lambda layer, x: plain(layer, x) * 1.01)
    monkeypatch.setattr(tool, "interleave", lambda *a, **k: pytest.fail("timed"))
    assert tool.main(["denoiser"]) == 1
    said = capsys.readouterr()
    assert not said.out and "nothing is timed: xlstm" in said.err


def test_unknown_case():
    with pytest.raises(ValueError, match="'gpu' is not known; choose of denoiser, prefix, real, calvin"):
        tool.main(["gpu"])
