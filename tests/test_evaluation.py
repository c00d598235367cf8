"""The runner: pairing by seed, crashes, hangs, kills and resuming, all with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import gymnasium
import numpy as np
import pytest

from vilma.evaluation import (
    BlankedPolicy,
    EvaluationError,
    Video,
    evaluate,
    read_result,
    summarize,
    wilson_interval,
)

# The workers cannot import a test module by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

HORIZON = 12

KILLED_SCRIPT = """
import functools, importlib.util, sys

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("race", sys.argv[1])
    race = sys.modules["race"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(race)
    race.evaluate(
        functools.partial(race.Race, step_s=0.2), race.Runner(), episodes=7, seed=100, workers=2,
        result_path=sys.argv[2], description={"env": "race"},
    )
"""


class Race(gymnasium.Env):
    """Pushed along a line by its actions; the distance to the goal comes from the seed.

    Every observation carries the seed of its episode, its step, and a picture in the colour of the step.
    """

    def __init__(self, crash: dict | None = None, step_s: float = 0.0):
        self.crash, self.step_s = crash or {}, step_s
        self.action_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Dict()
        self.render_cameras = True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps, self.place = seed, 0, 0.0
        self.goal = self.np_random.uniform(3, 15)
        self.fail("reset")
        return self.observe(True), {}

    def step(self, action):
        time.sleep(self.step_s)
        self.steps += 1
        self.place += float(action[0])
        self.fail(self.steps)
        success = self.place >= self.goal
        observation = self.observe(self.render_cameras)
        return observation, float(action[0]), success, self.steps >= HORIZON, {"success": success}

    def observe(self, render):
        picture = np.full((3, 15, 20), 10 * self.steps + 1 if render else 0, np.uint8)
        return {
            "observation.images.front": picture,
            "observation.depth.front": np.full((15, 20), 1.0 if render else 0.0, np.float32),
            "observation.state": np.array([self.seed, self.steps, self.goal], np.float32),
            "task": f"reach the goal of {self.seed}",
        }

    def fail(self, when):
        how = self.crash.get((self.seed, when))
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "raise":
            raise ZeroDivisionError(f"no luck with seed {self.seed}")
        elif how == "hang":
            time.sleep(600)
        elif how and not Path(how).exists():
            Path(how).touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Runner:
    """Pushes by 1 and its own seeded noise; looks at every ``period``-th observation. Keeps what it saw."""

    def __init__(self, period: int = 3):
        self.period, self.seen, self.seeds, self.resets = period, [], {}, []
        self.noise, self.age = {}, {}

    def reset(self, rows=None):
        self.resets.append(rows)
        for row in rows or []:
            self.age[row] = 0
            self.seen.append((row, []))

    def seed_rows(self, rows, seeds):
        for row, seed in zip(rows, seeds):
            self.noise[row] = np.random.default_rng(seed)
            self.seeds[row] = seed

    def select_action(self, obs):
        rows = len(obs["observation.state"])
        assert obs["observation.images.front"].shape == (rows, 3, 15, 20)
        assert isinstance(obs["task"], list) and len(obs["task"]) == rows
        actions = np.zeros((rows, 2), np.float32)
        for row in self.noise:
            state, task = obs["observation.state"][row], obs["task"][row]
            looked = obs["observation.images.front"][row].any()
            episode = next(entry for at, entry in reversed(self.seen) if at == row)
            episode.append((int(state[0]), int(state[1]), task, bool(looked)))
            actions[row, 0] = 1 + self.noise[row].normal() * 0.3
            self.age[row] += 1
        return actions

    def needs_observation(self, n):
        return [self.age.get(row, 0) % self.period == 0 for row in range(n)]


def race(tmp_path, policy=None, name="race.json", crash=None, **options):
    options = {"episodes": 7, "seed": 100, "workers": 2, "description": {"env": "race"}, **options}
    return evaluate(
        lambda: Race(crash), policy or Runner(), result_path=tmp_path / name, timeout_s=20, **options
    )


def essence(result):
    return [(e["index"], e["seed"], e["success"], e["steps"], e["return"]) for e in result["episodes"]]


@pytest.mark.parametrize("successes, trials", [(0, 1), (0, 50), (10, 10), (45, 50), (50, 50), (333, 1000)])
def test_wilson_interval_against_scipy(successes, trials):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_known_values():
    assert wilson_interval(10, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    # Without a failure the lower bound is n / (n + z^2).
    assert wilson_interval(50, 50)[0] == pytest.approx(50 / (50 + 1.959963984540054**2), abs=1e-12)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson_interval(3, 2)


def test_summary_counts_lost_episodes_as_failures_and_leaves_them_out_of_the_steps():
    episodes = [
        {"success": True, "steps": 10, "outcome": "success"},
        {"success": False, "steps": 30, "outcome": "failure"},
        {"success": False, "steps": 500, "outcome": "timeout"},
    ]
    incidents = [{"kind": "timeout"}, {"kind": "timeout"}, {"kind": "crash"}]
    summary = summarize(episodes, incidents, 1.5)
    assert (summary["successes"], summary["episodes"], summary["lost"]) == (1, 3, 1)
    assert (summary["mean_steps"], summary["mean_steps_success"]) == (20, 10)
    assert (summary["crashes"], summary["timeouts"]) == (1, 2)
    assert summary["wilson95"] == list(wilson_interval(1, 3))
    assert summarize([])["rate"] is None


def test_episodes_are_given_by_their_seed_whatever_the_number_of_workers(tmp_path):
    results = [essence(race(tmp_path, name=f"{n}.json", workers=n)) for n in (1, 2, 3)]
    assert results[0] == results[1] == results[2]
    assert [(index, seed) for index, seed, *_ in results[0]] == [(i, 100 + i) for i in range(7)]
    assert 0 < sum(success for _, _, success, *_ in results[0]) < 7


def test_no_observation_crosses_an_episode_and_rendering_only_when_looked_at(tmp_path):
    policy = Runner(period=3)
    result = race(tmp_path, policy, workers=2)
    steps = {e["seed"]: e["steps"] for e in result["episodes"]}
    assert policy.resets[0] is None
    played = {}
    for _, seen in policy.seen:
        first = seen[0][0]
        # A row without a next episode goes on repeating its last observation.
        seen = seen[: steps[first]]
        assert [(s, t) for s, t, _, _ in seen] == [(first, t) for t in range(steps[first])]
        assert {task for _, _, task, _ in seen} == {f"reach the goal of {first}"}
        assert [looked for *_, looked in seen] == [t % 3 == 0 for t in range(steps[first])]
        played[first] = len(seen)
    assert played == steps


def test_a_killed_simulator_costs_nothing_but_another_try(tmp_path):
    undisturbed = essence(race(tmp_path, name="calm.json"))
    result = race(tmp_path, crash={(102, 2): str(tmp_path / "once")})
    assert essence(result) == undisturbed
    (incident,) = result["incidents"]
    assert (incident["episode"], incident["seed"], incident["kind"]) == (2, 102, "crash")
    assert "SIGKILL" in incident["error"] and "stepping" in incident["error"]
    assert (result["summary"]["crashes"], result["summary"]["lost"]) == (1, 0)


def test_episodes_that_always_crash_are_named_and_count_as_failures(tmp_path):
    undisturbed = essence(race(tmp_path, name="calm.json"))
    result = race(tmp_path, crash={(101, 3): "kill", (104, "reset"): "raise"})
    assert [e["outcome"] for e in result["episodes"] if e["index"] in (1, 4)] == ["crashed", "crashed"]
    assert [e for e in essence(result) if e[0] not in (1, 4)] == [
        e for e in undisturbed if e[0] not in (1, 4)
    ]
    assert (result["summary"]["crashes"], result["summary"]["lost"]) == (4, 2)
    assert result["summary"]["episodes"] == 7
    raised = [i for i in result["incidents"] if i["seed"] == 104]
    assert raised[0]["error"] == "ZeroDivisionError: no luck with seed 104"
    assert "in fail" in raised[0]["traceback"] and [i["attempt"] for i in raised] == [1, 2]


def test_a_hanging_simulator_is_ended_and_named(tmp_path):
    result = evaluate(
        lambda: Race({(101, 1): "hang"}),
        Runner(),
        episodes=3,
        seed=100,
        workers=2,
        result_path=tmp_path / "hang.json",
        timeout_s=5,
    )
    assert [e["outcome"] == "timeout" for e in result["episodes"]] == [False, True, False]
    assert result["summary"]["timeouts"] == 2
    assert result["incidents"][0]["error"] == "no answer within 5 s while stepping"


def test_an_environment_that_cannot_be_built_says_so_at_once(tmp_path):
    def broken():
        raise ImportError("no OpenGL here")

    with pytest.raises(EvaluationError, match=r"cannot be built: ImportError: no OpenGL here$"):
        evaluate(broken, Runner(), episodes=3, seed=0, result_path=tmp_path / "x.json")
    with pytest.raises(EvaluationError, match=r"ZeroDivisionError: division by zero\nTraceback"):
        evaluate(lambda: 1 / 0, Runner(), episodes=3, seed=0, result_path=tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def building_fails(folder, times, crash):
    """Makes a simulator; its second and following ``times`` builds fail."""

    def build():
        number = len(list(folder.glob("built-*")))
        (folder / f"built-{number}").touch()
        if 1 <= number <= times:
            raise OSError(f"no memory for simulator {number}")
        return Race(crash)

    return build


@pytest.mark.parametrize("times", [1, 2])
def test_a_simulator_that_does_not_come_back_is_an_incident(tmp_path, times):
    undisturbed = essence(race(tmp_path, name="calm.json", workers=1))
    result = evaluate(
        building_fails(tmp_path, times, {(102, 2): str(tmp_path / "once")}),
        Runner(),
        episodes=7,
        seed=100,
        result_path=tmp_path / "race.json",
    )
    first, *rebuilds = result["incidents"]
    assert "SIGKILL" in first["error"] and first["attempt"] == 1 and "rebuilding" not in first
    assert [i["error"] for i in rebuilds] == [
        f"OSError: no memory for simulator {n + 1}" for n in range(times)
    ]
    assert [(i["seed"], i["attempt"], i["rebuilding"]) for i in rebuilds] == [
        (102, n + 1, True) for n in range(times)
    ]
    assert result["summary"]["lost"] == times - 1 and len(result["episodes"]) == 7
    lost = {102} if times == 2 else set()
    assert [e["seed"] for e in result["episodes"] if e["outcome"] == "crashed"] == sorted(lost)
    assert [e for e in essence(result) if e[1] not in lost] == [e for e in undisturbed if e[1] not in lost]


def test_finished_episodes_are_reused_and_more_are_added(tmp_path):
    first = race(tmp_path, episodes=3)
    written = (tmp_path / "race.json").stat().st_mtime_ns
    policy = Runner()
    assert race(tmp_path, policy, episodes=3)["episodes"] == first["episodes"]
    assert policy.seen == [] and (tmp_path / "race.json").stat().st_mtime_ns == written
    more = race(tmp_path, episodes=5)
    assert more["episodes"][:3] == first["episodes"] and len(more["episodes"]) == 5
    assert more["summary"]["seconds"] > first["summary"]["seconds"]
    assert read_result(tmp_path / "race.json") == more


def test_another_evaluation_is_not_overwritten_unasked(tmp_path):
    race(tmp_path, episodes=1)
    with pytest.raises(EvaluationError, match=r"env: 'race' there, 'other' now"):
        race(tmp_path, description={"env": "other"})
    with pytest.raises(EvaluationError, match="seed: 100 there, 7 now"):
        race(tmp_path, seed=7)
    result = race(tmp_path, episodes=1, description={"env": "other"}, overwrite=True)
    assert result["description"] == {"env": "other", "seed": 100} and len(result["episodes"]) == 1
    (tmp_path / "race.json").write_text('{"episodes": [')
    with pytest.raises(EvaluationError, match="not a result file"):
        race(tmp_path)


def test_a_killed_evaluation_goes_on_with_the_missing_episodes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED_SCRIPT)
    path = tmp_path / "race.json"
    process = subprocess.Popen([sys.executable, str(script), __file__, str(path)])
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (path.exists() and len(read_result(path)["episodes"]) >= 2):
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    before = read_result(path)["episodes"]
    assert 2 <= len(before) < 7
    resumed = race(tmp_path)
    by_index = {e["index"]: e for e in resumed["episodes"]}
    assert all(by_index[e["index"]] == e for e in before)
    assert essence(resumed) == essence(race(tmp_path, name="whole.json"))


def test_an_error_of_the_policy_ends_the_simulators_and_keeps_the_result(tmp_path):
    class Broken(Runner):
        def select_action(self, obs):
            action = super().select_action(obs)
            return action * np.nan if self.seeds.get(0) == 102 else action

    with pytest.raises(EvaluationError, match="not finite"):
        race(tmp_path, Broken(), workers=1)
    assert len(read_result(tmp_path / "race.json")["episodes"]) == 2

    class Wide(Runner):
        def select_action(self, obs):
            return np.zeros((len(obs["task"]), 7))

    with pytest.raises(EvaluationError, match=r"\(2, 7\), the environment takes \(2, 2\)"):
        race(tmp_path, Wide(), name="wide.json")


def test_films_of_chosen_episodes_play_in_browsers(tmp_path):
    imageio = pytest.importorskip("imageio.v3")
    policy = Runner(period=5)
    result = race(tmp_path, policy, episodes=3, video=Video(episodes=(0, 2), fps=10, size=60))
    assert [("video" in e) for e in result["episodes"]] == [True, False, True]
    path = tmp_path / result["episodes"][0]["video"]
    frames = imageio.imread(path, plugin="FFMPEG")
    # 15 x 20 pixels enlarged three times, padded to even sides; every step of a filmed episode is rendered.
    assert frames.shape == (result["episodes"][0]["steps"] + 1, 46, 60, 3)
    assert np.abs(frames.mean((1, 2, 3)) - [10 * t + 1 for t in range(len(frames))]).max() < 5
    content = path.read_bytes()
    assert b"avc1" in content and content.index(b"moov") < content.index(b"mdat")
    assert not list(tmp_path.rglob(".part*"))
    with pytest.raises(EvaluationError, match="no camera 'back' to film; the environment has: front"):
        race(tmp_path, name="other.json", video=Video(camera="back"))


def test_a_blanked_policy_sees_zeros_and_nothing_else_changes():
    class Seeing:
        def select_action(self, obs):
            return obs

        def needs_observation(self, n):
            return [True] * n

    obs = {
        "observation.images.a": np.ones((2, 3, 4, 4), np.uint8),
        "observation.depth.a": np.ones((2, 4, 4), np.float32),
        "observation.state": np.ones((2, 3)),
        "task": ["x", "y"],
    }
    shown = BlankedPolicy(Seeing(), ("images",)).select_action(obs)
    assert not shown["observation.images.a"].any() and shown["observation.images.a"].dtype == np.uint8
    assert shown["observation.depth.a"].all() and shown["task"] == ["x", "y"]
    blanked = BlankedPolicy(Seeing())
    assert not blanked.select_action(obs)["observation.depth.a"].any()
    assert blanked.select_action(obs)["observation.state"].all() and obs["observation.images.a"].all()
    assert blanked.needs_observation(2) == [True, True]
    with pytest.raises(ValueError, match="cannot blank"):
        BlankedPolicy(Seeing(), ("state",))


def test_progress_is_told_from_the_start(tmp_path):
    told = []
    race(tmp_path, episodes=2, workers=1)
    race(tmp_path, episodes=4, on_progress=lambda r: told.append((r["summary"]["episodes"], r["planned"])))
    assert told == [(2, 4), (3, 4), (4, 4)]


def test_a_full_disk_keeps_the_last_whole_file(tmp_path, monkeypatch):
    race(tmp_path, episodes=2, workers=1)
    before = (tmp_path / "race.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        race(tmp_path, episodes=3, workers=1)
    assert (tmp_path / "race.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    assert json.loads(before)


def test_importing_it_pulls_neither_torch_nor_a_simulator():
    code = (
        "import vilma.evaluation, sys; print(sorted({'torch', 'gymnasium', 'robosuite'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
