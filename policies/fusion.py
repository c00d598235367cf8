"""What a policy sees of each camera, and how the tokens of its modalities become tokens of the denoiser.

N pictures of one camera, K tokens of one picture, W their width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Modality:
    """streams: the pictures, one encoder each: "rgb", "depth", "xyz" (points) or "xyzrgb" (both in one
    picture). fusion: a name of `FUSIONS`. merges_cameras: one encoder for the points of all cameras."""

    streams: tuple[str, ...]
    fusion: str = "cat"
    merges_cameras: bool = False


# PointMapPolicy (arXiv 2510.20406, section 3.4): cat is the paper's PMP; dp3 is the baseline of 2403.03954.
MODALITIES = {
    "rgb": Modality(("rgb",)),
    "depth": Modality(("depth",)),
    "xyz": Modality(("xyz",)),
    "6ch": Modality(("xyzrgb",)),
    "add": Modality(("rgb", "xyz"), "add"),
    "cat": Modality(("rgb", "xyz")),
    "attention": Modality(("rgb", "xyz"), "attention"),
    "dp3": Modality(("xyz",), merges_cameras=True),
}


class Fusion(nn.Module):
    """Base: ``forward(camera, {stream: (N, K, W)}) -> (N, K', width)``.

    In training mode each sample loses one of its streams with probability ``dropout``: a learned token stands
    in its place, for all cameras and time steps of the sample (``draw``).
    """

    def __init__(self, streams: Sequence[str], width: int, dropout: float = 0.0):
        super().__init__()
        self.streams = tuple(streams)
        self.width = width
        self.dropout = dropout
        self.missing = nn.ParameterDict(
            {name: nn.Parameter(0.02 * torch.randn(width)) for name in streams} if dropout > 0 else {}
        )

    def draw(self, count: int, device: torch.device) -> Tensor | None:
        """(count,): the index of the stream that each sample loses, -1 for none; None when all are kept."""
        if not (self.training and self.dropout > 0):
            return None
        lost = torch.rand(count, device=device) < self.dropout
        which = torch.randint(0, len(self.streams), (count,), device=device)
        return torch.where(lost, which, -1)

    def forward(self, camera: str, tokens: Mapping[str, Tensor], lost: Tensor | None = None) -> Tensor:
        """lost (N,), of `draw`, one for each picture."""
        parts = []
        for index, name in enumerate(self.streams):
            part = tokens[name]
            if lost is not None:
                part = torch.where((lost == index)[:, None, None], self.missing[name].to(part.dtype), part)
            parts.append(part)
        return self.fuse(camera, parts)

    def fuse(self, camera: str, parts: list[Tensor]) -> Tensor:
        raise NotImplementedError


class CatFusion(Fusion):
    """All tokens, stream after stream: the paper's Cat; of a single stream its tokens."""

    def fuse(self, camera: str, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class AddFusion(Fusion):
    """The sum over the streams, token by token."""

    def fuse(self, camera: str, parts: list[Tensor]) -> Tensor:
        counts = {part.shape[1] for part in parts}
        if len(counts) > 1:
            raise ValueError(
                f"the fusion add needs equally many tokens of {', '.join(self.streams)}, got "
                f"{sorted(counts)}: give both encoders the same grid, or use cat or attention"
            )
        return torch.stack(parts).sum(0)


class AttentionFusion(Fusion):
    """One fused class token for each view: layers of cross-attention to the tokens of all streams.

    The paper names four layers and no more: pre-norm, a feed-forward of four times the width, a learned class
    token for each camera and a learned vector for each stream are choices of ours.
    """

    def __init__(
        self,
        streams: Sequence[str],
        width: int,
        dropout: float = 0.0,
        *,
        cameras: Sequence[str],
        dim: int = 512,
        layers: int = 4,
        heads: int = 8,
    ):
        super().__init__(streams, width, dropout)
        self.width = dim
        self.reduce = nn.Linear(width, dim)
        self.kind = nn.Parameter(0.02 * torch.randn(len(self.streams), dim))
        self.query = nn.ParameterDict({c: nn.Parameter(0.02 * torch.randn(dim)) for c in cameras})
        self.layers = nn.ModuleList(_CrossLayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def no_weight_decay(self) -> set[str]:
        return {"kind"}

    def fuse(self, camera: str, parts: list[Tensor]) -> Tensor:
        memory = torch.cat([self.reduce(part) + kind for part, kind in zip(parts, self.kind)], dim=1)
        x = self.query[camera].expand(len(memory), 1, -1)
        for layer in self.layers:
            x = layer(x, memory)
        return self.norm(x)


class _CrossLayer(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"fusion heads ({heads}) must divide the fusion's width ({dim})")
        self.heads = heads
        self.norm_query, self.norm_memory, self.norm_ffn = (nn.LayerNorm(dim) for _ in range(3))
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self._heads(self.q(self.norm_query(x)))
        k, v = (self._heads(y) for y in self.kv(self.norm_memory(memory)).chunk(2, -1))
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm_ffn(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


FUSIONS = {"cat": CatFusion, "add": AddFusion, "attention": AttentionFusion}
