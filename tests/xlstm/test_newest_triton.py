"""The Triton kernels on the newest Triton that is published, which the lock file does not have.

Only triton is newer here: it lies in a folder of its own in front of the installed packages.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import test_rnn_triton as rnn
from .test_mlstm_triton import FAST, LIMITS, PRODUCTS, check, faults, limit_of, run

pytestmark = pytest.mark.long

NO_NETWORK = ("error sending request", "connection", "offline")
# Tiles were chosen to spill nothing on the pinned Triton; another one allocates a little differently.
SPILLS = 40
CELL_SPILLS = 64  # four gates of 96 features fill the registers of the resident form
SHAPES = [
    {"steps": 4096, "state": True},
    {"steps": 4096, "dim_qk": 256, "dim_v": 512, "kernels": PRODUCTS},
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Iterator[Path]:
    """A folder with the newest triton; skips the tests where there is no network, but never in CI."""
    folder = tmp_path_factory.mktemp("newest")
    uv = Path(sys.executable).with_name("uv")
    installer = [str(uv), "pip", "install"] if uv.exists() else [sys.executable, "-m", "pip", "install"]
    command = [
        *installer,
        "--quiet",
        "--upgrade",
        "--no-deps",
        "--target",
        str(folder / "packages"),
        "triton",
    ]
    # from the folder itself: the project's settings hold triton to its pin
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    unreachable = any(sign in done.stderr.lower() for sign in NO_NETWORK)
    if done.returncode and unreachable and not os.environ.get("CI"):
        pytest.skip(f"no network to download the newest triton from: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    yield folder / "packages"
    shutil.rmtree(folder)


def test_it_is_newer_than_the_pinned_one_or_the_same(packages):
    from packaging.version import Version

    code = "import triton; print(triton.__version__)"
    versions = [
        subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout
        for env in (os.environ, os.environ | {"PYTHONPATH": str(packages)})
    ]
    print(versions)
    assert Version(versions[1].strip()) >= Version(versions[0].strip())


def test_interpreter_on_the_newest_triton(packages):
    cases = [dict(case) for case in FAST.values()]
    # what a program computes from bfloat16 is garbage there unless it is made float32 first
    cases += [
        {"steps": 20, "chunk": 8, "dtype": dtype, "gate": "sigmoid"} for dtype in ("float16", "bfloat16")
    ]
    done = run("triton_cases.py", cases, interpret=True, packages=packages)
    for case, found in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        check(case, found, limit_of(case))


@pytest.mark.parametrize("target", LIMITS)
def test_compiled_by_the_newest_triton(packages, target):
    jobs = [{"target": target, **shape} for shape in SHAPES]
    lines = run("triton_compile.py", jobs, packages=packages).stdout.splitlines()
    print("\n".join(lines))
    found = [json.loads(line) for line in lines]
    assert {x["kernel"] for x in found} >= {"carry", "carry_backward", "forward_tile", "grad_q_tile", "gates"}
    wrong = [f"{faults(x, SPILLS)}: {x}" for x in found if faults(x, SPILLS)]
    assert not wrong, "\n".join(wrong)


def test_interpreter_of_the_cells_on_the_newest_triton(packages):
    cases = list(rnn.FAST.values())
    for case, found in zip(cases, rnn.ratios(cases, packages=packages), strict=True):
        check(case, found, rnn.limit_of(case))


@pytest.mark.parametrize("target", rnn.LIMITS)
def test_cells_compiled_by_the_newest_triton(packages, target):
    jobs = [job for job in rnn.jobs_for(target) if job.get("cell", "slstm") == "slstm"]
    lines = run("rnn_triton_compile.py", jobs, packages=packages).stdout.splitlines()
    print("\n".join(lines))
    found = [json.loads(line) for line in lines]
    assert {x["kernel"] for x in found} >= {"forward_resident", "backward_resident", "forward_tiled"}
    wrong = [f"{rnn.faults(x, CELL_SPILLS)}: {x}" for x in found if rnn.faults(x, CELL_SPILLS)]
    assert not wrong, "\n".join(wrong)
