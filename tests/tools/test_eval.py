"""``vilma eval``: what it evaluates, where the result goes, and what it refuses."""

import json
import re
import socket
import sys
import threading
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest

from vilma import config, policies
from vilma.evaluation import read_result
from vilma.report import read_timings
from vilma.serving import PolicyServer
from vilma.tools import eval as tool

gymnasium = pytest.importorskip("gymnasium")
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Line(gymnasium.Env):
    """Succeeds at step 3 if it was pushed to the right; pushes are what the picture says."""

    def __init__(self, name, cameras, size, seed, placement=0.03, state_keys=("place",)):
        self.cameras, self.size, self.keys = cameras, size, state_keys
        self.action_space = gymnasium.spaces.Box(-1, 1, (7,), np.float32)
        self.render_cameras = True
        if placement > 1:
            raise ValueError(f"placement {placement} is off the table")

    def reset(self, *, seed=None, options=None):
        self.steps, self.place = 0, 0.0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.place += action[0]
        return self.observe(), 0.0, self.place > 2.5, self.steps == 4, {"success": bool(self.place > 2.5)}

    def observe(self):
        shape = (self.size, self.size)
        seen = {f"observation.images.{c}": np.full((3, *shape), 255, np.uint8) for c in self.cameras}
        seen |= {f"observation.depth.{c}": np.ones(shape, np.float32) for c in self.cameras}
        return seen | {"observation.state": np.zeros(len(self.keys), np.float32), "task": "go right"}


class Follower:
    """Pushes to the right when it sees white."""

    def __init__(self, image_size=None, reference_frame="world"):
        self.config = SimpleNamespace(type="follower", cameras=("front",), image_size=image_size or {})
        self.reference_frame = reference_frame
        self.shapes = set()

    def check_compatible(self, source, name="the data"):
        assert source == {"reference_frame": "world", "action_kind": "delta"}
        if source["reference_frame"] != self.reference_frame:
            raise ValueError(f"{name} does not fit the policy: reference_frame")

    def reset(self, rows=None):
        pass

    observation_keys = ("observation.images.front", "observation.state")

    def needs_observation(self, n):
        return [True] * n

    def select_action(self, obs):
        images, state = obs["observation.images.front"], obs["observation.state"]
        self.shapes.add((images.shape[1:], state.shape[1]))
        actions = np.zeros((len(images), 7), np.float32)
        actions[:, 0] = images.mean((1, 2, 3)) / 255
        return actions


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory with a checkpoint, and a policy that is loaded from it."""
    monkeypatch.setattr(tool.envs, "make", Line)
    run = tmp_path / "run"
    for name in ("last", "best"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "model.safetensors").write_bytes(name.encode())
    policy, loaded = Follower(), []
    monkeypatch.setattr(policies, "load_policy", lambda path, device="cpu": loaded.append(path) or policy)
    return SimpleNamespace(path=run, policy=policy, loaded=loaded)


def evaluate(run, *arguments, episodes="3"):
    return tool.main(["robosuite/Lift", str(run), "--episodes", episodes, "--videos", "0", *arguments])


def test_a_run_is_evaluated_reported_and_reused(run, capsys):
    assert evaluate(run.path) == 0
    result = read_result(run.path / "eval" / "robosuite_Lift.json")
    assert [e["seed"] for e in result["episodes"]] == [500000, 500001, 500002]
    assert result["summary"]["successes"] == 3
    environment = result["description"]["environment"]
    assert (environment["name"], environment["horizon"], environment["hold"]) == ("robosuite/Lift", 150, 5)
    assert len(result["description"]["policy"]["checkpoint"]) == 16
    assert run.policy.shapes == {((3, 84, 84), 1)}
    out = capsys.readouterr().out
    assert "robosuite/Lift: 3/3 = 100.0% (95 % interval 43.9% to 100.0%)" in out and "written to" in out
    timings = read_timings(run.path)
    (phase,) = timings
    assert phase == "evaluate robosuite_Lift" and timings[phase]["seconds"] > 0
    assert timings[phase]["command"].startswith("vilma eval robosuite/Lift ")
    evaluate(run.path)
    assert "reused" in capsys.readouterr().out and read_timings(run.path) == timings


def test_a_blanked_policy_has_a_result_of_its_own(run, capsys):
    evaluate(run.path, "--blank", "images,depth")
    result = read_result(run.path / "eval" / "robosuite_Lift_blank-images-depth.json")
    assert result["summary"]["successes"] == 0 and result["description"]["blank"] == ["images", "depth"]
    assert "with images and depth blanked: 0/3 = 0.0%" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot blank"):
        evaluate(run.path, "--blank", "sound")


def test_options_of_the_environment_reach_it_and_name_the_result(run):
    evaluate(run.path, "--placement", "0.12", "--seed", "7", "--checkpoint", "best")
    result = read_result(run.path / "eval" / "robosuite_Lift_placement-0.12_seed-7_best.json")
    assert result["description"]["environment"]["placement"] == 0.12
    assert run.loaded == [run.path / "checkpoints" / "best"]
    evaluate(run.path, "--env.placement", "0.12")
    assert (run.path / "eval" / "robosuite_Lift_placement-0.12.json").exists()
    evaluate(run.path / "checkpoints" / "best")
    assert (run.path / "eval" / "robosuite_Lift_best.json").exists()
    with pytest.raises(ValueError, match="placement 3 is off the table"):
        evaluate(run.path, "--env.placement", "3")
    with pytest.raises(ValueError, match="unknown option --placemnt"):
        evaluate(run.path, "--placemnt", "0.12")


def test_the_state_is_made_of_what_the_run_was_trained_on(run):
    config.dump({"data": {"state_keys": ["a", "b", "c"]}}, run.path / "config.yaml")
    evaluate(run.path, episodes="1")
    assert run.policy.shapes == {((3, 84, 84), 3)}


def test_image_sizes_follow_the_policy(run):
    run.policy.config.image_size = {"front": (32, 32)}
    evaluate(run.path, episodes="1")
    assert run.policy.shapes == {((3, 32, 32), 1)}
    with pytest.raises(ValueError, match="expects images of 32 x 32"):
        evaluate(run.path, "--size", "64", "--out", str(run.path / "x.json"))
    run.policy.config.image_size = {"front": (32, 32), "side": (16, 16)}
    with pytest.raises(ValueError, match="one square size"):
        evaluate(run.path)


def test_a_served_run_gives_the_file_that_the_run_itself_gives(run, tmp_path, monkeypatch, capsys):
    evaluate(run.path, "--seed", "7")
    own = read_result(run.path / "eval" / "robosuite_Lift_seed-7.json")
    monkeypatch.chdir(tmp_path)
    facts = tool.policy_facts(run.policy, run.path / "checkpoints" / "last", run.path)
    server = PolicyServer(run.policy, facts)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    run.loaded.clear()
    assert evaluate(server.address, "--seed", "7") == 0
    assert run.loaded == [], "the simulator's side loads no policy"
    served = read_result(tmp_path / "eval" / "robosuite_Lift_seed-7.json")
    assert served["description"] == own["description"]
    assert [e["return"] for e in served["episodes"]] == [e["return"] for e in own["episodes"]]
    run.policy.reference_frame = "base"
    with pytest.raises(ValueError, match="reference_frame"):
        evaluate(server.address)
    server.close()
    thread.join(5)


def test_a_suite_with_repeats_ends_in_a_table(run, capsys):
    assert tool.main(["robosuite", str(run.path), "--episodes", "2", "--videos", "0", "--repeats", "2"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"robosuite/Lift +100.0 % \+- +0.0  \(4 episodes\)", out), out
    assert re.search(r"ALL TASKS +100.0 % \+- +0.0  \(12 episodes\)", out), out
    names = {p.name for p in (run.path / "eval").iterdir()}
    assert names == {
        f"robosuite_{t}{s}.json" for t in ("Lift", "Stack", "PickPlaceCan") for s in ("", "_seed-501000")
    }
    with pytest.raises(ValueError, match="--out names one file"):
        evaluate(run.path, "--repeats", "2", "--out", "x.json")


@pytest.mark.parametrize("file", ["model.safetensors", "config.yaml", "stats.json"])
def test_a_changed_policy_does_not_reuse_old_results(run, file):
    evaluate(run.path, episodes="1")
    (run.path / "checkpoints" / "last" / file).write_bytes(b"trained on")
    with pytest.raises(ValueError, match=r"another evaluation \(policy: .*overwrite"):
        evaluate(run.path, episodes="1")
    assert evaluate(run.path, "--overwrite", episodes="1") == 0


def test_what_is_not_a_policy_says_so(run, tmp_path):
    run.policy.reference_frame = "base"
    with pytest.raises(ValueError, match="reference_frame"):
        evaluate(run.path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(RuntimeError, match=f"no policy server answers at localhost:{port}"):
        evaluate(f"localhost:{port}")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'step9' \(it has: best, last\)"):
        evaluate(run.path, "--checkpoint", "step9")
    with pytest.raises(FileNotFoundError, match="no policy at"):
        evaluate(tmp_path / "nothing")
    with pytest.raises(ValueError, match="unknown task"):
        tool.main(["robosuite/Lifd", str(run.path)])


@pytest.mark.long
def test_an_untrained_policy_in_the_real_simulator(tmp_path):
    pytest.importorskip("robosuite")
    pytest.importorskip("h5py")
    cameras = ["agentview", "robot0_eye_in_hand"]
    values = {
        "cameras": cameras,
        "image_size": {camera: [84, 84] for camera in cameras},
        "rgb_encoder": "spatial_softmax",
        "xyz_encoder": "spatial_softmax",
        "action_dim": 7,
        "action_normalization": "none",
        "reference_frame": "world",
        "action_kind": "delta",
        "workspace": [[-0.3, -0.3, 0.78], [0.3, 0.3, 1.15]],
        "dim": 32,
        "num_blocks": 1,
        "num_heads": 2,
    }
    policy = policies.PointMapPolicy.from_config({"policy": {"type": "pointmap", **values}})
    policy.save_pretrained(tmp_path / "checkpoints" / "last")
    arguments = ["robosuite/Lift", str(tmp_path), "--episodes", "2", "--placement", "0.12", "--videos", "1"]
    assert tool.main(arguments) == 0
    path = tmp_path / "eval" / "robosuite_Lift_placement-0.12.json"
    result = read_result(path)
    assert result["summary"]["episodes"] == 2 and not result["incidents"]
    assert (path.parent / result["episodes"][0]["video"]).stat().st_size > 1000
    again = [*arguments, "--workers", "1", "--out", str(tmp_path / "one.json")]
    assert tool.main(again) == 0
    one = json.loads((tmp_path / "one.json").read_text())
    assert [e["steps"] for e in one["episodes"]] == [e["steps"] for e in result["episodes"]]
    assert [e["return"] for e in one["episodes"]] == pytest.approx(
        [e["return"] for e in result["episodes"]], abs=1e-3
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--workers", "0"), "--workers is 0, wanted at least 1"),
        (("--threads", "0"), "--threads is 0"),
        (("--videos", "-1"), "--videos is -1, wanted at least 0"),
        (("--timeout", "0"), "--timeout is 0"),
        (("--timeout", "nan"), "--timeout is nan"),
        (("--overwrte",), "unknown option --overwrte; did you mean --overwrite?"),
        (("--wokers=3",), "did you mean --workers?"),
    ],
)
def test_bad_options_are_named_before_anything_is_loaded(run, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(run.path, *arguments)
    with pytest.raises(ValueError, match="--episodes is 0"):
        evaluate(run.path, episodes="0")
    assert run.loaded == [] and not (run.path / "eval").exists()


def test_the_time_of_an_interrupted_evaluation_is_kept(run, monkeypatch):
    played = []

    def select_action(obs):
        played.append(1)
        if len(played) == 5:
            raise KeyboardInterrupt
        return Follower.select_action(run.policy, obs)

    monkeypatch.setattr(run.policy, "select_action", select_action, raising=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run.path, "--workers", "1")
    (first,) = read_timings(run.path).values()
    assert first["runs"] == 1 and first["seconds"] > 0
    evaluate(run.path, "--workers", "1")
    (both,) = read_timings(run.path).values()
    assert both["runs"] == 2 and both["seconds"] > first["seconds"]


def test_a_lone_policy_keeps_its_folder_clean(run, tmp_path, monkeypatch):
    lone, here = tmp_path / "lone", tmp_path / "here"
    lone.mkdir()
    here.mkdir()
    (lone / "model.safetensors").write_bytes(b"weights")
    monkeypatch.chdir(here)
    assert evaluate(lone, episodes="1") == 0
    assert read_result(here / "eval" / "robosuite_Lift.json")["summary"]["episodes"] == 1
    assert [p.name for p in lone.iterdir()] == ["model.safetensors"]
    assert not list(here.rglob("timings.json"))
