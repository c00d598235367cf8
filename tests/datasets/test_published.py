"""robomimic's published data sets, low-dimensional and with images, train as they are."""

import json

import h5py
import numpy as np
import pytest

pytest.importorskip("h5py")

from vilma.policies import load_policy
from vilma.tools import train_policy

LOW = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}


@pytest.fixture
def published(tmp_path):
    """The layout of ``low_dim_v141.hdf5`` and ``image_v141.hdf5``: next_obs, masks, nothing of ours."""

    def write(name, cameras):
        rng = np.random.default_rng(0)
        with h5py.File(tmp_path / name, "w") as file:
            data = file.create_group("data")
            arguments = {
                "env_name": "Lift",
                "env_version": "1.4.1",
                "type": 1,
                "env_kwargs": {"control_freq": 20},
            }
            data.attrs["env_args"], data.attrs["total"] = json.dumps(arguments, indent=4), 60
            for number in range(4):
                demo = data.create_group(f"demo_{number}")
                demo.attrs["num_samples"], demo.attrs["model_file"] = 15, "<mujoco/>"
                demo["actions"], demo["states"] = rng.uniform(-1, 1, (15, 7)), rng.normal(size=(15, 32))
                demo["rewards"], demo["dones"] = np.zeros(15), np.zeros(15, np.int64)
                for group in ("obs", "next_obs"):
                    for key, size in LOW.items():
                        demo[f"{group}/{key}"] = rng.normal(size=(15, size))
                    for camera in cameras:
                        picture = rng.integers(0, 255, (15, 84, 84, 3), np.uint8)
                        demo[f"{group}/{camera}_image"] = picture
            for mask, numbers in (("train", (0, 1, 2)), ("valid", (3,))):
                file[f"mask/{mask}"] = np.array([f"demo_{n}" for n in numbers], dtype="S6")
        return tmp_path / name

    return write


@pytest.mark.parametrize("kind, cameras", [("low_dim", []), ("image", ["agentview"])])
def test_published_data_sets_train(published, tmp_path, kind, cameras):
    path, run = published(f"{kind}_v141.hdf5", cameras), tmp_path / kind
    options = {
        "data.path": path,
        "data.mask": "train",
        "data.cameras": cameras,
        "data.images": str(bool(cameras)).lower(),
        "data.depth": "false",
        "data.state_keys": list(LOW),
        "data.reference_frame": "world",
        "data.action_kind": "delta",
        "data.task": "lift the cube",
        "policy.cameras": cameras,
        "policy.modality": "rgb",
        "policy.state_dim": sum(LOW.values()),
        "train.steps": 3,
    }
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert train_policy.main(["configs/smoke/lift_smoke.yaml", "--run", str(run), *arguments]) == 0
    policy = load_policy(run)
    obs = {"observation.state": np.zeros((1, 19), np.float32), "task": ["lift the cube"]}
    obs |= {f"observation.images.{c}": np.zeros((1, 3, 84, 84), np.uint8) for c in cameras}
    assert policy.select_action(obs).shape == (1, 7)
