"""Replay recorded states to add depth and camera matrices to RoboCasa (0.2, 1.x) and robomimic data."""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vilma.datasets.lerobot_files import DamagedEpisode
from vilma.datasets.robocasa import Demo, RawDemos, fixed_base_actions, moves_its_base, open_demos
from vilma.datasets.robomimic_writer import file_attributes, finished_parts, merge, write_part

ROBOCASA_CAMERAS = ("robot0_agentview_left", "robot0_agentview_right", "robot0_eye_in_hand")
ROBOSUITE_CAMERAS = ("agentview", "robot0_eye_in_hand")
ROBOCASA_ACTIONS = 12


@dataclass(frozen=True)
class Request:
    """What one output holds. ``source`` is the input's name, so that a moved copy is still the same input."""

    source: str
    cameras: tuple[str, ...]
    size: int
    frame: str
    base: str
    shadows: bool
    demos: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.size < 1 or options.jobs < 1 or (options.demos is not None and options.demos < 1):
        raise ValueError("--size, --jobs and --demos must be at least 1")
    raw = open_demos(options.source)
    names = raw.names[: options.demos]
    mobile = _is_mobile(raw, names)
    request = Request(
        source=Path(options.source).name,
        cameras=tuple(options.cameras or (ROBOCASA_CAMERAS if mobile else ROBOSUITE_CAMERAS)),
        size=options.size,
        frame=options.frame or ("base" if mobile else "world"),
        base=options.base,
        shadows=not options.no_shadows,
        demos=len(names),
    )
    asked = asdict(request)
    had = file_attributes(options.out)
    if had is not None:
        if json.loads(str(had.get("request", "null"))) == json.loads(json.dumps(asked)):
            print(f"{options.out} is finished: {had['num_demos']} episodes")
            return 0
        raise ValueError(
            f"{options.out} holds something else: {had.get('request')}; remove it, or give --out"
        )
    done = finished_parts(options.out, asked)
    began, left_out, frames = time.monotonic(), [], 0
    jobs = [(options.source, name, i, options.out, request) for i, name in enumerate(names) if i not in done]
    for index, result in _run(jobs, options.jobs):
        if isinstance(result, str):
            left_out.append(result)
            continue
        done.add(index)
        frames += result
        rate = frames / (time.monotonic() - began)
        print(f"{len(done)}/{len(names)} episodes  {frames} frames  {rate:.1f} frames/s", flush=True)
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    if not done:
        raise ValueError(f"no episode of {options.source} could be replayed: {left_out[0]}")
    env_args = {"env_name": "unknown", "type": 1, "env_kwargs": {}, **raw.env_args}
    attributes: dict[str, Any] = {
        "reference_frame": request.frame,
        "action_kind": "delta",
        "control_freq": env_args["env_kwargs"].get("control_freq", 20),
        "request": asked,
    }
    print(f"written to {merge(options.out, env_args=env_args, attributes=attributes)}")
    return 0


def _is_mobile(raw: RawDemos, names: Sequence[str]) -> bool:
    """Whether the actions are a PandaOmron's; ValueError when no episode can be read."""
    reasons = []
    for name in names:
        try:
            return raw.read(name).actions.shape[1] == ROBOCASA_ACTIONS
        except DamagedEpisode as error:
            reasons.append(str(error))
    raise ValueError(f"no episode of {raw.path} can be read: {reasons[0] if reasons else 'it holds none'}")


def _run(jobs: Sequence[tuple], workers: int) -> Iterator[tuple[int, int | str]]:
    """(index, frames) of each episode as it is finished, or (index, why it was left out)."""
    if workers == 1 or len(jobs) < 2:
        yield from ((job[2], _replay(*job)) for job in jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(_replay, *job): job[2] for job in jobs}
        yield from ((running[done], done.result()) for done in as_completed(running))


def _replay(source: str, name: str, index: int, out: Path, request: Request) -> int | str:
    """Replay one episode into its part: the number of its frames, or why it is left out."""
    from vilma.envs.replay import Replay

    try:
        demo = open_demos(source).read(name)
        actions = _actions(demo, request.base)
    except DamagedEpisode as error:
        return str(error)
    with Replay(
        demo.model, request.cameras, request.size, reference_frame=request.frame, shadows=request.shadows
    ) as replay:
        frames = list(replay.frames(demo.states))
    obs: dict[str, np.ndarray] = dict(demo.obs)
    for camera in request.cameras:
        images = np.stack([frame[f"observation.images.{camera}"] for frame in frames])
        obs[f"{camera}_image"] = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        for ours, theirs in (("depth", "depth"), ("intrinsics", "intrinsic"), ("pose", "extrinsic")):
            stack = np.stack([frame[f"observation.{ours}.{camera}"] for frame in frames])
            obs[f"{camera}_{theirs}"] = stack
    write_part(
        out,
        index,
        actions=actions,
        obs=obs,
        states=demo.states,
        model_file=demo.model,
        attributes={"request": asdict(request), "ep_meta": {**demo.meta, "lang": demo.task}, "source": name},
    )
    return len(frames)


def _actions(demo: Demo, base: str) -> np.ndarray:
    """The actions to store; DamagedEpisode where a fixed base would lose what the demonstration did."""
    if base == "mobile" or demo.actions.shape[1] != ROBOCASA_ACTIONS:
        return demo.actions
    moving = moves_its_base(demo.actions)
    if moving.any():
        raise DamagedEpisode(
            f"{demo.name} drives its base in {moving.sum()} of {len(moving)} steps, which seven numbers "
            "cannot say; take it with --base mobile (12 numbers)"
        )
    return fixed_base_actions(demo.actions)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilma add-depth",
        description=__doc__,
        epilog="Run it where the suite's assets are installed (vilma doctor robocasa). Interrupted, the same "
        "command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="DEMOS", help="an HDF5 file, or the folder of a LeRobot data set")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the HDF5 file to write")
    parser.add_argument("--cameras", nargs="+", metavar="NAME", help="default: those of the suite")
    parser.add_argument("--size", type=int, default=128, help="pixels of the square pictures (128)")
    parser.add_argument(
        "--frame", choices=("world", "base"), help="frame of the poses (RoboCasa: base, else world)"
    )
    parser.add_argument(
        "--base",
        choices=("fixed", "mobile"),
        default="fixed",
        help="RoboCasa: keep 7 numbers of an action (fixed), or all 12",
    )
    parser.add_argument("--no-shadows", action="store_true", help="faster; other pictures than released")
    parser.add_argument("--demos", type=int, help="only the first so many")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
