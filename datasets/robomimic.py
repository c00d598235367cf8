"""Reading the robomimic HDF5 layout as windows for training; the writer is exported from here too.

The card, `robomimic.md` beside this file, lists every key with its unit and frame. Row t of an episode holds
obs_t, states_t and actions_t.

Shapes: N frames in all, T frames of one episode, To observation steps, Ta action steps, A action size,
S state size, H W image size.
"""

import glob
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vilma.extras import require

from .hdf5_blocks import Block, find_block
from .robomimic_writer import (
    ACTION_KINDS,
    GEOMETRY,
    REFERENCE_FRAMES,
    EpisodeWriter,
    check_camera,
    file_attributes,
    finished_parts,
    from_attribute,
    length_problem,
    merge,
    parts_folder,
    remove_parts,
    reraise_unless_damaged,
    write_part,
)

__all__ = [
    "EpisodeWriter",
    "RobomimicConfig",
    "RobomimicDataset",
    "collate",
    "file_attributes",
    "finished_parts",
    "merge",
    "parts_folder",
    "remove_parts",
    "write_part",
]


@dataclass(frozen=True)
class RobomimicConfig:
    """What to read and how to cut it into windows.

    Args:
        path: a file, a folder of files, a glob, or a list of these.
        cameras: names before ``_image`` on disk, e.g. ``agentview``.
        state_keys: names under ``obs/`` that make ``observation.state``, joined in this order.
        obs_horizon: To; rows before the start of an episode repeat its first row.
        action_horizon: Ta; actions past the end repeat the last one and are marked in ``action_is_pad``.
        images, depth: which pixels to read; depth brings intrinsics and poses.
        mask: use only the episodes named in ``/mask/<mask>``, e.g. ``train``.
        cache: ``ram`` holds all pixels in memory (98.8 kB a frame for two 84x84 RGB-D cameras); ``none``
            reads them from disk for every sample.
        max_episodes: use the first so many.
        reference_frame, action_kind: what is expected. Files written by others do not tell theirs: give them.
        task: the instruction, where a file holds none.
    """

    path: list[str] | str
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")
    state_keys: tuple[str, ...] = ("robot0_eef_pos", "robot0_eef_rot6d", "robot0_gripper_qpos")
    obs_horizon: int = 1
    action_horizon: int = 10
    images: bool = True
    depth: bool = True
    mask: str | None = None
    cache: str = "ram"
    max_episodes: int | None = None
    reference_frame: str | None = None
    action_kind: str | None = None
    task: str = ""

    def __post_init__(self) -> None:
        if self.obs_horizon < 1 or self.action_horizon < 1:
            raise ValueError(f"horizons are {self.obs_horizon} and {self.action_horizon}, wanted at least 1")
        if self.max_episodes is not None and self.max_episodes < 1:
            raise ValueError(f"max_episodes is {self.max_episodes}, wanted at least 1, or none for all")
        for name, allowed in (
            ("cache", ("ram", "none")),
            ("reference_frame", (None, *REFERENCE_FRAMES)),
            ("action_kind", (None, *ACTION_KINDS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, wanted one of {allowed}")


class _Episode(NamedTuple):
    file: Path
    name: str
    start: int  # row of its first frame among the N
    length: int
    task: str

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


class RobomimicDataset(torch.utils.data.Dataset):
    """Windows of episodes: sample i is frame i, with To observations up to it and Ta actions from it.

    A sample is a dict without the batch axis: ``observation.images.<cam>`` (To, 3, H, W) uint8,
    ``observation.depth.<cam>`` (To, H, W), ``observation.intrinsics.<cam>`` (To, 3, 3),
    ``observation.pose.<cam>`` (To, 4, 4), ``observation.state`` (To, S), ``action`` (Ta, A),
    ``action_is_pad`` (Ta,) bool, ``task`` str. Batches come whole from ``__getitems__``: give `collate` to
    the DataLoader.

    Damaged episodes, and damaged files among several, are left out, named in a warning and in ``skipped``.

    Args:
        config: what to read.
        progress: called with (episodes read, episodes in all) while pixels are read into memory.

    Raises:
        ValueError: nothing usable, keys or cameras missing, sizes that disagree, numbers that are not finite,
            or another reference frame or action kind than expected.
        MemoryError: ``cache="ram"`` would not fit.
    """

    def __init__(self, config: RobomimicConfig, progress: Callable[[int, int], None] | None = None):
        self.config = config
        self.files = _find_files(config.path)
        self.skipped: list[str] = []
        self.episodes: list[_Episode] = []
        self._pixel_keys = {f"observation.images.{c}": f"{c}_image" for c in config.cameras if config.images}
        self._pixel_keys |= {f"observation.depth.{c}": f"{c}_depth" for c in config.cameras if config.depth}
        self._small_keys = {
            f"observation.intrinsics.{c}": f"{c}_intrinsic" for c in config.cameras if config.depth
        }
        self._small_keys |= {
            f"observation.pose.{c}": f"{c}_extrinsic" for c in config.cameras if config.depth
        }
        self._handles: dict[Path, Any] = {}
        self._blocks: dict[tuple[_Episode, str], Block | None] = {}  # filled as arrays are met
        self._owner = os.getpid()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._facts: dict[str, Any] = {}
        hints: list[str] = []
        rows: dict[str, list[np.ndarray]] = {}
        for file in self.files:
            self._index_file(file, rows, hints)
        self._require_episodes(hints)
        # All but pixels is small and always in memory; so are the pixels with cache="ram".
        self._tables = {key: torch.from_numpy(np.concatenate(parts)) for key, parts in rows.items()}
        if config.cache == "ram":
            self._load_pixels(progress)
            self._require_episodes(hints)
        starts = torch.tensor([e.start for e in self.episodes])
        lengths = torch.tensor([e.length for e in self.episodes])
        self._episode = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        self._first = starts[self._episode]
        self._last = (starts + lengths - 1)[self._episode]
        self._row = torch.cat([torch.arange(e.start, e.start + e.length) for e in self.episodes])
        if self.skipped:
            named = "\n  ".join(self.skipped[:10]) + ("\n  ..." if len(self.skipped) > 10 else "")
            total = len(self.skipped) + len(self.episodes)
            warnings.warn(
                f"left out {len(self.skipped)} of {total} episodes or files (the rest is used):\n  {named}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return {key: value[0] for key, value in self.__getitems__([index % len(self)]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A whole batch: (B, ...) under the keys of a sample. The DataLoader calls this."""
        index = torch.as_tensor(indices)
        row, first, last = self._row[index, None], self._first[index, None], self._last[index, None]
        seen = torch.maximum(row + torch.arange(1 - self.config.obs_horizon, 1), first)
        ahead = row + torch.arange(self.config.action_horizon)
        batch: dict[str, Any] = {}
        if self.config.cache == "none":
            self._announce(seen, index)
        for key in (*self._pixel_keys, *self._small_keys, "observation.state"):
            batch[key] = self._take(key, seen, index)
        batch["action"] = self._take("action", torch.minimum(ahead, last), index)
        batch["action_is_pad"] = ahead > last
        batch["task"] = [self.episodes[episode].task for episode in self._episode[index].tolist()]
        return batch

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors of this dataset hold."""
        return sum(table.nbytes for table in self._tables.values())

    @property
    def metadata(self) -> dict[str, Any]:
        """What a policy must agree with, as JSON-able values."""
        tasks = sorted({episode.task for episode in self.episodes})
        sizes = {
            key.removesuffix("_image").removesuffix("_depth"): shape for key, shape in self._shapes.items()
        }
        return {
            "cameras": list(self.config.cameras),
            "sizes": {camera: list(sizes[camera]) for camera in self.config.cameras if camera in sizes},
            **self._facts,
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
        """Statistics of ``action`` and ``observation.state`` over the used frames, JSON-able.

        Each holds lists over dimensions: ``mean``, ``std`` (population), ``min``, ``max``, ``q01``, ``q99``,
        and ``constant``: True where std < eps. All are stored as measured; whoever normalises a constant
        dimension divides by 1 instead of its std or range. ``count`` is the number of frames.
        """
        used = {key: self._tables[key][self._row].numpy() for key in ("action", "observation.state")}
        return {key: column_statistics(values, eps) for key, values in used.items()}

    def locate(self, index: int) -> str:
        """Where sample ``index`` lies, in words: file, episode and frame."""
        episode = self.episodes[int(self._episode[index])]
        return f"{episode}, frame {int(self._row[index]) - episode.start}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": {}}  # a spawned worker opens its own

    def _index_file(self, path: Path, rows: dict[str, list[np.ndarray]], hints: list[str]) -> None:
        """Check the episodes of one file and append their small arrays to ``rows``."""
        h5py = require("h5py", "robot")
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            reraise_unless_damaged(error)
            problem = f"{path} cannot be opened: truncated, damaged or no HDF5 file ({error})"
            if len(self.files) > 1:
                self.skipped.append(problem)
                return
            parts = parts_folder(path)
            way = f"finished episodes lie in {parts}: merge them again" if parts.is_dir() else "copy it again"
            raise ValueError(f"{problem}; {way}, or remove it and collect again") from error
        with file:
            if "data" not in file:
                raise ValueError(f"{path} has no /data: it is not in the robomimic layout ({list(file)})")
            data = file["data"]
            self._check_facts(path, data)
            names = sorted(data, key=_natural)
            if self.config.mask is not None:
                if f"mask/{self.config.mask}" not in file:
                    masks = list(file["mask"]) if "mask" in file else []
                    raise ValueError(f"{path} has no mask {self.config.mask!r}; it has {masks}")
                chosen = {name.decode() for name in file[f"mask/{self.config.mask}"][:]}
                self.skipped += [
                    f"{path}:{n}: named in the mask, not in the file" for n in sorted(chosen - set(names))
                ]
                names = [name for name in names if name in chosen]
            default = from_attribute(data.attrs.get("task", "")) or self.config.task
            for name in names:
                if len(self.episodes) == self.config.max_episodes:
                    return
                try:
                    problem = self._problem(data[name], hints)
                    small = None if problem else self._read_small(data[name])
                    task = _language(data[name]) or default
                except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
                    reraise_unless_damaged(error)
                    problem = f"cannot be read ({error})"
                if problem:
                    self.skipped.append(f"{path}:{name}: {problem}")
                    continue
                start = self.episodes[-1].start + self.episodes[-1].length if self.episodes else 0
                episode = _Episode(path, name, start, len(small["action"]), task)
                self._check_episode(episode, data[name], small, rows)
                self.episodes.append(episode)
                for key, value in small.items():
                    rows.setdefault(key, []).append(value)

    def _check_facts(self, path: Path, data: Any) -> None:
        """Reference frame and action kind: told by the file or the config, and the same in every file."""
        for name in ("reference_frame", "action_kind"):
            expected = getattr(self.config, name)
            found = from_attribute(data.attrs.get(name)) or expected
            if found is None:
                raise ValueError(f"{path} does not tell its {name}; set {name} to what it holds")
            wanted = expected or self._facts.setdefault(name, found)
            if found != wanted:
                raise ValueError(
                    f"{path} has {name} {found!r}, wanted {wanted!r}: mixing them fails silently"
                )
            self._facts[name] = found
        try:
            kwargs = _mapping(data, "env_args").get("env_kwargs", {})
        except ValueError as error:
            raise ValueError(f"{path}, /data: {error}; repair that attribute, or delete it") from error
        kwargs = kwargs if isinstance(kwargs, dict) else {}
        frequency = data.attrs.get("control_freq", kwargs.get("control_freq"))
        self._facts.setdefault("control_freq", None if frequency is None else float(frequency))

    def _problem(self, demo: Any, hints: list[str]) -> str | None:
        """Why an episode must be left out, or None."""
        wanted = (*self.config.state_keys, *self._pixel_keys.values(), *self._small_keys.values())
        problem = length_problem(demo, ())
        if problem:
            return problem
        there = set(demo["obs"]) if "obs" in demo else set()
        missing = [name for name in wanted if name not in there]
        problem = length_problem(demo, [name for name in wanted if name in there])
        if problem or not missing:
            return problem
        cameras = sorted(name.removesuffix("_image") for name in there if name.endswith("_image"))
        if not set(self.config.cameras) <= set(cameras):
            hints.append(f"it has the cameras {cameras}")
        elif any(name.endswith(GEOMETRY) for name in missing):
            hints.append(
                "depth and camera matrices are no part of plain robomimic files: replay their `states` with "
                "`vilma add-depth` (or collect with `vilma collect-robosuite`); for images alone set "
                "depth: false"
            )
        else:
            hints.append(f"it has the observations {sorted(there)}")
        return f"it lacks obs/{', obs/'.join(missing)}"

    def _read_small(self, demo: Any) -> dict[str, np.ndarray]:
        length = int(demo.attrs["num_samples"])
        state = [demo[f"obs/{name}"][:].reshape(length, -1) for name in self.config.state_keys]
        small = {
            "action": demo["actions"][:],
            "observation.state": np.hstack([np.zeros((length, 0)), *state]),
        }
        small |= {key: demo[f"obs/{name}"][:] for key, name in self._small_keys.items()}
        return {key: value.astype(np.float32) for key, value in small.items()}

    def _check_episode(self, episode: _Episode, demo: Any, small: dict[str, np.ndarray], rows: dict) -> None:
        """Raise for what no skipping can cure: a wrong file rather than a damaged episode."""
        for key, value in small.items():
            if not np.isfinite(value).all():
                row = int(np.argwhere(~np.isfinite(value))[0][0])
                raise ValueError(f"{episode}: {key} is not finite at row {row}; leave it out by a mask")
            if key in rows and rows[key][0].shape[1:] != value.shape[1:]:
                there = rows[key][0].shape[1:]
                raise ValueError(f"{episode}: {key} has {value.shape[1:]} values a row, others have {there}")
        arrays = {f"obs/{name}": demo[f"obs/{name}"] for name in self._pixel_keys.values()}
        arrays |= {f"obs/{name}": small[key] for key, name in self._small_keys.items()}
        for name in self._pixel_keys.values():
            pixels = arrays[f"obs/{name}"]
            image = name.endswith("_image")
            channels = ((3,),) if image else ((1,), ())
            fits = len(pixels.shape) > 2 and pixels.shape[3:] in channels
            if not fits or (image and pixels.dtype != np.uint8):
                wanted = "uint8 (T, H, W, 3)" if image else "(T, H, W, 1)"
                raise ValueError(f"{episode}: {name} is {pixels.dtype} {pixels.shape}, wanted {wanted}")
        for key, name in self._small_keys.items():
            wanted = (3, 3) if name.endswith("_intrinsic") else (4, 4)
            if small[key].shape[1:] != wanted:
                raise ValueError(f"{episode}: {name} is {small[key].shape[1:]} a row, wanted {wanted}")
        for camera in self.config.cameras:
            check_camera(str(episode), camera, arrays)
        for name in self._pixel_keys.values():
            pixels = arrays[f"obs/{name}"]
            if self._shapes.setdefault(name, pixels.shape[1:3]) != pixels.shape[1:3]:
                raise ValueError(
                    f"{episode}: {name} is {pixels.shape[1:3]}, in other episodes {self._shapes[name]}; "
                    "one data set has one size a camera"
                )

    def _require_episodes(self, hints: list[str]) -> None:
        if not self.episodes:
            reasons = "\n  ".join([*self.skipped[:3], *hints[:1]]) or "the files hold no episode"
            raise ValueError(f"no usable episode in {', '.join(map(str, self.files[:3]))}:\n  {reasons}")

    def _load_pixels(self, progress: Callable[[int, int], None] | None) -> None:
        """Read all pixels into contiguous tables, so that a batch is one index_select a key."""
        frames = len(self._tables["action"])
        per_frame = sum(
            np.prod(self._shapes[n]) * (3 if n.endswith("_image") else 4) for n in self._pixel_keys.values()
        )
        available = available_memory()
        if available is not None and frames * per_frame > available:
            raise MemoryError(
                f"the pixels of {frames} frames take {frames * per_frame / 1e9:.1f} GB, but "
                f"{available / 1e9:.1f} GB of memory are free; set cache: none, fewer cameras or max_episodes"
            )
        for key, name in self._pixel_keys.items():
            image = name.endswith("_image")
            shape = (frames, 3, *self._shapes[name]) if image else (frames, *self._shapes[name])
            self._tables[key] = torch.empty(shape, dtype=torch.uint8 if image else torch.float32)
        damaged = []
        for done, episode in enumerate(self.episodes, start=1):
            try:
                for key in self._pixel_keys:
                    table = self._tables[key][episode.start : episode.start + episode.length]
                    table.copy_(self._read_pixels(episode, key, slice(None)))
            except (OSError, RuntimeError) as error:
                reraise_unless_damaged(error)
                damaged.append(episode)
                self.skipped.append(f"{episode}: cannot be read ({error})")
            if progress is not None:
                progress(done, len(self.episodes))
        self.episodes = [episode for episode in self.episodes if episode not in damaged]
        self._close()

    def _read_pixels(self, episode: _Episode, key: str, rows: slice | list[int]) -> torch.Tensor:
        """Rows of an episode from disk: (..., 3, H, W) uint8 or (..., H, W) float32."""
        if self._owner != os.getpid() or len(self._handles) > 64:  # a forked worker opens its own
            self._close()
            self._owner = os.getpid()
        if episode.file not in self._handles:
            self._handles[episode.file] = require("h5py", "robot").File(episode.file, "r")
        file = self._handles[episode.file]
        descriptor, block = file.id.get_vfd_handle(), self._blocks.get((episode, key))
        if block is None or isinstance(rows, slice):
            stored = file[f"data/{episode.name}/obs/{self._pixel_keys[key]}"]
            if (episode, key) not in self._blocks:
                self._blocks[episode, key] = find_block(stored, descriptor)
            dims = stored.ndim
            pixels = stored[rows] if isinstance(rows, slice) else np.stack([stored[row] for row in rows])
        else:  # a window is a stretch of rows, perhaps with the first one repeated
            start, dims = min(rows), len(block.shape)
            pixels = block.read(descriptor, start, max(rows) + 1)
            if len(pixels) < len(rows):
                pixels = pixels[np.asarray(rows) - start]
        pixels = torch.from_numpy(pixels)
        if key.startswith("observation.images."):
            return pixels.movedim(-1, -3)
        return pixels.float().squeeze(-1) if dims == 4 else pixels.float()

    def _announce(self, rows: torch.Tensor, index: torch.Tensor) -> None:
        """Begin to read the pixels of a batch, rows (B, n), where their places in the files are known."""
        for episode_number, window in zip(self._episode[index].tolist(), rows.tolist()):
            episode = self.episodes[episode_number]
            file = self._handles.get(episode.file)
            for key in self._pixel_keys:
                block = self._blocks.get((episode, key))
                if file is not None and block is not None:
                    start, stop = min(window) - episode.start, max(window) - episode.start + 1
                    block.announce(file.id.get_vfd_handle(), start, stop)

    def _take(self, key: str, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows (B, n) of a table as (B, n, ...)."""
        table = self._tables.get(key)
        if table is not None:
            return table.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        frames = []
        for episode_number, window in zip(self._episode[index].tolist(), rows.tolist()):
            episode = self.episodes[episode_number]
            try:
                frames.append(self._read_pixels(episode, key, [row - episode.start for row in window]))
            except (OSError, RuntimeError) as error:
                raise ValueError(
                    f"{episode}: {self._pixel_keys[key]} cannot be read ({error}); "
                    "the file is damaged: cache: ram leaves such episodes out"
                ) from error
        return torch.stack(frames).contiguous()

    def _close(self) -> None:
        for file in self._handles.values():
            file.close()
        self._handles.clear()


def collate(samples: dict[str, Any] | Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Samples as one batch; a batch that ``RobomimicDataset.__getitems__`` made whole passes through."""
    if isinstance(samples, dict):
        return samples
    return {
        key: torch.stack([s[key] for s in samples]) if key != "task" else [s[key] for s in samples]
        for key in samples[0]
    }


def column_statistics(values: np.ndarray, eps: float = 1e-6) -> dict[str, Any]:
    """Statistics of each column of (N, D), JSON-able; see ``RobomimicDataset.statistics``."""
    values = values.astype(np.float64)
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    std = values.std(axis=0)
    arrays = {"mean": values.mean(axis=0), "std": std, "min": values.min(axis=0), "max": values.max(axis=0)}
    arrays |= {"q01": low, "q99": high, "constant": std < eps}
    return {name: array.tolist() for name, array in arrays.items()} | {"count": len(values)}


def _find_files(path: str | Path | Sequence[str]) -> list[Path]:
    """Files, folders and globs as a sorted list of files."""
    found: list[Path] = []
    for one in [path] if isinstance(path, (str, Path)) else path:
        if Path(one).is_file():
            files = [Path(one)]
        elif Path(one).is_dir():
            files = sorted((f for f in Path(one).iterdir() if f.suffix in (".hdf5", ".h5")), key=_natural)
        else:
            files = sorted((Path(name) for name in glob.glob(str(one), recursive=True)), key=_natural)
        if not files:
            begun = "; its collection is unfinished: run it again" if parts_folder(one).is_dir() else ""
            raise FileNotFoundError(f"no HDF5 file at {one}{begun}")
        found += files
    return found


def _natural(name: str | Path) -> tuple[str, int, str]:
    """Sort key that puts demo_2 before demo_10."""
    stem, _, number = str(name).removesuffix(".hdf5").rpartition("_")
    return (stem, int(number), "") if number.isdecimal() else (str(name), -1, "")


def _language(demo: Any) -> str:
    """The instruction of an episode: in RoboCasa's ``ep_meta``, or an attribute ``task``; else empty."""
    return _mapping(demo, "ep_meta").get("lang") or from_attribute(demo.attrs.get("task", ""))


def _mapping(group: Any, name: str) -> dict[str, Any]:
    """The JSON mapping in an attribute of an HDF5 group, empty where there is none; else ValueError."""
    text = from_attribute(group.attrs.get(name, "{}"))
    try:
        found = json.loads(text)
    except (ValueError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"the attribute {name} is {str(text)[:60]!r}, wanted a JSON mapping")
    return found


def available_memory() -> int | None:
    """Bytes of memory that a process may still take, where Linux tells it."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
