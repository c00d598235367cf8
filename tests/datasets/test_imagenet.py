"""Labelled images: every storage gives the same pictures; what is broken is named, and nothing else lost."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from vilma.datasets.imagenet import BadImages, ImageDataConfig, ImageDataset, open_images
from vilma.datasets.imagenet_sources import DigitSource, FolderSource, ShardSource

CLASSES = ("cat", "dog", "eel")


def picture(label: int, number: int) -> Image.Image:
    rng = np.random.default_rng(abs(10 * label + number))
    return Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three classes of four images below ``train``."""
    for label, name in enumerate(CLASSES):
        place = tmp_path / "data" / "train" / name
        place.mkdir(parents=True)
        for number in range(4):
            (place / f"{number}.png").write_bytes(encoded(picture(label, number)))
    return tmp_path / "data"


def write_shard(path, samples, classes=CLASSES) -> None:
    """Written by the webdataset package itself."""
    from webdataset import TarWriter

    with TarWriter(str(path)) as sink:
        for label, number in samples:
            data = {"__key__": f"{label}_{number}", "png": encoded(picture(label, number)), "cls": label}
            sink.write(data)
    (path.parent / "classes.txt").write_text("\n".join(classes))


def write_hub(path, samples) -> None:
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = {
        "image": [{"bytes": encoded(picture(*s)), "path": None} for s in samples],
        "label": [s[0] for s in samples],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": table}).save_to_disk(str(path))


def test_every_storage_gives_the_same_images(folder, tmp_path):
    samples = [(label, number) for label in range(3) for number in range(4)]
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shard(shards / "part-0.tar", samples[:7])
    write_shard(shards / "part-1.tar", samples[7:])
    write_hub(tmp_path / "hub", samples)
    places = {
        "folder": ImageDataConfig("folder", str(folder)),
        "webdataset": ImageDataConfig("webdataset", str(shards), train="part-{0..1}.tar"),
        "hf": ImageDataConfig("hf", str(tmp_path / "hub")),
    }
    for name, config in places.items():
        source = open_images(config, config.train)
        assert source.classes == CLASSES and len(source) == 12 and not source.problems, name
        seen = {(int(source.labels[i]), source.open(i).tobytes()) for i in range(12)}
        assert seen == {(label, picture(label, n).tobytes()) for label, n in samples}, name


def test_lists_of_shards_are_kept_until_a_shard_changes(tmp_path):
    write_shard(tmp_path / "a.tar", [(0, 0), (1, 0)])
    first = ShardSource(tmp_path, cache=str(tmp_path / "cache"))
    (kept,) = (tmp_path / "cache").iterdir()
    members, damage = json.loads(kept.read_text())
    kept.write_text(json.dumps([members[:1], damage]))
    assert len(first) == 2 and len(ShardSource(tmp_path, cache=str(tmp_path / "cache"))) == 1
    write_shard(tmp_path / "a.tar", [(0, 0), (1, 0), (2, 0)])
    assert len(ShardSource(tmp_path, cache=str(tmp_path / "cache"))) == 3


def test_what_is_no_data_set_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"absent/train is no folder"):
        open_images(ImageDataConfig("folder", "absent"), "train")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(encoded(picture(0, 0)))
    with pytest.raises(ValueError, match="flat is not a data set: it holds no folders"):
        FolderSource(tmp_path / "flat")
    (folder / "train" / "fox").mkdir()
    with pytest.raises(ValueError, match="no image in 1 of 4 classes: fox"):
        FolderSource(folder / "train")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"no \*\.tar in it"):
        ShardSource(tmp_path / "none")
    with pytest.raises(ValueError, match="is not a data set that save_to_disk wrote"):
        open_images(ImageDataConfig("hf", str(folder)), "train")
    with pytest.raises(ValueError, match=r"data\.root is empty"):
        ImageDataConfig("folder")


def test_other_classes_are_named(folder):
    config = ImageDataConfig("folder", str(folder))
    with pytest.raises(ValueError, match="lacks 1 of 4 classes: fox"):
        open_images(config, "train", (*CLASSES, "fox"))
    with pytest.raises(ValueError, match="1 classes that are not known: eel"):
        open_images(config, "train", CLASSES[:2])
    source = open_images(config, "train", ("fox", *CLASSES), subset=True)
    assert sorted(set(source.labels.tolist())) == [1, 2, 3]


def test_a_hub_data_set_keeps_the_classes_of_the_training(tmp_path):
    write_hub(tmp_path / "hub", [(0, 0), (1, 0), (2, 0)])
    config = ImageDataConfig("hf", str(tmp_path / "hub"))
    source = open_images(config, "train", ("eel", "cat", "dog"))
    assert source.labels.tolist() == [1, 2, 0] and source.classes == ("eel", "cat", "dog")


def test_shards_keep_the_classes_of_the_training(tmp_path):
    write_shard(tmp_path / "a.tar", [(0, 0), (1, 0), (2, 0)])
    config = ImageDataConfig("webdataset", str(tmp_path), train=".")
    source = open_images(config, "a.tar", ("eel", "cat", "dog"))
    assert source.labels.tolist() == [1, 2, 0] and source.classes == ("eel", "cat", "dog")
    with pytest.raises(ValueError, match="lacks 1 of 4 classes: fox"):
        open_images(config, "a.tar", (*CLASSES, "fox"))


def test_classes_without_images_and_rows_without_labels_are_named(tmp_path):
    write_shard(tmp_path / "a.tar", [(0, 0), (1, 0)])
    assert ShardSource(tmp_path).problems == [(str(tmp_path), "no image in 1 of 3 classes: eel")]
    write_hub(tmp_path / "hub", [(0, 0), (2, 0)])
    config = ImageDataConfig("hf", str(tmp_path / "hub"))
    assert [what for _, what in open_images(config, "train").problems] == ["no image in 1 of 3 classes: dog"]
    write_hub(tmp_path / "unlabelled", [(-1, 0), (-1, 1)])
    with pytest.raises(ValueError, match="labels -1 to -1 in 'train', wanted 0 to 2"):
        open_images(ImageDataConfig("hf", str(tmp_path / "unlabelled")), "train", CLASSES)


@pytest.mark.parametrize("damage", ["cut", "header", "ends early"])
def test_a_corrupt_shard_is_named_and_gives_what_is_before_the_damage(tmp_path, damage):
    write_shard(tmp_path / "a.tar", [(0, n) for n in range(4)], CLASSES[:2])
    write_shard(tmp_path / "b.tar", [(1, n) for n in range(4)], CLASSES[:2])
    path = tmp_path / "b.tar"
    with tarfile.open(path) as tar:
        third = tar.getmember("1_2.png")
        begin = min(third.offset, tar.getmember("1_2.cls").offset)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: third.offset_data + 100]
    elif damage == "header":
        data[begin : begin + 512] = b"\x01" * 512
    else:
        data = data[:begin]
    path.write_bytes(data)
    source = ShardSource(tmp_path)
    assert len(source) == 6 and {name for name, _ in source.problems} == {str(path)}
    assert "damaged after byte" in source.problems[0][1]
    bad = BadImages(tmp_path / "bad.jsonl")
    dataset = ImageDataset(source, lambda image: image.size, bad)
    assert [dataset[i]["label"] for i in range(6)] == [0] * 4 + [1] * 2
    assert "the 2 images before are used" in bad.read()[str(path)]


def test_a_truncated_image_is_skipped_counted_and_named(folder):
    place = folder / "train" / "dog" / "1.png"
    jpeg = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    place.rename(place.with_name("kept.bak"))
    broken = place.with_suffix(".jpg")
    broken.write_bytes(jpeg[: len(jpeg) // 2])
    bad = BadImages(folder / "bad.jsonl")
    dataset = ImageDataset(FolderSource(folder / "train"), lambda image: image.size, bad)
    names = [dataset.source.name(i) for i in range(12)]
    where = names.index(str(broken))
    assert dataset[where]["index"] == where + 1 and dataset[where]["label"] == 1
    assert list(BadImages(bad.path).read()) == [str(broken)] and "truncated" in bad.read()[str(broken)]
    held_out = ImageDataset(dataset.source, lambda image: image.size, bad, replace=False)
    assert held_out[where]["label"] == -1
    for _ in range(3):
        dataset[where]
    assert len(bad.path.read_text().splitlines()) == 1


def test_a_storage_that_went_away_ends_it(folder):
    dataset = ImageDataset(FolderSource(folder / "train"), lambda image: image.size)
    for file in (folder / "train").rglob("*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"12 images one after the other cannot be decoded.*FileNotFound"):
        dataset[3]


def test_digits_are_split_by_class():
    train, held_out = DigitSource(held_out=False), DigitSource(held_out=True)
    assert (len(train), len(held_out)) == (4000, 1000)
    assert np.bincount(held_out.labels).tolist() == [100] * 10
    with pytest.raises(ValueError, match="no split 'test'; they have 'train' and 'val'"):
        open_images(ImageDataConfig("digits"), "test")
    everything = {train.open(i).tobytes() for i in range(4000)}
    assert not everything & {held_out.open(i).tobytes() for i in range(1000)}
