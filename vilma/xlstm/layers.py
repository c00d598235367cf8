"""Small layers that both model families use."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiHeadNorm(nn.Module):
    """LayerNorm over each head by itself, with one learned weight a channel.

    The mLSTM's output norm (xLSTM, arXiv 2405.04517, figure 10): a group norm, one group a head, per token.

    Args:
        num_heads: H.
        head_dim: D of one head.
        bias: learn an offset too.
        eps: added to the variance.
    """

    def __init__(self, num_heads: int, head_dim: int, bias: bool = False, eps: float = 1e-6):
        super().__init__()
        self.num_heads, self.head_dim, self.eps = num_heads, head_dim, eps
        self.weight = nn.Parameter(torch.ones(num_heads * head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_dim)) if bias else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H, D) -> (..., H * D)."""
        if x.shape[-2:] != (self.num_heads, self.head_dim):
            raise ValueError(
                f"got shape {tuple(x.shape)}; pass (..., H, D) = (..., {self.num_heads}, {self.head_dim})"
            )
        x = F.layer_norm(x, (self.head_dim,), eps=self.eps).flatten(-2)
        return x * self.weight if self.bias is None else torch.addcmul(self.bias, x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, bias={self.bias is not None}, eps={self.eps}"
