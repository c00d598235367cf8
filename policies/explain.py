"""Where a policy looks: Grad-CAM of its loss, for each camera and modality.

The element-wise form (HiResCAM, arXiv 2011.08891): for networks that pool by the mean it is Grad-CAM (arXiv
1610.02391), whose mean gradient would vanish for those that read positions by a softmax over the map.

B frames, C channels of a feature map, h, w its size; H, W size of the picture an encoder sees.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilma.pointmap.encoders import as_feature_map, feature_layer

from .pointmap_policy import PointMapPolicy
from .policy import evaluating


@dataclass(frozen=True, eq=False)
class Attribution:
    """picture (B, C, H, W): what the encoder saw. heat (B, H, W), 0 or more, in the unit of the loss: where
    the features move it. share (B,): of the attribution of all pictures of the frame; these sum to 1."""

    camera: str
    stream: str
    picture: Tensor
    heat: Tensor
    share: Tensor


def grad_cam(
    policy: PointMapPolicy, batch: Mapping[str, Any], draws: int = 16, seed: int = 0
) -> list[Attribution]:
    """One `Attribution` a camera and modality, for a batch with observations, ``task`` and ``action``.

    The loss is the head's, averaged over ``draws`` noise levels of a fixed seed. With feature maps A and the
    gradient G of the loss, heat = |sum_c G_c A_c|, enlarged to the picture, and a map's share is that of
    sum |G A|. Of the magnitude, since of a loss near its minimum the sign says little.

    Raises ValueError for encoders without feature maps (clouds).
    """
    layers = {name: feature_layer(encoder) for name, encoder in policy.encoders.items()}
    absent = [name for name, layer in layers.items() if layer is None]
    if absent:
        raise ValueError(f"encoders without a feature map cannot be explained: {', '.join(absent)}")
    maps: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    handles = [layer.register_forward_hook(_keep(maps, name)) for name, layer in layers.items()]
    handles += [
        encoder.register_forward_pre_hook(_keep_input(seen, name))
        for name, encoder in policy.encoders.items()
    ]
    accelerators = [policy.device] if policy.device.type == "cuda" else []
    try:
        with evaluating(policy), torch.enable_grad(), torch.random.fork_rng(devices=accelerators):
            torch.manual_seed(seed)
            loss = _loss(policy, batch, draws)
            gradients = torch.autograd.grad(loss, list(maps.values()))
    finally:
        for handle in handles:
            handle.remove()
    count, steps = len(batch["task"]), policy.config.obs_horizon
    weights, heats = [], []
    for (name, output), gradient in zip(maps.items(), gradients):
        encoder, size = policy.encoders[name], tuple(seen[name].shape[-2:])
        a, g = (as_feature_map(encoder, x.detach(), size) for x in (output, gradient * count))
        weights.append((a * g).abs().flatten(1).sum(1).view(count, steps).sum(1))
        heat = (g * a).sum(1, keepdim=True).abs()
        heats.append(F.interpolate(heat, size, mode="bilinear")[:, 0].unflatten(0, (count, steps))[:, -1])
    total = torch.stack(weights).sum(0).clamp_min(1e-30)
    found = []
    for name, heat, weight in zip(maps, heats, weights):
        camera, _, stream = name.rpartition("_")
        picture = seen[name].unflatten(0, (count, steps))[:, -1]
        found.append(Attribution(camera, stream, picture, heat, weight / total))
    return found


def _loss(policy: PointMapPolicy, batch: Mapping[str, Any], draws: int) -> Tensor:
    action, mask = policy.targets(batch)
    action = policy.action_normalizer.normalize(action)
    context = policy.encode(batch)
    context, action = (x.repeat_interleave(draws, 0) for x in (context, action))
    mask = None if mask is None else mask.repeat_interleave(draws, 0)
    return policy.head.loss(lambda x, s: policy.denoiser(x, s, context), action, mask)


def _keep(maps: dict[str, Tensor], name: str):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        maps[name] = output

    return hook


def _keep_input(seen: dict[str, Tensor], name: str):
    def hook(module: nn.Module, args: tuple) -> None:
        seen[name] = args[0].detach()

    return hook
