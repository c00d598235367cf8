"""UPerNet over features: maps of any backbone, windows that cover an image, gradients everywhere."""

import pytest
import timm
import torch
import torch.nn.functional as F

import vilma.vil  # noqa: F401 - registers the family
from vilma.vil.segmentation import FeaturePyramid, Segmenter, UPerHead, create_segmenter, slide

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4}


@pytest.mark.parametrize("name", ["vil_tiny_patch16_224", "vil2_tiny_patch16_224"])
def test_logits_of_any_image_size_and_a_gradient_everywhere(name):
    model = create_segmenter(name, 5, (0, 1, 2, 3), channels=8, **SMALL)
    logits, auxiliary = model(torch.randn(2, 3, 40, 56))
    assert logits.shape == auxiliary.shape == (2, 5, 40, 56)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None]
    assert model.eval()(torch.randn(1, 3, 32, 48)).shape == (1, 5, 32, 48)


def test_hierarchical_backbones_bring_their_own_pyramid():
    backbone = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4))
    model = Segmenter(backbone, 3, channels=8).eval()
    assert model.pyramid is None and model(torch.randn(1, 3, 64, 96)).shape == (1, 3, 64, 96)
    with pytest.raises(ValueError, match="the backbone gives 3 maps, wanted 4"):
        Segmenter(timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3)), 3)


def test_a_pyramid_of_four_strides():
    maps = [torch.randn(2, 6, 5, 7) for _ in range(4)]
    shapes = [tuple(x.shape[2:]) for x in FeaturePyramid(6)(maps)]
    assert shapes == [(20, 28), (10, 14), (5, 7), (3, 4)]


def test_the_coarsest_level_reaches_every_pixel_and_the_finest_stays_local():
    head = UPerHead((4, 4, 4, 4), 8, 2, dropout=0.0).eval()
    maps = [torch.randn(1, 4, 32 >> k, 32 >> k, requires_grad=True) for k in range(4)]
    head(maps)[0, :, 0, 0].sum().backward()
    assert bool((maps[3].grad != 0).any(1).all())  # through the pooled maps
    assert not bool((maps[0].grad[..., 8:, 8:] != 0).any())


@pytest.mark.parametrize("size", [(20, 33), (12, 8), (12, 12)])
def test_windows_cover_an_image_and_agree_where_the_model_is_local(size):
    """A pointwise model gives the same by windows as at once; every pixel is averaged over its windows."""
    weight = torch.randn(4, 3, 1, 1)
    seen = []

    def model(x):
        seen.append(tuple(x.shape[2:]))
        return F.conv2d(x, weight)

    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(slide(model, images, 12, 5, 4), F.conv2d(images, weight))
    assert set(seen) == {(12, 12)}
    pixels = (images * 9).to(torch.uint8)
    by_windows = slide(lambda x: F.conv2d(x.float(), weight), pixels, 12, 5, 4)
    torch.testing.assert_close(by_windows, F.conv2d(pixels.float(), weight))
