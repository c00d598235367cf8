"""Pack a LeRobot data set into the layout that policies train from; depth and cameras where there are."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vilma import config
from vilma.datasets.lerobot import LeRobotConfig, LeRobotDataset
from vilma.datasets.lerobot_files import DamagedEpisode
from vilma.datasets.robomimic_writer import EpisodeWriter, file_attributes

# Of a reading of the data set: no part of what the file holds.
_OWN = ("path", "cache", "obs_horizon", "action_horizon")


def main(arguments: Sequence[str] | None = None) -> int:
    options, rest = _parser().parse_known_args(arguments)
    values = config.override({"path": options.source, "cache": "none"}, rest)
    wanted = config.decode(LeRobotConfig, values, where="LeRobotConfig")
    request = {"source": Path(options.source).name}
    request |= {k: v for k, v in asdict(wanted).items() if k not in _OWN}
    had = file_attributes(options.out)
    if had is not None:
        raise ValueError(f"{options.out} is there already ({had['num_demos']} episodes): remove it, or --out")
    data = LeRobotDataset(wanted)
    tasks = data.metadata["tasks"]
    attributes: dict[str, Any] = {
        "reference_frame": wanted.reference_frame,
        "action_kind": wanted.action_kind,
        "control_freq": data.files.fps,
        "request": request,
        **({"task": tasks[0]} if len(tasks) == 1 else {}),
    }
    arguments_of_env = {"control_freq": data.files.fps, "robots": data.files.robot or "unknown"}
    env_args = {"env_name": "unknown", "type": 1, "env_kwargs": arguments_of_env}
    with EpisodeWriter(options.out, env_args, attributes) as writer:
        for number, episode in enumerate(data.episodes):
            try:
                if number not in writer.finished:
                    writer.write(number, **read(data, number))
                print(f"{number + 1}/{len(data.episodes)} episodes ({episode.length} frames)", flush=True)
            except DamagedEpisode as error:
                print(f"left out: episode {episode.index}: {error}", file=sys.stderr)
    print(f"written to {options.out}; state_keys: [{', '.join(wanted.state_keys)}]")
    return 0


def read(data: LeRobotDataset, number: int) -> dict[str, Any]:
    """One episode as `write_part` takes it; the state stays under the names of its features."""
    episode, config = data.episodes[number], data.config
    columns = data.columns(episode)
    obs: dict[str, np.ndarray] = {
        key: data.files.column(episode, key).reshape(episode.length, -1) for key in config.state_keys
    }
    for camera in config.cameras:
        pixels = data.pixels(episode, f"observation.images.{camera}")
        obs[f"{camera}_image"] = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        if config.depth:
            obs[f"{camera}_depth"] = data.pixels(episode, f"observation.depth.{camera}")
            obs[f"{camera}_intrinsic"] = columns[f"observation.intrinsics.{camera}"]
            obs[f"{camera}_extrinsic"] = columns[f"observation.pose.{camera}"]
    task = episode.task or config.task
    return {"actions": columns["action"], "obs": obs, "attributes": {"ep_meta": {"lang": task}}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilma pack-lerobot",
        usage="vilma pack-lerobot FOLDER --out FILE --cameras '[a, b]' --reference_frame FRAME "
        "--action_kind KIND [--FIELD VALUE ...]",
        description=__doc__,
        epilog="Any field of LeRobotConfig (datasets/lerobot.md) can be given: --depth true "
        "--depth_unit 0.001 --intrinsics '{top: [600, 600, 320, 240]}'. Interrupted, it goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="FOLDER", help="the folder that holds meta/ and data/")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the HDF5 file to write")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
