"""CALVIN's chains and initial states against the public code's output (tests/data/calvin/protocol.json)."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from vilma.envs import calvin_protocol as protocol

PUBLIC = json.loads((Path(__file__).parents[1] / "data" / "calvin" / "protocol.json").read_text())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_all_chains_are_those_of_the_public_code():
    rows = [[*chain.condition.values(), *chain.tasks] for chain in protocol.chains()]
    assert len(rows) == 1000 and digest(json.dumps(rows).encode()) == PUBLIC["tasks_sha256"]


def test_all_initial_states_are_those_of_the_public_code():
    states = [protocol.initial_state(chain.condition) for chain in protocol.chains()]
    for robot, scene, example in zip(*zip(*states[:3]), PUBLIC["examples"]):
        assert robot.tolist() == example["robot_obs"] and scene.tolist() == example["scene_obs"]
    assert digest(np.array([scene for _, scene in states]).tobytes()) == PUBLIC["scene_obs_sha256"]
    assert digest(np.array([robot for robot, _ in states]).tobytes()) == PUBLIC["robot_obs_sha256"]


def test_hash_is_that_of_the_public_code():
    for example in PUBLIC["examples"]:
        text = f"dict_values({list(example['condition'].values())})"
        assert protocol.fnv1_32(text.encode("utf-16-le")) == example["hash"]
    assert protocol.fnv1_32(b"hello world") == 2805756500  # the hash library's own example


@pytest.mark.long
def test_drawing_anew_gives_the_file():
    assert tuple(protocol.draw_chains()) == protocol.chains()


def test_drawn_chains_are_valid():
    for chain in (*protocol.draw_chains(3), *protocol.chains(60)):
        assert protocol.is_valid(chain.condition, chain.tasks)


def test_conditions_and_tasks():
    assert len(protocol.TASKS) == 34 == len(set(protocol.TASKS))
    assert {protocol.group(task) for task in protocol.TASKS} == set(protocol.GROUPS)
    assert len(protocol.conditions()) == 192
    scene = dict.fromkeys(("led", "lightbulb", "grasped"), 0) | {"slider": "right", "drawer": "closed"}
    scene |= {"red_block": "table", "blue_block": "table", "pink_block": "slider_left"}
    assert protocol.is_valid(scene, ("lift_red_block_table", "stack_block", "unstack_block"))
    assert not protocol.is_valid(scene, ("stack_block",))  # nothing is held
    assert not protocol.is_valid(scene, ("lift_pink_block_drawer",))
    assert protocol.is_valid(scene, ("lift_pink_block_slider",))
    assert not protocol.is_valid({**scene, "slider": "left"}, ("lift_pink_block_slider",))
    assert not protocol.is_valid(scene, ("turn_on_led", "turn_on_lightbulb"))  # one group
    assert protocol.is_possible(scene, ("turn_on_led", "turn_off_led", "turn_on_led"))
    # With another block on the table it is not told which one is to fall into the drawer.
    assert not protocol.is_valid({**scene, "drawer": "open"}, ("push_into_drawer",))


def test_files_of_chains(tmp_path):
    path = tmp_path / "chains.json"
    path.write_text(protocol.dump_chains(protocol.chains(7)))
    assert protocol.load_chains(path) == protocol.chains(7)
    path.write_text(path.read_text().replace("open_drawer", "open_door"))
    with pytest.raises(ValueError, match="open_door"):
        protocol.load_chains(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="does not hold chains"):
        protocol.load_chains(path)
    with pytest.raises(ValueError, match="1 to 1000"):
        protocol.chains(1001)
