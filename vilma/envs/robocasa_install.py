"""Finding RoboCasa on this machine, and saying how to install it.

RoboCasa brings its own robosuite, mujoco and numpy, which exclude vilma's: it lives in an environment of its
own, with vilma beside it without dependencies, and the policy is served to it.
"""

import importlib.util
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .installation import Check, check_packages

__all__ = ["STEPS", "RoboCasaNotInstalled", "checks", "find_assets", "installed_version"]

# What RoboCasa's two versions in use insist on.
PINS = {
    "0.2": {"numpy": "1.23", "mujoco": "3.2.6"},
    "1.0": {"numpy": "2.2.5", "mujoco": "3.3.1"},
}
PACKAGES = (
    ("robosuite", "robosuite", "git+https://github.com/ARISE-Initiative/robosuite"),
    ("mujoco", "mujoco", "mujoco"),
    ("numpy", "numpy", "numpy"),
    ("gymnasium", "gymnasium", "gymnasium"),
    ("yaml", "pyyaml", "pyyaml"),
    ("h5py", "h5py", "h5py"),
    ("lxml", "lxml", "lxml"),
)
# Folders of the assets (10 GB) that are not in the repository.
ASSETS = ("fixtures/sinks", "fixtures/stoves", "textures", "objects")

STEPS = """\
RoboCasa goes into an environment of its own (its mujoco and numpy exclude vilma's). For 1.0 (RoboCasa365):

  python3.11 -m venv robocasa-env && . robocasa-env/bin/activate
  git clone https://github.com/ARISE-Initiative/robosuite && pip install -e robosuite
  git clone https://github.com/robocasa/robocasa && pip install -e robocasa
  pip install mujoco==3.3.1 numpy==2.2.5
  python -m robocasa.scripts.setup_macros
  python -m robocasa.scripts.download_kitchen_assets        # about 10 GB
  pip install --no-deps vilma                               # or -e PATH of a clone
  vilma doctor robocasa

For 0.2 (the 24 atomic tasks, with which papers until 2025 were measured), in another environment:

  git clone --branch v0.2 https://github.com/robocasa/robocasa && pip install --no-deps -e robocasa
  pip install --no-deps robosuite==1.5.1
  pip install mujoco==3.2.6 numpy==1.23.5 numba==0.57.1 'scipy<1.12' 'opencv-python-headless<4.11' \\
    'h5py<3.12' 'pillow<11' 'pyarrow<20' 'imageio<2.35' imageio-ffmpeg gymnasium pyyaml tqdm termcolor \\
    lxml pygame
  python robocasa/robocasa/scripts/setup_macros.py
  python robocasa/robocasa/scripts/download_kitchen_assets.py       # about 5 GB

Then serve the policy from vilma's own environment, and evaluate from this one:

  vilma serve runs/NAME                                     # there
  vilma eval robocasa365/OpenDrawer 127.0.0.1:8600          # here
"""


class RoboCasaNotInstalled(ImportError):
    """RoboCasa, its robosuite or its assets are missing; the message has the steps."""


def installed_version() -> str | None:
    """The version of robocasa here, None when there is none. Nothing is imported."""
    found = importlib.util.find_spec("robocasa")
    if found is None:
        return None
    # A source tree on the path has no distribution; both have this line.
    text = Path(found.origin).read_text() if found.origin else ""
    told = re.search(r"""^__version__ = ["']([\w.]+)["']""", text, re.MULTILINE)
    if told:
        return told.group(1)
    for name in ("robocasa", "rlinf-robocasa365", "praxis-robocasa"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def find_assets(source: Path | None = None) -> Path | None:
    """RoboCasa's folder of assets: of a clone, or of the installed package."""
    if source is not None:
        candidates = [source / "robocasa" / "models" / "assets", source / "models" / "assets"]
        return next((path for path in candidates if path.is_dir()), None)
    found = importlib.util.find_spec("robocasa")
    if found is None or not found.origin:
        return None
    assets = Path(found.origin).parent / "models" / "assets"
    return assets if assets.is_dir() else None


def checks(source: Path | None = None) -> Iterator[Check]:
    """What RoboCasa needs, one line each."""
    version = installed_version()
    yield Check("robocasa", version or "not installed", version is not None, "see below")
    yield from check_packages(PACKAGES)
    pins = PINS.get((version or "").rpartition(".")[0], {})
    for name, wanted in pins.items():
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        yield Check(
            f"{name} for robocasa {version}",
            have,
            have == wanted or have.startswith(f"{wanted}."),
            f"pip install {name}=={wanted}{'.*' if wanted.count('.') < 2 else ''}",
        )
    assets = find_assets(source)
    if assets is None:
        yield Check("assets", "not found", False, "install robocasa first, or give --source DIR of its clone")
        return
    for folder in ASSETS:
        there = (assets / folder).is_dir() and any((assets / folder).iterdir())
        yield Check(
            f"assets: {folder}",
            "there" if there else "missing",
            there,
            "python -m robocasa.scripts.download_kitchen_assets",
        )
