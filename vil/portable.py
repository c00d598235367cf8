"""Exported programs that run without vilma: its operator written out in those of torch.

The mLSTM takes its parallel form (xLSTM, arXiv 2405.04517, appendix): time and memory grow with the square of
the number of tokens. Shapes: B batch, (Y, X) grid, N = Y X tokens, E inner width, H heads, D = E / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import ExportedProgram

from .mixing import _EPS, MixWeights, block_diagonal, convolve

__all__ = ["portable"]


def portable(program: ExportedProgram) -> ExportedProgram:
    """A program of a Vision-LSTM (or any other model) that torch alone, ONNX or AOTInductor can run."""
    return program.run_decompositions({torch.ops.vilma.vil_mix.default: _mix})


def _mix(u: Tensor, *rest) -> tuple[Tensor, ...]:
    weights, (reverse, eps, save) = MixWeights(*rest[: len(MixWeights._fields)]), rest[-3:]
    if save:
        raise ValueError("export the program for inference: under torch.no_grad, in evaluation mode")
    w = MixWeights(*(x if x is None else x.to(u.dtype) for x in weights))
    a, z = u.chunk(2, -1)
    c = F.silu(convolve(a, w.conv_weight, w.conv_bias, reverse))
    tokens = (
        block_diagonal(c, w.q_weight, w.q_bias),
        block_diagonal(c, w.k_weight, w.k_bias),
        block_diagonal(a, w.v_weight, w.v_bias),
    )
    qkv = torch.cat([x.flatten(1, 2) for x in tokens], -1)
    i = F.linear(qkv.float(), weights.i_weight.float(), weights.i_bias.float()).mT
    f = F.linear(qkv.float(), weights.f_weight.float(), weights.f_bias.float()).mT
    q, k, v = (x.unflatten(-1, (i.shape[1], -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
    h = _parallel(q, k, v, i, f, reverse).to(u.dtype).transpose(1, 2)
    h = F.layer_norm(h, h.shape[-1:], eps=eps).reshape(c.shape) * (1 + w.norm_weight) + w.skip * c
    h = h if w.norm_bias is None else h + w.norm_bias
    return h * F.silu(z), *(u.new_empty(0) for _ in range(6))


def _parallel(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, reverse: bool) -> Tensor:
    """q, k, v (B, H, N, D), i, f (B, H, N) -> h (B, H, N, D), from an empty state."""
    log_f = F.logsigmoid(f)
    steps = q.shape[2]
    seen = torch.ones(steps, steps, dtype=torch.bool, device=q.device)
    # In reverse, what lies behind t has been seen, and the forget gates of t .. s - 1 act on s.
    seen = seen.triu() if reverse else seen.tril()
    total = log_f.cumsum(-1)
    total = log_f.sum(-1, keepdim=True) - total + log_f if reverse else total
    log_d = total[..., :, None] - total[..., None, :] + i[..., None, :]
    log_d = torch.where(seen, log_d, -torch.inf)
    m = log_d.amax(-1, keepdim=True)
    p = (q.float() @ k.float().mT) * q.shape[-1] ** -0.5 * torch.exp(log_d - m)
    return (p @ v.float()) / (torch.maximum(p.sum(-1, keepdim=True).abs(), torch.exp(-m)) + _EPS)
