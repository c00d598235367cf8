"""The causal xLSTM denoiser F of PointMapPolicy (arXiv 2510.20406): xLSTM-7B blocks over a token sequence.

B batch, n observation tokens, L their width, H horizon, A action size, D model width. The sequence is
``[sigma, goal, obs_1 ... obs_n, action_1 ... action_H]``; the stack is causal, so an action sees the
observations and the actions before it.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vilma.xlstm import BlockStack, xLSTMLargeBlock

from .edm import c_noise


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


class XLSTMDenoiser(nn.Module):
    """Raw network F(x, sigma | observations, goal) of the EDM preconditioning in ``edm.py``.

    The goal takes position 0, then come observations and actions; sigma has no position. Every Linear starts
    from N(0, 0.02) with zero bias, positions from N(0, 0.02).
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
    ):
        super().__init__()
        self.horizon = horizon
        self.num_obs_tokens = num_obs_tokens
        self.obs_proj = nn.Linear(latent_dim, dim)
        self.goal_proj = nn.Linear(goal_dim, dim)
        self.action_proj = nn.Linear(action_dim, dim)
        self.position = nn.Parameter(torch.empty(1, 1 + num_obs_tokens + horizon, dim))
        self.sigma_embed = SigmaEmbedding(dim)
        self.stack = BlockStack(
            [xLSTMLargeBlock(dim, num_heads) for _ in range(num_blocks)], norm=nn.RMSNorm(dim, eps=1e-6)
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

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """F (B, H, A) for x (B, H, A), already scaled by c_in, and sigma (B,), given ``context``."""
        actions = self.action_proj(x) + self.position[:, 1 + self.num_obs_tokens :]
        tokens = torch.cat([self.sigma_embed(sigma)[:, None], context, actions], dim=1)
        # Only the actions are read: the last block's feed-forward runs on them alone (12 % of the time).
        return self.head(self.stack(tokens, last=self.horizon))


def from_reference_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of ``XLSTMDenoiser`` from the parameter names of the reference implementation (X-IL's
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
