"""Vision-LSTM against vectors of the official implementation: outputs, features and gradients."""

import hashlib
import json

import numpy as np
import pytest
import torch

from vilma.testing import golden, golden_dir
from vilma.vil import VisionLSTM, checkpoint_filter_fn, mixing
from vilma.vil.checkpoints import rename
from vilma.vil.mixing import MixWeights
from vilma.xlstm import mlstm

FORWARD, GRADIENT = 2e-5, 2e-4


def entry(name: str) -> dict:
    entries = json.loads((golden_dir("vil") / "index.json").read_text())["fixtures"]
    return next(e for e in entries if e["id"] == name)


def build(e: dict) -> VisionLSTM:
    """Our model for the arguments of an official class."""
    given = e["kwargs"]
    first = e["cls"] == "VisionLSTM"
    legacy = given.get("legacy_norm", False)
    options = {
        "img_size": tuple(given["input_shape"][1:]),
        "patch_size": given["patch_size"],
        "stride": given.get("stride"),
        "num_classes": (given["output_shape"] or [0])[0],
        "embed_dim": given["dim"],
        "depth": given["depth"],
    }
    if first:
        options |= {
            "global_pool": "bilateral_avg",
            "paired": False,
            "conv_kind": "causal1d",
            "conv_kernel_size": 4,
            "proj_bias": False,
            "norm_bias": False,
            "final_norm": legacy,
            "norm_eps": 1e-5,
            "fc_norm_eps": 1e-6,
        }
    else:
        pooling = given.get("pooling", "bilateral_flatten")
        options |= {
            "global_pool": "" if pooling in (None, "to_image") else pooling,
            "conv_kind": given.get("conv_kind", "2d"),
            "proj_bias": given.get("proj_bias", True),
            "norm_bias": given.get("norm_bias", True),
            "fc_norm": legacy,
        }
    return VisionLSTM(**options).eval()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


MODELS = (
    "v2_d32_sq_biasT_flatten",
    "v2_d32_p16_legacy",
    "v2_d32_causal1d_nobias_avg",
    "v2_d32_features_seq",
    "v2_d32_features_to_image",
    "v2_d32_posembed_interp_4to6",
    "v1_d32_sq_avg",
    "v1_d32_stride",
)


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    e, t = entry(name), golden("vil", f"{name}.safetensors")
    model = build(e)
    official = {key[3:]: value for key, value in t.items() if key.startswith("sd.")}
    model.load_state_dict(checkpoint_filter_fn(official, model), strict=True)
    image = t["input"].clone().requires_grad_()
    seen = {}

    def keep(key):
        return lambda module, inputs, output: seen.setdefault(key, output)

    subs = [m for m in model.modules() if type(m).__name__ == "ViLBlock"]
    hooks = [subs[j].register_forward_hook(keep(f"feat.sub{j}")) for j in (0, 1)]
    hooks += [
        subs[0].register_forward_pre_hook(lambda module, inputs: seen.setdefault("feat.embed", inputs[0]))
    ]
    hooks += [subs[-1].register_forward_hook(keep("feat.last"))]
    output = model(image)
    output.square().sum().backward()
    if e["kwargs"].get("pooling", "") is None:
        output = output.flatten(1, 2)
    elif e["kwargs"].get("pooling") == "to_image":
        output = output.permute(0, 3, 1, 2)
    assert error(output, t["output"]) <= e["tolerance_max_abs_over_absmax"]
    features = [key for key in t if key.startswith("feat.")]
    assert len(features) == 4
    for key in features:
        assert error(seen[key].flatten(1, 2), t[key]) <= FORWARD, key
    if "grad_input" in t:
        assert error(image.grad, t["grad_input"]) <= GRADIENT
    grads = rename({key[5:]: value for key, value in t.items() if key.startswith("grad.")}, model.paired)
    assert len(grads) == len(e["grads"])
    for key, value in grads.items():
        assert error(model.get_parameter(key).grad, value) <= GRADIENT, key


@pytest.mark.parametrize("name", ["convert_v1", "convert_v2"])
def test_published_checkpoint_names(name):
    e, t = entry(name), golden("vil", f"{name}.safetensors")
    model = build(e)
    raw = {key[4:]: value for key, value in t.items() if key.startswith("raw.")}
    model.load_state_dict(checkpoint_filter_fn({"state_dict": raw, "ctor_kwargs": {}}, model), strict=True)
    with torch.no_grad():
        assert error(model(t["input"]), t["output"]) <= e["tolerance_max_abs_over_absmax"]


def recipe(seed: int, shapes: dict[str, tuple], plain: set[str]) -> dict[str, torch.Tensor]:
    """The integer recipe of the vectors: weights by official name."""
    generator = np.random.Generator(np.random.PCG64(seed))
    tensors = {}
    one = np.float32
    for key in sorted(shapes):
        shape = shapes[key]
        u = (generator.integers(-32768, 32768, size=shape, dtype=np.int64) / 32768).astype(np.float32)
        fan_in = int(np.prod(shape[1:]))
        if key.endswith("fgate.bias"):
            x = np.linspace(3, 6, shape[0]).astype(np.float32) + one(0.5) * u
        elif key.endswith("igate.bias"):
            x = u
        elif key.endswith("learnable_skip"):
            x = one(1) + one(0.5) * u
        elif key.endswith("norm.weight"):
            x = one(key in plain) + one(0.3) * u
        elif len(shape) == 1:
            x = one(0.3) * u
        elif key == "pos_embed.embed":
            x = one(0.5) * u
        elif "conv" in key and "patch_embed" not in key:
            x = one(0.8) * u
        elif key.endswith("gate.weight"):
            x = one(2 / np.sqrt(fan_in)) * u
        else:
            x = one(1.7 / np.sqrt(fan_in)) * u
        tensors[key] = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return tensors


def to_hub(name: str) -> str:
    """The official hub name (generation 2) of one of ours."""
    if name.startswith("fc_norm."):
        return "legacy_norm." + name.removeprefix("fc_norm.")
    return "pos_embed.embed" if name == "pos_embed" else name


def test_tiny_at_its_real_size():
    e, t = entry("vil2_tiny_realsize_seed"), golden("vil", "vil2_tiny_realsize_seed.safetensors")
    model = build(e)
    assert sum(p.numel() for p in model.parameters()) == e["n_params"]
    shapes = {to_hub(name): tuple(p.shape) for name, p in model.state_dict().items()}
    weights = recipe(e["seed"], shapes, set(e["plain_layernorm_weights"]))
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode() + str(tuple(weights[key].shape)).encode() + weights[key].numpy().tobytes())
    assert digest.hexdigest() == e["state_dict_sha256"]
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    generator = np.random.Generator(np.random.PCG64(e["seed"] + 1000003))
    image = generator.integers(-32768, 32768, size=(1, 3, 224, 224), dtype=np.int64) / 32768
    image = torch.from_numpy(image.astype(np.float32) * np.float32(1.7320508))
    with torch.no_grad():
        assert error(model(image), t["output"]) <= e["tolerance_max_abs_over_absmax"]


@pytest.mark.parametrize("name", ["cell_S16", "cell_S49_wide", "cell_S64_bigigate"])
def test_cell(name):
    e, t = entry(name), golden("vil", f"{name}.safetensors")
    inputs = [t[key].clone().requires_grad_() for key in ("q", "k", "v", "igate", "fgate")]
    q, k, v, i, f = inputs
    h = mlstm(q, k, v, i[..., 0], f[..., 0])
    assert error(h, t["h_ref64"]) <= e["tolerance_max_abs_over_absmax"]
    h.square().sum().backward()
    for key, x in zip(("q", "k", "v", "igate", "fgate"), inputs):
        if f"grad_{key}" in t:
            assert error(x.grad, t[f"grad_{key}"]) <= GRADIENT, key


def test_cell_with_gates_and_norm():
    """The official cell module is gates, mLSTM and norm of the mixing, without its convolution and skip."""
    e, t = entry("mcell_d64_nh4"), golden("vil", "mcell_d64_nh4.safetensors")
    names = ("igate.weight", "igate.bias", "fgate.weight", "fgate.bias", "outnorm.weight", "outnorm.bias")
    weights = [t[f"sd.{name}"].clone().requires_grad_() for name in names]
    q, k, v = (t[key].clone().requires_grad_() for key in "qkv")
    qkv = torch.stack([q, k, v], 2)
    given = MixWeights(*(None,) * 8, *weights, None)
    h, _ = mixing._mlstm(qkv, mixing._gates(qkv, given), False, True)
    h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=1e-5).flatten(2)
    y = mixing._affine(h, torch.zeros(()), given)
    assert error(y, t["output"]) <= e["tolerance_max_abs_over_absmax"]
    y.square().sum().backward()
    for name, weight in zip(names, weights):
        assert error(weight.grad, t[f"grad.{name}"]) <= GRADIENT, name
    for key, x in zip("qkv", (q, k, v)):
        assert error(x.grad, t[f"grad_{key}"]) <= GRADIENT, key
