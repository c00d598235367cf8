"""Writing CALVIN's own format: small sets for tests, benches and checks. Needs numpy alone."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

__all__ = ["TACTILE", "CalvinWriter", "relative_action"]

# The tactile arrays of a released frame.
TACTILE = {"rgb_tactile": ((160, 120, 6), np.uint8), "depth_tactile": ((160, 120, 2), np.float32)}


def relative_action(action: np.ndarray, robot_obs: np.ndarray) -> np.ndarray:
    """CALVIN's ``rel_actions`` (7,) of an absolute action (7,) in a state (15,): 1 = 0.02 m, 0.05 rad."""
    turn = (action[3:6] - robot_obs[3:6] + np.pi) % (2 * np.pi) - np.pi
    move = action[:3] - robot_obs[:3]
    return np.concatenate([np.clip(move / 0.02, -1, 1), np.clip(turn / 0.05, -1, 1), action[6:7]])


class CalvinWriter:
    """One split of a data set: frames in their files; the index and the annotations on ``close``.

    Args:
        folder: e.g. ``mini/training``.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.frames = 0
        self._episodes: list[tuple[int, int]] = []
        self._segments: list[tuple[int, int, str, str]] = []

    def write_episode(self, frames: list[Mapping[str, np.ndarray]]) -> int:
        """Write a recording; returns the number of its first frame. ``rel_actions`` follow from the rest."""
        first = self.frames
        for frame in frames:
            relative = relative_action(frame["actions"], frame["robot_obs"])
            path = self.folder / f"episode_{self.frames:07d}.npz"
            np.savez_compressed(path, **{**frame, "rel_actions": relative})
            self.frames += 1
        self._episodes.append((first, self.frames - 1))
        return first

    def annotate(self, start: int, end: int, text: str, task: str) -> None:
        """Frames ``start`` to ``end``, both included, show ``task``, in words ``text``."""
        self._segments.append((start, end, text, task))

    def close(self) -> None:
        spans = [(start, end) for start, end, _, _ in self._segments]
        texts = [text for _, _, text, _ in self._segments]
        found = {
            "language": {
                "ann": texts,
                "task": [task for *_, task in self._segments],
                "emb": np.zeros((len(texts), 1, 384), np.float32),
            },
            "info": {"indx": spans, "episodes": []},
        }
        (self.folder / "lang_annotations").mkdir(exist_ok=True)
        np.save(self.folder / "lang_annotations" / "auto_lang_ann.npy", found)
        np.save(self.folder / "ep_start_end_ids.npy", np.array(self._episodes))
