"""The first training batch of a policy is looked at: a right one passes in silence, a wrong one is named."""

import contextlib
import copy
import importlib.util
import warnings

import pytest
import torch

import vilma.policies.pointmap_policy as module
from vilma.pointmap import GeometryWarning
from vilma.pointmap.camera import opencv_from_opengl

from ..pointmap.test_check import SIZE, WORKSPACE, changed
from ..pointmap.test_check import batch as scene


@pytest.fixture
def policy(tiny_policy):
    return lambda **changes: tiny_policy(depth_range=(0.05, 3.0), workspace=WORKSPACE, **changes).train()


def whole(values):
    """A scene of tests/pointmap/test_check.py as a batch of the tiny policy."""
    return values | {"action": torch.zeros(4, 4, 3), "observation.state": torch.zeros(4, 1, 2)}


def wrong(part, function):
    return whole(changed(part, function, ["wrist"]))


def as_zbuffer(depth):
    near, far = 0.01, 3.0
    return ((1 - near / depth) / (1 - near / far)).clamp(max=1)


@pytest.mark.parametrize("modality", ["rgb", "depth", "xyz", "6ch", "add", "cat", "attention", "dp3"])
def test_a_right_batch_passes_in_silence(policy, modality):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy(modality=modality)(whole(scene()))


@pytest.mark.parametrize(
    "values, key, text",
    [
        (lambda: wrong("depth", lambda d: -d), "depth", "behind the camera|no pixel has a reading"),
        (lambda: wrong("depth", as_zbuffer), "depth", "depth buffer"),
        (lambda: wrong("depth", lambda d: d * 1000), "depth", "divide by 1000"),
        (lambda: wrong("pose", opencv_from_opengl), "pose", "OpenGL axes"),
        (lambda: wrong("pose", lambda p: p.mT), "pose", "transposed"),
        (
            lambda: wrong("intrinsics", lambda k: k * k.new_tensor([4.0, 4, 1])[:, None]),
            "intrinsics",
            "192 x 256",
        ),
    ],
)
def test_wrong_conventions_are_named(policy, values, key, text):
    with (
        pytest.warns(GeometryWarning, match=rf"^observation.{key}.wrist: .*({text})") as caught,
        contextlib.suppress(ValueError),  # on a CPU a pose that is not rigid is refused besides
    ):
        policy()(values())
    assert all(w.filename == __file__ for w in caught)


def test_sizes_that_differ_are_named_before_the_batch_is_refused(policy):
    values = wrong("images", lambda i: i[..., ::2, ::2])
    with (
        pytest.warns(GeometryWarning, match=r"^observation.images.wrist: .*24 x 32.*48 x 64"),
        pytest.raises(ValueError, match="camera 'wrist' must share one view"),
    ):
        policy()(values)


def test_once_for_each_policy_and_in_training_only(policy, monkeypatch):
    looks = []
    monkeypatch.setattr(module, "warn_about_geometry", lambda batch, *a, **k: looks.append(k))
    first, batch = policy(), whole(scene())
    with torch.no_grad():
        first.eval()(batch)
        assert not looks
        for _ in range(3):
            first.train()(batch)
        copy.deepcopy(first)(batch)
    assert len(looks) == 1
    assert looks[0]["workspace"] == WORKSPACE and looks[0]["depth_range"] == (0.05, 3.0)
    assert looks[0]["reference_frame"] == "world"
    policy()(batch)
    assert len(looks) == 2


def test_nothing_is_looked_at_while_compiling(policy, monkeypatch):
    looks = []
    monkeypatch.setattr(module, "warn_about_geometry", lambda *a, **k: looks.append(a))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    policy()(whole(scene()))
    assert not looks


def test_the_look_draws_nothing(policy, monkeypatch):
    batch, losses = whole(scene()), []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(policy()(batch)[0])
        monkeypatch.setattr(module, "warn_about_geometry", lambda *a, **k: None)
    assert torch.equal(*losses)


@pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="needs the extra robot")
def test_a_robosuite_batch_passes_in_silence(tiny_policy):
    import vilma.envs

    cameras = ("agentview", "robot0_eye_in_hand")
    env = vilma.envs.make("robosuite/Lift", cameras=list(cameras), size=SIZE[0], seed=0)
    seen = []
    try:
        for seed in range(2):
            observation, _ = env.reset(seed=seed)
            seen.append({k: v if isinstance(v, str) else v.copy() for k, v in observation.items()})
    finally:
        env.close()
    keys = [key for key in seen[0] if key != "task"]
    batch = {key: torch.stack([torch.as_tensor(one[key]) for one in seen])[:, None] for key in keys}
    batch |= {"task": [one["task"] for one in seen], "action": torch.zeros(2, 4, 3)}
    for modality in ("cat", "depth"):
        policy = tiny_policy(cameras=cameras, modality=modality, use_state=False, depth_range=(0.05, 3.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error", GeometryWarning)
            policy.train()(batch)
