"""vilma train-segmentation: generated shapes are learnt, the page shows them, a dry run counts."""

import json

import pytest

from vilma import config
from vilma.tools.train_segmentation import main

CONFIG = "configs/smoke/vil_shapes.yaml"
TINY = [
    *("--segmenter.options", "{img_size: 32, patch_size: 8, embed_dim: 16, depth: 4}", "--data.count", "40"),
    *("--data.side", "32", "--augment.size", "32", "--augment.stride", "32", "--train.batch_size", "4"),
    *("--schedule.warmup", "2", "--train.tensorboard", "false", "--train.log_every", "2"),
]


def test_a_run_leaves_its_figures_and_its_page(tmp_path, capsys):
    words = [CONFIG, "--run", str(tmp_path / "run"), *TINY, "--train.steps", "8"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "40 images to train on, 10 held out, 4 classes" in said and "held-out mIoU" in said
    result = json.loads((tmp_path / "run" / "eval" / "masks.json").read_text())
    assert 0 < result["miou"] < 1 and set(result["iou"]) == {"background", "disc", "bar", "triangle"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png") == 6 and "Held-out mIoU" not in said and "triangle" in page
    kept = config.read(tmp_path / "run" / "checkpoints" / "last" / "config.yaml")
    assert kept["classes"] == ["background", "disc", "bar", "triangle"]
    assert main(words) == 0 and "already trained to step 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("--segmenter.num_classes", "5"), "4 classes, segmenter.num_classes is 5"),
        (("--data", "{format: ade20k, root: /absent}"), "/absent/images/training is no folder"),
        (("--segmenter.backbone", "vil3_tiny"), "timm has no model"),
    ],
)
def test_what_cannot_be_trained_is_named(tmp_path, overrides, message):
    words = [CONFIG, "--run", str(tmp_path / "run"), *TINY]
    if "ade20k" in overrides[1]:
        words += ["--segmenter.num_classes", "4"]
    with pytest.raises(ValueError, match=message):
        main([*words, *overrides])


def test_dry_run_of_the_published_recipe(capsys):
    words = ["configs/segmentation/ade20k_vil2_tiny.yaml", "--dry-run", "8"]
    small = ["--segmenter.options", "{img_size: 64, embed_dim: 16, depth: 4}", "--augment.size", "64"]
    small += ["--segmenter.out_indices", "[0, 1, 2, 3]"]
    assert main([*words, *small, "--segmenter.channels", "16"]) == 0
    said = capsys.readouterr().out
    assert "150 classes; effective batch 16, peak learning rate 0.0005, 160,000 steps" in said
    assert "8 processes x 1 micro-batches x 2" in said
