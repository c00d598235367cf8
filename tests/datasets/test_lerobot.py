"""LeRobot data sets, frame for frame: what was written by the published layouts comes back."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("imageio_ffmpeg")

from vilma.datasets.lerobot import LeRobotConfig, LeRobotDataset, collate

spec = importlib.util.spec_from_file_location("lerobot_sets", Path(__file__).with_name("lerobot_sets.py"))
sets = sys.modules["lerobot_sets"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sets)

VERSIONS = {"v2.1": sets.write_v21, "v3.0": sets.write_v30}
KNOWN = {"cameras": ("front",), "reference_frame": "base", "action_kind": "delta"}


@pytest.fixture(scope="module", params=VERSIONS)
def root(request, tmp_path_factory):
    return VERSIONS[request.param](tmp_path_factory.mktemp("lerobot") / request.param)


def copy_of(root, tmp_path):
    import shutil

    return shutil.copytree(root, tmp_path / "copy")


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_every_frame_comes_back(root, cache):
    config = LeRobotConfig(
        str(root),
        ("front", "wrist"),
        "base",
        "delta",
        ("observation.state", "gripper"),
        action_horizon=4,
        cache=cache,
    )
    data = LeRobotDataset(config)
    assert len(data) == sum(sets.LENGTHS) and not data.skipped
    row = -1
    for episode in sets.episodes():
        for t in range(len(episode["action"])):
            row += 1
            if cache == "none" and t not in (0, 1, len(episode["action"]) - 1):
                continue  # each sample starts a decoder
            sample = data[row]
            assert np.array_equal(
                sample["observation.images.front"][0], episode["front"][t].transpose(2, 0, 1)
            )
            assert np.array_equal(
                sample["observation.images.wrist"][0], episode["wrist"][t].transpose(2, 0, 1)
            )
            state = np.concatenate([episode["state"][t], episode["gripper"][t]])
            assert np.array_equal(sample["observation.state"][0], state)
            ahead = np.minimum(np.arange(t, t + 4), len(episode["action"]) - 1)
            assert np.array_equal(sample["action"], episode["action"][ahead])
            assert (
                sample["action_is_pad"].tolist() == (np.arange(t, t + 4) >= len(episode["action"])).tolist()
            )
            assert sample["task"] == episode["task"]


def test_depth_and_cameras_of_the_files(root):
    data = LeRobotDataset(LeRobotConfig(str(root), **KNOWN, obs_horizon=3, depth=True, depth_unit=0.001))
    batch = collate(data.__getitems__([0, 6, 14]))
    first, second, third = sets.episodes()
    depth = batch["observation.depth.front"]
    assert depth.dtype == torch.float32 and depth.shape == (3, 3, sets.HEIGHT, sets.WIDTH)
    assert np.allclose(depth[0], first["depth"][[0, 0, 0]] / 1000)
    assert np.allclose(depth[1], second["depth"][[0, 0, 1]] / 1000)
    assert np.allclose(batch["observation.pose.front"][2], third["pose"][4:7], atol=1e-6)
    assert np.allclose(batch["observation.intrinsics.front"][1], second["intrinsics"][:3])
    told = data.metadata
    assert (told["reference_frame"], told["action_kind"], told["control_freq"]) == ("base", "delta", 10)
    assert told["sizes"] == {"front": [sets.HEIGHT, sets.WIDTH]} and told["tasks"] == sorted(sets.TASKS)
    actions = np.concatenate([e["action"] for e in sets.episodes()])
    assert data.statistics()["action"]["mean"] == pytest.approx(actions.mean(0).tolist(), abs=1e-6)
    assert "episode 2, frame 6" in data.locate(14)


def test_what_nobody_tells_is_asked_for(tmp_path):
    root = sets.write_v21(tmp_path / "plain", geometry=False)
    known = {"path": str(root), **KNOWN, "depth": True}
    with pytest.raises(ValueError, match=r"does not tell the intrinsics of front.*\[fx, fy, cx, cy\]"):
        LeRobotDataset(LeRobotConfig(**known, depth_unit=0.001))
    lens = {"intrinsics": {"front": [30.0, 31.0, 16.0, 12.0]}}
    with pytest.raises(ValueError, match=r"does not tell the poses of front.*camera to base"):
        LeRobotDataset(LeRobotConfig(**known, **lens, depth_unit=0.001))
    pose = np.eye(4)
    pose[:3, 3] = 1, 2, 3
    lens["poses"] = {"front": pose.tolist()}
    with pytest.raises(ValueError, match="give depth_unit"):
        LeRobotDataset(LeRobotConfig(**known, **lens))
    sample = LeRobotDataset(LeRobotConfig(**known, **lens, depth_unit=0.001))[0]
    assert sample["observation.intrinsics.front"][0].tolist() == [[30, 0, 16], [0, 31, 12], [0, 0, 1]]
    assert np.array_equal(sample["observation.pose.front"][0], pose)
    camera = LeRobotConfig(
        **{**known, "reference_frame": "camera"}, intrinsics=lens["intrinsics"], depth_unit=0.001
    )
    assert np.array_equal(LeRobotDataset(camera)[0]["observation.pose.front"][0], np.eye(4))
    with pytest.raises(ValueError, match="has no depth of wrist"):
        LeRobotDataset(LeRobotConfig(**{**known, "cameras": ("wrist",)}))
    with pytest.raises(ValueError, match="reference_frame is 'there'"):
        LeRobotConfig(**{**known, "reference_frame": "there"})


def test_packed_it_trains_like_any_other(root, tmp_path, capsys):
    from vilma.datasets.robomimic import RobomimicConfig, RobomimicDataset
    from vilma.tools import pack_lerobot

    out = tmp_path / "packed.hdf5"
    fields = [
        "--cameras",
        "[front]",
        "--reference_frame",
        "base",
        "--action_kind",
        "delta",
        "--depth",
        "true",
    ]
    command = [str(root), "--out", str(out), *fields, "--depth_unit", "0.001"]
    assert pack_lerobot.main([*command, "--state_keys", "[observation.state, gripper]"]) == 0
    assert "state_keys: [observation.state, gripper]" in capsys.readouterr().out
    keys = ("observation.state", "gripper")
    packed = RobomimicDataset(RobomimicConfig(str(out), cameras=("front",), state_keys=keys, obs_horizon=2))
    config = LeRobotConfig(str(root), **KNOWN, state_keys=keys, obs_horizon=2, depth=True, depth_unit=0.001)
    direct = LeRobotDataset(config)
    assert len(packed) == len(direct) == sum(sets.LENGTHS)
    for index in range(len(packed)):
        one, other = packed[index], direct[index]
        assert one.keys() == other.keys() and one["task"] == other["task"]
        assert all(torch.equal(one[k], other[k]) for k in one if k != "task"), index
    assert packed.metadata["reference_frame"] == "base" and packed.metadata["control_freq"] == 10
    with pytest.raises(ValueError, match="is there already"):
        pack_lerobot.main(command)


def test_damage_is_named_and_the_rest_used(root, tmp_path):
    broken = copy_of(root, tmp_path)
    videos = sorted(broken.rglob("*.mp4"))
    content = videos[-1].read_bytes()
    videos[-1].write_bytes(content[: len(content) // 3])
    with pytest.warns(UserWarning, match="left out 1 of 3 episodes:\n  episode 2: .*decoded|ends after"):
        data = LeRobotDataset(LeRobotConfig(str(broken), **KNOWN))
    assert len(data) == 8 and len(data.episodes) == 2
    assert np.array_equal(
        data[7]["observation.images.front"][0], sets.episodes()[1]["front"][2].transpose(2, 0, 1)
    )
    videos[0].unlink()
    if len(videos) == 2:  # v3.0: the two files were all
        with pytest.raises(ValueError, match="no usable episode"):
            LeRobotDataset(LeRobotConfig(str(broken), **KNOWN))


def test_an_episode_without_rows_is_a_damaged_one(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    root = sets.write_v21(tmp_path / "set")
    episodes = root / "meta" / "episodes.jsonl"
    with episodes.open("a") as file:
        file.write(json.dumps({"episode_index": 3, "tasks": ["nothing"], "length": 0}) + "\n")
    first, empty = (root / "data" / "chunk-000" / f"episode_00000{i}.parquet" for i in (0, 3))
    pq.write_table(pq.read_table(first).slice(0, 0), empty)
    with pytest.warns(UserWarning, match="left out 1 of 4 episodes:\n  episode 3: it has no frames"):
        assert len(LeRobotDataset(LeRobotConfig(str(root), **KNOWN))) == sum(sets.LENGTHS)


def test_what_is_no_data_set_says_so(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no LeRobot data set at .* give the folder"):
        LeRobotDataset(LeRobotConfig(str(tmp_path), **KNOWN))
    with pytest.raises(
        ValueError, match=r"no pictures 'observation.images.side'; it has: observation.images.front"
    ):
        LeRobotDataset(LeRobotConfig(str(root), ("side",), "base", "delta"))
    with pytest.raises(ValueError, match=r"no numbers 'torque'; it has: observation\.state"):
        LeRobotDataset(LeRobotConfig(str(root), ("front",), "base", "delta", ("torque",)))
    old = copy_of(root, tmp_path)
    info = json.loads((old / "meta" / "info.json").read_text())
    (old / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": "v1.6"}))
    with pytest.raises(ValueError, match=r"is of version v1.6, wanted one of v2.0, v2.1, v3.0"):
        LeRobotDataset(LeRobotConfig(str(old), **KNOWN))
