"""The layers of Vision-LSTM (arXiv 2406.04303, section 3): pre-norm mLSTM layers over a map of tokens.

Shapes: B batch, (Y, X) grid of tokens, d width, E inner width.
"""

import math

import torch
from timm.layers import DropPath
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from vilma.xlstm.layers import BlockDiagonalLinear, LayerNorm

from .mixing import MixWeights, mix

__all__ = ["ViLBlock", "ViLBlockPair", "ViLLayer"]


class HeadwiseProjection(BlockDiagonalLinear):
    """Holds the parameters of one of q, k, v; `mix` applies them."""

    forward = torch.jit.unused(BlockDiagonalLinear.forward)


class GateProjection(nn.Module):
    """Holds the parameters of one gate, for H heads; `mix` applies them."""

    def __init__(self, inner: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, inner, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))


class MLSTMCell(nn.Module):
    """Gates of the mLSTM and the norm behind it; `mix` applies them.

    igate and fgate see q, k and v side by side; outnorm is one of E channels, applied to each head by itself.
    """

    def __init__(self, inner: int, num_heads: int, norm_bias: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.igate = GateProjection(3 * inner, num_heads, **dd)
        self.fgate = GateProjection(3 * inner, num_heads, **dd)
        self.outnorm = LayerNorm(inner, bias=norm_bias, residual_weight=True).to(**dd)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, len(self.fgate.bias)))
        self.outnorm.reset_parameters()


class ViLLayer(nn.Module):
    """The mLSTM layer (B, Y, X, d) -> (B, Y, X, d) in one direction of traversal.

    Only proj_up and proj_down are called. What lies between them is one operator, for which conv, q_proj,
    k_proj, v_proj and mlstm_cell hold the parameters: hooks on them and wrappers of them take no effect.
    """

    def __init__(
        self,
        dim: int,
        reverse: bool,
        num_heads: int,
        expansion: int,
        block_width: int,
        conv_kind: str,
        conv_kernel_size: int,
        proj_bias: bool,
        norm_bias: bool,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = expansion * dim
        self.reverse, self.head_norm_eps = reverse, 1e-5
        self.proj_up = nn.Linear(dim, 2 * inner, bias=proj_bias, **dd)
        conv, k = (nn.Conv2d if conv_kind == "2d" else nn.Conv1d), conv_kernel_size
        self.conv = conv(inner, inner, k, groups=inner, **dd)
        self.q_proj = HeadwiseProjection(inner, block_width, bias=proj_bias).to(**dd)
        self.k_proj = HeadwiseProjection(inner, block_width, bias=proj_bias).to(**dd)
        self.v_proj = HeadwiseProjection(inner, block_width, bias=proj_bias).to(**dd)
        self.mlstm_cell = MLSTMCell(inner, num_heads, norm_bias, **dd)
        self.learnable_skip = nn.Parameter(torch.empty(inner, **dd))
        self.proj_down = nn.Linear(inner, dim, bias=proj_bias, **dd)

    def reset_parameters(self, num_blocks: int = 1) -> None:
        """num_blocks: sub-blocks that add to the residual stream; the official models were trained with 1."""
        dim = self.proj_up.in_features
        nn.init.normal_(self.proj_up.weight, std=math.sqrt(2 / (5 * dim)))
        nn.init.normal_(self.proj_down.weight, std=2 / num_blocks / math.sqrt(dim))
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=math.sqrt(2 / (5 * dim)))
        for module in (self.proj_up, self.proj_down, self.q_proj, self.k_proj, self.v_proj):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        self.conv.reset_parameters()
        self.mlstm_cell.reset_parameters()
        nn.init.ones_(self.learnable_skip)

    def forward(self, x: Tensor) -> Tensor:
        u = self.proj_up(x)
        cell = self.mlstm_cell
        weights = (
            self.conv.weight,
            self.conv.bias,
            self.q_proj.weight,
            self.q_proj.bias,
            self.k_proj.weight,
            self.k_proj.bias,
            self.v_proj.weight,
            self.v_proj.bias,
            cell.igate.weight,
            cell.igate.bias,
            cell.fgate.weight,
            cell.fgate.bias,
            cell.outnorm.weight,
            cell.outnorm.bias,
            self.learnable_skip,
        )
        if torch.jit.is_scripting():
            y = torch.ops.vilma.vil_mix(u, *weights, self.reverse, self.head_norm_eps, False)[0]
        else:
            y = mix(u, MixWeights(*weights), self.reverse, self.head_norm_eps)
        return self.proj_down(y)


@register_notrace_module
class ViLBlock(nn.Module):
    """x + DropPath(layer(norm(x))) for maps (B, Y, X, d)."""

    def __init__(self, dim: int, drop_path: float, norm_bias: bool, device=None, dtype=None, **layer):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, bias=norm_bias, residual_weight=True).to(**dd)
        self.layer = ViLLayer(dim, norm_bias=norm_bias, **layer, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.layer(self.norm(x)))


class ViLBlockPair(nn.Module):
    """A sub-block from the top left and one from the bottom right, the block of generation 2."""

    def __init__(self, **block):
        super().__init__()
        self.rowwise_from_top_left = ViLBlock(reverse=False, **block)
        self.rowwise_from_bot_right = ViLBlock(reverse=True, **block)

    def forward(self, x: Tensor) -> Tensor:
        return self.rowwise_from_bot_right(self.rowwise_from_top_left(x))
