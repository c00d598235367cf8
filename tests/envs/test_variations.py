"""Moved cameras and distractors: true poses, reproducible draws, and nothing else of an episode changes."""

import importlib.util

import numpy as np
import pytest

if any(importlib.util.find_spec(name) is None for name in ("gymnasium", "robosuite")):
    pytest.skip("needs the extra robot", allow_module_level=True)

from vilma.envs import make
from vilma.envs.experts import expert
from vilma.envs.robosuite import RobosuiteEnv
from vilma.envs.variations import CameraMotion

PLACEMENT = 0.12
STILL = np.array([0.5, 0.0, 1.35])


@pytest.fixture(scope="module")
def plain():
    env = make("robosuite/Lift", cameras=(), placement=PLACEMENT)
    yield env
    env.close()


@pytest.fixture(scope="module")
def varied():
    env = make(
        "robosuite/Lift", placement=PLACEMENT, camera_jitter=(0.1, 10), camera_shift="0.05", distractors=4
    )
    yield env
    env.close()


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """Degrees between two rotations."""
    return float(np.rad2deg(np.arccos(np.clip((np.trace(one.T @ other) - 1) / 2, -1, 1))))


def corners(env: RobosuiteEnv, name: str, half: float) -> np.ndarray:
    """(4, 2) corners of a cube seen from above, from the simulator's own pose of the body."""
    body = env.simulator.sim.model.body_name2id(f"{name}_main")
    rotation = env.simulator.sim.data.body_xmat[body].reshape(3, 3)[:2, :2]
    offsets = half * np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    return env.simulator.sim.data.body_xpos[body][:2] + offsets @ rotation.T


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Widest gap between two convex outlines along their edges' normals; positive means they do not touch."""
    gaps = []
    for shape in (one, other):
        for edge in np.roll(shape, -1, axis=0) - shape:
            normal = np.array([-edge[1], edge[0]]) / np.linalg.norm(edge)
            a, b = one @ normal, other @ normal
            gaps.append(max(b.min() - a.max(), a.min() - b.max()))
    return max(gaps)


def test_displacements_fill_their_ranges_and_no_more():
    motion, eye = CameraMotion((0.1, 10.0), 0.0), np.eye(3)
    drawn = [motion.move(np.zeros(3), eye, episode, "agentview") for episode in range(400)]
    lengths = np.array([np.linalg.norm(position) for position, _ in drawn])
    angles = np.array([angle(eye, rotation) for _, rotation in drawn])
    # Uniform in a ball: the share within r is (r / R)^3, so an eighth lies within half of the radius.
    for values, most in ((lengths, 0.1), (angles, 10.0)):
        assert 0.98 * most < values.max() <= most * (1 + 1e-9)
        assert 0.08 < np.mean(values < most / 2) < 0.18
    assert np.abs(np.mean([position for position, _ in drawn], axis=0)).max() < 0.01

    shifted = [CameraMotion(shift=s).move(STILL, eye, 7, "agentview") for s in (0.05, 0.1)]
    for metres, (position, rotation) in zip((0.05, 0.1), shifted):
        assert np.linalg.norm(position - STILL) == pytest.approx(metres) and position[2] == STILL[2]
        assert np.array_equal(rotation, eye)
    np.testing.assert_allclose(shifted[1][0] - STILL, 2 * (shifted[0][0] - STILL))
    around = [CameraMotion(shift=1.0).move(np.zeros(3), eye, n, "agentview")[0][:2] for n in range(200)]
    assert np.abs(np.mean(around, axis=0)).max() < 0.15
    assert not np.allclose(around[0], CameraMotion(shift=1.0).move(np.zeros(3), eye, 0, "frontview")[0][:2])


def test_the_standing_camera_moves_and_the_one_on_the_wrist_does_not(varied):
    poses, wrists = [], []
    for seed in (0, 1, 0):
        observation, _ = varied.reset(seed=seed)
        poses.append(observation["observation.pose.agentview"])
        wrists.append(observation["observation.pose.robot0_eye_in_hand"])
        assert 0.005 < np.linalg.norm(poses[-1][:3, 3] - STILL) < 0.1501, "10 cm and 5 cm together"
        np.testing.assert_allclose(poses[-1][:3, :3].T @ poses[-1][:3, :3], np.eye(3), atol=1e-6)
    assert np.array_equal(poses[0], poses[2]) and not np.allclose(poses[0], poses[1], atol=1e-3)
    still = np.array(varied._still["agentview"][1]) * [1, -1, -1]
    assert 0 < angle(poses[0][:3, :3], still) < 10.001
    carried = varied.simulator.sim.model.cam_pos[varied._camera_id("robot0_eye_in_hand")]
    np.testing.assert_allclose(carried, [0.05, 0, 0], atol=0.05)  # in the hand, where it was built
    before = varied.pose("agentview")
    varied.advance(np.zeros(7))
    assert np.array_equal(varied.pose("agentview"), before), "it stands still within an episode"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_points_of_a_moved_camera_lie_on_the_cubes(varied, seed):
    """The simulator's segmentation says which pixels show a cube, its state where that cube is."""
    varied.reset(seed=seed, options={"render": False})
    for _ in range(5):
        varied.advance(np.zeros(7))  # the target is placed a centimetre above the table
    observation = varied.observe()
    depth, k, pose = (
        observation[f"observation.{p}.agentview"].astype(float) for p in ("depth", "intrinsics", "pose")
    )
    varied._context.gl_ctx.make_current()
    sim = varied.simulator.sim
    geoms = sim.render(width=84, height=84, camera_name="agentview", segmentation=True)[::-1, :, 1]
    v, u = np.meshgrid(*(np.arange(n) + 0.5 for n in depth.shape), indexing="ij")
    rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones_like(u)], axis=-1)
    world = (rays * depth[..., None]) @ pose[:3, :3].T + pose[:3, 3]
    seen = 0
    for name in ("cube", *(cube.name for cube in varied.simulator.distractors)):
        geom = sim.model.geom_name2id(f"{name}_g0_vis")
        points, half = world[geoms == geom], sim.model.geom_size[geom]
        local = (points - sim.data.geom_xpos[geom]) @ sim.data.geom_xmat[geom].reshape(3, 3)
        if len(points):
            # On the surface of the box: the largest of the scaled coordinates is its half size.
            outside = (np.abs(local) - half).max(axis=1)
            assert np.abs(outside).max() < 2e-3, name
            seen += len(points) > 5
    assert seen >= 2


def test_distractors_are_free_of_each_other_and_never_red_or_green(varied):
    colors = []
    for seed in range(25):
        varied.reset(seed=seed, options={"render": False})
        sim = varied.simulator.sim
        half = sim.model.geom_size[sim.model.geom_name2id("cube_g0_vis")][0]
        target = corners(varied, "cube", half)
        others = [corners(varied, cube.name, 0.02) for cube in varied.simulator.distractors]
        assert len(others) == 4
        for i, one in enumerate(others):
            assert apart(one, target) > 0.03 and np.abs(one).max() < 0.2 + 0.03
            assert all(apart(one, other) > 0 for other in others[:i])
        colors += [
            sim.model.geom_rgba[sim.model.geom_name2id(f"{c.name}_g0_vis")].copy()
            for c in varied.simulator.distractors
        ]
    red, green, blue, alpha = np.array(colors).T
    assert (alpha == 1).all()
    assert not ((red > 1.35 * green) & (red > 1.35 * blue)).any(), "red"
    assert not ((green > 1.35 * red) & (green > 1.35 * blue)).any(), "green"
    assert len(np.unique(np.round(colors, 3), axis=0)) == len(colors)


def test_nothing_else_of_the_episode_changes(plain, varied):
    """The same seed gives the same robot and cube, to the bit."""
    for seed in (3, 500_000, None, None):  # also what follows without a seed
        plain.reset(seed=seed, options={"render": False})
        varied.reset(seed=seed, options={"render": False})
        ours, theirs = varied.privileged(), plain.privileged()
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            # Accelerations come out of the contact solver, which has more to solve.
            same = np.allclose if key.endswith("_acc") or "state" in key else np.array_equal
            assert same(ours[key], value), key
    states = []
    for env in (plain, varied):
        env.reset(seed=3, options={"render": False})
        states.append(env.sim_state())
    names = len(plain.simulator.sim.data.qpos)
    assert len(states[1]) == len(states[0]) + 4 * (7 + 6), "a free joint each"
    assert np.array_equal(states[1][: 1 + names], states[0][: 1 + names])


def test_episodes_are_reproducible_without_a_seed_too(varied):
    def draw(seed: int | None) -> np.ndarray:
        varied.reset(seed=seed, options={"render": False})
        return np.concatenate([varied.pose("agentview").ravel(), varied.sim_state()])

    first, second, third = draw(9), draw(None), draw(None)
    assert not np.array_equal(first, second) and not np.array_equal(second, third)
    assert np.array_equal(draw(9), first) and np.array_equal(draw(None), second)


def test_distractors_are_bodies_that_can_be_pushed(varied):
    varied.reset(seed=0, options={"render": False})
    sim, name = varied.simulator.sim, varied.simulator.distractors[0].name
    pose = sim.data.get_joint_qpos(f"{name}_joint0").copy()
    for _ in range(3):
        varied.advance(np.zeros(7))
    settled = sim.data.get_joint_qpos(f"{name}_joint0")
    np.testing.assert_allclose(settled[:3], pose[:3], atol=1e-3)  # it rests on the table
    sim.data.set_joint_qpos(f"{name}_joint0", [*pose[:2], pose[2] + 0.1, *pose[3:]])
    varied.advance(np.zeros(7))
    assert sim.data.get_joint_qpos(f"{name}_joint0")[2] < pose[2] + 0.099, "it falls"


def test_bad_options_say_what_was_wanted():
    for options, message in (
        ({"camera_jitter": 0.1}, r"camera_jitter=0.1, wanted two numbers, metres and degrees"),
        ({"camera_jitter": [0.1, 100]}, "wanted metres from 0 to 0.5 and degrees from 0 to 45"),
        ({"camera_jitter": ["a", 1]}, "camera_jitter='a', wanted a number"),
        ({"camera_shift": -0.1}, "camera_shift=-0.1, wanted 0 to 0.5 metres"),
        ({"camera_shift": float("nan")}, "camera_shift=nan, wanted a number"),
        ({"distractors": 1.5}, "distractors=1.5, wanted a whole number"),
        ({"distractors": 9}, "9 distractors, wanted 0 to 8"),
        ({"distractor": 2}, "did you mean 'distractors'"),
    ):
        with pytest.raises(ValueError, match=message):
            make("robosuite/Lift", cameras=(), **options)
    with pytest.raises(ValueError, match="PickPlaceCan has no free table"):
        make("robosuite/PickPlaceCan", cameras=(), distractors=2)


@pytest.mark.long
@pytest.mark.parametrize("task", ["robosuite/Lift", "robosuite/Stack"])
def test_experts_succeed_among_distractors(task):
    options = {"placement": PLACEMENT} if task == "robosuite/Lift" else {}
    env = make(task, cameras=(), distractors=3, **options)
    try:
        demonstrator, won = expert(task, env), 0
        for seed in range(10):
            env.reset(seed=seed)
            demonstrator.reset()
            ended = False
            while not ended:
                _, _, success, truncated, _ = env.step(demonstrator.act())
                ended = success or truncated
            won += success
        assert won >= 9
    finally:
        env.close()
