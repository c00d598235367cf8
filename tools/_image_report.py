"""The page of a classifier's run: accuracy, curves, confusions, worst predictions as pictures, bad images."""

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import torch

from vilma.datasets.imagenet import BadImages, ImageDataset
from vilma.report import source_commit, write_page

__all__ = ["keep_pictures", "write_image_report"]

CURVES = (
    ("loss", "Training loss"),
    ("val_top1", "Held-out top-1"),
    ("val_loss", "Held-out loss"),
    ("accuracy", "Training accuracy, augmented"),
    ("lr", "Learning rate"),
    ("grad_norm", "Gradient norm"),
    ("samples_per_s", "Samples a second"),
    ("data_wait", "Share of time waiting for data"),
)
PICTURE = 96
LISTED = 50


def write_image_report(run_dir: str | Path, dataset: ImageDataset | None = None) -> Path:
    """Write ``RUN/report.html``; ``dataset`` (the evaluated one) gives pictures of the worst predictions.

    They are kept in ``RUN/eval/val_worst``, so that a later page needs no data.
    """
    run_dir = Path(run_dir)
    results = _read_results(run_dir / "eval")
    main = results.get("val")
    if main is not None and dataset is not None:
        keep_pictures(run_dir / "eval" / "val_worst", main, dataset)
    bad = BadImages(run_dir / "bad_images.jsonl").read()
    sections = [("Confusions", _confusions(main)), ("Worst predictions", _worst(run_dir, main))]
    if len(results) > 1:
        sections.append(("All evaluations", _table(results)))
    sections.append(("Images that could not be used", _bad(bad)))
    facts = [("Commit", source_commit()), ("torch", str(torch.__version__))]
    waits = _waits(run_dir / "metrics.jsonl")
    if waits is not None:
        facts.append(("Waiting for data", f"{waits:.1%} of the time of training"))
    subtitle = str(main["model"]) if main else ""
    return write_page(run_dir, subtitle, _hero(main, len(bad)), sections, CURVES, facts)


def keep_pictures(folder: Path, result: Mapping[str, Any], dataset: ImageDataset) -> None:
    """Small PNG files of the worst predictions, by their index in the data set."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for entry in result["worst"]:
        image = dataset.load(entry["index"])
        if image is not None:
            scale = PICTURE / max(image.size)
            image = image.resize([max(1, round(side * scale)) for side in image.size])
            image.save(folder / f"{entry['index']:08d}.png")


def _read_results(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            if {"top1", "samples", "worst", "confusions"} <= result.keys():
                found[path.stem] = result
        except (OSError, ValueError, AttributeError):
            continue
    return found


def _hero(result: Mapping[str, Any] | None, bad: int) -> str:
    if result is None:
        return '<p class="absent">Held-out accuracy: not there yet.</p>'
    skipped = f" · {result['unreadable']} could not be decoded" if result["unreadable"] else ""
    return (
        f'<div class="card big"><div class="figure">{result["top1"]:.2%}</div>'
        f"<p>of {result['samples']:,} held-out images are given their class (top-1){skipped}</p></div>"
        f'<div class="card small"><div class="figure">{result["top5"]:.2%}</div>'
        f"<p>have it among the five best (top-5); step {result.get('step', '?')}, "
        f"{bad} images or shards could not be used</p></div>"
    )


def _confusions(result: Mapping[str, Any] | None) -> str:
    if not result or not result["confusions"]:
        return '<p class="absent">None.</p>'
    rows = "".join(
        f"<tr><td>{escape(c['label'])}</td><td>{escape(c['predicted'])}</td><td>{c['count']}</td>"
        f"<td>{c['count'] / c['of']:.1%}</td></tr>"
        for c in result["confusions"]
    )
    lowest = sorted(result["recall"].items(), key=lambda item: item[1])[:8]
    named = ", ".join(f"{escape(name)} {share:.1%}" for name, share in lowest)
    return (
        '<div class="wide"><table><tr><th>Class</th><th>Taken for</th><th>Times</th>'
        f"<th>Share of the class</th></tr>{rows}</table></div>"
        f'<p class="note">Classes found least often: {named}.</p>'
    )


def _worst(run_dir: Path, result: Mapping[str, Any] | None) -> str:
    if not result or not result["worst"]:
        return '<p class="absent">None.</p>'
    figures = []
    for entry in result["worst"]:
        path = run_dir / "eval" / "val_worst" / f"{entry['index']:08d}.png"
        picture = ""
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            picture = f'<img alt="{escape(entry["name"])}" src="data:image/png;base64,{data}">'
        figures.append(
            f'<figure class="picture" title="{escape(entry["name"])}">{picture}<figcaption>'
            f"{escape(entry['label'])} {entry['p_label']:.1%}<br>"
            f'<span class="dot bad"></span>{escape(entry["predicted"])} {entry["p_predicted"]:.1%}'
            "</figcaption></figure>"
        )
    return (
        '<div style="display:grid;grid-template-columns:repeat(auto-fill,minmax(100px,1fr));gap:1rem">'
        f"{''.join(figures)}</div>"
        '<p class="note">Above: the true class and the probability it was given; below: the prediction.</p>'
    )


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{r['top1']:.2%}</td><td>{r['top5']:.2%}</td><td>{r['samples']:,}</td>"
        f"<td>{r['unreadable']}</td><td>{r['samples_per_s']:,.0f}</td></tr>"
        for name, r in results.items()
    )
    head = "".join(
        f"<th>{h}</th>" for h in ("Evaluation", "Top-1", "Top-5", "Images", "Unreadable", "Images a second")
    )
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _bad(bad: Mapping[str, str]) -> str:
    if not bad:
        return '<p class="absent">None.</p>'
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(reason)}</td></tr>"
        for name, reason in list(bad.items())[:LISTED]
    )
    more = f'<p class="note">{len(bad)} in all; bad_images.jsonl lists them.</p>'
    return f'<div class="wide"><table><tr><th>Name</th><th>Why</th></tr>{rows}</table></div>{more}'


def _waits(path: Path) -> float | None:
    """The mean of ``data_wait`` over the lines of metrics, each of which spans as many updates."""
    values = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            values.append(float(json.loads(line)["data_wait"]))
        except (ValueError, KeyError, TypeError):
            continue
    return sum(values) / len(values) if values else None
