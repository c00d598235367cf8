"""A policy served from vilma's own environment to the one that this runs in, and evaluated from here."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from vilma.targets import Line

# An untrained policy: what is shown is the way there and back, not what it can do.
POLICY = """
import sys
from vilma.policies import PointMapPolicy
cameras, frame, folder = sys.argv[1].split(","), sys.argv[2], sys.argv[3]
values = {
    "type": "pointmap", "cameras": cameras, "image_size": {c: [128, 128] for c in cameras},
    "rgb_encoder": "spatial_softmax", "xyz_encoder": "spatial_softmax", "action_dim": 7, "use_state": False,
    "action_normalization": "none", "reference_frame": frame, "action_kind": "delta", "dim": 32,
    "num_blocks": 1, "num_heads": 2, "execute": 10,
}
PointMapPolicy.from_config({"policy": values}).save_pretrained(folder)
"""


def evaluate(
    main_python: str, folder: Path, task: str, cameras: tuple[str, ...], frame: str, *options: str
) -> Line:
    """Two episodes of ``task`` through `vilma serve` there and `vilma eval` here."""
    policy, out = folder / "policy", folder / "result.json"
    subprocess.run([main_python, "-c", POLICY, ",".join(cameras), frame, str(policy)], check=True)
    server = subprocess.Popen(
        [main_python, "-m", "vilma.cli", "serve", str(policy), "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = server.stdout.readline().split(" on ")[1].split(";")[0]
        command = [
            sys.executable,
            "-m",
            "vilma.cli",
            "eval",
            task,
            address,
            "--episodes",
            "2",
            "--workers",
            "1",
        ]
        command += ["--timeout", "600", "--videos", "0", "--out", str(out), *options]
        status = subprocess.run(command).returncode
    finally:
        server.terminate()
        server.wait()
    if status:
        return Line("2 episodes through a served policy", f"vilma eval ended with {status}", "0", False)
    result = json.loads(out.read_text())
    played = [(e["steps"], e["outcome"]) for e in result["episodes"]]
    has_torch = importlib.util.find_spec("torch") is not None
    figure = (
        f"{played}, {len(result['incidents'])} incidents, torch in the simulator's environment: {has_torch}"
    )
    met = len(played) == 2 and not result["incidents"] and not has_torch
    return Line("2 episodes through a served policy", figure, "2 played, no incident, no torch here", met)
