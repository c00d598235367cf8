"""Encoders: sizes of the paper's networks, FiLM, holes, and what the small encoder looks at."""

import json
import math
from pathlib import Path

import pytest
import torch

from vilma.pointmap.encoders import as_feature_map, build_encoder, feature_layer

PUBLISHED = Path(__file__).parents[1] / "data" / "golden" / "pmp" / "encoder_shapes.json"
NAMES = {
    "FiLMResNet50Policy": ("film_resnet50", {}),
    "FiLMResNet34Policy": ("film_resnet34", {}),
    "FiLMResNet18Policy": ("film_resnet18", {}),
    "FiLMResNet50Policy_Local": ("film_resnet50", {"local_tokens": True}),
    "FiLMConvNeXtV2Policy(tiny)": ("film_convnextv2_tiny", {}),
    "convnextv2_tiny": ("convnextv2_tiny", {}),
    "davit_tiny": ("davit_tiny", {}),
}


def test_published_sizes():
    """Parameter counts and output shapes of the nine encoders, on the meta device."""
    for row in json.loads(PUBLISHED.read_text()):
        name, options = NAMES[row["encoder"]]
        with torch.device("meta"):
            encoder = build_encoder(name, row["input"][1], **options).eval()
            cond = torch.zeros(row["cond"][0], row["cond"][-1]) if row["cond"] else None
            out = encoder(torch.zeros(row["input"]), cond)
        assert list(out.shape) == row["output"], row["encoder"]
        assert sum(p.numel() for p in encoder.parameters()) == row["params"], row["encoder"]
        assert encoder.num_features == row["output"][-1]
        assert encoder.is_conditioned == (cond is not None)


def test_film_resnet_starts_as_the_plain_network_and_then_listens():
    import timm

    encoder = build_encoder("film_resnet18", 3, cond_dim=16).eval()
    x, cond = torch.rand(2, 3, 64, 64), torch.randn(2, 16)
    plain = timm.create_model("resnet18", num_classes=0).eval()
    plain.load_state_dict(encoder.network.state_dict())
    torch.testing.assert_close(encoder(x, cond), plain(x))
    for stage in range(4):
        torch.nn.init.zeros_(encoder.films[stage].beta.weight)
        torch.nn.init.normal_(encoder.films[stage].gamma.weight, std=0.1)
        different = encoder(x, torch.randn(2, 16))
        assert not torch.allclose(different, plain(x)), f"stage {stage} does not hear the condition"
        torch.nn.init.zeros_(encoder.films[stage].gamma.weight)
    encoder.films[3].beta.bias.data.fill_(0.25)
    torch.testing.assert_close(encoder(x, cond), plain(x) + 0.25)
    local = build_encoder("film_resnet18", 3, cond_dim=16, local_tokens=True).eval()
    local.load_state_dict(encoder.state_dict())
    tokens = local(x, cond)
    torch.testing.assert_close(tokens[:, 0], encoder(x, cond))
    torch.testing.assert_close(tokens[:, 1:].mean(1), tokens[:, 0])


def test_any_timm_model_takes_point_maps():
    encoder = build_encoder("convnext_atto", in_chans=4)
    assert encoder(torch.rand(2, 4, 32, 32), None).shape == (2, encoder.num_features)


@pytest.mark.parametrize("size", [(48, 48), (84, 84), (33, 50)])
def test_spatial_softmax_shapes(size):
    encoder = build_encoder("spatial_softmax", 4, cond_dim=32, expect_channels=3, mask_channel=3, features=96)
    out = encoder(torch.rand(5, 4, *size), torch.rand(5, 32))
    assert out.shape == (5, 96) and encoder.num_features == 96 and not encoder.is_conditioned
    out.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_spatial_softmax_holes_do_not_pull_the_expected_point():
    """Of a constant point the expectation is that point, however much of the picture is a hole."""
    encoder = build_encoder("spatial_softmax", 4, expect_channels=3, mask_channel=3)
    point = torch.tensor([0.3, -2.0, 5.0])
    mask = (torch.rand(3, 1, 64, 64) < 0.6).float()
    x = torch.cat([point.view(1, 3, 1, 1) * mask, mask], dim=1)
    where = torch.randn(3, 32, 256).softmax(-1)
    x = torch.where(
        mask > 0, x, torch.tensor([9.0, 9, 9, 0]).view(4, 1, 1)
    )  # what a shift of origin leaves there
    expected = encoder._expect(x, where, torch.Size((16, 16)))
    torch.testing.assert_close(expected, point.expand(3, 32, 3), rtol=1e-4, atol=1e-4)
    assert (encoder._expect(x * 0, where, torch.Size((16, 16))) == 0).all()
    assert torch.isfinite(encoder(x * 0)).all()


def test_spatial_softmax_learns_where_a_patch_is():
    """A few steps suffice to say where a square lies; a network blind to position cannot."""
    generator = torch.Generator().manual_seed(0)

    def batch(count):
        corner = torch.randint(0, 40, (count, 2), generator=generator)
        x = 0.05 * torch.randn(count, 1, 48, 48, generator=generator)
        for image, (v, u) in zip(x, corner.tolist(), strict=True):
            image[:, v : v + 8, u : u + 8] += 1
        return x, corner.float() / 20 - 1

    encoder = build_encoder("spatial_softmax", 1, features=2)
    optimizer = torch.optim.AdamW(encoder.parameters(), 5e-3)
    for _ in range(60):
        x, target = batch(32)
        loss = (encoder(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, target = batch(64)
        assert (encoder(x) - target).square().mean().sqrt() < 0.1 * math.sqrt(1 / 3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: build_encoder("film_resnet5", 3), "unknown encoder 'film_resnet5'; close: film_resnet50"),
        (lambda: build_encoder("spatial_sofmax", 3), "Encoders are spatial_softmax, point_cloud, film_"),
        (
            lambda: build_encoder("film_vit_tiny_patch16_224", 3),
            "ResNet, ConvNeXt or DaViT; VisionTransformer",
        ),
        (lambda: build_encoder("spatial_softmax", 3, pretrained=True), "no pretrained weights"),
        (lambda: build_encoder("spatial_softmax", 3, depth=2), "does not take these options"),
        (lambda: build_encoder("resnet18", 3, depht=2), "does not take these options"),
        (
            lambda: build_encoder("mobilenetv3_small_050", 3, local_tokens=True),
            "pooled features .* have 1024 numbers and its map's 288: local_tokens must be false",
        ),
        (lambda: build_encoder("spatial_softmax", 3, expect_channels=4), "expect_channels must lie"),
        (lambda: build_encoder("spatial_softmax", 3, mask_channel=3), "mask_channel must be one of the 3"),
        (lambda: build_encoder("spatial_softmax", 3, channels=(15, 24, 32)), "multiples of 8"),
        (lambda: build_encoder("spatial_softmax", 3)(torch.rand(1, 3, 7, 64)), "at least 8 pixels a side"),
        (
            lambda: build_encoder("film_resnet18", 3)(torch.rand(1, 3, 32, 32)),
            r"cond must have shape \(1, 512\), got None",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


TIMM = {
    "film_resnet18": {},
    "film_convnextv2_atto": {},
    "film_davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 64), "num_heads": (1, 2, 4, 4)},
    "convnextv2_atto": {},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 64), "num_heads": (1, 2, 4, 4)},
    "vit_small_patch14_dinov2": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "vil2_tiny_patch16_224": {"depth": 2, "embed_dim": 48},
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("channels, local", [(1, False), (3, True), (4, True), (6, False)])
def test_families(name, channels, local):
    """Pooled, or pooled and the grid, of any number of channels and below the nominal size."""
    size = (56, 84) if "14" in name else (64, 96)
    grid = {"vit": 4 * 6, "vil": 4 * 6}.get(name[:3], 2 * 3)
    encoder = build_encoder(name, channels, cond_dim=8, local_tokens=local, **TIMM[name])
    for films in getattr(encoder, "films", ()):
        torch.nn.init.normal_(films.gamma.weight)
    x, cond = torch.randn(2, channels, *size), torch.randn(2, 8)
    out = encoder(x, cond)
    assert out.shape == ((2, 1 + grid, encoder.num_features) if local else (2, encoder.num_features))
    assert encoder.is_conditioned == name.startswith("film")
    out.square().mean().backward()
    still = [n for n, p in encoder.named_parameters() if p.grad is None]
    assert not still
    if local:
        same = {"global_pool": "bilateral_avg"} if name.startswith("vil") else {}
        pooled = build_encoder(name, channels, cond_dim=8, **TIMM[name], **same)
        pooled.load_state_dict(encoder.state_dict())
        torch.testing.assert_close(pooled.eval()(x, cond), encoder.eval()(x, cond)[:, 0])
    layer, seen = feature_layer(encoder), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    encoder(x, cond)
    features = as_feature_map(encoder, seen[0], size)
    assert features.shape == (2, features.shape[1], *((4, 6) if grid == 24 else (2, 3)))


def test_pretrained_weights_from_a_file(tmp_path):
    """Into any number of input channels; the classifier of the file is left out."""
    import timm
    from safetensors.torch import save_file

    donor = timm.create_model("resnet18")
    file = tmp_path / "resnet18.safetensors"
    save_file(donor.state_dict(), file)
    for name in ("resnet18", "film_resnet18"):
        for channels in (3, 4):
            encoder = build_encoder(name, channels, pretrained=True, weights=str(file))
            torch.testing.assert_close(encoder.network.layer3[0].conv1.weight, donor.layer3[0].conv1.weight)
            if channels == 3:
                torch.testing.assert_close(encoder.network.conv1.weight, donor.conv1.weight)


def test_pretrained_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"no pretrained weights of resnet18 at .*: no such file"):
        build_encoder("resnet18", 3, pretrained=True, weights=str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match=r"weights of resnet18 cannot be had .*rgb_weights, or train"):
        build_encoder("film_resnet18", 3, pretrained=True)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="weights of resnet18 cannot be had"):
        build_encoder("resnet18", 3, pretrained=True, weights=str(broken))
