"""``make demo``, small, killed with SIGKILL in each phase: the next start finishes and repeats nothing.

The real thing on a real simulator: the processes of the demo form one group, and the group is killed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
PHASE_LIMIT = 400.0

if shutil.which("make") is None or not (ROOT / ".venv" / "bin" / "vilma").exists():
    pytest.skip("needs make and an environment made by it", allow_module_level=True)
h5py = pytest.importorskip("h5py")


def start(run: Path, log: Path) -> subprocess.Popen:
    train = "--train.steps 30 --train.checkpoint_every 10 --train.threads 1 --train.batch_size 16"
    train += " --schedule.warmup 5"
    command = ["make", "demo", f"RUN={run}", "DEMOS=3", "EPISODES=2", f"TRAIN={train}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
    )


def kill_when(run: Path, log: Path, reached) -> None:
    """Start the demo and kill its whole group as soon as ``reached`` says that a phase is under way."""
    process = start(run, log)
    began = time.monotonic()
    try:
        while not reached():
            assert process.poll() is None, f"the demo ended before the phase:\n{log.read_text()[-3000:]}"
            assert time.monotonic() - began < PHASE_LIMIT, (
                f"the phase did not come:\n{log.read_text()[-3000:]}"
            )
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stamps(*paths: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in paths}


def actions(path: Path, demo: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[f"data/{demo}/actions"][:]


@pytest.mark.long
def test_killed_in_each_phase(tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    demos, parts = run / "demos.hdf5", run / "demos.hdf5.parts"
    wide = run / "eval" / "robosuite_Lift_placement-0.12.json"

    # Collecting: one episode is whole; it survives as it is.
    kill_when(run, log, lambda: len(list(parts.glob("demo_*.hdf5"))) >= 1)
    part = min(parts.glob("demo_*.hdf5"))
    first = part.stem, actions(part, part.stem)
    assert not demos.exists()

    # Training: a checkpoint is there.
    kill_when(run, log, lambda: (run / "checkpoints" / "last").exists())
    assert "from an earlier run" in log.read_text(), "the finished episode was collected again"
    assert not part.exists(), "parts belong into the file"
    assert np.array_equal(actions(demos, first[0]), first[1])
    collected = stamps(demos)

    # Evaluating: one of the two episodes is written down.
    kill_when(run, log, lambda: wide.exists() and len(json.loads(wide.read_text())["episodes"]) >= 1)
    text = log.read_text()
    assert "already complete" in text and stamps(demos) == collected
    assert (run / "checkpoints" / "step-00000030").is_dir()
    trained = stamps(run / "checkpoints" / "step-00000030" / "model.safetensors")
    episode = json.loads(wide.read_text())["episodes"][0]

    # The report: every evaluation is finished.
    blank = run / "eval" / "robosuite_Lift_placement-0.12_blank-images-depth.json"
    kill_when(run, log, lambda: blank.exists() and len(json.loads(blank.read_text())["episodes"]) == 2)
    assert re.search(r"already trained", log.read_text())
    kept = json.loads(wide.read_text())["episodes"]
    assert len(kept) == 2 and episode in kept, "a finished episode was played again"

    process = start(run, log)
    assert process.wait(PHASE_LIMIT) == 0, log.read_text()[-3000:]
    assert stamps(*collected) == collected and stamps(*trained) == trained
    assert (run / "report.html").stat().st_size > 10_000
    assert set(json.loads((run / "timings.json").read_text())) >= {"collect", "train"}
