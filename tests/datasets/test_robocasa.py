"""RoboCasa's two layouts read alike, and replayed: depth against the geometry that the model is made of."""

import importlib.util
import json
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("mujoco")

from vilma.datasets.lerobot_files import DamagedEpisode
from vilma.datasets.robocasa import fixed_base_actions, moves_its_base, open_demos
from vilma.datasets.robomimic import RobomimicConfig, RobomimicDataset
from vilma.envs.replay import Replay, localize_assets
from vilma.tools import add_depth

spec = importlib.util.spec_from_file_location("robocasa_sets", Path(__file__).with_name("robocasa_sets.py"))
sets = sys.modules["robocasa_sets"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sets)

WRITERS = {"0.2": lambda folder: sets.write_v02(folder / "demo.hdf5"), "1.x": sets.write_v1}


@pytest.mark.parametrize("version", WRITERS)
def test_both_layouts_give_the_same_demonstrations(version, tmp_path):
    raw = open_demos(WRITERS[version](tmp_path))
    assert raw.env_args == sets.ENV_ARGS and len(raw.names) == 2
    for demo, made in zip(raw, sets.demos()):
        assert np.array_equal(demo.actions, made["actions"]), (
            "arm, gripper, base, mode, whatever the file's order"
        )
        assert np.array_equal(demo.states, made["states"]) and demo.model == sets.MODEL
        assert demo.task == made["lang"] and demo.meta["layout_id"] == 1
        assert set(demo.obs) == set(made["obs"])
        assert all(np.array_equal(demo.obs[key], value) for key, value in made["obs"].items())


def test_a_fixed_base_takes_seven_numbers():
    actions = sets.demos(moving=(1,))[1]["actions"]
    assert fixed_base_actions(actions).shape == (6, 7)
    assert moves_its_base(actions).tolist() == [False, False, True, False, False, False]
    actions[2, 11] = -1
    assert not moves_its_base(actions).any(), "in arm mode the base numbers do nothing"


@pytest.mark.parametrize("version", WRITERS)
def test_add_depth_gives_a_file_that_trains(version, tmp_path, capsys):
    source, out = WRITERS[version](tmp_path), tmp_path / "out" / "depth.hdf5"
    command = [str(source), "--out", str(out), "--no-shadows", "--size", "32"]
    assert add_depth.main(command) == 0
    data = RobomimicDataset(
        RobomimicConfig(
            str(out),
            cameras=sets.CAMERAS,
            state_keys=("robot0_base_to_eef_pos", "robot0_gripper_qpos"),
            reference_frame="base",
            action_kind="delta",
        )
    )
    assert data.metadata["action_dim"] == 7 and data.metadata["tasks"] == [d["lang"] for d in sets.demos()]
    assert len(data) == sum(sets.LENGTHS)
    made = sets.demos()
    for index, state in ((0, made[0]["states"][0]), (8, made[1]["states"][4])):
        sample = data[index]
        assert np.allclose(
            sample["action"][0], made[index > 3]["actions"][index - 4 * (index > 3), :7], atol=1e-6
        )
        for camera in sets.CAMERAS:
            points = unproject(sample, camera)
            height = points[..., 2] + sets.BASE_HEIGHT
            flat = np.abs(height) < 1e-4
            assert flat.mean() > 0.5, "the floor, in the frame of the base, lies at minus its height"
        # The box's top, in the base frame: turn and move what the state says of it.
        angle, offset = state[9], state[1:3] - [state[8], 0]
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        points = unproject(sample, "robot0_eye_in_hand").reshape(-1, 3)
        top = points[np.abs(points[:, 2] + sets.BASE_HEIGHT - 0.2) < 1e-3]
        assert len(top) > 3 and np.abs(top[:, :2].mean(0) - turn @ offset).max() < 0.02
    before = out.stat().st_mtime_ns
    assert add_depth.main(command) == 0 and "is finished" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds something else"):
        add_depth.main([*command[:-1], "16"])


def unproject(sample, camera):
    """(H, W, 3) in the reference frame, straight from the contract's definition."""
    depth = sample[f"observation.depth.{camera}"][0].double().numpy()
    k, pose = (sample[f"observation.{key}.{camera}"][0].double().numpy() for key in ("intrinsics", "pose"))
    v, u = np.mgrid[: depth.shape[0], : depth.shape[1]] + 0.5
    local = np.stack([(u - k[0, 2]) / k[0, 0] * depth, (v - k[1, 2]) / k[1, 1] * depth, depth], -1)
    return local @ pose[:3, :3].T + pose[:3, 3]


def test_demonstrations_that_drive_are_named_and_left_out(tmp_path, capsys):
    source = sets.write_v02(tmp_path / "demo.hdf5", moving=(1,))
    fixed = [str(source), "--no-shadows", "--size", "16", "--out", str(tmp_path / "fixed.hdf5")]
    assert add_depth.main(fixed) == 0
    assert "demo_2 drives its base in 1 of 6 steps" in capsys.readouterr().err
    with h5py.File(tmp_path / "fixed.hdf5") as file:
        assert list(file["data"]) == ["demo_0"] and file["data/demo_0"].attrs["source"] == "demo_1"
        assert json.loads(file["data/demo_0"].attrs["ep_meta"])["lang"] == "open the drawer 0"


@pytest.mark.long
def test_a_mobile_base_keeps_its_twelve_numbers_in_two_processes(tmp_path):
    source, out = sets.write_v02(tmp_path / "demo.hdf5", moving=(1,)), tmp_path / "mobile.hdf5"
    assert (
        add_depth.main([str(source), "--out", str(out), "--size", "16", "--base", "mobile", "--jobs", "2"])
        == 0
    )
    with h5py.File(out) as file:
        assert np.array_equal(file["data/demo_1/actions"][:], sets.demos(moving=(1,))[1]["actions"])


@pytest.mark.long
def test_a_recorded_episode_is_seen_again(tmp_path):
    """robosuite's own recording, with depth, beside the replay of its states."""
    from vilma.tools import collect_robosuite

    recorded, replayed = tmp_path / "lift.hdf5", tmp_path / "again.hdf5"
    arguments = ["--task", "Lift", "--demos", "1", "--seed", "3", "--out", str(recorded), "--workers", "1"]
    assert collect_robosuite.main(arguments) == 0
    assert add_depth.main([str(recorded), "--out", str(replayed), "--size", "84", "--no-shadows"]) == 0
    with h5py.File(recorded) as one, h5py.File(replayed) as other:
        for camera in ("agentview", "robot0_eye_in_hand"):
            had, got = (file[f"data/demo_0/obs/{camera}_depth"][:] for file in (one, other))
            assert np.mean(np.abs(had - got) < 1e-3) > 0.99, "all but pixels on edges"
            had, got = (file[f"data/demo_0/obs/{camera}_image"][:].astype(int) for file in (one, other))
            assert np.abs(had - got).mean() < 1
            had, got = (file[f"data/demo_0/obs/{camera}_extrinsic"][:] for file in (one, other))
            # Recorded kinematics are one physics step (2 ms) older than the recorded state.
            assert np.abs(had - got).max() < 5e-3


def test_damaged_and_foreign_files_are_answered(tmp_path):
    folder = sets.write_v1(tmp_path) / "lerobot"
    (folder / "extras" / "episode_000001" / "model.xml.gz").write_bytes(b"no gzip")
    raw = open_demos(folder)
    with pytest.raises(DamagedEpisode, match="episode_000001 cannot be read"):
        raw.read("episode_000001")
    extras = folder / "extras" / "episode_000000"
    for name in ("states.npz", "model.xml.gz"):  # damaged inside, behind a beginning that is whole
        whole = (extras / name).read_bytes()
        (extras / name).write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
        with pytest.raises(DamagedEpisode, match="episode_000000 cannot be read"):
            raw.read("episode_000000")
        (extras / name).write_bytes(whole)
    (folder / "meta" / "modality.json").write_text(json.dumps({"action": {}, "state": {}}))
    with pytest.raises(ValueError, match="does not tell where end_effector_position lies in action"):
        open_demos(folder).read("episode_000000")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no meta/info\.json"):
        open_demos(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no demonstrations at"):
        open_demos(tmp_path / "nothing.hdf5")
    with pytest.raises(ValueError, match="unknown camera 'robot0_agentview_centre'"):
        Replay(sets.MODEL, ["robot0_agentview_centre"], 16)
    with Replay(sets.MODEL, sets.CAMERAS, 16) as replay, pytest.raises(ValueError, match=r"wanted \(T, 18\)"):
        next(replay.frames(np.zeros((1, 5))))


def test_a_damaged_first_episode_does_not_stop_the_others(tmp_path, capsys):
    source, out = sets.write_v02(tmp_path / "demo.hdf5"), tmp_path / "depth.hdf5"
    with h5py.File(source, "a") as file:
        del file["data/demo_1/states"]
    assert add_depth.main([str(source), "--out", str(out), "--no-shadows", "--size", "16"]) == 0
    assert "left out" in capsys.readouterr().err
    with h5py.File(out) as file:
        assert [demo.attrs["source"] for demo in file["data"].values()] == ["demo_2"]
    with h5py.File(source, "a") as file:
        del file["data/demo_2"]
    with pytest.raises(ValueError, match=r"no episode of .* can be read: .* lacks states"):
        add_depth.main([str(source), "--out", str(tmp_path / "none.hdf5")])


def test_assets_of_another_machine_are_found_here(tmp_path):
    robosuite = pytest.importorskip("robosuite")
    mesh = "models/assets/robots/panda/meshes/hand.stl"
    assert (Path(robosuite.__file__).parent / "models/assets/robots/panda").is_dir()
    here = next((Path(robosuite.__file__).parent / "models/assets/robots/panda").rglob("*.obj"))
    inside = here.relative_to(Path(robosuite.__file__).parent)
    model = f'<mesh file="/home/she/robosuite/robosuite/{inside}"/><mesh file="/home/she/else/{mesh}"/>'
    found = localize_assets(model)
    assert f'file="{here}"' in found and f'file="/home/she/else/{mesh}"' in found
