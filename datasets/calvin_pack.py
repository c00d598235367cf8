"""Packing CALVIN's annotated segments into the robomimic layout, once: one episode for each segment.

A shard is a file of consecutive segments. Every segment is written whole or not at all, and a shard that is
finished was read back and compared with checksums that were taken from the npz files' arrays; so a kill costs
at most the segments in progress, and the same call goes on. Needs no torch.
"""

import json
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vilma.extras import require

from .calvin_tree import CAMERAS, CalvinTree, Segment, camera_intrinsic, camera_poses, usable_depth
from .robomimic_writer import file_attributes, finished_parts, merge, parts_folder, remove_parts, write_part

__all__ = [
    "Shard",
    "finish_shard",
    "is_finished",
    "left_out_before",
    "pack_segment",
    "plan_shards",
    "read_manifest",
    "verify_shard",
]

MANIFEST = "packed.json"


class Shard(NamedTuple):
    """One packed file and the segments (by their number in the annotation file) that belong into it."""

    path: Path
    segments: tuple[int, ...]

    def request(self, tree: CalvinTree, cameras: Sequence[str]) -> dict[str, Any]:
        """What identifies its content: a shard that was begun for something else is an error.

        Whether pixels are compressed is no part of it: that changes no value.
        """
        return {
            "format": 1,
            "split": tree.name,
            "segments": [self.segments[0], self.segments[-1]],
            "cameras": list(cameras),
        }


def plan_shards(out: Path, count: int, size: int) -> list[Shard]:
    """Cut ``count`` segments into files of at most ``size``."""
    if size < 1:
        raise ValueError(f"got {size} segments a file, wanted at least 1")
    return [
        Shard(out / f"part_{number:04d}.hdf5", tuple(range(start, min(start + size, count))))
        for number, start in enumerate(range(0, count, size))
    ]


def pack_segment(
    tree: CalvinTree,
    shard: Shard,
    number: int,
    segment: Segment,
    cameras: Sequence[str],
    compress: bool = False,
) -> int:
    """Write one segment as a part of its shard; returns its number of frames."""
    keys = [f"{kind}_{camera}" for camera in cameras for kind in ("rgb", "depth")]
    found = tree.read(range(segment.start, segment.end + 1), ("rel_actions", "robot_obs", "scene_obs", *keys))
    obs: dict[str, np.ndarray] = {"robot_obs": found["robot_obs"], "scene_obs": found["scene_obs"]}
    for camera in cameras:
        size = CAMERAS[camera].size
        wanted = {f"rgb_{camera}": (size, size, 3), f"depth_{camera}": (size, size)}
        for key, shape in wanted.items():
            if found[key].shape[1:] != shape:
                raise ValueError(
                    f"{tree.path(segment.start)}: {key} is {found[key].shape[1:]}, wanted {shape}; the "
                    "camera matrices would be wrong"
                )
        obs[f"{camera}_image"] = found[f"rgb_{camera}"]
        obs[f"{camera}_depth"] = usable_depth(camera, found[f"depth_{camera}"])
        obs[f"{camera}_intrinsic"] = camera_intrinsic(camera)
        obs[f"{camera}_extrinsic"] = camera_poses(camera, found["robot_obs"])
    checksums = {name: _checksum(value) for name, value in obs.items() if not name.endswith("_intrinsic")}
    checksums["actions"] = _checksum(np.asarray(found["rel_actions"], np.float64))
    write_part(
        shard.path,
        number,
        actions=found["rel_actions"],
        obs=obs,
        attributes={
            "request": shard.request(tree, cameras),
            "task": segment.instruction,
            "task_id": segment.task,
            "frames": [segment.start, segment.end],
            "checksums": checksums,
        },
        compress=compress,
    )
    return len(segment)


def finish_shard(
    tree: CalvinTree, shard: Shard, cameras: Sequence[str], left_out: Collection[int] = ()
) -> dict[str, Any]:
    """Join the parts of a shard, read the file back and compare it; returns its line of the manifest.

    ``left_out``: segments that cannot be read and are not wanted.

    Raises ValueError when a part is missing or a checksum differs (the file is removed, the parts are kept).
    """
    request = shard.request(tree, cameras)
    missing = set(shard.segments) - set(left_out) - finished_parts(shard.path, request)
    if missing:
        raise ValueError(f"{shard.path}: segments {sorted(missing)[:10]} are not packed yet")
    merge(
        shard.path,
        env_args={"env_name": "CALVIN", "type": 1, "env_kwargs": {"control_freq": 30}},
        attributes={
            "reference_frame": "world",
            "action_kind": "delta",
            "control_freq": 30.0,
            "request": request,
            "left_out": sorted(set(left_out) & set(shard.segments)),
        },
        keep_parts=True,
    )
    try:
        segments, frames = verify_shard(shard)
        if segments != len(shard.segments) - len(set(left_out) & set(shard.segments)):
            raise ValueError(f"{shard.path} has {segments} segments, not all; pack it again")
    except ValueError:
        shard.path.unlink()
        raise
    remove_parts(shard.path)
    return {"file": shard.path.name, "segments": segments, "frames": frames}


def verify_shard(shard: Shard) -> tuple[int, int]:
    """Read a packed file back and compare every array with its checksum; its segments and frames."""
    h5py = require("h5py", "robot")
    frames = 0
    with h5py.File(shard.path, "r") as file:
        segments = len(file["data"])
        for name, demo in file["data"].items():
            for key, expected in json.loads(demo.attrs["checksums"]).items():
                stored = demo[key if key == "actions" else f"obs/{key}"][:]
                if _checksum(stored[..., 0] if key.endswith("_depth") else stored) != expected:
                    raise ValueError(
                        f"{shard.path}:{name}: {key} differs from what was read from the npz files; the disk "
                        "may be failing. Pack it again"
                    )
            frames += int(demo.attrs["num_samples"])
    return segments, frames


def is_finished(tree: CalvinTree, shard: Shard, cameras: Sequence[str]) -> bool:
    """Whether the shard's final file is there, for this request.

    Raises ValueError when there is one that was packed from something else.
    """
    attributes = file_attributes(shard.path)
    if attributes is None:
        return False
    had = json.loads(attributes.get("request", "{}"))
    if had != shard.request(tree, cameras):
        raise ValueError(
            f"{shard.path} was packed from something else ({had}); remove it, or pack into another folder"
        )
    return not parts_folder(shard.path).is_dir()  # parts are removed once it is verified


def left_out_before(shard: Shard) -> list[int]:
    """The segments that a finished file lacks, since they could not be read when it was packed."""
    return json.loads((file_attributes(shard.path) or {}).get("left_out", "[]"))


def read_manifest(out: Path) -> dict[str, Any] | None:
    """What a packed folder holds, or None before it is finished."""
    path = out / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else None


def _checksum(value: np.ndarray) -> str:
    """Of values and dtype; the same for an array and its copy on disk."""
    value = np.ascontiguousarray(value)
    return f"{value.dtype.str}:{zlib.crc32(value.data):08x}"
