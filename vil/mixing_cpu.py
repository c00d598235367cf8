"""The mixing around the mLSTM on CPUs: mixing_cpu.cpp, compiled when it is first used, and how it is called.

float32 only, with the block width and head sizes of the published models; `serves` says whether a call is one
of these, and the rest goes through torch.

Shapes and names are those of mixing.py; w are its `MixWeights`, contiguous.
"""

import threading
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from vilma.xlstm.cpu_build import Extension, address, bits_of
from vilma.xlstm.mlstm_cpu import HEADER

_LANES = 16  # channels of a head come in whole vectors of the widest processor
_MOST_TAPS, _MOST_HEADS = 64, 32
_CACHE = 2 << 20  # bytes of q, k and v that a core works on
_MOST_LENT = 32 << 20  # bytes of memory that a thread keeps for the next call
_KEPT = threading.local()
_SERIAL = 1 << 17  # channels of all tokens below which threads cost more than they give
_EXTENSION = Extension(
    "Vision-LSTM",
    Path(__file__).with_name("mixing_cpu.cpp"),
    (HEADER,),
    "vilma_vil_",
    ("before", "behind", "behind_backward", "before_backward"),
)


def serves(u: Tensor, weights) -> bool:
    """Whether these tensors are what the compiled functions take."""
    if u.device.type != "cpu" or u.dtype != torch.float32:
        return False
    inner, heads = u.shape[-1] // 2, weights.i_weight.shape[0]
    kernel = weights.conv_weight.shape[2:]
    return (
        weights.q_weight.shape[-1] == 4
        and (inner // heads) % _LANES == 0
        and kernel.numel() <= _MOST_TAPS
        and heads <= _MOST_HEADS
        and _EXTENSION.is_available()
    )


def before(u: Tensor, w, reverse: bool, gates: bool, lent: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """c (B, N, E); q, k, v (B, N, 3, E); the gates (B, N, 2 H), or else p (B, N, E) with c = SiLU(p).

    lent: the results lie in memory that the next call of this thread overwrites. Without it a forward pass
    spends up to a third of its time on pages that malloc gives back to the system and takes again.
    """
    batch, tokens, inner = u.shape[0], u.shape[1] * u.shape[2], u.shape[3] // 2
    last = 2 * w.i_weight.shape[0] if gates else inner
    shapes = (batch, tokens, inner), (batch, tokens, 3, inner), (batch, tokens, last)
    c, qkv, last = _lent(u, shapes) if lent else map(u.new_empty, shapes)
    _call("before", u, w, reverse, 0.0, c, qkv, last if gates else None, None if gates else last)
    return c, qkv, last


def _lent(like: Tensor, shapes) -> list[Tensor]:
    sizes = [prod(shape) for shape in shapes]
    if 4 * sum(sizes) > _MOST_LENT:
        return list(map(like.new_empty, shapes))
    memory = getattr(_KEPT, "memory", None)
    if memory is None or memory.numel() < sum(sizes):
        memory = _KEPT.memory = like.new_empty(sum(sizes))
    return [part.view(shape) for part, shape in zip(memory[: sum(sizes)].split(sizes), shapes)]


def behind(u: Tensor, w, eps: float, c: Tensor, h: Tensor, y: Tensor) -> None:
    """Writes y (B, Y, X, E), from c (B, N, E) and h (B, N, H, D)."""
    _call("behind", u, w, False, eps, c, h, y)


def images_at_once(u: Tensor) -> int:
    """How many images to take at once: their q, k, v then stay in a core's cache until they are used."""
    each = 6 * u.shape[1] * u.shape[2] * u.shape[3]  # bytes of q, k, v
    return torch.get_num_threads() * max(1, _CACHE // each)


def behind_backward(dy: Tensor, u: Tensor, w, eps: float, c: Tensor, h: Tensor, du: Tensor):
    """Writes z's half of du; returns dh, what comes to c here, and gradients of parameters by name."""
    dh, dc = torch.empty_like(h), torch.empty_like(c)
    grads = {name: torch.empty_like(w.skip) for name in ("norm_weight", "norm_bias", "skip")}
    _call("behind_backward", u, w, False, eps, dy.contiguous(), c, h, du, dh, dc, *grads.values())
    return dh, dc, grads


def before_backward(u: Tensor, w, reverse: bool, c, p, d_tokens, d_gates: Tensor, du: Tensor, dc: Tensor):
    """Writes a's half of du, overwrites dc; returns gradients of parameters by name."""
    names = w._fields[: w._fields.index("norm_weight")]
    grads = {name: None if (x := getattr(w, name)) is None else torch.empty_like(x) for name in names}
    inputs = (c, p, *(x.contiguous() for x in d_tokens), d_gates)
    _call("before_backward", u, w, reverse, 0.0, *inputs, du, dc, *grads.values())
    return grads


def _call(name: str, u: Tensor, w, reverse: bool, eps: float, *tensors: Tensor | None) -> None:
    """Everything is contiguous; tensors are held by the caller until this returns."""
    batch, height, width, doubled = u.shape
    kernel = w.conv_weight.shape[2:]
    causal = len(kernel) == 1
    grid = (1, height * width) if causal else (height, width)
    rows, columns = (1, kernel[0]) if causal else kernel
    threads = torch.get_num_threads() if batch * height * width * doubled >= _SERIAL else 1
    inner, heads = doubled // 2, w.i_weight.shape[0]
    arguments = [batch, *grid, inner, heads, rows, columns, reverse, causal, threads, bits_of(eps)]
    parameters = (
        w.conv_weight,
        w.conv_bias,
        w.q_weight,
        w.q_bias,
        w.k_weight,
        w.k_bias,
        w.v_weight,
        w.v_bias,
    )
    parameters += (w.i_weight, w.i_bias, w.f_weight, w.f_bias, w.norm_weight, w.norm_bias, w.skip)
    arguments += map(address, (u, *parameters, *tensors))
    _EXTENSION.call(name, arguments)
