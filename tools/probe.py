"""Probe frozen features: k nearest neighbours, a linear classifier, the 19 data sets of VTAB-1K."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vilma.datasets.imagenet import BadImages, ImageDataset
from vilma.datasets.imagenet_sources import FolderSource, ImageSource
from vilma.report import source_commit
from vilma.tools._backbone import Loaded, load_backbone
from vilma.tools._images_at import add_data_options, data_of_run, images_of
from vilma.training.checkpoint import replace_text
from vilma.training.images import Normalize, eval_transform
from vilma.training.probing import collect_features, knn_accuracy, linear_accuracy
from vilma.training.scoring import share_loader

__all__ = ["VTAB", "main"]

# The VTAB-1K benchmark (arXiv 1910.04867): its groups and data sets.
VTAB = {
    "natural": ("caltech101", "cifar100", "dtd", "flowers102", "pets", "svhn", "sun397"),
    "specialised": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": (
        "clevr_count",
        "clevr_dist",
        "dmlab",
        "kitti_dist",
        "dsprites_loc",
        "dsprites_ori",
        "smallnorb_azi",
        "smallnorb_ele",
    ),
}


class Features(nn.Module):
    """Pooled features before the classifier, (B, D), of pixels (B, 3, H, W)."""

    def __init__(self, loaded: Loaded, device: torch.device):
        super().__init__()
        self.model, self.normalize = loaded.model, Normalize(loaded.data["mean"], loaded.data["std"])
        self.to(device).eval()

    def forward(self, images: Tensor) -> Tensor:
        x = self.model.forward_features(self.normalize(images))
        return self.model.forward_head(x, pre_logits=True).flatten(1)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    methods = options.methods.split(",")
    if not set(methods) <= {"knn", "linear"}:
        raise ValueError(f"--methods is {options.methods!r}, wanted knn, linear or both")
    loaded = load_backbone(options.model, random=options.random)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = Features(loaded, device)
    out = options.out or _default_out(options.model)
    if options.vtab is not None:
        return vtab(model, loaded, options, methods, device, out)
    train_split = options.train_split or getattr(data_of_run(options.model), "train", "train")
    train = images_of(options, options.model, None, train_split)
    test = images_of(options, options.model, train.classes)
    result = probe(model, loaded, train, test, options, methods, device, out)
    _write(out / "probe.json", result | {"model": loaded.source, "commit": source_commit()})
    _tell("probe", result)
    return 0


def vtab(
    model: Features, loaded: Loaded, options: Any, methods: Sequence[str], device: torch.device, out: Path
) -> int:
    """Every data set that lies below the root (``NAME/train``, ``NAME/test``); finished ones are kept."""
    names = [name for group in VTAB.values() for name in group]
    present = [name for name in names if (options.vtab / name / "train").is_dir()]
    if not present:
        raise ValueError(
            f"{options.vtab} holds none of the data sets of VTAB, wanted folders NAME/train and NAME/test "
            f"with a folder a class; names: {', '.join(names)}"
        )
    path = out / "vtab.json"
    about = {"model": loaded.source, "methods": list(methods), "size": _size(options, loaded)}
    known = json.loads(path.read_text()) if path.is_file() else {}
    results = known.get("results", {}) if known.get("about") == about else {}
    for name in present:
        if name not in results:
            train = FolderSource(options.vtab / name / "train")
            test = FolderSource(options.vtab / name / "test", train.classes, subset=True)
            results[name] = probe(model, loaded, train, test, options, methods, device, out)
            _write(path, {"about": about, "results": results, "commit": source_commit()})
        _tell(name, results[name])
    for method in methods:
        means = []
        for group, members in VTAB.items():
            found = [results[name][method] for name in members if name in results]
            if found:
                means.append(sum(found) / len(found))
                print(f"{method}, {group}: {means[-1]:.1%} over {len(found)} of {len(members)} data sets")
        print(f"{method}, mean of the groups: {sum(means) / len(means):.1%}")
    absent = [name for name in names if name not in present]
    if absent:
        print(f"not there: {', '.join(absent)}")
    return 0


def probe(
    model: Features,
    loaded: Loaded,
    train: ImageSource,
    test: ImageSource,
    options: Any,
    methods: Sequence[str],
    device: torch.device,
    out: Path,
) -> dict[str, Any]:
    """Accuracies of the frozen features on one data set."""
    size, bad = _size(options, loaded), BadImages(out / "bad_images.jsonl")
    transform = eval_transform(size, loaded.data["interpolation"], loaded.data.get("crop_pct", 1.0))
    began, parts, unreadable = time.perf_counter(), [], 0
    for source in (train, test):
        dataset = ImageDataset(source, transform, bad, replace=False)
        loader = share_loader(dataset, options.batch_size, options.workers, device.type == "cuda")
        features, labels, missing = collect_features(model, loader, device, options.precision)
        parts += [features, labels]
        unreadable += missing
    result: dict[str, Any] = {"train": len(train), "test": len(test), "features": parts[0].shape[1]}
    result |= {"classes": len(train.classes), "unreadable": unreadable}
    if "knn" in methods:
        by_count = knn_accuracy(*parts, neighbours=options.neighbours)
        first = next(iter(by_count))
        named = {str(k): v for k, v in by_count.items()}
        result |= {"knn": by_count[first], "neighbours": first, "knn_all": named}
    if "linear" in methods:
        result["linear"], result["penalty"] = linear_accuracy(*parts)
    return result | {"seconds": round(time.perf_counter() - began, 1)}


def _size(options: Any, loaded: Loaded) -> int:
    return options.size or loaded.data["input_size"][-1]


def _default_out(model: str) -> Path:
    path = Path(model)
    if path.is_dir():
        for folder in (path, *path.resolve().parents[:2]):
            if (folder / "checkpoints").is_dir():
                return folder / "eval"
    return Path("runs") / "probe" / path.name


def _write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(values, indent=1) + "\n")


def _tell(name: str, result: dict[str, Any]) -> None:
    parts = []
    if "knn" in result:
        parts.append(f"{result['neighbours']} nearest neighbours {result['knn']:.2%}")
    if "linear" in result:
        parts.append(f"linear {result['linear']:.2%} (penalty {result['penalty']:g})")
    parts.append(f"{result['train']:,} images to learn from, {result['test']:,} to test")
    if result["unreadable"]:
        parts.append(f"{result['unreadable']} unreadable")
    print(f"{name}: {', '.join(parts)} [{result['seconds']:.0f} s]", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vilma probe", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="a run, a checkpoint's folder, or a name of timm")
    add_data_options(parser)
    parser.add_argument("--train-split", metavar="NAME", help="default: train, or that of the run")
    parser.add_argument(
        "--vtab",
        type=Path,
        metavar="DIR",
        help="instead: every data set of VTAB-1K below it (NAME/train, NAME/test)",
    )
    parser.add_argument("--methods", default="knn,linear", help="default: knn,linear")
    parser.add_argument(
        "--neighbours",
        type=int,
        nargs="+",
        default=[20, 10, 100],
        metavar="K",
        help="the first is told (default: 20 10 100)",
    )
    parser.add_argument("--size", type=int, metavar="PIXELS", help="default: as trained")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that load images")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--random", action="store_true", help="a name of timm without its weights")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the results (default: RUN/eval)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
