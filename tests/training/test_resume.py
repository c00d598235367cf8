"""Exact resume: real SIGKILLs at any moment, damage, a full disk; the end is compared bit for bit."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

TIMINGS = {"samples_per_s", "data_wait", "seconds"}


def outcome(run_dir):
    """Everything that an interrupted run must share with an uninterrupted one."""
    state = torch.load(run_dir / "checkpoints" / "last" / "trainer.pt", weights_only=True)
    curve = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in line.items() if k not in TIMINGS} for line in curve]
    links = {name: os.readlink(run_dir / "checkpoints" / name) for name in ("last", "best")}
    folders = sorted(p.name for p in (run_dir / "checkpoints").iterdir() if not p.is_symlink())
    weights = (run_dir / "checkpoints" / "last" / "model.safetensors").read_bytes()
    return {k: v for k, v in state.items() if k != "seconds"}, curve, links, folders, weights


def flat(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, value in enumerate(tree) for k, v in flat(value, f"{prefix}.{i}").items()}
    return {prefix: tree}


def assert_same(run_dir, reference):
    state, *rest = outcome(run_dir)
    expected, *others = reference
    a, b = flat(state), flat(expected)
    assert a.keys() == b.keys()
    different = [k for k in a if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]
    assert not different
    assert rest == others


@pytest.fixture(scope="module")
def finished(run_toy, tmp_path_factory):
    """The directory of a run that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    answer = run_toy(run_dir)
    assert answer["code"] == 0, answer["output"]
    return run_dir


@pytest.fixture(scope="module")
def reference(finished):
    return outcome(finished)


def test_the_reference_learns_and_depends_on_its_seed(run_toy, reference, tmp_path):
    _, curve, links, folders, _ = reference
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"] and [line["step"] for line in curve] == list(
        range(2, 31, 2)
    )
    assert links["last"] == "step-00000030" and set(folders) >= {"step-00000025", "step-00000030"}
    run_toy(tmp_path / "run", options={"seed": 1})
    assert outcome(tmp_path / "run")[4] != reference[4]


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_every_file_system_step(run_toy, tmp_path, stride):
    """Each moment of three checkpoints, the removal of old ones included: killed there, then run again."""
    options = {"steps": 12, "checkpoint_every": 4, "keep": 1}
    assert run_toy(tmp_path / "whole", options=options)["code"] == 0
    whole = outcome(tmp_path / "whole")
    died_aside = []
    for call in range(1, 1000, stride):
        run_dir = tmp_path / f"at-{call}"
        answer = run_toy(run_dir, kill_at_call=call, options=options)
        if not answer["killed"]:
            break
        died_aside.append(any(run_dir.glob("checkpoints/.tmp-*")))
        answer = run_toy(run_dir, options=options)
        assert answer["code"] == 0, answer["output"]
        assert_same(run_dir, whole)
        assert not list(run_dir.rglob(".tmp-*"))
    assert len(died_aside) * stride > 40 and any(died_aside) and not all(died_aside)


def test_killed_again_and_again(run_toy, reference, tmp_path):
    run_dir, rng, kills = tmp_path / "run", random.Random(0), 0
    for _ in range(30):
        answer = run_toy(run_dir, kill_after=rng.uniform(0.0, 0.25), sleep=0.02)
        kills += answer["killed"]
        if not answer["killed"]:
            break
    assert kills >= 3
    answer = run_toy(run_dir)  # nothing else finishes it where a checkpoint takes longer than the kills leave
    assert answer["code"] == 0, answer["output"]
    assert_same(run_dir, reference)


def test_interrupted_between_checkpoints(run_toy, reference, tmp_path):
    """SIGTERM saves the step it was at, which no regular checkpoint would be."""
    answer = run_toy(tmp_path / "run", kill_after=0.15, signal=signal.SIGTERM, sleep=0.05)
    assert "KeyboardInterrupt" in answer["output"] and "which is saved" in answer["output"]
    answer = run_toy(tmp_path / "run")
    resumed = int(answer["output"].rsplit("RESUMED ", 1)[1])
    assert 0 < resumed < 30
    assert_same(tmp_path / "run", reference)


def half_written(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "name, damage",
    [
        ("trainer.pt", half_written),
        ("trainer.pt", one_bit),
        ("model.safetensors", one_bit),
        ("model.safetensors", os.remove),
        ("SHA256SUMS", half_written),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    run_toy, reference, finished, tmp_path, name, damage
):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    damage(run_dir / "checkpoints" / "step-00000030" / name)
    answer = run_toy(run_dir)
    assert answer["code"] == 0, answer["output"]
    assert "step-00000030 is damaged" in answer["output"] and "RESUMED 25" in answer["output"]
    assert (run_dir / "checkpoints" / "step-00000030.damaged").is_dir()
    os.rename(run_dir / "checkpoints" / "step-00000030.damaged", tmp_path / "damaged")
    assert_same(run_dir, reference)


def test_nothing_usable_is_an_error_that_loses_nothing(run_toy, finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir, symlinks=True)
    for folder in (run_dir / "checkpoints").glob("step-*"):
        one_bit(folder / "trainer.pt")
    before = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    answer = run_toy(run_dir)
    assert answer["code"] == 1 and "no checkpoint of this run can be used" in answer["output"]
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == before


def test_full_disk(run_toy, reference, tmp_path):
    """Files may not grow beyond a few kB: the next checkpoint fails; with room again the run goes on."""
    run_dir = tmp_path / "run"
    assert run_toy(run_dir, kill_at_step=6)["killed"]
    before = sorted(p.name for p in (run_dir / "checkpoints").glob("step-*"))
    assert before == ["step-00000005"]
    answer = run_toy(run_dir, largest_file=6000)
    assert answer["code"] == 1, answer["output"]
    assert "the disk is full" in answer["output"] and f"last good one is {run_dir}" in answer["output"]
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("step-*")) == before
    assert not list(run_dir.rglob(".tmp-*"))
    assert run_toy(run_dir)["code"] == 0
    assert_same(run_dir, reference)


def test_two_processes_cannot_train_in_one_directory(toy, tmp_path):
    from vilma.training.rundir import locked

    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path):
            os.write(writing, b"x")
            time.sleep(30)
        os._exit(0)
    try:
        os.read(reading, 1)
        with pytest.raises(ValueError, match=f"process {pid} is training in"), locked(tmp_path, patience=0.3):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with locked(tmp_path, patience=2):
        pass
