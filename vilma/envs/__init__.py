"""Simulators behind one gymnasium contract.

``make("robosuite/Lift")`` returns a ``gymnasium.Env`` whose observations carry the keys of the data contract,
unbatched: images (3, H, W) uint8, depth (H, W) float32 in metres, intrinsics (3, 3) and camera-to-reference
poses (4, 4) float32, state (S,) float32 and the task's instruction. Importing it imports no simulator.
"""

import difflib
import importlib
import inspect
from typing import TYPE_CHECKING, Any

from .tasks import TASKS, Task, find_task, find_tasks

if TYPE_CHECKING:
    import gymnasium

__all__ = ["Task", "find_task", "find_tasks", "make", "scripted_policy", "tasks"]

# Suite -> its module and the class in it.
_SUITES = {
    "robosuite": ("robosuite", "RobosuiteEnv"),
    "metaworld": ("metaworld", "MetaWorldEnv"),
    "robocasa": ("robocasa", "RoboCasaEnv"),
    "robocasa365": ("robocasa", "RoboCasaEnv"),
    "libero": ("libero", "LiberoEnv"),
    "calvin": ("calvin", "CalvinEnv"),
}

# What `make` gives to a suite's class itself.
_OWN = ("task", "cameras", "size", "seed")


def tasks() -> dict[str, Task]:
    """Every task that ``make`` knows, by name."""
    return dict(TASKS)


def make(
    name: str,
    cameras: tuple[str, ...] | list[str] | None = None,
    size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> "gymnasium.Env":
    """Build the environment ``name``, for example ``"robosuite/Lift"``.

    ``cameras`` (default: the task's own) are rendered at ``size`` x ``size`` pixels (default: that of
    the suite's class); with ``()`` the state alone is observed. ``seed`` is that of the first ``reset``. The
    suite's module documents its ``options``.

    Raises ValueError for an unknown name or option (naming close ones) and for a value of the wrong kind,
    ImportError naming the extra when the simulator is not installed and the system packages when there is no
    OpenGL.
    """
    task = find_task(name)
    module, environment = _SUITES[task.suite]
    environment = getattr(importlib.import_module(f"{__name__}.{module}"), environment)
    _check_options(task, environment, options)
    chosen = task.cameras if cameras is None else cameras
    if size is not None:
        options["size"] = size
    return environment(task, cameras=chosen, seed=seed, **options)


def scripted_policy(name: str) -> Any:
    """A scripted policy for the runner, which acts on the simulator's state: MetaWorld has one for each task.

    Raises ValueError where there is none.
    """
    if not name.startswith("metaworld/"):
        raise ValueError(f"no scripted policy for {name}; MetaWorld's tasks have one each: name a task")
    task = find_task(name)
    return importlib.import_module(f"{__name__}.metaworld").ScriptedPolicy(task)


def _check_options(task: Task, environment: type, options: dict[str, Any]) -> None:
    """ValueError for an option that the suite's class does not take; the simulator itself is not imported."""
    known = [name for name in inspect.signature(environment).parameters if name not in _OWN]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known)
            hint = (
                f"did you mean {' or '.join(map(repr, near))}?" if near else f"it takes: {', '.join(known)}"
            )
            raise ValueError(f"unknown option {option!r} of {task.name}; {hint}")
