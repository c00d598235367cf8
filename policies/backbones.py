"""The sequence models of the denoiser behind one interface.

B batch, T tokens, D width, H heads, P tokens of the memory. Every stack has

    forward(x (B, T, D), state=None, last=n) -> (B, n, D)   the outputs of the last n tokens
    remember(x (B, P, D)) -> state                          what the tokens after x need to know of x

so that the tokens x can be read once and ``forward(y, remember(x), last=n)`` be run for many y; it equals
``forward(cat([x, y]), last=n)``.
"""

from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vilma.xlstm import BlockStack, xLSTMLargeBlock
from vilma.xlstm.linear_cpu import linears


class CausalStack(BlockStack):
    """Blocks one after another; a token sees those before it."""

    def remember(self, x: Tensor) -> list:
        return self(x, return_state=True, last=1)[1]


class AlternatingStack(BlockStack):
    """Every second block reads the last ``tail`` tokens from their end: these see each other in both
    directions. The tokens before them are read in their order by all blocks and do not see the tail."""

    def __init__(self, blocks, norm: nn.Module | None = None, *, tail: int):
        super().__init__(blocks, norm)
        self.tail = tail

    def remember(self, x: Tensor) -> list:
        return super().forward(x, return_state=True, last=1)[1]

    def forward(
        self, x: Tensor, state: list | None = None, return_state: bool = False, last: int | None = None
    ) -> Tensor:
        if return_state:
            raise ValueError("a stack that also reads backwards has no state after its last token")
        states = self._states(state)
        head = x.shape[1] - self.tail
        for j, block in enumerate(self.blocks):
            backwards = j % 2 == 1
            x = self._turned(x, head) if backwards else x
            x = block(x, states[j])
            x = self._turned(x, head) if backwards else x
        x = self.out_norm(x)
        return x if last is None else x[:, -last:]

    def _turned(self, x: Tensor, head: int) -> Tensor:
        return torch.cat([x[:, :head], x[:, head:].flip(1)], dim=1)


class TransformerBlock(nn.Module):
    """Pre-norm causal attention and a SwiGLU feed-forward, without biases::

        x = x + W_o attention(RMSNorm(x));   x = x + W_down(silu(W_gate y) * W_up y),   y = RMSNorm(x)

    The state is the keys and values so far, (B, H, P, D / H) each. Positions are the caller's.
    """

    def __init__(self, dim: int, num_heads: int, ffn_factor: float = 4.0, eps: float = 1e-6):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.num_heads = num_heads
        hidden = 64 * ceil(ffn_factor * dim / 64)
        self.norm_attention = nn.RMSNorm(dim, eps=eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.norm_ffn = nn.RMSNorm(dim, eps=eps)
        self.proj_up_gate = nn.Linear(dim, hidden, bias=False)
        self.proj_up = nn.Linear(dim, hidden, bias=False)
        self.proj_down = nn.Linear(hidden, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        return_state: bool = False,
        last: int | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `vilma.xlstm.xLSTMLargeBlock.forward`."""
        (qkv,) = linears(self.norm_attention(x), self.qkv)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (y.transpose(1, 2) for y in qkv.unbind(2))
        if state is not None:
            k, v = (torch.cat([past.to(now.dtype), now], dim=2) for past, now in zip(state, (k, v)))
        past = k.shape[2] - q.shape[2]
        if past:
            sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=sees)
        else:
            h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x, h = (y if last is None else y[:, -last:] for y in (x, h.transpose(1, 2).flatten(2)))
        x = x + linears(h, self.out_proj)[0]
        gate, up = linears(self.norm_ffn(x), self.proj_up_gate, self.proj_up)
        x = x + linears(F.silu(gate) * up, self.proj_down)[0]
        return (x, (k, v)) if return_state else x

    def step(
        self, x_t: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x_t (B, D) -> (B, D) and the state with it."""
        x, state = self(x_t[:, None], state, return_state=True)
        return x[:, 0], state


BACKBONES = ("xlstm", "bixlstm", "transformer")


def build_backbone(
    name: str,
    dim: int,
    num_blocks: int,
    num_heads: int,
    *,
    tail: int,
    ffn_factor: float | None = None,
    kernel: str = "auto",
) -> BlockStack:
    """A stack of ``num_blocks``: ``xlstm`` (the paper's), ``bixlstm`` (`AlternatingStack` of the same blocks)
    or ``transformer``.

    tail: the last so many tokens of every sequence change from one denoising step to the next. ffn_factor:
    inner over outer width of the feed-forward; None: 2.6667, for the transformer 4 (X-IL's). kernel: the
    mLSTM's ``backend``.
    """
    norm = nn.RMSNorm(dim, eps=1e-6)
    if name == "transformer":
        factor = 4.0 if ffn_factor is None else ffn_factor
        return CausalStack([TransformerBlock(dim, num_heads, factor) for _ in range(num_blocks)], norm)
    options = {"backend": kernel} | ({} if ffn_factor is None else {"ffn_factor": ffn_factor})
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(BACKBONES)}")
    blocks = [xLSTMLargeBlock(dim, num_heads, **options) for _ in range(num_blocks)]
    return CausalStack(blocks, norm) if name == "xlstm" else AlternatingStack(blocks, norm, tail=tail)
