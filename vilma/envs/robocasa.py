"""RoboCasa's kitchens (a PandaOmron on MuJoCo) as gymnasium environments with RGB-D cameras.

Both registries: ``robocasa/<Task>`` needs RoboCasa 0.1 or 0.2, ``robocasa365/<Task>`` 1.x. Each lives in an
environment of its own (``vilma doctor robocasa``); policies are served to it.

A PandaOmron takes twelve numbers in [-1, 1]: arm 6 (OSC_POSE, 1 = 0.05 m or 0.5 rad, in the frame of its
base), gripper 1 (1 closes), base and torso 4, and the mode (1 drives, -1 lets the arm move). With a base that
stays, an action is the first seven of them.
"""

import importlib
import random
from typing import Any

import numpy as np

from vilma.extras import require

from .guest import GuestEnv
from .opengl import prepare, raise_if_missing
from .replay import BASE_SITE
from .robocasa_install import STEPS, RoboCasaNotInstalled, installed_version
from .spaces import observation_space
from .suite_tables import ROBOCASA_RENAMED, ROBOCASA_SCENES
from .tasks import Task

gymnasium = require("gymnasium", "robot")

__all__ = ["FIXED_BASE", "STATE_KEYS", "RoboCasaEnv", "full_action"]

STATE_KEYS = ("robot0_base_to_eef_pos", "robot0_base_to_eef_quat", "robot0_gripper_qpos")
# What is appended to seven numbers: the base and the torso rest, and the arm moves.
FIXED_BASE = np.array([0.0, 0.0, 0.0, 0.0, -1.0])


class RoboCasaEnv(GuestEnv):
    """One RoboCasa simulator.

    Args:
        task: from the task table; ``make`` looks it up.
        cameras: names of the model's cameras; empty renders nothing and observes the state alone.
        size: height and width of the images in pixels.
        seed: the seed of the first ``reset``; it draws kitchen, objects and places.
        base: "fixed" takes seven numbers, "mobile" all twelve.
        scenes: [layout, style] pairs to draw kitchens from; by default those that RoboCasa evaluates in,
            which no demonstration has seen: five pairs in 0.2, ten in 1.x.
        instances: which objects: by default those kept for evaluation ("B" in 0.2, "target" in 1.x).
        horizon: steps of an episode, instead of the task's (X-IL and PointMapPolicy: 400).
        state_keys: RoboCasa's readings that make ``observation.state``, in order.
        render_cameras: when False, ``step`` returns zero images and depth and skips rendering.
        shadows: draw shadows and reflections, as the released demonstrations have them.

    Poses and points are in the frame of the mobile base (site ``mobilebase0_center``). ``step`` terminates
    when success was held for ``task.hold`` steps (the published protocol: eleven), truncates at the horizon.
    """

    def __init__(
        self,
        task: Task,
        cameras: tuple[str, ...] = (),
        size: int = 128,
        seed: int = 0,
        *,
        base: str = "fixed",
        scenes: tuple[tuple[int, int], ...] | None = None,
        instances: str | None = None,
        horizon: int | None = None,
        state_keys: tuple[str, ...] = STATE_KEYS,
        render_cameras: bool = True,
        shadows: bool = True,
    ) -> None:
        super().__init__(
            task,
            cameras,
            size,
            seed,
            horizon=horizon,
            state_keys=state_keys,
            render_cameras=render_cameras,
            shadows=shadows,
        )
        if base not in ("fixed", "mobile"):
            raise ValueError(f"got base={base!r}, wanted fixed or mobile")
        self.base = base
        state_size = sum(map(_width, self.state_keys))
        modern = task.suite == "robocasa365"
        suite = _load_suite(task, modern)
        pairs = _scenes(scenes, modern)
        try:
            self._sim_env = suite.make(
                env_name=task.name.partition("/")[2],
                robots="PandaOmron",
                controller_configs=suite.load_composite_controller_config(
                    controller=None, robot="PandaOmron"
                ),
                camera_names=list(self.cameras) or ["robot0_agentview_center"],
                camera_widths=self.size,
                camera_heights=self.size,
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                use_object_obs=True,
                ignore_done=True,
                translucent_robot=False,
                layout_and_style_ids=pairs,
                obj_instance_split=instances or ("target" if modern else "B"),
                seed=self._first_seed,
            )
        except Exception as error:
            raise_if_missing(error)
            raise
        size_of_action = 7 if base == "fixed" else 12
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (size_of_action,), np.float32)
        self.observation_space = observation_space(self.cameras, self.size, state_size)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Build a new kitchen; ``options={"render": False}`` gives zero images, for a start nobody sees."""
        seed, self._first_seed = (self._first_seed if seed is None else seed), None
        super().reset(seed=seed)
        sim_env = self._require_open()
        if seed is not None:
            # Samplers hold this generator by reference: its state is replaced, not the object.
            sim_env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
            # Some of RoboCasa's fixtures draw from the global generators.
            np.random.seed(seed % 2**32)
            random.seed(seed)
        self._close_rig()
        self._raw = sim_env.reset()
        self.instruction = str(sim_env.get_ep_meta().get("lang", ""))
        self._open_rig()
        self._check_state_keys()
        self._steps = self._held = 0
        return self.observe((options or {}).get("render", True)), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self._raw, reward, _, _ = self._require_open().step(full_action(action, self.base))
        return self._stepped(reward)

    def is_successful(self) -> bool:
        return bool(self._sim_env._check_success())

    def reference_pose(self) -> np.ndarray:
        return self.base_pose()

    def base_pose(self) -> np.ndarray:
        """(4, 4) mobile base -> world."""
        site, pose = self._sim_env.sim.data._data.site(BASE_SITE), np.eye(4)
        pose[:3, :3], pose[:3, 3] = site.xmat.reshape(3, 3), site.xpos
        return pose

    def sim_state(self) -> np.ndarray:
        """The flattened simulator state ``[time, qpos, qvel]`` in float64."""
        return np.array(self._require_open().sim.get_state().flatten(), np.float64)


def _width(key: str) -> int:
    """How many numbers a reading of the robot has; the model that would tell is built at the first reset."""
    if "_joint_" in key:  # positions, their cosines and sines, velocities, accelerations
        return 7
    for ends, width in ((("gripper_qpos", "gripper_qvel"), 2), (("_quat", "_quat_site"), 4), (("_pos",), 3)):
        if key.endswith(ends):
            return width
    raise ValueError(f"unknown state key {key!r}; for example: {', '.join(STATE_KEYS)}")


def full_action(action: np.ndarray, base: str = "fixed") -> np.ndarray:
    """The twelve numbers that a PandaOmron takes, from seven (fixed base) or all of them (mobile)."""
    action = np.asarray(action, np.float64)
    wanted = 7 if base == "fixed" else 12
    if action.shape != (wanted,) or not np.isfinite(action).all():
        raise ValueError(f"got an action {action!r}, wanted {wanted} finite numbers in [-1, 1] ({base} base)")
    action = np.clip(action, -1.0, 1.0)
    return np.concatenate([action, FIXED_BASE]) if base == "fixed" else action


def _scenes(scenes: Any, modern: bool) -> list[tuple[int, int]]:
    if scenes is None:
        return [(i, i) for i in range(1, 11)] if modern else list(ROBOCASA_SCENES)
    try:
        return [(int(layout), int(style)) for layout, style in scenes]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"got scenes={scenes!r}, wanted pairs of layout and style: [[1, 1], [2, 2]]"
        ) from error


def _load_suite(task: Task, modern: bool) -> Any:
    """Import robosuite with RoboCasa's tasks in it, after looking whether they are those that are meant."""
    version = installed_version()
    if version is None:
        raise RoboCasaNotInstalled(
            f"{task.name} needs RoboCasa, which is not installed here (vilma doctor robocasa looks closer)."
            f"\n\n{STEPS}"
        )
    if version[0].isdecimal() and (int(version.split(".")[0]) >= 1) != modern:
        name = task.name.partition("/")[2]
        other = f"robocasa365/{ROBOCASA_RENAMED.get(name, name)}" if not modern else f"robocasa/{name}"
        raise RoboCasaNotInstalled(
            f"{task.name} is a task of RoboCasa {'1.x' if modern else '0.1 and 0.2'}, but {version} is "
            f"installed; what comes nearest there is {other}: another benchmark, other scenes and horizons"
        )
    prepare()
    try:
        suite = importlib.import_module("robosuite")
        importlib.import_module("robocasa")
    except AssertionError as error:  # it asserts the versions of mujoco and numpy
        raise RoboCasaNotInstalled(
            f"RoboCasa refuses its neighbours: {error}; see vilma doctor robocasa"
        ) from error
    except Exception as error:
        raise_if_missing(error)
        raise
    return suite
