"""The software renderer and triton carry different LLVMs: either import order must work in one process."""

import importlib.util
import os
import subprocess
import sys

import pytest

if importlib.util.find_spec("robosuite") is None or importlib.util.find_spec("triton") is None:
    pytest.skip("needs robosuite and triton", allow_module_level=True)


def test_triton_after_the_simulator():
    code = """
import vilma.envs
env = vilma.envs.make("robosuite/Lift", size=32, seed=0)
env.reset(seed=1)
import triton
env.step([0.0] * 7)
print("alive")
"""
    result = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert result.returncode == 0 and "alive" in result.stdout, (result.returncode, result.stderr[-2000:])
