"""Runs beside robomimic 0.3.0: its SequenceDataset reads our file, we read its, its loop runs our policy.

The environment shares torch and the simulator with vilma's own (robomimic is installed without dependencies).
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import robomimic
import robomimic.utils.obs_utils as obs_utils
from robomimic.envs.env_base import EnvBase
from robomimic.utils.dataset import SequenceDataset
from robomimic.utils.train_utils import run_rollout

import vilma.envs
from vilma.datasets.robomimic import RobomimicConfig, RobomimicDataset
from vilma.envs.robomimic import rollout_policy
from vilma.policies import load_policy
from vilma.targets import ROOT, Line, show

CAMERAS = ("agentview", "robot0_eye_in_hand")
LOW = ["robot0_eef_pos", "robot0_gripper_qpos", "object"]
STATE = ("robot0_eef_pos", "robot0_eef_rot6d", "robot0_gripper_qpos")


def main() -> int:
    path = Path(sys.argv[1])
    rgb = [f"{camera}_image" for camera in CAMERAS]
    depth = [f"{camera}_depth" for camera in CAMERAS]
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": LOW, "rgb": rgb, "depth": depth}})
    with tempfile.TemporaryDirectory() as folder:
        return show([*reads_ours(path, rgb, depth), *we_read_theirs(path, Path(folder)), rolls_out()])


def reads_ours(path: Path, rgb: list[str], depth: list[str]) -> Iterator[Line]:
    dataset = SequenceDataset(
        str(path),
        obs_keys=[*LOW, *rgb, *depth],
        dataset_keys=["actions"],
        frame_stack=1,
        seq_length=16,
        get_pad_mask=True,
        hdf5_cache_mode="low_dim",
        hdf5_use_swmr=False,
        load_next_obs=False,
    )
    with h5py.File(path) as file:
        lengths = [int(demo.attrs["num_samples"]) for demo in file["data"].values()]
        count = sum(lengths)
        item, obs = dataset[5], file["data/demo_0/obs"]
        shapes = {key: tuple(item["obs"][key].shape) for key in (*rgb, *depth)}
        equal = all(np.array_equal(item["obs"][key], obs[key][5:21]) for key in (*LOW, *rgb, *depth))
        # It keeps actions in single precision.
        equal &= np.array_equal(item["actions"], file["data/demo_0/actions"][5:21].astype(np.float32))
    wanted = dict.fromkeys(rgb, (16, 84, 84, 3)) | dict.fromkeys(depth, (16, 84, 84, 1))
    title = f"robomimic {robomimic.__version__}: SequenceDataset"
    yield Line(
        f"{title}, our file", f"{len(dataset)} sequences of {count} steps", str(count), len(dataset) == count
    )
    figure = f"equal: {equal}, {shapes[rgb[0]]}, {shapes[depth[0]]}"
    yield Line(
        "a sequence of images, depth, state, actions", figure, "as written", equal and shapes == wanted
    )


def we_read_theirs(path: Path, folder: Path) -> Iterator[Line]:
    """The published data sets: low-dimensional (no pictures), or images without depth; none has our keys."""
    plain = {"reference_frame": "world", "action_kind": "delta", "depth": False}
    kinds = {
        "low_dim": (LOW, RobomimicConfig("", cameras=(), state_keys=tuple(LOW), images=False, **plain)),
        "image": (
            [*LOW, "agentview_image"],
            RobomimicConfig("", cameras=("agentview",), state_keys=tuple(LOW), **plain),
        ),
    }
    for kind, (keys, config) in kinds.items():
        theirs = folder / f"{kind}_v141.hdf5"
        copy_as_published(path, theirs, keys)
        config = RobomimicConfig(**{**config.__dict__, "path": str(theirs), "mask": "train"})
        dataset = RobomimicDataset(config)
        with h5py.File(path) as file:
            first = np.hstack([file[f"data/demo_0/obs/{key}"][0] for key in LOW])
        sample = dataset[0]
        met = np.allclose(sample["observation.state"][0], first, atol=1e-6) and not dataset.skipped
        figure = f"{len(dataset)} samples, {', '.join(k for k in sample if k.startswith('observation'))}"
        yield Line(f"published layout, {kind}", figure, "reads as written", met)


def copy_as_published(source: Path, target: Path, keys: list[str]) -> None:
    with h5py.File(source) as ours, h5py.File(target, "w") as theirs:
        data = theirs.create_group("data")
        for name in ("env_args", "total"):
            data.attrs[name] = ours["data"].attrs[name]
        for name, demo in ours["data"].items():
            copied = data.create_group(name)
            for key in ("num_samples", "model_file"):
                copied.attrs[key] = demo.attrs[key]
            for key in ("actions", "states"):
                copied[key] = demo[key][:]
            for group in ("obs", "next_obs"):
                for key in keys:
                    copied[f"{group}/{key}"] = demo[f"obs/{key}"][:]
        theirs["mask/train"] = np.array(list(ours["data"]), dtype="S8")


class LiftOfRobomimic(EnvBase):
    """robosuite 1.5 behind robomimic's interface. (robomimic 0.3.0's own wrapper needs mujoco_py.)"""

    def __init__(self) -> None:
        self._env = vilma.envs.make("robosuite/Lift", cameras=list(CAMERAS), size=84, placement=0.12)
        self._seed = 500_000

    def reset(self) -> dict[str, Any]:
        self._env.reset(seed=self._seed)
        return self.get_observation()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, dict]:
        _, reward, success, truncated, info = self._env.step(action)
        self._success = info["success"]
        return self.get_observation(), reward, success or truncated, info

    def get_observation(self) -> dict[str, Any]:
        seen, readings = self._env.observe(), self._env.proprioception()
        ob = {key: value for key, value in readings.items() if key != "robot0_eef_rot6d"}
        for camera in CAMERAS:
            # As robomimic processes them: floats, channels first.
            ob[f"{camera}_image"] = seen[f"observation.images.{camera}"].astype(np.float32) / 255
            ob[f"{camera}_depth"] = seen[f"observation.depth.{camera}"][None]
        return ob

    def get_camera_intrinsic_matrix(
        self, camera_name: str, camera_height: int, camera_width: int
    ) -> np.ndarray:
        return self._env.intrinsics(camera_name)

    def get_camera_extrinsic_matrix(self, camera_name: str) -> np.ndarray:
        return self._env.pose(camera_name)

    def is_success(self) -> dict[str, bool]:
        return {"task": getattr(self, "_success", False)}

    def get_reward(self) -> float:
        return 0.0

    def is_done(self) -> bool:
        return False

    rollout_exceptions = ()
    name, type, version, action_dimension = "Lift", 1, "1.5.2", 7

    def _unused(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError

    render = reset_to = get_state = get_goal = set_goal = serialize = _unused
    create_for_data_processing = classmethod(_unused)
    base_env = property(_unused)


def rolls_out() -> Line:
    policy = load_policy(ROOT / "tests" / "data" / "demo_policy")
    policy.seed(0)
    env = LiftOfRobomimic()
    ours = rollout_policy(policy, env, task="lift the red cube", state_keys=STATE, cameras=CAMERAS)
    result = run_rollout(ours, env, horizon=150)
    figure = f"success {result['Success_Rate']:.0f} after {result['Horizon']} steps"
    return Line("run_rollout with the demo policy", figure, "success 1", result["Success_Rate"] == 1)


if __name__ == "__main__":
    sys.exit(main())
