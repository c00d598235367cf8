"""The scripted experts on fixed seeds, and what they record. No OpenGL except where pictures are recorded."""

import importlib.util

import numpy as np
import pytest

if any(importlib.util.find_spec(name) is None for name in ("gymnasium", "robosuite")):
    pytest.skip("needs the extra robot", allow_module_level=True)

from vilma.envs import make
from vilma.envs.experts import EXPERT_TASKS, STARTS, Expert, expert, record_episode
from vilma.envs.robosuite import RobosuiteEnv


@pytest.fixture(scope="module")
def lift():
    env = make("robosuite/Lift", cameras=(), placement=0.12)
    yield env
    env.close()


def solve(env: RobosuiteEnv, demonstrator: Expert, seed: int) -> tuple[bool, int]:
    """Success and steps of one episode without noise."""
    env.reset(seed=seed)
    demonstrator.reset()
    steps, ended = 0, False
    while not ended:
        action = demonstrator.act()
        assert action.shape == (7,) and np.abs(action).max() <= 1
        _, _, success, truncated, _ = env.step(action)
        steps, ended = steps + 1, success or truncated
    return success, steps


def test_lift(lift):
    results = [solve(lift, expert("robosuite/Lift", lift), seed) for seed in range(3)]
    assert all(success for success, _ in results)
    assert max(steps for _, steps in results) < 60


def test_placing_the_can():
    env = make("robosuite/PickPlaceCan", cameras=())
    try:
        assert solve(env, expert("robosuite/PickPlaceCan", env), 0)[0]
        with pytest.raises(ValueError, match="bins"):
            env._set_placement(0.1)
    finally:
        env.close()


def test_stacking_evades_a_finger_on_the_other_cube():
    # At seed 18 the cubes touch, and the nearest faces of one cannot be reached past the other.
    env = make("robosuite/Stack", cameras=())
    try:
        demonstrator = expert("robosuite/Stack", env)
        assert solve(env, demonstrator, 0)[0]
        assert solve(env, demonstrator, 18)[0] and demonstrator.face is not None
    finally:
        env.close()


@pytest.mark.long
@pytest.mark.parametrize(
    "task, options", [(t, {}) for t in EXPERT_TASKS] + [("robosuite/Lift", {"placement": 0.12})]
)
def test_nineteen_of_twenty(task, options):
    env = make(task, cameras=(), **options)
    try:
        demonstrator = expert(task, env)
        assert sum(solve(env, demonstrator, seed)[0] for seed in range(20)) >= 19
    finally:
        env.close()


def test_no_expert_is_a_clear_error(lift):
    with pytest.raises(ValueError, match=r"no scripted expert for 'robosuite/Door'.*robosuite/Lift"):
        expert("robosuite/Door", lift)


def test_a_missed_grasp_is_tried_again(lift):
    demonstrator = expert("robosuite/Lift", lift)
    lift.reset(seed=1)
    cube = np.array(lift.privileged()["cube_pos"])
    demonstrator.reset(aim=cube + [0.07, 0.0, -0.01])
    phases = []
    while demonstrator.phase != "above" or "lift" not in phases:
        phases.append(demonstrator.phase)
        lift.advance(demonstrator.act())
        assert len(phases) < 100
    assert phases[-1] == "lift" and phases.count("lift") > 5
    assert not demonstrator.holds_object()
    demonstrator.aim = None
    for _ in range(60):
        lift.advance(demonstrator.act())
        if lift.simulator._check_success():
            break
    assert lift.simulator._check_success() and demonstrator.holds_object()


def test_without_noise_the_recorded_commands_replay_to_the_bit(lift):
    episode = record_episode(lift, expert("robosuite/Lift", lift), 2, noise=0.0)
    lift.reset(seed=2)
    for t, action in enumerate(episode["actions"]):
        assert np.array_equal(lift.sim_state(), episode["states"][t])
        assert np.array_equal(lift.proprioception()["robot0_eef_pos"], episode["obs"]["robot0_eef_pos"][t])
        success = lift.step(action)[2]
    assert success
    assert episode["rewards"][-1] == 1.0 and episode["dones"].tolist() == [0] * t + [1]


@pytest.mark.parametrize("start", STARTS)
def test_noise_moves_the_states_and_not_the_labels(lift, start):
    demonstrator = expert("robosuite/Lift", lift)
    calm = record_episode(lift, demonstrator, 3, start, noise=0.0)
    noisy = record_episode(lift, demonstrator, 3, start, noise=0.4)
    again = record_episode(lift, demonstrator, 3, start, noise=0.4)
    assert np.array_equal(noisy["states"], again["states"]), "an episode is given by its seed"
    assert np.array_equal(noisy["states"][0], calm["states"][0])
    assert np.array_equal(noisy["actions"][0], calm["actions"][0])
    assert np.abs(noisy["states"][1] - calm["states"][1]).max() > 1e-4
    # The expert never commands roll or pitch; the noise does.
    assert not noisy["actions"][:, 3:5].any()
    assert set(np.unique(noisy["actions"][:, 6])) <= {-1.0, 1.0}


def test_starts_differ(lift):
    demonstrator = expert("robosuite/Lift", lift)
    rest = np.array([-0.1, 0.0, 1.01])
    begin: dict[str, list[np.ndarray]] = {start: [] for start in STARTS}
    for start in STARTS:
        for seed in range(2):
            episode = record_episode(lift, demonstrator, seed, start, noise=0.1)
            if episode is not None:
                begin[start].append(episode["obs"]["robot0_eef_pos"][0])
    assert np.abs(np.array(begin["plain"]) - rest).max() < 0.05
    assert all(hand[2] < 0.95 for hand in begin["missed"]), "it was grasping"
    assert np.abs(np.array(begin["moved"]) - rest).max() > 0.05
    assert all(begin.values())


def test_recorded_pictures():
    env = make("robosuite/Lift", cameras=("agentview",), size=48)
    try:
        episode = record_episode(env, expert("robosuite/Lift", env), 1, noise=0.1)
        length, obs = len(episode["actions"]), episode["obs"]
        shapes = {name: (value.shape, value.dtype) for name, value in obs.items() if "agentview" in name}
        assert shapes == {
            "agentview_image": ((length, 48, 48, 3), np.uint8),
            "agentview_depth": ((length, 48, 48, 1), np.float32),
            "agentview_intrinsic": ((length, 3, 3), np.float32),
            "agentview_extrinsic": ((length, 4, 4), np.float32),
        }
        assert obs["agentview_image"].std(axis=(1, 2, 3)).min() > 5
        assert {name for name in obs if not name.startswith("agentview")} == {"object"} | {
            f"robot0_{name}"
            for name in [
                "eef_pos",
                "eef_quat",
                "eef_rot6d",
                "gripper_qpos",
                "gripper_qvel",
                "joint_pos",
                "joint_vel",
            ]
        }
        assert all(len(value) == length for value in obs.values())
        assert episode["states"].shape == (length, 32)
    finally:
        env.close()
