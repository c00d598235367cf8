"""Writing the robomimic HDF5 layout: atomic per episode, so that a kill never harms what is finished.

The card, `robomimic.md` beside this file, lists every key with its unit and frame; `robomimic.py` reads.
Row t of an episode holds obs_t, states_t and actions_t. Needs no torch: a simulator process stays light.

Shapes: T frames of one episode, A action size, S simulator state size, H W image size.
"""

import contextlib
import errno
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vilma import __version__
from vilma.extras import require

REFERENCE_FRAMES = ("world", "base", "camera")
ACTION_KINDS = ("controller", "delta", "absolute")

# Both filters are part of every HDF5 build, so robomimic reads the result. Shuffled depth takes a quarter
# fewer bytes and half the time of plain gzip 4 (measured: robomimic.md).
_PACKED = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
GEOMETRY = ("_depth", "_intrinsic", "_extrinsic")


def parts_folder(path: str | Path) -> Path:
    """Where the finished episodes of the unfinished file ``path`` lie."""
    return Path(f"{path}.parts")


def write_part(
    path: str | Path,
    index: int,
    *,
    actions: np.ndarray,
    obs: Mapping[str, np.ndarray],
    states: np.ndarray | None = None,
    rewards: np.ndarray | None = None,
    dones: np.ndarray | None = None,
    model_file: str | None = None,
    attributes: Mapping[str, Any] | None = None,
    compress: bool = True,
) -> Path:
    """Write one episode as ``<path>.parts/demo_<index>.hdf5``; the file appears whole or not at all.

    Processes may write different indices at once. An index that exists is replaced.

    Args:
        actions: (T, A), finite.
        obs: arrays under their names on disk: ``<cam>_image`` (T, H, W, 3) uint8, ``<cam>_depth`` (T, H, W)
            or (T, H, W, 1) metres, ``<cam>_intrinsic`` (3, 3) or (T, 3, 3), ``<cam>_extrinsic`` (4, 4) or
            (T, 4, 4) camera -> reference frame, anything else (T, ...), e.g. ``robot0_eef_pos``.
        states, rewards, dones: (T, S), (T,), (T,).
        model_file: the MJCF of this episode.
        attributes: further attributes of this episode (``ep_meta``, ``seed``, ``request`` ...); mappings and
            lists are stored as JSON.
        compress: False stores pixels as they are, in one piece: about twice the bytes, read ten times faster.

    Raises:
        ValueError: lengths, dtypes or sizes disagree, or a number is not finite.
        OSError: the disk is full; the unfinished file is removed, finished episodes are untouched.
    """
    h5py = require("h5py", "robot")
    actions = np.asarray(actions, dtype=np.float64)
    if actions.ndim != 2 or len(actions) == 0:
        raise ValueError(f"episode {index}: actions have shape {actions.shape}, wanted (T, A) with T >= 1")
    length = len(actions)
    arrays = {"actions": actions}
    optional = (("states", states, np.float64), ("rewards", rewards, np.float64), ("dones", dones, np.int64))
    for name, value, dtype in optional:
        if value is not None:
            arrays[name] = np.asarray(value, dtype=dtype)
    arrays |= {f"obs/{name}": _as_stored(name, np.asarray(value), length) for name, value in obs.items()}
    for name, value in arrays.items():
        if value.shape[:1] != (length,):
            raise ValueError(
                f"episode {index}: {name} has shape {value.shape}, but actions have {length} rows"
            )
        checked = value.dtype.kind == "f" and not name.endswith("_depth")  # depth: non-finite = no reading
        if checked and not np.isfinite(value).all():
            row = int(np.argwhere(~np.isfinite(value))[0][0])
            raise ValueError(f"episode {index}: {name} is not finite at row {row}; drop the episode")
    for camera in {n[: -len("_image")] for n in obs if n.endswith("_image")}:
        check_camera(f"episode {index}", camera, arrays)

    # Built in memory and written in one go: a full disk is then an ordinary OSError, and HDF5 never sees it.
    with h5py.File(f"part_{index}", "w", driver="core", backing_store=False, block_size=1 << 22) as file:
        data = file.create_group("data")
        data.attrs["total"] = length
        demo = data.create_group(f"demo_{index}")
        for name, value in arrays.items():
            _store(demo, name, value, compress)
        if model_file is not None:
            demo.attrs["model_file"] = model_file
        for name, value in (attributes or {}).items():
            demo.attrs[name] = _plain(value)
        demo.attrs["num_samples"] = length
        file.flush()
        content = file.id.get_file_image()

    target = parts_folder(path) / f"demo_{index}.hdf5"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with _disk_full_named(temporary, f"finished episodes in {target.parent} are safe"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    return target


def finished_parts(path: str | Path, request: str | Mapping[str, Any] | None = None) -> set[int]:
    """Indices of the finished episodes of the unfinished file ``path``.

    A part that cannot be read is removed and named in a warning, so that it is written again.

    Args:
        request: what is asked for now; a part written with another attribute ``request`` is an error.
    """
    h5py = require("h5py", "robot")
    folder = parts_folder(path)
    finished = set()
    for index, part in _list_parts(folder):
        try:
            with h5py.File(part, "r") as file:
                demo = file[f"data/demo_{index}"]
                problem = length_problem(demo)
                asked = demo.attrs.get("request")
        except (OSError, KeyError, RuntimeError) as error:
            reraise_unless_damaged(error)
            problem, asked = f"cannot be read ({error})", None
        if problem:
            warnings.warn(f"removed the broken episode {part}: {problem}", stacklevel=2)
            part.unlink()
            continue
        if request is not None and asked is not None and asked != _plain(request):
            raise ValueError(
                f"{folder} holds episodes of another request:\n  there:  {asked}\n"
                f"  wanted: {_plain(request)}\nRemove that folder, or write to another path."
            )
        finished.add(index)
    return finished


def merge(
    path: str | Path,
    *,
    env_args: Mapping[str, Any] | str,
    attributes: Mapping[str, Any],
    mask: Mapping[str, Iterable[int]] | None = None,
    keep_parts: bool = False,
) -> Path:
    """Join the parts of ``path`` into the final file, as demo_0 ... demo_{N-1} in the order of their indices.

    The file appears whole or not at all; the parts are removed afterwards.

    Args:
        env_args: robomimic's ``{"env_name", "env_version", "type", "env_kwargs"}``.
        attributes: attributes of ``/data``: ``reference_frame`` (world, base or camera), ``action_kind``
            (controller, delta or absolute), and by habit ``task`` (the instruction), ``control_freq`` (Hz),
            ``request`` (what was asked for; mappings are stored as JSON with sorted keys). ``vilma_version``
            is added.
        mask: name -> indices of parts, e.g. ``{"train": [0, 2], "valid": [5]}``; stored as names of episodes.
    """
    h5py = require("h5py", "robot")
    path = Path(path)
    for name, allowed in (("reference_frame", REFERENCE_FRAMES), ("action_kind", ACTION_KINDS)):
        if attributes.get(name) not in allowed:
            raise ValueError(
                f"attribute {name} is {attributes.get(name)!r}, wanted one of {', '.join(allowed)}"
            )
    missing = {"env_name", "type", "env_kwargs"} - set(json.loads(_plain(env_args)))
    if missing:
        raise ValueError(
            f"env_args lack {sorted(missing)}; robomimic needs env_name, type (1 = robosuite), env_kwargs"
        )
    usable = finished_parts(path)
    parts = [(index, part) for index, part in _list_parts(parts_folder(path)) if index in usable]
    if not parts:
        raise ValueError(f"nothing to merge: no finished episode in {parts_folder(path)}")
    names = {index: f"demo_{number}" for number, (index, _) in enumerate(parts)}
    for key, chosen in (mask or {}).items():
        unknown = sorted(set(chosen) - set(names))
        if unknown:
            raise ValueError(f"mask {key!r} names parts that do not exist: {unknown[:10]}")

    temporary = path.with_name(f".{path.name}.tmp")
    with _disk_full_named(temporary, f"all {len(parts)} finished episodes in {parts_folder(path)} are safe"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _reserve(temporary, sum(part.stat().st_size + 4096 for _, part in parts) + (1 << 20))
        with h5py.File(temporary, "r+") as file:
            data = file.create_group("data")
            total = 0
            for index, part in parts:
                with h5py.File(part, "r") as source:
                    source.copy(f"data/demo_{index}", data, name=names[index])
                total += int(data[names[index]].attrs["num_samples"])
            for key, chosen in (mask or {}).items():
                file[f"mask/{key}"] = np.array([names[index] for index in sorted(chosen)], dtype="S")
            for name, value in {**attributes, "vilma_version": __version__}.items():
                data.attrs[name] = _plain(value)
            data.attrs["env_args"] = _plain(env_args)
            data.attrs["total"] = total
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    if not keep_parts:
        remove_parts(path)
    return path


def remove_parts(path: str | Path) -> None:
    """Remove what is left of the parts of ``path`` (after a kill between the merge and its clean-up)."""
    folder = parts_folder(path)
    if folder.is_dir():
        for file in folder.iterdir():
            if file.name.lstrip(".").startswith("demo_"):
                file.unlink()
        with contextlib.suppress(OSError):  # somebody else's file keeps the folder
            folder.rmdir()


def file_attributes(path: str | Path) -> dict[str, Any] | None:
    """The attributes of ``/data`` and ``num_demos``, or None when there is no finished, readable file."""
    h5py = require("h5py", "robot")
    try:
        with h5py.File(path, "r") as file:
            found = {name: from_attribute(value) for name, value in file["data"].attrs.items()}
            return found | {"num_demos": len(file["data"])}
    except (OSError, KeyError) as error:
        if not isinstance(error, FileNotFoundError):
            reraise_unless_damaged(error)
        return None


class EpisodeWriter:
    """`write_part` and `merge` as a context: ``with EpisodeWriter(...) as w: w.write(actions=..., obs=...)``.

    Episodes that an earlier, interrupted writer finished are kept. Leaving by an exception keeps the parts
    and writes no final file.
    """

    def __init__(self, path: str | Path, env_args: Mapping[str, Any] | str, attributes: Mapping[str, Any]):
        self.path = Path(path)
        self.env_args = env_args
        self.attributes = dict(attributes)
        self.finished = finished_parts(self.path, self.attributes.get("request"))

    def write(self, index: int | None = None, **episode: Any) -> int:
        """Write one episode (keywords of `write_part`) and return its index, by default the next free one."""
        if index is None:
            index = max(self.finished, default=-1) + 1
        if "request" in self.attributes:
            episode["attributes"] = {
                "request": self.attributes["request"],
                **(episode.get("attributes") or {}),
            }
        write_part(self.path, index, **episode)
        self.finished.add(index)
        return index

    def close(self, mask: Mapping[str, Iterable[int]] | None = None) -> Path:
        """Merge the episodes into the final file."""
        return merge(self.path, env_args=self.env_args, attributes=self.attributes, mask=mask)

    def __enter__(self) -> "EpisodeWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()


def _as_stored(name: str, value: np.ndarray, length: int) -> np.ndarray:
    """An observation in the dtype and shape of the layout."""
    if name.endswith("_image"):
        if value.dtype != np.uint8 or value.ndim != 4 or value.shape[-1] != 3:
            raise ValueError(f"{name} is {value.dtype} {value.shape}, wanted uint8 (T, H, W, 3)")
    elif name.endswith("_depth"):
        value = np.asarray(value, dtype=np.float32)
        value = value[..., None] if value.ndim == 3 else value
        if value.ndim != 4 or value.shape[-1] != 1:
            raise ValueError(f"{name} has shape {value.shape}, wanted (T, H, W) or (T, H, W, 1)")
    elif name.endswith(("_intrinsic", "_extrinsic")):
        n = 3 if name.endswith("_intrinsic") else 4
        value = np.asarray(value, dtype=np.float32)
        value = np.broadcast_to(value, (length, n, n)) if value.shape == (n, n) else value
        if value.shape[1:] != (n, n):
            raise ValueError(f"{name} has shape {value.shape}, wanted ({n}, {n}) or (T, {n}, {n})")
    return value


def _store(group: Any, name: str, value: np.ndarray, compress: bool = True) -> None:
    if name.endswith(("_image", "_depth")) and compress:  # a frame a chunk: any frame costs one small read
        group.create_dataset(name, data=value, chunks=(1, *value.shape[1:]), **_PACKED)
    elif name.endswith(("_intrinsic", "_extrinsic")):
        group.create_dataset(name, data=value, chunks=value.shape, **_PACKED)
    else:
        group.create_dataset(name, data=value)


def _plain(value: Any) -> Any:
    """A value as an HDF5 attribute: text, number, or JSON with sorted keys."""
    if isinstance(value, (str, bool, int, float, np.generic, np.ndarray)):
        return value
    return json.dumps(value, sort_keys=True)


def from_attribute(value: Any) -> Any:
    value = value.decode() if isinstance(value, bytes) else value
    return value.item() if isinstance(value, np.generic) else value


def _list_parts(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for part in folder.glob("demo_*.hdf5"):
        number = part.stem.removeprefix("demo_")
        if number.isdecimal():
            found.append((int(number), part))
    return sorted(found)


def length_problem(demo: Any, observations: Iterable[str] | None = None) -> str | None:
    """What is wrong with the lengths of an episode on disk, or None; by default of all its observations."""
    if not hasattr(demo, "keys"):
        return "it is a data set, wanted a group"
    if "obs" in demo and not hasattr(demo["obs"], "keys"):
        return "its obs is a data set, wanted a group with one data set for each observation"
    if "num_samples" not in demo.attrs:
        return "it has no num_samples (half-written)"
    if "actions" not in demo:
        return "it has no actions"
    length = int(demo.attrs["num_samples"])
    if length < 1:
        return f"num_samples is {length}"
    names = demo["obs"] if observations is None and "obs" in demo else observations or ()
    for name in ("actions", *(f"obs/{name}" for name in names)):
        shape = getattr(demo[name], "shape", None)
        if shape is None:
            return f"{name} is a group or empty, wanted an array"
        if shape[:1] != (length,):
            return f"{name} has shape {shape}, but num_samples is {length}"
    return None


def reraise_unless_damaged(error: Exception) -> None:
    """Only a damaged file may be skipped or rewritten, not one that is locked or forbidden just now."""
    if isinstance(error, OSError) and error.errno:
        raise error


@contextlib.contextmanager
def _disk_full_named(temporary: Path, safe: str) -> Iterator[None]:
    """Remove the unfinished file when writing fails, and say what a full disk has left intact."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = f"{os.strerror(error.errno)} while writing {temporary}"
        raise OSError(error.errno, f"{what}; {safe}. Free space and run the same command again") from error


def _reserve(path: Path, size: int) -> None:
    """An empty HDF5 file that owns ``size`` bytes of the disk; what it does not use is given back on closing.

    HDF5 2.0 corrupts its own memory (double free, abort) when a write meets a full disk, so a full disk must
    be met here.
    """
    with require("h5py", "robot").File(path, "w"):
        pass
    with open(path, "rb+") as stream:
        os.posix_fallocate(stream.fileno(), 0, size)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_camera(where: str, camera: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Image, depth and matrices of one camera describe one view, or ValueError."""
    image, depth, intrinsic, extrinsic = (arrays.get(f"obs/{camera}{s}") for s in ("_image", *GEOMETRY))
    view = depth if depth is not None else image
    if image is not None and depth is not None and image.shape[1:3] != depth.shape[1:3]:
        raise ValueError(
            f"{where}: {camera}_image is {image.shape[1]}x{image.shape[2]} but {camera}_depth is "
            f"{depth.shape[1]}x{depth.shape[2]}; both must show one view (resize one, and its intrinsics)"
        )
    if intrinsic is not None and view is not None:
        height, width = view.shape[1:3]
        matrix = np.asarray(intrinsic)
        focal, centre = matrix[:, [0, 1], [0, 1]], matrix[:, [0, 1], [2, 2]] / [width, height]
        if not (np.isfinite(matrix).all() and (focal > 0).all() and np.allclose(matrix[:, 2], [0, 0, 1])):
            raise ValueError(f"{where}: {camera}_intrinsic is not a camera matrix: {matrix[0].tolist()}")
        if not ((centre > 0.25) & (centre < 0.75)).all():
            raise ValueError(
                f"{where}: {camera}_intrinsic has its centre at {matrix[0, :2, 2].tolist()}, far from the "
                f"middle of a {height}x{width} image; they must be those of the stored size (rescale them)"
            )
    if extrinsic is not None:
        matrix = np.asarray(extrinsic, dtype=np.float64)
        rotation = matrix[:, :3, :3]
        rigid = np.isfinite(matrix).all() and np.allclose(matrix[:, 3], [0, 0, 0, 1], atol=1e-4)
        if not (rigid and np.allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3), atol=1e-3)):
            raise ValueError(
                f"{where}: {camera}_extrinsic is not a rigid transform (rotation, translation, last row "
                f"0 0 0 1): {matrix[0].tolist()}"
            )
