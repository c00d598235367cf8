"""Finding CALVIN's simulator, calvin_env, on this machine, and saying how to install it.

The user brings it from its public repository (MIT): a clone, because the scenes, the meshes and the
configuration files lie beside the Python package and no registry carries them. None of it is needed for
reading data.
"""

import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .installation import Check, check_packages

__all__ = ["STEPS", "CalvinNotInstalled", "checks", "find_source"]

VARIABLE = "CALVIN_ENV"

# Module, distribution, what pip takes. The only pins are of packages that will not change again:
# gym is closed, and pybullet 3.2.7 is the version that everything here was measured with.
PACKAGES = (
    ("pybullet", "pybullet", "pybullet==3.2.7"),
    ("gym", "gym", "gym==0.26.2"),
    ("hydra", "hydra-core", "hydra-core>=1.3"),
    ("omegaconf", "omegaconf", "omegaconf>=2.3"),
    ("quaternion", "numpy-quaternion", "numpy-quaternion"),
    ("git", "gitpython", "gitpython"),
    ("cv2", "opencv-python", "opencv-python"),
    ("numba", "numba", "numba"),
    ("scipy", "scipy", "scipy"),
)

STEPS = f"""\
CALVIN's simulator goes into vilma's own environment (it runs on numpy 2; tacto, pyhash and the version pins
of 2021 are not needed):

  git clone https://github.com/mees/calvin_env
  pip install {" ".join(shlex.quote(requirement) for _, _, requirement in PACKAGES)}
  export {VARIABLE}=$PWD/calvin_env
  vilma doctor calvin

On a machine without a GPU images come from PyBullet's own software renderer; with one, evaluate policies that
were trained on the released images with --env.renderer egl.
"""


class CalvinNotInstalled(ImportError):
    """calvin_env or one of its packages is missing; the message has the steps."""


def find_source(source: str | Path | None = None) -> Path:
    """The clone of calvin_env: ``source``, or ``$CALVIN_ENV``, or where an importable calvin_env lies.

    Raises:
        CalvinNotInstalled: there is none, or it lacks its configuration or its scenes.
    """
    for name, given in (("the path given", source), (f"${VARIABLE}", os.environ.get(VARIABLE))):
        if given:
            return _checked(Path(given).expanduser().absolute(), name)
    spec = importlib.util.find_spec("calvin_env")
    if spec is not None and spec.origin:
        return _checked(Path(spec.origin).parent.parent, "the installed calvin_env")
    raise CalvinNotInstalled(f"calvin_env is not installed.\n\n{STEPS}")


def _checked(root: Path, name: str) -> Path:
    nested = root / "calvin_env"  # the challenge's repository holds the simulator as a submodule
    if not (root / "conf").is_dir() and (nested / "conf").is_dir():
        root = nested
    needed = ("calvin_env/envs/play_table_env.py", "conf/config_data_collection.yaml", "data/franka_panda")
    missing = [part for part in needed if not (root / part).exists()]
    if missing:
        raise CalvinNotInstalled(
            f"{name} is {root}, which is no clone of calvin_env: it lacks {', '.join(missing)}.\n\n{STEPS}"
        )
    return root


def checks(source: Path | None = None) -> Iterator[Check]:
    """What ``vilma doctor calvin`` looks at, in order: packages, the clone, a picture from each camera."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Check("Python", version, sys.version_info >= (3, 11), "use Python 3.11 or newer")
    found = list(check_packages(PACKAGES))
    yield from found
    try:
        root = find_source(source)
    except CalvinNotInstalled as error:
        text = str(error).split("\n\n")[0]
        yield Check(
            "calvin_env",
            text,
            False,
            f"git clone https://github.com/mees/calvin_env && export {VARIABLE}=$PWD/calvin_env",
        )
        return
    yield Check("calvin_env", str(root), True)
    if all(check.ok for check in found):
        yield _draws(root, "tiny")
        yield _draws(root, "egl")._replace(is_optional=True)


def _draws(root: Path, renderer: str) -> Check:
    """Build the simulator and draw, in a process of its own: a broken OpenGL ends it without a word."""
    program = (
        f"import vilma.envs; env = vilma.envs.make('calvin/D', source={str(root)!r}, renderer={renderer!r}); "
        "print('drew', env.reset(seed=0)[0]['observation.images.static'].std() > 5)"
    )
    name = f"built and drawn ({renderer})"
    try:
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return Check(name, "no answer within 300 s", False)
    if run.returncode == 0 and "drew True" in run.stdout:
        return Check(name, "yes", True)
    last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
    remedy = "apt-get install libegl1 libgl1 libgl1-mesa-dri, or a GPU's driver" if renderer == "egl" else ""
    return Check(name, last, False, remedy)
