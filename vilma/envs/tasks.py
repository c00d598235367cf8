"""The task table: what is a number or a word about a task, for collection, training and evaluation alike."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from . import suite_tables


@dataclass(frozen=True)
class Task:
    """One task of one suite.

    ``hold`` is for how many consecutive control steps the simulator must report success before the episode
    counts; ``horizon`` is in control steps. They belong to the task, so evaluations cannot differ in them.
    ``group`` is what the task is averaged with in tables; an empty ``instruction`` is told by the simulator,
    episode by episode.
    """

    name: str
    instruction: str
    horizon: int
    hold: int = 1
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")
    reference_frame: str = "world"
    action_kind: str = "delta"
    control_freq: int = 20
    extra: str = "robot"
    group: str = ""

    @property
    def suite(self) -> str:
        return self.name.split("/")[0]


# X-IL's and PointMapPolicy's protocol: eleven successful steps in a row, not one that happens in passing.
ROBOCASA_HOLD = 11
ROBOCASA_CAMERAS = ("robot0_agentview_left", "robot0_agentview_right", "robot0_eye_in_hand")
# What LIBERO itself evaluates with (600 steps), whatever the length of the demonstrations.
LIBERO_HORIZON = 600


def _robosuite() -> Iterator[Task]:
    yield Task("robosuite/Lift", "lift the red cube", horizon=150, hold=5)
    yield Task("robosuite/Stack", "stack the red cube on the green cube", horizon=300)
    yield Task("robosuite/PickPlaceCan", "put the can into its bin", horizon=300)


def _metaworld() -> Iterator[Task]:
    for name, instruction in suite_tables.METAWORLD.items():
        cameras = ("corner2", "gripperPOV")
        yield Task(f"metaworld/{name}", instruction, 500, cameras=cameras, control_freq=80, extra="metaworld")


def _robocasa() -> Iterator[Task]:
    skills = {task: group for group, tasks in suite_tables.ROBOCASA_GROUPS.items() for task in tasks}
    old = {name: steps for tasks in suite_tables.ROBOCASA.values() for name, steps in tasks.items()}
    old |= {"NavigateKitchen": 500}
    for suite, horizons in (("robocasa", old), ("robocasa365", suite_tables.ROBOCASA365)):
        for name, horizon in horizons.items():
            yield Task(
                f"{suite}/{name}",
                "",
                horizon,
                hold=ROBOCASA_HOLD,
                cameras=ROBOCASA_CAMERAS,
                reference_frame="base",
                extra="",
                group=skills.get(name, "") if suite == "robocasa" else "",
            )


def _libero() -> Iterator[Task]:
    for suite, count in suite_tables.LIBERO.items():
        for number in range(count):
            yield Task(f"libero/{suite}/{number}", "", LIBERO_HORIZON, extra="", group=suite)


def _calvin() -> Iterator[Task]:
    for scene in "ABCD":  # an episode is a chain of five tasks of 360 steps
        cameras = ("static", "gripper")
        yield Task(f"calvin/{scene}", "", 5 * 360, cameras=cameras, control_freq=30, extra="")


TASKS = {
    task.name: task for suite in (_robosuite, _metaworld, _robocasa, _libero, _calvin) for task in suite()
}

# Names that stand for several tasks, besides each suite by itself.
COLLECTIONS = {
    "robocasa": [f"robocasa/{name}" for tasks in suite_tables.ROBOCASA.values() for name in tasks],
    "robocasa/paper": [
        f"robocasa/{name}" for tasks in suite_tables.ROBOCASA_GROUPS.values() for name in tasks
    ],
    **{
        f"robocasa/{group}": [f"robocasa/{name}" for name in names]
        for group, names in suite_tables.ROBOCASA_GROUPS.items()
    },
    **{
        f"libero/{suite}": [f"libero/{suite}/{i}" for i in range(n)]
        for suite, n in suite_tables.LIBERO.items()
    },
}


def find_task(name: str) -> Task:
    """The task called ``name``; an unknown one raises ValueError naming the closest."""
    if name in TASKS:
        return TASKS[name]
    suite, _, rest = name.rpartition("/") if name.count("/") < 2 else name.partition("/")
    by_word: dict[str, list[str]] = {}
    for known in TASKS:
        by_word.setdefault(known.partition("/")[2].lower(), []).append(known)
    near = difflib.get_close_matches(rest.lower(), by_word)
    close = [known for word in near for known in by_word[word]]
    # Of equal names, those of the suite that was meant.
    meant = [
        known for known in close if known.partition("/")[0] in difflib.get_close_matches(suite, _suites())
    ]
    close = (meant or close)[:4]
    if close:
        raise ValueError(f"unknown task {name!r}; did you mean {' or '.join(map(repr, close))}?")
    if suite in _suites():
        known = [task for task in TASKS if task.startswith(f"{suite}/")]
        shown = ", ".join(known[:60]) + (f" and {len(known) - 60} more" if len(known) > 60 else "")
        raise ValueError(f"unknown task {name!r}; {suite} has: {shown}")
    listed = ", ".join(
        f"{one} ({next(t for t in TASKS if t.startswith(one + '/'))}, ...)" for one in _suites()
    )
    raise ValueError(f"unknown task {name!r}; known suites: {listed}")


def find_tasks(name: str) -> list[Task]:
    """The tasks that ``name`` stands for: one task, a suite, or one of the ``COLLECTIONS``."""
    if name in COLLECTIONS:
        return [TASKS[task] for task in COLLECTIONS[name]]
    if name in _suites():
        return [task for task in TASKS.values() if task.suite == name]
    return [find_task(name)]


def _suites() -> list[str]:
    return list(dict.fromkeys(task.suite for task in TASKS.values()))
