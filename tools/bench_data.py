"""Samples a second from CALVIN's npz files and from the same frames packed, page cache warm and cold."""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vilma.datasets.calvin import CalvinConfig, CalvinDataset
from vilma.datasets.calvin_tree import CAMERAS
from vilma.datasets.calvin_writer import TACTILE, CalvinWriter
from vilma.datasets.robomimic import RobomimicConfig, RobomimicDataset
from vilma.targets import Line, show

TARGET = 5.0
LENGTH = 64  # frames of an annotated segment, as in the released data
WINDOW = 10


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.frames < LENGTH or options.batches < 1:
        raise ValueError(f"wanted at least {LENGTH} frames and 1 batch of each kind")
    mini, packed = options.out / "npz", options.out / "packed"
    if not (mini / "training" / "ep_start_end_ids.npy").is_file():
        generate(mini / "training", options.frames)
    _pack(mini, packed)
    found = measure(mini, packed, options.batches, options.batch_size)
    found |= {
        "command": f"vilma bench-data --frames {options.frames} --batches {options.batches} "
        f"--batch-size {options.batch_size}",
        "commit": _commit(),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return show(lines(found))


def lines(found: dict[str, Any]) -> Iterator[Line]:
    """What was measured beside its target; `vilma show-calvin` prints these from a committed file."""
    for name, case in found["cases"].items():
        for cache in ("warm", "cold"):
            npz, packed = case["npz"][cache], case["packed"][cache]
            yield Line(
                f"{name}, {cache} page cache",
                f"npz {npz:.0f}, packed {packed:.0f} samples/s: {case['ratio'][cache]:.1f} x "
                f"({found['frames']} frames)",
                f"at least {TARGET:g} x",
                case["ratio"][cache] >= TARGET and found["frames"] >= 5000,
            )


def measure(mini: Path, packed: Path, batches: int, batch_size: int) -> dict[str, Any]:
    """Interleaved, one process: batch by batch npz and packed, the same windows, in turns warm and cold."""
    cases = {}
    frames = 0
    for observed, name in ((1, "a frame and 10 actions"), (WINDOW, "10 frames and 10 actions")):
        npz = CalvinDataset(CalvinConfig(str(mini), obs_horizon=observed, action_horizon=WINDOW))
        robomimic = RobomimicConfig(
            str(packed),
            cameras=tuple(CAMERAS),
            state_keys=("robot_obs",),
            obs_horizon=observed,
            action_horizon=WINDOW,
            cache="none",
        )
        sets = {"npz": npz, "packed": RobomimicDataset(robomimic)}
        frames = len(npz)
        files = {
            "npz": sorted((mini / "training").glob("episode_*.npz")),
            "packed": sorted(packed.glob("*.hdf5")),
        }
        generator = np.random.default_rng(0)
        speeds: dict[str, dict[str, list[float]]] = {name: {"warm": [], "cold": []} for name in sets}
        for number in range(batches):
            indices = generator.integers(frames, size=batch_size).tolist()
            if number == 0:
                _check_equal(*(data.__getitems__(indices) for data in sets.values()))
            for kind, data in sets.items():
                forget(files[kind])
                speeds[kind]["cold"].append(batch_size / _seconds(data.__getitems__, indices))
                speeds[kind]["warm"].append(batch_size / _seconds(data.__getitems__, indices))
        median = {k: {c: statistics.median(v) for c, v in caches.items()} for k, caches in speeds.items()}
        ratio = {
            cache: statistics.median(b / a for a, b in zip(speeds["npz"][cache], speeds["packed"][cache]))
            for cache in ("warm", "cold")
        }
        cases[name] = {**median, "ratio": ratio}
    return {"frames": frames, "cases": cases}


def _check_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Both readers give the same batch; otherwise their speeds do not compare."""
    for key, value in a.items():
        same = value == b[key] if isinstance(value, list) else bool((value == b[key]).all())
        if not same:
            raise ValueError(f"the packed files differ from the npz files in {key}; pack them again")


def forget(files: Sequence[Path]) -> None:
    """Drop these files from the page cache; they must be on the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _seconds(read: Callable, indices: list[int]) -> float:
    began = time.perf_counter()
    read(indices)
    return time.perf_counter() - began


def generate(folder: Path, frames: int) -> None:
    """Frames with all of CALVIN's keys: pictures of boxes before a gradient, depth, tactile readings."""
    generator = np.random.default_rng(0)
    writer = CalvinWriter(folder)
    for start in range(0, frames, LENGTH):
        first = writer.write_episode([_frame(generator, i) for i in range(min(LENGTH, frames - start))])
        if writer.frames - first == LENGTH:
            writer.annotate(first, writer.frames - 1, "open the drawer", "open_drawer")
        if sys.stdout.isatty() or (start // LENGTH) % 20 == 0:
            print(f"generated {writer.frames}/{frames} frames", flush=True)
    writer.close()


def _frame(generator: np.random.Generator, step: int) -> dict[str, np.ndarray]:
    robot = generator.uniform(-1, 1, 15)
    frame = {
        "actions": np.append(robot[:6], 1.0),
        "robot_obs": robot,
        "scene_obs": generator.uniform(size=24),
    }
    for name, camera in CAMERAS.items():
        side = camera.size
        row, column = np.mgrid[:side, :side].astype(np.float32) / side
        picture = np.stack([90 + 60 * row, 80 + 50 * column, 70 + 40 * row * column], -1).astype(np.uint8)
        depth = 0.4 * camera.far + 0.1 * row + 0.07 * column + 0.001 * np.sin(9 * row + step)
        for _ in range(12):
            (top, left), (height, width) = (
                generator.integers(side, size=2),
                generator.integers(4, side // 3, 2),
            )
            box = np.s_[top : top + height, left : left + width]
            picture[box] = generator.integers(255, size=3) + (20 * row[box][..., None]).astype(int) % 200
            depth[box] -= 0.05 * camera.far * generator.uniform()
        # A renderer's shading and anti-aliasing: a few grey levels that do not compress.
        picture = np.clip(picture + generator.integers(-1, 2, picture.shape), 0, 255).astype(np.uint8)
        frame[f"rgb_{name}"], frame[f"depth_{name}"] = picture, depth.astype(np.float32)
    for name, (shape, dtype) in TACTILE.items():
        smooth = np.mgrid[: shape[0], : shape[1]].sum(0)[..., None] % 97
        noise = generator.integers(0, 3, shape)
        frame[name] = (smooth + noise).astype(dtype)
    return frame


def _pack(mini: Path, packed: Path) -> None:
    from vilma.tools.pack_calvin import main as pack

    with contextlib.redirect_stdout(sys.stderr):
        pack([str(mini), "--out", str(packed), "--workers", "1"])


def _commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vilma bench-data", description=__doc__)
    parser.add_argument("--frames", type=int, default=5120)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-data"), metavar="DIR", help="3.2 GB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
