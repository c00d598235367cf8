"""The images that a tool is told to look at: options of a command line, or the data of a run."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vilma import config
from vilma.datasets.imagenet import ImageDataConfig, open_images
from vilma.datasets.imagenet_sources import FolderSource, ImageSource

__all__ = ["add_data_options", "data_of_run", "images_of"]


def add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data (default: what the run was trained with)")
    group.add_argument("--data", metavar="DIR", help="root of the data set")
    group.add_argument("--format", choices=("folder", "webdataset", "hf", "digits"), help="default: folder")
    group.add_argument("--split", metavar="NAME", help="default: the validation split")


def data_of_run(path: str) -> ImageDataConfig | None:
    """The data section of the run that a path or a checkpoint of it belongs to; none where there is none."""
    place = Path(path).resolve()
    for folder in (place, *place.parents[:2]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            values = config.read(folder / "config.yaml").get("data")
            if isinstance(values, dict) and "format" in values:
                return config.decode(ImageDataConfig, values, "data")
    return None


def images_of(
    options: Any, model: str, classes: Sequence[str] | None, split: str | None = None
) -> ImageSource:
    """The split that ``options`` (of `add_data_options`) and the run behind ``model`` name.

    Raises:
        ValueError: nothing names a data set, or it is not there.
    """
    known = data_of_run(model)
    if options.data is None and options.format != "digits" and known is None:
        raise ValueError(f"{model} is no run that names its data; give --data DIR (and --format)")
    data = known
    if options.data is not None or options.format is not None:
        data = ImageDataConfig(format=options.format or "folder", root=options.data or "")
        if known is not None and known.format == data.format:
            data = replace(known, root=data.root)
    split = split or options.split or data.val
    if data.format == "folder" and options.data and not Path(data.root, split).is_dir():
        return folder_of_classes(Path(data.root), classes)  # it is the split itself
    return open_images(data, split, classes)


def folder_of_classes(root: Path, classes: Sequence[str] | None, subset: bool = False) -> ImageSource:
    """Class folders; those named by numbers (as ImageNet-V2) are taken for the labels themselves."""
    if classes is not None and root.is_dir():
        names = [p.name for p in root.iterdir() if p.is_dir()]
        if names and all(n.isdigit() for n in names) and not all(c.isdigit() for c in classes):
            source = FolderSource(root, [str(i) for i in range(len(classes))], subset)
            source.classes = tuple(classes)
            return source
    return FolderSource(root, classes, subset)
