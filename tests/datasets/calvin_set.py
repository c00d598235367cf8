"""A mini data set in CALVIN's format, with all keys of a released frame."""

import numpy as np

from vilma.datasets.calvin_tree import CAMERAS
from vilma.datasets.calvin_writer import TACTILE, CalvinWriter

TEXTS = ("open the drawer", "push the handle to close the drawer", "turn on the led")
SPANS = ((0, 7), (5, 11), (12, 19))


def frame(generator: np.random.Generator, tactile: bool = True) -> dict[str, np.ndarray]:
    joints = np.array([-1.2, 1.0, 2.1, -2.3, -0.9, 1.6, 0.55]) + 0.1 * generator.normal(size=7)
    tool = generator.uniform(-0.3, 0.3, 6)
    found = {
        "robot_obs": np.concatenate([tool, [0.08], joints, [1.0]]),
        "scene_obs": generator.uniform(size=24),
        "actions": np.append(tool + generator.uniform(-0.03, 0.03, 6), generator.choice([-1.0, 1.0])),
    }
    for name, camera in CAMERAS.items():
        size = (camera.size, camera.size)
        found[f"rgb_{name}"] = np.tile(generator.integers(0, 256, 3, np.uint8), (*size, 1))
        found[f"rgb_{name}"][: generator.integers(1, 60)] //= 2
        depth = np.full(size, generator.uniform(0.3, 0.9), np.float32)
        depth[:3] = camera.far  # nothing was hit there
        found[f"depth_{name}"] = depth
    if tactile:
        for name, (shape, dtype) in TACTILE.items():
            found[name] = np.zeros(shape, dtype)
    return found


def write(folder, frames: int = 20, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Two recordings, 12 and ``frames - 12`` long, with three annotated segments; the frames as written."""
    generator = np.random.default_rng(seed)
    written = [frame(generator) for _ in range(frames)]
    writer = CalvinWriter(folder / "training")
    writer.write_episode(written[:12])
    writer.write_episode(written[12:])
    for (start, end), text in zip(SPANS, TEXTS):
        writer.annotate(start, end, text, text.replace(" ", "_"))
    writer.close()
    return written
