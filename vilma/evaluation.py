"""Closed-loop evaluation: seeded episodes in parallel simulators, success intervals, resumable result files.

Needs numpy, and gymnasium when an evaluation runs; no torch, so that it also runs beside a remote policy.
Episode ``i`` always starts from seed ``seed + i``: two policies meet the same episodes, and the number of
workers changes nothing. B is the number of workers, A the size of an action.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vilma.extras import require

if TYPE_CHECKING:
    import gymnasium

    from .workers import SimulatorFailure

__all__ = [
    "BlankedPolicy",
    "EvaluationError",
    "RolloutPolicy",
    "Video",
    "evaluate",
    "read_result",
    "summarize",
    "wilson_interval",
    "write_video",
]

Z_95 = 1.959963984540054


class EvaluationError(ValueError):
    """An evaluation that cannot start or go on: says why and what to do."""


class RolloutPolicy(Protocol):
    """What the runner asks of a policy. One row for each simulator; ``seed_rows`` is optional."""

    def select_action(self, obs: Mapping[str, Any]) -> Any:
        """The next actions (B, A) of all rows, from arrays (B, ...) and lists of B strings."""

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget everything about these rows (all of them when None): a new episode begins there."""

    def seed_rows(self, rows: Sequence[int], seeds: Sequence[int]) -> None:
        """Seed the rows' own sampling noise, so that an episode does not depend on the others."""

    def needs_observation(self, n: int) -> Sequence[bool]:
        """For each of n rows, whether the images of the next observation will be looked at."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Which episodes are filmed (H.264, playable in browsers), and how.

    Args:
        episodes: their indices. Filmed episodes render every step.
        camera: the camera to film; None for the first one of the observation.
        fps: control steps a second, for a film in real time.
        size: small frames are enlarged by a whole factor to about this many pixels.
    """

    episodes: tuple[int, ...] = (0, 1, 2, 3)
    camera: str | None = None
    fps: int = 20
    size: int = 336


class BlankedPolicy:
    """A policy that is shown zeros in place of some inputs: how much of its success is seen, not guessed?

    Args:
        policy: the policy underneath.
        inputs: "images", "depth" or both.
    """

    KINDS = ("images", "depth")

    def __init__(self, policy: RolloutPolicy, inputs: Sequence[str] = KINDS):
        unknown = sorted(set(inputs) - set(self.KINDS))
        if unknown or not inputs:
            raise ValueError(f"cannot blank {unknown or 'nothing'}; choose from {', '.join(self.KINDS)}")
        self.policy = policy
        self._prefixes = tuple(f"observation.{kind}." for kind in inputs)

    def select_action(self, obs: Mapping[str, Any]) -> Any:
        return self.policy.select_action(
            {k: np.zeros_like(v) if k.startswith(self._prefixes) else v for k, v in obs.items()}
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a success rate (E. B. Wilson 1927, JASA 22; z = 1.96 for 95 %)."""
    if not 0 <= successes <= trials:
        raise ValueError(f"got {successes} successes of {trials} trials")
    if trials == 0:
        return 0.0, 1.0
    rate, share = successes / trials, z * z / trials
    centre = (rate + share / 2) / (1 + share)
    margin = z / (1 + share) * np.sqrt(rate * (1 - rate) / trials + share / (4 * trials)).item()
    low = 0.0 if successes == 0 else centre - margin
    high = 1.0 if successes == trials else centre + margin
    return low, high


def summarize(
    episodes: Sequence[Mapping[str, Any]], incidents: Sequence[Mapping[str, Any]] = (), seconds: float = 0.0
) -> dict[str, Any]:
    """The figures of finished episodes; those lost to crashes and time-outs count as failures.

    ``crashes`` and ``timeouts`` count every incident, also those after which the episode was run again;
    ``lost`` counts the episodes that they ended for good. Mean steps leave those out.
    """
    successes = sum(bool(e["success"]) for e in episodes)
    played = [e["steps"] for e in episodes if e["outcome"] in ("success", "failure")]
    won = [e["steps"] for e in episodes if e["success"]]
    return {
        "successes": successes,
        "episodes": len(episodes),
        "rate": successes / len(episodes) if episodes else None,
        "wilson95": list(wilson_interval(successes, len(episodes))),
        "mean_steps": float(np.mean(played)) if played else None,
        "mean_steps_success": float(np.mean(won)) if won else None,
        "crashes": sum(i["kind"] == "crash" for i in incidents),
        "timeouts": sum(i["kind"] == "timeout" for i in incidents),
        "lost": len(episodes) - len(played),
        "seconds": round(seconds, 3),
    }


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file: description, planned, summary, incidents and episodes."""
    path = Path(path)
    try:
        result = json.loads(path.read_text())
        missing = {"description", "summary", "incidents", "episodes"} - set(result)
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"{path} is not a result file ({error}); remove it or overwrite it") from error
    if missing:
        raise EvaluationError(f"{path} is not a result file: it lacks {', '.join(sorted(missing))}")
    return result


def evaluate(
    make_env: "Callable[[], gymnasium.Env]",
    policy: RolloutPolicy,
    *,
    episodes: int,
    seed: int,
    workers: int = 1,
    result_path: str | Path,
    description: Mapping[str, Any] | None = None,
    video: Video | None = None,
    timeout_s: float = 60.0,
    build_timeout_s: float = 300.0,
    overwrite: bool = False,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run a policy for a number of seeded episodes and keep the result in a file.

    The file is written after every episode, so an interrupted evaluation goes on with the missing ones and a
    finished one is only read. Simulators that crash or do not answer are ended and named in the result's
    incidents; their episode is run once more, and the second time it is recorded as lost, a failure. Likewise
    when a simulator that replaces a lost one does not start; the first ones must.

    Simulators run in processes that a fork server starts and that import the calling script: a script must
    call this below ``if __name__ == "__main__":``.

    Args:
        make_env: builds one simulator; called in worker processes, so it must be picklable.
        policy: rows are simulators; see :class:`RolloutPolicy`.
        episodes: how many; episode i starts with ``env.reset(seed=seed + i)``.
        workers: simulators in parallel.
        result_path: the JSON file; films go to ``videos/`` beside it.
        description: what is evaluated, JSON values. A file with another one is an error unless ``overwrite``.
        timeout_s: for one reset or one step.
        build_timeout_s: for starting a simulator.
        on_progress: called with the result at the start and after every episode.

    Returns:
        The content of the file. An episode has index, seed, success, steps, return, seconds, and outcome:
        success, failure, crashed or timeout.

    Raises:
        EvaluationError: the file belongs to another evaluation, the simulator cannot be built, or the
            policy's actions do not fit it.
    """
    if episodes < 1 or workers < 1:
        raise ValueError(f"got {episodes} episodes and {workers} workers, wanted at least 1 of each")
    require("gymnasium", "robot")
    if video is not None:
        require("imageio_ffmpeg", "robot")
    record = Record(Path(result_path), {**(description or {}), "seed": seed}, overwrite, on_progress)
    record.plan(episodes)
    todo = [i for i in range(episodes) if i not in record.finished]
    if todo:
        from .rollout import Rollout

        rollout = Rollout(
            make_env,
            min(workers, len(todo)),
            policy,
            seed=seed,
            record=record,
            video=video,
            timeout_s=timeout_s,
            build_timeout_s=build_timeout_s,
        )
        try:
            rollout.run(todo)
        finally:
            rollout.close()
    return record.result


class Record:
    """The result file: opened or begun, and whole on disk after every episode."""

    def __init__(self, path: Path, description: dict, overwrite: bool, on_progress: Callable | None):
        self.path, self.on_progress = path, on_progress
        description = json.loads(json.dumps(description))
        self.result = {
            "description": description,
            "planned": 0,
            "summary": summarize([]),
            "incidents": [],
            "episodes": [],
        }
        if path.exists() and not overwrite:
            self.result = read_result(path)
            self._check(description)
        self._spent = self.result["summary"]["seconds"]
        self._began = time.perf_counter()

    def _check(self, description: dict) -> None:
        had = self.result["description"]
        different = [k for k in sorted({*had, *description}) if had.get(k) != description.get(k)]
        if different:
            changes = "; ".join(f"{k}: {had.get(k)!r} there, {description.get(k)!r} now" for k in different)
            raise EvaluationError(
                f"{self.path} holds the result of another evaluation ({changes}). "
                "Give another file, or overwrite it (--overwrite)"
            )

    @property
    def finished(self) -> set[int]:
        return {e["index"] for e in self.result["episodes"]}

    def plan(self, episodes: int) -> None:
        self.result["planned"] = max(episodes, self.result["planned"])
        self._tell()

    def add_incident(
        self, episode: int, seed: int, failure: "SimulatorFailure", rebuilding: bool = False
    ) -> int:
        """How often this episode has been lost, this time included.

        When no simulator came up for it (``rebuilding``) it was not played; that is counted separately.
        """
        before = (i for i in self.result["incidents"] if i["episode"] == episode)
        attempt = 1 + sum(i.get("rebuilding", False) == rebuilding for i in before)
        incident = {
            "episode": episode,
            "seed": seed,
            "attempt": attempt,
            "kind": failure.kind,
            "error": str(failure),
        }
        if rebuilding:
            incident["rebuilding"] = True
        if failure.details:
            incident["traceback"] = failure.details
        self.result["incidents"].append(incident)
        self.write()
        return attempt

    def add_episode(self, entry: dict[str, Any]) -> None:
        self.result["episodes"] = sorted([*self.result["episodes"], entry], key=lambda e: e["index"])
        self.write()
        self._tell()

    def add_video(self, episode: int, frames: Sequence[np.ndarray], video: Video) -> str:
        name = f"videos/{self.path.stem}_{episode:04d}.mp4"
        write_video(self.path.parent / name, frames, fps=video.fps, size=video.size)
        return name

    def write(self) -> None:
        seconds = self._spent + time.perf_counter() - self._began
        self.result["summary"] = summarize(self.result["episodes"], self.result["incidents"], seconds)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            with part.open("w") as file:
                json.dump(self.result, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)

    def _tell(self) -> None:
        if self.on_progress is not None:
            self.on_progress(self.result)


def write_video(path: str | Path, frames: Sequence[np.ndarray], *, fps: int = 20, size: int = 336) -> None:
    """Frames (H, W, 3) uint8 as an H.264 mp4 that browsers play; whole or not there at all."""
    ffmpeg = require("imageio_ffmpeg", "robot")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    factor = max(1, round(size / max(height, width)))
    # Chroma is stored at half the resolution: both sides must be even.
    padding = ((0, height * factor % 2), (0, width * factor % 2), (0, 0))
    large = (np.pad(f.repeat(factor, 0).repeat(factor, 1), padding, mode="edge") for f in frames)
    part = path.with_name(f".part_{path.name}")
    writer = ffmpeg.write_frames(
        str(part),
        (width * factor + padding[1][1], height * factor + padding[0][1]),
        fps=fps,
        codec="libx264",
        quality=None,
        macro_block_size=2,
        output_params=["-crf", "23", "-movflags", "+faststart", "-threads", "1"],
    )
    try:
        writer.send(None)
        for frame in large:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
