"""Residual blocks around the recurrences, and a stack of them.

Every block has ``forward(x, state=None, return_state=False)`` for a sequence x (B, T, D) and
``step(x_t, state)`` for one step x_t (B, D); both compute the same thing. A block that takes ``last=n`` can
leave out what only earlier outputs than the last n need.

Shapes: B batch, T steps, D model width, H heads, Dk and Dv head sizes.
"""

from collections.abc import Iterable
from math import ceil, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import MultiHeadNorm
from .linear_cpu import linears
from .mlstm import MLSTMState, mlstm, mlstm_step


class xLSTMLargeBlock(nn.Module):
    """The block of xLSTM-7B (arXiv 2503.13427, section 2), pre-norm and residual::

        x = x + mLSTM(RMSNorm(x))
        x = x + W_down(silu(W_gate y) * W_up y),   y = RMSNorm(x)

    The mLSTM layer has soft-capped gates ``cap * tanh(./cap)``, a norm of each head, an output gate
    ``sigmoid(W_o .)`` and no convolution.

    Args:
        dim: D, the width.
        num_heads: H; must divide ``qk_dim_factor * dim`` and ``v_dim_factor * dim``.
        qk_dim_factor: H * Dk over D.
        v_dim_factor: H * Dv over D.
        ffn_factor: hidden width of the feed-forward over D, rounded up to a multiple of 64.
        gate_soft_cap: cap of the input and forget gate pre-activations.
        eps: of the norms and of the mLSTM's normaliser.
        num_blocks: depth of the network, for the initialisation only.
        backend: of `vilma.xlstm.mlstm`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_dim_factor: float = 0.5,
        v_dim_factor: float = 1.0,
        ffn_factor: float = 2.6667,
        gate_soft_cap: float = 15.0,
        eps: float = 1e-6,
        *,
        num_blocks: int = 1,
        backend: str = "auto",
    ):
        super().__init__()
        self.norm_mlstm = nn.RMSNorm(dim, eps=eps)
        self.mlstm_layer = _mLSTMLayer(
            dim, num_heads, qk_dim_factor, v_dim_factor, gate_soft_cap, eps, num_blocks, backend
        )
        self.norm_ffn = nn.RMSNorm(dim, eps=eps)
        self.ffn = _SwiGLU(dim, 64 * ceil(ffn_factor * dim / 64), num_blocks)

    def reset_parameters(self) -> None:
        for module in (self.norm_mlstm, self.mlstm_layer, self.norm_ffn, self.ffn):
            module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: MLSTMState | None = None,
        return_state: bool = False,
        last: int | None = None,
    ) -> Tensor | tuple[Tensor, MLSTMState]:
        """x (B, T, D) -> (B, T, D), with the state after the last step when ``return_state``.

        With ``last=n`` only the last n outputs, (B, n, D): past its mixing the block runs on them alone.
        Raises ValueError where x is empty, and unless 1 <= n <= T.
        """
        check_sequence(x)
        y, state = self.mlstm_layer(self.norm_mlstm(x), state, return_state)
        x = last_steps(x + y, last)
        x = x + self.ffn(self.norm_ffn(x))
        return (x, state) if return_state else x

    def step(self, x_t: Tensor, state: MLSTMState | None = None) -> tuple[Tensor, MLSTMState]:
        """x_t (B, D) -> (B, D) and the next state."""
        y, state = self.mlstm_layer.step(self.norm_mlstm(x_t), state)
        x_t = x_t + y
        return x_t + self.ffn(self.norm_ffn(x_t)), state


class BlockStack(nn.Module):
    """Blocks one after another and an optional norm at the end (parameters ``blocks.<j>.*``, ``out_norm.*``).

    The state is a list with one state a block.
    """

    def __init__(self, blocks: Iterable[nn.Module], norm: nn.Module | None = None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.out_norm = nn.Identity() if norm is None else norm

    def forward(
        self,
        x: Tensor,
        state: list | tuple | None = None,
        return_state: bool = False,
        last: int | None = None,
    ) -> Tensor | tuple[Tensor, list]:
        """x (B, T, D) -> (B, T, D), with the list of last states when ``return_state``.

        With ``last=n`` only the last n outputs, (B, n, D); the final block must take ``last``.
        """
        states = self._states(state)
        for j, block in enumerate(self.blocks):
            options = {} if last is None or j < len(self.blocks) - 1 else {"last": last}
            x = block(x, states[j], return_state, **options)
            if return_state:
                x, states[j] = x
        if not len(self.blocks):
            x = last_steps(x, last)
        x = self.out_norm(x)
        return (x, states) if return_state else x

    def step(self, x_t: Tensor, state: list | tuple | None = None) -> tuple[Tensor, list]:
        """x_t (B, D) -> (B, D) and the list of next states."""
        states = self._states(state)
        for j, block in enumerate(self.blocks):
            x_t, states[j] = block.step(x_t, states[j])
        return self.out_norm(x_t), states

    def _states(self, state: list | tuple | None) -> list:
        if state is None:
            return [None] * len(self.blocks)
        if len(state) != len(self.blocks):
            raise ValueError(
                f"got {len(state)} states for {len(self.blocks)} blocks; pass one a block, or None"
            )
        return list(state)


class _mLSTMLayer(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_dim_factor: float,
        v_dim_factor: float,
        gate_soft_cap: float,
        eps: float,
        num_blocks: int,
        backend: str,
    ):
        super().__init__()
        qk_dim, v_dim = int(dim * qk_dim_factor), int(dim * v_dim_factor)
        of_qk, of_v = f"{qk_dim} = {qk_dim_factor} * {dim}", f"{v_dim} = {v_dim_factor} * {dim}"
        check_heads(num_heads, f"the widths of q, k ({of_qk}) and v ({of_v})", qk_dim, v_dim)
        self.num_heads, self.gate_soft_cap, self.eps = num_heads, gate_soft_cap, eps
        self.num_blocks, self.backend = num_blocks, backend
        self.q = nn.Linear(dim, qk_dim, bias=False)
        self.k = nn.Linear(dim, qk_dim, bias=False)
        self.v = nn.Linear(dim, v_dim, bias=False)
        self.ogate_preact = nn.Linear(dim, v_dim, bias=False)
        self.igate_preact = nn.Linear(dim, num_heads)
        self.fgate_preact = nn.Linear(dim, num_heads)
        self.multihead_norm = MultiHeadNorm(num_heads, v_dim // num_heads, eps=eps)
        self.out_proj = nn.Linear(v_dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections N(0, 2/(5 D)), the one back into the residual N(0, (2/num_blocks)^2/D), gates constant.

        Input gates start almost closed (bias -10, as xLSTM-7B), forget gates open over a range of time
        constants (bias 3 to 6 over the heads), both without weights at first.
        """
        for linear in (self.q, self.k, self.v, self.ogate_preact):
            init_small(linear.weight, linear.in_features)
        init_output(self.out_proj.weight, self.num_blocks)
        for linear in (self.igate_preact, self.fgate_preact):
            nn.init.zeros_(linear.weight)
        nn.init.constant_(self.igate_preact.bias, -10.0)
        with torch.no_grad():
            self.fgate_preact.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))
        self.multihead_norm.reset_parameters()

    def forward(
        self, x: Tensor, state: MLSTMState | None, return_state: bool
    ) -> tuple[Tensor, MLSTMState | None]:
        *inputs, o = self._projected(x)
        inputs = (y.transpose(1, 2) for y in inputs)
        h = mlstm(*inputs, state, return_state=return_state, backend=self.backend, eps=self.eps)
        if return_state:
            h, state = h
        return self._output(h.transpose(1, 2), o), state

    def step(self, x: Tensor, state: MLSTMState | None) -> tuple[Tensor, MLSTMState]:
        *inputs, o = self._projected(x)
        h, state = mlstm_step(*inputs, state, backend=self.backend, eps=self.eps)
        return self._output(h, o), state

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (..., H, D) of a head, i, f (..., H) and the output gate's pre-activation (..., H D)."""
        maps = self.q, self.k, self.v, self.igate_preact, self.fgate_preact, self.ogate_preact
        q, k, v, i, f, o = linears(x, *maps)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        return q, k, v, self._cap(i), self._cap(f), o

    def _cap(self, gate: Tensor) -> Tensor:
        return self.gate_soft_cap * torch.tanh(gate / self.gate_soft_cap)

    def _output(self, h: Tensor, o: Tensor) -> Tensor:
        return linears(torch.sigmoid(o) * self.multihead_norm(h), self.out_proj)[0]


class _SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden: int, num_blocks: int):
        super().__init__()
        self.num_blocks = num_blocks
        self.proj_up_gate = nn.Linear(dim, hidden, bias=False)
        self.proj_up = nn.Linear(dim, hidden, bias=False)
        self.proj_down = nn.Linear(hidden, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_small(self.proj_up_gate.weight, self.proj_up_gate.in_features)
        init_small(self.proj_up.weight, self.proj_up.in_features)
        init_output(self.proj_down.weight, self.num_blocks)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears(x, self.proj_up_gate, self.proj_up)
        return linears(F.silu(gate) * up, self.proj_down)[0]


def init_small(weight: Tensor, dim: int) -> None:
    """N(0, 2/(5 dim)): projections out of a residual stream of width dim (arXiv 1910.05895)."""
    nn.init.normal_(weight, std=sqrt(2 / (5 * dim)))


def init_output(weight: Tensor, num_blocks: int) -> None:
    """N(0, (2/num_blocks)^2/D): a projection (D, in) back into the residual stream."""
    nn.init.normal_(weight, std=2 / (num_blocks * sqrt(weight.shape[0])))


def check_heads(num_heads: int, name: str, *widths: int) -> None:
    """ValueError with the numbers of heads that are possible unless ``num_heads`` divides all widths."""
    possible = [n for n in range(1, min(widths) + 1) if not any(width % n for width in widths)]
    if num_heads not in possible:
        named = ", ".join(map(str, possible)) or "none, they are too narrow"
        raise ValueError(f"num_heads={num_heads} must divide {name}; possible: {named}")


def check_sequence(x: Tensor) -> None:
    """ValueError unless x is (B, T, D) and not empty."""
    shape = tuple(x.shape)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"x has shape {shape}; pass (B, T, D) with every size at least 1")


def last_steps(x: Tensor, last: int | None) -> Tensor:
    """The last n of the T steps of x (B, T, ...), all for None; ValueError unless 1 <= n <= T."""
    if last is None:
        return x
    if not 1 <= last <= x.shape[1]:
        raise ValueError(f"got last={last} for {x.shape[1]} steps, wanted 1 to {x.shape[1]}")
    return x[:, -last:]
