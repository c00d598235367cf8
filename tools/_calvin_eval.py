"""Evaluate a policy on CALVIN: chains of five instructions, success at 1 to 5 in a row, mean length.

1000 chains, 360 steps for each instruction, CALVIN's own oracle. Several processes (torchrun, or RANK and
WORLD_SIZE in the environment) share the chains; started again after a kill, each does its missing ones.
"""

import argparse
import functools
import hashlib
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vilma import config, envs
from vilma.chains import evaluate_chains, log_folder
from vilma.envs import calvin_protocol as protocol
from vilma.evaluation import BlankedPolicy, Video
from vilma.report import record_time
from vilma.tools import eval as rollouts

NATIVE = {"static": (200, 200), "gripper": (84, 84)}
# Where calvin_env lies is no part of what is evaluated.
UNNAMED = ("source",)


def main(arguments: Sequence[str]) -> int:
    options, rest = _parser().parse_known_args(arguments)
    rollouts.check_options(options, rest)
    if options.task == "calvin":
        raise ValueError("calvin is four scenes: give one of them, e.g. calvin/D, the protocol's")
    task = envs.find_task(options.task)
    env_options = dict(config.override({}, rest).get("env", {}))
    blank = tuple(options.blank.split(",")) if options.blank else ()
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if options.device is None and "LOCAL_RANK" in os.environ:
        options.device = _local_device()

    done: dict[str, str] = {}
    labels = checkpoints(options.run, options.checkpoint)
    for label in labels:
        options.checkpoint = label
        began = time.perf_counter()
        with rollouts.open_policy(options) as source:
            weights = source.facts["policy"].get("checkpoint")
            if weights in done:
                print(f"{source.label} is the same checkpoint as {done[weights]}: its result counts for both")
                continue
            done[weights] = source.label
            path = options.out or result_path(task.name, source, env_options, options)
            if options.out and label != labels[0]:
                path = path.with_stem(f"{path.stem}_{label}")
            result, played = _evaluate(task, source, blank, env_options, path, rank, processes, options)
        if played and source.run_dir is not None and options.out is None and rank == 0:
            command = shlex.join(["vilma", "eval", *arguments])
            record_time(source.run_dir, f"evaluate {path.stem}", time.perf_counter() - began, command)
        films = film_numbers(options.films, options.videos, result["planned"])
        tell(result, f"{task.name}, checkpoint {source.label}", path, reused=not played, films=films)
    return 0


def _evaluate(
    task: envs.Task,
    source: rollouts.Source,
    blank: Sequence[str],
    env_options: Mapping[str, Any],
    path: Path,
    rank: int,
    processes: int,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], int]:
    """The result, and how many chains this process played for it."""
    from vilma.envs.calvin import resolve_renderer

    facts, policy = source.facts, source.policy
    policy.check_compatible(
        {"reference_frame": task.reference_frame, "action_kind": task.action_kind, "state_dim": 15},
        name=task.name,
    )
    if facts["state_keys"] not in (None, ["robot_obs"]) and "observation.state" in facts["observation_keys"]:
        raise ValueError(
            f"the policy's state is made of {facts['state_keys']}; CALVIN's evaluation gives robot_obs"
        )
    cameras = tuple(facts["cameras"])
    size = picture_size(facts["image_size"])
    renderer = resolve_renderer(env_options.get("renderer", "auto"))
    whole = protocol.load_chains(env_options["chains"]) if "chains" in env_options else protocol.chains()
    chains = whole[: options.sequences] if "chains" in env_options else protocol.chains(options.sequences)
    named = {key: value for key, value in env_options.items() if key not in (*UNNAMED, "chains")}
    description = {
        "environment": {
            "name": task.name,
            "cameras": list(cameras),
            "size": size,
            "subtask_steps": protocol.SUBTASK_STEPS,
            **named,
            "renderer": renderer,
            "chains": chains_hash(whole),
        },
        "policy": facts["policy"],
        "blank": list(blank),
        "versions": rollouts._versions("vilma", "pybullet"),
    }
    films = film_numbers(options.films, options.videos, len(chains))
    make_env = functools.partial(envs.make, task.name, cameras=cameras, size=size, **env_options)
    progress = _Progress(f"{task.name} {source.label}" + (f" process {rank}" if processes > 1 else ""))
    with progress:
        result = evaluate_chains(
            make_env,
            BlankedPolicy(policy, blank) if blank else policy,
            chains=[chain.tasks for chain in chains],
            result_path=path,
            description=description,
            seed=options.seed,
            workers=options.workers,
            process=rank,
            processes=processes,
            video=Video(films, camera="static", fps=task.control_freq // 2) if films else None,
            timeout_s=options.timeout,
            overwrite=options.overwrite,
            on_progress=progress.show,
        )
    return result, progress.played


def film_numbers(chosen: str | None, first: int, count: int) -> tuple[int, ...]:
    """The chains to film: those chosen, by commas, and the first so many."""
    try:
        numbers = {int(number) for number in chosen.split(",")} if chosen else set()
    except ValueError:
        raise ValueError(f"--films is {chosen!r}, wanted numbers of chains such as 0,7,31") from None
    unknown = sorted(number for number in numbers if not 0 <= number < count)
    if unknown:
        raise ValueError(f"--films names chain {unknown[0]}, there are 0 to {count - 1}")
    return tuple(sorted(numbers | set(range(min(first, count)))))


def checkpoints(run: str, asked: str) -> list[str]:
    """The checkpoints of a run directory to evaluate: of those asked for, those that it has."""
    names = [name for name in asked.split(",") if name]
    folder = Path(run) / "checkpoints"
    if not folder.is_dir():
        return names[:1]  # a lone policy, or a served one
    there = [name for name in names if (folder / name).is_dir()]
    for name in names:
        if there and name not in there:
            print(f"{run} has no checkpoint {name!r}: only {', '.join(there)} is evaluated", file=sys.stderr)
    return there or names[:1]


def picture_size(expected: Mapping[str, Sequence[int]]) -> int | None:
    """The side of the pictures that a policy expects; None for CALVIN's own sizes."""
    sizes = {camera: tuple(size) for camera, size in expected.items()}
    if all(size == NATIVE.get(camera) for camera, size in sizes.items()):
        return None
    return rollouts.image_size(expected, None)


def chains_hash(chains: Sequence[protocol.Chain]) -> str:
    """Eight hex digits of all chains there are, so that more of them can be played later."""
    return hashlib.sha256(repr(chains).encode()).hexdigest()[:8]


def result_path(
    task: str, source: rollouts.Source, env_options: Mapping[str, Any], options: argparse.Namespace
) -> Path:
    parts = [task.replace("/", "_")]
    parts += [f"{k}-{Path(str(v)).stem}" for k, v in sorted(env_options.items()) if k not in UNNAMED]
    parts += [f"seed-{options.seed}"] if options.seed else []
    parts += [source.label] if source.label != "last" else []
    parts += ["blank-" + "-".join(options.blank.split(","))] if options.blank else []
    folder = Path("eval") if source.run_dir is None else source.run_dir / "eval"
    return folder / (re.sub(r"[^\w.\-]+", "-", "_".join(parts)) + ".json")


def _local_device() -> str | None:
    import torch

    return f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else None


def tell(result: Mapping[str, Any], name: str, path: Path, reused: bool, films: Sequence[int] = ()) -> None:
    """Print the figures; what a lab puts into its table."""
    summary, planned = result["summary"], result["planned"]
    if summary["chains"] < planned:
        print(
            f"{name}: this process is done ({summary['chains']} of {planned} chains are); "
            f"the last one writes {path}"
        )
        return
    print(f"{name}: {planned} chains")
    for number, entry in enumerate(summary["success"], start=1):
        low, high = entry["interval"]
        print(f"  {number} in a row: {entry['rate']:6.1%}   (95 % interval {low:.1%} to {high:.1%})")
    low, high = summary["mean_length"]["interval"]
    print(f"  mean length: {summary['mean_length']['value']:.3f}   (95 % interval {low:.3f} to {high:.3f})")
    for incident in result["incidents"]:
        print(
            f"  {incident['kind']} in chain {incident['chain']} (attempt {incident['attempt']}): "
            f"{incident['error']}"
        )
    if summary["lost"]:
        print(f"  lost to that, counted as length 0: chains {', '.join(map(str, summary['lost']))}")
    entries = [result["chains"][number] for number in films]
    unfilmed = [e["index"] for e in entries if "video" not in e and e["outcome"] == "finished"]
    if unfilmed:
        print(
            f"  not filmed, since they were played before: chains {', '.join(map(str, unfilmed))}; films "
            "come with --overwrite or another --out"
        )
    print(f"  {'reused' if reused else 'written to'} {path}; a line for each chain in {log_folder(path)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilma eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Options of the environment: --env.NAME VALUE, e.g. --env.renderer egl, --env.source DIR "
        "(the clone of calvin_env).",
        allow_abbrev=False,
    )
    parser.add_argument("task", metavar="calvin/SCENE", help="the scene: A, B, C or D")
    parser.add_argument("run", metavar="RUN", help="a run directory, a checkpoint, a lone policy, host:port")
    parser.add_argument("--sequences", type=int, default=protocol.CHAINS, help="the first so many chains")
    parser.add_argument(
        "--checkpoint", default="last,best", metavar="NAMES", help="which of a run directory, by commas"
    )
    parser.add_argument("--workers", type=int, default=2, help="simulators of one process")
    parser.add_argument("--seed", type=int, default=0, help="of the policy's noise")
    parser.add_argument("--films", metavar="0,7", help="film these chains")
    parser.add_argument("--videos", type=int, default=0, metavar="N", help="film the first N chains")
    parser.add_argument("--blank", metavar="images,depth", help="show the policy zeros in place of these")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one step of a simulator")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", help="default: the process's own GPU if there is one")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: RUN/eval/calvin_<scene>....json; of a second checkpoint FILE_<its name>",
    )
    parser.add_argument("--overwrite", action="store_true", help="forget a former result and its log")
    return parser


class _Progress:
    """A bar on a terminal, else a line now and then; with the mean length so far."""

    def __init__(self, name: str, interval_s: float = 30.0):
        self.name, self.interval_s = name, interval_s
        self.played = 0
        self._first: int | None = None
        self._printed = self._began = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar.start()
            self._row = self._bar.add_task(self.name, total=None, text="starting simulators")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, result: Mapping[str, Any]) -> None:
        summary = result["summary"]
        self._first = summary["chains"] if self._first is None else self._first
        self.played = summary["chains"] - self._first
        text = "starting simulators"
        if self.played:
            minutes = (time.monotonic() - self._began) / 60
            length = summary["mean_length"]["value"]
            text = f"mean length {length:.2f}  {self.played / minutes:.1f} chains/min"
            text += f"  {len(summary['lost'])} lost" if summary["lost"] else ""
        if self._bar is not None:
            self._bar.update(self._row, completed=summary["chains"], total=result["planned"], text=text)
        elif self.played and time.monotonic() - self._printed > self.interval_s:
            self._printed = time.monotonic()
            print(f"{self.name}: {summary['chains']}/{result['planned']} chains  {text}", flush=True)
