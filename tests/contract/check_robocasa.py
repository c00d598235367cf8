"""Runs beside RoboCasa 1.0.1 or 0.2, on the kitchen of `robocasa_kitchen.py`: does it keep our contract?

Prints a line for each thing with figure, target, met or missed. Not a benchmark.
"""

import gzip
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import served

from vilma.datasets.robocasa import open_demos
from vilma.envs import find_task, make
from vilma.envs.robocasa import RoboCasaEnv
from vilma.envs.robocasa_install import installed_version
from vilma.targets import Line, show
from vilma.tools import add_depth

CAMERAS = ("robot0_agentview_left", "robot0_agentview_right", "robot0_eye_in_hand")
COUNTER = 0.92
MODERN = not (installed_version() or "").startswith("0.")
TASK, SCENE = ("robocasa365/OpenDrawer", [1, 1]) if MODERN else ("robocasa/OpenDrawer", [0, 0])


def main() -> int:
    env = make(TASK, size=128, scenes=[SCENE])
    mobile = make(TASK, cameras=(), base="mobile", scenes=[SCENE])
    with tempfile.TemporaryDirectory() as folder:
        status = show(lines(env, mobile, Path(folder)))
    env.close()
    mobile.close()
    options = ("--env.horizon", "12", "--env.scenes", str([SCENE]))
    line = served.evaluate(sys.argv[1], Path(sys.argv[2]), TASK, CAMERAS, "base", *options)
    return show([line]) or status


def lines(env: RoboCasaEnv, mobile: RoboCasaEnv, folder: Path) -> Iterator[Line]:
    observation, _ = env.reset(seed=0)
    yield keys(env, observation)
    yield from (plane(env, observation, camera) for camera in CAMERAS)
    yield seeded(env)
    yield action_layout(env)
    yield arm_moves(env)
    yield base_stays_or_drives(env, mobile)
    yield success_hold(env)
    yield from replayed(env, folder)


def keys(env: RoboCasaEnv, observation: dict) -> Line:
    shapes = {}
    for camera in CAMERAS:
        shapes |= {
            f"observation.images.{camera}": ((3, 128, 128), np.uint8),
            f"observation.depth.{camera}": ((128, 128), np.float32),
            f"observation.intrinsics.{camera}": ((3, 3), np.float32),
            f"observation.pose.{camera}": ((4, 4), np.float32),
        }
    shapes["observation.state"] = ((9,), np.float32)
    found = {k: (v.shape, v.dtype.type) for k, v in observation.items() if k != "task"}
    inside = env.observation_space.contains(observation)
    text = f"{len(found)} arrays, task {observation['task']!r}, within its space: {inside}"
    met = found == shapes and inside
    return Line("observation keys, shapes, dtypes", text, "those of the contract", met)


def plane(env: RoboCasaEnv, observation: dict, camera: str) -> Line:
    depth = observation[f"observation.depth.{camera}"].astype(np.float64)
    k, pose = observation[f"observation.intrinsics.{camera}"], observation[f"observation.pose.{camera}"]
    v, u = np.mgrid[:128, :128] + 0.5
    local = np.stack([(u - k[0, 2]) / k[0, 0] * depth, (v - k[1, 2]) / k[1, 1] * depth, depth], -1)
    points = local @ pose[:3, :3].T + pose[:3, 3]
    base = env.base_pose()
    points = points @ base[:3, :3].T + base[:3, 3]
    x, y, height = np.moveaxis(points, -1, 0)
    # Inside the counter, away from its edges, nothing stands on it but what hangs above: the arm.
    inside = (x > 1.95) & (x < 3.2) & (y > -0.55) & (y < -0.1) & (np.abs(height - COUNTER) < 0.02)
    error = np.abs(height[inside] - COUNTER)
    worst = 1e3 * error.max() if error.size else np.inf
    figure = f"{error.size} pixels, at most {worst:.4f} mm off"
    return Line(f"{camera}: top of the counter", figure, "flat within 1 mm", error.size > 100 and worst < 1)


def seeded(env: RoboCasaEnv) -> Line:
    states = []
    for seed in (4, 5, 4):
        env.reset(seed=seed, options={"render": False})
        states.append(env.sim_state())
    same, differs = np.array_equal(states[0], states[2]), not np.array_equal(states[0], states[1])
    figure = f"equal: {same}, another seed differs: {differs}"
    return Line("a seed gives the episode", figure, "both", same and differs)


def action_layout(env: RoboCasaEnv) -> Line:
    controller = env.simulator.robots[0].composite_controller
    parts = {name: tuple(int(n) for n in place) for name, place in controller._action_split_indexes.items()}
    wanted = {"right": (0, 6), "right_gripper": (6, 7), "base": (7, 10), "torso": (10, 11)}
    size = env.simulator.action_dim
    return Line("action layout", f"{size} numbers, {parts}", f"12, {wanted}", size == 12 and parts == wanted)


def arm_moves(env: RoboCasaEnv) -> Line:
    """Five full steps along each axis of the base frame."""
    moved = []
    for axis in range(3):
        env.reset(seed=1, options={"render": False})
        env.render_cameras = False
        start = env.simulator._get_observations(force_update=True)["robot0_base_to_eef_pos"].copy()
        action = np.zeros(7)
        action[axis] = -1 if axis == 0 else 1
        for _ in range(5):
            env.step(action)
        end = env.simulator._get_observations(force_update=True)["robot0_base_to_eef_pos"]
        step = (end - start) * (-1 if axis == 0 else 1)
        moved.append(step)
    figure = ", ".join(f"{'xyz'[i]} {1e3 * step[i]:.0f} mm" for i, step in enumerate(moved))
    met = all(step[i] > 0.03 and step[i] == np.abs(step).max() for i, step in enumerate(moved))
    return Line("arm numbers 0-2 move the hand in the base frame", figure, "each its own axis", met)


def base_stays_or_drives(env: RoboCasaEnv, mobile: RoboCasaEnv) -> Line:
    def drift(one: RoboCasaEnv, action: np.ndarray) -> float:
        one.reset(seed=2, options={"render": False})
        one.render_cameras = False
        before = one.base_pose()[:3, 3].copy()
        for _ in range(10):
            one.step(action)
        return float(np.linalg.norm(one.base_pose()[:3, 3] - before))

    arm = np.array([-1.0, 0, 0, 0, 0, 0, 1])
    drive = np.array([0.0, 0, 0, 0, 0, 0, -1, -1, 0, 0, 0, 1])
    fixed, driven = drift(env, arm), drift(mobile, drive)
    figure = f"fixed {1e3 * fixed:.2f} mm, driven {1e3 * driven:.0f} mm in ten steps"
    return Line(
        "seven numbers leave the base where it is", figure, "< 2 mm, > 50 mm", fixed < 2e-3 and driven > 0.05
    )


def success_hold(env: RoboCasaEnv) -> Line:
    """The drawer is opened from outside; one step with it shut begins the count anew."""
    env.reset(seed=3, options={"render": False})
    env.render_cameras = False
    hold, sim_env, still = find_task(TASK).hold, env.simulator, np.zeros(7)
    counts, ended = [], []
    for shut_at in (5, None):
        count, done = 0, False
        while not done and count < 40:
            value = 0.0 if count == shut_at else 1.0
            rng = () if MODERN else (sim_env.rng,)
            sim_env.drawer.set_door_state(value, value, sim_env, *rng)
            sim_env.sim.forward()
            _, _, done, _, info = env.step(still)
            count += 1
        counts.append(count)
        ended.append(info["success"])
        env.reset(seed=3, options={"render": False})
    wanted = [5 + 1 + hold, hold]
    figure = f"{counts[1]} steps; with one lost at the sixth {counts[0]}"
    return Line("success is held", figure, f"{wanted[1]} and {wanted[0]}", counts == wanted and all(ended))


def replayed(env: RoboCasaEnv, folder: Path) -> Iterator[Line]:
    """A short recording in both layouts; its replay beside what the environment saw."""
    env.render_cameras = True
    env.reset(seed=6)
    model, meta = env.simulator.sim.model.get_xml(), env.simulator.get_ep_meta()
    seen, states, actions = [], [], []
    rng = np.random.default_rng(0)
    for _ in range(4):
        # A step leaves kinematics one physics step behind the state that a recording keeps.
        env.simulator.sim.forward()
        seen.append(env.observe())
        states.append(env.sim_state())
        actions.append(np.concatenate([rng.uniform(-1, 1, 7), [0, 0, 0, 0, -1]]))
        env.step(actions[-1][:7])
    states, actions = np.array(states), np.array(actions)
    sources = {"0.2": write_hdf5(folder / "demo.hdf5", model, meta, states, actions)}
    if MODERN:
        sources["1.x"] = write_lerobot(folder / "v1", model, meta, states, actions)
    for version, source in sources.items():
        out = folder / f"{version}.hdf5"
        add_depth.main([str(source), "--out", str(out)])
        demo = next(iter(open_demos(source)))
        equal = np.array_equal(demo.actions, actions) and np.array_equal(demo.states, states)
        with h5py.File(out) as file:
            obs = file["data/demo_0/obs"]
            off = max(
                np.mean(np.abs(obs[f"{c}_depth"][t, ..., 0] - seen[t][f"observation.depth.{c}"]) > 1e-3)
                for c in CAMERAS
                for t in range(4)
            )
            poses = max(
                np.abs(obs[f"{c}_extrinsic"][t] - seen[t][f"observation.pose.{c}"]).max()
                for c in CAMERAS
                for t in range(4)
            )
            size = file["data/demo_0/actions"].shape[1]
        figure = (
            f"{100 * (1 - off):.2f} % of depth within 1 mm, poses within {1e3 * poses:.4f} mm, "
            f"{size} numbers an action"
        )
        target = "read back equal; > 99 %, < 0.01 mm, 7"
        met = equal and off < 0.01 and poses < 1e-5 and size == 7
        yield Line(f"layout of {version} replayed", figure, target, met)


def write_hdf5(path: Path, model: str, meta: dict, states: np.ndarray, actions: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_1")
        demo["actions"], demo["states"] = actions, states
        demo["obs/robot0_gripper_qpos"] = np.zeros((len(actions), 2))
        demo.attrs["num_samples"] = len(actions)
        demo.attrs["model_file"], demo.attrs["ep_meta"] = model, json.dumps(meta)
        arguments = {"env_name": "OpenDrawer", "type": 1, "env_kwargs": {"control_freq": 20}}
        file["data"].attrs["env_args"] = json.dumps(arguments)
    return path


def write_lerobot(root: Path, model: str, meta: dict, states: np.ndarray, actions: np.ndarray) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import robocasa

    extras = root / "extras" / "episode_000000"
    (root / "meta").mkdir(parents=True)
    extras.mkdir(parents=True)
    shipped = Path(robocasa.__file__).parent / "models/assets/groot_dataset_assets/PandaOmron_modality.json"
    (root / "meta" / "modality.json").write_text(shipped.read_text())
    count = len(actions)
    info = {
        "codebase_version": "v2.1",
        "fps": 20,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "features": {
            "observation.state": {"dtype": "float64", "shape": [16]},
            "action": {"dtype": "float64", "shape": [12]},
        },
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    entry = {"episode_index": 0, "tasks": [meta["lang"]], "length": count}
    (root / "meta" / "episodes.jsonl").write_text(json.dumps(entry) + "\n")
    arm, base, mode = actions[:, :7], actions[:, 7:11], actions[:, 11:]
    table = {
        "observation.state": np.zeros((count, 16)).tolist(),
        "action": np.hstack([base, mode, arm]).tolist(),
        "frame_index": list(range(count)),
        "episode_index": [0] * count,
    }
    data = root / "data" / "chunk-000" / "episode_000000.parquet"
    data.parent.mkdir(parents=True)
    pq.write_table(pa.table(table), data)
    np.savez_compressed(extras / "states.npz", states=states)
    (extras / "model.xml.gz").write_bytes(gzip.compress(model.encode()))
    (extras / "ep_meta.json").write_text(json.dumps(meta))
    return root


if __name__ == "__main__":
    sys.exit(main())
