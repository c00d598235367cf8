"""``vilma eval calvin/D``: checkpoints, names of results, shares of processes, what it refuses."""

import json
import sys
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest

from vilma import config, policies
from vilma.envs.calvin_protocol import INSTRUCTIONS, chains, dump_chains
from vilma.tools import eval as tool

gymnasium = pytest.importorskip("gymnasium")
cloudpickle.register_pickle_by_value(sys.modules[__name__])

INSTRUCTION = dict(INSTRUCTIONS)


class Table(gymnasium.Env):
    """Solves a task at its second step when told to push right; chain i solves i % 3 of them."""

    def __init__(self, name, cameras, size, renderer="auto", source=None, chains=None):
        self.cameras, self.size = cameras, size
        self.action_space = gymnasium.spaces.Box(-1, 1, (7,), np.float32)
        self.render_cameras = True

    def reset(self, *, seed=None, options=None):
        self.chain, self.number, self.steps = seed, 0, 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        solved = bool(self.number < self.chain % 3 and self.steps == 2 and action[0] > 0)
        if solved:
            self.number, self.steps = self.number + 1, 0
        return self.observe(), float(solved), False, self.steps == 4, {"success": False}

    def observe(self):
        side = {"static": 200, "gripper": 84}
        sizes = {camera: self.size or side[camera] for camera in self.cameras}
        seen = {f"observation.images.{c}": np.full((3, n, n), 200, np.uint8) for c, n in sizes.items()}
        return seen | {"task": "go", "observation.state": np.zeros(15, np.float32)}


class Follower:
    observation_keys = ("observation.images.static",)

    def __init__(self, sizes=None):
        self.config = SimpleNamespace(
            type="follower",
            cameras=("static", "gripper"),
            image_size=sizes or {"static": (200, 200), "gripper": (84, 84)},
        )
        self.sizes = set()

    def check_compatible(self, source, name="the data"):
        assert source == {"reference_frame": "world", "action_kind": "delta", "state_dim": 15}

    def reset(self, rows=None):
        pass

    def needs_observation(self, n):
        return [True] * n

    def select_action(self, obs):
        self.sizes.add(tuple(obs[f"observation.images.{c}"].shape[-1] for c in self.config.cameras))
        actions = np.zeros((len(obs["task"]), 7), np.float32)
        actions[:, 0] = obs["observation.images.static"].mean((1, 2, 3))
        return np.sign(actions)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(tool.envs, "make", Table)
    path = tmp_path / "run"
    for name in ("last", "best"):
        (path / "checkpoints" / name).mkdir(parents=True)
        (path / "checkpoints" / name / "model.safetensors").write_bytes(name.encode())
    policy, loaded = Follower(), []
    monkeypatch.setattr(policies, "load_policy", lambda p, device="cpu": loaded.append(p.name) or policy)
    return SimpleNamespace(path=path, policy=policy, loaded=loaded)


def evaluate(run, *arguments, sequences="6"):
    return tool.main(["calvin/D", str(run.path), "--sequences", sequences, *arguments])


def read(run, name="calvin_D.json"):
    return json.loads((run.path / "eval" / name).read_text())


def test_last_and_best_are_both_reported(run, capsys):
    assert evaluate(run) == 0
    assert run.loaded == ["last", "best"]
    for name in ("calvin_D.json", "calvin_D_best.json"):
        result = read(run, name)
        assert [chain["solved"] for chain in result["chains"]] == [0, 1, 2, 0, 1, 2]
        assert [tuple(chain["tasks"]) for chain in result["chains"]] == [c.tasks for c in chains(6)]
        assert result["description"]["environment"]["subtask_steps"] == 360
    out = capsys.readouterr().out
    assert "checkpoint best: 6 chains" in out and "mean length: 1.000" in out and "1 in a row:  66.7%" in out
    assert run.policy.sizes == {(200, 84)}
    evaluate(run)
    assert capsys.readouterr().out.count("reused") == 2


def test_equal_checkpoints_are_evaluated_once(run, capsys):
    (run.path / "checkpoints" / "best" / "model.safetensors").write_bytes(b"last")
    evaluate(run)
    assert "best is the same checkpoint as last" in capsys.readouterr().out
    assert not (run.path / "eval" / "calvin_D_best.json").exists()


def test_processes_share_the_chains(run, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    evaluate(run, "--checkpoint", "last")
    assert "3 of 6 chains are" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    evaluate(run, "--checkpoint", "last")
    assert [chain["index"] for chain in read(run)["chains"]] == list(range(6))


def test_options_name_the_result_but_not_the_place_of_the_simulator(run, tmp_path):
    other = tmp_path / "mine.json"
    other.write_text(dump_chains(chains(9)[5:]))
    evaluate(
        run,
        *("--checkpoint", "last", "--env.source", "/somewhere", "--env.chains", str(other)),
        *("--blank", "images", "--seed", "3"),
        sequences="4",
    )
    result = read(run, "calvin_D_chains-mine_seed-3_blank-images.json")
    assert [tuple(chain["tasks"]) for chain in result["chains"]] == [c.tasks for c in chains(9)[5:]]
    assert all(chain["solved"] == 0 for chain in result["chains"])
    assert "source" not in result["description"]["environment"]


def test_what_is_refused_says_why(run):
    with pytest.raises(ValueError, match="unknown option --sequence"):
        evaluate(run, "--sequence", "3")
    with pytest.raises(ValueError, match="the protocol has 1 to 1000"):
        evaluate(run, sequences="1001")
    with pytest.raises(ValueError, match="--films names chain 9, there are 0 to 5"):
        evaluate(run, "--films", "2,9")
    with pytest.raises(ValueError, match=r"unknown task 'calvin/E'"):
        tool.main(["calvin/E", str(run.path)])
    with pytest.raises(ValueError, match="renderer is 'fast'"):
        evaluate(run, "--env.renderer", "fast")
    config.dump({"data": {"state_keys": ["robot0_eef_pos"]}}, run.path / "config.yaml")
    run.policy.observation_keys = ("observation.images.static", "observation.state")
    with pytest.raises(ValueError, match="CALVIN's evaluation gives robot_obs"):
        evaluate(run)


def test_a_run_without_best_says_so(run, capsys):
    (run.path / "checkpoints" / "best" / "model.safetensors").unlink()
    (run.path / "checkpoints" / "best").rmdir()
    evaluate(run)
    assert "no checkpoint 'best': only last is evaluated" in capsys.readouterr().err


def test_a_file_of_ones_own_holds_one_checkpoint(run, tmp_path):
    evaluate(run, "--out", str(tmp_path / "mine.json"))
    results = [json.loads((tmp_path / name).read_text()) for name in ("mine.json", "mine_best.json")]
    hashes = {result["description"]["policy"]["checkpoint"] for result in results}
    assert len(hashes) == 2 and all(len(result["chains"]) == 6 for result in results)


def test_more_chains_can_be_played_later(run, capsys):
    evaluate(run, "--checkpoint", "last", sequences="3")
    evaluate(run, "--checkpoint", "last", "--films", "1,4", sequences="12")
    assert [chain["index"] for chain in read(run)["chains"]] == list(range(12))
    out = capsys.readouterr().out
    assert "not filmed, since they were played before: chains 1;" in out
    assert (run.path / "eval" / read(run)["chains"][4]["video"]).is_file()


def test_every_spelling_of_the_command_is_the_protocol(run):
    tool.main(["--sequences", "3", "--checkpoint", "last", "calvin/D", str(run.path)])
    assert len(read(run)["chains"]) == 3
    with pytest.raises(ValueError, match="calvin is four scenes"):
        tool.main(["calvin", str(run.path)])
