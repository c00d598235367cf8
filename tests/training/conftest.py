"""The toy training, importable by its own name, and a server that runs it in killable processes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("toy_run.py")


@pytest.fixture(scope="session")
def toy():
    if "toy_run" not in sys.modules:
        spec = importlib.util.spec_from_file_location("toy_run", SCRIPT)
        sys.modules["toy_run"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["toy_run"])
    return sys.modules["toy_run"]


@pytest.fixture(scope="session")
def run_toy():
    """``run_toy(run_dir, **request)`` trains in a process of its own; see toy_run.py for the requests."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, str(SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdout.readline().strip() == "ready"

    def run(run_dir, **request):
        server.stdin.write(json.dumps({"run_dir": str(run_dir), **request}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait(timeout=30)
