"""Raw demonstrations to be replayed: RoboCasa 0.1 and 0.2 (robomimic HDF5), 1.x (LeRobot layout), robomimic.

What they have in common is read here: actions, simulator states, the model and the episode's description.
None of them has depth; ``vilma add-depth`` replays the states and writes the layout of `robomimic.md`, which
is what training reads. The card is `robocasa.md`. Needs no torch: a simulator's own environment reads with
this too.

T is the number of steps of an episode, A the size of an action (12 in RoboCasa), S that of a simulator state.
"""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vilma.extras import require

from .lerobot_files import DamagedEpisode, LeRobotFiles
from .robomimic_writer import from_attribute, length_problem, reraise_unless_damaged

__all__ = ["ACTION_PARTS", "Demo", "RawDemos", "fixed_base_actions", "moves_its_base", "open_demos"]

# The 12 numbers of a PandaOmron's action as RoboCasa's environments take them; 1.x data sets store the same
# parts in another order, which their meta/modality.json tells.
ACTION_PARTS = {
    "end_effector_position": (0, 3),
    "end_effector_rotation": (3, 6),
    "gripper_close": (6, 7),
    "base_motion": (7, 11),
    "control_mode": (11, 12),
}
# Part of a 1.x state -> the observation that 0.2 calls it.
_STATE_PARTS = {
    "base_position": "robot0_base_pos",
    "base_rotation": "robot0_base_quat",
    "end_effector_position_relative": "robot0_base_to_eef_pos",
    "end_effector_rotation_relative": "robot0_base_to_eef_quat",
    "gripper_qpos": "robot0_gripper_qpos",
}


@dataclass(frozen=True)
class Demo:
    """One raw demonstration.

    actions (T, A) in the order of the environment; states (T, S) flattened ``[time, qpos, qvel]``; model: its
    MJCF, with asset paths of the machine that recorded it; meta: RoboCasa's ``ep_meta`` or empty; obs: what
    it observed besides pictures, (T, ...) each; task: the instruction.
    """

    name: str
    actions: np.ndarray
    states: np.ndarray
    model: str
    meta: dict[str, Any]
    obs: dict[str, np.ndarray]
    task: str


class RawDemos:
    """The demonstrations at a path; see `open_demos`.

    Attributes:
        layout: "robomimic" or "lerobot". env_args: how the environment was made, robomimic's mapping.
        names: of the episodes, in order.
    """

    layout: str
    path: Path
    env_args: dict[str, Any]
    names: list[str]

    def read(self, name: str) -> Demo:
        """One episode; DamagedEpisode when it cannot be replayed."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Demo]:
        return (self.read(name) for name in self.names)


def open_demos(path: str | Path) -> RawDemos:
    """An HDF5 file in robomimic's layout, or the folder of a LeRobot data set (or the one above it).

    Raises FileNotFoundError or ValueError for anything else.
    """
    path = Path(path)
    for folder in (path, path / "lerobot"):
        if (folder / "meta" / "info.json").is_file():
            return _LeRobotDemos(folder)
    if path.is_file():
        return _RobomimicDemos(path)
    if path.is_dir():
        raise ValueError(
            f"{path} holds no meta/info.json; give an HDF5 file or the folder of a LeRobot data set"
        )
    raise FileNotFoundError(f"no demonstrations at {path}")


def fixed_base_actions(actions: np.ndarray) -> np.ndarray:
    """(T, 12) actions as the seven numbers of a robot whose base stays: arm (6) and gripper (1)."""
    return actions[:, :7]


def moves_its_base(actions: np.ndarray, tolerance: float = 1e-6) -> np.ndarray:
    """(T,) True where a 12-number action drives the base or the torso (mode above 0 and a motion)."""
    driven = np.abs(actions[:, slice(*ACTION_PARTS["base_motion"])]).max(axis=1) > tolerance
    return driven & (actions[:, ACTION_PARTS["control_mode"][0]] > 0)


class _RobomimicDemos(RawDemos):
    layout = "robomimic"

    def __init__(self, path: Path):
        self.path, self._h5py = path, require("h5py", "robot")
        try:
            with self._h5py.File(path, "r") as file:
                if "data" not in file:
                    raise ValueError(f"{path} has no /data: it is not in the robomimic layout ({list(file)})")
                data = file["data"]
                self.names = sorted(data, key=lambda name: (len(name), name))
                self.env_args = json.loads(from_attribute(data.attrs.get("env_args", "{}")))
                self._task = from_attribute(data.attrs.get("task", ""))
        except OSError as error:
            reraise_unless_damaged(error)
            raise ValueError(
                f"{path} cannot be opened: truncated, damaged or no HDF5 file ({error})"
            ) from error

    def read(self, name: str) -> Demo:
        try:
            with self._h5py.File(self.path, "r") as file:
                return self._read(name, file["data"][name])
        except (OSError, KeyError, TypeError, RuntimeError) as error:
            reraise_unless_damaged(error)
            raise DamagedEpisode(f"{self.path}:{name} cannot be read ({error})") from error

    def _read(self, name: str, demo: Any) -> Demo:
        problem = length_problem(demo)
        absent = [what for what in ("actions", "states") if what not in demo]
        absent += [] if "model_file" in demo.attrs else ["the attribute model_file"]
        if problem or absent:
            raise DamagedEpisode(f"{self.path}:{name}: {problem or 'it lacks ' + ', '.join(absent)}")
        meta = json.loads(from_attribute(demo.attrs.get("ep_meta", "{}")))
        seen = demo.get("obs", {})
        pictures = ("_image", "_depth", "_intrinsic", "_extrinsic")
        obs = {key: seen[key][:] for key in seen if not key.endswith(pictures)}
        task = meta.get("lang") or from_attribute(demo.attrs.get("task", "")) or self._task
        model = from_attribute(demo.attrs["model_file"])
        return Demo(name, demo["actions"][:], demo["states"][:], model, meta, obs, task)


class _LeRobotDemos(RawDemos):
    layout = "lerobot"

    def __init__(self, path: Path):
        self.path, self._files = path, LeRobotFiles(path)
        extras = path / "extras"
        if not extras.is_dir():
            raise ValueError(
                f"{path} has no extras/ with the simulator's states: this LeRobot data set cannot be replayed"
            )
        self._parts = self._json(path / "meta" / "modality.json")
        described = extras / "dataset_meta.json"
        self.env_args = self._json(described).get("env_args", {}) if described.is_file() else {}
        self._episodes = {f"episode_{e.index:06d}": e for e in self._files.episodes}
        self.names = list(self._episodes)

    def read(self, name: str) -> Demo:
        folder, episode = self.path / "extras" / name, self._episodes[name]
        try:
            with np.load(folder / "states.npz") as archive:
                states = archive["states"]
            model = gzip.decompress((folder / "model.xml.gz").read_bytes()).decode()
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DamagedEpisode(f"{folder} cannot be read ({error})") from error
        meta = self._json(folder / "ep_meta.json") if (folder / "ep_meta.json").is_file() else {}
        if len(states) != episode.length:
            raise DamagedEpisode(f"{folder} has {len(states)} states, its episode {episode.length} rows")
        stored = self._files.column(episode, "action").astype(np.float64)
        actions = np.zeros((episode.length, max(stop for _, stop in ACTION_PARTS.values())))
        for part, (start, stop) in ACTION_PARTS.items():
            actions[:, start:stop] = stored[:, self._columns("action", part)]
        state = self._files.column(episode, "observation.state")
        obs = {
            ours: state[:, self._columns("state", part)].astype(np.float64)
            for part, ours in _STATE_PARTS.items()
            if part in self._parts["state"]
        }
        return Demo(name, actions, states, model, meta, obs, meta.get("lang") or episode.task)

    def _columns(self, kind: str, part: str) -> slice:
        try:
            place = self._parts[kind][part]
            return slice(int(place["start"]), int(place["end"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path / 'meta' / 'modality.json'} does not tell where {part} lies in {kind}"
            ) from error

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is missing: without it the data set cannot be read") from error
        except ValueError as error:
            raise DamagedEpisode(f"{path} is not valid JSON ({error})") from error
