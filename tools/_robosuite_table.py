"""What the robosuite table consists of: settings and cells, and how each is made."""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vilma import config

__all__ = ["CELLS", "Cell", "Plan", "Setting"]

FIRST_SEED = 500_000
EPISODES = 50

# DP3 (arXiv 2403.03954, section 4) crops the cloud so that table and ground are gone; with them, few of its
# points would fall on a cube. Every other pixel leaves some 260 points above the table, so 256 lose nothing.
ABOVE_TABLE = 0.805
CLOUD = {"cloud_points": 256, "cloud_stride": 2}


@dataclass(frozen=True, eq=False)
class Setting:
    """Task, demonstrations and recipe that rows of the table share. environment: options of the simulator,
    in the demonstrations and in every evaluation. cameras: those of the demonstrations, none for the task's.
    """

    name: str
    title: str
    task: str
    config: str
    demos: int
    environment: Mapping[str, Any] = field(default_factory=dict)
    cameras: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Cell:
    """One trained policy (or one shared with other cells) and one evaluation of it.

    variant: what is special about the training, with its ``changes`` of the recipe; moved: what is special
    about the evaluation, with further options of the simulator. An optional cell runs only where it is asked
    for.
    """

    setting: Setting
    modality: str
    seed: int
    variant: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)
    moved: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    is_optional: bool = False

    @property
    def run(self) -> str:
        """The name of the training, which cells with other evaluations share."""
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.setting.name}_{self.modality}{variant}_seed{self.seed}"

    @property
    def row(self) -> str:
        """What the table calls this way of training."""
        return f"{self.modality}, {VARIANTS[self.variant]}" if self.variant else self.modality

    @property
    def name(self) -> str:
        return f"{self.run}_{self.moved}" if self.moved else self.run


@dataclass(frozen=True)
class Plan:
    """How a cell is made, in ``work``. demos, steps, episodes: smaller figures for a trial run."""

    cell: Cell
    work: Path
    demos: int | None = None
    steps: int | None = None
    episodes: int = EPISODES

    @property
    def data(self) -> Path:
        return self.work / "data" / f"{self.cell.setting.name}.hdf5"

    @property
    def run(self) -> Path:
        return self.work / self.cell.run

    @property
    def result(self) -> Path:
        """Of the evaluation, episode by episode."""
        return self.run / "eval" / f"{self.cell.name}.json"

    def collect(self, workers: int) -> list[str]:
        setting = self.cell.setting
        asked = ["--demos", str(self.demos or setting.demos), "--seed", "0", "--workers", str(workers)]
        return [
            *("collect-robosuite", "--task", setting.task, *asked),
            *(("--cameras", *setting.cameras) if setting.cameras else ()),
            *_options("env", setting.environment),
            *("--out", str(self.data)),
        ]

    def train(self) -> list[str]:
        return [
            *("train-policy", self.cell.setting.config, "--run", str(self.run)),
            *("--train.seed", str(self.cell.seed), "--data.path", str(self.data)),
            *_options("policy", self.policy()),
            *(("--train.steps", str(self.steps), "--schedule.warmup", "2") if self.steps else ()),
        ]

    def evaluate(self) -> list[str]:
        cell = self.cell
        return [
            *("eval", f"robosuite/{cell.setting.task}", str(self.run)),
            *("--episodes", str(self.episodes), "--seed", str(FIRST_SEED), "--workers", "1", "--videos", "0"),
            *_options("env", {**cell.setting.environment, **cell.environment}),
            *("--out", str(self.result)),
        ]

    def policy(self) -> dict[str, Any]:
        """What the modality and the variant change in the recipe."""
        changes: dict[str, Any] = {"modality": self.cell.modality}
        if self.cell.modality == "dp3":
            low, high = config.read(self.cell.setting.config)["policy"]["workspace"]
            changes |= {"workspace": [[*low[:2], ABOVE_TABLE], high], **CLOUD}
        return changes | dict(self.cell.changes)

    def recipe(self) -> str:
        """Twelve hex digits that change with anything that decides the figures."""
        setting = self.cell.setting
        recipe = config.read(setting.config)
        recipe["data"].pop("path")
        parts = [
            recipe,
            self.policy(),
            self.cell.seed,
            self.steps,
            self.episodes,
            self.demos or setting.demos,
        ]
        parts += [setting.task, dict(setting.environment), dict(self.cell.environment)]
        parts += [setting.cameras] if setting.cameras else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _options(section: str, values: Mapping[str, Any]) -> list[str]:
    """Overrides on a command line; lists and truth values as JSON, which YAML reads."""
    words = []
    for name, value in values.items():
        words += [f"--{section}.{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


LIFT = Setting(
    "lift",
    "Lift, cube over 24 x 24 cm",
    "Lift",
    "configs/policies/table_lift.yaml",
    demos=25,
    environment={"placement": 0.12},
)
STACK = Setting("stack", "Stack", "Stack", "configs/policies/table_stack.yaml", demos=100)
CAN = Setting("can", "PickPlaceCan", "PickPlaceCan", "configs/policies/table_can.yaml", demos=50)

# The agentview camera stands somewhere else in every episode; the one on the wrist stays on it.
_MOVED = {"placement": 0.12, "camera_jitter": [0.1, 10.0], "distractors": 3}
MOVED = Setting(
    "moved",
    "Lift, agentview moved by up to 10 cm and 10 degrees, three cubes of other colours",
    "Lift",
    "configs/policies/table_moved.yaml",
    demos=100,
    environment=_MOVED,
)
SHIFT = Setting(
    "shift",
    "Lift, agentview at rest in training",
    "Lift",
    "configs/policies/table_moved.yaml",
    demos=100,
    environment={"placement": 0.12},
)
# The same with a quarter of the demonstrations, where not everything succeeds.
MOVED_FEW = replace(
    MOVED, name="few_moved", title=MOVED.title + ", a quarter of the demonstrations", demos=25
)
SHIFT_FEW = replace(
    SHIFT, name="few_shift", title=SHIFT.title + ", a quarter of the demonstrations", demos=25
)
# The same seen by agentview alone: no camera that sees the cube from where it was in training.
_ALONE = ("agentview",)
MOVED_ALONE = Setting(
    "alone_moved",
    "Lift, agentview alone, moved by up to 10 cm and 10 degrees, three cubes of other colours",
    "Lift",
    "configs/policies/table_alone.yaml",
    demos=100,
    environment=_MOVED,
    cameras=_ALONE,
)
SHIFT_ALONE = Setting(
    "alone_shift",
    "Lift, agentview alone, at rest in training",
    "Lift",
    "configs/policies/table_alone.yaml",
    demos=100,
    environment={"placement": 0.12},
    cameras=_ALONE,
)
_REPOSED = {"camera_translation": 0.12, "camera_rotation": 5.0, "repose_probability": 0.8}
REPOSED = {
    SHIFT: {"augment": {**_REPOSED, "repose_cameras": ["agentview"]}},
    SHIFT_FEW: {"augment": {**_REPOSED, "repose_cameras": ["agentview"]}},
    SHIFT_ALONE: {"augment": _REPOSED},
}

# Settings that are evaluated with agentview where it was in training, and moved.
SHIFTS = (SHIFT, SHIFT_FEW, SHIFT_ALONE)

# Points can be written in a displaced frame, with the state's position (actions are displacements, which stay
# what they are): a cube somewhere else for nothing, which images cannot have. Theirs is a shift of pixels.
DISPLACED = {
    "augment": {"frame_translation": 0.1, "frame_axes": [1.0, 1.0, 0.0]},
    "frame_state": {"position": [0]},
    "frame_action": {},
}
SHIFTED = {"shift": {"agentview": 4, "robot0_eye_in_hand": 4}}
VARIANTS = {"displaced": "frame displaced", "shifted": "pixels shifted", "reposed": "views re-posed"}

MODALITIES = ("rgb", "depth", "xyz", "6ch", "add", "cat", "dp3")


def _cells() -> tuple[Cell, ...]:
    first, second, three = ("rgb", "xyz", "cat", "dp3"), ("depth", "6ch", "add"), ("rgb", "xyz", "cat")
    displaced = {"variant": "displaced", "changes": DISPLACED}
    cells = []
    for seed in (0, 1):
        cells += [Cell(LIFT, modality, seed) for modality in first]
        cells += [Cell(LIFT, modality, seed, **displaced) for modality in ("xyz", "cat", "dp3")]
    cells += [Cell(LIFT, "rgb", seed, variant="shifted", changes=SHIFTED) for seed in (0, 1)]
    cells += [Cell(STACK, modality, 0) for modality in ("rgb", "cat")]
    cells += [Cell(STACK, "cat", 0, **displaced)]
    # All trainings before the evaluations that share them.
    for setting, centimetres in itertools.product(SHIFTS, (0, 5, 10)):
        moved = {"moved": f"{centimetres}cm", "environment": {"camera_shift": centimetres / 100}}
        moved = moved if centimetres else {}
        moved["is_optional"] = setting is SHIFT_FEW
        for modality in ("cat", "xyz", "rgb"):
            cells += [Cell(setting, modality, 0, variant="reposed", changes=REPOSED[setting], **moved)]
            cells += [Cell(setting, modality, 0, **moved)]
    for setting in (MOVED, MOVED_FEW, MOVED_ALONE):
        few = setting is MOVED_FEW
        cells += [Cell(setting, modality, 0, is_optional=few) for modality in three]
        cells += [Cell(setting, modality, 0, is_optional=few, **displaced) for modality in ("xyz", "cat")]
    cells += [Cell(LIFT, modality, seed) for seed in (0, 1) for modality in second]
    others = [modality for modality in MODALITIES if modality not in ("rgb", "cat")]
    cells += [Cell(STACK, modality, 0, is_optional=True) for modality in others]
    cells += [Cell(CAN, modality, 0, is_optional=True) for modality in MODALITIES]
    return tuple(cells)


# In the order in which they are made.
CELLS = _cells()
