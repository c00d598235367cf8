"""How the mLSTM's Triton kernels are launched: a compiled kernel is called directly once it is known.

Triton's own launch takes 20 to 40 microseconds of the host for the 50 arguments of these kernels, more than a
short sequence takes the GPU. Nearly all of it is finding out which compiled kernel fits the arguments; here
that is remembered by the same traits of the arguments that Triton specialises on. What is called then,
``compiled[grid](*arguments)``, is Triton's documented way to launch a kernel that was compiled before.
"""

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .mlstm_chunkwise import dense_like
from .mlstm_triton_tiles import Tile

_compiled: dict[Hashable, tuple[Any, list]] = {}


def launch(kernel, programs: int, *args: Tensor | int | float | None, tile: Tile, **constants) -> None:
    """``kernel[(programs,)](*args, **constants)`` with the warps, stages and registers of ``tile``."""
    if not _remembers():
        kernel[(programs,)](*args, **constants, **options_of(tile))
        return
    traits = tuple([_trait(x) for x in args])
    key = id(kernel), args[0].device, tile, tuple(constants.items()), traits
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[(programs,)](*args, **constants, **options_of(tile))
        _compiled[key] = compiled, [constants[name] for name in kernel.arg_names[len(args) :]]
        return
    compiled, last = known
    compiled[(programs, 1, 1)](*args, *last)


def options_of(tile: Tile) -> dict[str, int]:
    """How a kernel is compiled; the recurrent cells have tiles of their own, without a bound on registers."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    registers = getattr(tile, "registers", 0)
    return options | {"maxnreg": registers} if registers else options


def _trait(x: Tensor | int | float | None) -> Hashable:
    """All that Triton compiles for: type and, of addresses and whole numbers, what they are multiples of."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return x % 16 == 0, x == 1, -(2**31) <= x < 2**31
    return None if x is None else float


@cache
def _remembers() -> bool:
    # the interpreter compiles nothing; for AMD, Triton also specialises on the size of a tensor's storage
    return not interpreting() and torch.version.hip is None


@cache
def interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def strides(*tensors: Tensor, axes: int = 3) -> list[int]:
    """Strides of the first axes (B, H, T) of each; 0 for an axis of size 1, whose stride may be anything."""
    found = []
    for x in tensors:
        found += [0 if size == 1 else by for size, by in zip(x.shape[:axes], x.stride())]
    return found


def rowwise(x: Tensor) -> Tensor:
    """x with a last axis of stride 1; a copy is laid out as `dense_like` does it."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else dense_like(x).copy_(x)


def on_device(x: Tensor) -> AbstractContextManager:
    """The context in which launches go to x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
