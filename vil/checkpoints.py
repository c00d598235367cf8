"""Official Vision-LSTM checkpoints: their names for what `VisionLSTM` holds, their position tables.

Understood are the published ``.th`` files (with the names of the training code), state dicts of the torch.hub
entries, and our own; each for both generations, wrapped in ``state_dict`` or ``model`` or not.

=========================  ================================================================
training code              here
=========================  ================================================================
xlstm.blocks.J.xlstm_norm  blocks.J.norm, generation 2: blocks.{J//2}.rowwise_from_*.norm
xlstm.blocks.J.xlstm       ... .layer
xlstm.post_blocks_norm     norm (hub: legacy_norm in generation 1, norm in 2)
head.0                     fc_norm (hub: norm in generation 1, legacy_norm in 2)
head.1                     head (hub: head)
pos_embed.embed            pos_embed
=========================  ================================================================
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WRAPPERS = ("state_dict", "model")
_PREFIXES = re.compile(r"((_orig_mod|module|model)\.)+")  # of torch.compile, DataParallel, Lightning
_HEAD = ("head.weight", "head.bias")
_FC_NORM = ("fc_norm.weight", "fc_norm.bias")
_DIRECTIONS = ("rowwise_from_top_left", "rowwise_from_bot_right")


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """What of a checkpoint goes into ``model``, under its names; timm calls this before it loads.

    The position table is resized as the reference does (bicubic, no antialiasing) and the patch kernel
    resampled where their sizes differ. A classifier that the model keeps must be there and fit, and with it
    fc_norm. Where the model has none, or timm is about to drop the checkpoint's because it is of other
    classes, both may be missing, and fc_norm may be of another pooling: its weight is then 1 and its bias 0,
    which still normalises.

    Raises:
        ValueError: a checkpoint of another model. Nothing is loaded from it in part; the message lists what
            is missing, what is unexpected and what has another shape.
    """
    given = rename(state_dict, model.paired)
    wanted = model.state_dict()
    keeps_head = _keeps_classifier(model, given)
    optional = () if keeps_head else (*_HEAD, *_FC_NORM)
    loaded, wrong_shape = {}, {}
    for name, value in given.items():
        target = wanted.get(name)
        if target is None:
            continue
        if name == "pos_embed" and value.dim() == 4 and value.shape[-1] == target.shape[-1]:
            value = resize_positions(value, target.shape[1], target.shape[2])
        if name == "patch_embed.proj.weight" and value.dim() == 4 and value.shape[0] == target.shape[0]:
            value = _resample_patches(value, target)
        elif value.shape != target.shape and name in optional and name in _FC_NORM:
            if _other_pooling(value, model):
                continue
            wrong_shape[name] = f"{tuple(value.shape)} for {tuple(target.shape)}"
        elif value.shape != target.shape and name not in optional:
            wrong_shape[name] = f"{tuple(value.shape)} for {tuple(target.shape)}"
        loaded[name] = value
    missing = [name for name in wanted if name not in given and name not in optional]
    unexpected = [name for name in given if name not in wanted and name not in optional]
    if missing or unexpected or wrong_shape:
        raise ValueError(_refusal(model, missing, unexpected, wrong_shape))
    for name in _FC_NORM:
        if name in wanted and name not in loaded:
            loaded[name] = torch.ones_like(wanted[name]) if name.endswith("weight") else wanted[name] * 0
    return loaded


def rename(state_dict: Mapping[str, Any], paired: bool) -> dict[str, Tensor]:
    """Every tensor of a checkpoint under the name that `VisionLSTM` has for it; other names stay as they are.

    paired: whether the model's blocks are pairs of sub-blocks (generation 2).
    """
    for wrapper in _WRAPPERS:
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    tensors = {}
    for name, value in state_dict.items():
        if match := _PREFIXES.match(name):
            name = name[match.end() :]
        if isinstance(value, Tensor) and not name.endswith("causal_mask"):
            tensors[name] = value
    if any(name.startswith("xlstm.") for name in tensors):
        return {_from_training(name, paired): value for name, value in tensors.items()}
    if "pos_embed.embed" in tensors:
        return {_from_hub(name, paired): value for name, value in tensors.items()}
    return tensors


def _from_training(name: str, paired: bool) -> str:
    if match := re.fullmatch(r"xlstm\.blocks\.(\d+)\.(xlstm_norm|xlstm)\.(.+)", name):
        j, part, rest = int(match[1]), match[2], match[3]
        block = f"blocks.{j // 2}.{_DIRECTIONS[j % 2]}" if paired else f"blocks.{j}"
        return f"{block}.norm.{rest}" if part == "xlstm_norm" else f"{block}.layer.{_layer(rest)}"
    for old, new in (("xlstm.post_blocks_norm.", "norm."), ("head.0.", "fc_norm."), ("head.1.", "head.")):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return "pos_embed" if name == "pos_embed.embed" else name


def _from_hub(name: str, paired: bool) -> str:
    if match := re.fullmatch(r"(blocks\..+\.layer)\.(.+)", name):
        return f"{match[1]}.{_layer(match[2])}"
    final, pooled = ("norm.", "legacy_norm.") if paired else ("legacy_norm.", "norm.")
    if name.startswith(final):
        return "norm." + name.removeprefix(final)
    if name.startswith(pooled):
        return "fc_norm." + name.removeprefix(pooled)
    return "pos_embed" if name == "pos_embed.embed" else name


def _layer(name: str) -> str:
    """conv1d.conv (generation 1), conv1d (training code of 2) and conv.conv (causal in 2) are all conv."""
    return re.sub(r"^(conv1d\.conv|conv1d|conv\.conv)\.", "conv.", name)


def resize_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """A position table (1, ., ., d) at another grid: bicubic without antialiasing, as in the reference."""
    # sizes that an export leaves open must not be compared: it would fix them (bicubic changes no bit of a
    # table that has its size)
    known = isinstance(rows, int) and isinstance(columns, int)
    if known and table.shape[1] == rows and table.shape[2] == columns:
        return table
    maps = table.permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, size=(rows, columns), mode="bicubic", align_corners=False, antialias=False)
    return maps.permute(0, 2, 3, 1).to(table.dtype)


def _resample_patches(weight: Tensor, target: Tensor) -> Tensor:
    if weight.shape[2:] == target.shape[2:]:
        return weight
    from timm.layers import resample_patch_embed

    return resample_patch_embed(weight, list(target.shape[2:]))


def _keeps_classifier(model: nn.Module, given: Mapping[str, Tensor]) -> bool:
    """Whether the classifier of a checkpoint is meant for the model's own.

    timm drops it where its configuration names another number of classes than the model has.
    """
    if "head.weight" not in model.state_dict():
        return False
    configured = getattr(model, "pretrained_cfg", None) or {}
    classes = [configured.get("num_classes", model.num_classes)]
    classes += [len(given["head.weight"])] if "head.weight" in given else []
    return model.num_classes in classes


def _other_pooling(value: Tensor, model: nn.Module) -> bool:
    """fc_norm of this width belongs to the same model with another pooling."""
    return value.shape in ((model.num_features,), (2 * model.num_features,))


def _refusal(model: nn.Module, missing: list, unexpected: list, wrong_shape: dict) -> str:
    name = getattr(model, "default_cfg", {}).get("architecture", type(model).__name__)
    lines = [f"this checkpoint is not one of {name}; nothing was loaded."]
    lines += [f"missing: {_listed(missing)}"] if missing else []
    lines += [f"unexpected: {_listed(unexpected)}"] if unexpected else []
    if wrong_shape:
        first = "; ".join(f"{key} {shapes}" for key, shapes in list(wrong_shape.items())[:4])
        lines += [f"of another shape: {first}{f'; and {len(wrong_shape) - 4} more' * (len(wrong_shape) > 4)}"]
    lines += [
        "Create the model that it was made for (timm.list_models('vil*', pretrained=True) names them), with "
        "its num_classes, global_pool and fc_norm, or without a classifier (num_classes=0)."
    ]
    return "\n".join(lines)


def _listed(names: Iterable[str]) -> str:
    """Names with * for the number of the block, and how many each stands for."""
    counts = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
