"""vilma train-policy on a tiny file: from command line to checkpoint, its resume, and its clear errors."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vilma import config
from vilma.datasets.robomimic import EpisodeWriter, RobomimicConfig, RobomimicDataset
from vilma.policies import load_policy
from vilma.report import read_timings
from vilma.tools.train_policy import RunConfig, check_depth, main
from vilma.training import Trainer

CONFIG = "configs/smoke/lift_smoke.yaml"
CAMERAS = ("agentview", "robot0_eye_in_hand")
SIDE = 20


def write_demos(
    path: Path, episodes: int = 3, seed: int = 0, frame: str = "world", task: str = "lift the red cube"
) -> Path:
    rng = np.random.default_rng(seed)
    pose = np.diag([1.0, -1.0, -1.0, 1.0]).astype(np.float32)  # looking down from one metre above the table
    pose[2, 3] = 1.8
    focal = np.array([[SIDE, 0, SIDE / 2], [0, SIDE, SIDE / 2], [0, 0, 1]], np.float32)
    env_args = {"env_name": "Lift", "env_version": "1.5.2", "type": 1, "env_kwargs": {"control_freq": 20}}
    attributes = {"reference_frame": frame, "action_kind": "delta", "task": task}
    with EpisodeWriter(path, env_args, attributes) as writer:
        for _ in range(episodes):
            length = int(rng.integers(8, 14))
            obs = {
                "robot0_eef_pos": rng.normal(size=(length, 3)),
                "robot0_eef_rot6d": rng.normal(size=(length, 6)),
                "robot0_gripper_qpos": rng.normal(size=(length, 2)),
            }
            for camera in CAMERAS:
                obs[f"{camera}_image"] = rng.integers(0, 256, (length, SIDE, SIDE, 3), dtype=np.uint8)
                obs[f"{camera}_depth"] = rng.uniform(0.8, 1.0, (length, SIDE, SIDE)).astype(np.float32)
                obs[f"{camera}_intrinsic"], obs[f"{camera}_extrinsic"] = focal, pose
            writer.write(actions=rng.uniform(-1, 1, (length, 7)), obs=obs)
    return path


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    return write_demos(tmp_path_factory.mktemp("demos") / "demos.hdf5")


def train(demos, run_dir, *overrides):
    return main([CONFIG, "--run", str(run_dir), "--data.path", str(demos), *map(str, overrides)])


@pytest.fixture(scope="module")
def finished(demos, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert train(demos, run_dir, "--train.tensorboard", "false") == 0
    return run_dir


def test_a_run_gives_a_policy_that_acts(demos, finished, capsys):
    assert config.load(RunConfig, finished / "config.yaml").train.steps == 20
    policy = load_policy(finished / "checkpoints" / "last")
    assert len(policy.statistics["action"]["mean"]) == 7
    obs = {f"observation.images.{c}": np.zeros((2, 3, SIDE, SIDE), np.uint8) for c in CAMERAS}
    obs |= {f"observation.depth.{c}": np.ones((2, SIDE, SIDE), np.float32) for c in CAMERAS}
    focal = np.array([[SIDE, 0, 10], [0, SIDE, 10], [0, 0, 1]], np.float32)
    obs |= {f"observation.intrinsics.{c}": np.stack([focal] * 2) for c in CAMERAS}
    obs |= {f"observation.pose.{c}": np.stack([np.eye(4, dtype=np.float32)] * 2) for c in CAMERAS}
    obs |= {"observation.state": np.zeros((2, 11), np.float32), "task": ["lift the red cube"] * 2}
    assert policy.select_action(obs).shape == (2, 7)
    state = torch.load(finished / "checkpoints" / "last" / "trainer.pt", weights_only=True)
    averaged = load_file(finished / "checkpoints" / "last" / "model.safetensors")
    assert state["step"] == 20 and averaged.keys() == state["model"].keys()
    assert any(not torch.equal(averaged[name], value) for name, value in state["model"].items())


def test_a_finished_run_is_left_alone_without_reading_data(finished, capsys):
    weights = finished / "checkpoints" / "last" / "model.safetensors"
    modified = weights.stat().st_mtime_ns
    assert train("/absent/demos.hdf5", finished, "--train.tensorboard", "false") == 0
    said = capsys.readouterr().out
    assert "already trained to step 20" in said and "next: vilma eval robosuite/Lift" in said
    assert weights.stat().st_mtime_ns == modified


def test_the_seed_decides_the_weights(demos, finished, tmp_path, capsys):
    for name, seed in (("same", "0"), ("other", "1")):
        assert train(demos, tmp_path / name, "--seed", seed, "--train.tensorboard", "false") == 0
    assert "vilma eval robosuite/Lift" in capsys.readouterr().out
    weights = [
        (folder / "checkpoints" / "last" / "model.safetensors").read_bytes()
        for folder in (finished, tmp_path / "same", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("--policy.action_dim", "6", "--policy.gripper_index", "[5]"), "action_dim is 7, the policy's is 6"),
        (("--policy.state_dim", "9"), "state_dim is 11, the policy's is 9"),
        (("--policy.reference_frame", "base"), "reference_frame is 'world', the policy's is 'base'"),
        (("--policy.action_kind", "absolute"), "action_kind is 'delta', the policy's is 'absolute'"),
        (("--policy.image_size.agentview", "[84, 84]"), r"agentview .* are \(20, 20\).*\(84, 84\)"),
        (("--policy.horizon", "12"), "policy.horizon is 12 but data.action_horizon is 10"),
        (("--data.cameras", "[agentview]"), "policy.cameras names robot0_eye_in_hand"),
        (
            ("--policy.text_encoder", "table", "--policy.tasks", "[open a drawer]"),
            "the task 'lift the red cube' is not in the policy's table",
        ),
        (
            (
                "--policy.text_encoder",
                "clip",
                "--policy.text_dim",
                "512",
                "--policy.text_weights",
                "/no/clip.pt",
            ),
            "no CLIP embedding of 'lift the red cube' .*vilma cache-language DATA",
        ),
        (("--train.stepps", "3"), "did you mean 'steps'"),
        (("--optim.lr", "fast"), "optim.lr"),
        (("--data", "5"), r"data is 5, but 'data' is a section; its fields are: path, cameras"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(demos, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(demos, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_demonstrations_without_a_task_need_its_name(tmp_path):
    demos = write_demos(tmp_path / "untold.hdf5", task="")
    with pytest.raises(ValueError, match=r"untold\.hdf5 has episodes that tell no task: .*--data\.task"):
        train(demos, tmp_path / "run")
    assert train(demos, tmp_path / "run", "--data.task", "lift", "--train.steps", "3") == 0


def test_missing_files_are_named(demos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.hdf5"):
        train(tmp_path / "absent.hdf5", tmp_path / "run")
    with pytest.raises(config.ConfigError, match=r"close: .*lift_smoke\.yaml"):
        main([str(Path(__file__).parents[2] / "configs/smoke/lift_smok.yaml")])


def test_changed_demonstrations_are_refused(demos, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("steps: 20", "steps: 30"))
    other = write_demos(tmp_path / "other.hdf5", seed=1)
    with pytest.raises(ValueError, match="the data changed since"):
        train(other, run_dir, "--train.steps", "30")
    assert train(demos, run_dir, "--train.steps", "30") == 0


def with_depth(demos: Path, path: Path, change) -> Path:
    """A copy of the demonstrations whose agentview has the depth ``change(depth, number of the episode)``."""
    h5py = pytest.importorskip("h5py")
    shutil.copy(demos, path)
    with h5py.File(path, "r+") as file:
        for number in range(len(file["data"])):
            stored = file[f"data/demo_{number}/obs/agentview_depth"]
            stored[...] = change(stored[...], number)
    return path


@pytest.mark.parametrize("value", [0.0, np.nan, -1.0])
def test_a_camera_without_any_reading_is_refused(demos, tmp_path, value):
    blind = with_depth(demos, tmp_path / "blind.hdf5", lambda depth, number: np.full_like(depth, value))
    message = (
        r"depth of camera agentview has no valid reading in any of 16 frames.*blind\.hdf5:demo_0, frame 0"
    )
    with pytest.raises(ValueError, match=message):
        train(blind, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_camera_out_of_the_depth_range_is_refused(demos, tmp_path):
    far = with_depth(demos, tmp_path / "far.hdf5", lambda depth, number: depth * 1000)
    message = r"no valid reading within policy.depth_range \(0.01, 5.0\) .*look like millimetres"
    with pytest.raises(ValueError, match=message):
        train(far, tmp_path / "run", "--policy.depth_range", "[0.01, 5.0]")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda depth, number: depth * (1000 if number == 1 else 1), "look like millimetres"),
        (lambda depth, number: depth * (number != 1), "no pixel has a reading"),
        (lambda depth, number: depth * (-1 if number == 1 else 1), "no pixel has a reading"),
    ],
)
def test_depth_that_looks_wrong_is_named(demos, tmp_path, change, reason):
    wrong = with_depth(demos, tmp_path / "wrong.hdf5", change)
    with pytest.warns(UserWarning, match=rf"camera agentview .*wrong\.hdf5:demo_1, frame \d+; .*{reason}"):
        assert train(wrong, tmp_path / "run", "--train.steps", "1", "--schedule.warmup", "0") == 0


def test_good_depth_is_not_warned_about(demos):
    data = RobomimicDataset(RobomimicConfig(str(demos)))
    with warnings.catch_warnings(action="error"):
        check_depth(data, [f"observation.depth.{camera}" for camera in CAMERAS])


def test_the_time_of_interrupted_phases_adds_up(demos, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    fit = Trainer.fit

    def interrupted(trainer):
        told = trainer.on_step

        def stop(step, values):
            told(step, values)
            if step == 7:
                os.kill(os.getpid(), signal.SIGINT)

        trainer.on_step = stop
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(demos, run_dir)
    first = read_timings(run_dir)["train"]
    assert first["runs"] == 1 and first["seconds"] > 0 and "--run" in first["command"]
    monkeypatch.setattr(Trainer, "fit", fit)
    assert train(demos, run_dir) == 0
    both = read_timings(run_dir)["train"]
    assert both["runs"] == 2 and both["seconds"] > first["seconds"]
    with pytest.raises(ValueError, match="optim"):  # refused before any update: no time of this run
        train(demos, run_dir, "--optim.lr", "1", "--train.steps", "30")
    assert read_timings(run_dir)["train"]["runs"] == 2


def test_a_dry_run_tells_what_a_run_takes(tmp_path, capsys):
    sizes = "{agentview: [20, 20], robot0_eye_in_hand: [20, 20]}"
    arguments = [CONFIG, "--dry-run", "2", "--run", str(tmp_path / "run"), "--data.path", "/absent"]
    with warnings.catch_warnings(action="error"):
        assert main([*arguments, "--policy.image_size", sizes, "--train.precision", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "8 samples = 2 processes x 1 micro-batches x 4; 20 updates" in said
    assert "kept for the backward pass of 4 samples in bf16" in said and "does not reach" not in said
    assert "learning rate: 0.0001 at 0, " in said and not (tmp_path / "run").exists()
    assert main([CONFIG, "--dry-run"]) == 0
    assert "policy.image_size does not name agentview, robot0_eye_in_hand" in capsys.readouterr().out
    with pytest.raises(ValueError, match="batch_size is 8, which 3 processes"):
        main([CONFIG, "--dry-run", "3"])


@pytest.mark.long
@pytest.mark.parametrize(
    "name, weights",
    [("calvin", "144,379,303"), ("robocasa", "111,089,415"), ("real", "94,458,728")],
)
def test_the_recipes_of_the_paper_can_be_trained(name, weights, capsys):
    assert (
        main([f"configs/policies/pointmap_{name}.yaml", "--dry-run", "4", "--train.sharding", "fsdp2"]) == 0
    )
    said = capsys.readouterr().out
    assert f"parameters: {weights}, of which {weights} are trained" in said
    assert "in bf16" in said and "gathered weights" in said and "does not reach" not in said
    assert ("1e-05 at 0" in said and "4.9e-05 at 24,999" in said) == (name == "calvin")


def torchrun(demos, run_dir, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "vilma.tools.train_policy", CONFIG, "--run-dir", str(run_dir)]
    command += ["--data.path", str(demos), *map(str, overrides)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, env=environment, **pipes)
    try:
        said, errors = launcher.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # it ends its processes, which killing it would not
        said, errors = launcher.communicate()
    assert launcher.returncode == 0, errors
    return said


@pytest.mark.long
def test_processes_follow_one_and_one_goes_on_for_them(demos, tmp_path):
    """The curves are the same for a loss that draws nothing (see `Trainer` for those that do) and is a mean
    over samples: one over the steps that are no padding weighs them by what shares their micro-batch."""
    options = ["--policy.head", "regression", "--policy.loss_on_padding", "true"]
    options += ["--train.log_every", "1", "--train.tensorboard", "false"]
    options += ["--schedule.length", "20", "--train.grad_clip", "0.1"]
    train(demos, tmp_path / "one", *options)
    curves = {"one": (tmp_path / "one" / "metrics.jsonl").read_text()}
    for sharding in ("none", "fsdp2"):
        run_dir = tmp_path / sharding
        said = torchrun(demos, run_dir, *options, "--train.sharding", sharding, "--train.steps", "3")
        assert said.count("trained to step 3") == 1 and said.count("next: vilma eval") == 1
        weights = load_file(run_dir / "checkpoints" / "last" / "model.safetensors")
        assert load_policy(run_dir / "checkpoints" / "last").state_dict().keys() == weights.keys()
        text = (run_dir / "config.yaml").read_text()
        (run_dir / "config.yaml").write_text(re.sub(r"\bsteps: 3\b", "steps: 20", text))
        train(demos, run_dir, *options)  # the remaining 17 updates, by one process
        curves[sharding] = (run_dir / "metrics.jsonl").read_text()
    found = {
        name: np.array([[line[k] for k in ("step", "loss", "grad_norm", "lr")] for line in lines])
        for name, text in curves.items()
        if (lines := [json.loads(line) for line in text.splitlines()])
    }
    assert found["one"].shape == (20, 4)
    for sharding in ("none", "fsdp2"):
        np.testing.assert_allclose(found[sharding], found["one"], rtol=1e-5)


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "vilma train-policy CONFIG [--run DIR] [--seed N]" in capsys.readouterr().out


@pytest.mark.long
def test_the_command_killed_twice_ends_as_if_it_never_was(demos, tmp_path):
    def start(run_dir):
        command = [sys.executable, "-m", "vilma.cli", "train-policy", CONFIG, "--run", str(run_dir)]
        command += ["--data.path", str(demos), "--train.steps", "120", "--train.keep", "99"]
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def kill_beyond(process, run_dir, step):
        while not (run_dir / "checkpoints" / f"step-{step:08d}").is_dir():
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    for step in (20, 60):
        kill_beyond(start(killed), killed, step)
    process = start(killed)
    assert process.wait() == 0 and "going on from step" in process.stdout.read()
    for name in ("model.safetensors", "config.yaml", "stats.json"):
        a, b = (run / "checkpoints" / "last" / name for run in (whole, killed))
        assert a.read_bytes() == b.read_bytes()
