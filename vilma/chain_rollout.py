"""The loop of an evaluation in chains: the policy forgets at every task, the scene does not.

Importing this module imports gymnasium; ``vilma.chains`` does so when an evaluation starts.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .rollout import Rollout, Row

# Every second control step is filmed: half the memory, and still smooth.
FILM_STRIDE = 2


class ChainRollout(Rollout):
    """`Rollout` whose episodes are chains.

    Args:
        chains: the names of every chain's tasks; an episode's index is that of its chain.
        noise_seed: added to the index to seed the policy's noise.
        on_chain: called after every finished chain.
    """

    def __init__(
        self,
        *arguments: Any,
        chains: Sequence[Sequence[str]],
        noise_seed: int,
        on_chain: Callable[[], None],
        **options: Any,
    ):
        # Chain i is the simulator's seed i, so the runner's own seed, which it adds to an index, is 0.
        super().__init__(*arguments, seed=0, **options)
        self.chains, self.noise_seed, self.on_chain = chains, noise_seed, on_chain
        self._steps: dict[int, list[int]] = {}
        self._captions: dict[int, list[str]] = {}

    def _begin_episodes(self) -> None:
        idle = {i for i, row in enumerate(self.rows) if not row.is_busy}
        super()._begin_episodes()
        begun = [i for i in idle if self.rows[i].is_busy]
        for i in begun:
            self._steps[self.rows[i].episode] = [0]
        if begun and self.noise_seed and hasattr(self.policy, "seed_rows"):
            self.policy.seed_rows(begun, [self.noise_seed + self.rows[i].episode for i in begun])

    def _take(self, i: int, result: tuple[dict[str, Any], float, bool, bool, bool]) -> None:
        steps = self._steps[self.rows[i].episode]
        steps[-1] += 1
        _, reward, terminated, truncated, _ = result
        super()._take(i, result)
        if reward > 0 and not (terminated or truncated):
            steps.append(0)
            self.policy.reset([i])

    def _finish(self, row: Row, outcome: str) -> None:
        row.frames = Film(row.frames, self._captions.pop(row.episode, [])[-len(row.frames) :])
        super()._finish(row, outcome)
        self.on_chain()

    def _entry(self, row: Row, outcome: str) -> dict[str, Any]:
        lost = outcome not in ("success", "failure")
        return {
            "index": row.episode,
            "tasks": list(self.chains[row.episode]),
            "solved": 0 if lost else round(row.total),
            "steps": self._steps.get(row.episode, []),
            "outcome": outcome if lost else "finished",
            "seconds": round(time.perf_counter() - row.began, 3),
        }

    def _film(self, row: Row) -> None:
        if row.episode in self.filmed and row.steps % FILM_STRIDE == 0:
            super()._film(row)
            self._captions.setdefault(row.episode, []).append(row.observation["task"])


class Film(Sequence):
    """Frames with a line of text below each, put together only when they are written: a chain has many."""

    def __init__(self, frames: Sequence[np.ndarray], texts: Sequence[str]):
        self.frames, self.texts = frames, texts

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> np.ndarray:
        return captioned(self.frames[index], self.texts[index])


def captioned(frame: np.ndarray, text: str, size: int = 400) -> np.ndarray:
    """A frame (H, W, 3) uint8 enlarged to a width of ``size``, with a line of text below it."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(frame)
    height = round(size * picture.height / picture.width)
    canvas = Image.new("RGB", (size, height + 24))
    canvas.paste(picture.resize((size, height), Image.Resampling.BICUBIC))
    ImageDraw.Draw(canvas).text((6, height + 6), text, fill="white")
    return np.asarray(canvas)
