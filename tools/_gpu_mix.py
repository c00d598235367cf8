"""What surrounds the mLSTM in a Vision-LSTM layer on a GPU, for `vilma bench-gpu`: checks and times.

Without timm, which Vision-LSTM needs, there are no cases.
"""

import importlib.util
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vilma.bench import BOTH, FORWARD, Contender, measure

if TYPE_CHECKING:
    from vilma.vil.mixing import MixWeights

__all__ = ["TENSORS", "cases", "check", "times"]

# RMS ratio to float64 that is allowed in any case
TOLERANCES = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 3e-3}
# Tensors of B N E that have to be read or written, the mLSTM's own counted once. Forward: 5 before it (a; c,
# q, k, v), 4 of its own, 4 behind it (h, c, z; y). Backward: 5 to make q, k, v again, 7 behind it (dy, z, p,
# h; dz, dh, dc), 8 of its own (q, k, v, h, dh; dq, dk, dv), 8 through the projections, 4 of the convolution.
TENSORS = {FORWARD: 13, BOTH: 45}
EPS = 1e-5


def cases(toy: bool) -> Iterator[dict[str, Any]]:
    if importlib.util.find_spec("timm") is None:
        return
    if toy:
        yield {"inner": 32, "grid": (2, 3), "dtype": "float32", "heads": 2}
        return
    for inner, dtype in itertools.product((384, 768, 1536), ("bfloat16", "float32")):
        yield {"inner": inner, "grid": (14, 14), "dtype": dtype}
        yield {"inner": inner, "grid": (16, 16), "dtype": dtype, "reverse": True}
    yield {"inner": 384, "grid": (14, 14), "dtype": "bfloat16", "parameters": "float32"}
    yield {"inner": 384, "grid": (14, 14), "dtype": "float16", "reverse": True}
    yield {"inner": 384, "grid": (13, 15), "dtype": "bfloat16", "kernel": 5}
    yield {"inner": 384, "grid": (14, 14), "dtype": "bfloat16", "kernel": 4, "causal": True, "reverse": True}


def check(
    device, inner, grid, dtype, heads=4, kernel=3, causal=False, reverse=False, parameters=None
) -> dict[str, float]:
    """Of y and every gradient: RMS error to float64 over what is allowed.

    That is a tolerance, or twice the error of the plain twin in the same precision where this is more: q and
    k rounded to bfloat16 move a normaliser near zero, and with it gradients, whoever computes them.
    """
    from vilma.vil.mixing import MixWeights, mix, mix_plain

    kind = getattr(torch, dtype)
    weights = _weights(inner, heads, kernel, causal, device, getattr(torch, parameters or dtype))
    generator = torch.Generator(device).manual_seed(1)
    u = torch.randn(2, *grid, 2 * inner, device=device, generator=generator).to(kind)
    dy = torch.randn(2, *grid, inner, device=device, generator=generator).to(kind)

    def call(function, to: torch.dtype | None) -> list[Tensor]:
        leaf = u.to(to or kind).requires_grad_()
        own = MixWeights(*(x.detach().to(to or x.dtype).requires_grad_() for x in weights))
        y = function(leaf, own, reverse, EPS)
        return [y, *torch.autograd.grad(y, [leaf, *own], dy.to(y.dtype))]

    exact = call(mix_plain, torch.float64)
    found, plain = call(mix, None), call(mix_plain, None)
    names = ["y", "du", *(f"d{name}" for name in MixWeights._fields)]
    # i_bias moves all input gates together, which nearly cancels: beside the gradient of f_bias
    scales = {"di_bias": exact[names.index("df_bias")].norm()}
    errors = {}
    for name, ours, theirs, true in zip(names, found, plain, exact, strict=True):
        scale = max(scales.get(name, 0.0), true.norm())
        of_ours, of_theirs = (((x.double() - true).norm() / scale).item() for x in (ours, theirs))
        finite = bool(torch.isfinite(ours).all())
        errors[name] = of_ours / max(TOLERANCES[dtype], 2 * of_theirs) if finite else float("inf")
    return errors


def times(inner: int, side: int, batch: int, device: torch.device, toy: bool, rate: float) -> dict[str, Any]:
    """Milliseconds in bfloat16, and times over the floor of the memory traffic at ``rate`` bytes a second."""
    from vilma.vil.mixing import MixWeights, mix

    u = torch.randn(batch, side, side, 2 * inner, device=device, dtype=torch.bfloat16).requires_grad_()
    w = _weights(inner, 4, 3, False, device, torch.bfloat16)
    w = MixWeights(*(x.requires_grad_() for x in w))
    contender = Contender("mix", lambda: mix(u, w, False, EPS), [u, *w])
    result = measure([contender], device=device, rounds=2 if toy else 10)["mix"]
    figures: dict[str, Any] = {}
    for mode, timing in result.times.items():
        floor = TENSORS[mode] * batch * side**2 * inner * 2 / rate
        figures |= {f"{mode} ms": timing.seconds * 1e3, f"{mode} floor ms": floor * 1e3}
        figures |= {f"{mode} of floor": timing.seconds / floor}
        if timing.issue:
            figures[f"{mode} issue ms"] = sorted(timing.issue)[len(timing.issue) // 2] * 1e3
    return figures | ({"error": result.error[:200]} if result.error else {})


def _weights(inner, heads, kernel, causal, device, dtype) -> "MixWeights":
    """Random ones with which float32 is a fair approximation: forget gates near 1, as trained."""
    from vilma.vil.mixing import MixWeights

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape, scale=0.5):
        return scale * torch.randn(*shape, generator=generator, device=device)

    taps = (kernel,) if causal else (kernel, kernel)
    block, gate = (inner // 4, 4, 4), (heads, 3 * inner)
    values = {"conv_weight": normal(inner, 1, *taps), "conv_bias": normal(inner)}
    for name in "qkv":
        values |= {f"{name}_weight": normal(*block), f"{name}_bias": normal(inner)}
    for name, offset in (("i", 0.0), ("f", 3.0)):
        values[f"{name}_weight"] = normal(*gate, scale=0.1 / inner**0.5)
        values[f"{name}_bias"] = offset + normal(heads)
    values |= {"norm_weight": normal(inner), "norm_bias": normal(inner), "skip": normal(inner)}
    return MixWeights(**{name: x.to(dtype) for name, x in values.items()})
