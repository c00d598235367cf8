"""Images with class masks: folders in ADE20K's layout, and generated shapes that need no download.

An image or mask that cannot be decoded is replaced by the next one and recorded, as in `datasets.imagenet`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from .imagenet import PATIENCE, BadImages

__all__ = ["SHAPES", "MaskDataConfig", "MaskDataset", "open_masks"]

IGNORE = 255
SHAPES = ("background", "disc", "bar", "triangle")


@dataclass(frozen=True)
class MaskDataConfig:
    """Where images and masks lie.

    Args:
        format: ``ade20k`` (``images/SPLIT/NAME.jpg`` beside ``annotations/SPLIT/NAME.png``) or ``shapes``
            (discs, bars and triangles on noise, generated).
        root: of the data set.
        zero_is_ignored: mask value 0 is no class and the others count from 1, as in ADE20K's 150 classes.
        names: a text file with the name of a class on each line; none numbers them.
        count, side: of generated training images, and their side; a quarter as many, to 500, are held out.
    """

    format: Literal["ade20k", "shapes"] = "ade20k"
    root: str = ""
    train: str = "training"
    val: str = "validation"
    zero_is_ignored: bool = True
    names: str | None = None
    count: int = 2000
    side: int = 32

    def __post_init__(self) -> None:
        if self.format != "shapes" and not self.root:
            raise ValueError(f"data.root is empty; data.format {self.format} wants the place of the data set")


class MaskFolder:
    """Pairs of an image and a mask of the same name.

    Raises:
        ValueError: a folder is absent, or an image has no mask.
    """

    def __init__(self, config: MaskDataConfig, split: str):
        images, masks = (Path(config.root, kind, split) for kind in ("images", "annotations"))
        for folder in (images, masks):
            if not folder.is_dir():
                raise ValueError(f"{folder} is no folder; wanted images/{split} and annotations/{split}")
        self.images = sorted(p for p in images.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if not self.images:
            raise ValueError(f"{images} is not a data set: it holds no .jpg or .png")
        self.masks = [masks / f"{p.stem}.png" for p in self.images]
        absent = [str(p) for p in self.masks if not p.is_file()]
        if absent:
            raise ValueError(f"{len(absent)} images have no mask, as {absent[0]}")
        self.zero_is_ignored = config.zero_is_ignored

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return str(self.images[index])

    def open(self, index: int) -> tuple[Image.Image, Image.Image]:
        image = Image.open(self.images[index]).convert("RGB")
        mask = np.array(Image.open(self.masks[index]))
        if mask.ndim != 2 or mask.shape != (image.height, image.width):
            raise ValueError(f"its mask is {mask.shape}, the image {(image.height, image.width)}")
        if self.zero_is_ignored:
            mask = mask.astype(np.int16) - 1
            mask[mask < 0] = IGNORE
        return image, Image.fromarray(mask.astype(np.uint8))


class ShapeImages:
    """Generated images: one or two shapes on noise, in colours apart; each a function of its index."""

    def __init__(self, count: int, side: int, first: int):
        self.count, self.side, self.first = count, side, first

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"generated image {self.first + index}"

    def open(self, index: int) -> tuple[Image.Image, Image.Image]:
        rng, side = np.random.default_rng(self.first + index), self.side
        colours, centres = [rng.integers(0, 256, 3)], []
        image, mask = (
            Image.new("RGB", (side, side), tuple(colours[0].tolist())),
            Image.new("L", (side, side), 0),
        )
        for _ in range(int(rng.integers(1, 3))):
            centre = _apart(centres, lambda: rng.uniform(0.2, 0.8, 2), 0.4)
            colour = _apart(colours, lambda: rng.integers(0, 256, 3), 120)
            kind, radius = int(rng.integers(1, len(SHAPES))), rng.uniform(0.19, 0.29) * side
            turn, upright = rng.uniform(-0.2, 0.2), bool(rng.integers(2))
            outline = _outline(kind, *(centre * side), radius, turn, upright)
            for canvas, fill in ((image, tuple(colour.tolist())), (mask, kind)):
                ImageDraw.Draw(canvas).polygon(outline, fill=fill)
        noise = rng.normal(0, 8, (side, side, 3))
        return Image.fromarray(np.clip(np.array(image) + noise, 0, 255).astype(np.uint8)), mask


def _apart(others: list[np.ndarray], draw: Callable[[], np.ndarray], distance: float) -> np.ndarray:
    """A draw that lies away from others, which it joins; the last of twenty where none does."""
    for _ in range(20):
        drawn = draw()
        if all(np.linalg.norm(drawn - other) >= distance for other in others):
            break
    others.append(drawn)
    return drawn


def _outline(
    kind: int, x: float, y: float, radius: float, turn: float, upright: bool
) -> list[tuple[float, float]]:
    """Corners of a disc, of a bar that lies or stands, or of an upright triangle, turned by some radians."""
    if kind == 2:
        length, width = 1.35 * radius, 0.6 * radius
        half = (width, length) if upright else (length, width)
        corners = [(a * half[0], b * half[1]) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    else:
        count, first, size = (40, 0.0, radius) if kind == 1 else (3, -math.pi / 2, 1.45 * radius)
        angles = [first + 2 * math.pi * k / count for k in range(count)]
        corners = [(size * math.cos(a), size * math.sin(a)) for a in angles]
    c, s = math.cos(turn), math.sin(turn)
    return [(x + c * a - s * b, y + s * a + c * b) for a, b in corners]


def open_masks(config: MaskDataConfig, split: str) -> MaskFolder | ShapeImages:
    """The images and masks of a split."""
    if config.format == "ade20k":
        return MaskFolder(config, split)
    if split == config.val:
        return ShapeImages(max(1, min(500, config.count // 4)), config.side, first=config.count)
    return ShapeImages(config.count, config.side, first=0)


def class_names(config: MaskDataConfig, number: int) -> tuple[str, ...]:
    """Names of ``number`` classes; ValueError if the data set names another number."""
    names = tuple(str(k) for k in range(number))
    if config.format == "shapes":
        names = SHAPES
    elif config.names is not None:
        lines = Path(config.names).read_text().splitlines()
        names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != number:
        raise ValueError(
            f"the data set has {len(names)} classes, segmenter.num_classes is {number}: give it as many"
        )
    return names


class MaskDataset(Dataset):
    """Transformed pairs: ``image`` (3, H, W) uint8, ``mask`` (H, W) int64, ``index``.

    Args:
        transform: PIL image and mask -> tensors.
        classes: of the masks; another value makes a pair one that cannot be used.
        replace: return the next pair in place of one that cannot be used; else its mask is IGNORE.
    """

    def __init__(
        self,
        source: MaskFolder | ShapeImages,
        transform: Callable[[Any, Any], tuple[Any, Any]],
        classes: int,
        bad: BadImages | None = None,
        replace: bool = True,
    ):
        self.source, self.transform, self.classes = source, transform, classes
        self.bad, self.replace = bad or BadImages(), replace

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        for attempt in range(min(PATIENCE, len(self))):
            place = (int(index) + attempt) % len(self)
            pair = self.load(place)
            if pair is None and not self.replace:
                pair = Image.new("RGB", (64, 64)), Image.new("L", (64, 64), IGNORE)
            if pair is not None:
                image, mask = self.transform(*pair)
                return {"image": image, "mask": mask, "index": place}
        raise ValueError(
            f"{attempt + 1} images one after the other cannot be used, from {self.source.name(int(index))}; "
            "is the storage there?"
        )

    def load(self, index: int) -> tuple[Image.Image, Image.Image] | None:
        """Image and mask, or none where they cannot be used, which is recorded."""
        try:
            image, mask = self.source.open(index)
            beyond = [v for v in np.unique(np.array(mask)).tolist() if v >= self.classes and v != IGNORE]
            if beyond:
                raise ValueError(f"its mask has classes {beyond[:5]}, beyond {self.classes - 1}")
            return image, mask
        except Exception as error:  # decoders raise many kinds
            self.bad.add(self.source.name(index), f"{type(error).__name__}: {error}")
            return None
