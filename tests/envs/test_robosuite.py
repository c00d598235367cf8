"""The robosuite environment: exact cameras, reproducible episodes, guarded frames.

One Lift environment serves most tests; pixels are attributed by the simulator's own segmentation, so colour
and depth are judged by something that neither of them produced.
"""

import dataclasses
import functools
import gc
import importlib.util

import numpy as np
import pytest

pytest.importorskip("gymnasium")
if importlib.util.find_spec("robosuite") is None:
    pytest.skip("needs the extra robot", allow_module_level=True)

from vilma.envs import make
from vilma.envs.robosuite import RenderError, RobosuiteEnv, _checked_frame

CAMERAS = ("agentview", "robot0_eye_in_hand")
TABLE = 0.8


@pytest.fixture(scope="module")
def lift():
    env = make("robosuite/Lift")
    yield env
    env.close()


def segmentation(env: RobosuiteEnv, camera: str) -> np.ndarray:
    """(H, W) geom index of every pixel, -1 for none, top row first."""
    env._context.gl_ctx.make_current()
    size = env.size
    pixels = env.simulator.sim.render(width=size, height=size, camera_name=camera, segmentation=True)
    return pixels[::-1, :, 1]


def points(observation: dict, camera: str) -> np.ndarray:
    """(H, W, 3) world points by the pinhole equations, in float64."""
    depth = observation[f"observation.depth.{camera}"].astype(np.float64)
    k = observation[f"observation.intrinsics.{camera}"].astype(np.float64)
    pose = observation[f"observation.pose.{camera}"].astype(np.float64)
    v, u = np.meshgrid(*(np.arange(n) + 0.5 for n in depth.shape), indexing="ij")
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], axis=-1)
    return (rays * depth[..., None]) @ pose[:3, :3].T + pose[:3, 3]


def project(observation: dict, camera: str, point: np.ndarray) -> tuple[int, int]:
    """Row and column of the pixel that a world point falls into."""
    pose = observation[f"observation.pose.{camera}"].astype(np.float64)
    x, y, z = observation[f"observation.intrinsics.{camera}"] @ (pose[:3, :3].T @ (point - pose[:3, 3]))
    return int(y / z), int(x / z)


def inside(mask: np.ndarray) -> np.ndarray:
    """Pixels whose eight neighbours belong to the mask too."""
    padded = np.pad(mask, 1)
    shifts = [padded[i : i + mask.shape[0], j : j + mask.shape[1]] for i in range(3) for j in range(3)]
    return np.logical_and.reduce(shifts)


def settled(env: RobosuiteEnv, seed: int) -> dict:
    """An observation with the cube at rest on the table (it is placed a centimetre above)."""
    env.reset(seed=seed, options={"render": False})
    for _ in range(5):
        env.advance(np.zeros(7))
    return env.observe()


def test_observations_follow_the_contract(lift):
    observation, info = lift.reset(seed=3)
    assert lift.observation_space.contains(observation) and info == {"success": False}
    assert set(observation) == {
        f"observation.{k}.{c}" for c in CAMERAS for k in ("images", "depth", "intrinsics", "pose")
    } | {"observation.state", "task"}
    assert observation["observation.state"].shape == (11,) and observation["task"] == "lift the red cube"
    raw, state = lift.privileged(), observation["observation.state"]
    np.testing.assert_allclose(state[:3], raw["robot0_eef_pos"], atol=1e-6)
    np.testing.assert_allclose(state[9:], raw["robot0_gripper_qpos"], atol=1e-6)
    # The two columns of a rotation: unit, orthogonal, and the third one points down, as the gripper at rest.
    first, second = state[3:6], state[6:9]
    np.testing.assert_allclose([first @ first, second @ second, first @ second], [1, 1, 0], atol=1e-5)
    assert np.cross(first, second)[2] < -0.95
    x, y, z, w = raw["robot0_eef_quat_site"]
    np.testing.assert_allclose(
        first, [1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)], atol=1e-5
    )


def test_gymnasium_accepts_the_environment(lift):
    from gymnasium.utils.env_checker import check_env

    check_env(lift, skip_render_check=True, skip_close_check=True)


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("seed", [0, 1])
def test_table_pixels_lie_on_the_table(lift, camera, seed):
    observation = settled(lift, seed)
    geoms = segmentation(lift, camera)
    table = inside(geoms == lift.simulator.sim.model.geom_name2id("table_visual"))
    heights = points(observation, camera)[table][:, 2]
    assert len(heights) > 2000
    assert np.abs(heights - TABLE).max() < 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cameras_agree_on_the_cube(lift, seed):
    observation = settled(lift, seed)
    geom = lift.simulator.sim.model.geom_name2id("cube_g0_vis")
    half = lift.simulator.sim.model.geom_size[geom][2]
    cube = lift.privileged()["cube_pos"]
    centroids = {}
    for camera in CAMERAS:
        cloud = points(observation, camera)[segmentation(lift, camera) == geom]
        top = cloud[np.abs(cloud[:, 2] - (cube[2] + half)) < 1e-3]
        assert len(top) > 20
        centroids[camera] = top.mean(axis=0)
    assert np.linalg.norm(centroids["agentview"] - centroids["robot0_eye_in_hand"]) < 4e-3
    for centroid in centroids.values():
        assert np.linalg.norm(centroid - (cube + [0, 0, half])) < 4e-3


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("place", [(0.03, 0.1), (-0.03, -0.1)])
def test_the_cube_is_red_where_the_matrices_say(lift, camera, place):
    lift.reset(seed=4)
    sim = lift.simulator.sim
    sim.data.set_joint_qpos("cube_joint0", [*place, 0.821, 1, 0, 0, 0])
    sim.forward()
    observation = lift.observe()
    image = observation[f"observation.images.{camera}"].astype(int)

    def is_red(row: int, column: int) -> bool:
        red, green, blue = image[:, row, column]
        return red > 2 * max(green, blue)

    row, column = project(observation, camera, np.array([*place, 0.821]))
    assert is_red(row, column)
    mirrored = lift.size - 1 - row, lift.size - 1 - column
    far = [abs(mirrored[0] - row) > 12, abs(mirrored[1] - column) > 12]
    assert any(far), "a centred cube tells nothing about mirroring"
    assert not (far[0] and is_red(mirrored[0], column)) and not (far[1] and is_red(row, mirrored[1]))


def test_leaving_out_what_is_out_of_view_changes_no_pixel(lift, monkeypatch):
    rng = np.random.default_rng(0)
    lift.reset(seed=5)
    hidden = []
    for _ in range(6):
        for _ in range(5):
            lift.advance(rng.uniform(-1, 1, 7))
        fast = lift.observe()
        hidden.append([int(lift._out_of_view(camera).sum()) for camera in CAMERAS])
        with monkeypatch.context() as patch:
            patch.setattr(lift, "_out_of_view", lambda camera: np.zeros(lift.simulator.sim.model.ngeom, bool))
            full = lift.observe()
        for key, value in full.items():
            assert np.array_equal(fast[key], value), key
    assert np.min(hidden) > 10, "the test must leave something out"


def test_a_seed_gives_the_episode_whatever_ran_before(lift):
    def play(env: RobosuiteEnv, seed: int | None) -> tuple[dict, np.ndarray]:
        first, _ = env.reset(seed=seed)
        states = [env.sim_state()]
        for action in np.random.default_rng(0).uniform(-1, 1, (5, 7)):
            env.advance(action)
            states.append(env.sim_state())
        return first, np.array(states)

    first, states = play(lift, 11)
    other, other_states = play(lift, 12)
    assert not np.array_equal(states[0], other_states[0])
    again, again_states = play(lift, 11)
    assert np.array_equal(states, again_states)
    for key, value in first.items():
        assert np.array_equal(again[key], value), key
    assert not np.array_equal(first["observation.images.agentview"], other["observation.images.agentview"])

    elsewhere = make("robosuite/Lift", cameras=(), seed=11)
    try:
        assert np.array_equal(play(elsewhere, None)[1], states), "the seed of make is that of the first reset"
        unseeded = play(elsewhere, None)[1]
        assert not np.array_equal(unseeded[0], states[0])
        assert np.array_equal(play(elsewhere, 11)[1], states)
    finally:
        elsewhere.close()


def test_placement_is_as_wide_as_asked():
    env = make("robosuite/Lift", cameras=(), placement=0.12)
    try:
        places = []
        for seed in range(60):
            env.reset(seed=seed)
            places.append(env.privileged()["cube_pos"][:2])
        assert 0.09 < np.abs(places).max() < 0.1201
        assert np.min(np.abs(places).max(axis=0)) > 0.09, "wide along both axes"
    finally:
        env.close()


def test_success_must_be_held(lift, monkeypatch):
    lift.reset(seed=0, options={"render": False})
    monkeypatch.setattr(lift, "render_cameras", False)
    answers = iter([True] * 4 + [False] + [True] * 5)
    monkeypatch.setattr(lift.simulator, "_check_success", lambda: next(answers))
    monkeypatch.setattr(lift.simulator, "reward", lambda action: 0.0)  # it asks too
    ends = [lift.step(np.zeros(7))[2:] for _ in range(10)]
    assert [terminated for terminated, _, _ in ends] == [False] * 9 + [True]
    assert [info["success"] for *_, info in ends] == [False] * 9 + [True]


def test_the_horizon_truncates(lift, monkeypatch):
    monkeypatch.setattr(lift, "task", dataclasses.replace(lift.task, horizon=3))
    monkeypatch.setattr(lift, "render_cameras", False)
    lift.reset(seed=0, options={"render": False})
    lift.advance(np.zeros(7))
    ends = [lift.step(np.zeros(7))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


def test_unseen_steps_are_not_rendered(lift, monkeypatch):
    monkeypatch.setattr(lift, "render_cameras", False)
    observation, _ = lift.reset(seed=0)
    assert observation["observation.images.agentview"].std() > 5, "a reset is always looked at"
    with monkeypatch.context() as patch:
        patch.setattr(lift, "_render", lambda *_: pytest.fail("rendered"))
        observation = lift.step(np.zeros(7))[0]
    assert lift.observation_space.contains(observation)
    for camera in CAMERAS:
        assert not observation[f"observation.images.{camera}"].any()
        assert not observation[f"observation.depth.{camera}"].any()
        assert observation[f"observation.intrinsics.{camera}"][0, 0] > 1
    assert observation["observation.state"].any()


def test_two_live_environments_do_not_draw_into_each_other(lift):
    alone = settled(lift, 6)
    other = make("robosuite/Stack", size=64)
    theirs, _ = other.reset(seed=0)
    between = lift.observe()
    assert all(np.array_equal(between[key], alone[key]) for key in alone)
    assert np.array_equal(
        other.observe()["observation.images.agentview"], theirs["observation.images.agentview"]
    )
    other.close()
    del other
    gc.collect()
    after = lift.observe()
    assert all(np.array_equal(after[key], alone[key]) for key in alone)


def test_a_hard_reset_behind_the_environment_raises():
    env = make("robosuite/Lift")
    env.reset(seed=0)
    env.simulator.hard_reset = True
    env.simulator.reset()
    gc.collect()
    with pytest.raises(RenderError, match="hard reset"):
        env.observe()
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.step(np.zeros(7))


def test_garbage_frames_raise():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    zbuffer = rng.uniform(0.98, 1.0, (8, 8)).astype(np.float32)
    pixels, depth = _checked_frame(image, zbuffer, "cam", 0.01, 100.0)
    assert pixels.shape == (3, 8, 8) and depth.dtype == np.float32
    # The z-buffer's own definition: z = (1/near - 1/d) / (1/near - 1/far).
    np.testing.assert_allclose((100 - 1 / depth) / (100 - 0.01), zbuffer, rtol=1e-6)
    for bad in (np.nan, 1e22, 0.004, -0.1, np.inf):
        spoiled = zbuffer.copy()
        spoiled[3, 3] = bad
        with pytest.raises(RenderError, match="cam"):
            _checked_frame(image, spoiled, "cam", 0.01, 100.0)
    with pytest.raises(RenderError, match="deviation"):
        _checked_frame(np.full_like(image, 7), zbuffer, "cam", 0.01, 100.0)


def test_bad_input_says_what_was_wanted(lift):
    for action in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="7 finite numbers"):
            lift.step(action)
    with pytest.raises(ValueError, match="image size of 0"):
        make("robosuite/Lift", size=0)
    with pytest.raises(ValueError, match=r"unknown camera 'agentvew'.*agentview"):
        make("robosuite/Lift", cameras=("agentvew",))
    with pytest.raises(ValueError, match="unknown state key 'cube_pos'"):
        make("robosuite/Lift", cameras=(), state_keys=("robot0_eef_pos", "cube_pos"))
    with pytest.raises(ValueError, match="half width"):
        make("robosuite/Lift", cameras=(), placement=3.0)


def test_pictures_of_other_sizes(lift):
    lift.reset(seed=0)
    small, large = lift.render(), lift.render("frontview", 120)
    assert small.shape == (84, 84, 3) and large.shape == (120, 120, 3) and small.dtype == np.uint8


@pytest.mark.long
def test_vectorised_with_strings_and_an_attribute_per_row():
    from gymnasium.vector import AsyncVectorEnv

    lift = functools.partial(make, "robosuite/Lift", size=32)
    makers = [functools.partial(lift, seed=seed) for seed in (0, 1)]
    envs = AsyncVectorEnv(makers, shared_memory=False, context="spawn")
    try:
        observation, _ = envs.reset(seed=[7, 8])
        assert observation["task"] == ("lift the red cube",) * 2
        assert observation["observation.images.agentview"].shape == (2, 3, 32, 32)
        envs.set_attr("render_cameras", [True, False])
        observation, _, _, _, info = envs.step(np.zeros((2, 7), np.float32))
        assert [bool(image.any()) for image in observation["observation.images.agentview"]] == [True, False]
        assert observation["task"] == ("lift the red cube",) * 2 and not info["success"].any()
    finally:
        envs.close()
