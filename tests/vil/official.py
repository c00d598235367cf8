"""Checkpoints under the names of the official files, made from our models: what the converter must undo."""

import re
from typing import Any

import timm
import torch
from torch import Tensor, nn

_DIRECTIONS = {"rowwise_from_top_left": 0, "rowwise_from_bot_right": 1}


def training_names(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model under the names of the training code, those of the published files."""
    return {_training_name(name, model.paired): value for name, value in model.state_dict().items()}


def _training_name(name: str, paired: bool) -> str:
    pattern = r"blocks\.(\d+)\.(rowwise_from_\w+)\.(.+)" if paired else r"blocks\.(\d+)()\.(.+)"
    if match := re.fullmatch(pattern, name):
        j = 2 * int(match[1]) + _DIRECTIONS[match[2]] if paired else int(match[1])
        rest = re.sub(r"^norm\.", "xlstm_norm.", re.sub(r"^layer\.", "xlstm.", match[3]))
        rest = rest.replace(".conv.", ".conv1d." if paired else ".conv1d.conv.")
        return f"xlstm.blocks.{j}.{rest}"
    for ours, theirs in (("norm.", "xlstm.post_blocks_norm."), ("fc_norm.", "head.0."), ("head.", "head.1.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return "pos_embed.embed" if name == "pos_embed" else name


def hub_names(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model under the names of the torch.hub classes."""
    norms = {"norm.": "norm.", "fc_norm.": "legacy_norm."}
    if not model.paired:
        norms = {"norm.": "legacy_norm.", "fc_norm.": "norm."}
    renamed = {}
    for name, value in model.state_dict().items():
        head, _, rest = name.partition(".")
        if f"{head}." in norms:
            name = norms[f"{head}."] + rest
        elif name == "pos_embed":
            name = "pos_embed.embed"
        elif not model.paired:
            name = name.replace(".layer.conv.", ".layer.conv1d.conv.")
        renamed[name] = value
    return renamed


def published_checkpoint(url: str) -> dict[str, Any]:
    """A file as it would be found at one of the published addresses, with random values."""
    for name in timm.list_pretrained("vil*"):
        if timm.models.get_pretrained_cfg(name).url == url:
            model = timm.create_model(name)
            names = training_names(model)
            return {"state_dict": names, "ctor_kwargs": {}, "ckpt": "", "abs_ckpt": "", "stage_id": "0"}
    raise ValueError(f"{url} is not the address of a registered model")


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every parameter, so that none can hide behind its initial one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model
