"""Train a policy on demonstrations: point maps and images to actions, with exact resume."""

import argparse
import contextlib
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from vilma import config
from vilma.datasets.robomimic import RobomimicConfig, RobomimicDataset, collate, file_attributes
from vilma.envs import find_task, tasks
from vilma.pointmap import depth_problems
from vilma.policies import PointMapPolicyConfig, Policy
from vilma.report import record_time
from vilma.training import (
    EmaConfig,
    OptimConfig,
    ScheduleConfig,
    Trainer,
    TrainerConfig,
    backward_memory,
    describe_idle,
    describe_plan,
    find_trained,
    seed_all,
)

__all__ = ["RunConfig", "main"]

# A data set may be moved; what it holds is checked against the run's statistics.
MAY_CHANGE = ("data.path", "data.cache")

# Frames over the data set whose depth is looked at before a training begins.
DEPTH_FRAMES = 16


@dataclass(frozen=True)
class RunConfig:
    """A complete training: the sections of its YAML file."""

    policy: PointMapPolicyConfig
    data: RobomimicConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainerConfig = field(default_factory=TrainerConfig)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options, overrides = _parser().parse_known_args(arguments)
    if options.seed is not None:
        overrides = [*overrides, "--train.seed", str(options.seed)]
    run = config.load(RunConfig, options.config, overrides)
    check_horizons(run)
    if options.dry_run:
        for line in plan(run, options.dry_run):
            print(line)
        return 0
    run_dir = options.run or Path("runs") / Path(options.config).stem
    began = time.perf_counter()
    main_process = os.environ.get("RANK", "0") == "0"
    done = find_trained(run_dir, run.train.steps, run, MAY_CHANGE)
    if done is not None and not main_process:
        return 0
    if done is not None:
        print(f"{run_dir} is already trained to step {done.step}")
        _tell_next(run_dir, _instruction(run_dir, run.data))
        return 0

    dataset = _load(run.data)
    facts, statistics = dataset.metadata, dataset.statistics()
    seed_all(run.train.seed)
    policy = Policy.from_config(run.policy, pretrained=True)
    policy.check_compatible(facts, name=_shown(run.data.path))
    check_sizes(run, facts)
    check_statistics(run_dir, statistics)
    check_depth(dataset, policy.observation_keys, run.policy.depth_range)
    check_texts(policy, facts["tasks"], _shown(run.data.path))
    policy.set_statistics(statistics)
    if main_process:
        count = sum(p.numel() for p in policy.parameters() if p.requires_grad)
        print(f"{facts['episodes']} episodes, {facts['frames']} frames from {_shown(run.data.path)}")
        print(
            f"{run.policy.type} policy, {count / 1e6:.2f} M parameters; {run.train.steps} steps in {run_dir}"
        )

    updates: list[int] = []

    def keep_time() -> None:
        command = shlex.join(["vilma", "train-policy", *arguments])
        record_time(run_dir, "train", time.perf_counter() - began, command)

    trainer = Trainer(
        run.train,
        policy,
        dataset,
        run_dir,
        optim=run.optim,
        schedule=run.schedule,
        ema=run.ema,
        collate=collate,
        on_step=lambda step, values: updates.append(step) if not updates else None,
        describe=run,
        may_change=MAY_CHANGE,
    )
    try:
        trained = trainer.fit()
    except BaseException:
        if main_process and updates:  # it trained: the time counts, whatever ended it
            with contextlib.suppress(OSError):  # a full disk must not hide why it ended
                keep_time()
        raise
    if main_process:
        keep_time()
        print(f"trained to step {trained.step} in {trained.seconds:.0f} s: {trained.checkpoint}")
        _tell_next(run_dir, facts["task"])
    return 0


def plan(run: RunConfig, processes: int = 1) -> list[str]:
    """What a run takes on so many processes, without its data, pretrained weights and text encoder.

    Raises ValueError for a config that cannot be built or trained.
    """
    # Neither moves a shape: CLIP is frozen and no part of the policy.
    text = "hashed" if run.policy.text_encoder == "clip" else run.policy.text_encoder
    policy = Policy.from_config(replace(run.policy, text_encoder=text, rgb_pretrained=False))
    saved, notes = None, []
    unknown = [camera for camera in run.policy.cameras if camera not in run.policy.image_size]
    if unknown:
        notes.append(
            "not counted: what an update keeps for its backward pass, since policy.image_size does not name "
            + ", ".join(unknown)
        )
    else:
        spread = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0}
        sizes = {"action": run.policy.action_dim, "observation.state": run.policy.state_dim}
        policy.set_statistics(
            {key: {name: [value] * size for name, value in spread.items()} for key, size in sizes.items()}
        )
        with warnings.catch_warnings(action="ignore"):  # of a geometry that is made up here
            saved = backward_memory(policy, lambda n: blank_batch(run.policy, n), run.train.precision)
        notes += [line for line in [describe_idle(policy)] if line]
    sections = run.train, run.optim, run.schedule, run.ema
    return describe_plan(policy, *sections, processes=processes, saved=saved) + notes


def blank_batch(c: PointMapPolicyConfig, samples: int) -> dict[str, Any]:
    """A batch of grey pictures of a sloping plane about one metre below the cameras."""
    steps = (samples, c.obs_horizon)
    batch: dict[str, Any] = {"task": [(c.tasks or ("task",))[0]] * samples}
    batch["action"] = torch.zeros(samples, c.horizon, c.action_dim)
    batch["action_is_pad"] = torch.zeros(samples, c.horizon, dtype=torch.bool)
    batch["observation.state"] = torch.zeros(*steps, c.state_dim)
    down = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    down[2, 3] = 1.0
    for camera in c.cameras:
        height, width = c.image_size[camera]
        focal = torch.tensor([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
        batch[f"observation.images.{camera}"] = torch.full((*steps, 3, height, width), 128, dtype=torch.uint8)
        slope = torch.linspace(0.7, 1.3, height)[:, None]
        batch[f"observation.depth.{camera}"] = slope.expand(*steps, height, width)
        batch[f"observation.intrinsics.{camera}"] = focal.expand(*steps, 3, 3)
        batch[f"observation.pose.{camera}"] = down.expand(*steps, 4, 4)
    return batch


def check_horizons(run: RunConfig) -> None:
    """Raise ConfigError unless policy and data speak of the same window and cameras."""
    pairs = (
        ("obs_horizon", run.policy.obs_horizon, "obs_horizon", run.data.obs_horizon),
        ("horizon", run.policy.horizon, "action_horizon", run.data.action_horizon),
    )
    for ours, wanted, theirs, got in pairs:
        if wanted != got:
            raise config.ConfigError(f"policy.{ours} is {wanted} but data.{theirs} is {got}; they must agree")
    absent = [camera for camera in run.policy.cameras if camera not in run.data.cameras]
    if absent:
        raise config.ConfigError(
            f"policy.cameras names {', '.join(absent)}, which data.cameras does not "
            f"({', '.join(run.data.cameras)})"
        )


def check_sizes(run: RunConfig, facts: Mapping[str, Any]) -> None:
    """Raise ValueError if images of the data set have another size than the policy was made for."""
    for camera, wanted in run.policy.image_size.items():
        size = facts["sizes"].get(camera)
        if size is not None and tuple(size) != tuple(wanted):
            raise ValueError(
                f"images of {camera} in {_shown(run.data.path)} are {tuple(size)}, policy.image_size has "
                f"{tuple(wanted)}"
            )


def check_statistics(run_dir: Path, statistics: Mapping[str, Any]) -> None:
    """Raise ValueError if a run that goes on was begun on data with other statistics."""
    path = run_dir / "checkpoints" / "last" / "stats.json"
    try:
        before = config.read(path)
    except config.ConfigError:
        return
    for key, now in statistics.items():
        then = before.get(key)
        same = then is not None and then["count"] == now["count"] and _close(then["mean"], now["mean"])
        if not same:
            raise ValueError(
                f"the data changed since {run_dir} was begun: the mean of {key} over {now['count']} frames "
                f"is not that in {path}. Give it the same data, or use another run directory"
            )


def check_texts(policy: Policy, tasks: Sequence[str], source: str) -> None:
    """Raise ValueError for a task that the policy cannot read: now, not at the step that first meets it."""
    if not all(tasks):
        raise ValueError(f"{source} has episodes that tell no task: name it with --data.task")
    policy.text(tasks)


def check_depth(
    dataset: RobomimicDataset,
    keys: Sequence[str],
    depth_range: Sequence[float] | None = None,
    frames: int = DEPTH_FRAMES,
) -> None:
    """Look at the depth of a few frames over the data set, for the depth keys among ``keys``.

    Warns where it looks wrong, naming file, episode and camera. Raises ValueError when a camera has no valid
    reading (finite, positive, inside ``depth_range``) in any of the frames: the policy would be blind.
    """
    count = min(frames, len(dataset))
    chosen = [round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)]
    near, far = depth_range or (0.0, math.inf)
    batch = dataset.__getitems__(chosen)
    for key in keys:
        if not key.startswith("observation.depth."):
            continue
        camera, pictures = key.rpartition(".")[2], batch[key][:, -1]
        found = {
            index: problems for index, depth in zip(chosen, pictures) if (problems := depth_problems(depth))
        }
        first = dataset.locate(chosen[0])
        if found:
            index, problems = next(iter(found.items()))
            first = dataset.locate(index)
        told = f"; {'; '.join(problems)}" if found else ""
        if not bool((torch.isfinite(pictures) & (pictures > near) & (pictures < far)).any()):
            limits = f" within policy.depth_range {tuple(depth_range)}" if depth_range else ""
            raise ValueError(
                f"the depth of camera {camera} has no valid reading{limits} in any of {count} frames over "
                f"the data set, from {first}{told}. Depth is metres along the optical axis: repair the "
                "data, or train on images alone (policy.modality rgb)"
            )
        if found:
            warnings.warn(
                f"the depth of camera {camera} looks wrong in {len(found)} of {count} frames looked at, "
                f"first in {first}{told}",
                stacklevel=2,
            )


def _close(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9) for x, y in zip(a, b))


def _load(data: RobomimicConfig) -> RobomimicDataset:
    """The data set, with a bar on a terminal while it is read."""
    if not sys.stdout.isatty():
        return RobomimicDataset(data)
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        task = progress.add_task("reading episodes", total=None)
        return RobomimicDataset(data, lambda done, total: progress.update(task, completed=done, total=total))


def _shown(path: str | Sequence[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path)


def _instruction(run_dir: Path, data: RobomimicConfig) -> str:
    """What a finished run was trained to do, from the attributes of its data where they are still there."""
    paths = [data.path] if isinstance(data.path, str) else list(data.path)
    with contextlib.suppress(config.ConfigError, KeyError, TypeError):
        before = config.read(run_dir / "config.yaml")["data"]["path"]  # the data may have moved since
        paths += [before] if isinstance(before, str) else list(before)
    for path in paths:
        if Path(path).is_file():
            with contextlib.suppress(OSError, ImportError):
                task = (file_attributes(path) or {}).get("task")
                if task:
                    return task
    return data.task


def _tell_next(run_dir: Path, instruction: str) -> None:
    names = [name for name in tasks() if instruction and find_task(name).instruction == instruction]
    print(f"next: vilma eval {names[0] if names else 'SUITE/TASK'} {shlex.quote(str(run_dir))} --episodes 50")
    if not names:
        suites = {find_task(name).suite: name for name in reversed(tasks())}
        print(f"      SUITE/TASK is, for example: {', '.join(reversed(suites.values()))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilma train-policy",
        usage="vilma train-policy CONFIG [--run DIR] [--seed N] [--dry-run [PROCESSES]] "
        "[--section.field VALUE ...]",
        description=__doc__,
        epilog="Any field of the config can be given: --optim.lr 3e-4 --train.steps 2000 --data.path FILE. "
        "Sections: policy, data, optim, schedule, ema, train. Run the same command again to go on after an "
        "interruption; a finished run is left alone. Several GPUs: torchrun --nproc-per-node N -m "
        "vilma.tools.train_policy CONFIG ... (or accelerate launch), with --train.sharding fsdp2 "
        "where a model and its optimiser are too much for one.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, e.g. configs/policies/demo_lift.yaml")
    parser.add_argument(
        "--run",
        "--run-dir",  # torchrun takes --run for a short form of its own --run-path
        type=Path,
        metavar="DIR",
        help="run directory (default: runs/<config's name>); under torchrun write --run-dir",
    )
    parser.add_argument(
        "--dry-run",
        type=int,
        nargs="?",
        const=1,
        metavar="PROCESSES",
        help="build everything but the data, tell parameters, schedule and memory for so many processes "
        "(default: 1), and stop",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same as --train.seed N")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
