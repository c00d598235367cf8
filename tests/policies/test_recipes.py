"""The paper's recipes: sizes on the meta device, and what their training is made of."""

import dataclasses

import pytest
import torch

from vilma import config
from vilma.policies import PointMapPolicy
from vilma.tools.train_policy import RunConfig
from vilma.training.optim import OptimConfig, build_optimizer
from vilma.training.schedule import ema_decay, tristage_lr


def recipe(name):
    return config.load(RunConfig, f"configs/policies/pointmap_{name}.yaml")


def build(name, device="meta", **changes):
    """Without pretrained weights: neither they nor CLIP are needed to know the size."""
    settings = {"rgb_pretrained": False, "text_encoder": "hashed"} | changes
    with torch.device(device):
        return PointMapPolicy(dataclasses.replace(recipe(name).policy, **settings))


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


@pytest.mark.parametrize(
    "name, changes, wanted",
    [
        # The reference's cond_layer, never used: Linear(1024, 2048) and Linear(1024, 512) without a bias.
        ("calvin", {}, 147.002791 - (1025 * 2048 + 1024 * 512) / 1e6),
        ("robocasa", {}, 111.089),
        ("robocasa", {"modality": "cat"}, 194.69),
        ("real", {}, 94.459),  # the paper says 96
        ("real", {"rgb_encoder": "film_resnet50", "xyz_encoder": "film_resnet50"}, 115.565),
    ],
)
def test_sizes(name, changes, wanted):
    policy = build(name, **changes)
    assert millions(policy) == pytest.approx(wanted, abs=2e-3 if name != "real" else 0.05)
    assert all(p.requires_grad for p in policy.parameters())


def test_a_recipe_is_built_without_its_pretrained_weights(monkeypatch):
    """As on a machine that reaches no hub; a training, which asks for them, is told what to fetch."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with torch.device("meta"), pytest.warns(UserWarning, match="random weights: .* pretrained=True"):
        policy = PointMapPolicy.from_config("configs/policies/pointmap_calvin.yaml")
    assert millions(policy) == pytest.approx(144.379303, abs=1e-6)
    small = dataclasses.replace(recipe("real").policy, rgb_encoder="film_resnet18", dim=64, num_blocks=1)
    with pytest.raises(ValueError, match=r"weights of resnet18 cannot be had .*rgb_weights, or train"):
        PointMapPolicy.from_config(small, pretrained=True)


def test_parts_of_the_calvin_model():
    policy = build("calvin")
    assert millions(policy.encoders) == pytest.approx(4 * 27.447872, abs=1e-6)
    assert policy.denoiser.num_obs_tokens == 4 and policy.denoiser.position.shape == (1, 15, 512)
    assert list(policy.encoders) == ["static_rgb", "static_xyz", "gripper_rgb", "gripper_xyz"]
    transformer = build("calvin", backbone="transformer", num_blocks=8)
    assert millions(transformer.denoiser) == pytest.approx(36.0, abs=0.1)


def test_calvin_training():
    run = recipe("calvin")
    rate = [
        tristage_lr(step, 45_000, run.optim.lr, run.schedule.phases, run.schedule.initial_ratio)
        for step in (0, 900, 4499, 25_000)
    ]
    assert run.schedule.name == "tristage" and run.schedule.length == 45_000
    assert rate == pytest.approx([1e-5, 1e-4, 1e-4, 4.9e-5], rel=0.02)
    assert ema_decay(run.ema, 1) == 0 and ema_decay(run.ema, 10**7) == 0.9999
    assert (run.train.steps, run.train.batch_size, run.train.precision) == (25_000, 512, "bf16")


def test_weight_decay_rules():
    """Matrices of backbone and encoders decay; biases, norms and positions do not; nothing is left out."""
    policy = build("robocasa", device="cpu", dim=64, num_blocks=1, xyz_encoder="film_resnet18")
    optimizer = build_optimizer(OptimConfig(), policy)
    names = {id(p): name for name, p in policy.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decay) == set(names.values())
    for name, value in decay.items():
        kept = name.endswith("bias") or "norm" in name or ".bn" in name or name == "denoiser.position"
        kept = kept or "downsample.1" in name
        assert value == (0 if kept else 0.05), name


@pytest.mark.long
def test_every_parameter_of_the_calvin_model_receives_a_gradient():
    """Full width, small pictures; FiLM starts at zero, so that what feeds it moves from the second step."""
    policy = build("calvin", device="cpu", image_size={}, resize={}, shift={}).train()
    camera = {
        "images": torch.rand(2, 1, 3, 32, 32),
        "depth": 0.5 + torch.rand(2, 1, 32, 32),
        "intrinsics": torch.tensor([[30.0, 0, 16], [0, 30, 16], [0, 0, 1]]).expand(2, 1, 3, 3),
        "pose": torch.eye(4).expand(2, 1, 4, 4),
    }
    batch = {f"observation.{k}.{c}": v for c in ("static", "gripper") for k, v in camera.items()}
    batch |= {"task": ["lift", "push the block"], "action": torch.rand(2, 10, 7)}
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        policy(batch)[0].backward()
        optimizer.step()
    missing = [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
