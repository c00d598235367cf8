"""Small layers that both model families use."""

from math import gcd, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FUSED_WIDTH = 16  # width of the products that narrow blocks are gathered into
_FEW_ROWS = 16  # up to this many, gathering the blocks costs more than their narrowness


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
        # a compiled program takes any number of rows: it may not ask for it
        few = not torch.compiler.is_compiling() and x.numel() <= _FEW_ROWS * self.features
        weight = self.weight if few else self._wide_weight()
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
        residual_weight: learn the weight's distance from one: ``norm(x) * (1 + weight)``, weight 0 at first.
            The form of the v1 blocks and ViL, where weight decay pulls towards one.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        bias: bool = False,
        eps: float = 1e-6,
        residual_weight: bool = False,
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.eps = num_heads, head_dim, eps
        self.residual_weight = residual_weight
        self.weight = nn.Parameter(torch.empty(num_heads * head_dim))
        self.bias = nn.Parameter(torch.empty(num_heads * head_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.residual_weight else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H, D) -> (..., H * D)."""
        if x.shape[-2:] != (self.num_heads, self.head_dim):
            raise ValueError(
                f"got shape {tuple(x.shape)}; pass (..., H, D) = (..., {self.num_heads}, {self.head_dim})"
            )
        x = F.layer_norm(x, (self.head_dim,), eps=self.eps).flatten(-2)
        weight = 1.0 + self.weight if self.residual_weight else self.weight
        return x * weight if self.bias is None else torch.addcmul(self.bias, x, weight)

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, {self.head_dim}, bias={self.bias is not None}, eps={self.eps}, "
            f"residual_weight={self.residual_weight}"
        )


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with ``residual_weight``, as in `MultiHeadNorm`.

    Args:
        dim: D, the last axis.
        bias: learn an offset too.
        eps: added to the variance.
        residual_weight: the weight is ``1 + weight``, weight 0 at first.
    """

    def __init__(self, dim: int, bias: bool = False, eps: float = 1e-5, residual_weight: bool = True):
        super().__init__()
        self.dim, self.eps, self.residual_weight = dim, eps, residual_weight
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.residual_weight else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        weight = 1.0 + self.weight if self.residual_weight else self.weight
        return F.layer_norm(x, (self.dim,), weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, bias={self.bias is not None}, eps={self.eps}, "
            f"residual_weight={self.residual_weight}"
        )


class CausalConv1d(nn.Module):
    """Depthwise convolution over time that sees only the past (xLSTM, arXiv 2405.04517, figures 9 and 10)::

        y_t = bias + sum_j weight[:, 0, kernel_size - 1 - j] x_{t-j},   j = 0 .. kernel_size - 1

    Args:
        features: D, channels.
        kernel_size: K, steps that one output sees.
        bias: learn an offset too.

    The weight is that of ``nn.Conv1d(D, D, K, groups=D)``: (D, 1, K). The state holds the last K - 1 inputs
    in the order they were run, (B, K - 1, D); None is zeros.
    """

    def __init__(self, features: int, kernel_size: int = 4, bias: bool = True):
        super().__init__()
        if features < 1 or kernel_size < 1:
            raise ValueError(f"got features={features}, kernel_size={kernel_size}; pass positive numbers")
        self.features, self.kernel_size = features, kernel_size
        self.weight = nn.Parameter(torch.empty(features, 1, kernel_size))
        self.bias = nn.Parameter(torch.empty(features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `torch.nn.Conv1d`."""
        bound = 1 / sqrt(self.kernel_size)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, state: Tensor | None = None, return_state: bool = False, reverse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, T, D) -> (B, T, D), with the last K - 1 inputs that were run when ``return_state``.

        With ``reverse`` the sequence is run from its end: y_t sees x_t, ..., x_{t+K-1}.
        """
        if x.dim() != 3 or x.shape[-1] != self.features:
            raise ValueError(f"got shape {tuple(x.shape)}; pass (B, T, D) = (B, T, {self.features})")
        past = self.kernel_size - 1
        if state is None:
            padded = F.pad(x, (0, 0, 0, past) if reverse else (0, 0, past, 0))
        else:
            state = self._check_state(state, x)
            padded = torch.cat([x, state.flip(1)] if reverse else [state, x], 1)
        weight = self.weight.flip(-1) if reverse else self.weight
        # (B, D, 1, T') in channels-last memory, which is where x already lies: no transposed copy
        y = F.conv2d(padded.mT.unsqueeze(2), weight.unsqueeze(2), self.bias, groups=self.features)
        y = y.squeeze(2).mT
        if not return_state:
            return y
        last = padded[:, :past].flip(1) if reverse else padded[:, x.shape[1] :].clone()
        return y, last

    def step(self, x_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x_t (B, D) -> (B, D) and the next state; the given one is not changed."""
        if x_t.dim() != 2 or x_t.shape[-1] != self.features:
            raise ValueError(f"got shape {tuple(x_t.shape)}; pass (B, D) = (B, {self.features})")
        if state is None:
            state = x_t.new_zeros(x_t.shape[0], self.kernel_size - 1, self.features)
        window = torch.cat([self._check_state(state, x_t), x_t.unsqueeze(1)], 1)
        y = (window * self.weight.squeeze(1).mT).sum(1)
        y = y if self.bias is None else y + self.bias
        return y.to(x_t.dtype), window[:, 1:]

    def _check_state(self, state: Tensor, x: Tensor) -> Tensor:
        wanted = (x.shape[0], self.kernel_size - 1, self.features)
        if not isinstance(state, Tensor) or state.shape != wanted:
            got = f"has shape {tuple(state.shape)}" if isinstance(state, Tensor) else f"is {state!r:.40}"
            raise ValueError(f"state {got}; pass (B, K - 1, D) = {wanted}, or None")
        return state.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.features}, kernel_size={self.kernel_size}, bias={self.bias is not None}"
