"""What may differ from a robosuite task's own scene: where the fixed cameras stand, and cubes in the way.

All draws hang on one number of an episode and on the name of what is drawn: they touch neither the task's own
draws nor each other, so an episode keeps its objects whatever else varies.
"""

import colorsys
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["MAX_DISTRACTORS", "CameraMotion", "place_distractors", "with_distractors"]

MAX_DISTRACTORS = 8

# As Lift's cube: nothing but the colour tells them from it.
_HALF_SIZE = 0.02
# Half width of their square; free space to the task's objects (for the open fingers) and between them.
_SPREAD, _FINGER_ROOM, _GAP = 0.2, 0.04, 0.01
# Hues that no object of the tasks has: yellow, and cyan over blue to pink. Never red or green.
_HUES = ((0.12, 0.2), (0.46, 0.88))
_MAX_TRIES = 10_000


@dataclass(frozen=True)
class CameraMotion:
    """How a fixed camera is displaced in an episode.

    jitter: most metres and degrees, a translation and a rotation vector uniform in balls of these radii, the
    rotation about the camera's own centre. shift: metres of a translation in a random horizontal direction,
    orientation unchanged (a tripod that was put down elsewhere); of one seed, a longer shift has the same
    direction.
    """

    jitter: tuple[float, float] = (0.0, 0.0)
    shift: float = 0.0

    def __bool__(self) -> bool:
        return any(self.jitter) or bool(self.shift)

    def move(
        self, position: np.ndarray, rotation: np.ndarray, episode: int, camera: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """The displaced position (3,) and camera -> world rotation (3, 3) of a camera, by its name."""
        rng = _generator(episode, f"jitter/{camera}")
        metres, degrees = self.jitter
        position = position + metres * _in_ball(rng)
        rotation = _rotation(np.deg2rad(degrees) * _in_ball(rng)) @ rotation
        angle = _generator(episode, f"shift/{camera}").uniform(0, 2 * np.pi)
        return position + self.shift * np.array([np.cos(angle), np.sin(angle), 0.0]), rotation


def with_distractors(simulator: type, count: int) -> type:
    """A robosuite table task with ``count`` more cubes, free bodies named distractor0, distractor1, ...

    They come after everything else in the model, so that nothing of the task changes its place in a state.
    Building it raises ValueError when the task has no free table.
    """

    def load_model(self: Any) -> None:
        from robosuite.models.objects import BoxObject

        super(crowded, self)._load_model()
        if not hasattr(self, "table_offset"):
            raise ValueError(
                f"{simulator.__name__} has no free table for cubes: leave the option distractors out"
            )
        self.distractors = [
            BoxObject(name=f"distractor{i}", size=[_HALF_SIZE] * 3, rgba=[0.5, 0.5, 0.5, 1.0])
            for i in range(count)
        ]
        self.model.mujoco_objects = [*self.model.mujoco_objects, *self.distractors]
        self.model.merge_objects(self.distractors)

    crowded = type(simulator)(f"{simulator.__name__}Crowded", (simulator,), {"_load_model": load_model})
    return crowded


def place_distractors(simulator: Any, episode: int) -> None:
    """Give the distractors of an episode their places and colours; the task's objects must have theirs.

    Positions are uniform over a square of 40 cm around the table's centre, where they are free: at least 4 cm
    from the task's objects (between circles around them, for the open fingers) and 1 cm from each other.
    """
    rng = _generator(episode, "distractors")
    centre, radius = np.asarray(simulator.table_offset), np.sqrt(2) * _HALF_SIZE
    taken = []
    for thing in simulator.model.mujoco_objects:
        if thing not in simulator.distractors:
            place = simulator.sim.data.get_joint_qpos(thing.joints[0])[:2]
            taken.append((place, thing.horizontal_radius + _FINGER_ROOM))
    for cube in simulator.distractors:
        for _ in range(_MAX_TRIES):
            place = centre[:2] + rng.uniform(-_SPREAD, _SPREAD, 2)
            if all(np.linalg.norm(place - other) >= room + radius for other, room in taken):
                break
        else:
            raise RuntimeError(f"no free place on the table for {cube.name} after {_MAX_TRIES} tries")
        taken.append((place, radius + _GAP))
        yaw = rng.uniform(-np.pi, np.pi)
        pose = [*place, centre[2] + _HALF_SIZE, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        simulator.sim.data.set_joint_qpos(cube.joints[0], np.array(pose))
        color = _color(rng)
        for geom in cube.visual_geoms:
            simulator.sim.model.geom_rgba[simulator.sim.model.geom_name2id(geom)] = color
    simulator.sim.forward()


def _color(rng: np.random.Generator) -> tuple[float, float, float, float]:
    widths = np.array([high - low for low, high in _HUES])
    low, high = _HUES[rng.choice(len(_HUES), p=widths / widths.sum())]
    return (*colorsys.hsv_to_rgb(rng.uniform(low, high), rng.uniform(0.5, 1.0), rng.uniform(0.4, 1.0)), 1.0)


def _generator(episode: int, name: str) -> np.random.Generator:
    return np.random.default_rng([episode, zlib.crc32(name.encode())])


def _in_ball(rng: np.random.Generator) -> np.ndarray:
    """(3,) uniform in the unit ball."""
    direction = rng.standard_normal(3)
    return direction / np.linalg.norm(direction) * rng.uniform() ** (1 / 3)


def _rotation(vector: np.ndarray) -> np.ndarray:
    """Rodrigues' formula: (3, 3) of a rotation vector (3,) in radians."""
    angle = float(np.linalg.norm(vector))
    if angle == 0.0:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
