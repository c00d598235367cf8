"""Collect scripted-expert demonstrations in a robosuite simulator into one robomimic HDF5 file."""

import argparse
import collections
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from vilma import config
from vilma.datasets import robomimic_writer as robomimic
from vilma.envs import find_task
from vilma.report import record_time

__all__ = ["Request", "Summary", "collect", "main"]

# An episode whose expert fails this often, or that kills this many workers, is not bad luck.
_MAX_ATTEMPTS, _MAX_CRASHES = 25, 3


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for. It decides the episodes, so a file is reused only for an equal request.

    ``environment``: further options of the simulator, by name.
    """

    task: str
    demos: int
    cameras: tuple[str, ...]
    size: int = 84
    placement: float | None = None
    seed: int = 0
    noise: float = 0.4
    perturbed: float = 2 / 3
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.demos < 1:
            raise ValueError(f"got --demos {self.demos}, wanted at least 1")
        if not 0 <= self.noise <= 2:
            raise ValueError(f"got --noise {self.noise}, wanted 0 to 2 (1 is a full command)")
        if not 0 <= self.perturbed <= 1:
            raise ValueError(f"got --perturbed {self.perturbed}, wanted a share from 0 to 1")
        fixed = sorted({"cameras", "size", "seed", "placement"} & set(self.environment))
        if fixed:
            raise ValueError(f"got --env.{fixed[0]}, wanted --{fixed[0]}: a data set has one")

    def text(self) -> str:
        """The request as it is stored in the file."""
        values = dataclasses.asdict(self)
        if not self.environment:
            del values["environment"]  # as files from before there were any
        return json.dumps(values, sort_keys=True)

    def env_options(self) -> dict[str, Any]:
        """What the simulator is built with, besides cameras, size and seed."""
        return {**self.environment, **({} if self.placement is None else {"placement": self.placement})}

    def start(self, index: int) -> str:
        """How episode ``index`` begins: shares are met evenly along the indices, in any order of the work."""
        position = (index * 0.6180339887) % 1.0
        if position < 1.0 - self.perturbed:
            return "plain"
        return "missed" if position < 1.0 - self.perturbed / 2 else "moved"

    def episode_seed(self, index: int, attempt: int) -> int:
        import numpy as np

        return int(np.random.SeedSequence([self.seed, index, attempt]).generate_state(1)[0])


@dataclasses.dataclass
class Summary:
    """What a run did: episodes and frames it recorded itself, and what went wrong on the way."""

    path: Path
    recorded: int = 0
    frames: int = 0
    attempts: int = 0
    seconds: float = 0.0
    reused: int = 0
    crashes: list[str] = dataclasses.field(default_factory=list)


def collect(
    request: Request,
    path: str | Path,
    workers: int = 2,
    report: Callable[[Summary], None] = lambda summary: None,
) -> Summary:
    """Record ``request.demos`` successful episodes into ``path``, one simulator a worker process.

    Finished episodes of an interrupted run with the same request are kept. An episode depends on the request
    and its index alone, never on the number of workers. ``report`` is called after every episode or crash.

    Raises:
        ValueError: ``path`` holds another request's demonstrations, or the expert fails again and again.
        OSError: the disk is full, or simulators were lost to one episode again and again. Finished episodes
            are kept.
    """
    if workers < 1:
        raise ValueError(f"got --workers {workers}, wanted at least 1")
    path, asked = Path(path), request.text()
    if _is_complete(path, request, asked):
        robomimic.remove_parts(path)
        return Summary(path, reused=request.demos)
    finished = robomimic.finished_parts(path, asked)
    summary = Summary(path, reused=len(finished))
    missing = [index for index in range(request.demos) if index not in finished]
    if missing:
        _record_all(request, path, missing, workers, summary, report)
    _merge(request, path, asked)
    return summary


def _is_complete(path: Path, request: Request, asked: str) -> bool:
    if not path.exists():
        return False
    found = robomimic.file_attributes(path)
    if found is None:
        raise ValueError(f"{path} exists but is not a readable HDF5 data set; remove it or write elsewhere")
    if found.get("request") != asked:
        there = found.get("request", "not collected by this command")
        raise ValueError(
            f"{path} holds other demonstrations:\n  there:  {there}\n  wanted: {asked}\n"
            "Give another --out, or remove the file."
        )
    return found["num_demos"] == request.demos


def _merge(request: Request, path: Path, asked: str) -> None:
    from importlib.metadata import version

    task = find_task(request.task)
    env_kwargs = {
        "robots": "Panda",
        "control_freq": task.control_freq,
        "camera_names": list(request.cameras),
        "camera_heights": request.size,
        "camera_widths": request.size,
        "camera_depths": True,
        "use_camera_obs": True,
        "has_offscreen_renderer": True,
        "has_renderer": False,
        "ignore_done": True,
        "reward_shaping": False,
        "controller_configs": _controllers(),
    }
    robomimic.merge(
        path,
        env_args={
            "env_name": task.name.split("/")[1],
            "env_version": version("robosuite"),
            "type": 1,
            "env_kwargs": env_kwargs,
        },
        attributes={
            "reference_frame": task.reference_frame,
            "action_kind": task.action_kind,
            "task": task.instruction,
            "control_freq": task.control_freq,
            "request": asked,
        },
    )


def _controllers() -> dict[str, Any]:
    from vilma.envs.robosuite import controller_config

    return controller_config()


class _Worker:
    """A simulator process and the episode that it is busy with."""

    def __init__(self, request: Request, path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, request, path), daemon=True)
        self.process.start()
        theirs.close()
        self.index: int | None = None

    def give(self, index: int) -> None:
        self.index = index
        with contextlib.suppress(OSError):  # a dead worker is noticed when its answer is awaited
            self.connection.send(index)

    def answer(self) -> Any:
        """What the episode came to: its counts, the error that ends the run, or how the worker was lost."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            if code is not None and code < 0:
                return _Lost(f"ended by {signal.Signals(-code).name}")
            return _Lost(f"ended with exit code {code}")

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(10)


class _Lost(Exception):
    """A worker that cannot go on, while another one could."""


def _record_all(
    request: Request,
    path: Path,
    missing: list[int],
    workers: int,
    summary: Summary,
    report: Callable[[Summary], None],
) -> None:
    began = time.monotonic()
    waiting, crashes = collections.deque(missing), collections.Counter[int]()
    crew = [_Worker(request, path) for _ in range(min(workers, len(missing)))]
    try:
        for worker in crew:
            worker.give(waiting.popleft())
        while any(worker.index is not None for worker in crew):
            ready = wait([worker.connection for worker in crew if worker.index is not None])
            for worker in [w for w in crew if w.connection in ready]:
                message = worker.answer()
                if isinstance(message, _Lost):
                    worker.stop()
                    crashes[worker.index] += 1
                    summary.crashes.append(f"episode {worker.index}: {message}")
                    if crashes[worker.index] >= _MAX_CRASHES:
                        raise ChildProcessError(
                            f"{_MAX_CRASHES} simulators were lost to one episode; the last was {message} "
                            f"(episode {worker.index}). Finished episodes are kept"
                        )
                    waiting.appendleft(worker.index)
                    crew[crew.index(worker)] = worker = _Worker(request, path)
                elif isinstance(message, Exception):
                    raise message
                else:
                    summary.recorded += 1
                    summary.frames += message["frames"]
                    summary.attempts += message["attempts"]
                    worker.index = None
                if waiting:
                    worker.give(waiting.popleft())
                summary.seconds = time.monotonic() - began
                report(summary)
    finally:
        for worker in crew:
            worker.stop()


def _work(connection: Connection, request: Request, path: Path) -> None:
    """One process: a simulator that records the episodes it is given until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from vilma.envs import make
        from vilma.envs.experts import expert

        env = make(
            request.task,
            cameras=request.cameras,
            size=request.size,
            seed=request.seed,
            **request.env_options(),
        )
        demonstrator = expert(request.task, env)
        while True:
            index = connection.recv()
            connection.send(_record(request, path, index, env, demonstrator))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        connection.send(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """An error that survives the way to the parent, whatever its own class needs to be built."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror)
    kind = next((kind for kind in (OSError, ValueError, ImportError) if isinstance(error, kind)), None)
    return kind(str(error)) if kind else _Lost(f"stopped by {type(error).__name__}: {error}")


def _record(request: Request, path: Path, index: int, env: Any, demonstrator: Any) -> dict[str, int]:
    from vilma.envs.experts import record_episode

    start = request.start(index)
    for attempt in range(_MAX_ATTEMPTS):
        seed = request.episode_seed(index, attempt)
        episode = record_episode(env, demonstrator, seed, start, request.noise)
        if episode is not None:
            break
    else:
        raise ValueError(
            f"episode {index} ({start} start): the expert failed {_MAX_ATTEMPTS} times; lower --noise"
        )
    robomimic.write_part(
        path,
        index,
        **episode,
        model_file=env.model_xml(),
        attributes={
            "request": request.text(),
            "ep_meta": {"lang": find_task(request.task).instruction},
            "seed": seed,
            "start": start,
        },
    )
    return {"frames": len(episode["actions"]), "attempts": attempt + 1}


def main(arguments: Sequence[str] | None = None) -> int:
    started, arguments = time.perf_counter(), list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="vilma collect-robosuite",
        description=__doc__,
        epilog="Further options of the environment: --env.NAME VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--task", default="Lift", help="Lift, Stack or PickPlaceCan")
    parser.add_argument("--demos", type=int, default=100, help="successful episodes to keep")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="the HDF5 file to write")
    where.add_argument(
        "--run", type=Path, help="a run directory: writes RUN/demos.hdf5, its report shows the time"
    )
    parser.add_argument("--cameras", nargs="+", help="default: the task's own")
    parser.add_argument("--size", type=int, default=84, help="pixels, height and width")
    parser.add_argument("--placement", type=float, help="half width in metres of the area of the objects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.4, help="largest noise on the executed commands")
    parser.add_argument("--perturbed", type=float, default=2 / 3, help="share of starts off the rest pose")
    parser.add_argument(
        "--workers", type=int, default=min(2, os.cpu_count() or 1), help="simulator processes"
    )
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("--") and not word.startswith("--env.")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    environment = dict(config.override({}, rest).get("env", {}))
    if "placement" in environment and options.placement is None:
        options.placement = float(environment.pop("placement"))
    out = options.out or options.run / "demos.hdf5"

    task = find_task(options.task if "/" in options.task else f"robosuite/{options.task}")
    request = Request(
        task=task.name,
        demos=options.demos,
        cameras=tuple(options.cameras or task.cameras),
        size=options.size,
        placement=options.placement,
        seed=options.seed,
        noise=options.noise,
        perturbed=options.perturbed,
        environment=environment,
    )
    summary = _with_progress(request, out, options.workers)
    for crash in summary.crashes:
        print(f"redone: {crash}", file=sys.stderr)
    if not summary.recorded:
        print(f"already complete: {summary.path} ({summary.reused} demonstrations)")
        return 0
    if options.run:
        command = shlex.join(["vilma", "collect-robosuite", *arguments])
        record_time(options.run, "collect", time.perf_counter() - started, command)
    kept = f" ({summary.reused} from an earlier run)" if summary.reused else ""
    print(
        f"{summary.path}: {request.demos} demonstrations{kept}; recorded {summary.recorded} "
        f"({summary.frames} frames, {summary.attempts} attempts) in {summary.seconds:.1f} s: "
        f"{summary.frames / summary.seconds:.1f} frames/s, "
        f"{60 * summary.recorded / summary.seconds:.1f} demonstrations a minute"
    )
    return 0


def _with_progress(request: Request, path: Path, workers: int) -> Summary:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("collecting {task.fields[name]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=request.demos, name=request.task, rate="starting simulators")
        printed = 0.0

        def report(summary: Summary) -> None:
            nonlocal printed
            done = summary.reused + summary.recorded
            rate = f"{summary.frames / max(summary.seconds, 1e-9):.1f} frames/s"
            progress.update(bar, completed=done, rate=rate)
            if not console.is_terminal and summary.seconds - printed > 15:
                printed = summary.seconds
                left = summary.seconds / max(summary.recorded, 1) * (request.demos - done)
                console.print(f"{done}/{request.demos} demonstrations, {rate}, about {left:.0f} s left")

        return collect(request, path, workers, report)


if __name__ == "__main__":
    raise SystemExit(main())
