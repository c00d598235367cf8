"""Vision-LSTM as a model of timm: one small model for every structural variant, and the registered ones."""

import copy
import inspect

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vilma.testing import assert_close
from vilma.vil import VisionLSTM
from vilma.vil.layers import ViLBlock
from vilma.vil.vision_lstm import POOLS
from vilma.xlstm import mlstm

NAMES = timm.list_models("vil*")
SMALL = {"embed_dim": 32, "img_size": 64, "num_classes": 7}
VARIANTS = {
    "generation 2": ("vil2_tiny_patch16_224", {"depth": 3}),
    "generation 1": ("vil_tiny_patch16_224", {"depth": 5}),
    "generation 1, overlapping": ("vil_tinyplus_patch16_stride8_224", {"depth": 3}),
    "causal, averaged": (
        "vil2_tiny_patch16_224",
        {"depth": 3, "conv_kind": "causal1d", "global_pool": "avg", "norm_bias": False},
    ),
    "headless, without norms": (
        "vil2_tiny_patch16_224",
        {"depth": 3, "final_norm": False, "fc_norm": False, "global_pool": "first"},
    ),
}


def build(variant: str, official, **options):
    """The same weights whenever it is called."""
    name, given = VARIANTS[variant]
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **given, **options})
    return official.scramble(model).eval()


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


PARAMETERS = {
    "vil_tiny_patch16_224": 6_088_360,
    "vil_tinyplus_patch16_224": 7_277_840,
    "vil_small_patch16_224": 22_792_360,
    "vil_smallplus_patch16_224": 24_628_664,
    "vil_base_patch16_224": 88_050_856,
    "vil_tinyplus_patch16_stride8_224": 7_277_840,
    "vil_smallplus_patch16_stride8_224": 24_628_664,
    "vil_base_patch16_stride8_224": 88_050_856,
    "vil2_tiny_patch16_224": 6_391_528,
    "vil2_small_patch16_224": 23_398_696,
    "vil2_base_patch16_224": 89_263_528,
}
WITHOUT_LEGACY_NORM = {
    "vil_tiny": 6_088_168,
    "vil_base": 88_050_088,
    "vil2_tiny": 6_390_760,
    "vil2_base": 89_260_456,
}
GMAC = {"vil2_tiny_patch16_224": 1.51, "vil2_small_patch16_224": 5.09, "vil2_base_patch16_224": 18.51}


def test_every_published_model_is_registered():
    assert set(NAMES) == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_published_parameter_counts(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(WITHOUT_LEGACY_NORM))
def test_parameter_counts_without_the_legacy_norm(name):
    option = "fc_norm" if name.startswith("vil2") else "final_norm"
    model = timm.create_model(f"{name}_patch16_224", device="meta", **{option: False})
    assert sum(p.numel() for p in model.parameters()) == WITHOUT_LEGACY_NORM[name]


@pytest.mark.parametrize("name", sorted(GMAC))
def test_published_operation_counts(name):
    model = timm.create_model(name, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMAC[name], rel=0.02)


def test_backward_counts_its_operations():
    model = timm.create_model("vil2_tiny_patch16_224", device="meta")
    image = torch.empty(1, 3, 224, 224, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = model(image)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert 2.0 <= backward.get_total_flops() / forward.get_total_flops() <= 2.3


@pytest.mark.parametrize("name", NAMES)
def test_default_configurations(name):
    cfg = timm.models.get_pretrained_cfg(name)
    model = timm.create_model(name, device="meta")
    assert cfg.crop_pct == 1.0 and cfg.interpolation == "bicubic" and cfg.input_size == (3, 224, 224)
    assert cfg.mean == timm.data.IMAGENET_DEFAULT_MEAN and cfg.std == timm.data.IMAGENET_DEFAULT_STD
    assert cfg.license and "2406.04303" in cfg.paper_ids and "top-1" in cfg.description
    assert model.patch_embed.dynamic_feat_size((224, 224)) == cfg.pool_size
    if cfg.url:
        assert cfg.url.startswith("https://ml.jku.at/research/vision_lstm/download/vil")
    else:
        assert name == "vil_tinyplus_patch16_stride8_224"


def test_tags_of_the_published_weights():
    tags = timm.list_pretrained("vil*")
    assert len(tags) == 13
    urls = {timm.models.get_pretrained_cfg(tag).url.rsplit("/", 1)[1] for tag in tags}
    assert len(urls) == 13
    assert {"vil2_tiny16_e400_in1k.th", "vil_base16_e400_in1k_stride8.th"} <= urls
    assert timm.models.get_pretrained_cfg("vil2_tiny_patch16_224").tag == "e800_in1k"


def test_contract_of_shapes_and_heads(variant, official):
    model, x = build(variant, official), images(64, 64)
    rows = 7 if "overlapping" in variant else 4
    width = 64 if variant == "generation 2" else 32
    features = model.forward_features(x)
    assert features.shape == (2, rows, rows, model.num_features) and model.output_fmt == "NHWC"
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size) == (2, width)
    assert torch.equal(model(x), model.get_classifier()(pooled)) and model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, rows, rows, 32)
    assert inspect.signature(model.reset_classifier).parameters["global_pool"].default is None
    with pytest.raises(TypeError):
        build(variant, official, not_an_option=1)


def test_every_parameter_gets_a_gradient(variant, official):
    model = build(variant, official).train()
    model(images(64, 64)).square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_gradient_checkpointing_changes_nothing(variant, official):
    results = []
    for on in (False, True):
        model = build(variant, official).train()
        model.set_grad_checkpointing(on)
        y = model(images(64, 64))
        y.square().sum().backward()
        _, maps = model.forward_intermediates(images(64, 64))
        results.append([y, *maps, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("pool", POOLS)
def test_pooling(pool, official):
    model = build("generation 2", official, global_pool=pool, fc_norm=False, num_classes=0)
    features = model.forward_features(images(64, 96))
    first, last = features[:, 0, 0], features[:, 3, 5]
    expected = {
        "": features,
        "avg": features.flatten(1, 2).mean(1),
        "first": first,
        "bilateral_avg": (first + last) / 2,
        "bilateral_flatten": torch.cat([first, last], 1),
    }[pool]
    assert torch.allclose(model(images(64, 96)), expected, atol=1e-6)


def test_intermediates(variant, official):
    model, x = build(variant, official), images(64, 96)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(maps) == len(model.blocks) == len(model.feature_info)
    for y, info in zip(maps, model.feature_info):
        assert y.shape[1] == info["num_chs"]
        assert y.shape[2] <= 64 // info["reduction"] <= y.shape[2] + 1
    if isinstance(model.norm, nn.Identity):
        assert torch.equal(maps[-1].permute(0, 2, 3, 1), final)
    (normed,) = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    assert torch.equal(normed.permute(0, 2, 3, 1), final)
    early = model.forward_intermediates(x, indices=[0, -2], stop_early=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(early, (maps[0], maps[-2])))
    (tokens,) = model.forward_intermediates(x, indices=[1], output_fmt="NLC", intermediates_only=True)
    assert torch.equal(tokens.mT, maps[1].flatten(2))
    named = model.forward_intermediates(x, indices=[1], output_dict=True)
    assert torch.equal(named["image_features"], final)
    assert torch.equal(named["image_intermediates"][0], maps[1])
    with pytest.raises(ValueError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NCWH")


def test_features_only(variant, official):
    name, given = VARIANTS[variant]
    model = timm.create_model(name, features_only=True, out_indices=(0, 2), **{**SMALL, **given}).eval()
    whole = timm.create_model(name, **{**SMALL, **given}).eval()
    weights = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
    whole.load_state_dict(weights, strict=False)
    expected = whole.forward_intermediates(images(64, 64), indices=[0, 2], intermediates_only=True)
    for y, wanted, channels in zip(model(images(64, 64)), expected, model.feature_info.channels()):
        assert torch.equal(y, wanted) and y.shape[1] == channels
    sum(y.sum() for y in model.train()(images(64, 64))).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_features_only_takes_the_last_three_by_default():
    model = timm.create_model("vil2_tiny_patch16_224", features_only=True, device="meta")
    assert model.feature_info.module_name() == ["blocks.9", "blocks.10", "blocks.11"]


def test_pruning(variant, official):
    model, x = build(variant, official), images(64, 64)
    with torch.no_grad():
        expected, maps = model(x), model.forward_intermediates(x, intermediates_only=True)
        last = len(model.blocks) - 1
        whole = copy.deepcopy(model)
        assert whole.prune_intermediate_layers([last], prune_head=False) == [last]
        assert torch.equal(whole(x), expected)
        for j in range(last + 1):
            pruned = copy.deepcopy(model)
            pruned.prune_intermediate_layers([j], prune_norm=True)
            assert len(pruned.blocks) == j + 1
            assert torch.equal(pruned.forward_features(x).permute(0, 3, 1, 2), maps[j])
            assert torch.equal(pruned(x), pruned.forward_features(x))


@pytest.mark.parametrize("size", [(64, 64), (48, 112), (128, 32)])
def test_any_size_and_aspect_ratio(variant, size, official):
    model = build(variant, official)
    stride = model.patch_embed.stride[0]
    grid = tuple((s - 16) // stride + 1 for s in size)
    x = images(*size)
    y, features = model(x), model.forward_features(x)
    assert features.shape[1:3] == grid == model.patch_embed.dynamic_feat_size(size)
    # the same as a model built for this size whose table is the resized one
    if stride == 16:
        fixed = build(variant, official, img_size=size)
        table = nn.functional.interpolate(model.pos_embed.permute(0, 3, 1, 2), grid, mode="bicubic")
        fixed.load_state_dict({**model.state_dict(), "pos_embed": table.permute(0, 2, 3, 1)})
        assert_close(fixed(x), y, 1e-6)


def written_out(layer, x):
    """The equations of a layer in float64; one that runs backward is a forward one on the turned map."""
    layer, x = copy.deepcopy(layer).double(), x.double()
    if layer.reverse:
        x = x.flip(1, 2)
    height, width = x.shape[1:3]
    a, z = layer.proj_up(x).chunk(2, -1)
    conv = nn.functional.conv2d(
        a.permute(0, 3, 1, 2), layer.conv.weight, layer.conv.bias, padding=1, groups=a.shape[-1]
    )
    assert conv.shape[2:] == (height, width)
    c = nn.functional.silu(conv.flatten(2).mT)
    qkv = []
    for source, projection in ((c, layer.q_proj), (c, layer.k_proj), (a.flatten(1, 2), layer.v_proj)):
        qkv.append(source @ torch.block_diag(*projection.weight).mT + projection.bias)
    cell, seen = layer.mlstm_cell, torch.cat(qkv, -1)
    gates = [(seen @ gate.weight.mT + gate.bias).mT for gate in (cell.igate, cell.fgate)]
    heads = gates[0].shape[1]
    h = mlstm(*(y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in qkv), *gates, eps=1e-6).transpose(1, 2)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    h = h.flatten(2) * (1 + cell.outnorm.weight) + cell.outnorm.bias + layer.learnable_skip * c
    y = layer.proj_down(h * nn.functional.silu(z.flatten(1, 2))).unflatten(1, (height, width))
    return y.flip(1, 2) if layer.reverse else y


@pytest.mark.parametrize("side", ["top_left", "bot_right"])
def test_a_map_of_another_shape_is_seen_as_it_is(side, official):
    """The official second generation folds tokens by the height it was built for: here neighbours count."""
    model = build("generation 2", official, depth=1)  # for maps of 4 x 4
    layer = getattr(model.blocks[0], f"rowwise_from_{side}").layer
    for shape in ((4, 8), (8, 4), (3, 5)):
        x = torch.randn(2, *shape, 32, generator=torch.Generator().manual_seed(0))
        assert_close(layer(x), written_out(layer, x), 1e-5)


def test_set_input_size(variant, official):
    model = build(variant, official)
    x = images(96, 128)
    before = model(x)
    model.set_input_size((96, 128))
    assert model.pos_embed.shape[1:3] == (6, 8) and model.patch_embed.img_size == (96, 128)
    if model.patch_embed.stride == (16, 16):
        assert_close(model(x), before, 1e-6)
    model.requires_grad_(False)
    model.set_input_size(patch_size=8)
    assert model.patch_embed.proj.weight.shape[-2:] == (8, 8) and model.pos_embed.shape[1:3] == (12, 16)
    assert model(x).shape == (2, 7)
    assert model.feature_info[0]["reduction"] == 8
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="smaller than one patch"):
        model.set_input_size(4)


def test_padding_to_whole_patches(official):
    model = build("generation 2", official, dynamic_img_pad=True)
    x = images(50, 70)
    assert torch.equal(model(x), model(nn.functional.pad(x, (0, 10, 0, 14))))
    assert model.forward_features(x).shape[1:3] == model.patch_embed.dynamic_feat_size((50, 70)) == (4, 5)


def test_impossible_images_say_what_is_possible(official):
    model = build("generation 2", official)
    with pytest.raises(ValueError, match=r"height 65.*nearest height is 64 or 80"):
        model(images(65, 64))
    with pytest.raises(ValueError, match=r"width 8 .*nearest width is 16"):
        model(images(64, 8))
    overlapping = build("generation 1, overlapping", official)
    with pytest.raises(ValueError, match=r"patches of 16 every 8 .*64 or 72"):
        overlapping(images(66, 64))
    with pytest.raises(ValueError, match="C = 3"):
        model(torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match=r"pass \(B, C, height, width\)"):
        model(torch.zeros(3, 64, 64))
    strict = build("generation 2", official, dynamic_img_size=False)
    with pytest.raises(ValueError, match=r"built for 64 x 64.*set_input_size"):
        strict(images(96, 96))


def test_layer_decay_and_weight_decay(official):
    model = build("generation 2", official)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["pos_embed"] == groups["patch_embed.proj.weight"] == 0
    pair = {groups[n] for n in groups if n.startswith("blocks.1.")}
    assert len(pair) == 1, "both sub-blocks of a pair share a group"
    assert groups["norm.weight"] == groups["blocks.2.rowwise_from_top_left.norm.weight"] > max(pair)
    assert model.no_weight_decay() == {"pos_embed"}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.65)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert len(scales) == 5 and scales[-1] == 1.0
    decayed = [p for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]]
    assert not any(p is model.pos_embed or p.dim() < 2 for p in decayed)


def test_drop_path(official):
    rates = [
        block.drop_path.drop_prob if isinstance(block.drop_path, timm.layers.DropPath) else 0.0
        for block in build("generation 2", official, drop_path_rate=0.2, drop_path_decay=True).modules()
        if isinstance(block, ViLBlock)
    ]
    assert rates == pytest.approx([0.0, 0.0, 0.1, 0.1, 0.2, 0.2])
    model = build("generation 1", official, drop_path_rate=0.5, depth=1).train()
    block, x = model.blocks[0], torch.randn(400, 1, 2, 32)
    y, full = block(x), x + block.layer(block.norm(x)) * 2
    dropped = (y == x).flatten(1).all(1)
    kept = ((y - full).abs() < 1e-4).flatten(1).all(1)
    assert torch.equal(dropped, ~kept) and 140 <= dropped.sum() <= 260
    block.eval()
    assert_close(block(x), x + block.layer(block.norm(x)), 1e-6)


def test_initial_values():
    torch.manual_seed(0)
    models = {
        m: VisionLSTM(embed_dim=96, depth=3, img_size=64, init_mode=m) for m in ("original", "original-fixed")
    }
    layer = models["original"].blocks[1].rowwise_from_bot_right.layer
    for weight in (layer.proj_up.weight, layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight):
        assert weight.std().item() == pytest.approx((2 / (5 * 96)) ** 0.5, rel=0.1)
    assert layer.proj_down.weight.std().item() == pytest.approx(2 / 96**0.5, rel=0.1)
    fixed = models["original-fixed"].blocks[0].rowwise_from_top_left.layer
    assert fixed.proj_down.weight.std().item() == pytest.approx(2 / 6 / 96**0.5, rel=0.1)
    cell = layer.mlstm_cell
    assert not cell.igate.weight.any() and not cell.fgate.weight.any()
    assert torch.equal(cell.fgate.bias, torch.linspace(3, 6, 4)) and cell.igate.bias.std() < 0.4
    assert (layer.learnable_skip == 1).all() and not cell.outnorm.weight.any()
    assert models["original"].head.weight.abs().max() <= 1e-4
    assert 0.01 < models["original"].pos_embed.std() < 0.03


def test_initialised_after_meta():
    model = timm.create_model("vil_tiny_patch16_224", device="meta", **{**SMALL, "depth": 2})
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(images(64, 64))).all()


def test_reset_classifier_keeps_device_dtype_and_what_is_frozen(variant, official):
    model = build(variant, official).to(torch.float64).requires_grad_(False)
    model.reset_classifier(0, "avg")
    model.reset_classifier(0)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.reset_classifier(3, "bilateral_flatten")
    assert model.head.weight.shape == (3, 64) and model.head.weight.dtype == torch.float64
    assert model(images(64, 64).double()).shape == (2, 3)


@pytest.mark.parametrize("dtype, ratio", [(torch.bfloat16, 0.04), (torch.float64, 1e-5)])
def test_other_precisions(variant, dtype, ratio, official):
    model, x = build(variant, official), images(64, 64)
    expected = model(x)
    y = copy.deepcopy(model).to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y, expected, ratio)


def test_autocast(official):
    model, x = build("generation 2", official), images(64, 64)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model.train()(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, 0.04)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())


def test_torchscript(variant, official):
    model, x = build(variant, official), images(64, 96)
    with timm.layers.set_scriptable(True):
        scripted = torch.jit.script(model)
    assert torch.equal(scripted(x), model(x))
    y = scripted.train()(x).square().sum()
    y.backward()
    assert all(p.grad is not None for p in scripted.parameters())


def test_traced(variant, official):
    model, x = build(variant, official), images(64, 96)
    traced = torch.jit.trace(model, x)  # with gradients, as it is usually called
    assert torch.equal(traced(x), model(x))
    traced(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_fx(variant, official):
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model, x = build(variant, official), images(64, 64)
    tracer = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    nodes, _ = get_graph_node_names(model, tracer_kwargs=tracer)
    traced = create_feature_extractor(model, [nodes[-1]], tracer_kwargs=tracer)
    assert torch.equal(traced(x)[nodes[-1]], model(x))


def test_compiled_with_gradients(official):
    model, x = build("generation 2", official).train(), images(64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    grads = [
        torch.autograd.grad(run(x).square().sum(), list(model.parameters())) for run in (compiled, model)
    ]
    for a, b in zip(*grads):
        assert_close(a, b, 1e-5)


@pytest.mark.long
def test_inductor(official):
    torch._dynamo.reset()
    for variant in ("generation 1", "generation 2"):
        model, x = build(variant, official), images(64, 64)
        with torch.no_grad():
            assert_close(torch.compile(model, fullgraph=True)(x), model(x), 1e-5)


def test_exported_with_any_batch(variant, official, tmp_path):
    model = build(variant, official)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(64, 64),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(5, 3, 64, 64)
    assert_close(loaded(x), model(x), 1e-6)


def test_in_chans_and_no_classes(variant, official):
    model = build(variant, official, in_chans=4, num_classes=0)
    assert model(torch.randn(2, 4, 64, 64)).shape == (2, model.head_hidden_size)


def test_a_step_of_training_lowers_the_loss():
    torch.manual_seed(0)
    model = timm.create_model("vil2_tiny_patch16_224", depth=2, **SMALL).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, labels = torch.randn(8, 3, 64, 64), torch.arange(8) % 7
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
