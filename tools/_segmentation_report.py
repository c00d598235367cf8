"""The page of a segmenter's run: intersection over union, curves, and pictures of its predictions."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vilma.datasets.ade20k import MaskDataset
from vilma.datasets.imagenet import BadImages
from vilma.report import source_commit, write_page

__all__ = ["write_segmentation_report"]

CURVES = (
    ("loss", "Training loss"),
    ("val_miou", "Held-out mIoU"),
    ("pixel_accuracy", "Training pixel accuracy"),
    ("lr", "Learning rate"),
    ("grad_norm", "Gradient norm"),
    ("data_wait", "Share of time waiting for data"),
)
SHOWN, SIDE = 6, 160


def write_segmentation_report(
    run_dir: str | Path,
    dataset: MaskDataset,
    logits: Callable[[Tensor], Tensor],
    classes: Sequence[str],
) -> Path:
    """Write ``RUN/report.html`` with predictions of the first held-out images beside their masks."""
    run_dir = Path(run_dir)
    path = run_dir / "eval" / "masks.json"
    result = json.loads(path.read_text()) if path.is_file() else None
    bad = BadImages(run_dir / "bad_images.jsonl").read()
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(why)}</td></tr>" for name, why in list(bad.items())[:50]
    )
    sections = [
        ("Image, truth, prediction", _pictures(dataset, logits, len(classes))),
        ("Intersection over union", _each(result)),
        ("Images that could not be used", f"<table>{rows}</table>" if bad else '<p class="absent">None.</p>'),
    ]
    facts = [("Commit", source_commit()), ("torch", str(torch.__version__))]
    return write_page(run_dir, str(result["model"]) if result else "", _hero(result), sections, CURVES, facts)


def _hero(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return '<p class="absent">Held-out mIoU: not there yet.</p>'
    return (
        f'<div class="card big"><div class="figure">{result["miou"]:.2%}</div><p>mean intersection over '
        f"union on {result['images']:,} held-out images</p></div>"
        f'<div class="card small"><div class="figure">{result["pixel_accuracy"]:.2%}</div>'
        f"<p>of their pixels are right; step {result['step']}</p></div>"
    )


def _each(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return '<p class="absent">Not there yet.</p>'
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{'–' if x is None else f'{x:.1%}'}</td></tr>"
        for name, x in sorted(result["iou"].items(), key=lambda item: -1.0 if item[1] is None else item[1])
    )
    return f'<div class="wide"><table><tr><th>Class</th><th>IoU</th></tr>{rows}</table></div>'


@torch.no_grad()
def _pictures(dataset: MaskDataset, logits: Callable[[Tensor], Tensor], classes: int) -> str:
    colours = np.random.default_rng(7).integers(40, 256, (256, 3)).astype(np.uint8)
    colours[0], colours[255] = (30, 30, 30), (0, 0, 0)
    figures = []
    for index in range(min(SHOWN, len(dataset))):
        sample = dataset[index]
        # The final model may lie on an accelerator: ask it, not the data.
        output = logits(sample["image"][None].to(_device(logits)))
        predicted = output[0].argmax(0).cpu().numpy()
        truth = sample["mask"].numpy()
        parts = [sample["image"].permute(1, 2, 0).numpy(), colours[truth], colours[predicted]]
        strip = Image.fromarray(np.concatenate(parts, 1))
        scale = SIDE / strip.height
        strip = strip.resize((round(strip.width * scale), SIDE), Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        strip.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        figures.append(
            f'<figure class="picture"><img alt="{escape(dataset.source.name(index))}" '
            f'src="data:image/png;base64,{data}"></figure>'
        )
    return (
        '<div style="display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:.8rem">'
        f"{''.join(figures)}</div>"
    )


def _device(logits: Any) -> torch.device:
    owner = getattr(logits, "__self__", None)
    return next(owner.parameters()).device if owner is not None else torch.device("cpu")
