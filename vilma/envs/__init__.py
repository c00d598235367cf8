"""Simulators behind one gymnasium contract.

``make("robosuite/Lift")`` returns a ``gymnasium.Env`` whose observations carry the keys of the data contract,
unbatched: images (3, H, W) uint8, depth (H, W) float32 in metres, intrinsics (3, 3) and camera-to-reference
poses (4, 4) float32, state (S,) float32 and the task's instruction. Importing it imports no simulator.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .tasks import TASKS, Task, find_task

if TYPE_CHECKING:
    import gymnasium

__all__ = ["Task", "find_task", "make", "tasks"]

_SUITES = {"robosuite": "RobosuiteEnv"}


def tasks() -> dict[str, Task]:
    """Every task that ``make`` knows, by name."""
    return dict(TASKS)


def make(
    name: str,
    cameras: tuple[str, ...] | list[str] | None = None,
    size: int = 84,
    seed: int = 0,
    **options: Any,
) -> "gymnasium.Env":
    """Build the environment ``name``, for example ``"robosuite/Lift"``.

    ``cameras`` (default: the task's own) are rendered at ``size`` x ``size`` pixels; with ``()`` the state
    alone is observed. ``seed`` is that of the first ``reset``. The suite's module documents its ``options``.

    Raises ValueError for an unknown name or option, ImportError naming the extra when the simulator is not
    installed and the system packages when there is no OpenGL.
    """
    task = find_task(name)
    module = importlib.import_module(f"{__name__}.{task.suite}")
    chosen = task.cameras if cameras is None else tuple(cameras)
    return getattr(module, _SUITES[task.suite])(task, cameras=chosen, size=size, seed=seed, **options)
