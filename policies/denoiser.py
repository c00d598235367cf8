"""The denoiser F of PointMapPolicy (arXiv 2510.20406): a stack of blocks over a token sequence.

B batch, n observation tokens, L their width, H horizon, A action size, D model width. The sequence is

    noise_token "first":  [sigma, goal, obs_1 ... obs_n, action_1 ... action_H]   the paper
    noise_token "last":   [goal, obs_1 ... obs_n, sigma, action_1 ... action_H]
    noise_token "none":   [goal, obs_1 ... obs_n, query_1 ... query_H]            regression

With "last" the goal and the observations come before all that a denoising step changes: `Denoiser.remember`
reads them once for all steps of a chunk.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .backbones import build_backbone
from .edm import c_noise

NOISE_TOKENS = ("first", "last", "none")


class SigmaEmbedding(nn.Module):
    """Noise level (B,) -> token (B, D): ``[sin, cos]`` of ln(sigma)/4, then Linear, Mish, Linear."""

    def __init__(self, dim: int):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"the sigma embedding needs an even width of at least 4, got {dim}")
        half = dim // 2
        frequencies = torch.exp(torch.arange(half) * (-math.log(10_000.0) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, sigma: Tensor) -> Tensor:
        angle = c_noise(sigma)[:, None] * self.frequencies
        return self.down(nn.functional.mish(self.up(torch.cat([angle.sin(), angle.cos()], dim=-1))))


class Denoiser(nn.Module):
    """Raw network F(x, sigma | observations, goal) of EDM's preconditioning (``edm.py``) or of another head.

    The goal takes position 0, then come observations and actions; sigma has no position. Every Linear starts
    from N(0, 0.02) with zero bias, positions from N(0, 0.02). backbone, ffn_factor, kernel: of
    `vilma.policies.backbones.build_backbone`.
    """

    def __init__(
        self,
        *,
        latent_dim: int,
        goal_dim: int,
        action_dim: int,
        num_obs_tokens: int,
        horizon: int,
        dim: int = 512,
        num_blocks: int = 8,
        num_heads: int = 8,
        backbone: str = "xlstm",
        noise_token: str = "first",
        ffn_factor: float | None = None,
        kernel: str = "auto",
    ):
        super().__init__()
        if noise_token not in NOISE_TOKENS:
            raise ValueError(f"noise_token must be one of {', '.join(NOISE_TOKENS)}; got {noise_token!r}")
        self.horizon = horizon
        self.num_obs_tokens = num_obs_tokens
        self.noise_token = noise_token
        takes_noise = noise_token != "none"
        self.obs_proj = nn.Linear(latent_dim, dim)
        self.goal_proj = nn.Linear(goal_dim, dim)
        self.action_proj = nn.Linear(action_dim, dim) if takes_noise else None
        self.position = nn.Parameter(torch.empty(1, 1 + num_obs_tokens + horizon, dim))
        self.sigma_embed = SigmaEmbedding(dim) if takes_noise else None
        self.stack = build_backbone(
            backbone,
            dim,
            num_blocks,
            num_heads,
            tail=horizon + (noise_token == "last"),
            ffn_factor=ffn_factor,
            kernel=kernel,
        )
        self.head = nn.Linear(dim, action_dim)
        self.apply(_init_linear)
        nn.init.normal_(self.position, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters that are matrices only by their layout (timm's hook for optimisers)."""
        return {"position"}

    def context(self, obs: Tensor, goal: Tensor) -> Tensor:
        """Embedded conditioning tokens (B, 1 + n, D) from obs (B, n, L) and goal (B, 1, goal size).

        It does not depend on sigma or on the action: computed once for all noise draws and sampling steps.
        """
        if obs.shape[1] != self.num_obs_tokens:
            raise ValueError(
                f"the denoiser was built for {self.num_obs_tokens} observation tokens, got {obs.shape[1]}"
            )
        tokens = torch.cat([self.goal_proj(goal), self.obs_proj(obs)], dim=1)
        return tokens + self.position[:, : 1 + self.num_obs_tokens]

    def remember(self, context: Tensor) -> list | None:
        """What the stack keeps of ``context`` for `forward`; None where sigma comes before it."""
        return None if self.noise_token == "first" else self.stack.remember(context)

    def forward(
        self, x: Tensor | None, sigma: Tensor | None, context: Tensor, memory: list | None = None
    ) -> Tensor:
        """F (B, H, A) for x (B, H, A), already scaled by c_in, and sigma (B,), given ``context``.

        With ``memory`` of `remember` only sigma and the actions are run. A denoiser without a noise token
        takes None for x and sigma.
        """
        actions = self.position[:, 1 + self.num_obs_tokens :]
        if self.action_proj is None:
            noisy = [actions.expand(len(context), -1, -1)]
        else:
            noisy = [self.sigma_embed(sigma)[:, None], self.action_proj(x) + actions]
        if self.noise_token == "first":
            tokens = [noisy[0], context, noisy[1]]
        else:
            tokens = noisy if memory is not None else [context, *noisy]
        # Only the actions are read: the last block's feed-forward runs on them alone (12 % of the time).
        return self.head(self.stack(torch.cat(tokens, dim=1), memory, last=self.horizon))


def from_reference_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of `Denoiser` from the parameter names of the reference implementation (X-IL's
    decoder-only denoiser). Raises ValueError for a name that has no counterpart."""
    renamed = {}
    for name, value in weights.items():
        for theirs, ours in _REFERENCE_NAMES.items():
            if name == theirs or name.startswith(theirs + "."):
                renamed[ours + name[len(theirs) :]] = value
                break
        else:
            raise ValueError(
                f"no counterpart for the reference weight {name!r}; known: {', '.join(_REFERENCE_NAMES)}"
            )
    return renamed


_REFERENCE_NAMES = {
    "pos_emb": "position",
    "tok_emb": "obs_proj",
    "goal_emb": "goal_proj",
    "action_emb": "action_proj",
    "sigma_emb.sigma_emb.1": "sigma_embed.up",
    "sigma_emb.sigma_emb.3": "sigma_embed.down",
    "encoder.blocks": "stack.blocks",
    "encoder.out_norm": "stack.out_norm",
    "action_pred": "head",
}


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
