"""A policy without cameras: low-dimensional data sets (robomimic's ``low_dim``) train too."""

import numpy as np
import pytest
import torch

from vilma.policies import PointMapPolicy, load_policy

SMALL = {
    "type": "pointmap",
    "cameras": [],
    "use_state": True,
    "state_dim": 5,
    "action_dim": 2,
    "action_normalization": "none",
    "state_normalization": "none",
    "reference_frame": "world",
    "action_kind": "delta",
    "horizon": 4,
    "execute": 2,
    "dim": 32,
    "num_blocks": 1,
    "num_heads": 2,
}


@pytest.mark.parametrize("modality", ["cat", "attention"])
def test_it_learns_from_the_state_alone(modality, tmp_path):
    torch.manual_seed(0)
    policy = PointMapPolicy.from_config({"policy": {**SMALL, "modality": modality, "head": "regression"}})
    assert policy.observation_keys == ("observation.state",)
    state = torch.randn(16, 1, 5)
    target = state[..., :2].repeat(1, 4, 1).tanh()
    batch = {"observation.state": state, "action": target, "task": ["go"] * 16}
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    first = None
    for _ in range(60):
        loss, _ = policy(batch)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3 * first
    policy.save_pretrained(tmp_path)
    loaded = load_policy(tmp_path)
    action = loaded.select_action({"observation.state": state[:, 0].numpy(), "task": ["go"] * 16})
    assert np.abs(action.numpy() - target[:, 0].numpy()).mean() < 0.3


def test_without_cameras_and_state_nothing_is_seen():
    with pytest.raises(ValueError, match="A policy on the state alone needs use_state"):
        PointMapPolicy.from_config({"policy": {**SMALL, "use_state": False}})
    with pytest.raises(ValueError, match="dp3 makes one cloud of all cameras"):
        PointMapPolicy.from_config({"policy": {**SMALL, "modality": "dp3"}})
