"""The task table: what is a number or a word about a task, for collection, training and evaluation alike."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task of one suite.

    ``hold`` is for how many consecutive control steps the simulator must report success before the episode
    counts; ``horizon`` is in control steps. They belong to the task, so evaluations cannot differ in them.
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

    @property
    def suite(self) -> str:
        return self.name.split("/")[0]


TASKS = {
    task.name: task
    for task in (
        Task("robosuite/Lift", "lift the red cube", horizon=150, hold=5),
        Task("robosuite/Stack", "stack the red cube on the green cube", horizon=300),
        Task("robosuite/PickPlaceCan", "put the can into its bin", horizon=300),
    )
}


def find_task(name: str) -> Task:
    """The task called ``name``; an unknown one raises ValueError naming the closest."""
    if name in TASKS:
        return TASKS[name]
    by_word = {known.split("/")[1].lower(): known for known in TASKS}
    near = difflib.get_close_matches(name.split("/")[-1].lower(), by_word)
    close = [by_word[word] for word in near]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(TASKS)}"
    raise ValueError(f"unknown task {name!r}; {hint}")
