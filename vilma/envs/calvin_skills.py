"""Scripted skills on CALVIN's table, scene D: 23 of the 34 tasks, from the simulator's own state.

For checking an installation (does the oracle fire?) and for making small data sets, not for scores. A skill
is a list of moves of the tool's target; the hand keeps pointing down. Blocks must lie free on the table.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .calvin_protocol import COLORS, TASKS

__all__ = ["SKILLS", "Move", "Recording", "actions", "plan", "record"]

OPEN, CLOSE = 1.0, -1.0
# Heights of the tool in metres: above all that is on the table, at a block, at the drawer's and the door's
# handle.
HIGH, BLOCK, DRAWER, DOOR = 0.56, 0.46, 0.36, 0.56

SKILLS = tuple(
    task
    for task in TASKS
    if task.split("_")[0] in ("rotate", "push", "move", "open", "close", "turn")
    and task != "push_into_drawer"
) + tuple(f"lift_{color}_block_table" for color in COLORS)


class Move(NamedTuple):
    """Towards ``target`` (metres, world) for so many steps, turning by ``turn`` (1 = 0.05 rad) at each."""

    target: tuple[float, float, float]
    gripper: float
    steps: int
    turn: float = 0.0


def plan(task: str, scene_obs: np.ndarray) -> list[Move]:
    """The moves that do ``task`` in a scene (24,), if its preconditions hold.

    Raises ValueError for a task without a skill.
    """
    if task not in SKILLS:
        raise ValueError(f"no scripted skill for {task!r}; there are {', '.join(SKILLS)}")
    verb, first, *rest = task.split("_")
    if verb in ("rotate", "push", "lift"):
        at = 6 + 6 * COLORS.index(first)
        return _with_block(verb, rest[-1], *scene_obs[at : at + 2])
    if verb == "move":
        side = 1 if first == "slider" and rest[0] == "right" else -1
        start = -0.33 if side > 0 else 0.12
        return _push((start, 0.004, DOOR), (start + 0.36 * side, 0.004, DOOR), approach=0.12)
    if verb == "open":
        return _push((0.18, -0.22, DRAWER), (0.18, -0.47, DRAWER))
    if verb == "close":
        return _push((0.18, -0.55, DRAWER), (0.18, -0.22, DRAWER))
    if rest[0] == "led":
        return _push((-0.12, -0.12, HIGH), (-0.12, -0.12, 0.475))
    below, above = 0.465, 0.62
    start, end = (below, above) if first == "on" else (above, below)
    return _push((0.3, 0.06, start), (0.3, 0.06, end), approach=0.14)


def _push(
    start: tuple[float, float, float], end: tuple[float, float, float], approach: float = 0.0
) -> list[Move]:
    """Fingers closed, from above (or from ``approach`` metres in front) to ``start``, then to ``end``."""
    x, y, z = start
    before = (x, y - approach, z) if approach else (x, y, max(z, 0.52))
    return [Move(before, CLOSE, 45), Move(start, CLOSE, 28), Move(end, CLOSE, 40)]


def _with_block(verb: str, side: str, x: float, y: float) -> list[Move]:
    if verb == "push":
        way = 0.09 if side == "right" else -0.09
        start = (x - way, y, BLOCK)
        return [
            Move((x - way, y, HIGH), CLOSE, 45),
            Move(start, CLOSE, 28),
            Move((x + way, y, BLOCK), CLOSE, 30),
        ]
    grasp = [
        Move((x, y, HIGH), OPEN, 45),
        Move((x, y, BLOCK), OPEN, 30),
        Move((x, y, BLOCK), CLOSE, 12),
    ]
    if verb == "lift":
        return [*grasp, Move((x, y, 0.60), CLOSE, 30)]
    return [*grasp, Move((x, y, BLOCK), CLOSE, 40, turn=0.8 if side == "left" else -0.8)]


def actions(env: Any, moves: list[Move]) -> Iterator[np.ndarray]:
    """The relative actions (7,) of these moves, for a `CalvinEnv` that advances by one between any two.

    A move ends early when the tool is there (moves that turn, and those that hold still, do not).
    """
    robot = env.simulator.robot
    for move in moves:
        target = np.asarray(move.target)
        is_still = move.turn or np.allclose(robot.target_pos, target, atol=1e-3)
        for _ in range(move.steps):
            left = target - robot.target_pos
            if not is_still and np.abs(np.append(left, target - env.state()[0][:3])).max() < 0.008:
                break
            yield np.array([*np.clip(left / 0.02, -1, 1), 0, 0, move.turn, move.gripper])


class Recording(NamedTuple):
    """Frames of one uninterrupted recording, and the parts (first, last, task) of it that solve something."""

    frames: list[dict[str, np.ndarray]]
    solved: list[tuple[int, int, str]]


def record(env: Any, tasks: Iterable[str], generator: np.random.Generator) -> Recording:
    """Do these tasks one after the other from the present scene, and draw what CALVIN's data hold.

    As the authors did it: the states are recorded first, then every one is put back and drawn. A frame has
    the keys of a CALVIN file but for tactile ones; its action is the tool's pose at the next frame. Between
    two tasks the tool wanders to a random place. A task whose skill fails ends the recording.
    """
    moments = [_moment(env)]
    solved = []
    for task in tasks:
        place = generator.uniform((-0.1, -0.3, 0.52), (0.25, -0.15, 0.62))
        for action in actions(env, [Move(tuple(place), OPEN, int(generator.integers(5, 25)))]):
            env.advance(action)
            moments.append(_moment(env))
        start, first = env.simulator.get_info(), len(moments) - 1
        for action in actions(env, plan(task, env.state()[1])):
            now = env.advance(action)
            moments.append(_moment(env))
            if env.is_solved(task, start, now):
                solved.append((first, len(moments) - 2, task))
                break
        else:
            break
    return Recording([_drawn(env, *pair) for pair in itertools.pairwise(moments)], solved)


def _moment(env: Any) -> dict[str, Any]:
    robot_obs, scene_obs = env.state()
    stored = {"robot": env.simulator.robot.serialize(), "scene": env.simulator.scene.serialize()}
    return {"robot_obs": robot_obs, "scene_obs": scene_obs, **stored}


def _drawn(env: Any, now: dict[str, Any], then: dict[str, Any]) -> dict[str, np.ndarray]:
    simulator = env.simulator
    simulator.robot.reset_from_storage(now["robot"])
    simulator.scene.reset_from_storage(now["scene"])
    simulator.p.stepSimulation(physicsClientId=simulator.cid)
    action = np.append(then["robot_obs"][:6], then["robot_obs"][14])
    frame = {"actions": action, "robot_obs": now["robot_obs"], "scene_obs": now["scene_obs"]}
    for name in env.cameras:
        image, depth = env.draw(name)
        frame[f"rgb_{name}"] = image.transpose(1, 2, 0)
        frame[f"depth_{name}"] = depth
    return frame
