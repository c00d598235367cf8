"""Backbones by name or from a checkpoint: what the image tools build their models with."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vilma import config
from vilma.extras import require_timm

__all__ = [
    "BackboneConfig",
    "Loaded",
    "build_backbone",
    "checked_name",
    "find_checkpoint",
    "find_weights",
    "load_backbone",
    "weights_overlay",
]

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class BackboneConfig:
    """A timm model, the ViL family included.

    Args:
        name: as in ``timm.list_models()``.
        num_classes: of the classifier.
        options: arguments of the model, as ``{drop_path_rate: 0.05, img_size: 192}``.
        weights: to begin with: a run, a checkpoint's folder, a file (.safetensors, .pth, official .th), or
            ``pretrained`` for those that timm has. A position table and a patch kernel are resized, a
            classifier of another size is new.
        grad_checkpointing: recompute blocks in the backward pass instead of keeping what they computed.
    """

    name: str = "vil2_tiny_patch16_224"
    num_classes: int = 1000
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    grad_checkpointing: bool = False


def build_backbone(c: BackboneConfig, weights: bool = True) -> nn.Module:
    """The model of a config; ``weights`` false leaves it as initialised.

    Raises:
        ValueError: timm has no such model, it does not take the options, or the weights belong to another.
    """
    timm = require_timm()
    import vilma.vil  # noqa: F401 - registers the family

    options: dict[str, Any] = {"num_classes": c.num_classes, **c.options}
    if weights and c.weights:
        options["pretrained"] = True
        if c.weights != "pretrained":
            options["pretrained_cfg_overlay"] = weights_overlay(find_weights(c.weights), c.name)
    checked_name(c.name)
    try:
        model = timm.create_model(c.name, **options)
    except TypeError as error:
        raise ValueError(f"{c.name} does not take model.options {c.options}: {error}") from error
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        raise ValueError(f"{c.weights} does not hold weights of {c.name}: {error}") from error
    if c.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def checked_name(name: str) -> str:
    """``name``, if timm has such a model; ValueError with close ones if not."""
    timm = require_timm()
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"timm has no model {name!r}{hint}")
    return name


def find_weights(path: str) -> Path:
    """The file of weights that a run, a checkpoint's folder or a file name stands for."""
    found = Path(path)
    if found.is_dir():
        found = find_checkpoint(found) / WEIGHTS
    if not found.is_file():
        raise ValueError(f"no weights at {path}")
    return found


def find_checkpoint(path: Path) -> Path:
    """The folder of a checkpoint: itself, or the last one of a run (the best with RUN/checkpoints/best)."""
    for folder in (path, path / "checkpoints" / "last"):
        if (folder / WEIGHTS).is_file():
            return folder
    raise ValueError(f"{path} is neither a checkpoint nor a run that has one (checkpoints/last/{WEIGHTS})")


def weights_overlay(file: Path, name: str) -> dict[str, Any]:
    """timm's pretrained settings for a file: with the classes it has, so that others get a new classifier."""
    timm = require_timm()
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    classifier = getattr(cfg, "classifier", None)
    overlay = {"file": str(file), "num_classes": getattr(cfg, "num_classes", 1000), "custom_load": False}
    for key, shape in _shapes(file).items():
        if isinstance(classifier, str) and re.fullmatch(rf"(.*\.)?{re.escape(classifier)}\.weight", key):
            overlay["num_classes"] = shape[0]
    return overlay


def _shapes(file: Path) -> Mapping[str, tuple[int, ...]]:
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as weights:
            return {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118 - no mapping
    values = torch.load(file, map_location="cpu", weights_only=True)
    for wrapper in ("model", "state_dict"):
        if isinstance(values, Mapping) and isinstance(values.get(wrapper), Mapping):
            values = values[wrapper]
    return {key: tuple(v.shape) for key, v in values.items() if torch.is_tensor(v)}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with what it needs to see images as it was trained.

    Args:
        classes: names of the logits; numbers where they are not known.
        data: timm's data configuration: input_size, mean, std, interpolation, crop_pct.
    """

    model: nn.Module
    classes: tuple[str, ...]
    data: dict[str, Any]
    source: str


def load_backbone(name: str, num_classes: int | None = None, random: bool = False, **options: Any) -> Loaded:
    """A run, a checkpoint's folder, or a name of timm (then with its published weights).

    Args:
        num_classes: another number of classes (0: features).
        random: a name of timm without weights.
        options: further arguments of the model.

    Raises:
        ValueError: there is no such checkpoint or model.
    """
    timm = require_timm()
    import vilma.vil  # noqa: F401 - registers the family

    if num_classes is not None:
        options["num_classes"] = num_classes
    path = Path(name)
    if path.exists():
        folder = find_checkpoint(path)
        facts = config.read(folder / "config.json") if (folder / "config.json").is_file() else None
        if facts is None:
            raise ValueError(f"{folder} has no config.json in timm's form, which names the model")
        model = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True, **options)
        classes = tuple(facts.get("label_names", ()))
    else:
        checked_name(name)
        model = timm.create_model(name, pretrained=not random, **options)
        classes = ()
        if model.num_classes == 1000:
            from timm.data import ImageNetInfo

            classes = tuple(ImageNetInfo().label_names())
    if len(classes) != model.num_classes:
        classes = tuple(str(i) for i in range(model.num_classes))
    data = timm.data.resolve_model_data_config(model)
    return Loaded(model.eval(), classes, data, name)
