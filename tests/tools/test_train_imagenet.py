"""train-imagenet, eval-imagenet and probe on a small folder of images: results, resume, clear errors."""

import json
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vilma import config
from vilma.tools import eval_imagenet, probe, train_imagenet
from vilma.tools._image_training import ImageRunConfig

CONFIG = "configs/smoke/vil_digits.yaml"
COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 40), "red": (200, 30, 30)}


def picture(colour: tuple[int, int, int], seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-60, 60, (36, 36, 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three colours; one training image and one held-out image are cut short."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 12), ("val", 6)):
        for k, (name, colour) in enumerate(COLOURS.items()):
            place = root / split / name
            place.mkdir(parents=True)
            for n in range(count):
                picture(colour, 1000 * k + 100 * (split == "val") + n).save(place / f"{n}.png")
    for file in (root / "train" / "red" / "3.png", root / "val" / "green" / "2.png"):
        file.write_bytes(file.read_bytes()[:600])
    return root


def arguments(folder, run_dir, *overrides):
    return [
        *(CONFIG, "--run", str(run_dir), "--data", f"{{format: folder, root: {folder}}}"),
        *("--model", "{name: vil2_tiny_patch16_224, num_classes: 3, options: {img_size: 16, patch_size: 8, "),
        *("--train.steps", "30", "--train.batch_size", "12", "--train.checkpoint_every", "15"),
        *("--augment.size", "16", "--schedule.warmup", "3", "--train.log_every", "5"),
        *("--augment.auto_augment", "3a", "--optim.lr", "1e-2", *map(str, overrides)),
    ]


def run(folder, run_dir, *overrides):
    words = arguments(folder, run_dir, *overrides)
    words[words.index("--model") + 1] += "embed_dim: 32, depth: 1}}"
    return train_imagenet.main(words)


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "colours"
    assert run(folder, run_dir) == 0
    return run_dir


def test_a_run_learns_and_leaves_its_figures(finished):
    result = json.loads((finished / "eval" / "val.json").read_text())
    assert result["top1"] > 0.9 and result["samples"] == 17 and result["unreadable"] == 1
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if "val_top1" in line]
    assert [line["step"] for line in held_out] == [15, 30]
    assert held_out[-1]["val_top1"] == pytest.approx(result["top1"])
    assert any((finished / "tb").iterdir())
    assert config.load(ImageRunConfig, finished / "config.yaml").model.num_classes == 3


def test_bad_images_are_named_in_the_report(finished, folder):
    lines = [json.loads(line) for line in (finished / "bad_images.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == {
        str(folder / "train" / "red" / "3.png"),
        str(folder / "val" / "green" / "2.png"),
    }
    page = (finished / "report.html").read_text()
    assert "train/red/3.png" in page and "Confusions" in page and "Waiting for data" in page
    assert "Held-out top-1" in page and not re.search(r'(src|href)="http', page)


def test_the_checkpoint_names_its_classes_and_is_read_by_timm(finished, folder):
    place = finished / "checkpoints" / "best"
    assert json.loads((place / "config.json").read_text())["label_names"] == list(COLOURS)
    model = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    mean = torch.tensor([0.13])
    image = torch.from_numpy(np.array(picture(COLOURS["green"], 5).resize((16, 16)))).permute(2, 0, 1)
    assert int(model((image[None] / 255 - mean) / 0.31).argmax()) == 1


def test_a_finished_run_is_left_alone(finished, capsys):
    assert run("/absent", finished) == 0
    assert "already trained to step 30" in capsys.readouterr().out


def test_evaluated_again_it_gives_the_same(finished, folder, capsys):
    expected = json.loads((finished / "eval" / "val.json").read_text())
    shutil.rmtree(finished / "eval" / "val_worst", ignore_errors=True)
    assert eval_imagenet.main([str(finished), "--name", "again"]) == 0
    said = capsys.readouterr().out
    assert "1 unreadable" in said and "of the model alone" in said and "val/green/2.png" in said
    again = json.loads((finished / "eval" / "again.json").read_text())
    assert again["top1"] == expected["top1"] and again["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert "again" in (finished / "report.html").read_text()


def test_evaluated_on_a_variant_with_some_of_the_classes(finished, folder, tmp_path):
    for name in ("blue", "red"):
        shutil.copytree(folder / "val" / name, tmp_path / "part" / name)
    assert eval_imagenet.main([str(finished), "--variant", f"r={tmp_path / 'part'}"]) == 0
    result = json.loads((finished / "eval" / "r.json").read_text())
    assert result["classes"] == 2 and result["samples"] == 12 and result["top1"] > 0.9
    (tmp_path / "part" / "pink").mkdir()
    picture((250, 150, 150), 1).save(tmp_path / "part" / "pink" / "0.png")
    with pytest.raises(ValueError, match="1 classes that are not known: pink"):
        eval_imagenet.main([str(finished), "--variant", f"r={tmp_path / 'part'}"])


def test_numbered_folders_are_labels(finished, folder, tmp_path):
    for label, name in enumerate(COLOURS):
        shutil.copytree(folder / "val" / name, tmp_path / "v2" / str(label))
    assert eval_imagenet.main([str(finished), "--variant", f"v2={tmp_path / 'v2'}"]) == 0
    assert json.loads((finished / "eval" / "v2.json").read_text())["top1"] > 0.9


def test_probed(finished, folder, tmp_path, capsys):
    assert probe.main([str(finished), "--neighbours", "3", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "probe.json").read_text())
    assert result["knn"] > 0.9 and result["linear"] > 0.9 and result["unreadable"] == 2
    for name in ("pets", "dmlab"):
        shutil.copytree(folder / "train", tmp_path / "vtab" / name / "train")
        shutil.copytree(folder / "val", tmp_path / "vtab" / name / "test")
    words = [str(finished), "--vtab", str(tmp_path / "vtab"), "--methods", "knn", "--neighbours", "3"]
    assert probe.main([*words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "knn, natural" in said and "1 of 7 data sets" in said and "not there: caltech101" in said
    shutil.rmtree(tmp_path / "vtab" / "pets")
    kept = json.loads((tmp_path / "out" / "vtab.json").read_text())["results"]
    assert set(kept) == {"pets", "dmlab"}
    with pytest.raises(ValueError, match="holds none of the data sets of VTAB"):
        probe.main([str(finished), "--vtab", str(tmp_path / "out")])


def test_fine_tuned_at_another_size_with_other_classes(finished, folder, tmp_path):
    """The position table is resized, the classifier is new, the rest is taken over."""
    root = tmp_path / "two"
    for split in ("train", "val"):
        for name in ("blue", "red"):
            shutil.copytree(folder / split / name, root / split / name)
    overrides = ["--model.num_classes", "2", "--model.options.img_size", "24", "--augment.size", "24"]
    overrides += [
        "--model.weights",
        finished,
        "--train.steps",
        "1",
        "--optim.lr",
        "1e-9",
        "--schedule.warmup",
        "0",
    ]
    assert run(root, tmp_path / "tuned", *overrides) == 0
    old = timm.create_model(f"local-dir:{finished / 'checkpoints' / 'last'}", pretrained=True).state_dict()
    new = timm.create_model(
        f"local-dir:{tmp_path / 'tuned' / 'checkpoints' / 'last'}", pretrained=True
    ).state_dict()
    assert new["pos_embed"].shape[1:3] == (3, 3) and new["head.weight"].shape[0] == 2
    name = "blocks.0.rowwise_from_top_left.layer.proj_up.weight"
    assert torch.allclose(old[name], new[name], atol=1e-6)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("--model.num_classes", "4"), r"has 3 classes \(blue, green, red, ...\), model.num_classes is 4"),
        (("--data.root", "/absent"), "/absent/train is no folder"),
        (("--data.val", "train/blue"), "is not a data set: it holds no folders"),
        (("--model.name", "vil2_tinny_patch16_224"), "did you mean vil2_tiny_patch16_224"),
        (("--model.options.embed_dims", "3"), "does not take model.options"),
        (("--model.weights", "/absent.pth"), "no weights at /absent.pth"),
        (("--augment.sise", "3"), "did you mean 'size'"),
        (
            ("--mix", "{mixup: 0.8, group: 8}"),
            "12 samples at once, which groups of mix.group 8 do not divide",
        ),
    ],
)
def test_what_cannot_be_trained_is_named(folder, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(folder, tmp_path / "run", *overrides)


def test_dry_run_of_many_processes(capsys):
    words = ["configs/imagenet/vil2_tiny_patch16_224.yaml", "--dry-run", "8x4"]
    small = ["--model.options", "{img_size: 32, embed_dim: 32, depth: 1}", "--augment.size", "32"]
    assert train_imagenet.main([*words, *small]) == 0
    said = capsys.readouterr().out
    assert "effective batch 2048, peak learning rate 0.002, 500,456 steps" in said
    assert "2048 samples = 32 processes x 1 micro-batches x 64" in said and "memory of a process" in said
    with pytest.raises(ValueError, match=r"mix\.group 32 do not divide"):
        train_imagenet.main([*words, *small, "--train.batch_size", "512"])
    with pytest.raises(ValueError, match="GPUs x nodes as 8x4"):
        train_imagenet.main([*words[:2], "eight"])


def test_real_labels_are_for_imagenet(finished):
    with pytest.raises(ValueError, match="real labels are those of ImageNet-1K"):
        eval_imagenet.main([str(finished), "--real-labels"])
