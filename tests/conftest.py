"""One thread in every test: machines are shared, and bit-exact comparisons need a fixed thread count."""

import os

os.environ.setdefault("MUJOCO_GL", "osmesa")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import triton  # noqa: F401 - before MuJoCo's software renderer, whose LLVM would shadow triton's own

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
