"""Stored simulator states back into pictures: a recorded MuJoCo model, set to each state and rendered.

Needs the meshes and textures of the suite that recorded it, not the suite's own classes: the model is MJCF,
and a flattened state ``[time, qpos, qvel]`` is all that moves. Works for robosuite, robomimic and RoboCasa
files. T is the number of states.
"""

import importlib
import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .mujoco_cameras import CameraRig
from .opengl import prepare, raise_if_missing

__all__ = ["BASE_SITE", "Replay", "localize_assets"]

# The frame in which RoboCasa's actions and PointMapPolicy's points are expressed.
BASE_SITE = "mobilebase0_center"

_PACKAGES = ("robocasa", "robosuite", "libero")
# Collision shapes, which robosuite and what is built on it do not draw.
_COLLISION_GROUP = 0


class Replay:
    """One recorded model with its cameras.

    Args:
        model: MJCF; asset paths of another machine are replaced by those of the packages installed here.
        cameras: names in the model; those of RoboCasa are added where the file lacks them.
        size: height and width of the pictures.
        reference_frame: "world", or "base" (the site ``mobilebase0_center``).

    Raises:
        ValueError: no such camera or site, or a model that MuJoCo refuses (missing assets are named).
    """

    def __init__(
        self,
        model: str,
        cameras: Sequence[str],
        size: int,
        *,
        reference_frame: str = "world",
        shadows: bool = True,
    ):
        if reference_frame not in ("world", "base"):
            raise ValueError(f"reference_frame is {reference_frame!r}, wanted world or base")
        prepare()
        try:
            self._mujoco = importlib.import_module("mujoco")
        except Exception as error:
            raise_if_missing(error)
            raise
        text = _with_cameras(localize_assets(model), cameras)
        try:
            self.model = self._mujoco.MjModel.from_xml_string(text)
        except ValueError as error:
            raise ValueError(
                f"the recorded model cannot be loaded here: {error}. Its suite's assets must be installed"
            ) from error
        self.data = self._mujoco.MjData(self.model)
        self.cameras, self.reference_frame = tuple(cameras), reference_frame
        self._rig = CameraRig(self.model, size, hidden_groups=(_COLLISION_GROUP,), shadows=shadows)
        self._rig.check(cameras, "the recorded model")
        if reference_frame == "base":
            names = [self.model.site(i).name for i in range(self.model.nsite)]
            if BASE_SITE not in names:
                raise ValueError(
                    f"the recorded model has no site {BASE_SITE}: it has no base frame, take world"
                )

    def frames(self, states: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """For each state (T, S): the camera keys of an observation, see ``CameraRig.observe``."""
        size = 1 + self.model.nq + self.model.nv
        if states.ndim != 2 or states.shape[1] != size:
            raise ValueError(f"states have shape {states.shape}, wanted (T, {size}) for this model")
        for state in states:
            self.data.time = state[0]
            self.data.qpos[:] = state[1 : 1 + self.model.nq]
            self.data.qvel[:] = state[1 + self.model.nq :]
            self._mujoco.mj_forward(self.model, self.data)
            yield self._rig.observe(self.data, self.cameras, True, self.reference_pose())

    def reference_pose(self) -> np.ndarray | None:
        """(4, 4) reference frame -> world now; None for the world itself."""
        if self.reference_frame == "world":
            return None
        site, pose = self.data.site(BASE_SITE), np.eye(4)
        pose[:3, :3], pose[:3, 3] = site.xmat.reshape(3, 3), site.xpos
        return pose

    def close(self) -> None:
        self._rig.close()

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def localize_assets(model: str) -> str:
    """The MJCF with every file of another machine's robosuite, robocasa or libero replaced by that of the
    package that is installed here."""
    roots: dict[str, Path | None] = {}

    def place(match: re.Match) -> str:
        path = match.group(2)
        if Path(path).is_file():
            return match.group(0)
        parts = path.replace("\\", "/").split("/")
        for package in _PACKAGES:
            if package not in parts:
                continue
            if package not in roots:
                found = importlib.util.find_spec(package)
                roots[package] = Path(found.origin).parent if found and found.origin else None
            last = len(parts) - 1 - parts[::-1].index(package)
            here = roots[package] and roots[package].joinpath(*parts[last + 1 :])
            if here and here.is_file():
                return f"{match.group(1)}{here}{match.group(3)}"
        return match.group(0)

    return re.sub(r'(\bfile=")([^"]+)(")', place, model)


def _with_cameras(model: str, cameras: Sequence[str]) -> str:
    """RoboCasa's own cameras added to a model that was recorded without them."""
    missing = [camera for camera in cameras if f'name="{camera}"' not in model]
    if not missing or importlib.util.find_spec("robocasa") is None:
        return model
    module: Any = importlib.import_module("robocasa.utils.camera_utils")
    known = module.CAM_CONFIGS["DEFAULT"] if hasattr(module, "CAM_CONFIGS") else {}
    root = ElementTree.fromstring(model)
    for name in missing:
        config = known.get(name)
        body = config and next(
            (b for b in root.iter("body") if b.get("name") == config.get("parent_body")), None
        )
        if body is not None:
            numbers = {key: " ".join(map(str, config[key])) for key in ("pos", "quat")}
            fields = {"name": name, "mode": "fixed", **numbers, **config.get("camera_attribs", {})}
            body.append(ElementTree.Element("camera", fields))
    return ElementTree.tostring(root, encoding="unicode")
