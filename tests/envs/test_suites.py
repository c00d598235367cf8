"""Suites that live elsewhere, as far as this environment can tell: tables, actions, what to install."""

import importlib.util
import os
import subprocess
import sys
import types
from importlib import metadata

import numpy as np
import pytest

from vilma.envs import find_task, find_tasks, make, suite_tables, tasks
from vilma.tools import doctor

pytest.importorskip("gymnasium")

needs_none = pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("robocasa", "libero")), reason="a suite is installed here"
)


def test_robocasas_tables():
    atomic = find_tasks("robocasa")
    assert len(atomic) == 24 and all(task.hold == 11 and task.reference_frame == "base" for task in atomic)
    horizons = {task.name.split("/")[1]: task.horizon for task in atomic}
    assert horizons["OpenDoubleDoor"] == 1000 and horizons["PnPCounterToSink"] == 700
    assert horizons["CoffeePressButton"] == 300 and horizons["OpenDrawer"] == 500
    assert find_task("robocasa/NavigateKitchen").horizon == 500
    paper = find_tasks("robocasa/paper")
    groups = {}
    for task in paper:
        groups.setdefault(task.group, []).append(task.name)
    sizes = {group: len(names) for group, names in groups.items()}
    expected = {"pick-place": 4, "drawers": 2, "knobs": 2, "levers": 3, "buttons": 3, "insertion": 2}
    assert len(paper) == 16 and sizes == expected
    assert [t.name for t in find_tasks("robocasa/levers")] == groups["levers"]
    assert {t.group for t in atomic} - {""} == set(expected), "the other eight are in no group of the paper"


def test_the_two_registries_are_two_suites():
    old, new = find_task("robocasa/OpenDrawer"), find_task("robocasa365/OpenDrawer")
    assert (old.horizon, new.horizon) == (500, 750)
    assert len(find_tasks("robocasa365")) == 65 == len(suite_tables.ROBOCASA365)
    for before, after in suite_tables.ROBOCASA_RENAMED.items():
        assert f"robocasa/{before}" in tasks() and f"robocasa365/{after}" in tasks()
        assert f"robocasa365/{before}" not in tasks()
    with pytest.raises(ValueError, match="did you mean 'robocasa/PnPCounterToCab'"):
        find_task("robocasa/PnpCounterToCab")


def test_liberos_tables():
    assert [t.name for t in find_tasks("libero/libero_spatial")] == [
        f"libero/libero_spatial/{i}" for i in range(10)
    ]
    assert len(find_tasks("libero")) == 130 and len(find_tasks("libero/libero_90")) == 90
    with pytest.raises(ValueError, match="unknown task"):
        find_task("libero/libero_spatial/10")


def test_seven_numbers_become_twelve():
    from vilma.envs.robocasa import full_action

    action = np.array([0.1, 0.2, 0.3, 0.4, 0.5, -2.0, 1.0])
    assert full_action(action).tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, -1.0, 1.0, 0, 0, 0, 0, -1]
    assert full_action(np.arange(12) / 12, "mobile").tolist() == (np.arange(12) / 12).tolist()
    for wrong, base in ((np.zeros(12), "fixed"), (np.zeros(7), "mobile"), (np.full(7, np.nan), "fixed")):
        with pytest.raises(ValueError, match="finite numbers"):
            full_action(wrong, base)


class FakeKitchen:
    """What of RoboCasa's environment a step touches; the real one is `make check-robocasa`."""

    def __init__(self, outcomes):
        self.outcomes, self.actions = iter(outcomes), []

    def step(self, action):
        self.actions.append(action)
        return {"robot0_gripper_qpos": np.zeros(2)}, 0.0, False, {}

    def _check_success(self):
        return next(self.outcomes)


@pytest.mark.parametrize(
    "outcomes, ends_at, success",
    [
        ([1] * 40, 11, True),  # the eleventh in a row
        ([0, 1, 1, 0] + [1] * 40, 15, True),  # a lost step begins the count anew
        (([1] * 10 + [0]) * 40, 60, False),  # ten are not enough
    ],
)
def test_success_must_be_held_for_eleven_steps(outcomes, ends_at, success):
    from vilma.envs.robocasa import RoboCasaEnv

    env = RoboCasaEnv.__new__(RoboCasaEnv)
    env.task, env.base, env.horizon = find_task("robocasa/OpenDrawer"), "fixed", 60
    env.state_keys, env.instruction, env.render_cameras = ("robot0_gripper_qpos",), "open it", False
    env._rig, env._steps, env._held, env._sim_env = None, 0, 0, FakeKitchen(map(bool, outcomes))
    terminated = truncated = False
    while not (terminated or truncated):
        observation, _, terminated, truncated, info = env.step(np.zeros(7))
    steps = len(env._sim_env.actions)
    assert (steps, terminated, truncated) == (ends_at, success, not success)
    assert info["success"] == success and observation["task"] == "open it"
    assert env._sim_env.actions[0].tolist() == [0.0] * 11 + [-1.0]
    env._sim_env = None


def test_robomimics_observations_become_ours():
    from vilma.envs.robomimic import translate

    class Cameras:
        def get_camera_intrinsic_matrix(self, camera_name, camera_height, camera_width):
            return np.diag([camera_height, camera_width, 1.0])

        def get_camera_extrinsic_matrix(self, camera_name):
            return np.eye(4)

    picture = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    ob = {
        "a_image": picture.transpose(2, 0, 1).astype(np.float32) / 255,
        "b_image": picture,
        "b_depth": np.full((4, 6, 1), 0.5, np.float32),
        "robot0_eef_pos": np.arange(3.0),
        "robot0_eef_quat_site": np.array([0, 0, np.sqrt(0.5), np.sqrt(0.5)]),  # a quarter turn about z
    }
    keys = ("robot0_eef_pos", "robot0_eef_rot6d")
    found = translate(ob, Cameras(), state_keys=keys, cameras=("a", "b"))
    for camera in "ab":
        assert np.array_equal(found[f"observation.images.{camera}"], picture.transpose(2, 0, 1))
    assert found["observation.depth.b"].shape == (4, 6) and "observation.depth.a" not in found
    assert found["observation.intrinsics.b"].diagonal().tolist() == [4, 6, 1]
    assert np.allclose(found["observation.state"], [0, 1, 2, 0, 1, 0, -1, 0, 0])
    with pytest.raises(ValueError, match="lacks robot0_gripper_qpos"):
        translate(ob, Cameras(), state_keys=("robot0_gripper_qpos",), cameras=())


def test_actions_of_a_network_reach_robomimics_loop(monkeypatch):
    """Tensors that are on a device or part of a graph, which numpy does not take."""
    torch = pytest.importorskip("torch")
    algo = types.SimpleNamespace(RolloutPolicy=object)  # robomimic itself: make check-robomimic
    monkeypatch.setitem(sys.modules, "robomimic", types.SimpleNamespace(algo=algo))
    monkeypatch.setitem(sys.modules, "robomimic.algo", algo)
    from vilma.envs.robomimic import rollout_policy

    class Policy:
        def select_action(self, obs):
            return torch.full((1, 7), float(obs["observation.state"][0, 0]), requires_grad=True)

    keys = ("robot0_eef_pos",)
    policy = rollout_policy(Policy(), None, task="lift", state_keys=keys, cameras=())
    assert policy({"robot0_eef_pos": np.full(3, 0.5)}).tolist() == [0.5] * 7


@pytest.mark.long
def test_robocasas_readings_have_the_sizes_of_robosuites():
    """A kitchen is built at the first reset; robosuite's own arm tells the same readings now."""
    pytest.importorskip("robosuite")
    from vilma.envs.robocasa import STATE_KEYS, _width

    assert sum(map(_width, STATE_KEYS)) == 9
    env = make("robosuite/Lift", cameras=())
    try:
        raw = env.simulator._get_observations()
        own = [k for k in raw if k.startswith("robot0_") and not k.endswith("-state")]
        assert len(own) > 8 and {k: _width(k) for k in own} == {k: np.size(raw[k]) for k in own}
    finally:
        env.close()
    with pytest.raises(ValueError, match="unknown state key 'robot0_colour'"):
        _width("robot0_colour")


@needs_none
@pytest.mark.parametrize("task", ["robocasa/OpenDrawer", "robocasa365/OpenDrawer", "libero/libero_spatial/0"])
def test_what_is_missing_is_told_with_the_way_to_get_it(task):
    with pytest.raises(ImportError, match=rf"{task} needs .*, which is not installed") as told:
        make(task)
    assert "pip install --no-deps vilma" in str(told.value) and "vilma serve" in str(told.value)


@needs_none
@pytest.mark.parametrize("suite", ["robocasa", "libero"])
def test_doctor_lists_what_is_missing_and_the_steps(suite, capsys):
    assert doctor.main([suite]) == 1
    out = capsys.readouterr().out
    assert "MISSING" in out and f"vilma doctor {suite}" in out and "pip install --no-deps vilma" in out
    assert "vilma serve" in out, "how the policy gets there"


def test_the_other_version_of_robocasa_is_refused(monkeypatch):
    from vilma.envs import robocasa

    monkeypatch.setattr(robocasa, "installed_version", lambda: "1.0.1")
    with pytest.raises(ImportError, match="nearest there is robocasa365/PickPlaceCounterToCabinet"):
        make("robocasa/PnPCounterToCab")
    monkeypatch.setattr(robocasa, "installed_version", lambda: "0.2.0")
    with pytest.raises(ImportError, match=r"a task of RoboCasa 1.x, but 0.2.0 is installed"):
        make("robocasa365/OpenDrawer")


def test_doctor_compares_the_pins(monkeypatch, tmp_path):
    from vilma.envs import robocasa_install

    have = {"numpy": "2.2.6", "mujoco": "3.3.1"}
    monkeypatch.setattr(robocasa_install, "installed_version", lambda: "1.0.1")
    monkeypatch.setattr(metadata, "version", lambda name: have.get(name, "1.0"))
    assets = tmp_path / "robocasa" / "models" / "assets"
    (assets / "fixtures" / "sinks" / "Sink025").mkdir(parents=True)
    found = {check.name: check for check in robocasa_install.checks(tmp_path)}
    assert not found["numpy for robocasa 1.0.1"].ok and found["mujoco for robocasa 1.0.1"].ok
    assert found["numpy for robocasa 1.0.1"].remedy == "pip install numpy==2.2.5"
    assert found["assets: fixtures/sinks"].ok and not found["assets: textures"].ok


def test_the_tables_need_no_simulator():
    code = (
        "import sys, vilma.envs; vilma.envs.find_tasks('robocasa/paper');"
        "heavy = {'torch', 'mujoco', 'robosuite', 'gymnasium', 'metaworld', 'numpy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
