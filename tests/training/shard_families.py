"""As a script, one of two processes that shard every kind of model of the house and compare with the whole.

``python shard_families.py RANK MEETING`` prints a line for each model: name, blocks, largest error.
"""

import copy
import sys
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from torch import nn

import vilma.vil  # noqa: F401 (registers the family)
from vilma.policies import PointMapPolicy
from vilma.tools.train_policy import blank_batch
from vilma.training.distributed import distribute, full, sharding_blocks

sys.path.insert(0, str(Path(__file__).parent))
from toy_run import join

BASE = {"type": "pointmap", "cameras": ["a", "b"], "image_size": {"a": [32, 32], "b": [32, 32]}}
BASE |= {"action_dim": 3, "use_state": True, "state_dim": 2, "dim": 32, "num_blocks": 2, "num_heads": 2}
BASE |= {"reference_frame": "world", "action_kind": "delta", "horizon": 4, "execute": 2}
BASE |= {"state_normalization": "none", "action_normalization": "none"}
VIL = {"xyz_encoder": "vil2_tiny_patch16_224", "xyz_encoder_options": {"img_size": 32, "depth": 2}}
POLICIES = {
    "cat of FiLM-ResNets": {"rgb_encoder": "film_resnet18", "xyz_encoder": "film_resnet18"},
    "6ch ViL": VIL | {"modality": "6ch", "backbone": "bixlstm"},
    "attention": {
        "modality": "attention",
        "rgb_encoder": "film_test_convnext",
        "xyz_encoder": "test_vit",
        "xyz_encoder_options": {"img_size": 32},
        "encoder_features": 32,
        "fusion_dim": 32,
        "fusion_heads": 2,
        "modality_dropout": 0.5,
        "text_encoder": "table",
        "tasks": ["lift", "stack"],
        "backbone": "transformer",
        "noise_token": "last",
    },
    "dp3": {"modality": "dp3", "head": "regression"},
}


class Classifier(nn.Module):
    def __init__(self, name: str, **options):
        super().__init__()
        self.network = timm.create_model(name, num_classes=3, **options)

    def forward(self, batch: dict) -> tuple[torch.Tensor, dict]:
        return nn.functional.cross_entropy(self.network(batch["x"]), batch["y"]), {}


def models():
    for name, options in POLICIES.items():
        policy = PointMapPolicy.from_config(BASE | {"modality": "cat"} | options)
        batch = blank_batch(policy.config, 4)
        pictures = {k: torch.randint_like(v, 256) for k, v in batch.items() if ".images." in k}
        depth = {k: v + 0.1 * torch.rand_like(v) for k, v in batch.items() if ".depth." in k}
        yield name, policy, {**batch, **pictures, **depth, "action": torch.rand_like(batch["action"])}
    for name in ("vil2_tiny_patch16_224", "vil_tiny_patch16_224", "test_resnet"):
        options = {} if name == "test_resnet" else {"img_size": 32, "depth": 2}
        yield name, Classifier(name, **options), {"x": torch.randn(4, 3, 32, 32), "y": torch.arange(4) % 3}


def run(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    loss, _ = model.train()(dict(batch))
    loss.backward()
    gradients = {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients


def main(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    join(rank, 2, meeting)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    for name, model, batch in models():
        sharded = distribute(copy.deepcopy(model), accelerator)
        expected, found = run(model, batch), run(sharded, batch)
        assert expected.keys() == found.keys(), name
        error = max(float((found[k] - v).norm() / v.norm().clamp_min(1e-6)) for k, v in expected.items())
        if rank == 0:
            print(f"{name}: {len(sharding_blocks(model))} blocks, error {error:.1e}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
