"""What environments share whose suite brings its own robosuite (RoboCasa, LIBERO).

A subclass builds the suite's environment as ``_sim_env``, keeps its newest readings in ``_raw`` and the
instruction in ``instruction``, and says when it is successful.
"""

from typing import Any, ClassVar

import numpy as np

from vilma.extras import require

from .mujoco_cameras import CameraRig
from .options import flag, names, number
from .tasks import Task

gymnasium = require("gymnasium", "robot")

__all__ = ["GuestEnv"]

_COLLISION_GROUP = 0


class GuestEnv(gymnasium.Env):
    """Options that all of them take, checked, and everything that does not differ between them.

    Raises ValueError for options of the wrong kind.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        task: Task,
        cameras: tuple[str, ...],
        size: int,
        seed: int | None,
        *,
        horizon: int | None,
        state_keys: tuple[str, ...],
        render_cameras: bool,
        shadows: bool,
    ) -> None:
        self.size = number("size", size, int)
        self.horizon = task.horizon if horizon is None else number("horizon", horizon, int)
        if self.size < 1:
            raise ValueError(f"got an image size of {size}, wanted at least 1 pixel")
        if self.horizon < 1:
            raise ValueError(f"got a horizon of {horizon}, wanted at least 1 step")
        self.task, self.cameras = task, names("cameras", cameras)
        self.state_keys = names("state_keys", state_keys)
        self.render_cameras = flag("render_cameras", render_cameras)
        self._shadows = flag("shadows", shadows)
        self._first_seed: int | None = None if seed is None else number("seed", seed, int)
        self.render_mode = "rgb_array"
        self._rig: CameraRig | None = None
        self._sim_env: Any = None
        self._steps = self._held = 0

    def is_successful(self) -> bool:
        """Whether the suite calls the present state a success, however short."""
        raise NotImplementedError

    def reference_pose(self) -> np.ndarray | None:
        """(4, 4) the frame of the poses -> world; None for the world itself."""
        return None

    def observe(self, render: bool = True) -> dict[str, Any]:
        """The current observation; with ``render=False`` images and depth are zero."""
        observation: dict[str, Any] = {}
        if self._rig is not None:
            data = self._sim_env.sim.data._data
            observation |= self._rig.observe(data, self.cameras, render, self.reference_pose())
        state = [np.atleast_1d(self._raw[key]) for key in self.state_keys]
        observation["observation.state"] = np.concatenate([np.zeros(0), *state]).astype(np.float32)
        observation["task"] = self.instruction
        return observation

    def render(self) -> np.ndarray:
        """An RGB picture (H, W, 3) uint8 of the current state, from the first camera."""
        if self._rig is None:
            raise ValueError("this environment was made without cameras (or not reset yet): it cannot render")
        image, _ = self._rig.frame(self._sim_env.sim.data._data, self.cameras[0])
        return np.ascontiguousarray(image.transpose(1, 2, 0))

    @property
    def simulator(self) -> Any:
        """The suite's own environment behind this one."""
        return self._require_open()

    def close(self) -> None:
        self._close_rig()
        if self._sim_env is not None:
            self._sim_env.close()
        self._sim_env = None

    def _stepped(self, reward: float) -> tuple[dict, float, bool, bool, dict]:
        """What ``step`` returns, after the suite has taken the action."""
        self._steps += 1
        self._held = self._held + 1 if self.is_successful() else 0
        success = self._held >= self.task.hold
        truncated = not success and self._steps >= self.horizon
        return self.observe(self.render_cameras), float(reward), success, truncated, {"success": success}

    def _open_rig(self) -> None:
        """The cameras of the model that the suite has just built."""
        if self.cameras:
            model = self._sim_env.sim.model._model
            groups = (_COLLISION_GROUP,)
            self._rig = CameraRig(model, self.size, hidden_groups=groups, shadows=self._shadows)
            self._rig.check(self.cameras, self.task.name)

    def _close_rig(self) -> None:
        if self._rig is not None:
            self._rig.close()
        self._rig = None

    def _check_state_keys(self) -> None:
        for key in self.state_keys:
            if key not in self._raw:
                known = ", ".join(k for k in self._raw if k.startswith("robot0_"))
                raise ValueError(f"unknown state key {key!r}; the robot reads: {known}")

    def _require_open(self) -> Any:
        if self._sim_env is None:
            raise RuntimeError("this environment is closed; make a new one")
        return self._sim_env
