"""LIBERO's tasks (a Panda arm on MuJoCo) as gymnasium environments with RGB-D cameras and fixed states.

``libero/<suite>/<number>`` is a task in LIBERO's own order, for example ``libero/libero_spatial/0``. LIBERO
lives in an environment of its own (``vilma doctor libero``); policies are served to it.

Actions are the seven numbers in [-1, 1] of OSC_POSE: a position change (1 = 0.05 m) and a rotation change
(1 = 0.5 rad) of the end effector in the base frame, and the gripper (-1 opens, 1 closes).
"""

import contextlib
import importlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np

from vilma.extras import require

from .guest import GuestEnv
from .libero_install import STEPS, LiberoNotInstalled
from .opengl import prepare, raise_if_missing
from .options import number
from .spaces import observation_space
from .tasks import Task

gymnasium = require("gymnasium", "robot")

__all__ = ["IDLE", "STATE_KEYS", "LiberoEnv"]

STATE_KEYS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
# What lets the scene settle: nothing moves, the gripper stays open.
IDLE = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])


class LiberoEnv(GuestEnv):
    """One LIBERO simulator.

    Args:
        task: from the task table; ``make`` looks it up.
        cameras: names of the model's cameras; empty renders nothing and observes the state alone.
        size: height and width of the images in pixels.
        seed: the seed of the first ``reset``. A task has 50 fixed initial states, and a seed means one of
            them: seed % 50. With the default first seed of an evaluation, episode i starts from state i.
            Where the furniture stands is no part of a state: the seed draws it too.
        settle: idle steps after the reset, in which objects come to rest (LIBERO's own evaluation: 5); they
            do not count.
        horizon: steps of an episode, instead of LIBERO's 600.
        state_keys: robosuite's readings that make ``observation.state``, in order.
        render_cameras: when False, ``step`` returns zero images and depth and skips rendering.
        shadows: draw shadows and reflections, as the released demonstrations have them.

    Pictures are upright (LIBERO's own data sets hold them upside down). Poses are in the world. ``step``
    terminates at LIBERO's success and truncates at the horizon.
    """

    def __init__(
        self,
        task: Task,
        cameras: tuple[str, ...] = (),
        size: int = 128,
        seed: int = 0,
        *,
        settle: int = 5,
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
        self.settle = number("settle", settle, int)
        if self.settle < 0:
            raise ValueError(f"got settle={settle}, wanted 0 or more steps")
        benchmark, wrapper = _load_suite(task)
        _, suite, index = task.name.split("/")
        with contextlib.redirect_stdout(io.StringIO()):  # it tells the order of its tasks
            chosen = benchmark.get_benchmark(suite)()
        described = chosen.get_task(int(index))
        self.instruction = str(described.language)
        self.initial_states = np.asarray(chosen.get_task_init_states(int(index)), np.float64)
        try:
            self._sim_env = wrapper.ControlEnv(
                bddl_file_name=str(Path(chosen.get_task_bddl_file_path(int(index)))),
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                camera_names=list(self.cameras) or ["agentview"],
                ignore_done=True,
            )
        except Exception as error:
            raise_if_missing(error)
            raise
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)
        self._raw = self._sim_env.env._get_observations()
        self._check_state_keys()
        width = sum(np.size(self._raw[key]) for key in self.state_keys)
        self.observation_space = observation_space(self.cameras, self.size, width)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start from one of the fixed states; ``options={"render": False}`` gives zero images."""
        seed, self._first_seed = (self._first_seed if seed is None else seed), None
        super().reset(seed=seed)
        env = self._require_open()
        # It draws where the furniture stands: that must not depend on what ran before.
        env.seed(seed or 0)
        self._close_rig()
        env.reset()
        index = (int(self.np_random.integers(2**31)) if seed is None else seed) % len(self.initial_states)
        self.initial_state = index
        self._raw = env.set_init_state(self.initial_states[index])
        self._open_rig()
        for _ in range(self.settle):
            self._raw, *_ = env.step(IDLE)
        self._steps = self._held = 0
        return self.observe((options or {}).get("render", True)), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"got an action {action!r}, wanted 7 finite numbers in [-1, 1]")
        self._raw, reward, *_ = self._require_open().step(np.clip(action, -1.0, 1.0))
        return self._stepped(reward)

    def is_successful(self) -> bool:
        return bool(self._sim_env.check_success())

    def sim_state(self) -> np.ndarray:
        """The flattened simulator state ``[time, qpos, qvel]`` in float64."""
        return np.array(self._require_open().get_sim_state(), np.float64)


def _load_suite(task: Task) -> tuple[Any, Any]:
    """LIBERO's modules: the benchmarks and the environments."""
    if importlib.util.find_spec("libero") is None:
        raise LiberoNotInstalled(
            f"{task.name} needs LIBERO, which is not installed here (vilma doctor libero looks closer).\n\n"
            f"{STEPS}"
        )
    prepare()
    try:
        benchmark = importlib.import_module("libero.libero.benchmark")
        return benchmark, importlib.import_module("libero.libero.envs.env_wrapper")
    except Exception as error:
        raise_if_missing(error)
        raise
