"""The loop of an evaluation: rows of simulators, each busy with the next episode, one batched policy.

Importing this module imports gymnasium; ``vilma.evaluation`` does so when an evaluation starts. B is the
number of rows, A the size of an action.
"""

import collections
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from .evaluation import EvaluationError
from .workers import Simulator, SimulatorFailure

if TYPE_CHECKING:
    from .evaluation import Record, RolloutPolicy, Video

ATTEMPTS = 2


class Row:
    """One simulator and the episode that it plays. It ``is_built`` now, or ``has_worked`` at some time."""

    def __init__(self, make_env: Callable[[], gymnasium.Env]):
        self.simulator = Simulator(make_env)
        self.is_built = self.has_worked = False
        self.episode: int | None = None
        self.observation: dict[str, Any] | None = None

    @property
    def is_busy(self) -> bool:
        return self.episode is not None

    def begin(self, episode: int) -> None:
        self.episode, self.steps, self.total, self.success = episode, 0, 0.0, False
        self.frames: list[np.ndarray] = []
        self.began = time.perf_counter()

    def start(self) -> None:
        """Start the simulator in the background, unless it runs."""
        if not self.simulator.is_running:
            self.is_built = False
            self.simulator.start()

    def ready(self, timeout_s: float) -> None:
        """Wait until the simulator is built."""
        self.simulator.ready(timeout_s)
        self.is_built = self.has_worked = True
        self.began = time.perf_counter()


class Rollout:
    """Keeps every row, one simulator each, busy with the next episode until none is left."""

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env],
        rows: int,
        policy: "RolloutPolicy",
        *,
        seed: int,
        record: "Record",
        video: "Video | None",
        timeout_s: float,
        build_timeout_s: float,
    ):
        self.rows = [Row(make_env) for _ in range(rows)]
        self.policy, self.seed, self.record, self.video = policy, seed, record, video
        self.timeout_s, self.build_timeout_s = timeout_s, build_timeout_s
        self.filmed = set(video.episodes) if video else set()

    def close(self) -> None:
        for row in self.rows:
            row.simulator.close()

    def run(self, todo: Sequence[int]) -> None:
        """Play these episodes."""
        self.waiting = collections.deque(todo)
        self.policy.reset()
        while self.waiting or any(row.is_busy for row in self.rows):
            self._begin_episodes()
            if any(row.is_busy for row in self.rows):
                self._step()

    def _begin_episodes(self) -> None:
        """Give the free rows their next episodes. All simulators start before any is waited for."""
        free = [i for i, row in enumerate(self.rows) if not row.is_busy][: len(self.waiting)]
        for i in free:
            self.rows[i].begin(self.waiting.popleft())
            self._attempt(i, self.rows[i].start)
        for i in self._busy(free):
            self._attempt(i, self.rows[i].ready, self.build_timeout_s)
        for i in self._busy(free):
            self._attempt(i, self.rows[i].simulator.reset_async, self.seed + self.rows[i].episode)
        for i in self._busy(free):
            self.rows[i].observation = self._attempt(i, self.rows[i].simulator.reset_wait, self.timeout_s)
        begun = self._busy(free)
        if begun:
            self.policy.reset(begun)
            if hasattr(self.policy, "seed_rows"):
                self.policy.seed_rows(begun, [self.seed + self.rows[i].episode for i in begun])
        for i in begun:
            self._film(self.rows[i])

    def _busy(self, rows: Iterable[int]) -> list[int]:
        return [i for i in rows if self.rows[i].is_busy]

    def _step(self) -> None:
        """One action in every row that has an episode."""
        busy = self._busy(range(len(self.rows)))
        # Rows without an episode repeat an observation, so that the policy's batch keeps its rows.
        last = [row.observation or self.rows[busy[0]].observation for row in self.rows]
        space = self.rows[busy[0]].simulator.action_space
        actions = _actions(self.policy.select_action(_stack(last)), space, len(self.rows))
        looks = self.policy.needs_observation(len(self.rows))
        for i in busy:
            looked_at = bool(looks[i]) or self.rows[i].episode in self.filmed
            self._attempt(i, self.rows[i].simulator.step_async, actions[i], looked_at)
        for i in busy:
            row = self.rows[i]
            result = self._attempt(i, row.simulator.step_wait, self.timeout_s) if row.is_busy else None
            if result is not None:
                self._take(i, result)

    def _take(self, i: int, result: tuple[dict[str, Any], float, bool, bool, bool]) -> None:
        """What one step of row ``i`` led to: observation, reward, terminated, truncated, success."""
        row = self.rows[i]
        row.observation, reward, terminated, truncated, success = result
        row.steps += 1
        row.total += reward
        row.success |= success
        self._film(row)
        if terminated or truncated:
            self._finish(row, "success" if row.success else "failure")

    def _attempt(self, i: int, do: Callable, *args: Any) -> Any:
        """``do(*args)``; None when the simulator is lost, which frees the row.

        A row's first simulator must come up; for one that replaces it, not to is an incident like others.
        """
        row = self.rows[i]
        try:
            return do(*args)
        except SimulatorFailure as failure:
            if not row.has_worked:
                raise _cannot_be_built(failure) from failure
            rebuilding = not row.is_built
            if self.record.add_incident(row.episode, self.seed + row.episode, failure, rebuilding) < ATTEMPTS:
                self.waiting.appendleft(row.episode)
                row.episode = None
            else:
                self._finish(row, "timeout" if failure.kind == "timeout" else "crashed")
            return None

    def _finish(self, row: Row, outcome: str) -> None:
        entry = self._entry(row, outcome)
        if row.frames:
            entry["video"] = self.record.add_video(row.episode, row.frames, self.video)
        self.record.add_episode(entry)
        row.episode = None

    def _entry(self, row: Row, outcome: str) -> dict[str, Any]:
        """The record of an episode that has ended."""
        return {
            "index": row.episode,
            "seed": self.seed + row.episode,
            "success": outcome == "success",
            "steps": row.steps,
            "return": row.total,
            "outcome": outcome,
            "seconds": round(time.perf_counter() - row.began, 3),
        }

    def _film(self, row: Row) -> None:
        if row.episode not in self.filmed:
            return
        prefix = "observation.images."
        cameras = [k.removeprefix(prefix) for k in row.observation if k.startswith(prefix)]
        camera = self.video.camera or next(iter(cameras), None)
        if camera not in cameras:
            raise EvaluationError(
                f"no camera {camera!r} to film; the environment has: {', '.join(cameras) or 'none'}"
            )
        row.frames.append(np.array(row.observation[prefix + camera]).transpose(1, 2, 0))


def _cannot_be_built(failure: SimulatorFailure) -> EvaluationError:
    # These two are written for the user; anything else needs its traceback.
    is_plain = str(failure).startswith(("ImportError", "ValueError"))
    details = "" if is_plain else f"\n{failure.details}".rstrip()
    return EvaluationError(f"the environment cannot be built: {failure}{details}")


def _stack(observations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Unbatched observations as one batch: arrays (B, ...), strings in a list."""
    batch = {key: [o[key] for o in observations] for key in observations[0]}
    return {k: values if isinstance(values[0], str) else np.stack(values) for k, values in batch.items()}


def _actions(actions: Any, space: gymnasium.Space, rows: int) -> np.ndarray:
    """A policy's output, a tensor on any device or an array, as checked actions (B, A)."""
    if hasattr(actions, "detach"):
        actions = actions.detach().cpu()
    actions = np.asarray(actions, dtype=space.dtype)
    if actions.shape != (rows, *space.shape):
        raise EvaluationError(
            f"the policy gave actions {actions.shape}, the environment takes {(rows, *space.shape)}"
        )
    if not np.isfinite(actions).all():
        raise EvaluationError("the policy gave an action that is not finite")
    return actions
