"""Long-horizon evaluation: chains of instructions in one scene, logged by the line, resumable and sharded.

A chain is one episode: its tasks follow one another in the same scene until one fails. The environment gives
chain i on ``reset(seed=i)``, a reward of 1 at the step that solves a task (whose observation already holds
the next instruction, with pictures), and ends the episode after the last or the first failed task.

Every finished chain is one line of JSON in a log folder beside the result, on disk before the next begins:
a killed evaluation loses only the chains in progress. Chain i belongs to process ``i % processes``, so
processes need not talk to each other and may be killed, restarted or changed in number between two starts.
Needs numpy, and gymnasium when an evaluation runs; no torch.
"""

import contextlib
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from vilma.extras import require

from .evaluation import EvaluationError, RolloutPolicy, Video, write_video

if TYPE_CHECKING:
    import gymnasium

    from .workers import SimulatorFailure

__all__ = ["ChainLog", "bootstrap", "evaluate_chains", "log_folder", "summarize_chains"]

RESAMPLES = 10_000


def bootstrap(lengths: Sequence[int], tasks: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Percentile bootstrap over chains (B. Efron 1979, Ann. Statist. 7): 95 % intervals.

    Args:
        lengths: how many tasks each chain solved in a row, 0 to ``tasks``.

    Returns:
        ``success``: for 1 to ``tasks`` in a row, the (low, high) of the share of chains that reach it;
        ``mean_length``: (low, high). Always the same for the same lengths.
    """
    counts = np.bincount(np.asarray(lengths, dtype=int), minlength=tasks + 1)
    if len(counts) > tasks + 1:
        raise ValueError(f"a chain of {tasks} tasks cannot have solved {max(lengths)}")
    # A resample of N chains is a draw of how many of them have each length.
    drawn = np.random.default_rng(0).multinomial(len(lengths), counts / len(lengths), size=resamples)
    reached = drawn[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:] / len(lengths)
    low, high = np.quantile(reached, (0.025, 0.975), axis=0)
    mean = np.quantile(reached.sum(axis=1), (0.025, 0.975))
    return {
        "success": [list(pair) for pair in zip(low.tolist(), high.tolist())],
        "mean_length": mean.tolist(),
    }


def summarize_chains(
    chains: Sequence[Mapping[str, Any]], incidents: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The figures of finished chains. One that was lost to crashes or time-outs counts as length 0.

    ``success``: a rate with its ``interval`` for 1, 2, ... tasks in a row; ``mean_length`` likewise;
    ``tasks``: how often each task was tried and solved; ``steps``: mean control steps of a solved task.
    """
    summary: dict[str, Any] = {"chains": len(chains), "success": [], "mean_length": None}
    if chains:
        lengths = [chain["solved"] for chain in chains]
        tasks = max(len(chain["tasks"]) for chain in chains)
        intervals = bootstrap(lengths, tasks)
        for number in range(1, tasks + 1):
            rate = sum(length >= number for length in lengths) / len(lengths)
            summary["success"].append({"rate": rate, "interval": intervals["success"][number - 1]})
        summary["mean_length"] = {
            "value": float(np.mean(lengths)),
            "interval": intervals["mean_length"],
        }
    tried, solved, steps = Counter(), Counter(), []
    for chain in chains:
        if chain["outcome"] == "finished":
            tried.update(chain["tasks"][: chain["solved"] + 1])
            solved.update(chain["tasks"][: chain["solved"]])
            steps += chain["steps"][: chain["solved"]]
    summary["tasks"] = {task: {"tried": tried[task], "solved": solved[task]} for task in sorted(tried)}
    summary["steps"] = float(np.mean(steps)) if steps else None
    summary["lost"] = [chain["index"] for chain in chains if chain["outcome"] != "finished"]
    for kind, name in (("crash", "crashes"), ("timeout", "timeouts")):
        summary[name] = sum(incident["kind"] == kind for incident in incidents)
    summary["seconds"] = round(sum(chain["seconds"] for chain in chains), 1)
    return summary


def log_folder(result_path: str | Path) -> Path:
    """Where the lines of the evaluation with this result file are."""
    result_path = Path(result_path)
    return result_path.with_name(f"{result_path.stem}.chains")


class ChainLog:
    """The finished chains of an evaluation: one file of lines for each process, each whole or not there.

    Args:
        result_path: the result file; the log lies beside it.
        description: what is evaluated, JSON values; a log of something else is an error.
        process: which one this is; its file is locked while the log is open.
    """

    def __init__(self, result_path: str | Path, description: Mapping[str, Any], process: int = 0):
        self.result_path, self.process = Path(result_path), process
        self.folder = log_folder(result_path)
        self.description = json.loads(json.dumps(description))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"process-{process}.jsonl"
        self._file = self.path.open("ab+")
        try:
            _lock(self._file, self.path)
            self._cut_torn_line()
            self.chains, self.incidents = self.read()
            if self._file.tell() == 0:
                self._write({"description": self.description})
        except BaseException:
            self._file.close()
            raise

    def _cut_torn_line(self) -> None:
        """Drop a line that a kill cut off in the middle."""
        self._file.seek(0)
        text = self._file.read()
        self._file.truncate(text.rfind(b"\n") + 1)
        self._file.seek(0, os.SEEK_END)

    def read(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """All finished chains, by index, and all incidents, of every process; others may still be writing."""
        chains: dict[int, dict[str, Any]] = {}
        incidents: list[dict[str, Any]] = []
        for path in sorted(self.folder.glob("process-*.jsonl")):
            for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
                if not line.endswith("\n"):
                    continue
                try:
                    (kind, entry) = next(iter(json.loads(line).items()))
                except (ValueError, AttributeError, StopIteration) as error:
                    raise EvaluationError(
                        f"line {number} of {path} is damaged ({error}); remove that line, or the folder to "
                        "begin again"
                    ) from error
                if kind == "description":
                    self._check(path, entry)
                elif kind == "chain":
                    chains.setdefault(entry["index"], entry)
                else:
                    incidents.append(entry)
        return [chains[index] for index in sorted(chains)], incidents

    def _check(self, path: Path, had: Mapping[str, Any]) -> None:
        now = self.description
        different = [key for key in sorted({*had, *now}) if had.get(key) != now.get(key)]
        if different:
            changes = "; ".join(f"{key}: {had.get(key)!r} there, {now.get(key)!r} now" for key in different)
            raise EvaluationError(
                f"{path} is the log of another evaluation ({changes}). Give another result file, or "
                "overwrite it (--overwrite)"
            )

    def _write(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add_incident(
        self, episode: int, seed: int, failure: "SimulatorFailure", rebuilding: bool = False
    ) -> int:
        """How often this chain has been lost, this time included (see `vilma.evaluation.Record`)."""
        before = (i for i in self.incidents if i["chain"] == episode)
        attempt = 1 + sum(i["rebuilding"] == rebuilding for i in before)
        incident = {"chain": episode, "attempt": attempt, "kind": failure.kind, "error": str(failure)}
        incident |= {"rebuilding": rebuilding, "process": self.process}
        if failure.details:
            incident["traceback"] = failure.details
        self._write({"incident": incident})
        self.incidents.append(incident)
        return attempt

    def add_episode(self, entry: dict[str, Any]) -> None:
        """Put a finished chain on the disk."""
        self._write({"chain": entry})
        self.chains.append(entry)

    def add_video(self, episode: int, frames: Sequence[np.ndarray], video: Video) -> str:
        name = f"videos/{self.result_path.stem}_{episode:04d}.mp4"
        write_video(self.result_path.parent / name, frames, fps=video.fps, size=video.size)
        return name

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "ChainLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluate_chains(
    make_env: "Callable[[], gymnasium.Env]",
    policy: RolloutPolicy,
    *,
    chains: Sequence[Sequence[str]],
    result_path: str | Path,
    description: Mapping[str, Any] | None = None,
    seed: int = 0,
    workers: int = 1,
    process: int = 0,
    processes: int = 1,
    video: Video | None = None,
    timeout_s: float = 60.0,
    build_timeout_s: float = 300.0,
    overwrite: bool = False,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Run a policy on this process's share of the chains, and keep every finished one on the disk.

    The policy is reset at every task. A simulator that crashes or hangs is ended and named among the
    incidents; its chain is run once more, and the second time it is recorded as lost, with no task solved.
    The process that finds all chains finished writes the result file.

    Args:
        make_env: builds one simulator (see the module); called in worker processes.
        policy: rows are simulators.
        chains: the names of each chain's tasks; chain i starts with ``env.reset(seed=i)``.
        result_path: the JSON file of the whole; the log folder and ``videos/`` lie beside it.
        description: what is evaluated, JSON values. A log of something else is an error unless ``overwrite``.
        seed: added to a chain's number to seed the policy's noise.
        workers: simulators of this process.
        process, processes: chain i belongs to process ``i % processes``.
        video: the chains to film, by number; every second step, with its instruction.

    Returns:
        ``description``, ``planned``, ``summary``, ``incidents`` and ``chains``, of all processes so far;
        complete when ``planned`` chains are in it. A chain has index, tasks, solved, steps (of each task that
        was tried), outcome (finished, crashed or timeout), seconds and perhaps a video.
    """
    if workers < 1 or not 0 <= process < processes or not chains:
        raise ValueError(
            f"got {workers} workers, process {process} of {processes} and {len(chains)} chains, "
            "wanted at least one of each"
        )
    require("gymnasium", "robot")
    if video is not None and video.episodes:
        require("imageio_ffmpeg", "robot")
    result_path = Path(result_path)
    if overwrite:
        if processes > 1:
            raise EvaluationError(
                f"several processes cannot overwrite: remove {log_folder(result_path)} and start again"
            )
        remove_log(result_path)
    described = {**(description or {}), "seed": seed}

    with ChainLog(result_path, described, process) as log:

        def result() -> dict[str, Any]:
            return {
                "description": log.description,
                "planned": len(chains),
                "summary": summarize_chains(log.chains, log.incidents),
                "incidents": log.incidents,
                "chains": log.chains,
            }

        def tell() -> None:
            if on_progress is not None:
                on_progress(result())

        beyond = [chain["index"] for chain in log.chains if chain["index"] >= len(chains)]
        if beyond:
            raise EvaluationError(
                f"{log.folder} already has chain {max(beyond)}, but {len(chains)} are asked for: give "
                "another result file"
            )
        tell()
        finished = {chain["index"] for chain in log.chains}
        todo = [i for i in range(process, len(chains), processes) if i not in finished]
        if todo:
            from .chain_rollout import ChainRollout

            rollout = ChainRollout(
                make_env,
                min(workers, len(todo)),
                policy,
                chains=chains,
                noise_seed=seed,
                on_chain=tell,
                record=log,
                video=video,
                timeout_s=timeout_s,
                build_timeout_s=build_timeout_s,
            )
            try:
                rollout.run(todo)
            finally:
                rollout.close()
        log.chains, log.incidents = log.read()
        whole = result()
        if len(log.chains) == len(chains):
            _write_json(result_path, whole)
        return whole


def remove_log(result_path: str | Path) -> None:
    """Remove the log and the result file of an evaluation; videos stay until they are replaced.

    Raises EvaluationError, and removes nothing, while a process writes to the log.
    """
    folder = log_folder(result_path)
    with contextlib.ExitStack() as opened:
        paths = sorted(folder.glob("process-*.jsonl"))
        for path in paths:
            _lock(opened.enter_context(path.open("ab")), path)
        for path in paths:
            path.unlink()
    with contextlib.suppress(OSError):  # somebody else's file keeps the folder
        folder.rmdir()
    Path(result_path).unlink(missing_ok=True)


def _lock(file: IO[bytes], path: Path) -> None:
    """Until ``file`` is closed, nobody else may hold the log at ``path``."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EvaluationError(
            f"another process writes {path}: wait for that evaluation, or give another result file"
        ) from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all; several processes may find themselves the last one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with part.open("w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
