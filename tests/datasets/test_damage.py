"""Files and episodes that are wrong in structure: named, left out where the rest can be used."""

from pathlib import Path

import numpy as np
import pytest

from vilma.datasets.robomimic import (
    EpisodeWriter,
    RobomimicConfig,
    RobomimicDataset,
    finished_parts,
    write_part,
)

h5py = pytest.importorskip("h5py")

LENGTH = 4
CONFIG = {"cameras": ("front",), "state_keys": ("pos",)}


def episode(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    obs = {
        "front_image": rng.integers(0, 256, (LENGTH, 6, 6, 3), dtype=np.uint8),
        "front_depth": np.ones((LENGTH, 6, 6), np.float32),
        "front_intrinsic": np.array([[6, 0, 3], [0, 6, 3], [0, 0, 1.0]]),
        "front_extrinsic": np.eye(4),
        "pos": rng.normal(size=(LENGTH, 3)),
    }
    return {"actions": rng.uniform(-1, 1, (LENGTH, 7)), "obs": obs}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    env_args = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}}
    attributes = {"reference_frame": "world", "action_kind": "delta", "task": "lift the cube"}
    with EpisodeWriter(tmp_path / "demos.hdf5", env_args, attributes) as writer:
        for seed in range(3):
            writer.write(**episode(seed))
    return tmp_path / "demos.hdf5"


def read(path: Path) -> RobomimicDataset:
    return RobomimicDataset(RobomimicConfig(str(path), **CONFIG))


@pytest.mark.parametrize(
    "text",
    ['{"env_name": "Li', "", "[]", "3", b"\xff\xfe", np.float64(3)],
    ids=["cut", "empty", "list", "number", "bytes", "float"],
)
def test_env_args_that_are_no_json_mapping_name_the_file(path: Path, text) -> None:
    with h5py.File(path, "r+") as file:
        file["data"].attrs["env_args"] = np.void(text) if isinstance(text, bytes) else text
    with pytest.raises(
        ValueError, match=r"demos\.hdf5, /data: the attribute env_args is .*JSON mapping; repair"
    ):
        read(path)
    with h5py.File(path, "r+") as file:
        del file["data"].attrs["env_args"]
    assert read(path).metadata["control_freq"] is None


def damage(file, name: str, value) -> None:
    del file[name]
    if value is not None:
        file[name] = value
    else:
        file.create_group(name)


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("obs", np.zeros((LENGTH, 3)), "its obs is a data set, wanted a group"),
        ("obs", np.zeros(LENGTH), "its obs is a data set"),
        ("obs", np.float64(3), "its obs is a data set"),
        ("obs", None, "it lacks obs/pos"),
        ("obs/pos", None, "obs/pos is a group or empty, wanted an array"),
        ("obs/front_image", None, "obs/front_image is a group or empty"),
        ("obs/pos", np.array([b"a", b"b", b"c", b"d"]), "cannot be read"),
        ("actions", None, "actions is a group or empty"),
        ("actions", h5py.Empty("f8"), "actions is a group or empty"),
        ("", np.zeros(LENGTH), "it is a data set, wanted a group"),
    ],
)
def test_an_episode_of_the_wrong_kind_is_skipped_and_named(path: Path, name: str, value, reason: str) -> None:
    with h5py.File(path, "r+") as file:
        damage(file, f"data/demo_1/{name}".rstrip("/"), value)
    with pytest.warns(UserWarning, match=r"left out 1 of 3 episodes"):
        data = read(path)
    assert len(data.skipped) == 1 and f"{path}:demo_1: {reason}" in data.skipped[0]
    assert [one.name for one in data.episodes] == ["demo_0", "demo_2"] and len(data) == 2 * LENGTH
    np.testing.assert_allclose(data[LENGTH]["observation.state"][0], episode(2)["obs"]["pos"][0], rtol=1e-6)


@pytest.mark.parametrize("meta", ['{"lang": "li', "[]"])
def test_an_episode_whose_ep_meta_is_no_json_mapping_is_skipped_and_named(path: Path, meta: str) -> None:
    with h5py.File(path, "r+") as file:
        file["data/demo_0"].attrs["ep_meta"] = meta
    with pytest.warns(UserWarning, match=r"demo_0: cannot be read \(the attribute ep_meta is"):
        assert len(read(path)) == 2 * LENGTH


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "front_image",
            np.zeros(LENGTH, np.uint8),
            r"front_image is uint8 \(4,\), wanted uint8 \(T, H, W, 3\)",
        ),
        ("front_depth", np.ones((LENGTH, 6), np.float32), r"front_depth is float32 \(4, 6\), wanted"),
        ("front_intrinsic", np.ones((LENGTH, 9)), r"front_intrinsic is \(9,\) a row, wanted \(3, 3\)"),
        ("front_extrinsic", np.ones((LENGTH, 3, 4)), r"front_extrinsic is \(3, 4\) a row, wanted \(4, 4\)"),
    ],
)
def test_arrays_of_the_wrong_number_of_axes_are_errors_that_name_them(path, name, value, message) -> None:
    with h5py.File(path, "r+") as file:
        damage(file, f"data/demo_0/obs/{name}", value)
    with pytest.raises(ValueError, match=rf"demos\.hdf5:demo_0: {message}"):
        read(path)


def test_a_part_whose_obs_is_a_data_set_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "demos.hdf5"
    for index in range(2):
        part = write_part(path, index, **episode(index))
    with h5py.File(part, "r+") as file:
        damage(file, "data/demo_1/obs", np.zeros(LENGTH))
    with pytest.warns(UserWarning, match="removed the broken episode .*its obs is a data set"):
        assert finished_parts(path) == {0}


def test_a_sample_is_located_in_file_episode_and_frame(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        damage(file, "data/demo_1/obs", np.zeros(LENGTH))
    with pytest.warns(UserWarning):
        data = read(path)
    assert data.locate(1) == f"{path}:demo_0, frame 1"
    assert data.locate(LENGTH + 2) == f"{path}:demo_2, frame 2"
