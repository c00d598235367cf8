"""Small layers that both model families use."""

from math import gcd, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FUSED_WIDTH = 16  # width of the products that narrow blocks are gathered into


class BlockDiagonalLinear(nn.Module):
    """A linear map of each group of ``block_width`` neighbouring channels to itself.

    The head-wise projection to q, k and v of the v1 mLSTM block (xLSTM, arXiv 2405.04517, figure 11)::

        y[w g + o] = sum_i weight[g, o, i] x[w g + i] + bias[w g + o]

    Products this narrow waste most of a matrix unit. Neighbouring blocks are therefore laid on the diagonal
    of wider ones, whose zeros cost less than the narrowness did.

    Args:
        features: channels, a multiple of block_width.
        block_width: w; the weight is (features / w, w, w), ordered (block, out, in).
        bias: learn an offset too.
    """

    def __init__(self, features: int, block_width: int, bias: bool = True):
        super().__init__()
        if block_width < 1 or features % block_width:
            raise ValueError(
                f"features={features} is no multiple of block_width={block_width}; pass one that divides it"
            )
        self.features, self.block_width = features, block_width
        self.num_blocks = features // block_width
        self.weight = nn.Parameter(torch.empty(self.num_blocks, block_width, block_width))
        self.bias = nn.Parameter(torch.empty(features)) if bias else None
        self._fused = gcd(self.num_blocks, max(1, _FUSED_WIDTH // block_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Linear` with block_width inputs."""
        bound = 1 / sqrt(self.block_width)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features) -> (..., features)."""
        if x.shape[-1] != self.features:
            raise ValueError(f"got shape {tuple(x.shape)}; pass (..., features) = (..., {self.features})")
        weight = self._wide_weight()
        blocks = x.reshape(-1, weight.shape[0], weight.shape[1]).transpose(0, 1)
        y = torch.bmm(blocks, weight.mT).transpose(0, 1).reshape(x.shape)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _wide_weight(self) -> Tensor:
        """The weight as fewer, wider blocks (features / W, W, W)."""
        if self._fused == 1:
            return self.weight
        weight = self.weight.unflatten(0, (-1, self._fused)).permute(0, 2, 3, 1)
        return torch.diag_embed(weight).permute(0, 3, 1, 4, 2).flatten(3, 4).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.features}, block_width={self.block_width}, bias={self.bias is not None}"


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
