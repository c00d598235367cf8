"""Evaluate an image classifier: top-1 and top-5, real labels, variants of ImageNet, throughput."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vilma.datasets.imagenet import BadImages, ImageDataset
from vilma.datasets.imagenet_sources import ImageSource
from vilma.extras import require_timm
from vilma.report import source_commit
from vilma.tools._backbone import Loaded, load_backbone
from vilma.tools._image_report import keep_pictures, write_image_report
from vilma.tools._images_at import add_data_options, folder_of_classes, images_of
from vilma.training.checkpoint import replace_text
from vilma.training.images import Normalize, eval_transform
from vilma.training.scoring import Scores, score_classifier, share_loader

__all__ = ["main"]

# Scored over the classes they hold, as their authors do; the others hold all thousand.
VARIANTS = {"a": "ImageNet-A", "r": "ImageNet-R", "sketch": "ImageNet-Sketch", "v2": "ImageNet-V2"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    variants = dict(_variant(text) for text in options.variant)
    loaded = load_backbone(options.model, random=options.random)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = Seen(loaded, device)
    size = options.size or loaded.data["input_size"][-1]
    transform = eval_transform(
        size, loaded.data["interpolation"], options.crop_pct or loaded.data.get("crop_pct", 1.0)
    )
    folder = _results_folder(options)
    source = images_of(options, options.model, _wanted_classes(loaded))
    name = options.name or "val"
    result, dataset = evaluate(model, loaded, source, transform, options, device, folder, name)
    if options.real_labels is not None:
        result |= real_accuracy(result.pop("top"), dataset, loaded.classes, options.real_labels or None)
    result.pop("top", None)
    result["forward_samples_per_s"] = forward_speed(model, size, options.batch_size, device)
    write(folder, name, result, dataset)
    tell(name, result)
    for variant, place in variants.items():
        source = folder_of_classes(Path(place), loaded.classes, subset=True)
        result, dataset = evaluate(model, loaded, source, transform, options, device, folder, variant)
        result.pop("top", None)
        write(folder, variant, result, dataset)
        tell(VARIANTS[variant], result)
    bad = BadImages(folder / "bad_images.jsonl").read()
    for bad_name, reason in list(bad.items())[:10]:
        print(f"could not be used: {bad_name}: {reason}")
    if len(bad) > 10:
        print(f"... and {len(bad) - 10} more: {folder / 'bad_images.jsonl'}")
    if (folder.parent / "checkpoints").is_dir():
        print(f"report: {write_image_report(folder.parent)}")
    return 0


class Seen(nn.Module):
    """A loaded model for pixels: normalised as it was trained."""

    def __init__(self, loaded: Loaded, device: torch.device):
        super().__init__()
        self.model, self.normalize = loaded.model, Normalize(loaded.data["mean"], loaded.data["std"])
        self.to(device).eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalize(images))


def evaluate(
    model: Seen,
    loaded: Loaded,
    source: ImageSource,
    transform: Any,
    options: Any,
    device: torch.device,
    folder: Path,
    name: str,
) -> tuple[dict[str, Any], ImageDataset]:
    """The result of one data set as plain values, with the five best classes of each image under ``top``."""
    dataset = ImageDataset(source, transform, BadImages(folder / "bad_images.jsonl"), replace=False)
    loader = share_loader(dataset, options.batch_size, options.workers, device.type == "cuda")
    present = np.unique(source.labels)
    if len(source.classes) != model.model.num_classes:
        raise ValueError(
            f"{loaded.source} has {model.model.num_classes} classes, the data set {len(source.classes)}"
        )
    logits = model
    if len(present) < model.model.num_classes:  # a class that no image shows is no candidate
        absent = torch.ones(model.model.num_classes, dtype=torch.bool, device=device)
        absent[torch.as_tensor(present, device=device)] = False

        def logits(images: Tensor) -> Tensor:
            return model(images).masked_fill(absent, -torch.inf)

    with _progress(name, len(dataset)) as advance:
        scores: Scores = score_classifier(
            logits, loader, model.model.num_classes, device, options.precision, True, advance
        )
    if not scores.count:
        raise ValueError(f"no image of {name} can be decoded; see {folder / 'bad_images.jsonl'}")
    result = scores.describe(loaded.classes, source.name) | {"model": loaded.source, "top": scores.top}
    return result | {"classes": len(present), "commit": source_commit()}, dataset


def real_accuracy(
    top: dict[int, list[int]], dataset: ImageDataset, classes: Sequence[str], path: str | None
) -> dict[str, float]:
    """Accuracy by the reassessed labels (arXiv 2006.07159); images that have none do not count."""
    require_timm()
    from timm.data import ImageNetInfo, RealLabelsImagenet

    if tuple(classes) != tuple(ImageNetInfo().label_names()):
        raise ValueError("real labels are those of ImageNet-1K; the model has other classes")
    # It wants as many names as it has labels; only its table is used.
    labels = RealLabelsImagenet(range(50_000), path).real_labels
    right = {1: 0, 5: 0}
    count = 0
    for index, guesses in top.items():
        name = Path(dataset.source.name(index).rpartition(":")[2]).name
        if name not in labels:
            raise ValueError(
                f"{name} is no image of ImageNet's validation set, as ILSVRC2012_val_00000001.JPEG"
            )
        if labels[name]:
            count += 1
            for k in right:
                right[k] += any(guess in labels[name] for guess in guesses[:k])
    return {"real_top1": right[1] / max(count, 1), "real_top5": right[5] / max(count, 1)}


@torch.no_grad()
def forward_speed(model: Seen, size: int, batch: int, device: torch.device, rounds: int = 3) -> float:
    """Images a second of the model alone, best of some rounds."""
    images = torch.zeros(batch, 3, size, size, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(rounds):
        begun = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return batch / best


def write(folder: Path, name: str, result: dict[str, Any], dataset: ImageDataset) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    keep_pictures(folder / f"{name}_worst", result, dataset)


def tell(name: str, result: dict[str, Any]) -> None:
    parts = [f"top-1 {result['top1']:.2%}", f"top-5 {result['top5']:.2%}"]
    if "real_top1" in result:
        parts.append(f"real labels {result['real_top1']:.2%}")
    parts.append(f"{result['samples']:,} images of {result['classes']} classes")
    if result["unreadable"]:
        parts.append(f"{result['unreadable']} unreadable")
    parts.append(f"{result['samples_per_s']:,.0f} images/s with loading")
    if "forward_samples_per_s" in result:
        parts.append(f"{result['forward_samples_per_s']:,.0f} images/s of the model alone")
    print(f"{name}: {', '.join(parts)}")


def _wanted_classes(loaded: Loaded) -> tuple[str, ...] | None:
    """The classes by name; none where only their number is known."""
    return None if loaded.classes == tuple(map(str, range(len(loaded.classes)))) else loaded.classes


def _results_folder(options: Any) -> Path:
    if options.out is not None:
        return options.out
    path = Path(options.model)
    if path.is_dir():
        for folder in (path, *path.resolve().parents[:2]):
            if (folder / "checkpoints").is_dir():
                return folder / "eval"
    return Path("runs") / "eval_imagenet" / path.name


def _variant(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if name not in VARIANTS or not equals:
        raise ValueError(f"--variant is {text!r}, wanted NAME=DIR with a name of {', '.join(VARIANTS)}")
    return name, place


@contextlib.contextmanager
def _progress(name: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """Yields what to call with a number of finished images: it moves a bar, on a terminal."""
    if not sys.stdout.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vilma eval-imagenet", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run, a checkpoint's folder, or a name of timm")
    add_data_options(parser)
    parser.add_argument(
        "--real-labels",
        nargs="?",
        const="",
        metavar="JSON",
        help="also by the reassessed labels, of timm or of a file (real.json)",
    )
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME=DIR", help=f"also {', '.join(VARIANTS)}"
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="default: as trained")
    parser.add_argument("--crop-pct", type=float, metavar="SHARE")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--random", action="store_true", help="a name of timm without its weights")
    parser.add_argument("--name", help="of the result (default: val)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the results (default: RUN/eval)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
