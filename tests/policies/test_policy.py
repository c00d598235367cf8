"""The parts that all policies share, on a policy small enough to be predicted by hand."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import vilma.policies.policy as policy_module
from vilma.policies import Policy, find_checkpoint, load_policy


@dataclass(frozen=True)
class CounterConfig:
    type: str = "counter"
    cameras: tuple[str, ...] = ()
    reference_frame: str = "world"
    action_kind: str = "delta"
    action_dim: int = 2
    obs_horizon: int = 1
    horizon: int = 4
    execute: int = 3
    width: int = 3


class CounterPolicy(Policy):
    """Answers an observation s with the actions (s, 0), (s, 1), ...; s is the sum over its history."""

    config_class = CounterConfig
    observation_keys = ("observation.state",)

    def __init__(self, config, stats=None, *, pretrained=True):
        super().__init__(config)
        self.linear = torch.nn.Linear(config.width, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.noise = 0.0
        self.calls = []
        self.set_statistics(stats or {})

    def set_statistics(self, statistics):
        self.statistics = dict(statistics)

    def predict_chunk(self, obs, generators=None):
        assert not self.norm.training
        state = obs["observation.state"]
        self.calls.append((state.clone(), obs["task"]))
        action = torch.zeros(len(state), self.config.horizon, 2)
        action[..., 0] = state.sum((1, 2))[:, None]
        action[..., 1] = torch.arange(self.config.horizon)
        return action + self.noise * torch.stack([torch.randn(1, 1, generator=g) for g in generators])


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(policy_module._POLICIES, "counter", ("counter_for_tests", "CounterPolicy"))
    known = policy_module.policy_class
    monkeypatch.setattr(
        policy_module, "policy_class", lambda name: CounterPolicy if name == "counter" else known(name)
    )


def observation(values):
    return {"observation.state": np.array(values, dtype=np.float64)[:, None], "task": ("go",) * len(values)}


def test_rows_in_different_phases_match_a_row_by_row_simulation():
    config = CounterConfig()
    policy = CounterPolicy(config)
    policy.train()
    rng = np.random.default_rng(0)
    queues = [[] for _ in range(3)]
    for step in range(40):
        starting = [row for row in range(3) if rng.random() < 0.2]
        policy.reset(starting if step % 2 else np.isin(np.arange(3), starting))
        for row in starting:
            queues[row] = []
        looks = policy.needs_observation(3)
        assert looks == [not queue for queue in queues]
        seen = rng.integers(100, size=3).astype(float)
        # A row that does not look may be given anything, as when its rendering was skipped.
        actions = policy.select_action(observation(np.where(looks, seen, np.nan)))
        for row in range(3):
            if not queues[row]:
                queues[row] = [(seen[row], float(i)) for i in range(config.execute)]
            assert tuple(actions[row].tolist()) == queues[row].pop(0)
    assert policy.training
    assert policy.norm.training
    assert all(len(state) == len(task) for state, task in policy.calls)
    assert len({len(state) for state, _ in policy.calls}) > 1


def test_history_is_repeated_on_the_left_and_forgotten_at_reset():
    policy = CounterPolicy(CounterConfig(obs_horizon=3, execute=2))
    seen = [policy.select_action(observation([float(t)]))[0].tolist() for t in range(6)]
    windows = [state.flatten().tolist() for state, _ in policy.calls]
    assert windows == [[0, 0, 0], [0, 1, 2], [2, 3, 4]]
    assert seen == [[0, 0], [0, 1], [3, 0], [3, 1], [9, 0], [9, 1]]
    assert policy.needs_observation(1) == [True]
    policy.reset([0])
    policy.select_action(observation([7.0]))
    assert policy.calls[-1][0].flatten().tolist() == [7, 7, 7]


def test_a_short_history_repeats_its_oldest_step():
    policy = CounterPolicy(CounterConfig(obs_horizon=3, execute=1))
    for t in range(4):
        policy.select_action(observation([float(t)]))
    windows = [state.flatten().tolist() for state, _ in policy.calls]
    assert windows == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


def test_history_looks_only_at_the_last_steps():
    policy = CounterPolicy(CounterConfig(obs_horizon=2, horizon=6, execute=5))
    looks = []
    for t in range(11):
        looks.append(policy.needs_observation(1)[0])
        policy.select_action(observation([float(t) if looks[-1] else float("nan")]))
    assert looks == [t == 0 or t % 5 in (0, 4) for t in range(11)]
    assert [state.flatten().tolist() for state, _ in policy.calls] == [[0, 0], [4, 5], [9, 10]]


def test_observations_are_copied():
    policy = CounterPolicy(CounterConfig(obs_horizon=2, execute=1))
    buffer = observation([1.0])
    buffer["observation.state"] = buffer["observation.state"].astype(np.float32)
    policy.select_action(buffer)
    buffer["observation.state"][:] = 2.0
    policy.select_action(buffer)
    assert policy.calls[-1][0].flatten().tolist() == [1, 2]


def test_noise_of_a_seeded_row_depends_on_its_seed_alone():
    def actions(rows, seeds, count):
        policy = CounterPolicy(CounterConfig())
        policy.noise = 1.0
        policy.seed(5)
        policy.reset(rows)
        policy.seed_rows(rows, seeds)
        return [policy.select_action(observation([0.0] * count)) for _ in range(7)]

    for first, second in zip(actions([0, 2], [11, 12], 3), actions([1, 0], [12, 11], 2)):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[2], second[1])
        assert not torch.equal(first[0], first[2])
    for first, second in zip(actions([], [], 3), actions([], [], 3)):
        assert torch.equal(first, second)


def test_actions_and_inputs_are_checked():
    policy = CounterPolicy(CounterConfig())
    policy.select_action(observation([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"acts for 2 rows, got 3: call reset\(\)"):
        policy.select_action(observation([1.0, 2.0, 3.0]))
    policy.reset()
    with pytest.raises(ValueError, match=r"lacks observation.state, task; it has action"):
        policy.select_action({"action": 1})
    with pytest.raises(ValueError, match="differ in their number of rows"):
        policy.select_action(observation([1.0, 2.0]) | {"task": ["go"]})
    assert policy.select_action(observation([1.0, 2.0]) | {"task": "go"}).shape == (2, 2)
    with pytest.raises(ValueError, match="1 seeds for 2 rows"):
        policy.seed_rows([True, True], [1])


PICTURES = {
    "observation.images.front": (3, 8, 8),
    "observation.depth.front": (8, 8),
    "observation.intrinsics.front": (3, 3),
    "observation.pose.front": (4, 4),
    "observation.state": (5,),
}


class PicturePolicy(CounterPolicy):
    observation_keys = tuple(PICTURES)


def pictures(*lead):
    values = {key: np.random.default_rng(0).random((*lead, *own)) for key, own in PICTURES.items()}
    return {key: value.astype(np.float32) for key, value in values.items()} | {"task": "go"}


def test_one_environment_gets_its_action_alone():
    policy = PicturePolicy(CounterConfig())
    alone = pictures()  # as gymnasium's reset and step return it
    together = {key: value if key == "task" else value[None] for key, value in alone.items()}
    wanted = [policy.select_action(together) for _ in range(4)]
    for convert in (np.asarray, torch.as_tensor):
        policy.reset()
        one = {key: value if key == "task" else convert(value) for key, value in alone.items()}
        actions = [policy.select_action(one) for _ in range(4)]
        assert [a.shape for a in actions] == [(2,)] * 4
        assert all(torch.equal(a, w[0]) for a, w in zip(actions, wanted))


def test_observations_with_a_time_axis_are_the_history():
    policy = CounterPolicy(CounterConfig(obs_horizon=3, execute=1))
    for steps in ([5.0], [1.0, 2.0], [1.0, 2.0, 4.0], [9.0, 1.0, 2.0, 4.0]):
        window = {"observation.state": np.array(steps)[None, :, None], "task": ["go"]}
        policy.select_action(window)
    windows = [state.flatten().tolist() for state, _ in policy.calls]
    assert windows == [[5, 5, 5], [1, 1, 2], [1, 2, 4], [1, 2, 4]]
    policy.select_action(observation([8.0]))  # and is remembered
    assert policy.calls[-1][0].flatten().tolist() == [2, 4, 8]


@pytest.mark.parametrize("lead", [(), (3,), (3, 2)])
def test_observations_of_unlike_axes_are_named(lead):
    policy, seen = PicturePolicy(CounterConfig()), pictures(*lead)
    for key, own in PICTURES.items():
        with pytest.raises(ValueError, match=rf"{key} has shape .*wanted .*one environment, from B"):
            policy.select_action(seen | {key: seen[key][None]})
        if lead or len(own) > 1:
            with pytest.raises(ValueError, match=rf"{key} has shape .*wanted .*one environment, from B"):
                policy.select_action(seen | {key: seen[key][0]})
    with pytest.raises(ValueError, match=r"observation\.images\.front has shape"):
        policy.select_action(pictures(1, 1, 1))
    if len(lead) == 2:
        with pytest.raises(ValueError, match=r"differ in their number of time steps: .*pose\.front': 1"):
            pose = seen["observation.pose.front"][:, :1]
            policy.select_action(seen | {"observation.pose.front": pose})


def test_save_and_load(tmp_path):
    policy = CounterPolicy(CounterConfig(), {"action": {"mean": [1.0]}})
    policy.save_pretrained(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.yaml",
        "model.safetensors",
        "stats.json",
    ]
    loaded = load_policy(tmp_path / "a")
    assert type(loaded) is CounterPolicy
    assert loaded.config == policy.config
    assert loaded.statistics == policy.statistics
    assert not loaded.training
    for name, value in policy.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_run_directories(tmp_path):
    CounterPolicy(CounterConfig()).save_pretrained(tmp_path / "run" / "checkpoints" / "last")
    for path in ("run", "run/checkpoints", "run/checkpoints/last"):
        assert find_checkpoint(tmp_path / path) == tmp_path / "run/checkpoints/last"
    with pytest.raises(FileNotFoundError, match="nor does checkpoints/last in it"):
        find_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: it is not a directory"):
        load_policy(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    policy = CounterPolicy(CounterConfig())
    policy.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    torch.nn.init.zeros_(policy.linear.weight)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        policy.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_checkpoint_of_another_architecture(tmp_path):
    CounterPolicy(CounterConfig()).save_pretrained(tmp_path)
    config = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("width: 3", "width: 5"))
    with pytest.raises(ValueError, match=r"1 of another shape: linear.weight \(2, 3\), wanted \(2, 5\)"):
        load_policy(tmp_path)
    policy = CounterPolicy(CounterConfig())
    policy.extra = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(5))
    del policy.norm
    policy.save_pretrained(tmp_path)
    message = r"5 missing: norm.weight, norm.bias, .*\.\.\.; 10 unexpected: extra.0.bias, .*\.\.\."
    with pytest.raises(ValueError, match=message):
        load_policy(tmp_path)


def test_damaged_and_foreign_checkpoints(tmp_path):
    CounterPolicy(CounterConfig()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*damaged or incomplete"):
        load_policy(tmp_path)
    (tmp_path / "stats.json").write_text('{"action": ')
    with pytest.raises(ValueError, match=r"stats.json is not valid JSON"):
        load_policy(tmp_path)
    (tmp_path / "stats.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"stats.json missing"):
        load_policy(tmp_path)


def test_types(tmp_path):
    CounterPolicy(CounterConfig()).save_pretrained(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("counter", "quantum"))
    with pytest.raises(ValueError, match="unknown policy type 'quantum'; known: pointmap"):
        load_policy(tmp_path)
    assert CounterPolicy.from_config({"width": 4}).config.width == 4
    assert (
        CounterPolicy.from_config({"policy": {"type": "counter", "width": 4}, "optim": {}}).config.width == 4
    )
    assert type(Policy.from_config(CounterConfig())) is CounterPolicy
    with pytest.raises(ValueError, match="names no policy type; wanted type: pointmap"):
        Policy.from_config({"width": 4})
    with pytest.raises(ValueError, match=r"unknown field 'widht'.*did you mean 'width'"):
        CounterPolicy.from_config({"widht": 4})


def test_sources_that_do_not_fit():
    @dataclass(frozen=True)
    class Config(CounterConfig):
        cameras: tuple[str, ...] = ("front", "wrist")

    policy = CounterPolicy(Config())
    fits = {
        "reference_frame": "world",
        "action_kind": "delta",
        "action_dim": 2,
        "cameras": ["wrist", "front"],
    }
    policy.check_compatible(fits | {"control_freq": 20})
    policy.check_compatible({})
    for field, value, message in (
        ("reference_frame", "base", "reference_frame is 'base', the policy's is 'world'"),
        ("action_kind", "absolute", "action_kind is 'absolute', the policy's is 'delta'"),
        ("action_dim", 7, "action_dim is 7, the policy's is 2"),
        ("cameras", ["front"], r"cameras wrist are missing \(it has front\)"),
    ):
        with pytest.raises(ValueError, match=f"the simulator does not fit the policy: {message}"):
            policy.check_compatible(fits | {field: value}, "the simulator")


def test_statistics_are_plain_json(tmp_path):
    CounterPolicy(CounterConfig(), {"action": {"mean": [0.5], "constant": [True]}}).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "stats.json").read_text()) == {
        "action": {"mean": [0.5], "constant": [True]}
    }
