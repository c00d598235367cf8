"""Turn an official Vision-LSTM checkpoint (.th) into safetensors that timm loads, and verify it."""

import argparse
import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vilma.extras import require_timm

EPILOG = """\
The file then loads with

  timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": "OUTPUT.safetensors"})

(as the official one does, unchanged). NAME is found from the file's name or else from its shapes, which do
not show overlapping patches: name the stride-8 models.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="vilma convert-vil",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", type=Path, help="a published .th file, or a state dict of torch.hub's entry"
    )
    parser.add_argument(
        "output", type=Path, nargs="?", help="default: the checkpoint's name with .safetensors"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the model it is of, as timm.list_models('vil*') has it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run code that the file may hold: only if it asks for it and you trust its origin",
    )
    options = parser.parse_args(arguments)
    output = options.output or options.checkpoint.with_suffix(".safetensors")
    if output.exists() and not options.overwrite:
        raise ValueError(f"{output} is there already; name another file or pass --overwrite")
    checkpoint = read(options.checkpoint, options.trust)
    name = options.model or find_model(options.checkpoint, checkpoint)
    print(f"model       {name}")
    for line in convert(checkpoint, name, output, source=options.checkpoint.name):
        print(line)
    return 0


def read(path: Path, trust: bool = False) -> dict[str, Any]:
    """The content of a checkpoint; without ``trust`` nothing but tensors and plain values is unpickled."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        try:
            needs = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:  # not a file of torch at all
            needs = []
        if not needs:
            raise ValueError(f"{path} is not a checkpoint of torch: {str(error).splitlines()[0]}") from error
        raise ValueError(
            f"{path} holds more than tensors ({', '.join(sorted(needs))}); pass --trust to load it all the "
            "same, if you trust where it comes from"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; wanted a state dict")
    return dict(content)


def find_model(path: Path, checkpoint: Mapping[str, Any]) -> str:
    """The registered model whose published file has this name, or whose parameters have these shapes."""
    timm = require_timm()
    import vilma.vil  # registers the family

    names = timm.list_models("vil*")
    for name in timm.list_pretrained("vil*"):
        if Path(timm.models.get_pretrained_cfg(name).url).name == path.name:
            return name
    fitting = []
    options = _options(checkpoint)
    for name in names:
        if "stride8" in name:
            continue
        model = timm.create_model(name, device="meta", **options)
        try:
            vilma.vil.checkpoint_filter_fn(checkpoint, model)
        except ValueError:
            continue
        fitting.append(name)
    if len(fitting) != 1:
        found = f"fits {', '.join(fitting)}" if fitting else "fits no registered model"
        raise ValueError(f"{path} {found}; name one with --model ({', '.join(names)})")
    return fitting[0]


def convert(checkpoint: Mapping[str, Any], name: str, output: Path, source: str = "") -> list[str]:
    """Write the weights of model ``name`` to ``output``; returns what was verified, one line each.

    Nothing is written unless the checkpoint is one of this model.
    """
    timm = require_timm()
    import safetensors.torch

    import vilma.vil

    known = timm.list_models("vil*")
    if name.partition(".")[0] not in known:
        raise ValueError(f"{name!r} is not a registered model here; choose one of {', '.join(known)}")
    options = _options(checkpoint)
    model = timm.create_model(name, **options).eval()
    weights = vilma.vil.checkpoint_filter_fn(checkpoint, model)
    model.load_state_dict(weights, strict=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(output.name + ".part")
    metadata = {"format": "pt", "architecture": name, "source": source, "licence": "MIT (NX-AI/vision-lstm)"}
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(tensors, unfinished, metadata)
    unfinished.replace(output)
    return verify(checkpoint, model, output, name, options)


def verify(
    checkpoint: Mapping[str, Any], model: nn.Module, output: Path, name: str, options: Mapping[str, int]
) -> list[str]:
    """Compare what was written, as timm reads it, with the checkpoint.

    Raises:
        RuntimeError: they differ (the file is then left there to be looked at).
    """
    timm = require_timm()
    import vilma.vil

    overlay = {"file": str(output), "num_classes": options["num_classes"]}
    overlay["input_size"] = (options["in_chans"], *model.default_cfg["input_size"][1:])
    again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()
    original = vilma.vil.checkpoints.rename(checkpoint, model.paired)
    loaded = again.state_dict()
    same = [
        key for key in loaded if key in original and torch.equal(loaded[key], original[key].to(loaded[key]))
    ]
    changed = sorted(set(loaded) - set(same))
    if set(changed) - {"pos_embed", "patch_embed.proj.weight", "fc_norm.weight", "fc_norm.bias"}:
        raise RuntimeError(f"{output} differs from the checkpoint in {', '.join(changed)}")
    image = torch.randn(1, options["in_chans"], 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (again(image) - model(image)).abs().max().item()
        logits = again(image)
    if difference != 0.0 or not torch.isfinite(logits).all():
        raise RuntimeError(f"{output} gives other outputs: {difference}, finite {logits.isfinite().all()}")
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    parameters = sum(p.numel() for p in again.parameters())
    lines = [
        f"tensors     {len(same)} of {len(loaded)} bit for bit those of the checkpoint"
        + (f"; resized or made anew: {', '.join(changed)}" if changed else ""),
        f"parameters  {parameters:,}",
        f"outputs     equal for a random image (class {logits.argmax().item()}, largest {logits.max():.4f})",
        f"written     {output} ({output.stat().st_size / 1e6:.1f} MB, sha256 {digest[:16]}...)",
    ]
    return lines


def _options(checkpoint: Mapping[str, Any]) -> dict[str, int]:
    """Classes and channels; 0 and 3 where the checkpoint does not show them (it may then be refused)."""
    import vilma.vil

    # both generations have the same names for these two
    weights = vilma.vil.checkpoints.rename(checkpoint, paired=True)
    head, kernel = weights.get("head.weight"), weights.get("patch_embed.proj.weight")
    return {
        "num_classes": 0 if head is None else len(head),
        "in_chans": kernel.shape[1] if kernel is not None and kernel.dim() == 4 else 3,
    }


if __name__ == "__main__":
    raise SystemExit(main())
