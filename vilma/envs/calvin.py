"""CALVIN's table as a gymnasium environment: one episode is one chain of the long-horizon protocol.

The simulator is the public calvin_env on PyBullet, which the user brings (``vilma doctor calvin``); none of
its code is here. Actions are CALVIN's relative ones, seven numbers in [-1, 1]: a change of position (1 =
0.02 m) and of Euler angles (1 = 0.05 rad) of the tool's target in the world frame, and the gripper (at least
0 opens, below closes).
"""

import contextlib
import importlib
import io
import os
import string
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vilma.extras import require

from . import calvin_protocol as protocol
from .calvin_install import STEPS, CalvinNotInstalled, find_source
from .calvin_protocol import INSTRUCTIONS, SUBTASK_STEPS
from .tasks import Task

gymnasium = require("gymnasium", "robot")

__all__ = ["CalvinEnv"]

CAMERAS = ("static", "gripper")
RENDERERS = ("auto", "egl", "tiny")


class CalvinEnv(gymnasium.Env):
    """One simulator of CALVIN, scene A, B, C or D.

    ``reset(seed=i)`` starts chain i of the protocol (modulo their number): the scene is set from its initial
    state, and ``task`` in the observation is the first instruction. At the step that solves a task the reward
    is 1, and the observation, with pictures in any case, has the next instruction: the scene stays as it is.
    The episode terminates after the last task (``info["success"]``) and truncates when a task is not solved
    within ``subtask_steps``. Episodes are deterministic.

    Args:
        task: from the task table; ``make`` looks it up.
        cameras: of ``static`` (200 x 200, fixed) and ``gripper`` (84 x 84, on the hand).
        size: height and width of every picture; None keeps CALVIN's own.
        seed: the chain of the first ``reset``.
        source: the clone of calvin_env, by default ``$CALVIN_ENV`` or the installed one.
        renderer: ``egl`` draws with OpenGL, as the released pictures were; ``tiny`` is PyBullet's software
            renderer, whose pictures look a little different; ``auto`` is egl where there is an NVIDIA GPU.
        chains: a JSON file with other chains (`vilma.envs.calvin_protocol.load_chains`).
        subtask_steps: control steps for one task.
        render_cameras: when False, ``step`` skips the pictures (zeros), except when a task was just solved.

    One simulator a process: with EGL, PyBullet's plugin belongs to the process.

    Raises:
        CalvinNotInstalled: it or a package of its is missing; the message has the steps.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        task: Task,
        cameras: tuple[str, ...] = CAMERAS,
        size: int | None = None,
        seed: int = 0,
        *,
        source: str | Path | None = None,
        renderer: str = "auto",
        chains: str | Path | None = None,
        subtask_steps: int = SUBTASK_STEPS,
        render_cameras: bool = True,
    ) -> None:
        unknown = [camera for camera in cameras if camera not in CAMERAS]
        if unknown:
            raise ValueError(f"CALVIN has the cameras {', '.join(CAMERAS)}, not {', '.join(unknown)}")
        if size is not None and size < 1:
            raise ValueError(f"got an image size of {size}, wanted at least 1 pixel")
        if int(subtask_steps) < 1:
            raise ValueError(f"got {subtask_steps} steps for a task, wanted at least 1")
        self.task, self.cameras = task, tuple(cameras)
        self.subtask_steps, self.render_cameras = int(subtask_steps), render_cameras
        self.render_mode = "rgb_array"
        self.renderer = resolve_renderer(renderer)
        self._chains = protocol.chains() if chains is None else protocol.load_chains(chains)
        self._first: int | None = seed
        scene = task.name.split("/")[1]
        self.simulator, self._oracle = _build(find_source(source), scene, self.renderer == "egl")
        self._cameras = {camera.name: camera for camera in self.simulator.cameras}
        self.simulator.cameras = []  # pictures are drawn here, and only when somebody looks
        for name, camera in self._cameras.items():
            if size is not None:
                camera.width = camera.height = size
            if camera.width != camera.height:
                raise ValueError(f"camera {name} is not square; its intrinsics would be wrong")
        self._poses = {camera: np.eye(4, dtype=np.float32) for camera in self.cameras}
        self.tasks: tuple[str, ...] = ()
        self._number = self._steps = 0
        self._build_spaces()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start chain ``seed``; ``options`` may give another ``robot_obs`` and ``scene_obs``."""
        seed, self._first = (self._first if seed is None else seed), None
        super().reset(seed=seed)
        number = int(self.np_random.integers(len(self._chains))) if seed is None else seed % len(self._chains)
        condition, self.tasks = self._chains[number]
        robot, scene = protocol.initial_state(condition)
        options = options or {}
        self.place(options.get("robot_obs", robot), options.get("scene_obs", scene))
        self._number = self._steps = 0
        self._start = self.simulator.get_info()
        return self.observe(), {"success": False, "chain": number, "solved": 0}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        info = self.advance(action)
        self._steps += 1
        solved = self.is_solved(self.tasks[self._number], self._start, info)
        finished = solved and self._number + 1 == len(self.tasks)
        truncated = not solved and self._steps >= self.subtask_steps
        if solved:
            self._number += 1
            self._steps, self._start = 0, info
        observation = self.observe(render=self.render_cameras or (solved and not finished))
        return (
            observation,
            float(solved),
            finished,
            truncated,
            {"success": finished, "solved": self._number},
        )

    def place(self, robot_obs: np.ndarray, scene_obs: np.ndarray) -> None:
        """Put arm (15,) and scene (24,) into this state and let one step of the physics pass."""
        self.simulator.robot.gripper_action = 1 if robot_obs[14] >= 0 else -1
        self.simulator.reset(robot_obs=np.asarray(robot_obs), scene_obs=np.asarray(scene_obs))

    def advance(self, action: np.ndarray) -> dict[str, Any]:
        """One control step outside the bookkeeping of a chain; the simulator's own information."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"got an action {action}, wanted seven finite numbers")
        action = np.append(np.clip(action[:6], -1, 1), 1.0 if action[6] >= 0 else -1.0)
        return self.simulator.step(action)[3]

    def is_solved(self, task: str, start: dict[str, Any], now: dict[str, Any]) -> bool:
        """What the 34-task oracle says of a change from ``start`` to ``now`` (see `advance`)."""
        return bool(self._oracle.get_task_info_for_set(start, now, {task}))

    def solved_tasks(self, start: dict[str, Any], now: dict[str, Any]) -> set[str]:
        """Every task of the oracle that this change solves."""
        return set(self._oracle.get_task_info(start, now))

    def state(self) -> tuple[np.ndarray, np.ndarray]:
        """``robot_obs`` (15,) and ``scene_obs`` (24,), float64."""
        found = self.simulator.get_state_obs()
        return found["robot_obs"], found["scene_obs"]

    def observe(self, render: bool = True) -> dict[str, Any]:
        """The current observation; with ``render=False`` zeros for pictures, and the last poses."""
        observation: dict[str, Any] = {}
        for name in self.cameras:
            image, depth = self.draw(name) if render else self._blank(name)
            observation[f"observation.images.{name}"] = image
            observation[f"observation.depth.{name}"] = depth
            observation[f"observation.intrinsics.{name}"] = self.intrinsics(name)
            observation[f"observation.pose.{name}"] = self._poses[name]
        observation["observation.state"] = self.state()[0].astype(np.float32)
        task = self.tasks[min(self._number, len(self.tasks) - 1)] if self.tasks else ""
        observation["task"] = INSTRUCTIONS.get(task, task)
        return observation

    def draw(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A picture (3, H, W) uint8 and its depth (H, W) float32 in metres along the axis; sets the pose."""
        camera = self._cameras[name]
        image, depth = camera.render()
        view = camera.view_matrix if name == "gripper" else camera.viewMatrix
        # PyBullet's matrix is world -> camera, by columns, in OpenGL's axes (y up, z backward).
        pose = np.linalg.inv(np.array(view).reshape(4, 4).T) @ np.diag([1.0, -1.0, -1.0, 1.0])
        self._poses[name] = pose.astype(np.float32)
        # Nothing was hit where the buffer is at its far end.
        depth = np.where(depth < camera.farval * (1 - 1e-6), depth, 0).astype(np.float32)
        return np.ascontiguousarray(image.transpose(2, 0, 1)), depth

    def intrinsics(self, name: str) -> np.ndarray:
        """(3, 3) float32 pinhole matrix in pixels; pixel centres lie at +0.5."""
        camera = self._cameras[name]
        focal = camera.height / (2 * np.tan(np.deg2rad(camera.fov) / 2))
        return np.array([[focal, 0, camera.width / 2], [0, focal, camera.height / 2], [0, 0, 1]], np.float32)

    def pose(self, name: str) -> np.ndarray:
        """(4, 4) float32 camera -> world, OpenCV axes, at the last picture."""
        return self._poses[name]

    def render(self) -> np.ndarray:
        """An RGB picture (H, W, 3) uint8 of the static camera."""
        return np.ascontiguousarray(self.draw("static")[0].transpose(1, 2, 0))

    def close(self) -> None:
        if self.simulator is not None:
            with _quiet():
                self.simulator.close()
            self.simulator.close = lambda: None  # its destructor would say goodbye a second time
            self.simulator = None

    def _blank(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        camera = self._cameras[name]
        size = (camera.height, camera.width)
        return np.zeros((3, *size), np.uint8), np.zeros(size, np.float32)

    def _build_spaces(self) -> None:
        box, unbounded = gymnasium.spaces.Box, (-np.inf, np.inf)
        spaces: dict[str, Any] = {}
        for name in self.cameras:
            camera = self._cameras[name]
            size = (camera.height, camera.width)
            spaces[f"observation.images.{name}"] = box(0, 255, (3, *size), np.uint8)
            spaces[f"observation.depth.{name}"] = box(0, np.inf, size, np.float32)
            spaces[f"observation.intrinsics.{name}"] = box(*unbounded, (3, 3), np.float32)
            spaces[f"observation.pose.{name}"] = box(*unbounded, (4, 4), np.float32)
        spaces["observation.state"] = box(*unbounded, (15,), np.float32)
        spaces["task"] = gymnasium.spaces.Text(256, charset=string.printable)
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = box(-1, 1, (7,), np.float32)


def resolve_renderer(renderer: str) -> str:
    """``egl`` or ``tiny``."""
    if renderer not in RENDERERS:
        raise ValueError(f"renderer is {renderer!r}, wanted one of {', '.join(RENDERERS)}")
    if renderer == "auto":
        return "egl" if Path("/dev/nvidiactl").exists() else "tiny"
    return renderer


def _build(root: Path, scene: str, use_egl: bool) -> tuple[Any, Any]:
    """calvin_env's simulator and its oracle."""
    if str(root) not in sys.path:
        sys.path.append(str(root))
    with _quiet(), warnings.catch_warnings(action="ignore"):
        for module in ("gym", "hydra", "pybullet"):
            _import(module)
        # The simulator records the commit of its own clone, and fails outside of one.
        play_table = _import("calvin_env.envs.play_table_env")
        play_table.get_git_commit_hash = lambda path: "not asked"
        hydra = _import("hydra")
        if use_egl and "LOCAL_RANK" in os.environ:
            os.environ.setdefault("EGL_VISIBLE_DEVICES", os.environ["LOCAL_RANK"])
        with hydra.initialize_config_dir(str(root / "conf"), version_base="1.1"):
            config = hydra.compose(
                "config_data_collection",
                overrides=[
                    "cameras=static_and_gripper",
                    f"scene=calvin_scene_{scene}",
                    f"env.use_egl={str(use_egl).lower()}",
                    "use_vr=false",
                    f"data_path={root / 'data'}",
                ],
            )
        try:
            simulator = hydra.utils.instantiate(config.env, show_gui=False, use_vr=False, use_scene_info=True)
        except SystemExit:  # what it does when PyBullet's plugin does not load
            raise ImportError(
                "PyBullet cannot draw with EGL here; choose --env.renderer tiny, or see `vilma doctor calvin`"
            ) from None
        oracle = hydra.utils.instantiate(config.tasks)
    return simulator, oracle


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CalvinNotInstalled(f"CALVIN needs the package {error.name!r}.\n\n{STEPS}") from error


@contextlib.contextmanager
def _quiet():
    """Keep what calvin_env, gym and PyBullet print, from C too, away from a progress bar."""
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with open(os.devnull, "w") as nowhere:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for number, copy in zip((1, 2), kept):
            os.dup2(copy, number)
            os.close(copy)
