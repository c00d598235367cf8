"""Reading LeRobot data sets (v2.0, v2.1, v3.0) as windows for training, with the keys of the house.

The card, `lerobot.md` beside this file, tells what is read from where. LeRobot stores no camera matrices:
what the files do not tell is asked for, never guessed.

Shapes: N frames in all, T frames of one episode, To observation steps, Ta action steps, A action size,
S state size, H W image size.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .lerobot_files import DamagedEpisode, Episode, LeRobotFiles
from .robomimic import available_memory, collate, column_statistics
from .robomimic_writer import ACTION_KINDS, REFERENCE_FRAMES

__all__ = ["LeRobotConfig", "LeRobotDataset", "collate"]

_IMAGES = "observation.images."


@dataclass(frozen=True)
class LeRobotConfig:
    """What to read and how to cut it into windows.

    Args:
        path: the folder that holds ``meta/`` and ``data/``.
        cameras: names after ``observation.images.``; none reads no pixels.
        reference_frame, action_kind: LeRobot's files do not tell theirs. world, base or camera; controller,
            delta or absolute.
        state_keys: features that make ``observation.state``, joined in this order; none for no state.
        action_key: the feature that holds the actions.
        obs_horizon: To; rows before the start of an episode repeat its first row.
        action_horizon: Ta; actions past the end repeat the last one and are marked in ``action_is_pad``.
        depth: read depth too. It then needs, for each camera: a feature with the depth (``depth_keys``, by
            default ``observation.depth.<cam>`` or ``observation.images.<cam>_depth``); intrinsics and, unless
            ``reference_frame`` is camera, poses, here or as features ``observation.intrinsics.<cam>``
            (3, 3) and ``observation.pose.<cam>`` (4, 4).
        depth_unit: metres of one step of an integer depth, 0.001 for millimetres.
        intrinsics: camera -> [fx, fy, cx, cy] in pixels of its depth image, pixel centres at +0.5.
        poses: camera -> 4 x 4 matrix, camera -> reference frame, OpenCV axes.
        cache: ``ram`` decodes everything once; ``none`` seeks in the videos for every sample, which starts a
            decoder each time: for looking, not for training.
        max_episodes: use the first so many.
        task: the instruction, where the data set holds none.
    """

    path: str
    cameras: tuple[str, ...]
    reference_frame: str
    action_kind: str
    state_keys: tuple[str, ...] = ("observation.state",)
    action_key: str = "action"
    obs_horizon: int = 1
    action_horizon: int = 10
    depth: bool = False
    depth_keys: dict[str, str] = field(default_factory=dict)
    depth_unit: float | None = None
    intrinsics: dict[str, list[float]] = field(default_factory=dict)
    poses: dict[str, list[list[float]]] = field(default_factory=dict)
    cache: str = "ram"
    max_episodes: int | None = None
    task: str = ""

    def __post_init__(self) -> None:
        if self.obs_horizon < 1 or self.action_horizon < 1:
            raise ValueError(f"horizons are {self.obs_horizon} and {self.action_horizon}, wanted at least 1")
        if self.max_episodes is not None and self.max_episodes < 1:
            raise ValueError(f"max_episodes is {self.max_episodes}, wanted at least 1, or none for all")
        if self.depth_unit is not None and not 0 < self.depth_unit <= 1:
            raise ValueError(f"depth_unit is {self.depth_unit}, wanted metres a step, e.g. 0.001")
        for name, allowed in (
            ("cache", ("ram", "none")),
            ("reference_frame", REFERENCE_FRAMES),
            ("action_kind", ACTION_KINDS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, wanted one of {allowed}")
        for camera, values in self.intrinsics.items():
            if len(values) != 4 or min(values[:2]) <= 0:
                raise ValueError(f"intrinsics of {camera} are {values}, wanted [fx, fy, cx, cy] in pixels")
        for camera, values in self.poses.items():
            pose = np.asarray(values, np.float64)
            rigid = pose.shape == (4, 4) and np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-3)
            if not rigid or np.linalg.det(pose[:3, :3]) < 0:
                raise ValueError(f"the pose of {camera} is no rigid 4 x 4 transform: {values}")


class LeRobotDataset(torch.utils.data.Dataset):
    """Windows of episodes: sample i is frame i, with To observations up to it and Ta actions from it.

    Samples, ``collate``, ``metadata`` and ``statistics`` are those of ``RobomimicDataset``. Damaged episodes
    are left out, named in a warning and in ``skipped``.

    Args:
        config: what to read.
        progress: called with (episodes read, episodes in all) while pixels are decoded.

    Raises:
        FileNotFoundError: no data set there.
        ValueError: features, intrinsics or poses missing (it says which to give), sizes that disagree, or
            nothing usable.
        MemoryError: ``cache="ram"`` would not fit.
    """

    def __init__(self, config: LeRobotConfig, progress: Callable[[int, int], None] | None = None):
        self.config = config
        self.files = LeRobotFiles(config.path)
        self.skipped: list[str] = []
        self._pixels = {f"{_IMAGES}{camera}": f"{_IMAGES}{camera}" for camera in config.cameras}
        if config.depth:
            self._pixels |= {f"observation.depth.{c}": self._depth_key(c) for c in config.cameras}
        self._check_features()
        self._shapes = {key: self._shape(feature) for key, feature in self._pixels.items()}
        self.episodes: list[Episode] = []
        self._tables: dict[str, torch.Tensor] = {}
        small: dict[str, list[np.ndarray]] = {}
        for episode in self.files.episodes[: config.max_episodes]:
            try:
                values = self.columns(episode)
            except DamagedEpisode as error:
                self.skipped.append(f"episode {episode.index}: {error}")
                continue
            self.episodes.append(episode)
            for key, value in values.items():
                small.setdefault(key, []).append(value)
        if config.cache == "ram" and self._pixels and self.episodes:
            self._decode(small, progress)
        if not self.episodes:
            raise ValueError(f"no usable episode in {config.path}:\n  " + "\n  ".join(self.skipped[:3]))
        self._tables |= {key: torch.from_numpy(np.concatenate(parts)) for key, parts in small.items()}
        self._index()
        if self.skipped:
            named = "\n  ".join(self.skipped[:10])
            total = len(self.skipped) + len(self.episodes)
            warnings.warn(f"left out {len(self.skipped)} of {total} episodes:\n  {named}", stacklevel=2)

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {key: value[0] for key, value in self.__getitems__([index % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A whole batch: (B, ...) under the keys of a sample. The DataLoader calls this."""
        row = torch.as_tensor(indices)
        first, last = self._first[row, None], self._last[row, None]
        seen = torch.maximum(row[:, None] + torch.arange(1 - self.config.obs_horizon, 1), first)
        ahead = row[:, None] + torch.arange(self.config.action_horizon)
        batch: dict[str, Any] = {}
        for key in self._pixels:
            batch[key] = self._take(key, seen) if key in self._tables else self._seek(key, seen, row)
        for key in self._tables:
            if key not in self._pixels and key != "action":
                batch[key] = self._take(key, seen)
        batch["action"] = self._take("action", torch.minimum(ahead, last))
        batch["action_is_pad"] = ahead > last
        batch["task"] = [self._task(self.episodes[i]) for i in self._episode[row].tolist()]
        return batch

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of this dataset hold."""
        return sum(table.nbytes for table in self._tables.values())

    @property
    def metadata(self) -> dict[str, Any]:
        """What a policy must agree with, as JSON-able values."""
        tasks = sorted({self._task(episode) for episode in self.episodes})
        return {
            "cameras": list(self.config.cameras),
            "sizes": {c: list(self._shapes[f"{_IMAGES}{c}"]) for c in self.config.cameras},
            "reference_frame": self.config.reference_frame,
            "action_kind": self.config.action_kind,
            "control_freq": self.files.fps,
            "task": tasks[0] if len(tasks) == 1 else "",
            "tasks": tasks,
            "state_keys": list(self.config.state_keys),
            "state_dim": self._tables["observation.state"].shape[1],
            "action_dim": self._tables["action"].shape[1],
            "episodes": len(self.episodes),
            "frames": len(self),
            "skipped": len(self.skipped),
        }

    def statistics(self, eps: float = 1e-6) -> dict[str, dict[str, Any]]:
        """Statistics of ``action`` and ``observation.state``; see ``RobomimicDataset.statistics``."""
        keys = ("action", "observation.state")
        return {key: column_statistics(self._tables[key].numpy(), eps) for key in keys}

    def locate(self, index: int) -> str:
        """Where sample ``index`` lies, in words: folder, episode and frame."""
        episode = self.episodes[int(self._episode[index])]
        return f"{self.files.root}, episode {episode.index}, frame {index - int(self._first[index])}"

    # What the files must have

    def _check_features(self) -> None:
        files, config = self.files, self.config
        for key in (config.action_key, *config.state_keys):
            if key not in files.features or files.features[key]["dtype"] in ("image", "video", "string"):
                raise ValueError(f"{files.root} has no numbers {key!r}; it has: {', '.join(files.keys())}")
        pictures = files.keys("image", "video")
        for key in (f"{_IMAGES}{camera}" for camera in config.cameras):
            if key not in pictures:
                raise ValueError(
                    f"{files.root} has no pictures {key!r}; it has: {', '.join(pictures) or 'none'}"
                )
        if config.depth:
            self._ask_for("intrinsics", config.intrinsics, "{c: [fx, fy, cx, cy]}, pixels of the depth image")
            if config.reference_frame != "camera":
                self._ask_for(
                    "pose", config.poses, f"{{c: 4 x 4 matrix}}, camera to {config.reference_frame}", "poses"
                )

    def _ask_for(self, name: str, given: dict, wanted: str, option: str = "") -> None:
        missing = [
            c for c in self.config.cameras if c not in given and not self._has(f"observation.{name}.{c}")
        ]
        if missing:
            raise ValueError(
                f"{self.files.root} does not tell the {option or name} of {', '.join(missing)}, which depth "
                f"needs and nobody can guess: give {option or name}: {wanted}, or set depth: false"
            )

    def _has(self, key: str) -> bool:
        return key in self.files.features

    def _depth_key(self, camera: str) -> str:
        named = self.config.depth_keys.get(camera)
        candidates = [named] if named else [f"observation.depth.{camera}", f"{_IMAGES}{camera}_depth"]
        for key in candidates:
            if self._has(key):
                feature = self.files.features[key]
                if feature["dtype"] == "video":
                    raise ValueError(
                        f"{key} is a video: its depth was squeezed into colours, which loses the metres; "
                        "store it as 16-bit pictures or as floats"
                    )
                return key
        found = ", ".join(key for key in self.files.features if "depth" in key) or "none"
        raise ValueError(
            f"{self.files.root} has no depth of {camera} (looked for {', '.join(candidates)}; features with "
            f"depth: {found}); name it in depth_keys, or set depth: false"
        )

    def _shape(self, feature: str) -> tuple[int, int]:
        """Height and width of a picture, from the description (its order is told by the names, if at all)."""
        entry = self.files.features[feature]
        shape, axes = [int(n) for n in entry["shape"]], entry.get("names") or []
        if len(shape) == 2:
            return shape[0], shape[1]
        first = isinstance(axes, list) and bool(axes) and str(axes[0]).startswith("channel")
        if first or (not axes and shape[0] in (1, 3)):
            return shape[1], shape[2]
        return shape[0], shape[1]

    def _task(self, episode: Episode) -> str:
        return episode.task or self.config.task

    # Reading

    def columns(self, episode: Episode) -> dict[str, np.ndarray]:
        """Everything of an episode but its pixels, (T, ...) float32 under the keys of a sample."""
        files, config, length = self.files, self.config, episode.length
        state = [files.column(episode, key).reshape(length, -1) for key in config.state_keys]
        small = {
            "action": files.column(episode, config.action_key).reshape(length, -1),
            "observation.state": np.hstack([np.zeros((length, 0)), *state]),
        }
        for camera in config.cameras if config.depth else ():
            key = f"observation.intrinsics.{camera}"
            if camera in config.intrinsics:
                fx, fy, cx, cy = config.intrinsics[camera]
                small[key] = np.tile([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]], (length, 1, 1))
            else:
                small[key] = files.column(episode, key).reshape(length, 3, 3)
            key = f"observation.pose.{camera}"
            if camera in config.poses:
                small[key] = np.tile(np.asarray(config.poses[camera], np.float64), (length, 1, 1))
            elif self._has(key):
                small[key] = files.column(episode, key).reshape(length, 4, 4)
            else:
                small[key] = np.tile(np.eye(4), (length, 1, 1))
        for key, value in small.items():
            if not np.isfinite(value).all():
                raise DamagedEpisode(f"{key} is not finite")
        return {key: value.astype(np.float32) for key, value in small.items()}

    def _decode(self, small: dict[str, list[np.ndarray]], progress: Callable | None) -> None:
        """All pixels into tables; an episode that does not decode is taken out of everything."""
        frames = sum(episode.length for episode in self.episodes)
        per_frame = sum(
            np.prod(shape) * (3 if key.startswith(_IMAGES) else 4) for key, shape in self._shapes.items()
        )
        available = available_memory()
        if available is not None and frames * per_frame > available:
            raise MemoryError(
                f"the pixels of {frames} frames take {frames * per_frame / 1e9:.1f} GB, but "
                f"{available / 1e9:.1f} GB of memory are free; set max_episodes or fewer cameras"
            )
        self._tables = {
            key: torch.empty(
                (frames, 3, *shape) if key.startswith(_IMAGES) else (frames, *shape),
                dtype=torch.uint8 if key.startswith(_IMAGES) else torch.float32,
            )
            for key, shape in self._shapes.items()
        }
        kept, filled = [], 0
        for number, episode in enumerate(self.episodes):
            rows = slice(filled, filled + episode.length)
            try:
                for key in self._pixels:
                    self._tables[key][rows] = torch.from_numpy(self.pixels(episode, key))
                kept.append(number)
                filled = rows.stop
            except DamagedEpisode as error:
                self.skipped.append(f"episode {episode.index}: {error}")
            if progress is not None:
                progress(number + 1, len(self.episodes))
        self._tables = {key: table[:filled] for key, table in self._tables.items()}
        self.episodes = [self.episodes[i] for i in kept]
        for key, parts in small.items():
            small[key] = [parts[i] for i in kept]

    def pixels(self, episode: Episode, key: str, rows: slice | None = None) -> np.ndarray:
        """``observation.images.<cam>`` (T, 3, H, W) uint8, ``observation.depth.<cam>`` (T, H, W) metres."""
        feature = self._pixels[key]
        is_image = key.startswith(_IMAGES)
        if not is_image and self.files.features[feature]["dtype"] != "image":
            stored = self.files.column(episode, feature)[rows or slice(None)]
            frames = list(stored.reshape(len(stored), *self._shapes[key]))
        else:
            frames = list(self.files.frames(episode, feature, rows))
        wanted = (*self._shapes[key], 3) if is_image else self._shapes[key]
        for frame in frames:
            if frame.shape != wanted:
                raise ValueError(
                    f"episode {episode.index}: {feature} is {frame.shape}, meta/info.json says {wanted}"
                )
        stack = np.stack(frames)
        if is_image:
            return np.ascontiguousarray(stack.transpose(0, 3, 1, 2))
        if stack.dtype.kind in "iu":
            if self.config.depth_unit is None:
                raise ValueError(
                    f"{feature} holds whole numbers: give depth_unit, metres a step (0.001 for mm)"
                )
            stack = stack * self.config.depth_unit
        return stack.astype(np.float32)

    def _index(self) -> None:
        lengths = torch.tensor([episode.length for episode in self.episodes])
        starts = torch.cumsum(lengths, 0) - lengths
        self._episode = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        self._first = starts[self._episode]
        self._last = (starts + lengths - 1)[self._episode]

    def _take(self, key: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, n) of a table as (B, n, ...)."""
        return self._tables[key].index_select(0, rows.flatten()).unflatten(0, rows.shape)

    def _seek(self, key: str, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """As ``_take``, from the files. The rows of one sample are consecutive, or repeat the first."""
        samples = []
        for window, number in zip(rows, index.tolist()):
            episode, first = self.episodes[int(self._episode[number])], int(self._first[number])
            start, stop = int(window[0]) - first, int(window[-1]) - first + 1
            pixels = torch.from_numpy(self.pixels(episode, key, slice(start, stop)))
            samples.append(pixels[window - window[0]])
        return torch.stack(samples)
