"""Linear maps of a few rows on a CPU: linear_cpu.cpp, compiled when it is first used, and how it is called.

A policy that acts runs some 16 rows through all its weights. Libraries of matrix products then reach less
than half of what this reaches; from some 64 rows on they are as fast. Inference only: there is no gradient.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import cpu_build
from .cpu_build import address

SOURCE = Path(__file__).with_name("linear_cpu.cpp")
HEADER = SOURCE.with_name("mlstm_cpu_tiles.h")
MAX_ROWS, MIN_WEIGHTS = 32, 1 << 17  # weights that the caches hold are multiplied as fast by torch
_SERIAL = 1 << 20  # multiplications below which threads cost more than they give
_EXTENSION = cpu_build.Extension("a linear map of few rows", SOURCE, (HEADER,), "vilma_linear_", ("forward",))
_LIBRARY = torch.library.Library("vilma", "FRAGMENT")
_LIBRARY.define("linears(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor")


def linears(x: Tensor, *maps: nn.Linear) -> tuple[Tensor, ...]:
    """``f(x)`` for each of the linear maps, x (..., D)."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if torch.is_grad_enabled() or recorded or (weights := _weights(x, maps)) is None:
        return tuple([f(x) for f in maps])
    y = torch.ops.vilma.linears.default(x, weights, [f._parameters["bias"] for f in maps])
    return y.split_with_sizes([f.out_features for f in maps], -1)


def _weights(x: Tensor, maps: Sequence[nn.Linear]) -> list[Tensor] | None:
    """Weights of maps that gain by being run here. To find out must cost less than the smallest product."""
    depth, outputs = x.shape[-1], 0
    for f in maps:
        if type(f) is not nn.Linear or f._forward_hooks or f._forward_pre_hooks:
            return None
        outputs += f.out_features
    if outputs * depth < MIN_WEIGHTS or not 0 < x.numel() <= MAX_ROWS * depth:
        return None
    weights = [f._parameters.get("weight") for f in maps]
    suit = (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        # not quantised or sharded
        and all(type(w) in (nn.Parameter, Tensor) and w.dtype == torch.float32 for w in weights)
        and all(w.is_contiguous() and w.shape[1] == depth for w in weights)
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
        and torch._C._functorch.maybe_current_level() is None  # no transform of torch.func
        and _EXTENSION.is_available()
    )
    return weights if suit else None


def _forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    depth, widths = x.shape[-1], [w.shape[0] for w in weights]
    rows = x.reshape(-1, depth)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    width = sum(widths)
    y = x.new_empty(*x.shape[:-1], width)
    threads = torch.get_num_threads() if y.numel() * depth >= _SERIAL else 1
    arguments = [len(rows), depth, width, threads, rows.data_ptr(), rows.stride(0), len(weights)]
    to = y.data_ptr()
    for weight, bias, outputs in zip(weights, biases, widths):
        arguments += (weight.data_ptr(), address(bias), outputs, to)
        to += outputs * y.element_size()
    _EXTENSION.call("forward", arguments)
    return y


def _forward_fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    return x.new_empty(*x.shape[:-1], sum(w.shape[0] for w in weights))


_LIBRARY.impl("linears", _forward, "CPU")
torch.library.register_fake("vilma::linears", _forward_fake, lib=_LIBRARY)


@register_flop_formula(torch.ops.vilma.linears)
def _flops(x, weights, biases, out_shape=None, **_) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return sum(2 * rows * outputs * depth for outputs, depth in weights)
