"""``vilma collect-robosuite``: what it writes, that it resumes, and what it says when something breaks."""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

if any(importlib.util.find_spec(name) is None for name in ("gymnasium", "robosuite", "h5py")):
    pytest.skip("needs the extra robot", allow_module_level=True)

import h5py

from vilma.datasets import robomimic_writer as robomimic
from vilma.tools.collect_robosuite import Request, _sendable, collect, main

SMALL = Request("robosuite/Lift", demos=2, cameras=("agentview",), size=32, placement=0.12, seed=3)
COMMAND = [
    *(sys.executable, "-m", "vilma.cli", "collect-robosuite", "--task", "Lift", "--size", "32"),
    *("--cameras", "agentview", "--placement", "0.12", "--seed", "3"),
]


def command(path: Path, *more: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, "--out", str(path), *more], text=True, stderr=subprocess.PIPE, **options
    )


def actions(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: demo["actions"][:] for name, demo in file["data"].items()}


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Path:
    """Two demonstrations by one worker, through the command."""
    path = tmp_path_factory.mktemp("collect") / "lift.hdf5"
    with command(path, "--demos", "2", "--workers", "1", stdout=subprocess.PIPE) as process:
        printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "2 demonstrations" in printed and "frames/s" in printed
    return path


def test_the_file_holds_what_the_card_says(collected):
    with h5py.File(collected) as file:
        data = file["data"]
        env_args = json.loads(data.attrs["env_args"])
        assert (env_args["env_name"], env_args["type"]) == ("Lift", 1)
        assert env_args["env_kwargs"]["camera_heights"] == 32
        assert dict(data.attrs)["reference_frame"] == "world" and data.attrs["action_kind"] == "delta"
        assert data.attrs["task"] == "lift the red cube" and data.attrs["control_freq"] == 20
        assert set(data) == {"demo_0", "demo_1"}
        assert data.attrs["total"] == sum(demo.attrs["num_samples"] for demo in data.values())
        for demo in data.values():
            length = demo.attrs["num_samples"]
            assert demo["actions"].shape == (length, 7) and demo["states"].shape == (length, 32)
            assert demo["obs/agentview_image"].shape == (length, 32, 32, 3)
            assert demo["obs/agentview_depth"].shape == (length, 32, 32, 1)
            assert demo["obs/robot0_eef_rot6d"].shape == (length, 6)
            assert demo["rewards"][-1] == 1 and demo["dones"][-1] == 1, "only successes are kept"
            assert demo["obs/object"][-1, 2] > 0.84
            assert json.loads(demo.attrs["ep_meta"]) == {"lang": "lift the red cube"}
            assert demo.attrs["model_file"].startswith("<mujoco")
    assert not robomimic.parts_folder(collected).exists()


def test_the_reader_reads_it(collected):
    from vilma.datasets.robomimic import RobomimicConfig, RobomimicDataset

    data = RobomimicDataset(RobomimicConfig(str(collected), cameras=("agentview",)))
    sample = data[0]
    assert sample["observation.state"].shape == (1, 11) and sample["task"] == "lift the red cube"
    assert sample["observation.depth.agentview"].min() > 0.02
    assert data.metadata["reference_frame"] == "world" and data.metadata["control_freq"] == 20


def test_a_finished_file_is_reused(collected, capsys):
    before = collected.stat().st_mtime_ns
    robomimic.parts_folder(collected).mkdir()  # as if killed between the merge and its clean-up
    assert main([*COMMAND[4:], "--out", str(collected), "--demos", "2"]) == 0
    assert "already complete" in capsys.readouterr().out
    assert collected.stat().st_mtime_ns == before and not robomimic.parts_folder(collected).exists()


def test_another_request_for_the_same_file_is_an_error(collected, tmp_path):
    for change in ({"demos": 3}, {"seed": 4}, {"noise": 0.0}, {"placement": None}):
        with pytest.raises(ValueError, match="holds other demonstrations"):
            collect(dataclasses.replace(SMALL, **change), collected)
    broken = tmp_path / "lift.hdf5"
    broken.write_bytes(collected.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="not a readable HDF5"):
        collect(SMALL, broken)
    assert broken.exists(), "a user's file is never removed"


def test_bad_requests():
    for change, message in (
        ({"demos": 0}, "at least 1"),
        ({"noise": -1.0}, "noise"),
        ({"perturbed": 1.5}, "share"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match="did you mean 'robosuite/Lift'"):
        main(["--task", "Lfit", "--out", "x.hdf5"])
    with pytest.raises(ValueError, match="workers"):
        collect(SMALL, "x.hdf5", workers=0)


def test_starts_and_seeds_of_episodes():
    request = dataclasses.replace(SMALL, demos=300, perturbed=2 / 3)
    starts = [request.start(index) for index in range(300)]
    assert all(abs(starts.count(kind) - 100) <= 3 for kind in ("plain", "missed", "moved"))
    assert {dataclasses.replace(request, perturbed=0.0).start(index) for index in range(300)} == {"plain"}
    seeds = {request.episode_seed(index, attempt) for index in range(300) for attempt in range(3)}
    assert len(seeds) == 900
    assert request.episode_seed(0, 0) != dataclasses.replace(request, seed=4).episode_seed(0, 0)


def test_errors_survive_the_way_between_processes():
    class Special(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    sent = pickle.loads(pickle.dumps(_sendable(Special(1, 2))))
    assert str(sent) == "stopped by Special: 1 2"
    full = _sendable(OSError(28, "No space left on device while writing"))
    assert isinstance(full, OSError) and full.errno == 28


@pytest.mark.long
def test_killed_and_run_again_it_finishes_what_is_missing(tmp_path, collected):
    path = tmp_path / "lift.hdf5"
    parts = robomimic.parts_folder(path)
    options = {"stdout": subprocess.DEVNULL, "start_new_session": True}
    with command(path, "--demos", "6", "--workers", "2", **options) as process:
        try:
            deadline = time.monotonic() + 200
            while len(list(parts.glob("demo_*.hdf5"))) < 2:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, which would go on for an episode
    assert not path.exists()
    finished = {part.name: part.stat().st_mtime_ns for part in parts.glob("demo_*.hdf5")}
    reports = []
    summary = collect(dataclasses.replace(SMALL, demos=6), path, 2, lambda s: reports.append(s.recorded))
    assert summary.reused >= len(finished) >= 2 and summary.recorded == 6 - summary.reused
    assert not parts.exists() and len(reports) == summary.recorded
    # One worker or two, killed or not: an episode depends on the request and its index alone.
    ours, theirs = actions(path), actions(collected)
    assert len(ours) == 6
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.long
def test_a_killed_simulator_is_replaced_and_counted(tmp_path):
    def kill_one(summary):
        if summary.recorded == 1 and not summary.crashes:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    path = tmp_path / "lift.hdf5"
    summary = collect(dataclasses.replace(SMALL, demos=4), path, 2, kill_one)
    assert len(summary.crashes) == 1 and "SIGKILL" in summary.crashes[0]
    assert len(actions(path)) == 4


@pytest.mark.long
def test_a_full_disk_is_named(tmp_path):
    def small_files():  # a limit on the size of a file reaches the writer as a full disk would
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    path = tmp_path / "lift.hdf5"
    with command(path, "--demos", "2", "--workers", "1", preexec_fn=small_files) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "while writing" in errors and "safe" in errors and "Traceback" not in errors
    assert not path.exists() and not list(robomimic.parts_folder(path).glob("*"))


def test_a_request_without_options_reads_as_it_always_did():
    assert json.loads(SMALL.text()) == {
        **{"task": "robosuite/Lift", "demos": 2, "cameras": ["agentview"], "size": 32, "placement": 0.12},
        **{"seed": 3, "noise": 0.4, "perturbed": 2 / 3},
    }
    moved = dataclasses.replace(SMALL, environment={"camera_jitter": [0.1, 10], "distractors": 2})
    assert json.loads(moved.text())["environment"] == {"camera_jitter": [0.1, 10], "distractors": 2}
    assert moved.env_options() == {"placement": 0.12, "camera_jitter": [0.1, 10], "distractors": 2}
    with pytest.raises(ValueError, match=r"--env.size, wanted --size"):
        dataclasses.replace(SMALL, environment={"size": 64})


def test_unknown_options_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "a.hdf5"), "--demo", "3"])
    assert "--demo" in capsys.readouterr().err


@pytest.mark.long
def test_options_of_the_environment_reach_it_and_are_recorded(tmp_path):
    path = tmp_path / "demos.hdf5"
    words = ["--task", "Lift", "--size", "32", "--cameras", "agentview", "--seed", "3", "--out", str(path)]
    words += ["--demos", "2", "--env.placement", "0.12", "--env.camera_jitter", "[0.1, 10]"]
    assert main([*words, "--env.distractors", "2"]) == 0
    with h5py.File(path) as file:
        asked = json.loads(file["data"].attrs["request"])
        poses = [file[f"data/demo_{i}/obs/agentview_extrinsic"][:] for i in range(2)]
        assert file["data/demo_0"].attrs["model_file"].count('name="distractor1_main"') == 1
    assert asked["placement"] == 0.12
    assert asked["environment"] == {"camera_jitter": [0.1, 10], "distractors": 2}
    assert all(np.array_equal(pose, pose[:1].repeat(len(pose), 0)) for pose in poses), "still in an episode"
    assert 0 < np.linalg.norm(poses[0][0, :3, 3] - poses[1][0, :3, 3]) < 0.2
    with pytest.raises(ValueError, match="holds other demonstrations"):
        main([*words, "--env.distractors", "3"])
