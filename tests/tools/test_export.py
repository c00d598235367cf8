"""vilma export: what is written computes what the model computes, at other batch sizes, without vilma."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch

import vilma.vil  # noqa: F401 - registers the family
from vilma.tools._backbone import Loaded
from vilma.tools.export import export, main

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_classes": 5}


def loaded(name: str, **options) -> Loaded:
    """A model whose gates, norms and classifier are not as initialised, which would hide errors."""
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() == 1 or "gate" in key or key.startswith("head"):
                value.add_(0.05 * torch.randn_like(value))
    data = timm.data.resolve_model_data_config(model)
    return Loaded(model, tuple(map(str, range(model.num_classes))), data, name)


@pytest.mark.parametrize(
    "name", ["vil2_tiny_patch16_224", pytest.param("vil_tiny_patch16_224", marks=pytest.mark.long)]
)
def test_a_program_runs_where_vilma_is_not(name, tmp_path):
    given = loaded(name, **SMALL | {"depth": 2 if name.startswith("vil_") else 1})
    results = export(given, 32, tmp_path, ("safetensors", "torch"), (1, 5))
    assert results["safetensors"]["error"] == 0 and results["torch"]["error"] < 1e-5
    facts = json.loads((tmp_path / "export.json").read_text())
    assert facts["input"]["shape"] == ["batch", 3, 32, 32] and facts["output"]["shape"] == ["batch", 5]
    x = torch.randn(3, 3, 32, 32)
    torch.save({"x": x, "y": given.model(x).detach()}, tmp_path / "pair.pt")
    code = (
        "import sys, torch\n"
        "pair = torch.load('pair.pt')\n"
        "module = torch.export.load('model.pt2').module()\n"
        "assert 'vilma' not in sys.modules\n"
        "print(float((module(pair['x']) - pair['y']).abs().max() / pair['y'].abs().max()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="--formats has tflite, wanted some of safetensors,torch,onnx,aoti"):
        main(["vil2_tiny_patch16_224", "--random", "--formats", "torch,tflite"])


def test_a_program_that_differs_is_found(tmp_path, monkeypatch):
    from vilma.tools import export as tool

    given = loaded("deit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    monkeypatch.setitem(tool._WRITERS, "torch", lambda *_: ("model.pt2", lambda x: given.model(x) + 1e-3))
    assert not export(given, 32, tmp_path, ("torch",), (1,))["torch"]["met"]


@pytest.mark.long
def test_onnx_of_the_published_model_at_two_batch_sizes(tmp_path):
    """vil2_tiny_patch16_224 in onnxruntime, and as an exported program."""
    given = loaded("vil2_tiny_patch16_224")
    results = export(given, 224, tmp_path, ("torch", "onnx"), (1, 3))
    assert results["torch"]["error"] < 1e-4 and results["onnx"]["error"] < 1e-4


@pytest.mark.long
def test_compiled_ahead_of_time(tmp_path):
    given = loaded("vil2_tiny_patch16_224", **SMALL)
    assert export(given, 32, tmp_path, ("aoti",), (2, 3))["aoti"]["error"] < 1e-4


def test_any_model_of_timm_is_exported(tmp_path):
    given = loaded("deit_tiny_patch16_224", img_size=32, embed_dim=32, depth=1, num_heads=2)
    assert export(given, 32, tmp_path, ("torch",), (1, 3))["torch"]["error"] < 1e-5
