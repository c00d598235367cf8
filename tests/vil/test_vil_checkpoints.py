"""Official checkpoints of both generations: names, sizes, refusals, and the converter."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vilma.testing import assert_close
from vilma.tools import convert_vil
from vilma.vil import checkpoint_filter_fn
from vilma.vil.checkpoints import rename, resize_positions

NAMES = ("vil_tiny_patch16_224", "vil2_tiny_patch16_224")
SMALL = {"embed_dim": 32, "img_size": 64, "num_classes": 7}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def build(name, official, **options):
    """More than ten sub-blocks: names must be parsed, not replaced one after another."""
    depth = 6 if name.startswith("vil2") else 12
    torch.manual_seed(0)
    return official.scramble(timm.create_model(name, **{**SMALL, "depth": depth, **options})).eval()


def overlay(file, **more):
    return {"file": str(file), "num_classes": 7, "input_size": (3, 64, 64), **more}


def image(*size, channels=3):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("names", ["training_names", "hub_names"])
def test_official_names(name, names, official):
    model = build(name, official)
    state = getattr(official, names)(model)
    assert not set(state) & {"pos_embed", "fc_norm.weight"}
    loaded = checkpoint_filter_fn(state, model)
    assert set(loaded) == set(model.state_dict())
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_our_own_names_pass_unchanged(name, official):
    model = build(name, official, num_classes=0)
    loaded = checkpoint_filter_fn(dict(sorted(model.state_dict().items())), model)
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_old_buffers_wrappers_and_prefixes(official):
    model = build("vil_tiny_patch16_224", official)
    state = official.training_names(model)
    state["xlstm.blocks.3.xlstm.mlstm_cell.causal_mask"] = torch.ones(2, 2)
    state = {f"module.{key}": value for key, value in state.items()}
    loaded = checkpoint_filter_fn({"state_dict": state, "ctor_kwargs": {"dim": 32}, "stage_id": "x"}, model)
    assert set(loaded) == set(model.state_dict())


@pytest.mark.parametrize("form", ["published", "hub", "safetensors"])
def test_timm_loads_a_file(name, form, official, tmp_path):
    model = build(name, official)
    file = tmp_path / "weights.th"
    if form == "published":
        content = {"state_dict": official.training_names(model), "ctor_kwargs": {"dim": 32}, "stage_id": "a"}
        torch.save(content, file)
    elif form == "hub":
        torch.save(official.hub_names(model), file)
    else:
        file = file.with_suffix(".safetensors")
        save_file({k: v.contiguous() for k, v in official.hub_names(model).items()}, file)
    options = {**SMALL, "depth": len(model.blocks)}
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay(file), **options).eval()
    assert torch.equal(loaded(image(64, 64)), model(image(64, 64)))


def test_other_sizes_channels_and_classes(name, official, tmp_path):
    model = build(name, official)
    file = tmp_path / "weights.th"
    torch.save({"state_dict": official.training_names(model)}, file)
    options = {**SMALL, "depth": len(model.blocks)}

    def load(**more):
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay(file), **{**options, **more}
        ).eval()

    larger = load(img_size=96)
    expected = resize_positions(model.pos_embed, 6, 6)
    assert larger.pos_embed.shape == (1, 6, 6, 32) and torch.equal(larger.pos_embed, expected)
    assert_close(larger(image(96, 96)), model(image(96, 96)), 1e-6)
    gray = load(in_chans=1)
    assert_close(gray(image(64, 64, channels=1)), model(image(64, 64, channels=1).expand(2, 3, 64, 64)), 1e-5)
    features = load(num_classes=0)
    assert torch.equal(
        features(image(64, 64)), model.forward_head(model.forward_features(image(64, 64)), True)
    )
    fewer = load(num_classes=3)
    assert torch.equal(fewer.norm.weight, model.norm.weight) and fewer(image(64, 64)).shape == (2, 3)
    maps = load(features_only=True, out_indices=(0, 5))(image(64, 64))
    wanted = model.forward_intermediates(image(64, 64), [0, 5], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted))
    finer = load(patch_size=8)
    assert finer.patch_embed.proj.weight.shape[-1] == 8 and finer(image(64, 64)).isfinite().all()


def test_another_pooling_takes_a_norm_that_scales_nothing(official):
    """As in the official feature mode: a norm of width 2 d cannot serve one of width d."""
    model = build("vil2_tiny_patch16_224", official)
    target = build("vil2_tiny_patch16_224", official, global_pool="avg", num_classes=0)
    loaded = checkpoint_filter_fn(official.training_names(model), target)
    target.load_state_dict(loaded, strict=False)
    assert (target.fc_norm.weight == 1).all() and not target.fc_norm.bias.any()
    assert torch.equal(target.norm.weight, model.norm.weight)
    without = build("vil2_tiny_patch16_224", official, fc_norm=False, num_classes=0, global_pool="")
    without.load_state_dict(checkpoint_filter_fn(official.hub_names(model), without), strict=False)
    assert torch.equal(without(image(64, 64)), model.forward_features(image(64, 64)))


def test_positions_are_resized_without_antialiasing():
    table = torch.randn(1, 14, 14, 8)
    smaller = resize_positions(table, 12, 12)
    plain = torch.nn.functional.interpolate(table.permute(0, 3, 1, 2), size=(12, 12), mode="bicubic")
    assert torch.equal(smaller, plain.permute(0, 2, 3, 1))
    softer = torch.nn.functional.interpolate(
        table.permute(0, 3, 1, 2), size=(12, 12), mode="bicubic", antialias=True
    )
    assert (smaller - softer.permute(0, 2, 3, 1)).abs().max() > 0.05
    assert resize_positions(table, 14, 14) is table


def assert_refused(state, model, *words):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        checkpoint_filter_fn(state, model)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_models_are_refused(official):
    model = build("vil2_tiny_patch16_224", official)
    deit = timm.create_model("deit_tiny_patch16_224", depth=2).state_dict()
    assert_refused(
        deit, model, "missing: ", "blocks.*.rowwise_from_top_left.norm.weight (6)", "blocks.*.attn.qkv"
    )
    first = build("vil_tiny_patch16_224", official)
    assert_refused(
        official.training_names(first), model, "missing", "q_proj.bias", "of another shape", "conv.weight"
    )
    assert_refused(official.training_names(model), first, "unexpected", "q_proj.bias")
    wider = build("vil2_tiny_patch16_224", official, embed_dim=64)
    assert_refused(official.hub_names(wider), model, "of another shape", "(64,) for (32,)", "more")
    deeper = build("vil2_tiny_patch16_224", official, depth=7)
    assert_refused(
        official.hub_names(deeper), model, "unexpected: blocks.*.rowwise_from_top_left.norm.weight"
    )
    cut = official.training_names(model)
    cut.pop("xlstm.blocks.11.xlstm.proj_up.weight")
    assert_refused(cut, model, "missing: blocks.*.rowwise_from_bot_right.layer.proj_up.weight\n")
    assert_refused({}, model, "missing")


@pytest.mark.parametrize("classes", [7, 5])
def test_timm_refuses_another_model_whatever_the_classes(classes, official, tmp_path):
    """With another number of classes timm loads without strict: nothing may slip through."""
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("deit_tiny_patch16_224", depth=1, num_classes=7).state_dict(), file)
    with pytest.raises(ValueError, match="not one of vil2_tiny_patch16_224; nothing was loaded"):
        timm.create_model(
            "vil2_tiny_patch16_224",
            pretrained=True,
            pretrained_cfg_overlay=overlay(file),
            **{**SMALL, "num_classes": classes},
        )


HALF = ("fc_norm.weight", "fc_norm.bias")


def test_a_classifier_comes_with_its_norm_or_not_at_all(name, official):
    """Half of a head gives other logits without a word."""
    model = build(name, official)
    without = build(name, official, fc_norm=False)
    for names in (official.training_names, official.hub_names):
        assert_refused(names(without), model, "missing: fc_norm.weight, fc_norm.bias\n", "fc_norm")
        assert_refused(names(model), without, "unexpected: fc_norm.weight, fc_norm.bias\n")
    for other in ({"num_classes": 0}, {"num_classes": 3}):
        loaded = checkpoint_filter_fn(official.hub_names(without), build(name, official, **other))
        assert (loaded["fc_norm.weight"] == 1).all() and not loaded["fc_norm.bias"].any()
        loaded = checkpoint_filter_fn(
            official.hub_names(model), build(name, official, fc_norm=False, **other)
        )
        assert not set(loaded) & set(HALF)
    for key in ("head.5.weight", "head.foo", "head.1.foo"):
        for target in (model, build(name, official, num_classes=0)):
            assert_refused(
                {**official.training_names(model), key: torch.zeros(3)}, target, "unexpected: head."
            )


def test_a_classifier_that_does_not_fit_is_refused_by_its_keys(official, tmp_path):
    def load(state, **more):
        torch.save(state, tmp_path / "weights.pth")
        return timm.create_model(
            "vil2_tiny_patch16_224",
            pretrained=True,
            pretrained_cfg_overlay=overlay(tmp_path / "weights.pth"),
            **{**SMALL, "depth": 6, **more},
        ).eval()

    model = build("vil2_tiny_patch16_224", official)
    state, x = official.hub_names(model), image(64, 64)
    headless = {key: value for key, value in state.items() if not key.startswith("head")}
    with pytest.raises(ValueError, match=r"head.weight \(7, 64\) for \(7, 32\)"):
        load(state, global_pool="avg")
    with pytest.raises(ValueError, match=r"missing: head.weight, head.bias\n(.|\n)*num_classes=0"):
        load(headless)
    nine = official.hub_names(build("vil2_tiny_patch16_224", official, num_classes=9))
    with pytest.raises(ValueError, match=r"head.weight \(9, 64\) for \(7, 64\)"):
        load(nine)
    assert load(headless, num_classes=5)(x).shape == (2, 5)
    assert torch.equal(load(headless, num_classes=0)(x), model.forward_head(model.forward_features(x), True))
    assert load(state, global_pool="avg", num_classes=5)(x).shape == (2, 5)
    maps = load(headless, features_only=True)(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, model.forward_intermediates(x, 3)[1], strict=True))


@pytest.mark.parametrize("prefix", ["model.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod."])
def test_prefixes_of_trainers(prefix, official):
    model = build("vil2_tiny_patch16_224", official)
    for state in (official.training_names(model), official.hub_names(model), model.state_dict()):
        loaded = checkpoint_filter_fn({f"{prefix}{key}": value for key, value in state.items()}, model)
        assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


def test_block_numbers_are_parsed():
    names = {f"xlstm.blocks.{j}.xlstm.proj_up.weight": torch.zeros(1) for j in (0, 1, 10, 11, 23)}
    assert set(rename(names, paired=False)) == {
        f"blocks.{j}.layer.proj_up.weight" for j in (0, 1, 10, 11, 23)
    }
    paired = rename(names, paired=True)
    assert "blocks.5.rowwise_from_top_left.layer.proj_up.weight" in paired
    assert "blocks.11.rowwise_from_bot_right.layer.proj_up.weight" in paired


# The converter, on models of published size


@pytest.fixture(scope="module")
def published(official, tmp_path_factory):
    """A file under the name and with the keys of a published one."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = official.scramble(timm.create_model("vil2_tiny_patch16_224")).eval()
    file = folder / "vil2_tiny16_e400_in1k.th"
    content = {"state_dict": official.training_names(model), "ctor_kwargs": {"dim": 192}, "stage_id": "x"}
    torch.save(content, file)
    return file, model


def test_convert(published, capsys, tmp_path):
    file, model = published
    output = tmp_path / "new" / "vil2.safetensors"
    assert convert_vil.main([str(file), str(output)]) == 0
    said = capsys.readouterr().out
    assert "model       vil2_tiny_patch16_224.e400_in1k" in said
    total = len(model.state_dict())
    assert f"{total} of {total} bit for bit" in said and "6,391,528" in said and "sha256" in said
    weights = load_file(output)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    loaded = timm.create_model(
        "vil2_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay={"file": str(output)}
    ).eval()
    assert torch.equal(loaded(image(224, 224)[:1]), model(image(224, 224)[:1]))
    with pytest.raises(ValueError, match="--overwrite"):
        convert_vil.main([str(file), str(output)])
    assert convert_vil.main([str(file), str(output), "--overwrite"]) == 0


def test_convert_finds_the_model_by_its_shapes(official, tmp_path, capsys):
    model = timm.create_model("vil_tiny_patch16_224", num_classes=10)
    file = tmp_path / "mine.pt"
    torch.save(official.hub_names(model), file)
    assert convert_vil.main([str(file)]) == 0
    assert "model       vil_tiny_patch16_224\n" in capsys.readouterr().out
    assert load_file(tmp_path / "mine.safetensors")["head.weight"].shape == (10, 192)


class Sly:
    def __reduce__(self):
        return Path, ("sly",)


def test_convert_refuses(published, official, tmp_path):
    file, _ = published
    output = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match="nothing was loaded"):
        convert_vil.main([str(file), str(output), "--model", "vil2_small_patch16_224"])
    with pytest.raises(ValueError, match="not a registered model"):
        convert_vil.main([str(file), str(output), "--model", "vil3_small"])
    with pytest.raises(ValueError, match="choose one of vil2_base_patch16_224"):
        convert_vil.main([str(file), str(output), "--model", "resnet18"])
    foreign = tmp_path / "foreign.pt"
    torch.save(timm.create_model("deit_tiny_patch16_224", depth=1).state_dict(), foreign)
    with pytest.raises(ValueError, match="fits no registered model"):
        convert_vil.main([str(foreign), str(output)])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint"):
        convert_vil.main([str(tmp_path / "text.pt"), str(output)])
    with pytest.raises(ValueError, match="not a file"):
        convert_vil.main([str(tmp_path / "none.pt"), str(output)])
    sly = tmp_path / "sly.pt"
    torch.save({"state_dict": {}, "where": Sly()}, sly)
    with pytest.raises(ValueError, match=r"PosixPath|pathlib.*--trust"):
        convert_vil.main([str(sly), str(output)])
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        convert_vil.main([str(tmp_path / "list.pt"), str(output)])
    assert not output.exists()
