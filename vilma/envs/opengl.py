"""Software OpenGL for MuJoCo: set up before a simulator is imported, and named when it is missing."""

import contextlib
import ctypes
import importlib.util
import os
from pathlib import Path

__all__ = ["RenderError", "prepare", "raise_if_missing"]

_NO_OPENGL = (
    "the simulator cannot load OpenGL (MUJOCO_GL={backend}): {error}. On Debian or Ubuntu install it with: "
    "apt-get install libosmesa6 libgl1 libegl1"
)


class RenderError(RuntimeError):
    """A camera returned a frame that cannot be a picture of the scene."""


def prepare() -> None:
    """Choose a software renderer unless one is chosen. Call it before mujoco is imported."""
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    # Small images are bound by vertices, which the software renderer does on one thread: more threads would
    # only get in the way of the other simulators of a vectorised run.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    _load_triton_first()


def raise_if_missing(error: BaseException) -> None:
    """ImportError naming the system's packages when ``error`` comes from OpenGL that is not there; ValueError
    when it is about the choice of a renderer; else nothing."""
    backend = os.environ.get("MUJOCO_GL")
    if _is_missing_opengl(error):
        raise ImportError(_NO_OPENGL.format(backend=backend, error=error)) from error
    if "MUJOCO_GL" in str(error):
        raise ValueError(f"{error}; wanted osmesa (software) or egl (a GPU, or software)") from error


def _load_triton_first() -> None:
    """Load triton's compiler before OSMesa, whose LLVM becomes global and would crash a later triton.

    Costs 50 ms; triton itself (and torch) are not imported.
    """
    triton = importlib.util.find_spec("triton")
    for folder in triton.submodule_search_locations or () if triton else ():
        for library in Path(folder, "_C").glob("libtriton*.so"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library))


def _is_missing_opengl(error: BaseException) -> bool:
    """Whether an import or a context failed inside the OpenGL bindings (they raise many kinds of error)."""
    if isinstance(error, ImportError) and ("libGL" in str(error) or "libEGL" in str(error)):
        return True
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename.replace(os.sep, "/"))
        trace = trace.tb_next
    inside = ("/OpenGL/", "/mujoco/osmesa/", "/mujoco/egl/", "/mujoco/glfw/", "/renderers/context/")
    return any(part in file for file in files for part in inside)
