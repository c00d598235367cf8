"""robosuite tasks (a Panda arm on MuJoCo) as a gymnasium environment with exact, guarded RGB-D cameras.

Actions are the seven numbers in [-1, 1] of robosuite's BASIC composite controller: a position change
(1 = 0.05 m) and a rotation change (1 = 0.5 rad) of the end effector in the base frame, and the gripper
(-1 opens, 1 closes).
"""

import difflib
import importlib
import logging
import string
from typing import Any, ClassVar

import numpy as np

from vilma.extras import require

from .opengl import RenderError, prepare, raise_if_missing
from .options import flag, names, number
from .tasks import Task
from .variations import MAX_DISTRACTORS, CameraMotion, place_distractors, with_distractors

gymnasium = require("gymnasium", "robot")

__all__ = ["RenderError", "RobosuiteEnv", "controller_config"]

STATE_KEYS = ("robot0_eef_pos", "robot0_eef_rot6d", "robot0_gripper_qpos")

# True frames of these scenes deviate by 30 and more, and their smallest z-buffer value is 0.74. A renderer
# that draws into a lost context returns values at the near plane, constant images, or non-finite depth.
_MIN_IMAGE_STD = 5.0
_MIN_ZBUFFER = 0.5

# A group of geoms that robosuite uses for nothing and its renderer does not draw.
_HIDDEN_GROUP = 5


class RobosuiteEnv(gymnasium.Env):
    """One robosuite simulator.

    Args:
        task: from the task table; ``make`` looks it up.
        cameras: names of the model's cameras; empty renders nothing and observes the state alone.
        size: height and width of the images in pixels.
        seed: the seed of the first ``reset``. ``reset(seed=s)`` reproduces an episode whatever ran before it.
        placement: half width in metres of the square over which objects are placed (table tasks only);
            None keeps robosuite's own (Lift: 0.03).
        state_keys: the parts of ``observation.state``, in order; by default the end effector's position (3),
            the first, then the second column of its rotation matrix (6), and the gripper's two joints (2).
        render_cameras: when False, ``step`` returns zero images and depth and skips rendering: for the steps
            at which nobody looks. ``reset`` renders all the same, unless its ``options={"render": False}``.
        model_seed: of what robosuite draws once for a model (the size of Lift's cube). Fixed, so that an
            episode is given by its seed alone.
        camera_jitter: (metres, degrees) by which cameras that stand in the world (agentview) are moved at
            most, anew in every episode: position and rotation vector uniform in balls of these radii, the
            rotation about the camera's centre.
        camera_shift: metres by which they are moved in every episode, in a random horizontal direction,
            orientation unchanged: a tripod put down elsewhere.
        distractors: cubes of random colours, never red or green, at random free places (table tasks only).

    Neither of the last three changes what else an episode's seed draws. Poses, pictures and depth follow.

    Numbers may also come as text (YAML reads ``1e-1`` as such); another kind of value raises ValueError.

    ``step`` terminates when success has been held for ``task.hold`` steps and truncates at ``task.horizon``.

    In an ``AsyncVectorEnv`` pass ``shared_memory=False``: from shared memory gymnasium decodes strings only
    once, before the first reset, so ``task`` would stay what an empty memory spells.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        task: Task,
        cameras: tuple[str, ...] = (),
        size: int = 84,
        seed: int = 0,
        *,
        placement: float | None = None,
        state_keys: tuple[str, ...] = STATE_KEYS,
        render_cameras: bool = True,
        model_seed: int = 0,
        camera_jitter: tuple[float, float] = (0.0, 0.0),
        camera_shift: float = 0.0,
        distractors: int = 0,
    ) -> None:
        size, model_seed = number("size", size, int), number("model_seed", model_seed, int)
        if size < 1:
            raise ValueError(f"got an image size of {size}, wanted at least 1 pixel")
        placement = None if placement is None else number("placement", placement, float)
        if placement is not None and not 0 < placement <= 0.3:
            raise ValueError(f"got placement {placement}, wanted a half width in (0, 0.3] metres")
        render_cameras = flag("render_cameras", render_cameras)
        self._motion = _camera_motion(camera_jitter, camera_shift)
        self.distractors = number("distractors", distractors, int)
        if not 0 <= self.distractors <= MAX_DISTRACTORS:
            raise ValueError(f"got {distractors} distractors, wanted 0 to {MAX_DISTRACTORS}")
        self.task = task
        self.cameras = names("cameras", cameras)
        self.size = size
        self.render_cameras = render_cameras
        self.render_mode = "rgb_array"
        self.state_keys = names("state_keys", state_keys)
        self._first_seed: int | None = None if seed is None else number("seed", seed, int)
        self._context = None
        self._sim_env = None
        self._steps = self._held = 0

        suite = _load_suite()
        self._mujoco = importlib.import_module("mujoco")
        arguments = {
            "robots": "Panda",
            "controller_configs": controller_config(),
            "control_freq": task.control_freq,
            "has_renderer": False,
            "has_offscreen_renderer": bool(self.cameras),
            "use_camera_obs": False,
            "ignore_done": True,
            "hard_reset": False,
            "renderer": "mujoco",
        }
        try:
            self._sim_env = self._simulator_class(suite)(seed=model_seed, **arguments)
            if self.cameras:
                self._set_up_rendering()
        except Exception as error:
            raise_if_missing(error)
            raise
        self._check_cameras()
        if placement is not None:
            self._set_placement(placement)
        self._still = {camera: self._camera_mount(camera) for camera in self._standing_cameras()}
        self._raw = self._sim_env._get_observations(force_update=True)
        self._build_spaces()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Start an episode; ``options={"render": False}`` gives zero images, for a start that nobody sees."""
        seed, self._first_seed = (self._first_seed if seed is None else seed), None
        super().reset(seed=seed)
        sim_env = self._require_open()
        if seed is not None:
            # The samplers hold this generator by reference: its state is replaced, not the object.
            sim_env.rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
        self._raw = sim_env.reset()
        if self._motion or self.distractors:
            # The same seed gives gymnasium's generator and robosuite's the same numbers: one of them, hashed,
            # gives this episode's other draws.
            self._vary(int(self.np_random.integers(2**63)))
        self._steps = self._held = 0
        return self.observe(render=(options or {}).get("render", True)), {"success": False}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        reward = self._advance(action)
        self._steps += 1
        self._held = self._held + 1 if self._sim_env._check_success() else 0
        success = self._held >= self.task.hold
        truncated = not success and self._steps >= self.task.horizon
        return self.observe(render=self.render_cameras), reward, success, truncated, {"success": success}

    def advance(self, action: np.ndarray) -> None:
        """One control step outside the episode: no picture, and it counts for neither horizon nor success."""
        self._advance(action)

    def observe(self, render: bool = True) -> dict[str, Any]:
        """The current observation; with ``render=False`` images and depth are zero."""
        self._require_open()
        observation: dict[str, Any] = {}
        for camera in self.cameras:
            if render:
                image, depth = self._render(camera)
            else:
                image = np.zeros((3, self.size, self.size), np.uint8)
                depth = np.zeros((self.size, self.size), np.float32)
            observation[f"observation.images.{camera}"] = image
            observation[f"observation.depth.{camera}"] = depth
            observation[f"observation.intrinsics.{camera}"] = self.intrinsics(camera)
            observation[f"observation.pose.{camera}"] = self.pose(camera)
        parts = self.proprioception()
        observation["observation.state"] = np.concatenate([parts[k] for k in self.state_keys]).astype(
            np.float32
        )
        observation["task"] = self.task.instruction
        return observation

    def render(self, camera: str | None = None, size: int | None = None) -> np.ndarray:
        """An RGB picture (H, W, 3) uint8 of the current state, from the first camera unless told."""
        if not self.cameras:
            raise ValueError("this environment was made without cameras, so it cannot render")
        image, _ = self._render(camera or self.cameras[0], size)
        return np.ascontiguousarray(image.transpose(1, 2, 0))

    def intrinsics(self, camera: str) -> np.ndarray:
        """(3, 3) float32 pinhole matrix in pixels; pixel centres lie at +0.5, so the axis meets W/2, H/2."""
        fovy = np.deg2rad(self._sim_env.sim.model.cam_fovy[self._camera_id(camera)])
        focal, centre = 0.5 * self.size / np.tan(0.5 * fovy), 0.5 * self.size
        return np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]], np.float32)

    def pose(self, camera: str) -> np.ndarray:
        """(4, 4) float32 camera -> world, OpenCV axes (x right, y down, z forward)."""
        data, index = self._sim_env.sim.data, self._camera_id(camera)
        pose = np.eye(4, dtype=np.float32)
        pose[:3, :3] = data.cam_xmat[index].reshape(3, 3) * np.array([1.0, -1.0, -1.0])
        pose[:3, 3] = data.cam_xpos[index]
        return pose

    def proprioception(self) -> dict[str, np.ndarray]:
        """What the robot knows of itself: robosuite's ``robot0_*`` readings and ``robot0_eef_rot6d``."""
        readings = {
            key: np.atleast_1d(value) for key, value in self._raw.items() if key.startswith("robot0_")
        } | {"robot0_eef_rot6d": self.eef_rotation()[:, :2].T.reshape(6)}
        return {key: value for key, value in readings.items() if not key.endswith("-state")}

    def eef_rotation(self) -> np.ndarray:
        """(3, 3) rotation of the grip site in the world."""
        site = self._sim_env.robots[0].eef_site_id["right"]
        return np.array(self._sim_env.sim.data.site_xmat[site]).reshape(3, 3)

    def privileged(self) -> dict[str, np.ndarray]:
        """robosuite's raw observation with object poses: for experts and data sets, never for a policy."""
        return dict(self._raw)

    def sim_state(self) -> np.ndarray:
        """The flattened simulator state ``[time, qpos, qvel]`` in float64."""
        return np.array(self._require_open().sim.get_state().flatten(), np.float64)

    def model_xml(self) -> str:
        """The MJCF of the model."""
        return self._require_open().model.get_xml()

    @property
    def simulator(self) -> Any:
        """The robosuite environment behind this one."""
        return self._require_open()

    def close(self) -> None:
        sim_env, self._sim_env = self._sim_env, None
        if sim_env is None:
            return
        contexts = [self._context, getattr(sim_env.sim, "_render_context_offscreen", None)]
        self._context = sim_env.sim = None
        while contexts:
            context = contexts.pop()
            if context is not None and context.sim is not None:
                # The context and the simulation hold each other. Left to the cyclic collector, the context
                # would one day free its objects by number in whatever context is current: another's.
                context.gl_ctx.make_current()
                context.sim._render_context_offscreen = None
                context.sim = None

    def __del__(self) -> None:
        if getattr(self, "_sim_env", None) is None:
            return
        # Not contextlib: at the interpreter's exit this module's names may be gone already.
        try:  # noqa: SIM105
            self.close()
        except Exception:
            pass

    def _simulator_class(self, suite: Any) -> type:
        name = self.task.name.split("/")[1]
        known = importlib.import_module(f"{suite.__name__}.environments.base").REGISTERED_ENVS
        return with_distractors(known[name], self.distractors) if self.distractors else known[name]

    def _vary(self, episode: int) -> None:
        """Move the standing cameras and place the distractors of an episode."""
        model = self._sim_env.sim.model
        for camera, (position, rotation) in self._still.items():
            index = self._camera_id(camera)
            position, rotation = self._motion.move(position, rotation, episode, camera)
            model.cam_pos[index] = position
            self._mujoco.mju_mat2Quat(model.cam_quat[index], rotation.flatten())
        if self.distractors:
            place_distractors(self._sim_env, episode)
        self._sim_env.sim.forward()
        self._raw = self._sim_env._get_observations(force_update=True)

    def _standing_cameras(self) -> list[str]:
        """Those of the cameras that are fixed in the world, not on the robot."""
        bodies = self._sim_env.sim.model.cam_bodyid
        return [camera for camera in self.cameras if bodies[self._camera_id(camera)] == 0]

    def _camera_mount(self, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (3, 3) of a camera in the body that carries it, MuJoCo's axes."""
        model, index = self._sim_env.sim.model, self._camera_id(camera)
        rotation = np.zeros(9)
        self._mujoco.mju_quat2Mat(rotation, model.cam_quat[index])
        return model.cam_pos[index].copy(), rotation.reshape(3, 3)

    def _advance(self, action: np.ndarray) -> float:
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"got an action {action!r}, wanted 7 finite numbers in [-1, 1]")
        self._raw, reward, _, _ = self._require_open().step(np.clip(action, -1.0, 1.0))
        return float(reward)

    def _require_open(self) -> Any:
        if self._sim_env is None:
            raise RuntimeError("this environment is closed; make a new one")
        return self._sim_env

    def _set_up_rendering(self) -> None:
        """No multisampling (it biases depth by millimetres), no shadows, no reflections (twice the time)."""
        sim, flags = self._sim_env.sim, self._mujoco.mjtRndFlag
        context = sim._render_context_offscreen
        context.gl_ctx.make_current()
        sim.model.vis.quality.offsamples = 0
        sim.model.vis.global_.offwidth = max(sim.model.vis.global_.offwidth, self.size)
        sim.model.vis.global_.offheight = max(sim.model.vis.global_.offheight, self.size)
        context.con.free()
        context._set_mujoco_context_and_buffers()
        context.scn.flags[flags.mjRND_SHADOW] = 0
        context.scn.flags[flags.mjRND_REFLECTION] = 0
        signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
        boxes = sim.model.geom_aabb[:, None]
        self._box_corners = boxes[..., :3] + signs * boxes[..., 3:]
        self._is_unbounded = sim.model.geom_rbound == 0
        self._context = context

    def _render(self, camera: str, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The image (3, H, W) uint8 and metric depth (H, W) float32 of one camera, top row first."""
        size = size or self.size
        sim = self._require_open().sim
        if sim is None or sim._render_context_offscreen is not self._context:
            raise RenderError(
                "the simulation behind this environment was rebuilt (a hard reset), so its renderer is gone; "
                "use reset() of this environment, or make a new one"
            )
        # robosuite renders into whichever context is current, which may be another environment's.
        self._context.gl_ctx.make_current()
        groups = sim.model.geom_group.copy()
        sim.model.geom_group[self._out_of_view(camera)] = _HIDDEN_GROUP
        try:
            image, zbuffer = sim.render(width=size, height=size, camera_name=camera, depth=True)
        finally:
            sim.model.geom_group[:] = groups
        return _checked_frame(image[::-1], zbuffer[::-1], camera, *self._clip_planes())

    def _out_of_view(self, camera: str) -> np.ndarray:
        """(geoms,) True where a geom's box lies wholly beside the camera's pyramid.

        Rendering is bound by the vertices of the arm's meshes, and MuJoCo sends all of them to the renderer:
        leaving out what the camera cannot see halves the time and changes no pixel, as nothing casts shadows.
        """
        sim = self._sim_env.sim
        pose = self.pose(camera).astype(np.float64)
        rotations = pose[:3, :3].T @ sim.data.geom_xmat.reshape(-1, 3, 3)
        centres = (sim.data.geom_xpos - pose[:3, 3]) @ pose[:3, :3]
        x, y, z = np.moveaxis(self._box_corners @ rotations.transpose(0, 2, 1) + centres[:, None], -1, 0)
        # A hundredth wider than the image, so that rounding decides nothing.
        reach = z * (np.tan(np.deg2rad(sim.model.cam_fovy[self._camera_id(camera)]) / 2) * 1.01)
        sides = (x > reach, -x > reach, y > reach, -y > reach, z < 0)
        return np.any([side.all(axis=1) for side in sides], axis=0) & ~self._is_unbounded

    def _clip_planes(self) -> tuple[float, float]:
        model = self._sim_env.sim.model
        return model.vis.map.znear * model.stat.extent, model.vis.map.zfar * model.stat.extent

    def _camera_id(self, camera: str) -> int:
        return self._sim_env.sim.model.camera_name2id(camera)

    def _check_cameras(self) -> None:
        known = self._sim_env.sim.model.camera_names
        for camera in self.cameras:
            if camera not in known:
                near = difflib.get_close_matches(camera, known)
                raise ValueError(
                    f"unknown camera {camera!r}; {self.task.name} has: {', '.join(near or known)}"
                )

    def _set_placement(self, placement: float) -> None:
        sampler = self._sim_env.placement_initializer
        if not hasattr(sampler, "x_range"):
            raise ValueError(f"{self.task.name} places its objects in bins: leave the option placement out")
        sampler.x_range = sampler.y_range = [-placement, placement]

    def _build_spaces(self) -> None:
        spaces = gymnasium.spaces
        size, parts = self.size, self.proprioception()
        for key in self.state_keys:
            if key not in parts:
                raise ValueError(f"unknown state key {key!r}; the robot reads: {', '.join(parts)}")
        entries: dict[str, Any] = {}
        for camera in self.cameras:
            entries |= {
                f"observation.images.{camera}": spaces.Box(0, 255, (3, size, size), np.uint8),
                f"observation.depth.{camera}": spaces.Box(0, np.inf, (size, size), np.float32),
                f"observation.intrinsics.{camera}": spaces.Box(-np.inf, np.inf, (3, 3), np.float32),
                f"observation.pose.{camera}": spaces.Box(-np.inf, np.inf, (4, 4), np.float32),
            }
        width = sum(parts[key].size for key in self.state_keys)
        entries["observation.state"] = spaces.Box(-np.inf, np.inf, (width,), np.float32)
        alphabet = string.ascii_letters + string.digits + string.punctuation + " "
        entries["task"] = spaces.Text(128, charset=alphabet)
        self.observation_space = spaces.Dict(entries)
        self.action_space = spaces.Box(-1.0, 1.0, (7,), np.float32)


def _checked_frame(
    image: np.ndarray, zbuffer: np.ndarray, camera: str, near: float, far: float
) -> tuple[np.ndarray, np.ndarray]:
    """Image (3, H, W) and depth in metres (H, W), or RenderError when they cannot show the scene."""
    low, high = float(zbuffer.min()), float(zbuffer.max())
    deviation = float(image.std())
    if not (low > _MIN_ZBUFFER and high <= 1.0 and deviation > _MIN_IMAGE_STD):
        raise RenderError(
            f"camera {camera!r} returned garbage: z-buffer in [{low:.4g}, {high:.4g}], wanted within "
            f"({_MIN_ZBUFFER}, 1]; image deviation {deviation:.3g}, wanted above {_MIN_IMAGE_STD:g}. "
            "The OpenGL context was lost, or another one drew into it"
        )
    depth = near / (1.0 - zbuffer.astype(np.float64) * (1.0 - near / far))
    return np.ascontiguousarray(image.transpose(2, 0, 1)), depth.astype(np.float32)


def _camera_motion(jitter: Any, shift: Any) -> CameraMotion:
    if not isinstance(jitter, (tuple, list)) or len(jitter) != 2:
        raise ValueError(f"got camera_jitter={jitter!r}, wanted two numbers, metres and degrees: [0.1, 10]")
    metres, degrees = (number("camera_jitter", part, float) for part in jitter)
    if not (0 <= metres <= 0.5 and 0 <= degrees <= 45):
        raise ValueError(
            f"got camera_jitter={jitter!r}, wanted metres from 0 to 0.5 and degrees from 0 to 45"
        )
    shift = number("camera_shift", shift, float)
    if not 0 <= shift <= 0.5:
        raise ValueError(f"got camera_shift={shift}, wanted 0 to 0.5 metres")
    return CameraMotion((metres, degrees), shift)


def controller_config() -> dict[str, Any]:
    """The controller whose actions this environment takes, as robosuite's own configuration."""
    return _load_suite().load_composite_controller_config(controller="BASIC", robot="Panda")


def _load_suite() -> Any:
    """Import robosuite, by default with a software renderer, without warnings about parts not used here."""
    prepare()
    logging.getLogger("robosuite_logs").addFilter(_keep_errors)
    try:
        return require("robosuite", "robot")
    except Exception as error:
        raise_if_missing(error)
        raise


def _keep_errors(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
