"""The chains and initial states that CALVIN's public evaluation draws, from a clone of it, beside ours."""

import json
import subprocess
import sys
from pathlib import Path

from vilma.envs import calvin_protocol as protocol
from vilma.targets import Line

# Runs in a process of its own. The two modules are the clone's own files; what else they import at their top
# (learning code, and pyhash, which no longer installs) is replaced by things that do nothing, or by our hash.
PROGRAM = """
import importlib.util, json, sys, types
from unittest import mock

from vilma.envs.calvin_protocol import fnv1_32

root, count = sys.argv[1], int(sys.argv[2])

class Nothing:
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name.split(".")[0] in ABSENT else None
    def create_module(self, spec):
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module
    def exec_module(self, module):
        pass

ABSENT = {"calvin_agent", "calvin_env", "cv2", "hydra", "omegaconf", "pytorch_lightning", "torch"}
sys.meta_path.insert(0, Nothing())
try:
    import pyhash
    real = True
except ImportError:
    real = False
    pyhash = sys.modules["pyhash"] = types.ModuleType("pyhash")
    pyhash.fnv1_32 = lambda: lambda text: fnv1_32(text.encode("utf-16-le"))
loaded = {}
for name in ("utils", "multistep_sequences"):
    full = f"calvin_agent.evaluation.{name}"
    path = f"{root}/calvin_models/calvin_agent/evaluation/{name}.py"
    spec = importlib.util.spec_from_file_location(full, path)
    loaded[name] = sys.modules[full] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded[name])
rows = []
for condition, tasks in loaded["multistep_sequences"].get_sequences(count, 1):
    robot, scene = loaded["utils"].get_env_state_for_initial_condition(condition)
    rows.append([condition, list(tasks), robot.tolist(), scene.tolist()])
print(json.dumps({"pyhash": real, "rows": rows}))
"""


def compare(clone: Path, count: int) -> Line:
    """Draw ``count`` chains with the public code (10 minutes of a core for 1000) and with ours.

    Raises ValueError when the clone is none of mees/calvin, or its code fails.
    """
    file = clone / "calvin_models" / "calvin_agent" / "evaluation" / "multistep_sequences.py"
    if not file.is_file():
        raise ValueError(f"{clone} is no clone of the challenge's repository: it lacks {file}")
    command = [sys.executable, "-c", PROGRAM, str(clone), str(count)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(f"the public code failed: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    theirs = json.loads(run.stdout.splitlines()[-1])
    ours = protocol.chains() if count == protocol.CHAINS else protocol.draw_chains(count)
    equal = sum(
        chain.condition == condition
        and list(chain.tasks) == tasks
        and [values.tolist() for values in protocol.initial_state(chain.condition)] == [robot, scene]
        for chain, (condition, tasks, robot, scene) in zip(ours, theirs["rows"], strict=True)
    )
    with_hash = "its own pyhash" if theirs["pyhash"] else "our hash (pyhash is not installed)"
    return Line(
        "chains and initial states drawn by the public code",
        f"{equal} of {count} equal bit for bit, with {with_hash}",
        "all",
        equal == count,
    )
