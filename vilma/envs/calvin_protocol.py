"""CALVIN's long-horizon protocol: 34 tasks, 1000 chains of five, their initial states and instructions.

What a policy meets is given by numbers that the public evaluation draws from numpy's legacy generator; this
module draws the same ones (compared with the public code, mees/calvin at fa03f01, for all 1000 chains). The
chains take a while to draw, so they lie beside this file as JSON. Needs numpy alone.

Source: O. Mees et al., "CALVIN: A Benchmark for Language-Conditioned Policy Learning for Long-Horizon Robot
Manipulation Tasks", RA-L 2022.
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

__all__ = [
    "CHAINS",
    "CHAIN_LENGTH",
    "INSTRUCTIONS",
    "SUBTASK_STEPS",
    "TASKS",
    "Chain",
    "chains",
    "draw_chains",
    "initial_state",
    "load_chains",
]

CHAINS, CHAIN_LENGTH, SUBTASK_STEPS = 1000, 5, 360
COLORS = ("red", "blue", "pink")

# The order of a condition, which also is that of the text from which its seed comes.
CONDITION = {
    "led": (0, 1),
    "lightbulb": (0, 1),
    "slider": ("right", "left"),
    "drawer": ("closed", "open"),
    "red_block": ("table", "slider_right", "slider_left"),
    "blue_block": ("table", "slider_right", "slider_left"),
    "pink_block": ("table", "slider_right", "slider_left"),
    "grasped": (0,),
}

# Task -> the instruction that the protocol gives.
INSTRUCTIONS = {
    **{
        f"rotate_{color}_block_{side}": f"take the {color} block and rotate it to the {side}"
        for color in COLORS
        for side in ("right", "left")
    },
    **{
        f"push_{color}_block_{side}": f"go push the {color} block {side}"
        for color in COLORS
        for side in ("right", "left")
    },
    "move_slider_left": "push the sliding door to the left side",
    "move_slider_right": "push the sliding door to the right side",
    "open_drawer": "pull the handle to open the drawer",
    "close_drawer": "push the handle to close the drawer",
    **{
        f"lift_{color}_block_{place}": text.format(color)
        for color in COLORS
        for place, text in (
            ("table", "grasp and lift the {} block"),
            ("slider", "lift the {} block from the sliding cabinet"),
            ("drawer", "Take the {} block from the drawer"),
        )
    },
    "place_in_slider": "store the grasped block in the sliding cabinet",
    "place_in_drawer": "store the grasped block in the drawer",
    "stack_block": "stack the grasped block",
    "unstack_block": "remove the stacked block",
    "turn_on_lightbulb": "use the switch to turn on the light bulb",
    "turn_off_lightbulb": "use the switch to turn off the light bulb",
    "turn_on_led": "press the button to turn on the led light",
    "turn_off_led": "press the button to turn off the led light",
    "push_into_drawer": "slide the block that it falls into the drawer",
}

# The order in which the protocol numbers the tasks when it draws them.
TASKS = tuple(INSTRUCTIONS)

# A chain has at most one task of each of these groups.
GROUPS = (
    *("rotate|push", "move_slider", "open_drawer|close_drawer"),
    *("lift_*_table", "lift_*_slider", "lift_*_drawer"),
    *("place", "turn", "push_into_drawer", "stack", "unstack"),
)


class Chain(NamedTuple):
    """One chain: the scene that it starts from (see ``CONDITION``) and its five tasks."""

    condition: dict[str, int | str]
    tasks: tuple[str, ...]


@functools.cache
def group(task: str) -> str:
    """Which of ``GROUPS`` a task belongs to."""
    verb, *_, last = task.split("_")
    if verb == "lift":
        return f"lift_*_{last}"
    if task == "push_into_drawer":
        return task
    if verb in ("rotate", "push"):
        return "rotate|push"
    if verb in ("open", "close"):
        return "open_drawer|close_drawer"
    return "move_slider" if verb == "move" else verb


@functools.cache
def rules(task: str) -> tuple[tuple[dict, dict], ...]:
    """(what must hold, what then changes) for every way in which a task can be done."""
    free, held = {"grasped": 0}, {"grasped": 1}
    verb, *words = task.split("_")
    blocks = [f"{color}_block" for color in COLORS]
    block = f"{words[0]}_block"
    if task == "push_into_drawer":  # the other two are out of the way
        away = ("slider_right", "slider_left")
        return tuple(
            ({b: "table", **{o: away for o in blocks if o != b}, "drawer": "open", **free}, {b: "drawer"})
            for b in blocks
        )
    if verb in ("rotate", "push"):
        return (({block: "table", **free}, {}),)
    if verb == "move":
        other = "right" if words[1] == "left" else "left"
        return (({"slider": other, **free}, {"slider": words[1]}),)
    if verb in ("open", "close"):
        before, after = ("closed", "open") if verb == "open" else ("open", "closed")
        return (({"drawer": before, **free}, {"drawer": after}),)
    if verb == "lift":
        taken = {block: "grasped", **held}
        if words[-1] == "table":
            return (({block: "table", **free}, taken),)
        if words[-1] == "drawer":
            return (({block: "drawer", "drawer": "open", **free}, taken),)
        # The door hides the half of the cabinet in front of which it stands.
        return tuple(
            ({block: f"slider_{side}", "slider": door, **free}, taken)
            for side, door in (("left", "right"), ("right", "left"))
        )
    if task == "place_in_slider":
        return tuple(
            ({b: "grasped", "slider": door, **held}, {b: f"slider_{door}", **free})
            for b in blocks
            for door in ("right", "left")
        )
    if task == "place_in_drawer":
        return tuple(({b: "grasped", "drawer": "open", **held}, {b: "drawer", **free}) for b in blocks)
    if verb == "stack":
        return tuple(
            ({a: "grasped", b: "table", **held}, {a: "stacked_top", b: "stacked_bottom", **free})
            for a, b in itertools.permutations(blocks, 2)
        )
    if verb == "unstack":
        return tuple(
            ({a: "stacked_top", b: "stacked_bottom", **free}, {a: "table", b: "table"})
            for a, b in itertools.permutations(blocks, 2)
        )
    state = int(words[0] == "on")
    return (({words[1]: 1 - state, **free}, {words[1]: state}),)


def is_valid(condition: Mapping[str, int | str], tasks: Sequence[str]) -> bool:
    """Whether these may be a chain: `is_possible`, and no two of one group."""
    return len({group(task) for task in tasks}) == len(tasks) and is_possible(condition, tasks)


def is_possible(condition: Mapping[str, int | str], tasks: Sequence[str]) -> bool:
    """Whether these tasks can be done one after the other, each in exactly one way."""
    state = dict(condition)
    for task in tasks:
        possible = [effect for needs, effect in rules(task) if _holds(state, needs)]
        if len(possible) != 1:
            return False
        state |= possible[0]
    return True


def _holds(state: Mapping[str, int | str], needs: Mapping[str, object]) -> bool:
    return all(state[k] in v if isinstance(v, tuple) else state[k] == v for k, v in needs.items())


def conditions() -> list[dict[str, int | str]]:
    """Every scene that a chain may start from: one or two blocks on the table, one a place of the cabinet."""
    found = []
    for values in itertools.product(*CONDITION.values()):
        slots = (values.count("slider_right"), values.count("slider_left"))
        if values.count("table") in (1, 2) and max(slots) < 2:
            found.append(dict(zip(CONDITION, values)))
    return found


def draw_chains(count: int = CHAINS) -> list[Chain]:
    """Draw ``count`` chains anew: a minute for 1000. Another count gives other chains, no prefix."""
    scenes = conditions()
    drawn: list[Chain] = []
    for index, (scene, share) in enumerate(zip(scenes, np.array_split(range(count), len(scenes)))):
        generator = np.random.RandomState(index)
        found = 0
        while found < len(share):
            tasks = tuple(TASKS[i] for i in generator.permutation(len(TASKS))[:CHAIN_LENGTH])
            if is_valid(scene, tasks):
                drawn.append(Chain(scene, tasks))
                found += 1
    order = list(range(count))
    np.random.RandomState(0).shuffle(order)
    return [drawn[i] for i in order]


@functools.cache
def chains(count: int = CHAINS) -> tuple[Chain, ...]:
    """The first ``count`` of the protocol's 1000 chains, from the file beside this module.

    Fewer are a part of the same thousand, for a quick look; the public code's ``get_sequences(count)`` draws
    other ones (`draw_chains`).
    """
    if not 1 <= count <= CHAINS:
        raise ValueError(f"got {count} sequences, the protocol has 1 to {CHAINS}")
    return load_chains(Path(__file__).with_name("calvin_chains.json"))[:count]


def load_chains(path: str | Path) -> tuple[Chain, ...]:
    """Chains from a JSON file: ``{"conditions": [[values], ...], "chains": [[condition, task, ...], ...]}``.

    Raises ValueError for a file with anything else in it.
    """
    try:
        found = json.loads(Path(path).read_text())
        scenes = [dict(zip(CONDITION, values, strict=True)) for values in found["conditions"]]
        result = tuple(Chain(scenes[index], tuple(tasks)) for index, *tasks in found["chains"])
        unknown = {task for chain in result for task in chain.tasks} - set(TASKS)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold chains of CALVIN ({error!r})") from error
    if unknown:
        raise ValueError(f"{path} names unknown tasks: {', '.join(sorted(unknown))}")
    return result


def dump_chains(drawn: Sequence[Chain]) -> str:
    """The text of a file for `load_chains`, a line for each chain."""
    scenes = conditions()
    lines = [json.dumps([scenes.index(chain.condition), *chain.tasks]) for chain in drawn]
    heads = [json.dumps(list(scene.values())) for scene in scenes]
    return '{"conditions": [\n' + ",\n".join(heads) + '\n],\n"chains": [\n' + ",\n".join(lines) + "\n]}\n"


# The arm's rest pose: tool (xyz, Euler xyz), opening, seven joints, gripper open.
_ROBOT = (
    *(0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963),
    *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0),
)
_TABLE = ((0.0500000896, -0.120000177, 0.459990009), (0.229995412, -0.11999514, 0.45999001))
_CABINET = {
    "slider_left": (-0.240851662, 0.0924044687, 0.460990009),
    "slider_right": (0.070341633, 0.0924044687, 0.460990009),
}
_YAW = (np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)


def initial_state(condition: Mapping[str, int | str]) -> tuple[np.ndarray, np.ndarray]:
    """``robot_obs`` (15,) and ``scene_obs`` (24,) that a chain with this condition starts from.

    Which block lies where on the table, and the yaw of all, come from a generator that the condition seeds.
    """
    text = f"dict_values({[condition[key] for key in CONDITION]})"
    generator = np.random.RandomState(fnv1_32(text.encode("utf-16-le")))
    places = [np.array(place) for place in _TABLE]
    generator.shuffle(places)
    scene = np.zeros(24)
    scene[0] = 0.28 if condition["slider"] == "left" else 0.0
    scene[1] = 0.22 if condition["drawer"] == "open" else 0.0
    scene[3] = 0.088 if condition["lightbulb"] == 1 else 0.0
    scene[4:6] = condition["lightbulb"], condition["led"]
    for number, color in enumerate(COLORS):
        place = condition[f"{color}_block"]
        first = color == "red" or (color == "blue" and condition["red_block"] != "table")
        at = 6 + 6 * number
        scene[at : at + 3] = _CABINET[place] if place in _CABINET else places[0 if first else 1]
        scene[at + 5] = generator.uniform(*_YAW)
    return np.array(_ROBOT), scene


def fnv1_32(data: bytes) -> int:
    """FNV-1, 32 bits, started from zero: what the public code's hash library does, on UTF-16 for texts."""
    value = 0
    for byte in data:
        value = (value * 16_777_619) & 0xFFFFFFFF ^ byte
    return value
