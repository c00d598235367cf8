"""CALVIN's files as they are released: frames in npz files, episodes, language annotations, camera geometry.

The card is `calvin.md`. Needs numpy alone, so that a packing process stays light. T frames of a segment.
"""

import io
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "CAMERAS",
    "CalvinTree",
    "Segment",
    "camera_intrinsic",
    "camera_poses",
    "gripper_pose",
    "load_annotations",
    "usable_depth",
]

SPLITS = ("training", "validation")


class Camera(NamedTuple):
    """A camera of every scene: side of its square picture in pixels, vertical field of view in degrees."""

    size: int
    fov: float
    far: float


CAMERAS = {"static": Camera(200, 10.0, 10.0), "gripper": Camera(84, 75.0, 2.0)}

# Of the static camera, the same in all scenes.
_EYE = np.array([2.871459009488717, -2.166602199425597, 2.555159848480571])
_TARGET = np.array([-0.026242351159453392, -0.0302329882979393, 0.3920000493526459])
_UP = np.array([0.4041403970338857, 0.22629790978217404, 0.8862616969685161])

# The Panda arm: position (metres) and roll of the frame of every joint in its parent; each turns about its z.
_BASE = (-0.34, -0.46, 0.24)
_JOINTS = (
    ((0, 0, 0.333), 0.0),
    ((0, 0, 0), -np.pi / 2),
    ((0, -0.316, 0), np.pi / 2),
    ((0.0825, 0, 0), np.pi / 2),
    ((-0.0825, 0.384, 0), -np.pi / 2),
    ((0, 0, 0), np.pi / 2),
    ((0.088, 0, 0), np.pi / 2),
)
# From the last joint to the hand, and from there to the link that carries the camera (CALVIN rounds pi / 2).
_HAND = ((0, 0, 0.107), (0.0, 0.0, -np.pi / 4))
_MOUNT = ((-0.1, 0, 0), (1.3, 0.0, -1.57))


def camera_intrinsic(camera: str) -> np.ndarray:
    """(3, 3) float32 pinhole matrix in pixels of the released pictures; pixel centres lie at +0.5."""
    size, fov, _ = CAMERAS[camera]
    focal, centre = size / (2 * np.tan(np.deg2rad(fov) / 2)), size / 2
    return np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]], np.float32)


def camera_poses(camera: str, robot_obs: np.ndarray) -> np.ndarray:
    """Camera -> world of every frame, (T, 4, 4) float32, OpenCV axes, from ``robot_obs`` (T, 15).

    The static camera does not move. The gripper's is where the recorded joint angles put it, as the authors'
    renderer did: it set the joints and drew. (The recorded tool pose is one step of the physics older: up to
    2 mm off while the arm moves.)
    """
    if camera == "static":
        pose = _look_at(_EYE, _TARGET - _EYE, _UP)
        return np.broadcast_to(pose.astype(np.float32), (len(robot_obs), 4, 4)).copy()
    return gripper_pose(np.asarray(robot_obs)[:, 7:14])


def gripper_pose(joints: np.ndarray) -> np.ndarray:
    """Poses (T, 4, 4) float32 of the gripper's camera, OpenCV axes, from the arm's joint angles (T, 7)."""
    joints = np.asarray(joints, dtype=np.float64)
    pose = np.broadcast_to(_transform(_BASE, (0, 0, 0)), (len(joints), 4, 4))
    for number, (offset, roll) in enumerate(_JOINTS):
        pose = pose @ _transform(offset, (roll, 0, 0)) @ _turns(joints[:, number])
    pose = pose @ _transform(*_HAND) @ _transform(*_MOUNT)
    # The camera looks along the link's y axis; its picture's x is -x of the link, its y (down) is z.
    pose = pose @ np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    return pose.astype(np.float32)


def usable_depth(camera: str, depth: np.ndarray) -> np.ndarray:
    """Depth (..., H, W) float32 in metres, 0 where the ray met nothing before the far plane."""
    depth = np.asarray(depth, np.float32)
    return np.where(depth < CAMERAS[camera].far * (1 - 1e-6), depth, np.float32(0))


def _look_at(eye: np.ndarray, forward: np.ndarray, up: np.ndarray) -> np.ndarray:
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = eye
    return pose


def _transform(offset: Iterable[float], rpy: Iterable[float]) -> np.ndarray:
    """(4, 4) from a position and roll, pitch, yaw about fixed axes."""
    (a, b, c) = rpy
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = z @ y @ x, tuple(offset)
    return matrix


def _turns(angles: np.ndarray) -> np.ndarray:
    """Rotations (T, 4, 4) about z."""
    matrices = np.zeros((len(angles), 4, 4))
    matrices[:, 0, 0] = matrices[:, 1, 1] = np.cos(angles)
    matrices[:, 1, 0] = np.sin(angles)
    matrices[:, 0, 1] = -matrices[:, 1, 0]
    matrices[:, 2, 2] = matrices[:, 3, 3] = 1
    return matrices


@dataclass(frozen=True)
class Segment:
    """Frames ``start`` to ``end``, both included, that show one thing."""

    start: int
    end: int
    instruction: str = ""
    task: str = ""

    def __len__(self) -> int:
        return self.end - self.start + 1


class CalvinTree:
    """One split of a data set: ``<root>/training`` or ``<root>/validation``, or such a folder itself.

    Raises:
        FileNotFoundError: no such folder, or no frames in it.
        ValueError: a file in it is not what CALVIN writes; named, with what was wanted.
    """

    def __init__(self, root: str | Path, split: str = "training"):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, wanted one of {', '.join(SPLITS)}")
        root = Path(root)
        self.folder = root / split if (root / split).is_dir() else root
        if not (self.folder / "ep_start_end_ids.npy").is_file():
            raise FileNotFoundError(
                f"{self.folder} is no CALVIN split: it has no ep_start_end_ids.npy. Give the folder that "
                f"holds {' and '.join(SPLITS)}, or one of these"
            )
        self.name = self.folder.name

    def episodes(self) -> list[Segment]:
        """The uninterrupted recordings."""
        path = self.folder / "ep_start_end_ids.npy"
        ids = np.load(path, allow_pickle=False)
        if ids.ndim != 2 or ids.shape[1] != 2 or ids.dtype.kind not in "iu" or (ids[:, 0] > ids[:, 1]).any():
            raise ValueError(f"{path} is {ids.dtype} {ids.shape}, wanted rows of a first and a last frame")
        return [Segment(int(start), int(end)) for start, end in ids]

    def segments(self) -> list[Segment]:
        """The language-annotated parts, in the order of the file; they may overlap."""
        for path in (
            self.folder / "lang_annotations" / "auto_lang_ann.npy",
            self.folder / "auto_lang_ann.npy",
        ):
            if path.is_file():
                return load_annotations(path)
        raise FileNotFoundError(f"{self.folder} has no lang_annotations/auto_lang_ann.npy")

    def path(self, frame: int) -> Path:
        return self.folder / f"episode_{frame:07d}.npz"

    def read(self, frames: Iterable[int], keys: Iterable[str]) -> dict[str, np.ndarray]:
        """These arrays of these frames, stacked (T, ...). Only what is named is decompressed."""
        keys = tuple(keys)
        rows = [self._read_frame(frame, keys) for frame in frames]
        return {key: np.stack([row[key] for row in rows]) for key in keys}

    def _read_frame(self, frame: int, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
        path = self.path(frame)
        try:
            with np.load(path, allow_pickle=False) as file:
                missing = [key for key in keys if key not in file.files]
                if missing:
                    raise ValueError(f"{path} lacks {', '.join(missing)}; it has {', '.join(file.files)}")
                return {key: file[key] for key in keys}
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is missing; the split is incomplete: unpack its archive again"
            ) from None
        except (zipfile.BadZipFile, EOFError, OSError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); unpack its archive again") from error

    def check(self) -> Iterator[str]:
        """What is wrong with the split's frames: names of files that are missing, without opening any."""
        there = {path.name for path in self.folder.glob("episode_*.npz")}
        for episode in self.episodes():
            for frame in range(episode.start, episode.end + 1):
                if self.path(frame).name not in there:
                    yield self.path(frame).name


class _Dtype:
    """Stands for numpy.dtype in a pickle. Taken from there are kind, size and byte order only.

    The real one would also believe the flags: "no objects inside" turns a file's bytes into pointers.
    """

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or not re.fullmatch(r"[biufSUO]\d*", code):
            raise pickle.UnpicklingError(f"it holds an array of {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray in a pickle; ``value`` is the array, once its content was checked."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, content = state
        self.value = _array(content, dtype, shape, "F" if is_fortran else "C")

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: int) -> Any:
        return self.value[index]


def _array(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
    """From a list of objects, or from the bytes of numbers or texts, which must be as many as it takes."""
    if not dtype.value.hasobject:
        return np.ndarray(shape, dtype.value, memoryview(content), order=order)
    flat = np.empty(len(content), object)
    for number, item in enumerate(content):
        flat[number] = item
    return flat.reshape(shape, order=order)


def _frombuffer(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str, *_: Any) -> _Array:
    array = _Array()
    array.value = _array(content, dtype, shape, order)
    return array


def _encode(text: str, encoding: str) -> bytes:
    """How old pickles spell bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes as {encoding!r}")
    return text.encode("latin1")


# What a pickled array of numbers or texts asks for, under numpy 1's and numpy 2's names, and who answers.
_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): answer
        for core in ("core", "_core")
        for module, name, answer in (
            ("multiarray", "_reconstruct", lambda *_: _Array()),
            ("multiarray", "scalar", lambda dtype, content: _array(content, dtype, ())[()]),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _Restricted(pickle.Unpickler):
    """Loads arrays, texts, numbers, lists and dictionaries; anything else in a pickle could be a program.

    Nothing of numpy's own pickling runs: it trusts what it reads.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STAND_INS[module, name]


def load_annotations(path: str | Path) -> list[Segment]:
    """The segments of ``auto_lang_ann.npy``, a pickled dictionary inside an npy file.

    A pickle may run any program when it is loaded; this loader refuses all but arrays and plain values.

    Raises ValueError for another content, and for a pickle that asks for more.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            version = np.lib.format.read_magic(stream)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                version, np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(stream)
            if not dtype.hasobject or shape != ():
                raise ValueError(f"it is an array {shape} of {dtype}, wanted one pickled dictionary")
            holder = _Restricted(io.BytesIO(stream.read())).load()
        found = holder.value.item() if isinstance(holder, _Array) else holder
        texts, tasks = found["language"]["ann"], found["language"]["task"]
        spans = found["info"]["indx"]
        if not len(texts) == len(tasks) == len(spans):
            raise ValueError(f"it has {len(texts)} texts, {len(tasks)} tasks and {len(spans)} segments")
        segments = [
            Segment(int(start), int(end), _one(text), _one(task))
            for (start, end), text, task in zip(spans, texts, tasks)
        ]
    except (ValueError, TypeError, LookupError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not CALVIN's annotation file: {reason}") from error
    empty = [segment for segment in segments if segment.end < segment.start]
    if empty:
        raise ValueError(f"{path}: a segment ends at {empty[0].end}, before its start {empty[0].start}")
    return segments


def _one(text: Any) -> str:
    """A text, also where a file holds each in a list of its own."""
    while not isinstance(text, str) and len(text) == 1:
        text = text[0]
    return str(text)
