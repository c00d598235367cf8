"""CALVIN's npz files as windows for training, read as they are; `calvin.md` is the card.

Every frame is a file of its own, so a window costs as many openings as it has frames. For a training of more
than a look, pack once (``vilma pack-calvin``) and read with `vilma.datasets.robomimic`.

Shapes: To observation steps, Ta action steps, H W image size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .calvin_tree import CAMERAS, CalvinTree, camera_intrinsic, camera_poses, usable_depth

__all__ = ["CalvinConfig", "CalvinDataset"]


@dataclass(frozen=True)
class CalvinConfig:
    """What to read and how to cut it into windows.

    Args:
        path: the data set's folder, with ``training`` and ``validation`` in it, or one of these.
        split: which of the two.
        cameras: of ``static`` and ``gripper``.
        annotated: windows of the language-annotated segments; False takes whole recordings, without texts.
        obs_horizon: To; rows before the start of a segment repeat its first frame.
        action_horizon: Ta; actions past the end repeat the last one and are marked in ``action_is_pad``.
        images, depth: which pixels to read; depth brings intrinsics and poses.
        relative: ``rel_actions`` (1 = 0.02 m, 0.05 rad a step); False takes the absolute ``actions``.
    """

    path: str
    split: str = "training"
    cameras: tuple[str, ...] = ("static", "gripper")
    annotated: bool = True
    obs_horizon: int = 1
    action_horizon: int = 10
    images: bool = True
    depth: bool = True
    relative: bool = True

    def __post_init__(self) -> None:
        unknown = [camera for camera in self.cameras if camera not in CAMERAS]
        if unknown:
            raise ValueError(f"CALVIN has the cameras {', '.join(CAMERAS)}, not {', '.join(unknown)}")
        if self.obs_horizon < 1 or self.action_horizon < 1:
            raise ValueError(f"horizons are {self.obs_horizon} and {self.action_horizon}, wanted at least 1")


class CalvinDataset(torch.utils.data.Dataset):
    """Windows of segments: a sample for every frame, with the keys of `vilma.datasets.robomimic`.

    ``observation.state`` is CALVIN's ``robot_obs`` (15): tool position and Euler angles (world), opening,
    seven joints, gripper action. Camera poses are recomputed from it (`calvin_tree.camera_poses`).

    Raises:
        FileNotFoundError: no such split, or no annotations where they are asked for.
        ValueError: a file that is not CALVIN's; from ``__getitem__`` also for a damaged frame, by name.
    """

    def __init__(self, config: CalvinConfig):
        self.config = config
        self.tree = CalvinTree(config.path, config.split)
        self.segments = self.tree.segments() if config.annotated else self.tree.episodes()
        if not self.segments:
            raise ValueError(f"{self.tree.folder} has no segments")
        lengths = np.array([len(segment) for segment in self.segments])
        self._ends = lengths.cumsum()
        self._observed = ["robot_obs"]
        self._observed += [f"rgb_{camera}" for camera in config.cameras if config.images]
        self._observed += [f"depth_{camera}" for camera in config.cameras if config.depth]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        segment, frame = self._place(index % len(self))
        seen = [max(segment.start, frame + step) for step in range(1 - self.config.obs_horizon, 1)]
        ahead = np.arange(frame, frame + self.config.action_horizon)
        key = "rel_actions" if self.config.relative else "actions"
        found = self.tree.read(seen, self._observed)
        acted = self.tree.read(range(frame, min(segment.end, int(ahead[-1])) + 1), (key,))[key]
        actions = acted[np.minimum(ahead - frame, len(acted) - 1)]
        state = found["robot_obs"].astype(np.float32)
        sample: dict[str, Any] = {
            "observation.state": torch.from_numpy(state),
            "action": torch.from_numpy(actions.astype(np.float32)),
            "action_is_pad": torch.from_numpy(ahead > segment.end),
            "task": segment.instruction,
        }
        for camera in self.config.cameras:
            if self.config.images:
                pixels = torch.from_numpy(found[f"rgb_{camera}"]).movedim(-1, -3)
                sample[f"observation.images.{camera}"] = pixels
            if self.config.depth:
                depth = usable_depth(camera, found[f"depth_{camera}"])
                matrix = np.broadcast_to(camera_intrinsic(camera), (len(seen), 3, 3)).copy()
                sample[f"observation.depth.{camera}"] = torch.from_numpy(depth)
                sample[f"observation.intrinsics.{camera}"] = torch.from_numpy(matrix)
                pose = camera_poses(camera, found["robot_obs"])
                sample[f"observation.pose.{camera}"] = torch.from_numpy(pose)
        return sample

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A whole batch: (B, ...) under the keys of a sample."""
        samples = [self[index] for index in indices]
        return {
            key: [s[key] for s in samples] if key == "task" else torch.stack([s[key] for s in samples])
            for key in samples[0]
        }

    def locate(self, index: int) -> str:
        """Where sample ``index`` lies, in words."""
        return str(self.tree.path(self._place(index)[1]))

    @property
    def metadata(self) -> dict[str, Any]:
        """What a policy must agree with, as JSON-able values."""
        tasks = sorted({segment.instruction for segment in self.segments})
        return {
            "cameras": list(self.config.cameras),
            "sizes": {camera: [CAMERAS[camera].size] * 2 for camera in self.config.cameras},
            "reference_frame": "world",
            "action_kind": "delta" if self.config.relative else "absolute",
            "control_freq": 30.0,
            "task": tasks[0] if len(tasks) == 1 else "",
            "tasks": tasks,
            "state_keys": ["robot_obs"],
            "state_dim": 15,
            "action_dim": 7,
            "episodes": len(self.segments),
            "frames": len(self),
            "skipped": 0,
        }

    def _place(self, index: int) -> tuple[Any, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        segment = self.segments[number]
        return segment, segment.start + index - int(self._ends[number] - len(segment))
