"""Parameter groups: every trainable parameter once, weight decay where it belongs."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from vilma.policies import PointMapPolicy
from vilma.training import OptimConfig, build_optimizer
from vilma.training.optim import check_optimizer, no_weight_decay


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.proj = nn.Linear(4, 4)

    def no_weight_decay(self):
        return {"pos_embed"}


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.table = nn.Parameter(torch.zeros(5, 2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def no_weight_decay(self):
        return {"table"}


def decays(optimizer, model):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_groups(name):
    model = Policy()
    found = decays(build_optimizer(OptimConfig(name=name, weight_decay=0.1), model), model)
    decayed = {n for n, decay in found.items() if decay == 0.1}
    assert decayed == {"encoder.proj.weight", "head.weight"}
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(found[n] == 0 for n in set(found) - decayed)


VARIANTS = {
    "paper": {"rgb_encoder": "film_resnet18", "xyz_encoder": "film_resnet18"},
    "attention": {
        "modality": "attention",
        "modality_dropout": 0.2,
        "rgb_encoder": "test_convnext",
        "xyz_encoder": "test_vit",
        "xyz_encoder_options": {"img_size": 32},
        "encoder_features": 32,
        "fusion_dim": 32,
        "fusion_heads": 2,
        "text_encoder": "table",
        "tasks": ["lift", "stack"],
        "backbone": "transformer",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_a_policy_is_there_once_and_decays_by_its_kind(variant):
    """The paper's rule: none for biases, norms, embeddings; here also learned tokens and layer scales."""
    options = {
        "type": "pointmap",
        "modality": "cat",
        "cameras": ["a", "b"],
        "action_dim": 3,
        "use_state": True,
    }
    options |= {"image_size": {"a": [32, 32], "b": [32, 32]}, "state_dim": 2, "horizon": 4, "execute": 2}
    options |= {
        "reference_frame": "world",
        "action_kind": "delta",
        "dim": 32,
        "num_blocks": 2,
        "num_heads": 2,
    }
    options |= {"state_normalization": "none", "action_normalization": "none"}
    policy = PointMapPolicy.from_config(options | VARIANTS[variant])
    found = decays(build_optimizer(OptimConfig(weight_decay=0.1), policy), policy)
    maps = [name for name, m in policy.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    assert {name for name, decay in found.items() if decay == 0.1} == {f"{name}.weight" for name in maps}
    assert set(found.values()) == {0.0, 0.1}
    assert list(found.keys() ^ dict(policy.named_parameters()).keys()) == []
    assert any("state_proj" in name for name in found) and "denoiser.position" in found


def test_no_weight_decay_is_asked_of_inner_modules():
    assert no_weight_decay(Policy()) == {"table", "encoder.pos_embed"}


def test_options_reach_the_optimiser():
    optimizer = build_optimizer(OptimConfig(lr=3e-4, betas=(0.5, 0.6), eps=1e-5), Policy())
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (3e-4, (0.5, 0.6), 1e-5, True)


def test_layer_decay_scales_the_learning_rate():
    import timm

    model = timm.create_model("test_vit", num_classes=3)
    optimizer = build_optimizer(OptimConfig(layer_decay=0.5), model)
    scales = sorted({g["lr_scale"] for g in optimizer.param_groups})
    assert scales[-1] == 1.0 and all(b == 2 * a for a, b in pairwise(scales))
    assert decays(optimizer, model)["pos_embed"] == 0


def test_a_parameter_missing_twice_or_foreign_is_an_error():
    model = Policy()
    optimizer = build_optimizer(OptimConfig(), model)
    late = nn.Linear(2, 2)
    model.late = late
    with pytest.raises(ValueError, match=r"missing \['late.weight', 'late.bias'\]"):
        check_optimizer(optimizer, model)
    del model.late
    check_optimizer(optimizer, model)
    optimizer.param_groups[0]["params"].append(model.head.weight)
    with pytest.raises(ValueError, match=r"twice \['head.weight'\]"):
        check_optimizer(optimizer, model)
    optimizer.param_groups[0]["params"][-1] = late.weight
    with pytest.raises(ValueError, match="1 that are not"):
        check_optimizer(optimizer, model)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(OptimConfig(), nn.Linear(2, 2).requires_grad_(False))
