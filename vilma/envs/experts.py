"""Scripted experts and the recording of their demonstrations.

An expert is a phase machine over privileged object poses: a proportional position command towards a target, a
yaw command towards the object's nearest face, and the gripper. It notices when its object did not come along
and tries again, so that demonstrations hold recoveries too.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .robosuite import RobosuiteEnv

__all__ = ["EXPERT_TASKS", "STARTS", "Expert", "expert", "record_episode"]

# Position and rotation of one full command, and what the gripper understands.
_METRES, _RADIANS = 0.05, 0.5
_OPEN, _CLOSE = -1.0, 1.0

# A descent that takes longer rests on something (a finger on the object).
_DESCEND_LIMIT = 40
# Steps after which a lift must show, and how far the object may fall behind the hand.
_LIFT_GRACE, _LIFT_SLACK = 5, 0.02
_RETREAT_LIMIT = 20
# Smallest distances of the tries to miss: near the object the fingers often catch it all the same.
_MISSES = (0.015, 0.03, 0.035, 0.04)


@dataclass(frozen=True)
class Law:
    """The numbers of one task's control law. Lengths in metres, limits in steps."""

    object: str
    above: float
    reach: float
    reach_z: float
    yaw: bool
    align: float = np.inf
    grasp_height: float = 0.0
    gain_inside: bool = False
    close_steps: int = 8
    lift: float = 0.12
    place: str | None = None
    place_height: float = 0.0


EXPERT_TASKS = {
    "robosuite/Lift": Law("cube", 0.08, 0.012, 0.02, yaw=True, gain_inside=True, close_steps=6),
    "robosuite/Stack": Law(
        "cubeA", 0.10, 0.01, 0.03, yaw=True, align=0.05, place="cubeB", place_height=0.045
    ),
    "robosuite/PickPlaceCan": Law(
        "Can", 0.10, 0.01, 0.03, yaw=False, grasp_height=0.015, lift=0.25, place="bin", place_height=0.10
    ),
}


def expert(task: str, env: RobosuiteEnv) -> "Expert":
    """The scripted expert of ``task`` on ``env``; ValueError when there is none."""
    if task not in EXPERT_TASKS:
        raise ValueError(f"no scripted expert for {task!r}; there is one for: {', '.join(EXPERT_TASKS)}")
    return Expert(EXPERT_TASKS[task], env)


class Expert:
    """Acts on an environment's privileged state: ``reset`` after the environment, then ``act`` each step."""

    def __init__(self, law: Law, env: RobosuiteEnv) -> None:
        self.law, self.env = law, env
        self.reset()

    def reset(self, aim: np.ndarray | None = None) -> None:
        """Start over. ``aim`` (3,) replaces the object's position: a grasp that is meant to miss."""
        self.aim = aim
        self.face: float | None = None
        self.rest_yaw = self._hand_yaw()
        self._enter("above")

    def start_lifting(self) -> None:
        """Go on from an object that is already in the hand."""
        self._read()
        self._enter_lift()

    def act(self) -> np.ndarray:
        """The command (7,) for the current state, in [-1, 1]."""
        self._read()
        self.count += 1
        return getattr(self, f"_{self.phase}")()

    def holds_object(self) -> bool:
        """Whether both fingers touch the object."""
        simulator, name = self.env.simulator, self.law.object
        model = simulator.objects[simulator.object_id] if name == "Can" else getattr(simulator, name)
        return bool(simulator._check_grasp(gripper=simulator.robots[0].gripper, object_geoms=model))

    def _above(self) -> np.ndarray:
        error = self.object + [0.0, 0.0, self.law.above] - self.hand
        turn = self._yaw_error() if self.law.yaw else 0.0
        near = np.linalg.norm(error[:2]) < self.law.reach and abs(error[2]) < self.law.reach_z
        if near and abs(turn) < self.law.align:
            self._enter("descend")
        return _command(error, turn, _OPEN)

    def _descend(self) -> np.ndarray:
        error = self.object + [0.0, 0.0, self.law.grasp_height] - self.hand
        turn = self._yaw_error() if self.law.yaw else 0.0
        command = _command(0.7 * error if self.law.gain_inside else error, turn, _OPEN)
        if not self.law.gain_inside:
            command[:3] *= 0.7
        if np.linalg.norm(error) < 0.012:
            self._enter("grasp")
        elif self.count > _DESCEND_LIMIT:
            if self.law.yaw:
                self._choose_other_face(turn)
            self._enter("above")
        return command

    def _grasp(self) -> np.ndarray:
        error = self.object - self.hand if self.law.gain_inside else np.zeros(3)
        if self.count > self.law.close_steps:
            self._enter_lift()
        return _command(error, 0.0, _CLOSE)

    def _lift(self) -> np.ndarray:
        error = np.array([0.0, 0.0, self.lift_height - self.hand[2]])
        if not self._retry_if_lost() and self.law.place is not None and abs(error[2]) < 0.02:
            self._enter("carry")
        return _command(error, 0.0, _CLOSE)

    def _carry(self) -> np.ndarray:
        goal = self._place() - (self.object - self.hand)
        error = np.array([*(goal - self.hand)[:2], self.lift_height - self.hand[2]])
        if not self._retry_if_lost() and np.linalg.norm(error[:2]) < 0.008:
            self._enter("lower")
        return _command(error, 0.0, _CLOSE)

    def _lower(self) -> np.ndarray:
        error = self._place() - self.object
        command = _command(error, 0.0, _CLOSE)
        command[:3] *= 0.7
        if not self._retry_if_lost() and abs(error[2]) < 0.01:
            self._enter("release")
        return command

    def _release(self) -> np.ndarray:
        if self.count > 5:
            self._enter("retreat")
        return _command(np.zeros(3), 0.0, _OPEN)

    def _retreat(self) -> np.ndarray:
        if self.count > _RETREAT_LIMIT:
            self._enter("above")
        return _command(np.array([0.0, 0.0, _METRES]), 0.0, _OPEN)

    def _read(self) -> None:
        raw = self.env.privileged()
        self.hand = np.asarray(raw["robot0_eef_pos"], np.float64)
        position = np.asarray(raw[f"{self.law.object}_pos"], np.float64)
        self.object = position if self.aim is None else self.aim
        self.behind = float(np.linalg.norm(position - self.hand))

    def _enter(self, phase: str) -> None:
        self.phase, self.count = phase, 0

    def _enter_lift(self) -> None:
        self.lift_height = self.hand[2] + self.law.lift
        self.grasp_distance = self.behind
        self._enter("lift")

    def _retry_if_lost(self) -> bool:
        grace = self.phase == "lift" and self.count <= _LIFT_GRACE
        lost = not grace and self.behind > self.grasp_distance + _LIFT_SLACK
        if lost:
            self._enter("above")
        return lost

    def _place(self) -> np.ndarray:
        if self.law.place == "bin":
            simulator = self.env.simulator
            spot = simulator.target_bin_placements[simulator.object_to_id["can"]]
        else:
            spot = self.env.privileged()[f"{self.law.place}_pos"]
        return np.asarray(spot, np.float64) + [0.0, 0.0, self.law.place_height]

    def _yaw_error(self) -> float:
        """From the hand's yaw to that of the object's nearest face, within pi/4, or of the chosen face."""
        turn = self._object_yaw() - self._hand_yaw()
        if self.face is None:
            return _wrap(turn, np.pi / 2)
        return _wrap(turn + self.face, 2 * np.pi)

    def _choose_other_face(self, turn: float) -> None:
        """After a finger met an obstacle: a quarter turn on, towards the hand's yaw at rest."""
        hand = self._hand_yaw()
        away = _wrap(hand + turn - self.rest_yaw, 2 * np.pi)
        goal = hand + turn - np.copysign(np.pi / 2, away)
        quarters = np.round((goal - self._object_yaw()) / (np.pi / 2))
        self.face = float(quarters * np.pi / 2)

    def _object_yaw(self) -> float:
        x, y, z, w = self.env.privileged()[f"{self.law.object}_quat"]
        return float(np.arctan2(2 * (x * y + z * w), 1 - 2 * (y * y + z * z)))

    def _hand_yaw(self) -> float:
        rotation = self.env.eef_rotation()
        return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def _wrap(angle: float, period: float) -> float:
    """The angle within half a period of zero that differs by whole periods."""
    return float((angle + period / 2) % period - period / 2)


def _command(error: np.ndarray, turn: float, gripper: float) -> np.ndarray:
    action = np.zeros(7)
    action[:3] = np.clip(error / _METRES, -1.0, 1.0)
    action[5] = np.clip(turn / _RADIANS, -1.0, 1.0)
    action[6] = gripper
    return action


# How a demonstration begins, before its first recorded step: "plain" with nothing, "missed" with a grasp
# beside the object, "moved" with a drive to a random place, the gripper open or closed.
STARTS = ("plain", "missed", "moved")


def record_episode(
    env: RobosuiteEnv, demonstrator: Expert, seed: int, start: str = "plain", noise: float = 0.4
) -> dict[str, Any] | None:
    """One demonstration, or None when the expert did not succeed within the horizon.

    The commands that are executed carry noise: its scale is drawn per episode from U(0, ``noise``) for the
    position and is a fifth of that for the rotation, and each draw is held for three steps. The commands that
    are stored are the expert's own: noise spreads the states, not the labels.

    Returns ``actions`` (T, 7) float64, ``states`` (T, S) float64, ``rewards`` and ``dones`` (T,), ``obs``:
    for each camera ``_image`` (T, H, W, 3) uint8, ``_depth`` (T, H, W, 1) float32 metres, ``_intrinsic``
    (T, 3, 3), ``_extrinsic`` (T, 4, 4) float32; the robot's readings; ``object``, the privileged state.
    """
    rng = np.random.default_rng([seed, STARTS.index(start)])
    env.reset(seed=seed, options={"render": False})
    demonstrator.reset()
    if start == "missed":
        _miss_a_grasp(env, demonstrator, rng, seed)
    elif start == "moved":
        _move_away(env, rng)
        demonstrator.reset()

    sigma = rng.uniform(0.0, noise) * np.array([1.0, 1.0, 1.0, 0.2, 0.2, 0.2])
    rows: dict[str, list] = {"actions": [], "states": [], "rewards": [], "dones": []}
    observations: list[dict[str, np.ndarray]] = []
    observation, ended, success = env.observe(), False, False
    while not ended:
        action = demonstrator.act()
        observations.append(_stored_observation(env, observation))
        rows["actions"].append(action)
        rows["states"].append(env.sim_state())
        if (len(observations) - 1) % 3 == 0:
            drift = sigma * rng.standard_normal(6)
        executed = np.append(np.clip(action[:6] + drift, -1.0, 1.0), action[6])
        observation, reward, success, truncated, _ = env.step(executed)
        ended = success or truncated
        rows["rewards"].append(reward)
        rows["dones"].append(int(ended))
    if not success:
        return None
    recording: dict[str, Any] = {key: np.asarray(values) for key, values in rows.items()}
    recording["obs"] = {key: np.stack([row[key] for row in observations]) for key in observations[0]}
    return recording


_STORED = ("eef_pos", "eef_quat", "eef_rot6d", "gripper_qpos", "gripper_qvel", "joint_pos", "joint_vel")


def _stored_observation(env: RobosuiteEnv, observation: dict[str, Any]) -> dict[str, np.ndarray]:
    stored = {}
    for camera in env.cameras:
        stored[f"{camera}_image"] = observation[f"observation.images.{camera}"].transpose(1, 2, 0)
        stored[f"{camera}_depth"] = observation[f"observation.depth.{camera}"][..., None]
        stored[f"{camera}_intrinsic"] = observation[f"observation.intrinsics.{camera}"]
        stored[f"{camera}_extrinsic"] = observation[f"observation.pose.{camera}"]
    readings = env.proprioception()
    stored |= {f"robot0_{name}": np.asarray(readings[f"robot0_{name}"], np.float64) for name in _STORED}
    stored["object"] = np.asarray(env.privileged()["object-state"], np.float64)
    return stored


def _miss_a_grasp(env: RobosuiteEnv, demonstrator: Expert, rng: np.random.Generator, seed: int) -> None:
    """Grasp 1.5 to 4.5 cm beside the object and stop somewhere between closing and lifting."""
    for nearest in _MISSES:
        env.reset(seed=seed, options={"render": False})
        position = np.asarray(env.privileged()[f"{demonstrator.law.object}_pos"], np.float64)
        angle, radius = rng.uniform(0.0, 2 * np.pi), rng.uniform(nearest, 0.045)
        demonstrator.reset(aim=position + radius * np.array([np.cos(angle), np.sin(angle), 0.0]))
        last_step = rng.integers(1, 9)
        for _ in range(60):
            env.advance(demonstrator.act())
            if demonstrator.phase == "lift" and demonstrator.count >= last_step:
                break
        demonstrator.reset()
        if not demonstrator.holds_object():
            return
    demonstrator.start_lifting()


def _move_away(env: RobosuiteEnv, rng: np.random.Generator) -> None:
    """Drive 8 to 15 steps to a place around the rest pose, turning, with the gripper open or closed."""
    rest = np.asarray(env.privileged()["robot0_eef_pos"], np.float64)
    target = rest + rng.uniform([-0.15, -0.15, -0.12], [0.15, 0.15, 0.05])
    turn, gripper = rng.uniform(-0.1, 0.1), rng.choice([_OPEN, _CLOSE])
    for _ in range(rng.integers(8, 16)):
        hand = np.asarray(env.privileged()["robot0_eef_pos"], np.float64)
        env.advance(_command(target - hand, turn, gripper))
