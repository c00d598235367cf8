"""The same small RoboCasa demonstrations in both published layouts: robomimic HDF5 (0.2) and LeRobot (1.x).

The model is a floor, a box and a moving base with RoboCasa's camera names; actions have its 12 numbers.
"""

import gzip
import json
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERAS = ("robot0_agentview_left", "robot0_agentview_right", "robot0_eye_in_hand")
LENGTHS = (4, 6)
FLOOR, BASE_HEIGHT = 0.0, 0.7

MODEL = f"""
<mujoco model="kitchen">
  <visual><map znear="0.01" zfar="10"/><global offwidth="64" offheight="64"/></visual>
  <statistic extent="4"/>
  <worldbody>
    <light pos="0 0 3"/>
    <geom name="floor" type="plane" size="5 5 .1" pos="0 0 {FLOOR}" rgba=".6 .5 .4 1" group="1"/>
    <geom name="shape" type="box" size="3 3 .2" pos="0 0 .6" rgba="1 0 0 1" group="0"/>
    <body name="box" pos="1 0 .1"><freejoint/>
      <geom type="box" size=".1 .1 .1" rgba=".1 .2 .9 1" group="1"/></body>
    <body name="mobilebase0_support" pos="0 0 {BASE_HEIGHT}">
      <joint name="forward" type="slide" axis="1 0 0"/><joint name="yaw" type="hinge" axis="0 0 1"/>
      <geom type="box" size=".01 .01 .01" mass="1" group="1"/>
      <site name="mobilebase0_center"/>
      <camera name="robot0_agentview_left" pos=".1 .3 .5" xyaxes="0 -1 0 .7 0 .7" fovy="60"/>
      <camera name="robot0_agentview_right" pos=".1 -.3 .5" xyaxes="0 -1 0 .6 0 .8" fovy="60"/>
      <camera name="robot0_eye_in_hand" pos=".8 0 .2" xyaxes="0 -1 0 1 0 0" fovy="75"/>
    </body>
  </worldbody>
</mujoco>
"""
SIZE_OF_STATE = 1 + (7 + 2) + (6 + 2)

# meta/modality.json of a 1.x data set: base first, arm last.
MODALITY = {
    "state": {
        "base_position": {"start": 0, "end": 3},
        "base_rotation": {"start": 3, "end": 7},
        "end_effector_position_relative": {"start": 7, "end": 10},
        "end_effector_rotation_relative": {"start": 10, "end": 14},
        "gripper_qpos": {"start": 14, "end": 16},
    },
    "action": {
        "base_motion": {"start": 0, "end": 4},
        "control_mode": {"start": 4, "end": 5},
        "end_effector_position": {"start": 5, "end": 8},
        "end_effector_rotation": {"start": 8, "end": 11},
        "gripper_close": {"start": 11, "end": 12},
    },
}


def demos(moving=()):
    """Episodes as dictionaries; those whose numbers are in ``moving`` drive their base."""
    rng, made = np.random.default_rng(5), []
    for number, length in enumerate(LENGTHS):
        actions = rng.uniform(-1, 1, (length, 12))
        actions[:, 7:11], actions[:, 11] = 0, -1
        if number in moving:
            actions[2, 7], actions[2, 11] = 0.5, 1
        states = np.zeros((length, SIZE_OF_STATE))
        states[:, 0] = np.arange(length) / 20
        states[:, 1:8] = [1, 0, 0.1, 1, 0, 0, 0]
        states[:, 1] += rng.uniform(-0.2, 0.2, length)
        states[:, 8] = rng.uniform(-0.2, 0.2, length)
        states[:, 9] = rng.uniform(-0.3, 0.3, length)
        obs = {
            "robot0_base_pos": rng.normal(size=(length, 3)),
            "robot0_base_quat": rng.normal(size=(length, 4)),
            "robot0_base_to_eef_pos": rng.normal(size=(length, 3)),
            "robot0_base_to_eef_quat": rng.normal(size=(length, 4)),
            "robot0_gripper_qpos": rng.normal(size=(length, 2)),
        }
        made.append({"actions": actions, "states": states, "obs": obs, "lang": f"open the drawer {number}"})
    return made


ENV_ARGS = {
    "env_name": "OpenDrawer",
    "env_version": "1.5.0",
    "type": 1,
    "env_kwargs": {"robots": "PandaOmron", "control_freq": 20, "layout_ids": 1},
}


def write_v02(path: Path, moving=()) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(ENV_ARGS)
        data.attrs["total"] = sum(LENGTHS)
        for number, demo in enumerate(demos(moving), start=1):  # RoboCasa counts from 1
            group = data.create_group(f"demo_{number}")
            group["actions"], group["states"] = demo["actions"], demo["states"]
            for key, value in demo["obs"].items():
                group[f"obs/{key}"] = value
            for camera in CAMERAS:
                shape = (len(demo["actions"]), 16, 16, 3)
                group[f"obs/{camera}_image"] = np.full(shape, 40 * number, np.uint8)
            group.attrs["num_samples"] = len(demo["actions"])
            group.attrs["model_file"] = MODEL
            group.attrs["ep_meta"] = json.dumps({"lang": demo["lang"], "layout_id": 1, "style_id": 1})
    return path


def write_v1(root: Path, moving=()) -> Path:
    folder = root / "lerobot"
    (folder / "meta").mkdir(parents=True)
    features = {
        "observation.state": {"dtype": "float64", "shape": [16]},
        "action": {"dtype": "float64", "shape": [12]},
        **{
            f"observation.images.{camera}": {
                "dtype": "video",
                "shape": [16, 16, 3],
                "names": ["height", "width", "channel"],
            }
            for camera in CAMERAS
        },
    }
    info = {
        "codebase_version": "v2.1",
        "robot_type": "PandaOmron",
        "fps": 20,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "meta" / "modality.json").write_text(json.dumps(MODALITY))
    lines = []
    for number, demo in enumerate(demos(moving)):
        length = len(demo["actions"])
        lines.append(json.dumps({"episode_index": number, "tasks": [demo["lang"]], "length": length}))
        arm, base, mode = demo["actions"][:, :7], demo["actions"][:, 7:11], demo["actions"][:, 11:]
        stored = np.hstack([base, mode, arm])
        table = {
            "observation.state": np.hstack(list(demo["obs"].values())).tolist(),
            "action": stored.tolist(),
            "frame_index": list(range(length)),
            "episode_index": [number] * length,
        }
        data = folder / "data" / "chunk-000" / f"episode_{number:06d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), data)
        extras = folder / "extras" / f"episode_{number:06d}"
        extras.mkdir(parents=True)
        np.savez_compressed(extras / "states.npz", states=demo["states"])
        (extras / "model.xml.gz").write_bytes(gzip.compress(MODEL.encode()))
        (extras / "ep_meta.json").write_text(json.dumps({"lang": demo["lang"], "layout_id": 1}))
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "extras" / "dataset_meta.json").write_text(json.dumps({"env_args": ENV_ARGS, "total": 10}))
    return root
