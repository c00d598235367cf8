"""Training a segmenter: images and masks stay in step, intersection over union, layers of the backbone."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.optim import param_groups_layer_decay

import vilma.vil  # noqa: F401 - registers the family
from vilma.datasets.ade20k import MaskDataConfig, MaskDataset, class_names, open_masks
from vilma.datasets.imagenet import BadImages
from vilma.training.classification import Classifier
from vilma.training.images import AugmentConfig
from vilma.training.optim import OptimConfig, build_optimizer, no_weight_decay
from vilma.training.segmentation import (
    IGNORE,
    MaskAugmentConfig,
    SegmentationTask,
    mask_loss,
    mean_iou,
    score_segmenter,
)
from vilma.vil.segmentation import create_segmenter

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4}


def test_image_and_mask_stay_in_step():
    """A mask that is painted into the image must be found there after any augmentation."""
    rng = np.random.default_rng(0)
    mask = (rng.integers(0, 4, (6, 8)).repeat(12, 0).repeat(12, 1)).astype(np.uint8)
    image = np.stack([40 + 60 * mask] * 3, -1).astype(np.uint8)
    config = MaskAugmentConfig(size=64, scale=(0.5, 2.0), short_side=72, distort=False)
    transform = config.train_transform()
    sizes, padded = set(), 0
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = transform(Image.fromarray(image), Image.fromarray(mask))
        assert x.shape == (3, 64, 64) and y.shape == (64, 64) and y.dtype == torch.int64
        inside = y != IGNORE
        near = (x[0].float() - (40 + 60 * y)).abs() < 8
        assert float(near[inside].float().mean()) > 0.75  # all but the borders between classes
        assert bool((x[:, ~inside] == 0).all())
        padded += int((~inside).any())
        sizes.add(int(inside.sum()))
    assert padded and len(sizes) > 3
    x, y = config.eval_transform()(Image.fromarray(image), Image.fromarray(mask))
    assert x.shape[1:] == y.shape == (72, 96)


def test_mean_intersection_over_union_against_sets():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 3, (2, 9, 9), generator=generator)
    logits = torch.randn(2, 4, 9, 9, generator=generator)
    logits[:, 3] = -9
    truth[0, :2] = IGNORE
    batches = [{"image": logits[:1], "mask": truth[:1]}, {"image": logits[1:], "mask": truth[1:]}]
    confusion, _ = score_segmenter(lambda x: x, batches, 4, torch.device("cpu"))
    places = [tuple(p) for p in (truth != IGNORE).nonzero().tolist()]
    guess = logits.argmax(1)
    expected = []
    for k in range(3):
        a = {p for p in places if int(truth[p]) == k}
        b = {p for p in places if int(guess[p]) == k}
        expected.append(len(a & b) / len(a | b))
    value, each = mean_iou(confusion)
    assert value == pytest.approx(np.mean(expected)) and each[:3] == pytest.approx(expected)
    assert np.isnan(each[3]) and confusion.sum() == len(places)


@pytest.mark.parametrize("name", ["vil_tiny_patch16_224", "vil2_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_layer_decay_is_that_of_the_backbone_alone(name):
    options = dict(SMALL, num_heads=4)
    config = OptimConfig(layer_decay=0.5)
    plain = timm.create_model(name, num_classes=7, **options)
    wanted = {}
    groups = param_groups_layer_decay(plain, layer_decay=0.5, no_weight_decay_list=no_weight_decay(plain))
    for group in groups:
        wanted |= {id(p): group["lr_scale"] for p in group["params"]}
    names = {key: wanted[id(p)] for key, p in plain.named_parameters()}
    task = Classifier(timm.create_model(name, num_classes=7, **options), tuple("abcdefg"), AugmentConfig())
    found = {
        id(p): g.get("lr_scale", 1.0) for g in build_optimizer(config, task).param_groups for p in g["params"]
    }
    assert {key.removeprefix("backbone."): found[id(p)] for key, p in task.named_parameters()} == names
    assert len(set(names.values())) >= 4


def test_the_loss_of_crops_without_a_class_is_no_nan():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    masks = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    masks[0] = IGNORE
    wanted = torch.nn.functional.cross_entropy(logits[1:], masks[1:])
    torch.testing.assert_close(mask_loss(logits, masks), wanted)
    loss = mask_loss(logits[:1], masks[:1])
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_layer_decay_of_a_segmenter_leaves_the_decoder_at_the_full_rate():
    model = create_segmenter("vil2_tiny_patch16_224", 4, (0, 1, 2, 3), channels=8, **SMALL)
    task = SegmentationTask(model, "abcd", MaskAugmentConfig())
    scales = {}
    for group in build_optimizer(OptimConfig(layer_decay=0.5), task).param_groups:
        scales |= {id(p): group.get("lr_scale", 1.0) for p in group["params"]}
    by_name = {key: scales[id(p)] for key, p in task.named_parameters()}
    assert {scale for key, scale in by_name.items() if not key.startswith("model.backbone.")} == {1.0}
    blocks = [by_name[f"model.backbone.model.blocks.{k}.rowwise_from_top_left.norm.weight"] for k in range(4)]
    assert blocks == [0.0625, 0.125, 0.25, 0.5]
    assert by_name["model.backbone.model.pos_embed"] == 0.03125


def ade20k(root):
    rng = np.random.default_rng(0)
    for split, count in (("training", 4), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for k in range(count):
            mask = rng.integers(0, 4, (30, 40)).astype(np.uint8)
            Image.fromarray(mask).save(root / "annotations" / split / f"{k}.png")
            image = rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{k}.jpg")
    return MaskDataConfig("ade20k", str(root))


def test_masks_of_ade20k_count_from_one(tmp_path):
    config = ade20k(tmp_path)
    source = open_masks(config, "training")
    raw = np.array(Image.open(tmp_path / "annotations" / "training" / "0.png"))
    mask = np.array(source.open(0)[1])
    assert np.array_equal(mask, np.where(raw == 0, IGNORE, raw.astype(int) - 1))
    with pytest.raises(ValueError, match="names"):
        open_masks(MaskDataConfig("ade20k", str(tmp_path)), "names")
    (tmp_path / "annotations" / "training" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1 images have no mask, as .*1\.png"):
        open_masks(config, "training")
    with pytest.raises(ValueError, match=r"4 classes, segmenter\.num_classes is 3"):
        class_names(MaskDataConfig("shapes"), 3)


def test_a_pair_that_cannot_be_used_is_named(tmp_path):
    config = ade20k(tmp_path)
    file = tmp_path / "images" / "training" / "1.jpg"
    file.write_bytes(file.read_bytes()[:200])
    Image.fromarray(np.full((30, 40), 9, np.uint8)).save(tmp_path / "annotations" / "training" / "2.png")
    bad = BadImages(tmp_path / "bad.jsonl")
    transform = MaskAugmentConfig(size=16, short_side=None).eval_transform()
    dataset = MaskDataset(open_masks(config, "training"), transform, 3, bad)
    assert dataset[1]["index"] == 3
    found = {name.rpartition("/")[2]: reason for name, reason in bad.read().items()}
    assert set(found) == {"1.jpg", "2.jpg"} and "classes [8], beyond 2" in found["2.jpg"]
    held_out = MaskDataset(dataset.source, transform, 3, bad, replace=False)
    assert set(held_out[1]["mask"].unique().tolist()) == {IGNORE}


def test_generated_shapes_do_not_depend_on_order():
    source = open_masks(MaskDataConfig("shapes", count=8), "training")
    again = open_masks(MaskDataConfig("shapes", count=8), "training")
    image, mask = source.open(3)
    again.open(0)
    assert np.array_equal(np.array(again.open(3)[0]), np.array(image))
    assert set(np.unique(np.array(mask))) <= {0, 1, 2, 3}
    held_out = open_masks(MaskDataConfig("shapes", count=8), "validation")
    assert len(held_out) == 2 and not np.array_equal(
        np.array(held_out.open(0)[0]), np.array(source.open(0)[0])
    )
