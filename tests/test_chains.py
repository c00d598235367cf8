"""Chains: bookkeeping of scripted outcomes through the real runner, kills, crashes, shares, figures."""

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

from vilma.chains import ChainLog, bootstrap, evaluate_chains, log_folder, summarize_chains
from vilma.evaluation import EvaluationError, Video

# The workers cannot import a test module by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

HORIZON = 6
CHAINS = [tuple(f"task {i}.{j}" for j in range(5)) for i in range(12)]
# How many tasks of each chain can be solved.
SOLVED = (5, 0, 2, 1, 5, 3, 0, 4, 1, 2, 5, 0)

KILLED_SCRIPT = """
import functools, importlib.util, sys

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("chained", sys.argv[1])
    chained = sys.modules["chained"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chained)
    chained.evaluate_chains(
        functools.partial(chained.Table, step_s=0.05), chained.Counter(), chains=chained.CHAINS,
        result_path=sys.argv[2], description={"env": "table"}, workers=2,
    )
"""


def duration(chain: int, task: int) -> int:
    """Steps that a task of the scripted table takes."""
    return 2 + (chain + task) % 3


class Table(gymnasium.Env):
    """Solves a task when the policy has counted from 1 to its duration: it must be reset at every task."""

    def __init__(self, crash: dict | None = None, step_s: float = 0.0):
        self.crash, self.step_s = crash or {}, step_s
        self.action_space = gymnasium.spaces.Box(-99, 99, (1,), np.float32)
        self.observation_space = gymnasium.spaces.Dict()
        self.render_cameras = True

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.chain, self.number, self.steps = seed, 0, 0
        return self.observe(True), {}

    def step(self, action):
        time.sleep(self.step_s)
        self.steps += 1
        self.fail()
        in_time = action[0] == self.steps
        solved = in_time and self.number < SOLVED[self.chain]
        solved = bool(solved and self.steps == duration(self.chain, self.number))
        finished = solved and self.number == 4
        if solved:
            self.number, self.steps = self.number + 1, 0
        observation = self.observe(self.render_cameras or solved)
        return observation, float(solved), finished, self.steps >= HORIZON, {"success": finished}

    def observe(self, render):
        picture = np.full((3, 15, 20), 100 if render else 0, np.uint8)
        return {
            "observation.images.static": picture,
            "task": CHAINS[self.chain][min(self.number, 4)],
        }

    def fail(self):
        how = self.crash.get((self.chain, self.number, self.steps))
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "raise":
            raise ZeroDivisionError(f"no luck in chain {self.chain}")
        elif how and not Path(how).exists():
            Path(how).touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Counter:
    """Acts with the number of its steps since the last reset of a row; looks every third time."""

    def __init__(self):
        self.age: dict[int, int] = {}
        self.seen: list[tuple[str, bool]] = []

    def reset(self, rows=None):
        self.age = {} if rows is None else {**self.age, **dict.fromkeys(rows, 0)}

    def select_action(self, obs):
        actions = np.zeros((len(obs["task"]), 1), np.float32)
        for row, task in enumerate(obs["task"]):
            if self.age.get(row, 0) % 3 == 0:
                self.seen.append((task, bool(obs["observation.images.static"][row].any())))
            self.age[row] = self.age.get(row, 0) + 1
            actions[row] = self.age[row]
        return actions

    def needs_observation(self, n):
        return [self.age.get(row, 0) % 3 == 0 for row in range(n)]


def play(tmp_path, policy=None, crash=None, name="table.json", **options):
    options = {"chains": CHAINS, "workers": 2, "description": {"env": "table"}, **options}
    return evaluate_chains(
        lambda: Table(crash), policy or Counter(), result_path=tmp_path / name, timeout_s=20, **options
    )


def essence(result):
    return [(c["index"], c["solved"], c["steps"], c["outcome"]) for c in result["chains"]]


EXPECTED = [
    (
        chain,
        solved,
        [duration(chain, task) for task in range(solved)] + ([HORIZON] if solved < 5 else []),
        "finished",
    )
    for chain, solved in enumerate(SOLVED)
]


def test_scripted_outcomes_are_counted_and_the_policy_forgets_at_every_task(tmp_path):
    policy = Counter()
    result = play(tmp_path, policy)
    assert essence(result) == EXPECTED
    assert result["planned"] == 12 and json.loads((tmp_path / "table.json").read_text()) == result
    # Every task began with a picture, though pictures are drawn only when the policy looks.
    began = {task for task, drawn in policy.seen if drawn}
    assert {CHAINS[i][j] for i, solved in enumerate(SOLVED) for j in range(min(solved + 1, 5))} <= began
    assert all(drawn for _, drawn in policy.seen)


def test_figures_against_counting_by_hand(tmp_path):
    summary = play(tmp_path)["summary"]
    rates = [entry["rate"] for entry in summary["success"]]
    assert rates == pytest.approx([9 / 12, 7 / 12, 5 / 12, 4 / 12, 3 / 12])
    assert summary["mean_length"]["value"] == pytest.approx(np.mean(SOLVED)) == pytest.approx(sum(rates))
    assert summary["tasks"]["task 2.2"] == {"tried": 1, "solved": 0}
    assert summary["tasks"]["task 2.1"] == {"tried": 1, "solved": 1} and "task 2.3" not in summary["tasks"]
    steps = [duration(i, j) for i, solved in enumerate(SOLVED) for j in range(solved)]
    assert summary["steps"] == pytest.approx(np.mean(steps))


def test_bootstrap_against_resampling_one_by_one():
    lengths = [0] * 30 + [1] * 25 + [3] * 20 + [5] * 25
    found = bootstrap(lengths, 5)
    generator = np.random.default_rng(7)
    drawn = generator.choice(lengths, size=(4000, len(lengths)))
    assert found["mean_length"] == pytest.approx(np.quantile(drawn.mean(1), (0.025, 0.975)), abs=0.06)
    for number in range(1, 6):
        expected = np.quantile((drawn >= number).mean(1), (0.025, 0.975))
        assert found["success"][number - 1] == pytest.approx(expected, abs=0.025)
    assert bootstrap([5] * 10, 5)["mean_length"] == [5, 5]
    assert found == bootstrap(lengths[::-1], 5)


def test_a_chain_that_crashes_is_run_again_then_recorded_and_named(tmp_path):
    once = str(tmp_path / "once")
    result = play(tmp_path, crash={(4, 2, 1): once, (7, 1, 2): "raise", (9, 0, 1): "kill"})
    expected = list(EXPECTED)
    lost = {c["index"]: c for c in result["chains"] if c["outcome"] != "finished"}
    assert sorted(lost) == result["summary"]["lost"] == [7, 9]
    assert all(chain["solved"] == 0 and chain["outcome"] == "crashed" for chain in lost.values())
    assert [e for e in essence(result) if e[0] not in lost] == [e for e in expected if e[0] not in lost]
    named = [(i["chain"], i["attempt"]) for i in result["incidents"]]
    assert sorted(named) == [(4, 1), (7, 1), (7, 2), (9, 1), (9, 2)]
    told = {i["chain"]: i["error"] for i in result["incidents"]}
    assert "no luck in chain 7" in told[7] and "SIGKILL" in told[9]
    assert result["summary"]["crashes"] == 5


def test_processes_share_the_chains_and_the_last_one_writes_the_result(tmp_path):
    first = play(tmp_path, process=0, processes=3)
    assert [c["index"] for c in first["chains"]] == [0, 3, 6, 9] and first["planned"] == 12
    assert not (tmp_path / "table.json").exists()
    play(tmp_path, process=2, processes=3)
    last = play(tmp_path, process=1, processes=3)
    assert essence(last) == EXPECTED
    assert essence(json.loads((tmp_path / "table.json").read_text())) == EXPECTED


def test_another_number_of_processes_goes_on_with_what_is_missing(tmp_path):
    play(tmp_path, process=1, processes=3)
    policy = Counter()
    result = play(tmp_path, policy)
    assert essence(result) == EXPECTED
    played = {task.split(".")[0] for task, _ in policy.seen}
    assert not played & {f"task {i}" for i in (1, 4, 7, 10)}


def test_a_killed_evaluation_loses_and_repeats_no_chain(tmp_path):
    path = tmp_path / "table.json"
    command = [sys.executable, "-c", KILLED_SCRIPT, __file__, str(path)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    log = log_folder(path) / "process-0.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not log.exists() or log.read_text().count('"chain": {') < 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with log.open("a") as file:  # what a kill in the middle of a line leaves
        file.write('{"chain": {"index": 11, "sol')
    before = log.read_text().count('"chain": {') - 1
    assert 4 <= before < 12
    result = play(tmp_path)
    assert essence(result) == EXPECTED
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    indices = [line["chain"]["index"] for line in lines if "chain" in line]
    assert sorted(indices) == list(range(12))


def test_a_finished_evaluation_is_read_and_another_one_refused(tmp_path):
    play(tmp_path)
    policy = Counter()
    assert essence(play(tmp_path, policy)) == EXPECTED and not policy.seen
    with pytest.raises(EvaluationError, match=r"env: 'table' there, 'other' now"):
        play(tmp_path, description={"env": "other"})
    with pytest.raises(EvaluationError, match="already has chain 11"):
        play(tmp_path, chains=CHAINS[:5])
    assert essence(play(tmp_path, description={"env": "other"}, overwrite=True)) == EXPECTED


def test_fewer_chains_can_be_extended(tmp_path):
    assert essence(play(tmp_path, chains=CHAINS[:3])) == EXPECTED[:3]
    policy = Counter()
    assert essence(play(tmp_path, policy)) == EXPECTED
    assert not {task for task, _ in policy.seen if task.split(".")[0] in ("task 0", "task 1", "task 2")}


def test_two_writers_of_one_log_are_refused(tmp_path):
    with ChainLog(tmp_path / "x.json", {}), pytest.raises(EvaluationError, match="another process writes"):
        ChainLog(tmp_path / "x.json", {})


def test_a_log_that_is_written_is_not_overwritten(tmp_path):
    with ChainLog(tmp_path / "table.json", {}) as log:
        with pytest.raises(EvaluationError, match="another process writes"):
            play(tmp_path, overwrite=True)
        assert log.path.is_file()


def test_a_damaged_line_is_named(tmp_path):
    play(tmp_path, chains=CHAINS[:2])
    log = log_folder(tmp_path / "table.json") / "process-0.jsonl"
    log.write_text(log.read_text().replace('{"chain": {', '{"chain" {', 1))
    with pytest.raises(EvaluationError, match=r"line 2 of .*process-0\.jsonl is damaged"):
        play(tmp_path)


def test_chosen_chains_are_filmed(tmp_path):
    result = play(tmp_path, chains=CHAINS[:3], video=Video((2,), fps=15))
    films = {chain["index"]: chain.get("video") for chain in result["chains"]}
    assert films[0] is None and (tmp_path / films[2]).stat().st_size > 1000


def test_nothing_solved_and_nothing_at_all():
    chain = {"tasks": ["a", "b"], "solved": 0, "steps": [3], "outcome": "finished", "seconds": 1.0}
    summary = summarize_chains([{"index": 0, **chain}])
    assert [entry["rate"] for entry in summary["success"]] == [0, 0] and summary["steps"] is None
    assert summarize_chains([])["mean_length"] is None
    with pytest.raises(ValueError, match="wanted at least one"):
        evaluate_chains(Table, Counter(), chains=[], result_path="x.json")
