"""A data set that LeRobot itself wrote (v3.0, AV1 videos) is read frame for frame; see `run.py lerobot`."""

import sys
from pathlib import Path

import numpy as np

from vilma.datasets.lerobot import LeRobotConfig, LeRobotDataset
from vilma.targets import Line, show

LENGTHS = (12, 9, 15)


def write_arrays(path: Path) -> None:
    """Pictures of large random blocks: compression changes them little, and no two frames are alike."""
    rng, count = np.random.default_rng(0), sum(LENGTHS)
    blocks = rng.integers(0, 255, (count, 4, 6, 3), np.uint8)
    front = blocks.repeat(16, 1).repeat(16, 2)
    state, action = (rng.normal(size=(count, n)).astype(np.float32) for n in (4, 3))
    np.savez(path, front=front, state=state, action=action, episode=np.repeat(np.arange(3), LENGTHS))


def read(arrays: Path, root: Path) -> int:
    written = np.load(arrays)
    data = LeRobotDataset(LeRobotConfig(str(root), ("exact", "front"), "world", "delta"))
    samples = [data[i] for i in range(len(data))]
    exact, lossy = (
        np.stack([s[f"observation.images.{c}"][0].numpy().transpose(1, 2, 0) for s in samples]).astype(int)
        for c in ("exact", "front")
    )
    equal = np.array_equal(exact, written["front"])
    numbers = all(
        np.array_equal(np.stack([s[key][0].numpy() for s in samples]), written[name])
        for key, name in (("observation.state", "state"), ("action", "action"))
    )
    distance = np.abs(lossy[:, None] - written["front"][None].astype(int)).mean((2, 3, 4))
    in_place = int((distance.argmin(1) == np.arange(len(distance))).sum())
    tasks = [s["task"] for s in samples] == [f"task of episode {e}" for e in written["episode"]]
    count = len(written["episode"])
    return show(
        [
            Line("version", data.files.version, "v3.0", data.files.version == "v3.0"),
            Line(
                "pictures stored as they are", f"{len(exact)} of {count}, equal: {equal}", "all equal", equal
            ),
            Line("states, actions and tasks", f"equal: {numbers and tasks}", "equal", numbers and tasks),
            Line(
                "frames of the AV1 video in their places",
                f"{in_place} of {count}, off by {np.diag(distance).mean():.1f} grey levels",
                f"{count}, < 6",
                in_place == count and np.diag(distance).mean() < 6,
            ),
        ]
    )


if __name__ == "__main__":
    if sys.argv[1] == "arrays":
        write_arrays(Path(sys.argv[2]))
    else:
        sys.exit(read(Path(sys.argv[2]), Path(sys.argv[3])))
