"""A tiny PointMapPolicy and batches for it."""

import dataclasses

import pytest
import torch

from vilma.policies import PointMapPolicy, PointMapPolicyConfig

SIZE = 16
ENCODER = {"features": 16, "channels": [8, 8, 8], "stride": 4}
TINY = PointMapPolicyConfig(
    cameras=("front", "wrist"),
    action_dim=3,
    reference_frame="world",
    action_kind="delta",
    rgb_encoder="spatial_softmax",
    rgb_encoder_options=ENCODER,
    xyz_encoder="spatial_softmax",
    xyz_encoder_options=ENCODER | {"expect_channels": 3, "mask_channel": 3},
    fusion_dim=16,
    fusion_layers=1,
    fusion_heads=2,
    cloud_points=24,
    cloud_stride=2,
    cloud_features=16,
    text_dim=32,
    use_state=True,
    state_dim=2,
    state_normalization="none",
    action_normalization="none",
    horizon=4,
    execute=2,
    dim=32,
    num_blocks=2,
    num_heads=4,
)


@pytest.fixture
def tiny_policy():
    """Maker of fresh policies: ``tiny_policy(modality="add", head="flow")``."""

    def make(seed: int = 0, **changes) -> PointMapPolicy:
        torch.manual_seed(seed)
        return PointMapPolicy(dataclasses.replace(TINY, **changes))

    return make


@pytest.fixture
def tiny_batch():
    """Maker of batches: ``tiny_batch(batch=3, steps=1)``."""

    def make(batch: int = 3, steps: int = 1, seed: int = 0) -> dict:
        g = torch.Generator().manual_seed(seed)

        def rand(*shape):
            return torch.rand(*shape, generator=g)

        data = {
            "task": (["lift the cube", "open the drawer", "stack"] * batch)[:batch],
            "action": 2 * rand(batch, 4, 3) - 1,
            "observation.state": rand(batch, steps, 2),
        }
        intrinsics = torch.tensor([[20.0, 0, SIZE / 2], [0, 20.0, SIZE / 2], [0, 0, 1]])
        for camera in ("front", "wrist"):
            pose = torch.eye(4).repeat(batch, steps, 1, 1)
            pose[..., :3, 3] = rand(batch, steps, 3)
            data |= {
                f"observation.images.{camera}": (255 * rand(batch, steps, 3, SIZE, SIZE)).to(torch.uint8),
                f"observation.depth.{camera}": 0.3 + rand(batch, steps, SIZE, SIZE),
                f"observation.intrinsics.{camera}": intrinsics.repeat(batch, steps, 1, 1),
                f"observation.pose.{camera}": pose,
            }
        return data

    return make
