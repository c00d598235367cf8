"""RGB and exact metric depth of a MuJoCo model's cameras, for suites that bring no such renderer themselves.

A renderer of our own, beside the suite's: one context a model, made current before every use, without
multisampling (which biases depth by millimetres), and one pass for both image and depth. H = W = ``size``.
"""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from .opengl import RenderError, raise_if_missing

__all__ = ["CameraRig"]

_MIN_IMAGE_STD = 1.0


class CameraRig:
    """The cameras of one ``mujoco.MjModel``. ``close`` it when the simulator builds another model.

    Args:
        model: whose cameras, geoms and lights are drawn.
        size: height and width of the images in pixels.
        hidden_groups: groups of geoms that are not drawn (collision shapes, say).
        shadows: draw shadows and reflections, as released demonstrations have them; without them a frame
            takes about half the time.

    Raises:
        ImportError: there is no OpenGL; the message names the system's packages.
    """

    def __init__(self, model: Any, size: int, *, hidden_groups: Iterable[int] = (), shadows: bool = True):
        self._mujoco = mujoco = importlib.import_module("mujoco")
        self.model, self.size = model, size
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        self._gl = self._context = None
        try:
            self._gl = importlib.import_module("mujoco.gl_context").GLContext(size, size)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
        except Exception as error:
            raise_if_missing(error)
            raise
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        # Far away is 0: floats are dense there, where depth would otherwise be coarse.
        self._context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._scene = mujoco.MjvScene(model, maxgeom=20_000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = shadows
        self._option = mujoco.MjvOption()
        for group in hidden_groups:
            self._option.geomgroup[group] = 0
        self._option.sitegroup[:] = [0, 0, 0, 0, 0, 0]
        self._rect = mujoco.MjrRect(0, 0, size, size)

    def names(self) -> list[str]:
        return [self.model.camera(i).name for i in range(self.model.ncam)]

    def check(self, cameras: Iterable[str], where: str) -> None:
        """ValueError for a camera that the model does not have."""
        known = self.names()
        for camera in cameras:
            if camera not in known:
                near = difflib.get_close_matches(camera, known)
                raise ValueError(f"unknown camera {camera!r}; {where} has: {', '.join(near or known)}")

    def show_sites(self, groups: Iterable[int] = range(6)) -> None:
        """Draw sites too: some suites mark a goal with one."""
        for group in groups:
            self._option.sitegroup[group] = 1

    def frame(self, data: Any, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """Image (3, H, W) uint8 and depth (H, W) float32 in metres, top row first; 0 where nothing is seen.

        Raises:
            RenderError: what came back cannot be a picture.
        """
        mujoco, view = self._mujoco, self._mujoco.MjvCamera()
        view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self.model.camera(camera).id
        self._gl.make_current()
        mujoco.mjv_updateScene(
            self.model, data, self._option, None, view, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        mujoco.mjr_render(self._rect, self._scene, self._context)
        image = np.empty((self.size, self.size, 3), np.uint8)
        reading = np.empty((self.size, self.size), np.float32)
        mujoco.mjr_readPixels(image, reading, self._rect, self._context)
        low, high, deviation = float(reading.min()), float(reading.max()), float(image.std())
        if not (low >= 0.0 and 0.0 < high <= 1.0 and deviation > _MIN_IMAGE_STD):
            raise RenderError(
                f"camera {camera!r} returned garbage: depth buffer in [{low:.4g}, {high:.4g}], wanted within "
                f"[0, 1]; image deviation {deviation:.3g}, wanted above {_MIN_IMAGE_STD:g}"
            )
        near = self.model.vis.map.znear * self.model.stat.extent
        far = self.model.vis.map.zfar * self.model.stat.extent
        depth = near * far / (near + reading.astype(np.float64) * (far - near))
        depth[reading == 0.0] = 0.0
        picture = np.ascontiguousarray(image[::-1].transpose(2, 0, 1))
        return picture, np.ascontiguousarray(depth[::-1], dtype=np.float32)

    def intrinsics(self, camera: str) -> np.ndarray:
        """(3, 3) float32 pinhole matrix in pixels; pixel centres lie at +0.5."""
        fovy = np.deg2rad(self.model.cam_fovy[self.model.camera(camera).id])
        focal, centre = 0.5 * self.size / np.tan(0.5 * fovy), 0.5 * self.size
        return np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]], np.float32)

    def pose(self, data: Any, camera: str) -> np.ndarray:
        """(4, 4) float64 camera -> world, OpenCV axes (x right, y down, z forward)."""
        index, pose = self.model.camera(camera).id, np.eye(4)
        pose[:3, :3] = data.cam_xmat[index].reshape(3, 3) * np.array([1.0, -1.0, -1.0])
        pose[:3, 3] = data.cam_xpos[index]
        return pose

    def observe(
        self, data: Any, cameras: Iterable[str], render: bool, reference: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """The camera keys of an observation; with ``render=False`` images and depth are zero.

        reference: (4, 4) reference frame -> world, the world's own when left out.
        """
        found, shape = {}, (self.size, self.size)
        to_reference = np.eye(4) if reference is None else np.linalg.inv(reference)
        for camera in cameras:
            image, depth = np.zeros((3, *shape), np.uint8), np.zeros(shape, np.float32)
            if render:
                image, depth = self.frame(data, camera)
            found[f"observation.images.{camera}"] = image
            found[f"observation.depth.{camera}"] = depth
            found[f"observation.intrinsics.{camera}"] = self.intrinsics(camera)
            found[f"observation.pose.{camera}"] = (to_reference @ self.pose(data, camera)).astype(np.float32)
        return found

    def close(self) -> None:
        """Free the context's objects while it is current; nothing is left to the garbage collector."""
        context, gl, self._context, self._gl = self._context, self._gl, None, None
        if context is not None:
            gl.make_current()
            context.free()
        if gl is not None:
            gl.free()

    def __del__(self) -> None:
        # Not contextlib: at the interpreter's exit this module's names may be gone already.
        try:  # noqa: SIM105
            self.close()
        except Exception:
            pass
