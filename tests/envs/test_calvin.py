"""CALVIN's environment: messages without the simulator, and its behaviour where calvin_env is installed."""

import importlib.util
import sys

import numpy as np
import pytest

from vilma import envs
from vilma.envs import calvin_install
from vilma.tools import doctor

pytest.importorskip("gymnasium")

try:
    calvin_install.find_source()
    IS_INSTALLED = importlib.util.find_spec("pybullet") is not None
except ImportError:
    IS_INSTALLED = False
needs_calvin = pytest.mark.skipif(not IS_INSTALLED, reason="needs calvin_env (vilma doctor calvin)")


def fake_clone(path):
    for folder in ("calvin_env/envs", "conf", "data/franka_panda"):
        (path / folder).mkdir(parents=True)
    for file in ("calvin_env/envs/play_table_env.py", "conf/config_data_collection.yaml"):
        (path / file).touch()
    return path


def test_a_missing_simulator_is_answered_with_the_steps(tmp_path, monkeypatch):
    monkeypatch.delenv("CALVIN_ENV", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"(?s)calvin_env is not installed.*git clone .*calvin_env"):
        envs.make("calvin/D")
    with pytest.raises(ImportError, match=r"it lacks calvin_env/envs/play_table_env\.py"):
        envs.make("calvin/D", source=tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gym", None)
    with pytest.raises(ImportError, match="CALVIN needs the package 'gym'"):
        envs.make("calvin/D", source=fake_clone(tmp_path))


def test_the_challenges_repository_will_do(tmp_path, monkeypatch):
    fake_clone(tmp_path / "calvin_env")
    assert calvin_install.find_source(tmp_path) == tmp_path / "calvin_env"
    monkeypatch.setenv("CALVIN_ENV", str(tmp_path))
    assert calvin_install.find_source() == tmp_path / "calvin_env"


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"cameras": ("wrist",)}, "not wrist"),
        ({"size": 0}, "image size of 0"),
        ({"subtask_steps": 0}, "0 steps for a task"),
        ({"renderer": "fast"}, "renderer is 'fast'"),
        ({"scene": "D"}, "unknown option 'scene'"),
    ),
)
def test_bad_options_are_named_before_anything_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        envs.make("calvin/D", **options)


def test_doctor_tells_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CALVIN_ENV", raising=False)
    absent = {"pybullet", "calvin_env"}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    assert doctor.main(["calvin"]) == 1
    out = capsys.readouterr().out
    assert "MISSING   pybullet: not installed" in out and "pip install pybullet==3.2.7" in out
    assert "MISSING   calvin_env" in out and "How to install calvin" in out
    assert doctor.main(["calvin", "--requirements"]) == 0
    assert "gym==0.26.2" in capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def env():
    env = envs.make("calvin/D", renderer="tiny")
    yield env
    env.close()


@needs_calvin
def test_a_chain_starts_from_the_protocols_state(env):
    from vilma.envs.calvin_protocol import chains, initial_state

    observation, info = env.reset(seed=1003)
    assert info["chain"] == 3 and env.observation_space.contains(observation)
    robot, scene = env.state()
    expected = initial_state(chains()[3].condition)
    np.testing.assert_allclose(robot[7:14], expected[0][7:14], atol=1e-3)
    np.testing.assert_allclose(scene[:6], expected[1][:6], atol=1e-3)
    again, _ = env.reset(seed=3)
    np.testing.assert_array_equal(
        again["observation.images.static"], observation["observation.images.static"]
    )


@needs_calvin
def test_both_cameras_see_the_table_at_one_height(env):
    from vilma.tools.check_calvin import table_heights

    for static, gripper in table_heights(env, poses=2):
        assert abs(static - gripper) < 0.005 and abs(static - 0.44) < 0.002


@needs_calvin
def test_solving_a_task_gives_the_next_one_with_pictures(env):
    from vilma.envs.calvin_protocol import INSTRUCTIONS, Chain, chains
    from vilma.envs.calvin_skills import actions, plan

    number = next(i for i, chain in enumerate(chains()) if chain.tasks[0] == "open_drawer")
    assert isinstance(chains()[number], Chain)
    env.reset(seed=number)
    env.render_cameras = False
    rewards = 0.0
    for action in actions(env, plan("open_drawer", env.state()[1])):
        observation, reward, terminated, truncated, info = env.step(action)
        assert not (terminated or truncated)
        assert bool(observation["observation.images.static"].any()) == bool(reward)
        rewards += reward
        if reward:
            break
    assert rewards == 1 and info["solved"] == 1
    assert observation["task"] == INSTRUCTIONS[chains()[number].tasks[1]]
    for _ in range(env.subtask_steps):
        *_, terminated, truncated, info = env.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))
        if truncated:
            break
    assert truncated and not terminated and not info["success"]
    env.render_cameras = True
