"""CALVIN's files: what is read, what is refused, where the cameras are, and that packing changes nothing."""

import codecs
import importlib.util
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from vilma.datasets import calvin_tree
from vilma.datasets.calvin import CalvinConfig, CalvinDataset
from vilma.datasets.calvin_pack import Shard, plan_shards, verify_shard
from vilma.datasets.calvin_tree import (
    CalvinTree,
    camera_intrinsic,
    camera_poses,
    gripper_pose,
    load_annotations,
)
from vilma.datasets.calvin_writer import relative_action
from vilma.datasets.robomimic import RobomimicConfig, RobomimicDataset
from vilma.tools.pack_calvin import Packer
from vilma.tools.pack_calvin import main as pack

_spec = importlib.util.spec_from_file_location("calvin_set", Path(__file__).with_name("calvin_set.py"))
calvin_set = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(calvin_set)

CAMERAS = json.loads((Path(__file__).parents[1] / "data" / "calvin" / "cameras.json").read_text())


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    return folder, calvin_set.write(folder)


def packed_set(path, **options):
    options = {"cameras": ("static", "gripper"), "state_keys": ("robot_obs",), "cache": "none", **options}
    return RobomimicDataset(RobomimicConfig(str(path), **options))


def pose_of(view_matrix) -> np.ndarray:
    """Camera -> world in OpenCV axes from PyBullet's flat matrix."""
    return np.linalg.inv(np.array(view_matrix).reshape(4, 4).T) @ np.diag([1.0, -1, -1, 1])


def test_gripper_camera_is_where_the_simulator_has_it():
    joints = np.array([row["joints"] for row in CAMERAS["gripper"]])
    expected = np.stack([pose_of(row["view_matrix"]) for row in CAMERAS["gripper"]])
    # The simulator's matrices are float32.
    np.testing.assert_allclose(gripper_pose(joints), expected, atol=3e-6)
    robot_obs = np.zeros((len(joints), 15))
    robot_obs[:, 7:14] = joints
    np.testing.assert_array_equal(camera_poses("gripper", robot_obs), gripper_pose(joints))


def test_static_camera_is_where_the_simulator_has_it():
    poses = camera_poses("static", np.zeros((2, 15)))
    np.testing.assert_allclose(poses[1], pose_of(CAMERAS["static"]), atol=2e-6)
    assert camera_intrinsic("static")[0, 0] == pytest.approx(1143.005, abs=1e-2)
    assert camera_intrinsic("gripper")[0, 0] == pytest.approx(54.735, abs=1e-2)
    assert camera_intrinsic("gripper")[0, 2] == 42


def test_relative_actions_scale_clip_and_wrap():
    state = np.zeros(15)
    state[:6] = 0.1, 0, 0, 3.1, 0, 0
    action = np.array([0.11, 0.5, -0.02, -3.14, -1.0, 0.025, -1.0])
    expected = [0.5, 1, -1, (2 * np.pi - 6.24) / 0.05, -1, 0.5, -1]
    np.testing.assert_allclose(relative_action(action, state), expected, atol=1e-9)


def test_windows_hold_what_the_files_hold(mini):
    folder, frames = mini
    data = CalvinDataset(CalvinConfig(str(folder), obs_horizon=2, action_horizon=4))
    assert len(data) == 8 + 7 + 8
    # Sample 8 is the first frame of the second segment, frame 5.
    sample = data[8]
    assert sample["task"] == calvin_set.TEXTS[1]
    for row, frame in enumerate((5, 5)):  # nothing before the segment is shown
        image = sample["observation.images.static"][row]
        np.testing.assert_array_equal(image.permute(1, 2, 0), frames[frame]["rgb_static"])
        np.testing.assert_array_equal(
            sample["observation.state"][row], frames[frame]["robot_obs"].astype("f4")
        )
    np.testing.assert_array_equal(data[9]["observation.depth.gripper"][0][3:], frames[5]["depth_gripper"][3:])
    assert (data[9]["observation.depth.gripper"][:, :3] == 0).all()  # the far plane is no reading
    expected = [relative_action(frames[i]["actions"], frames[i]["robot_obs"]) for i in (5, 6, 7, 8)]
    np.testing.assert_allclose(sample["action"], expected, rtol=1e-6)
    last = data[len(data) - 2]  # frame 18: two actions, then the last one again
    assert last["action_is_pad"].tolist() == [False, False, True, True]
    assert torch.equal(last["action"][1], last["action"][3])
    absolute = CalvinDataset(CalvinConfig(str(folder), relative=False))
    np.testing.assert_allclose(absolute[0]["action"][3], frames[3]["actions"], rtol=1e-6)
    assert absolute.metadata["action_kind"] == "absolute" and data.metadata["action_kind"] == "delta"
    whole = CalvinDataset(CalvinConfig(str(folder), annotated=False))
    assert len(whole) == 20 and whole[0]["task"] == "" and "episode_0000012" in whole.locate(12)


def test_a_mini_set_needs_no_tactile_readings_but_tolerates_them(mini):
    assert "rgb_tactile" in np.load(CalvinTree(mini[0]).path(0)).files


class Program:
    """What a pickle from a stranger may hold."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("where", ("whole", "inside"))
def test_annotations_that_are_a_program_are_refused_and_not_run(tmp_path, where):
    trap = tmp_path / "trap"
    value = Program(str(trap))
    found = {"language": {"ann": [value], "task": [""]}, "info": {"indx": [(0, 1)]}}
    holder = np.empty((), object)
    holder[()] = value if where == "whole" else found
    np.save(tmp_path / "auto_lang_ann.npy", holder)
    with pytest.raises(ValueError, match=r"not CALVIN's annotation file: it asks for posix\.mkdir"):
        load_annotations(tmp_path / "auto_lang_ann.npy")
    assert not trap.exists()
    np.load(tmp_path / "auto_lang_ann.npy", allow_pickle=True)  # numpy's own loader would have run it
    assert trap.exists()


# Pickles of the old protocol name modules without a length, so that they can be put in place here.
@pytest.mark.parametrize(
    ("protocol", "module"),
    ((2, "numpy.core.multiarray"), (2, "numpy._core.multiarray"), (4, None), (5, None)),
)
def test_annotations_of_every_numpy_are_read(tmp_path, protocol, module):
    found = {
        "language": {"ann": ["a", ["b"]], "task": np.array(["t", "u"]), "emb": np.zeros((2, 1, 384), "f4")},
        "info": {"indx": [(np.int64(0), 3), (4, 9)]},
    }
    holder = np.empty((), object)
    holder[()] = found
    stream = pickle.dumps(holder, protocol=protocol)
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        if module:
            stream = stream.replace(name, module.encode())
    path = tmp_path / "auto_lang_ann.npy"
    with path.open("wb") as file:
        header = {"descr": "|O", "fortran_order": False, "shape": ()}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(stream)
    segments = load_annotations(path)
    assert [(s.start, s.end, s.instruction, s.task) for s in segments] == [(0, 3, "a", "t"), (4, 9, "b", "u")]


class Coded:
    """Asks the one permitted function that is not numpy's for something that does not exist."""

    def __reduce__(self):
        return (codecs.encode, ("a", "no_such_codec"))


def test_annotations_with_an_unknown_codec_are_named(tmp_path):
    np.save(tmp_path / "auto_lang_ann.npy", np.array(Coded(), object))
    with pytest.raises(ValueError, match="not CALVIN's annotation file: it holds bytes as 'no_such_codec'"):
        load_annotations(tmp_path / "auto_lang_ann.npy")


class ForgedDtype:
    """A dtype of objects whose flags say that it has none: numpy then takes bytes for pointers."""

    def __reduce__(self):
        return (np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))


class ForgedArray:
    def __reduce__(self):
        empty = np.empty(0).__reduce__()[:2]
        return (*empty, (1, (1,), ForgedDtype(), False, b"A" * 8))


def test_annotations_cannot_forge_pointers(tmp_path):
    path = tmp_path / "auto_lang_ann.npy"
    found = {"language": {"ann": ForgedArray(), "task": ["t"]}, "info": {"indx": [(0, 1)]}}
    np.save(path, np.array(found, object))
    # In a process of its own: where the pointer is followed, that process dies.
    program = (
        "import sys; from vilma.datasets.calvin_tree import load_annotations; load_annotations(sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", program, path], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1 and "is not CALVIN's annotation file" in run.stderr


@pytest.mark.parametrize("value", (np.arange(6).reshape(2, 3).T, np.array(["ä", "b"]), np.float32(2.5)))
@pytest.mark.parametrize("protocol", (2, 3, 4, 5))
def test_arrays_come_out_of_a_pickle_as_they_went_in(value, protocol):
    found = calvin_tree._Restricted(io.BytesIO(pickle.dumps(value, protocol=protocol))).load()
    found = getattr(found, "value", found)
    assert found.dtype == value.dtype
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize(
    ("found", "message"),
    (
        ({"language": {"ann": []}}, "lacks 'task'"),
        ({"language": {"ann": ["a"], "task": []}, "info": {"indx": []}}, "1 texts, 0 tasks"),
        ({"language": {"ann": ["a"], "task": ["a"]}, "info": {"indx": [(3, 1)]}}, "ends at 1"),
    ),
)
def test_annotations_of_another_shape_are_named(tmp_path, found, message):
    np.save(tmp_path / "auto_lang_ann.npy", found)
    with pytest.raises(ValueError, match=message):
        load_annotations(tmp_path / "auto_lang_ann.npy")


def test_missing_things_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ep_start_end_ids\.npy"):
        CalvinTree(tmp_path)
    calvin_set.write(tmp_path)
    tree = CalvinTree(tmp_path)
    assert not list(tree.check())
    tree.path(3).unlink()
    assert list(tree.check()) == ["episode_0000003.npz"]
    data = CalvinDataset(CalvinConfig(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"episode_0000003\.npz is missing"):
        data[0]
    tree.path(3).write_bytes(tree.path(4).read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"episode_0000003\.npz is damaged"):
        data[0]
    with pytest.raises(ValueError, match="not wrist"):
        CalvinConfig(str(tmp_path), cameras=("wrist",))


def test_packed_windows_equal_those_of_the_npz_files(mini, tmp_path, capsys):
    folder, _ = mini
    pack([str(folder), "--out", str(tmp_path), "--workers", "1", "--segments-per-file", "2"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "instructions.txt",
        "packed.json",
        "part_0000.hdf5",
        "part_0001.hdf5",
    ]
    manifest = json.loads((tmp_path / "packed.json").read_text())
    assert (manifest["segments"], manifest["frames"], manifest["left_out"]) == (3, 23, [])
    for cache in ("none", "ram"):
        packed = packed_set(tmp_path, obs_horizon=2, cache=cache)
        plain = CalvinDataset(CalvinConfig(str(folder), obs_horizon=2))
        for _ in range(2):  # the second time by the place in the file
            ours, theirs = packed.__getitems__(range(23)), plain.__getitems__(range(23))
            assert ours.keys() == theirs.keys()
            for key, value in ours.items():
                assert value == theirs[key] if key == "task" else torch.equal(value, theirs[key]), key
    facts, expected = packed.metadata, plain.metadata
    assert {name: facts[name] for name in expected} == expected
    pack([str(folder), "--out", str(tmp_path), "--segments-per-file", "2"])
    assert "already packed" in capsys.readouterr().out


def test_compressed_files_hold_the_same(mini, tmp_path):
    for name, extra in (("plain", ()), ("small", ("--compress",))):
        pack([str(mini[0]), "--out", str(tmp_path / name), "--workers", "1", *extra])
    a, b = packed_set(tmp_path / "plain"), packed_set(tmp_path / "small")
    batches = [data.__getitems__([3, 11]) for data in (a, a, b, b)]
    for key in batches[0]:
        assert all(
            batch[key] == batches[0][key] if key == "task" else torch.equal(batch[key], batches[0][key])
            for batch in batches
        )
    assert all(a._blocks.values()) and not any(b._blocks.values())
    sizes = [(tmp_path / name / "part_0000.hdf5").stat().st_size for name in ("plain", "small")]
    assert sizes[0] > 3 * sizes[1]


def test_damaged_frames_are_named_and_can_be_left_out(tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    calvin_set.write(data)
    path = CalvinTree(data).path(9)
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match=r"(?s)1 segments cannot be read.*segment 1: .*episode_0000009"):
        pack([str(data), "--out", str(out), "--workers", "1"])
    pack([str(data), "--out", str(out), "--workers", "1", "--skip-damaged"])
    manifest = json.loads((out / "packed.json").read_text())
    assert manifest["segments"] == 2 and "episode_0000009" in manifest["left_out"][0]
    assert packed_set(out).metadata["tasks"] == sorted((calvin_set.TEXTS[0], calvin_set.TEXTS[2]))
    assert "left out: segment 1" in capsys.readouterr().out


def test_what_was_left_out_stays_named(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    calvin_set.write(data)
    path = CalvinTree(data).path(9)
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    command = [str(data), "--out", str(out), "--workers", "1"]
    pack([*command, "--skip-damaged"])
    (out / "packed.json").unlink()  # as after a kill just before it was written
    pack([*command, "--skip-damaged"])
    manifest = json.loads((out / "packed.json").read_text())
    assert manifest["segments"] == 2 and "segment 1: left out" in manifest["left_out"][0]
    path.write_bytes(whole)
    with pytest.raises(
        ValueError, match=r"segment 1: left out of .*part_0000\.hdf5 before; remove that file"
    ):
        pack(command)
    (out / "part_0000.hdf5").unlink()
    pack(command)
    manifest = json.loads((out / "packed.json").read_text())
    assert (manifest["segments"], manifest["left_out"]) == (3, [])


def test_a_packed_file_that_was_removed_is_packed_again(mini, tmp_path):
    command = [str(mini[0]), "--out", str(tmp_path), "--workers", "1", "--segments-per-file", "2"]
    pack(command)
    (tmp_path / "part_0001.hdf5").unlink()
    pack(command)
    assert verify_shard(plan_shards(tmp_path, 3, 2)[1])[0] == 1


def test_a_packed_file_is_compared_with_its_source(mini, tmp_path):
    pack([str(mini[0]), "--out", str(tmp_path), "--workers", "1"])
    shard = Shard(tmp_path / "part_0000.hdf5", (0, 1, 2))
    assert verify_shard(shard) == (3, 23)
    with h5py.File(shard.path, "r+") as file:
        file["data/demo_1/obs/gripper_depth"][4, 5, 6] += 1e-3
    with pytest.raises(ValueError, match="demo_1: gripper_depth differs"):
        verify_shard(shard)


def test_a_folder_packed_from_something_else_is_refused(mini, tmp_path):
    pack([str(mini[0]), "--out", str(tmp_path), "--workers", "1", "--segments", "2"])
    with pytest.raises(ValueError, match="--segments is -1, wanted at least 1"):
        pack([str(mini[0]), "--out", str(tmp_path), "--workers", "1", "--segments", "-1"])
    with pytest.raises(ValueError, match="was packed from something else"):
        pack([str(mini[0]), "--out", str(tmp_path), "--workers", "1"])


def test_a_killed_packing_goes_on(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    calvin_set.write(data)
    spans = [(i % 9, i % 9 + 9) for i in range(24)]
    path = data / "training" / "lang_annotations" / "auto_lang_ann.npy"
    texts = [f"text {i}" for i in range(24)]
    np.save(path, {"language": {"ann": texts, "task": texts}, "info": {"indx": spans}})
    command = [sys.executable, "-m", "vilma.cli", "pack-calvin", str(data), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([*command, "--workers", "2"], env=environment)
    parts, deadline = out / "part_0000.hdf5.parts", time.monotonic() + 60
    while time.monotonic() < deadline and len(list(parts.glob("demo_*"))) < 3:
        time.sleep(0.01)
    workers = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if path.read_text().rpartition(")")[2].split()[1] == str(process.pid)
    ]
    process.send_signal(signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline and any(_is_alive(worker) for worker in workers):
        time.sleep(0.01)
    assert not any(_is_alive(worker) for worker in workers)
    before = {int(path.stem.split("_")[1]) for path in parts.glob("demo_*.hdf5")}
    assert 3 <= len(before) < 24 and not (out / "packed.json").exists()

    tree = CalvinTree(data)
    packer = Packer(tree, tree.segments(), ("static", "gripper"), workers=1)
    todo = packer._todo(plan_shards(out, 24, 512), {}, {}, SimpleNamespace(skip=lambda frames: None))
    assert {number for _, number in todo} == set(range(24)) - before
    pack([str(data), "--out", str(out), "--workers", "1"])
    with h5py.File(out / "part_0000.hdf5") as file:
        assert [file[f"data/demo_{i}"].attrs["task"] for i in range(24)] == texts
    assert not parts.exists()


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
