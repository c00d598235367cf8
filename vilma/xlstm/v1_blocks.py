"""The residual blocks of the first xLSTM paper (arXiv 2405.04517, figures 9 and 10) and stacks of them.

Both blocks have ``forward(x, state=None, return_state=False)`` for a sequence x (B, T, D) and
``step(x_t, state)`` for one step x_t (B, D), as those of `vilma.xlstm.blocks`; the states are `BlockState`.

Shapes: B batch, T steps, D model width, E inner width of the mLSTM, H heads, K kernel size.
"""

import re
from collections.abc import Collection
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from .blocks import BlockStack, check_heads, check_sequence, init_output, init_small, last_steps
from .layers import BlockDiagonalLinear, CausalConv1d, LayerNorm, MultiHeadNorm
from .mlstm import mlstm, mlstm_step
from .rnn import rnn, rnn_step

_ROUND_UP = 64  # inner widths are multiples of it
_NORM_EPS = 1e-5


class BlockState(NamedTuple):
    """What a v1 block remembers.

    conv: the last K - 1 inputs of the convolution, (B, K - 1, E or D) in `mLSTMBlock` or `sLSTMBlock`.
    cell: `MLSTMState`, or the four states h, c, n, m (B, H, D / H) of the sLSTM.
    """

    conv: Tensor
    cell: tuple[Tensor, ...]


# exported programs that take or return a state can then be saved and loaded
_register_namedtuple(BlockState, serialized_type_name="vilma.xlstm.BlockState")
torch.serialization.add_safe_globals([BlockState])


class mLSTMBlock(nn.Module):
    """The pre-up-projection block around the mLSTM (figure 10)::

        u, z = W_up LN(x);   a = silu(conv(u))
        q, k = W_q a, W_k a;   v = W_v u;   i, f = W_i [q, k, v], W_f [q, k, v]
        x + W_down ((norm(mLSTM(q, k, v, i, f)) + skip * a) * silu(z))

    W_q, W_k and W_v are block-diagonal, the norm is that of each head. Both norms learn ``1 + weight``.

    Args:
        dim: D, the width.
        num_heads: H; must divide E.
        proj_factor: E over D, rounded up to a multiple of 64.
        conv_kernel_size: K.
        qkv_block_width: width of the blocks of W_q, W_k, W_v; must divide E.
        dropout: of the branch's output.
        num_blocks: depth of the network, for the initialisation only.
        backend: of `vilma.xlstm.mlstm`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        proj_factor: float = 2.0,
        conv_kernel_size: int = 4,
        qkv_block_width: int = 4,
        dropout: float = 0.0,
        *,
        num_blocks: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        inner = _inner_width(dim, proj_factor)
        source = f"proj_factor * dim = {proj_factor} * {dim}, rounded up to a multiple of {_ROUND_UP}"
        check_heads(num_heads, f"the inner width {inner} ({source})", inner)
        self.dim, self.num_heads = dim, num_heads
        self.num_blocks, self.backend = num_blocks, backend
        self.norm = LayerNorm(dim, eps=_NORM_EPS)
        self.proj_up = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = CausalConv1d(inner, conv_kernel_size)
        self.q = BlockDiagonalLinear(inner, qkv_block_width, bias=False)
        self.k = BlockDiagonalLinear(inner, qkv_block_width, bias=False)
        self.v = BlockDiagonalLinear(inner, qkv_block_width, bias=False)
        self.igate = nn.Linear(3 * inner, num_heads)
        self.fgate = nn.Linear(3 * inner, num_heads)
        self.outnorm = MultiHeadNorm(num_heads, inner // num_heads, eps=_NORM_EPS, residual_weight=True)
        self.skip = nn.Parameter(torch.empty(inner))
        self.proj_down = nn.Linear(inner, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections N(0, 2/(5 D)), the one back into the residual N(0, (2/num_blocks)^2/D), gates constant.

        Forget gates start open over a range of time constants (bias 3 to 6 over the heads), input gates near
        zero (bias N(0, 0.1^2)), both without weights at first; the skip is one.
        """
        for module in (self.norm, self.conv, self.outnorm):
            module.reset_parameters()
        for projection in (self.proj_up, self.q, self.k, self.v):
            init_small(projection.weight, self.dim)
        for gate in (self.igate, self.fgate):
            nn.init.zeros_(gate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        with torch.no_grad():
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))
        nn.init.ones_(self.skip)
        init_output(self.proj_down.weight, self.num_blocks)

    def forward(
        self,
        x: Tensor,
        state: BlockState | None = None,
        return_state: bool = False,
        last: int | None = None,
    ) -> Tensor | tuple[Tensor, BlockState]:
        """x (B, T, D) -> (B, T, D), with the state after the last step when ``return_state``.

        With ``last=n`` only the last n outputs, (B, n, D): past its mixing the block runs on them alone.
        Raises ValueError where x is empty, and unless 1 <= n <= T.
        """
        check_sequence(x)
        conv, cell = state or (None, None)
        u, z = self.proj_up(self.norm(x)).chunk(2, -1)
        a = self.conv(u, conv, return_state)
        if return_state:
            a, conv = a
        a = F.silu(a)
        inputs = (y.transpose(1, 2) for y in self._mix(a, u))
        h = mlstm(*inputs, cell, return_state=return_state, backend=self.backend)
        if return_state:
            h, cell = h
        x, h, a, z = (last_steps(y, last) for y in (x, h.transpose(1, 2), a, z))
        x = x + self._output(h, a, z)
        return (x, BlockState(conv, cell)) if return_state else x

    def step(self, x_t: Tensor, state: BlockState | None = None) -> tuple[Tensor, BlockState]:
        """x_t (B, D) -> (B, D) and the next state; the given one is not changed."""
        conv, cell = state or (None, None)
        u, z = self.proj_up(self.norm(x_t)).chunk(2, -1)
        a, conv = self.conv.step(u, conv)
        a = F.silu(a)
        h, cell = mlstm_step(*self._mix(a, u), cell, backend=self.backend)
        return x_t + self._output(h, a, z), BlockState(conv, cell)

    def _mix(self, a: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (..., H, E / H) and i, f (..., H)."""
        qkv = self.q(a), self.k(a), self.v(u)
        joint = torch.cat(qkv, -1)
        return *(y.unflatten(-1, (self.num_heads, -1)) for y in qkv), self.igate(joint), self.fgate(joint)

    def _output(self, h: Tensor, a: Tensor, z: Tensor) -> Tensor:
        return self.dropout(self.proj_down(torch.addcmul(self.outnorm(h), self.skip, a) * F.silu(z)))


class sLSTMBlock(nn.Module):
    """The post-up-projection block around the sLSTM (figure 9)::

        y = LN(x);   a = silu(conv(y))
        x = x + norm(sLSTM(W_i a, W_f a, W_z y, W_o y))
        x = x + W_down (gelu(u) * v),   u, v = W_up LN(x)

    W_i to W_o and the recurrent weights are block-diagonal, one block a head; the norm is that of each head.
    All norms learn ``1 + weight``.

    Args:
        dim: D, the width.
        num_heads: H; must divide D.
        ffn_factor: hidden width of the feed-forward over D, rounded up to a multiple of 64.
        conv_kernel_size: K.
        dropout: of the outputs of both branches.
        block_index, num_blocks: place in the network and its depth, for the initialisation only.
        backend: of `vilma.xlstm.rnn`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        ffn_factor: float = 1.3,
        conv_kernel_size: int = 4,
        dropout: float = 0.0,
        *,
        block_index: int = 0,
        num_blocks: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(num_heads, f"dim={dim}", dim)
        head_dim = dim // num_heads
        self.dim, self.num_heads = dim, num_heads
        self.block_index, self.num_blocks, self.backend = block_index, num_blocks, backend
        self.norm = LayerNorm(dim, eps=_NORM_EPS)
        self.conv = CausalConv1d(dim, conv_kernel_size)
        self.igate = BlockDiagonalLinear(dim, head_dim, bias=False)
        self.fgate = BlockDiagonalLinear(dim, head_dim, bias=False)
        self.zgate = BlockDiagonalLinear(dim, head_dim, bias=False)
        self.ogate = BlockDiagonalLinear(dim, head_dim, bias=False)
        self.recurrent = nn.Parameter(torch.empty(num_heads, head_dim, 4, head_dim))
        self.bias = nn.Parameter(torch.empty(4, num_heads, head_dim))
        self.outnorm = MultiHeadNorm(num_heads, head_dim, eps=_NORM_EPS, residual_weight=True)
        self.norm_ffn = LayerNorm(dim, eps=_NORM_EPS)
        self.ffn = _GeGLU(dim, _inner_width(dim, ffn_factor), num_blocks)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections N(0, 2/(5 D)), no recurrence at first, forget gates over a range of time constants.

        Channel j of the n of a head has the forget bias ``5 - 12 (j / (n - 1))^p``, p from 0.3 in the first
        block to 1.6 in the last: what the published code computes. All other biases are zero.
        """
        for module in (self.norm, self.conv, self.outnorm, self.norm_ffn, self.ffn):
            module.reset_parameters()
        for gate in (self.igate, self.fgate, self.zgate, self.ogate):
            init_small(gate.weight, self.dim)
        nn.init.zeros_(self.recurrent)
        nn.init.zeros_(self.bias)
        power = 0.3 + 1.3 * self.block_index / max(1, self.num_blocks - 1)
        with torch.no_grad():
            self.bias[1] = 5 - 12 * torch.linspace(0.0, 1.0, self.bias.shape[-1]) ** power

    def forward(
        self,
        x: Tensor,
        state: BlockState | None = None,
        return_state: bool = False,
        last: int | None = None,
    ) -> Tensor | tuple[Tensor, BlockState]:
        """As `mLSTMBlock.forward`."""
        check_sequence(x)
        conv, cell = state or (None, None)
        y = self.norm(x)
        a = self.conv(y, conv, return_state)
        if return_state:
            a, conv = a
        wx = self._gates(F.silu(a), y)
        h = rnn(wx, self.recurrent, self.bias, cell, return_state=return_state, backend=self.backend)
        if return_state:
            h, cell = h
        x = self._output(*(last_steps(y, last) for y in (x, h)))
        return (x, BlockState(conv, cell)) if return_state else x

    def step(self, x_t: Tensor, state: BlockState | None = None) -> tuple[Tensor, BlockState]:
        """x_t (B, D) -> (B, D) and the next state; the given one is not changed."""
        conv, cell = state or (None, None)
        y = self.norm(x_t)
        a, conv = self.conv.step(y, conv)
        wx_t = self._gates(F.silu(a), y)
        h, cell = rnn_step(wx_t, self.recurrent, self.bias, cell, backend=self.backend)
        return self._output(x_t, h), BlockState(conv, cell)

    def _gates(self, a: Tensor, y: Tensor) -> Tensor:
        """wx (..., 4, H, D / H), in the order i, f, z, o."""
        gates = self.igate(a), self.fgate(a), self.zgate(y), self.ogate(y)
        return torch.stack(gates, -2).unflatten(-1, (self.num_heads, -1))

    def _output(self, x: Tensor, h: Tensor) -> Tensor:
        x = x + self.dropout(self.outnorm(h))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


def xlstm_stack(
    dim: int,
    num_blocks: int,
    pattern: str = "1:0",
    *,
    slstm_at: Collection[int] | None = None,
    num_heads: int = 4,
    proj_factor: float = 2.0,
    ffn_factor: float = 1.3,
    conv_kernel_size: int = 4,
    qkv_block_width: int = 4,
    dropout: float = 0.0,
    backend: str = "auto",
) -> BlockStack:
    """A stack of `mLSTMBlock` and `sLSTMBlock` with a final `LayerNorm`: xLSTM[a:b] of arXiv 2405.04517.

    Args:
        dim: D, the width.
        num_blocks: depth.
        pattern: ``"a:b"``, a mLSTM blocks for b sLSTM ones, such as ``7:1``, ``1:0`` and ``0:1``; see
            `slstm_positions` for where they go.
        slstm_at: positions of the sLSTM blocks, from 0, instead of the pattern.
        num_heads, conv_kernel_size, dropout, backend: of all blocks.
        proj_factor, qkv_block_width: of the mLSTM blocks.
        ffn_factor: of the sLSTM blocks.
    """
    positions = set(slstm_positions(num_blocks, pattern) if slstm_at is None else slstm_at)
    if not positions <= set(range(num_blocks)):
        raise ValueError(f"got slstm_at={sorted(positions)}; pass positions from 0 to {num_blocks - 1}")
    shared = {
        "num_heads": num_heads,
        "conv_kernel_size": conv_kernel_size,
        "dropout": dropout,
        "num_blocks": num_blocks,
        "backend": backend,
    }
    blocks = [
        sLSTMBlock(dim, ffn_factor=ffn_factor, block_index=j, **shared)
        if j in positions
        else mLSTMBlock(dim, proj_factor=proj_factor, qkv_block_width=qkv_block_width, **shared)
        for j in range(num_blocks)
    ]
    return BlockStack(blocks, LayerNorm(dim, eps=_NORM_EPS))


def slstm_positions(num_blocks: int, pattern: str) -> tuple[int, ...]:
    """Where the sLSTM blocks of a pattern ``a:b`` lie: ``ceil(num_blocks * b / (a + b))`` of them, early.

    They take the places 1, 3, 5, ..., as in LRAM (arXiv 2410.22391: 7:1 of 8 blocks has one at 1, of 12 at 1
    and 3, of 20 at 1, 3 and 5), and the even places only once the odd ones are full.
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    a, b = map(int, match.groups()) if match else (0, 0)
    if a + b == 0:
        raise ValueError(f'pattern={pattern!r}; pass "a:b" such as "7:1", "1:0" or "0:1"')
    places = [*range(1, num_blocks, 2), *range(0, num_blocks, 2)]
    return tuple(sorted(places[: -(-num_blocks * b // (a + b))]))


class _GeGLU(nn.Module):
    def __init__(self, dim: int, hidden: int, num_blocks: int):
        super().__init__()
        self.num_blocks = num_blocks
        self.proj_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.proj_down = nn.Linear(hidden, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_small(self.proj_up.weight, self.proj_up.in_features)
        init_output(self.proj_down.weight, self.num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj_up(x).chunk(2, -1)
        return self.proj_down(F.gelu(gate) * up)


def _inner_width(dim: int, factor: float) -> int:
    return _ROUND_UP * ceil(factor * dim / _ROUND_UP)
