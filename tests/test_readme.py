"""The README's Python runs as it stands."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_it_has_code():
    assert BLOCKS


@pytest.mark.long
@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block):
    if "vilma.envs" in block and importlib.util.find_spec("robosuite") is None:
        pytest.skip("needs the extra robot")
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", block]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
