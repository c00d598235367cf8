"""MetaWorld's 50 tasks (a Sawyer arm on MuJoCo) as gymnasium environments with RGB-D cameras.

Actions are four numbers in [-1, 1]: a position change of the hand (1 = 0.01 m) and the gripper (1 closes).
The cameras are MetaWorld's own; ``corner2`` hangs upside down, and so do its pictures (their pose says so).
"""

import importlib
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, ClassVar

import numpy as np

from vilma.extras import require

from .mujoco_cameras import CameraRig
from .opengl import prepare, raise_if_missing
from .options import flag, names, number
from .spaces import observation_space
from .tasks import Task

gymnasium = require("gymnasium", "metaworld")

__all__ = ["MetaWorldEnv", "ScriptedPolicy"]

# Where the simulator's whole state lies in an observation, for scripted policies: LeRobot's name for it.
PRIVILEGED = "observation.environment_state"


class MetaWorldEnv(gymnasium.Env):
    """One MetaWorld simulator.

    Args:
        task: from the task table; ``make`` looks it up.
        cameras: names of the model's cameras; empty renders nothing and observes the state alone.
        size: height and width of the images in pixels.
        seed: the seed of the first ``reset``. A seed draws where objects and goal are, over the ranges of
            MetaWorld's own benchmarks; ``reset(seed=s)`` reproduces an episode whatever ran before it.
        render_cameras: when False, ``step`` returns zero images and depth and skips rendering.
        privileged: add ``observation.environment_state`` (39,): MetaWorld's own observation, with the places
            of objects and of the goal. For scripted policies, never for a learned one.
        shadows: draw shadows and reflections.

    ``observation.state`` (4,) is what the robot knows of itself: the hand's position in metres and the
    opening of the gripper in [0, 1]. ``step`` terminates at success and truncates at ``task.horizon``.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        task: Task,
        cameras: tuple[str, ...] = (),
        size: int = 84,
        seed: int = 0,
        *,
        render_cameras: bool = True,
        privileged: bool = False,
        shadows: bool = True,
    ) -> None:
        self.size = number("size", size, int)
        if self.size < 1:
            raise ValueError(f"got an image size of {size}, wanted at least 1 pixel")
        self.task, self.cameras = task, names("cameras", cameras)
        self.render_cameras = flag("render_cameras", render_cameras)
        self.privileged = flag("privileged", privileged)
        shadows = flag("shadows", shadows)
        self._first_seed: int | None = None if seed is None else number("seed", seed, int)
        self.render_mode = "rgb_array"
        prepare()
        try:
            suite = require("metaworld", "metaworld")
        except Exception as error:
            raise_if_missing(error)
            raise
        name = task.name.partition("/")[2]
        self._env = suite.env_dict.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-goal-observable"](seed=0)
        # New places in every episode, drawn from its seed.
        self._env._freeze_rand_vec, self._env.seeded_rand_vec = False, True
        self._rig: CameraRig | None = None
        if self.cameras:
            self._rig = CameraRig(self._env.model, self.size, shadows=shadows)
            self._rig.show_sites((0,))  # the goal is a site
            self._rig.check(self.cameras, task.name)
        self._raw = np.zeros(39)
        self._steps = self._held = 0
        others = {PRIVILEGED: 39} if self.privileged else None
        self.observation_space = observation_space(self.cameras, self.size, 4, others)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start an episode; ``options={"render": False}`` gives zero images, for a start that nobody sees."""
        seed, self._first_seed = (self._first_seed if seed is None else seed), None
        super().reset(seed=seed)
        if seed is not None:
            self._env.seed(seed)
        self._raw, _ = self._env.reset()
        self._steps = self._held = 0
        return self.observe((options or {}).get("render", True)), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        action = np.asarray(action, np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"got an action {action!r}, wanted 4 finite numbers in [-1, 1]")
        self._raw, reward, _, _, info = self._env.step(np.clip(action, -1.0, 1.0).astype(np.float32))
        self._steps += 1
        self._held = self._held + 1 if info["success"] else 0
        success = self._held >= self.task.hold
        truncated = not success and self._steps >= self.task.horizon
        return self.observe(self.render_cameras), float(reward), success, truncated, {"success": success}

    def observe(self, render: bool = True) -> dict[str, Any]:
        """The current observation; with ``render=False`` images and depth are zero."""
        observation: dict[str, Any] = {}
        if self._rig is not None:
            observation |= self._rig.observe(self._env.data, self.cameras, render)
        observation["observation.state"] = self._raw[:4].astype(np.float32)
        if self.privileged:
            observation[PRIVILEGED] = self._raw.astype(np.float32)
        observation["task"] = self.task.instruction
        return observation

    def render(self) -> np.ndarray:
        """An RGB picture (H, W, 3) uint8 of the current state, from the first camera."""
        if self._rig is None:
            raise ValueError("this environment was made without cameras, so it cannot render")
        image, _ = self._rig.frame(self._env.data, self.cameras[0])
        return np.ascontiguousarray(image.transpose(1, 2, 0))

    @property
    def simulator(self) -> Any:
        """The MetaWorld environment behind this one."""
        return self._env

    def close(self) -> None:
        if self._rig is not None:
            self._rig.close()
        self._env.close()


class ScriptedPolicy:
    """MetaWorld's scripted policy of a task, for ``vilma.evaluation``: ``vilma eval metaworld/... expert``.

    It acts on ``observation.environment_state``, so its environment is made with ``privileged=True``.
    """

    def __init__(self, task: Task):
        require("metaworld", "metaworld")
        policies = importlib.import_module("metaworld.policies").ENV_POLICY_MAP
        self._policy = policies[task.name.partition("/")[2]]()
        self.facts: dict[str, Any] = {
            "policy": {"type": "scripted", "checkpoint": metadata.version("metaworld")},
            "cameras": [],
            "image_size": {},
            "state_keys": None,
            "environment": {"privileged": True},
        }

    def select_action(self, obs: Mapping[str, Any]) -> np.ndarray:
        states = np.asarray(obs[PRIVILEGED], np.float64)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it exceeds [-1, 1]
            return np.stack([np.clip(self._policy.get_action(state), -1, 1) for state in states])

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Nothing to forget: it acts on the state alone."""

    def needs_observation(self, n: int) -> list[bool]:
        return [False] * n

    def check_compatible(self, source: Mapping[str, Any], name: str = "the data") -> None:
        """It belongs to its task."""
