"""Runs beside LeRobot itself: writes the arrays of a .npz file as a data set, with LeRobot's own tools."""

import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def main(arrays: Path, root: Path) -> None:
    content = np.load(arrays)
    height, width = content["front"].shape[1:3]
    picture = {"shape": (height, width, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.state": {"dtype": "float32", "shape": (content["state"].shape[1],), "names": None},
        "action": {"dtype": "float32", "shape": (content["action"].shape[1],), "names": None},
        "observation.images.exact": {"dtype": "image", **picture},
        "observation.images.front": {"dtype": "video", **picture},
    }
    dataset = LeRobotDataset.create("local/set", fps=10, root=root, features=features, robot_type="panda")
    for episode in range(int(content["episode"].max()) + 1):
        for row in np.flatnonzero(content["episode"] == episode):
            dataset.add_frame(
                {
                    "observation.state": content["state"][row],
                    "action": content["action"][row],
                    "observation.images.exact": content["front"][row],
                    "observation.images.front": content["front"][row],
                    "task": f"task of episode {episode}",
                }
            )
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
