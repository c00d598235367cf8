"""``vilma serve`` as a process of its own: same episodes as without it, and what happens when it dies."""

import json
import os
import subprocess
import sys

import pytest

from vilma.targets import ROOT
from vilma.tools import eval as tool

POLICY = ROOT / "tests" / "data" / "demo_policy"


def start(policy, *options):
    """The process, and the address that it prints."""
    command = [sys.executable, "-m", "vilma.cli", "serve", str(policy), "--port", "0", *options]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().split(" on ")[-1].split(";")[0]


def test_what_cannot_be_served_says_so(tmp_path):
    for arguments, message in (
        ([str(tmp_path / "nothing")], "no policy at"),
        ([str(POLICY), "--port", "99999"], "--port is 99999"),
        ([str(POLICY), "--threads", "0"], "--threads is 0"),
    ):
        command = [sys.executable, "-m", "vilma.cli", "serve", *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.long
def test_a_served_policy_plays_the_same_episodes(tmp_path, monkeypatch):
    pytest.importorskip("robosuite")
    monkeypatch.chdir(tmp_path)
    options = ["--episodes", "1", "--placement", "0.12", "--videos", "0", "--workers", "1"]
    assert tool.main(["robosuite/Lift", str(POLICY), *options, "--out", "own.json"]) == 0
    process, address = start(POLICY)
    try:
        assert tool.main(["robosuite/Lift", address, *options, "--out", "served.json"]) == 0
        process.terminate()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0 and errors.strip() == "ended"
    finally:
        process.kill()
    own, served = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("own", "served"))
    assert served["description"] == own["description"]
    for key in ("steps", "success", "return"):
        assert [e[key] for e in served["episodes"]] == [e[key] for e in own["episodes"]]
    assert served["summary"]["successes"] == 1
    # The finished part of a result is there for the next server, also when this one is killed on the way.
    process, address = start(POLICY)
    process.kill()
    process.wait()
    command = [sys.executable, "-m", "vilma.cli", "eval", "robosuite/Lift", address, *options]
    failed = subprocess.run([*command, "--out", "served.json"], capture_output=True, text=True)
    assert failed.returncode == 1 and "no policy server answers" in failed.stderr
    assert json.loads((tmp_path / "served.json").read_text()) == served
