"""Vision-LSTM: options that cannot be, changes of size, exports of any size, layer groups, derivatives."""

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters

from vilma.testing import assert_close
from vilma.vil import VisionLSTM

SMALL = {"embed_dim": 32, "depth": 1, "img_size": 64, "num_classes": 7}


def build(name="vil2_tiny_patch16_224", official=None, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **options}).eval()
    return official.scramble(model) if official else model


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


REFUSED = [
    ({"global_pool": "map"}, "bilateral_avg"),
    ({"conv_kind": "1d"}, "'2d', 'causal1d'"),
    ({"conv_kernel_size": 4}, "odd"),
    ({"init_mode": "xavier"}, "original-fixed"),
    ({"num_heads": 5}, "multiple of num_heads=5"),
    ({"qkv_block_width": 3}, "qkv_block_width=3"),
    ({"img_size": 8}, "smaller than one patch"),
    ({"img_size": 70}, "height 70 .*64 or 80"),
    ({"img_size": (64, 70)}, "width 70 .*64 or 80"),
    ({"img_size": (64, 64, 64)}, r"img_size=\(64, 64, 64\).*\(height, width\)"),
    ({"stride": 32}, r"stride=\(32, 32\).*at most patch_size"),
    ({"num_classes": -1}, "num_classes=-1.*0 for no classifier"),
    ({"patch_size": 0}, "patch_size=0; pass"),
    ({"stride": 0}, "stride=0; pass"),
    ({"img_size": 0}, "img_size=0; pass"),
    ({"conv_kind": "causal1d", "conv_kernel_size": 0}, "conv_kernel_size=0; pass at least 1"),
]
COUNTS = ("in_chans", "embed_dim", "depth", "num_heads", "expansion", "qkv_block_width")
REFUSED += [({name: 0}, f"{name}=0; pass at least 1") for name in COUNTS]


@pytest.mark.parametrize("options, match", REFUSED)
def test_impossible_options_say_what_is_possible(options, match):
    with pytest.raises(ValueError, match=match):
        VisionLSTM(**{**SMALL, **options})


def test_impossible_classifiers_leave_the_old_one():
    model = build()
    for classes, pool, match in ((3, "map", "bilateral_avg"), (-1, "avg", "num_classes=-1")):
        with pytest.raises(ValueError, match=match):
            model.reset_classifier(classes, pool)
    assert model.num_classes == 7 and model.global_pool == "bilateral_flatten"
    assert model(images(64, 64)).shape == (2, 7)


def test_padding_takes_any_nominal_size():
    model = build(img_size=(70, 50), dynamic_img_pad=True)
    assert model.pos_embed.shape[1:3] == (4, 3) and model(images(70, 50)).shape == (2, 7)


@pytest.mark.parametrize(
    "options, change",
    [
        ({}, {"img_size": 8}),
        ({}, {"img_size": 70}),
        ({}, {"img_size": (64, 64, 64)}),
        ({}, {"patch_size": 0}),
        ({}, {"img_size": 16, "patch_size": 32}),
        ({}, {"img_size": 128, "patch_size": 96}),
        ({"stride": 8}, {"patch_size": 4}),
    ],
)
def test_refused_change_of_size_changes_nothing(options, change, official):
    model, x = build(official=official, **options), images(64, 64)
    embed = model.patch_embed
    before = model(x), embed.img_size, embed.patch_size, embed.stride, model.feature_info
    table, kernel = model.pos_embed, embed.proj
    with pytest.raises(ValueError):
        model.set_input_size(**change)
    assert (embed.img_size, embed.patch_size, embed.stride, model.feature_info) == before[1:]
    assert model.pos_embed is table and embed.proj is kernel and torch.equal(model(x), before[0])


def test_overlap_keeps_its_stride_and_its_absence_too():
    model = build(stride=8)
    for patch in (8, 16):  # at 8 they touch by chance
        model.set_input_size(patch_size=patch)
        assert model.patch_embed.stride == (8, 8) == model.patch_embed.proj.stride
    plain = build()
    for patch in (8, 32):
        plain.set_input_size(patch_size=patch)
        assert plain.patch_embed.stride == (patch, patch) == plain.patch_embed.proj.stride
    assert plain(images(64, 64)).shape == (2, 7)


@pytest.mark.parametrize("example", [(64, 64), (96, 128)])
def test_exported_with_any_height_and_width(example, official):
    """The grid of the table must not be fixed, from wherever the example comes; nor that gradients follow."""
    model = build(official=official)
    rows, columns = (torch.export.Dim(name, min=2, max=16) for name in ("rows", "columns"))
    program = torch.export.export(
        model, (images(*example),), dynamic_shapes=({2: 16 * rows, 3: 16 * columns},)
    )
    saves = [n.args[-1] for n in program.graph.nodes if "vil_mix" in str(n.target)]
    assert saves == [False, False]
    exported = program.module()
    for size in ((64, 64), (80, 48), (96, 128)):
        assert_close(exported(images(*size)), model(images(*size)), 1e-6)


@pytest.mark.parametrize(
    "name, depth, groups",
    [
        ("vil_tiny_patch16_224", 24, 14),
        ("vil_tinyplus_patch16_224", 29, 17),
        ("vil2_tiny_patch16_224", 12, 14),
    ],
)
def test_layer_groups_are_pairs_of_both_generations(name, depth, groups):
    """Stem, pairs, head: the published recipe decays by pairs, of which generation 1 has them unnamed."""
    model = timm.create_model(name, device="meta")
    found = group_parameters(model, model.group_matcher(), reverse=True)
    assert (
        sorted(set(found.values())) == list(range(groups))
        and set(found) == dict(model.named_parameters()).keys()
    )
    for name, group in found.items():
        if name.startswith("blocks."):
            j = int(name.split(".")[1])
            assert group == 1 + (j if model.paired else j // 2), name
    assert found["pos_embed"] == 0 and found["norm.weight"] == groups - 2
    assert found["head.weight"] == found["fc_norm.weight"] == groups - 1


def test_forward_mode_is_refused(official):
    import torch.autograd.forward_ad as forward_ad

    model, x = build(official=official), images(64, 64)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(model, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            model(forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.equal(model(x), build(official=official)(x))


def test_features_of_shallow_models_and_of_users_of_dino(official):
    for depth in (1, 2):
        options = {"embed_dim": 32, "img_size": 64, "depth": depth, "features_only": True}
        maps = timm.create_model("vil2_tiny_patch16_224", **options)(images(64, 96))
        assert [y.shape for y in maps] == [(2, 32, 4, 6)] * depth
    model, x = build(official=official, depth=2), images(64, 96)
    (last,) = model.get_intermediate_layers(x, norm=True)
    assert torch.equal(last, model.forward_features(x).flatten(1, 2))
    first, second = model.get_intermediate_layers(x, [0, 1], reshape=True)
    assert first.shape == (2, 32, 4, 6) and not torch.equal(first, second)


def test_dynamic_quantisation_of_linear_layers(official):
    """Parameter stores are no nn.Linear: what is replaced is what is called."""
    model, x = build(official=official), images(64, 64)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert {name.rsplit(".", 1)[-1] for name in linear} == {"proj_up", "proj_down", "head"}
    if not torch.backends.quantized.supported_engines[-1:] or torch.backends.quantized.engine == "none":
        pytest.skip("this build of torch has no quantised products")
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert_close(quantized(x), model(x), 0.2)
