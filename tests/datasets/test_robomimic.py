import errno
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from vilma import config as configs
from vilma.datasets import robomimic
from vilma.datasets.robomimic import (
    EpisodeWriter,
    RobomimicConfig,
    RobomimicDataset,
    collate,
    file_attributes,
    finished_parts,
    merge,
    parts_folder,
    write_part,
)

h5py = pytest.importorskip("h5py")

CAMERAS = ("agentview", "robot0_eye_in_hand")
SIZES = {"agentview": (12, 16), "robot0_eye_in_hand": (10, 10)}
STATE_KEYS = ("robot0_eef_pos", "robot0_eef_rot6d", "robot0_gripper_qpos")
ENV_ARGS = {"env_name": "Lift", "env_version": "1.5.2", "type": 1, "env_kwargs": {"control_freq": 20}}
ATTRIBUTES = {"reference_frame": "world", "action_kind": "delta", "task": "lift the cube"}


def make_episode(seed: int, length: int, sizes: dict[str, tuple[int, int]] = SIZES) -> dict:
    """The keywords of `write_part` for one episode of noise; the static camera's matrices are given once."""
    rng = np.random.default_rng(seed)
    obs = {}
    for camera, (height, width) in sizes.items():
        obs[f"{camera}_image"] = rng.integers(0, 256, (length, height, width, 3), dtype=np.uint8)
        obs[f"{camera}_depth"] = rng.uniform(0.3, 2, (length, height, width)).astype(np.float32)
        obs[f"{camera}_intrinsic"] = np.array([[100, 0, width / 2], [0, 100, height / 2], [0, 0, 1.0]])
        angle, pose = rng.uniform(0, 3, length), np.tile(np.eye(4), (length, 1, 1))
        pose[:, 0, 0] = pose[:, 1, 1] = np.cos(angle)
        pose[:, 1, 0] = np.sin(angle)
        pose[:, 0, 1] = -np.sin(angle)
        pose[:, :3, 3] = rng.normal(size=(length, 3))
        obs[f"{camera}_extrinsic"] = pose[0] if camera == "agentview" else pose
    obs["robot0_eef_pos"] = rng.normal(size=(length, 3))
    obs["robot0_eef_rot6d"] = rng.normal(size=(length, 6)).astype(np.float32)
    obs["robot0_gripper_qpos"] = rng.normal(size=(length, 2))
    return {
        "actions": rng.uniform(-1, 1, (length, 7)),
        "obs": obs,
        "states": rng.normal(size=(length, 32)),
        "rewards": np.zeros(length),
        "dones": np.arange(length) == length - 1,
        "model_file": "<mujoco>" + "x" * 100_000 + "</mujoco>",
        "attributes": {"seed": seed, "ep_meta": {"lang": ""}},
    }


def write_file(path: Path, episodes: list[dict], mask: dict | None = None, **attributes: str) -> Path:
    for index, episode in enumerate(episodes):
        write_part(path, index, **episode)
    return merge(path, env_args=ENV_ARGS, attributes=ATTRIBUTES | attributes, mask=mask)


LENGTHS = (6, 1, 9)
EPISODES = [make_episode(seed, length) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def good_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("robomimic") / "good.hdf5"
    return write_file(path, EPISODES, mask={"train": [2, 0], "valid": [1]})


@pytest.fixture
def own_file(good_file: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copy(good_file, tmp_path / "own.hdf5"))


def expected_sample(episode: dict, t: int, history: int, horizon: int) -> dict[str, np.ndarray]:
    """The window written out as a plain loop, straight from what was given to the writer."""
    length = len(episode["actions"])
    sample: dict[str, list] = {}
    for step in range(t - history + 1, t + 1):
        row = max(step, 0)
        for camera in CAMERAS:
            obs = {
                name: episode["obs"][f"{camera}_{name}"]
                for name in ("image", "depth", "intrinsic", "extrinsic")
            }
            sample.setdefault(f"observation.images.{camera}", []).append(obs["image"][row].transpose(2, 0, 1))
            sample.setdefault(f"observation.depth.{camera}", []).append(obs["depth"][row])
            sample.setdefault(f"observation.intrinsics.{camera}", []).append(obs["intrinsic"])
            pose = obs["extrinsic"] if obs["extrinsic"].ndim == 2 else obs["extrinsic"][row]
            sample.setdefault(f"observation.pose.{camera}", []).append(pose)
        state = np.concatenate([episode["obs"][key][row] for key in STATE_KEYS])
        sample.setdefault("observation.state", []).append(state)
    for step in range(t, t + horizon):
        sample.setdefault("action", []).append(episode["actions"][min(step, length - 1)])
        sample.setdefault("action_is_pad", []).append(step >= length)
    return {key: np.stack(values) for key, values in sample.items()}


def assert_same_batch(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        if key == "task":
            assert a[key] == b[key]
        else:
            assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


# Reading what was written


@pytest.mark.parametrize("cache", ["ram", "none"])
@pytest.mark.parametrize("history, horizon", [(1, 10), (3, 4)])
def test_every_window_equals_a_plain_loop(good_file: Path, cache: str, history: int, horizon: int) -> None:
    config = RobomimicConfig(str(good_file), obs_horizon=history, action_horizon=horizon, cache=cache)
    data = RobomimicDataset(config)
    frames = [(episode, t) for episode in EPISODES for t in range(len(episode["actions"]))]
    assert len(data) == len(frames) == sum(LENGTHS)
    for sample, (episode, t) in zip(data, frames):
        wanted = expected_sample(episode, t, history, horizon)
        assert sample.pop("task") == "lift the cube"
        assert sample.keys() == wanted.keys()
        for key, value in wanted.items():
            dtype = {"images": torch.uint8, "action_is_pad": torch.bool}.get(
                key.split(".")[-2 if "." in key else 0]
            )
            assert sample[key].dtype == (dtype or torch.float32)
            np.testing.assert_array_equal(sample[key].numpy(), value.astype(sample[key].numpy().dtype), key)


def test_layout(good_file: Path) -> None:
    """The table of the robomimic layout, read with h5py alone."""
    length = LENGTHS[2]
    height, width = SIZES["agentview"]
    table = {
        "actions": ("float64", (length, 7)),
        "states": ("float64", (length, 32)),
        "rewards": ("float64", (length,)),
        "dones": ("int64", (length,)),
        "obs/agentview_image": ("uint8", (length, height, width, 3)),
        "obs/agentview_depth": ("float32", (length, height, width, 1)),
        "obs/agentview_intrinsic": ("float32", (length, 3, 3)),
        "obs/agentview_extrinsic": ("float32", (length, 4, 4)),
        "obs/robot0_eef_pos": ("float64", (length, 3)),
        "obs/robot0_eef_rot6d": ("float32", (length, 6)),
        "obs/robot0_gripper_qpos": ("float64", (length, 2)),
    }
    with h5py.File(good_file, "r") as file:
        data = file["data"]
        assert data.attrs["total"] == sum(LENGTHS) == sum(demo.attrs["num_samples"] for demo in data.values())
        assert json.loads(data.attrs["env_args"]) == ENV_ARGS
        assert {"reference_frame", "action_kind", "task", "vilma_version"} <= set(data.attrs)
        assert list(data) == ["demo_0", "demo_1", "demo_2"]
        demo = data["demo_2"]
        for name, (dtype, shape) in table.items():
            assert (demo[name].dtype, demo[name].shape) == (dtype, shape), name
        assert demo.attrs["num_samples"] == length
        assert demo.attrs["model_file"] == EPISODES[2]["model_file"]
        assert demo.attrs["seed"] == 2 and json.loads(demo.attrs["ep_meta"]) == {"lang": ""}
        for name in ("image", "depth"):
            pixels = demo[f"obs/agentview_{name}"]
            assert pixels.chunks == (1, *pixels.shape[1:]) and pixels.compression == "gzip" and pixels.shuffle
        assert file["mask/train"].dtype == "S6"
        assert file["mask/train"][:].tolist() == [b"demo_0", b"demo_2"]
        assert file["mask/valid"][:].tolist() == [b"demo_1"]


def test_merge_renumbers_in_the_order_of_indices(tmp_path: Path) -> None:
    path = tmp_path / "x.hdf5"
    for index in (11, 2, 100):
        write_part(path, index, **make_episode(index, 3))
    assert finished_parts(path) == {2, 11, 100}
    merge(path, env_args=ENV_ARGS, attributes=ATTRIBUTES, mask={"train": [100, 2]}, keep_parts=True)
    with h5py.File(path, "r") as file:
        assert [int(file[f"data/demo_{i}"].attrs["seed"]) for i in range(3)] == [2, 11, 100]
        assert file["mask/train"][:].tolist() == [b"demo_0", b"demo_2"]
    assert finished_parts(path) == {2, 11, 100}
    with pytest.raises(ValueError, match=r"mask 'train' names parts that do not exist: \[7\]"):
        merge(path, env_args=ENV_ARGS, attributes=ATTRIBUTES, mask={"train": [7]})
    merge(path, env_args=ENV_ARGS, attributes=ATTRIBUTES)
    assert [p.name for p in tmp_path.iterdir()] == ["x.hdf5"]


def test_merge_reserves_no_more_than_it_gives_back(tmp_path: Path) -> None:
    """The space set aside for the merge covers it, also for many tiny episodes, and the rest is returned."""
    path = tmp_path / "x.hdf5"
    for index in range(40):
        write_part(
            path, index, actions=np.zeros((1, 7)), obs={"a": np.zeros((1, 1))}, attributes={"seed": index}
        )
    reserved = sum(p.stat().st_size + 4096 for p in parts_folder(path).iterdir()) + (1 << 20)
    size = merge(path, env_args=ENV_ARGS, attributes=ATTRIBUTES).stat().st_size
    assert size < reserved - (1 << 20)


def test_tasks_come_from_the_episode_then_the_file_then_the_config(tmp_path: Path) -> None:
    first, second = make_episode(0, 2), make_episode(1, 2)
    first["attributes"] = {"ep_meta": {"lang": "open the drawer"}}
    path = write_file(tmp_path / "x.hdf5", [first, second], task="")
    data = RobomimicDataset(RobomimicConfig(str(path), task="lift"))
    assert [sample["task"] for sample in data] == ["open the drawer"] * 2 + ["lift"] * 2
    assert data.metadata["tasks"] == ["lift", "open the drawer"] and data.metadata["task"] == ""


def test_metadata_and_file_attributes(good_file: Path) -> None:
    metadata = RobomimicDataset(RobomimicConfig(str(good_file))).metadata
    assert json.loads(json.dumps(metadata)) == {
        "cameras": list(CAMERAS),
        "sizes": {camera: list(size) for camera, size in SIZES.items()},
        "reference_frame": "world",
        "action_kind": "delta",
        "control_freq": 20.0,
        "task": "lift the cube",
        "tasks": ["lift the cube"],
        "state_keys": list(STATE_KEYS),
        "state_dim": 11,
        "action_dim": 7,
        "episodes": 3,
        "frames": 16,
        "skipped": 0,
    }
    found = file_attributes(good_file)
    assert found["num_demos"] == 3 and found["total"] == 16 and found["reference_frame"] == "world"
    assert file_attributes(good_file.with_name("absent.hdf5")) is None


def test_masks_folders_globs_and_lists(good_file: Path, tmp_path: Path) -> None:
    for name in ("a_10.hdf5", "a_9.hdf5", "b.h5"):
        shutil.copy(good_file, tmp_path / name)
    (tmp_path / ".a_11.hdf5.tmp").write_bytes(b"unfinished")
    frames = {
        str(tmp_path): 48,
        str(tmp_path / "a_*.hdf5"): 32,
        (str(tmp_path / "b.h5"), str(tmp_path / "a_9.hdf5")): 32,
    }
    for path, count in frames.items():
        path = list(path) if isinstance(path, tuple) else path
        assert len(RobomimicDataset(RobomimicConfig(path))) == count
    names = [file.name for file in RobomimicDataset(RobomimicConfig(str(tmp_path))).files]
    assert names.index("a_9.hdf5") < names.index("a_10.hdf5")
    assert len(RobomimicDataset(RobomimicConfig(str(good_file), mask="train"))) == LENGTHS[0] + LENGTHS[2]
    assert len(RobomimicDataset(RobomimicConfig(str(tmp_path), max_episodes=4))) == sum(LENGTHS) + LENGTHS[0]
    with pytest.raises(ValueError, match=r"no mask 'test'; it has \['train', 'valid'\]"):
        RobomimicDataset(RobomimicConfig(str(good_file), mask="test"))
    with pytest.raises(FileNotFoundError, match="no HDF5 file at"):
        RobomimicDataset(RobomimicConfig(str(tmp_path / "absent")))


def test_images_alone_need_no_geometry(own_file: Path) -> None:
    with h5py.File(own_file, "r+") as file:
        for demo in file["data"].values():
            for camera in CAMERAS:
                for name in ("depth", "intrinsic", "extrinsic"):
                    del demo[f"obs/{camera}_{name}"]
    data = RobomimicDataset(RobomimicConfig(str(own_file), depth=False))
    assert {k for k in data[0] if k.startswith("observation.")} == {
        "observation.state",
        *(f"observation.images.{camera}" for camera in CAMERAS),
    }
    with pytest.raises(ValueError, match=r"vilma add-depth[^$]*collect-robosuite[^$]*depth: false"):
        RobomimicDataset(RobomimicConfig(str(own_file)))
    state = RobomimicDataset(RobomimicConfig(str(own_file), cameras=(), images=False, depth=False))
    assert len(state) == 16 and state.nbytes == 16 * (11 + 7) * 4


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_worker_processes_give_the_same_batches(good_file: Path, cache: str) -> None:
    data = RobomimicDataset(RobomimicConfig(str(good_file), obs_horizon=2, cache=cache))
    _ = data[0]  # leaves an open file handle behind, which workers must not use
    one = list(torch.utils.data.DataLoader(data, batch_size=5, collate_fn=collate))
    two = list(torch.utils.data.DataLoader(data, batch_size=5, collate_fn=collate, num_workers=2))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert_same_batch(a, b)
    assert_same_batch(one[1], collate([data[i] for i in range(5, 10)]))
    part = torch.utils.data.Subset(data, range(5, 10))
    assert_same_batch(one[1], next(iter(torch.utils.data.DataLoader(part, batch_size=5, collate_fn=collate))))


@pytest.mark.long
@pytest.mark.parametrize("cache", ["ram", "none"])
def test_spawned_workers_give_the_same_batches(good_file: Path, cache: str) -> None:
    data = RobomimicDataset(RobomimicConfig(str(good_file), cache=cache))
    _ = data[0]
    options = {"batch_size": 8, "collate_fn": collate}
    spawned = torch.utils.data.DataLoader(data, num_workers=1, multiprocessing_context="spawn", **options)
    for a, b in zip(torch.utils.data.DataLoader(data, **options), spawned):
        assert_same_batch(a, b)


def test_negative_and_impossible_indices(good_file: Path) -> None:
    data = RobomimicDataset(RobomimicConfig(str(good_file)))
    assert_same_batch(data[-1], data[15])
    for index in (16, -17):
        with pytest.raises(IndexError):
            data[index]


def test_a_batch_from_memory_is_fast(tmp_path: Path) -> None:
    episode = make_episode(0, 120, dict.fromkeys(CAMERAS, (84, 84)))
    data = RobomimicDataset(RobomimicConfig(str(write_file(tmp_path / "x.hdf5", [episode]))))
    assert data.nbytes == 120 * (2 * 84 * 84 * (3 + 4) + 4 * (2 * (9 + 16) + 11 + 7))
    indices = torch.randint(0, len(data), (30, 64), generator=torch.Generator().manual_seed(0)).tolist()
    copied = torch.zeros(120, data.nbytes // 120, dtype=torch.uint8)

    def seconds(take, rows: list[int]) -> float:
        start = time.perf_counter()
        take(rows)
        return time.perf_counter() - start

    ours, plain = [], []
    for batch in indices:
        ours.append(seconds(data.__getitems__, batch))
        plain.append(seconds(lambda rows: copied.index_select(0, torch.tensor(rows)), batch))
    assert min(ours) < 4 * min(plain) + 1e-3, "as many bytes are copied in one go much faster"


def test_pixels_that_do_not_fit_in_memory(good_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robomimic, "available_memory", lambda: 30_000)
    with pytest.raises(MemoryError, match="cache: none"):
        RobomimicDataset(RobomimicConfig(str(good_file)))
    assert len(RobomimicDataset(RobomimicConfig(str(good_file), cache="none"))) == 16


def test_config_from_yaml_values() -> None:
    assert configs.decode(RobomimicConfig, {"path": "a.hdf5", "cameras": ["front"]}).path == "a.hdf5"
    both = configs.decode(RobomimicConfig, {"path": ["a", "b"], "mask": "train"})
    assert both.path == ["a", "b"] and configs.decode(RobomimicConfig, configs.encode(both)) == both
    for wrong in ({"cache": "disk"}, {"obs_horizon": 0}, {"reference_frame": "robot"}, {"max_episodes": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[-1]):
            RobomimicConfig("a", **wrong)


# Statistics


def test_statistics_equal_numpy(good_file: Path) -> None:
    for mask, chosen in ((None, (0, 1, 2)), ("train", (0, 2))):
        found = RobomimicDataset(RobomimicConfig(str(good_file), mask=mask)).statistics()
        assert json.loads(json.dumps(found)) == found
        columns = {
            "action": np.concatenate([EPISODES[i]["actions"] for i in chosen]),
            "observation.state": np.concatenate(
                [np.concatenate([EPISODES[i]["obs"][key] for key in STATE_KEYS], axis=1) for i in chosen]
            ),
        }
        assert found.keys() == columns.keys()
        for key, values in columns.items():
            wanted = {
                "mean": values.mean(0),
                "std": values.std(0),
                "min": values.min(0),
                "max": values.max(0),
                "q01": np.quantile(values, 0.01, axis=0),
                "q99": np.quantile(values, 0.99, axis=0),
            }
            for name, value in wanted.items():
                np.testing.assert_allclose(
                    found[key][name], value, rtol=1e-5, atol=1e-6, err_msg=f"{key} {name}"
                )
            assert found[key]["count"] == len(values) and not any(found[key]["constant"])


def test_constant_dimensions_are_marked(tmp_path: Path) -> None:
    episode = make_episode(0, 20)
    episode["actions"][:, 3] = 0.7
    episode["actions"][:, 4] = 0.25 + 1e-8 * np.arange(20)
    path = write_file(tmp_path / "x.hdf5", [episode])
    found = RobomimicDataset(RobomimicConfig(str(path))).statistics()["action"]
    assert found["constant"] == [False, False, False, True, True, False, False]
    assert found["mean"][3] == pytest.approx(0.7) and found["std"][3] < 1e-6


def test_statistics_leave_damaged_episodes_out(own_file: Path) -> None:
    _damage_chunk(own_file, "data/demo_2/obs/agentview_depth")
    with pytest.warns(UserWarning, match="demo_2"):
        data = RobomimicDataset(RobomimicConfig(str(own_file)))
    used = np.concatenate([EPISODES[0]["actions"], EPISODES[1]["actions"]])
    np.testing.assert_allclose(data.statistics()["action"]["mean"], used.mean(0), atol=1e-6)
    assert data.statistics()["action"]["count"] == len(data) == 7


# Damage


def _damage_chunk(path: Path, name: str, chunk: int = 1) -> None:
    with h5py.File(path, "r") as file:
        info = file[name].id.get_chunk_info(chunk)
    with open(path, "rb+") as stream:
        stream.seek(info.byte_offset)
        stream.write(b"\xff" * (info.size // 2))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99, -1])
def test_truncated_file(own_file: Path, good_file: Path, tmp_path: Path, keep: float) -> None:
    size = own_file.stat().st_size
    os.truncate(own_file, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(ValueError, match=r"own\.hdf5 cannot be opened.*collect again"):
        RobomimicDataset(RobomimicConfig(str(own_file)))
    assert file_attributes(own_file) is None
    shutil.copy(good_file, tmp_path / "second.hdf5")
    with pytest.warns(UserWarning, match=r"left out 1 of 4.*\n.*own\.hdf5"):
        data = RobomimicDataset(RobomimicConfig(str(tmp_path)))
    assert len(data) == sum(LENGTHS) and len(data.skipped) == 1


def test_half_written_episodes_are_named_and_the_rest_is_used(tmp_path: Path) -> None:
    path = write_file(tmp_path / "x.hdf5", [make_episode(seed, 4) for seed in range(6)])
    with h5py.File(path, "r+") as file:
        del file["data/demo_0"].attrs["num_samples"]
        del file["data/demo_1/obs/robot0_eef_pos"]
        file["data/demo_1/obs/robot0_eef_pos"] = np.zeros((3, 3))
        del file["data/demo_2/obs/agentview_depth"]
        del file["data/demo_4/actions"]
        file["data/demo_5/obs/unread"] = np.zeros(77)  # keys of others are nobody's business
    with pytest.warns(UserWarning) as warned:
        data = RobomimicDataset(RobomimicConfig(str(path)))
    text = str(warned[0].message)
    assert "left out 4 of 6" in text and len(data.skipped) == data.metadata["skipped"] == 4
    for name, reason in {
        "demo_0": "no num_samples",
        "demo_1": "robot0_eef_pos has shape (3, 3), but num_samples is 4",
        "demo_2": "lacks obs/agentview_depth",
        "demo_4": "no actions",
    }.items():
        assert any(name in line and reason in line for line in data.skipped), name
        assert name in text
    assert [episode.name for episode in data.episodes] == ["demo_3", "demo_5"] and len(data) == 8
    wanted = expected_sample(make_episode(5, 4), 2, 1, 10)
    np.testing.assert_array_equal(
        data[6]["observation.images.agentview"], wanted["observation.images.agentview"]
    )


def test_bytes_that_do_not_decompress(own_file: Path) -> None:
    _damage_chunk(own_file, "data/demo_0/obs/agentview_image", chunk=3)
    with pytest.warns(UserWarning, match=r"demo_0: cannot be read"):
        data = RobomimicDataset(RobomimicConfig(str(own_file)))
    assert [episode.name for episode in data.episodes] == ["demo_1", "demo_2"]
    wanted = expected_sample(EPISODES[2], 4, 1, 10)
    np.testing.assert_array_equal(
        data[5]["observation.depth.agentview"], wanted["observation.depth.agentview"]
    )
    lazy = RobomimicDataset(RobomimicConfig(str(own_file), cache="none"))
    _ = lazy[2]
    with pytest.raises(ValueError, match=r"own\.hdf5:demo_0: agentview_image cannot be read"):
        lazy[3]


def test_file_of_another_layout(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["images"] = np.zeros(3)
    with pytest.raises(ValueError, match=r"no /data: it is not in the robomimic layout \(\['images'\]\)"):
        RobomimicDataset(RobomimicConfig(str(tmp_path / "x.hdf5")))
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file.create_group("data").attrs.update(ATTRIBUTES)
    with pytest.raises(ValueError, match="no usable episode"):
        RobomimicDataset(RobomimicConfig(str(tmp_path / "x.hdf5")))


def test_what_is_missing_and_what_is_there(good_file: Path) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)lacks obs/front_image.*cameras \['agentview', 'robot0_eye_in_hand'\]"
    ):
        RobomimicDataset(RobomimicConfig(str(good_file), cameras=("front",)))
    with pytest.raises(ValueError, match=r"(?s)lacks obs/joints.*robot0_eef_pos"):
        RobomimicDataset(RobomimicConfig(str(good_file), state_keys=("joints",)))


def _replace(path: Path, name: str, value: np.ndarray) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = value


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "actions",
            np.where(np.arange(7) == 3, np.nan, np.zeros((9, 7))),
            "demo_2: action is not finite at row 0",
        ),
        ("actions", np.zeros((9, 6)), r"demo_2: action has \(6,\) values a row, others have \(7,\)"),
        ("obs/robot0_eef_pos", np.full((9, 3), np.inf), "demo_2: observation.state is not finite"),
        (
            "obs/agentview_depth",
            np.ones((9, 6, 8, 1), np.float32),
            "agentview_image is 12x16 but agentview_depth is 6x8",
        ),
        (
            "obs/agentview_depth",
            np.ones((9, 12, 16, 2), np.float32),
            r"agentview_depth is float32 \(9, 12, 16, 2\)",
        ),
        ("obs/agentview_image", np.ones((9, 12, 16, 3), np.float32), "agentview_image is float32"),
        (
            "obs/agentview_intrinsic",
            np.tile([[200, 0, 16], [0, 200, 12], [0, 0, 1.0]], (9, 1, 1)),
            "agentview_intrinsic",
        ),
        ("obs/agentview_intrinsic", np.zeros((9, 3, 3)), "agentview_intrinsic is not a camera matrix"),
        (
            "obs/agentview_extrinsic",
            np.tile(np.diag([1.0, 2, 1, 1]), (9, 1, 1)),
            "agentview_extrinsic is not a rigid",
        ),
    ],
)
def test_wrong_values_are_errors_that_name_episode_and_key(
    own_file: Path, name: str, value: np.ndarray, message: str
) -> None:
    _replace(own_file, f"data/demo_2/{name}", value)
    with pytest.raises(ValueError, match=message):
        RobomimicDataset(RobomimicConfig(str(own_file)))


def test_episodes_of_another_size(tmp_path: Path) -> None:
    small = make_episode(1, 3, SIZES | {"agentview": (6, 8)})
    path = write_file(tmp_path / "x.hdf5", [make_episode(0, 3), small])
    with pytest.raises(
        ValueError, match=r"demo_1: agentview_image is \(6, 8\), in other episodes \(12, 16\)"
    ):
        RobomimicDataset(RobomimicConfig(str(path)))


def test_frames_and_action_kinds_must_agree(own_file: Path, tmp_path: Path) -> None:
    for wrong in ({"reference_frame": "base"}, {"action_kind": "absolute"}):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=f"has {name} '{ATTRIBUTES[name]}', wanted '{value}'"):
            RobomimicDataset(RobomimicConfig(str(own_file), **wrong))
    shutil.copy(own_file, tmp_path / "z_second.hdf5")
    with h5py.File(tmp_path / "z_second.hdf5", "r+") as file:
        file["data"].attrs["reference_frame"] = "base"
    with pytest.raises(ValueError, match=r"z_second\.hdf5 has reference_frame 'base', wanted 'world'"):
        RobomimicDataset(RobomimicConfig(str(tmp_path)))
    with h5py.File(own_file, "r+") as file:
        del file["data"].attrs["reference_frame"], file["data"].attrs["action_kind"]
    with pytest.raises(ValueError, match="does not tell its reference_frame"):
        RobomimicDataset(RobomimicConfig(str(own_file)))
    data = RobomimicDataset(
        RobomimicConfig(str(own_file), reference_frame="camera", action_kind="controller")
    )
    assert (data.metadata["reference_frame"], data.metadata["action_kind"]) == ("camera", "controller")


# Writing


@pytest.mark.parametrize(
    "change, message",
    [
        ({"actions": np.zeros((6, 0, 2))}, r"actions have shape \(6, 0, 2\), wanted \(T, A\)"),
        ({"actions": np.full((6, 7), np.nan)}, "actions is not finite at row 0"),
        ({"states": np.zeros((5, 3))}, r"states has shape \(5, 3\), but actions have 6 rows"),
        ({"agentview_image": np.zeros((6, 12, 16, 3))}, "agentview_image is float64"),
        ({"agentview_depth": np.ones((6, 12, 17))}, "agentview_image is 12x16 but agentview_depth is 12x17"),
        ({"agentview_intrinsic": np.eye(4)}, r"agentview_intrinsic has shape \(4, 4\)"),
        ({"agentview_intrinsic": np.diag([9.0, 9, 1])}, "far from the middle"),
        ({"agentview_extrinsic": np.ones((4, 4))}, "agentview_extrinsic is not a rigid transform"),
    ],
)
def test_writer_refuses(tmp_path: Path, change: dict, message: str) -> None:
    episode = make_episode(0, 6)
    for name, value in change.items():
        (episode if name in episode else episode["obs"])[name] = value
    with pytest.raises(ValueError, match=f"(?s)episode 0.*{message}|{message}"):
        write_part(tmp_path / "x.hdf5", 0, **episode)
    assert not list(tmp_path.iterdir())


def test_depth_without_a_reading_is_kept(tmp_path: Path) -> None:
    episode = make_episode(0, 2)
    episode["obs"]["agentview_depth"][0, 0, :3] = (0, np.nan, np.inf)
    data = RobomimicDataset(RobomimicConfig(str(write_file(tmp_path / "x.hdf5", [episode]))))
    np.testing.assert_array_equal(data[0]["observation.depth.agentview"][0, 0, :3], [0, np.nan, np.inf])


def test_merge_refuses_what_a_reader_could_not_trust(tmp_path: Path) -> None:
    path = tmp_path / "x.hdf5"
    with pytest.raises(ValueError, match="nothing to merge"):
        merge(path, env_args=ENV_ARGS, attributes=ATTRIBUTES)
    with pytest.raises(ValueError, match="reference_frame is 'robot', wanted one of world, base, camera"):
        merge(path, env_args=ENV_ARGS, attributes=ATTRIBUTES | {"reference_frame": "robot"})
    with pytest.raises(ValueError, match=r"env_args lack \['env_kwargs', 'type'\]"):
        merge(path, env_args={"env_name": "Lift"}, attributes=ATTRIBUTES)


def test_episode_writer_continues(tmp_path: Path) -> None:
    path, attributes = tmp_path / "x.hdf5", ATTRIBUTES | {"request": {"task": "Lift", "demos": 3}}
    with pytest.raises(KeyboardInterrupt), EpisodeWriter(path, ENV_ARGS, attributes) as writer:
        assert writer.write(**make_episode(0, 2)) == 0
        raise KeyboardInterrupt
    assert not path.exists() and finished_parts(path) == {0}
    with pytest.raises(ValueError, match="episodes of another request"):
        EpisodeWriter(path, ENV_ARGS, ATTRIBUTES | {"request": {"task": "Stack", "demos": 3}})
    with EpisodeWriter(path, ENV_ARGS, attributes) as writer:
        assert writer.finished == {0}
        assert [writer.write(**make_episode(seed, 2)) for seed in (1, 2)] == [1, 2]
    assert file_attributes(path)["num_demos"] == 3
    assert json.loads(file_attributes(path)["request"]) == {"task": "Lift", "demos": 3}
    assert not parts_folder(path).exists()


def test_broken_parts_are_removed_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.hdf5"
    parts = [write_part(path, index, **make_episode(index, 3)) for index in range(4)]
    os.truncate(parts[1], parts[1].stat().st_size // 2)
    with h5py.File(parts[2], "r+") as file:
        file["data/demo_2"].attrs["num_samples"] = 5
    with pytest.warns(UserWarning) as warned:
        assert finished_parts(path) == {0, 3}
    assert sorted(str(w.message).split(":")[0][-11:] for w in warned) == ["demo_1.hdf5", "demo_2.hdf5"]
    assert not parts[1].exists() and not parts[2].exists()

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "forbidden")

    monkeypatch.setattr(h5py, "File", forbidden)
    with pytest.raises(PermissionError):
        finished_parts(path)
    assert (
        parts[0].exists() and parts[3].exists()
    )  # a file that cannot be looked at just now is no broken file
