"""MetaWorld behind the house's contract: exact cameras, seeded episodes, a scripted policy in the runner."""

import json

import numpy as np
import pytest

from vilma.envs import find_tasks, make, scripted_policy

pytest.importorskip("metaworld")


@pytest.fixture(scope="module")
def env():
    env = make(
        "metaworld/pick-place-v3", cameras=["topview", "corner2", "gripperPOV"], size=64, privileged=True
    )
    yield env
    env.close()


def points(observation, camera):
    """(H, W, 3) in the world, straight from the contract's definition."""
    depth = observation[f"observation.depth.{camera}"].astype(np.float64)
    k, pose = observation[f"observation.intrinsics.{camera}"], observation[f"observation.pose.{camera}"]
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]] + 0.5
    local = np.stack([(u - k[0, 2]) / k[0, 0] * depth, (v - k[1, 2]) / k[1, 1] * depth, depth], -1)
    return local @ pose[:3, :3].T + pose[:3, 3]


def test_the_table_is_a_plane_and_the_puck_lies_where_the_simulator_says(env):
    observation, _ = env.reset(seed=3)
    assert env.observation_space.contains(observation)
    for camera, least in (("topview", 1500), ("gripperPOV", 2000)):
        height = points(observation, camera)[..., 2]
        assert (np.abs(height) < 1e-5).sum() > least, "the top of the table is at 0, to 10 micrometres"
    # Between the table and the fingers the puck is all that the hand's camera sees.
    puck = observation["observation.environment_state"][4:7]
    cloud = points(observation, "gripperPOV")
    standing = cloud[(cloud[..., 2] > 0.01) & (cloud[..., 2] < 0.06)]
    assert len(standing) > 20 and np.abs(standing[:, :2].mean(0) - puck[:2]).max() < 0.005


def test_a_seed_gives_the_episode_whatever_ran_before(env):
    actions = np.random.default_rng(0).uniform(-1, 1, (12, 4))

    def play(seed):
        env.reset(seed=seed)
        env.render_cameras = False
        return np.array([env.step(action)[0]["observation.environment_state"] for action in actions])

    first = play(7)
    assert not np.allclose(play(8)[0], first[0])
    assert np.array_equal(play(7), first)


def test_unseen_steps_render_nothing_and_episodes_end(env):
    env.reset(seed=1)
    env.render_cameras = False
    observation, *_ = env.step(np.zeros(4))
    assert not observation["observation.images.corner2"].any()
    assert observation["observation.pose.corner2"].any()
    truncated, steps = False, 1
    while not truncated:
        _, _, terminated, truncated, info = env.step(np.zeros(4))
        steps += 1
    assert steps == 500 and not terminated and not info["success"]
    with pytest.raises(ValueError, match="wanted 4 finite numbers"):
        env.step(np.zeros(7))


def test_wrong_names_are_answered():
    with pytest.raises(ValueError, match="unknown camera 'corner9'; metaworld/reach-v3 has: corner"):
        make("metaworld/reach-v3", cameras=["corner9"])
    with pytest.raises(ValueError, match="unknown option 'placement'"):
        make("metaworld/reach-v3", placement=0.1)
    with pytest.raises(ValueError, match="no scripted policy"):
        scripted_policy("robosuite/Lift")
    assert len(find_tasks("metaworld")) == 50
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    assert {task.name for task in find_tasks("metaworld")} == {f"metaworld/{n}" for n in ALL_V3_ENVIRONMENTS}


@pytest.mark.long
def test_the_scripted_policy_through_the_runner(tmp_path, monkeypatch, capfd):
    from vilma.tools import eval as tool

    monkeypatch.chdir(tmp_path)
    assert tool.main(["metaworld/pick-place-v3", "expert", "--episodes", "10"]) == 0
    result = json.loads((tmp_path / "eval" / "metaworld_pick-place-v3_expert.json").read_text())
    assert result["summary"]["successes"] == 10 and not result["incidents"]
    assert len({e["steps"] for e in result["episodes"]}) > 3, "every seed is another episode"
    assert result["description"]["versions"]["metaworld"]
    assert "warn" not in capfd.readouterr().err.lower()
