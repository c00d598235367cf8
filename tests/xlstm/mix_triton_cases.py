"""Runs the kernels around the mLSTM against the plain twin in float64, in Triton's interpreter.

`TRITON_INTERPRET=1 python mix_triton_cases.py`: standard input is a JSON list of cases (dictionaries, see
`Case`), the last line of standard output a JSON list with one dictionary of RMS ratios a case. Takes any
Python that has torch, timm, triton and, on its path, vilma.
"""

import dataclasses
import json
import os
import sys

import torch
import triton
from torch import Tensor

from vilma.testing import rms_ratio
from vilma.vil import mixing
from vilma.vil.mixing import MixWeights, mix, mix_plain
from vilma.xlstm import mix_triton
from vilma.xlstm.mlstm_triton_tiles import Tile

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
BIASES = ("conv_bias", "q_bias", "k_bias", "v_bias", "norm_bias")


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 2
    grid: tuple[int, int] = (3, 5)
    heads: int = 2
    dim: int = 16
    width: int = 4
    conv: str = "2d"  # or "causal"
    kernel: int = 3
    reverse: bool = False
    without: tuple[str, ...] = ()  # biases that are not there
    dtype: str = "float32"
    parameters: str | None = None  # their dtype, u's when None
    gates: str | None = None  # the dtype of the gates' weights, that of the parameters when None
    layout: str = "whole"  # u: "whole", "padded" rows, "batch last", "offset" by one number, "turned" grid
    upstream: str = "whole"  # dy: "whole", "expanded", "batch last"
    table: bool = False  # the table's tiles
    save: bool = True  # what the backward needs is kept


def weights_of(case: Case) -> MixWeights:
    generator = torch.Generator().manual_seed(0)
    inner = case.heads * case.dim

    def normal(*shape, scale=0.5):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    taps = (case.kernel,) * (2 if case.conv == "2d" else 1)
    block, gate = (inner // case.width, case.width, case.width), (case.heads, 3 * inner)
    values = {"conv_weight": normal(inner, 1, *taps), "conv_bias": normal(inner)}
    for name in "qkv":
        values |= {f"{name}_weight": normal(*block), f"{name}_bias": normal(inner)}
    for name, offset in (("i", 0.0), ("f", 3.0)):
        values |= {
            f"{name}_weight": normal(*gate, scale=0.3 / inner**0.5),
            f"{name}_bias": offset + normal(case.heads),
        }
    values |= {"norm_weight": normal(inner), "norm_bias": normal(inner), "skip": normal(inner)}
    values |= dict.fromkeys(case.without)
    own = getattr(torch, case.parameters or case.dtype)
    of_gates = getattr(torch, case.gates) if case.gates else own
    dtypes = {name: of_gates if name[:2] in ("i_", "f_") else own for name in values}
    made = {n: x if x is None else x.to(DEVICE, dtypes[n]).requires_grad_() for n, x in values.items()}
    return MixWeights(**made)


def laid(x: Tensor, layout: str) -> Tensor:
    """x in memory of another order."""
    if layout == "padded":
        return torch.nn.functional.pad(x, (0, 16))[..., : x.shape[-1]]
    if layout == "offset":
        return torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape)
    if layout == "batch last":
        return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    if layout == "turned":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def run(case: Case) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    inner, dtype = case.heads * case.dim, getattr(torch, case.dtype)
    shape = (case.batch, *case.grid, inner)
    u = torch.randn(*shape[:3], 2 * inner, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    if case.upstream == "expanded":
        dy = dy[:1, :1, :1, :1].expand(shape)
    w = weights_of(case)
    given = [x for x in w if x is not None]
    names = ["u", *(name for name, x in w._asdict().items() if x is not None)]

    def call(function, to: torch.dtype | None) -> list[Tensor]:
        leaf = laid(u.to(to or dtype), case.layout).detach().requires_grad_()
        own = MixWeights(*(x if x is None else x.detach().to(to or x.dtype).requires_grad_() for x in w))
        y = function(leaf, own, case.reverse, 1e-5)
        upstream = laid(dy.to(y.dtype), case.upstream)
        return [y, *torch.autograd.grad(y, [leaf, *(x for x in own if x is not None)], upstream)]

    expected = call(mix_plain, torch.float64)
    patch(case)
    found = call(mix if case.save else unsaved, None)
    for x, y in zip(given, found[2:], strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
    assert found[0].dtype == dtype and found[1].dtype == dtype
    errors = dict(zip(["y", *(f"d{x}" for x in names)], map(rms_ratio, found, expected), strict=True))
    # i_bias moves all input gates together, which cancels in h: beside the gradient of f_bias
    of_i, of_f = expected[2 + names[1:].index("i_bias")], expected[2 + names[1:].index("f_bias")]
    difference = found[2 + names[1:].index("i_bias")].double() - of_i
    errors["di_bias"] = (difference.norm() / max(of_i.norm(), of_f.norm())).item()
    if case.dtype != "bfloat16" or DEVICE == "cuda":  # which the interpreter multiplies unrounded
        errors["gates"] = error_of_gates(u, w, case)
    return {
        name: error if all(torch.isfinite(x).all() for x in found) else float("inf")
        for name, error in errors.items()
    }


def error_of_gates(u: Tensor, w: MixWeights, case: Case) -> float:
    """Gates are made in float32, whatever u is: beside the same products of q, k, v in float64."""
    with torch.no_grad():
        _, qkv, gates = mix_triton.before(mix_triton.rows(u), w, case.grid, case.reverse, gates=True)
        weight, bias = torch.cat((w.i_weight, w.f_weight)), torch.cat((w.i_bias, w.f_bias))
        return rms_ratio(gates, qkv.flatten(2).double() @ weight.double().mT + bias.double())


def unsaved(u, w, reverse, eps):
    return torch.ops.vilma.vil_mix(u, *w, reverse, eps, False)[0]


def patch(case: Case) -> None:
    """The kernels also for tensors of a CPU, and tiles that small shapes fill."""
    if DEVICE == "cpu":
        mix_triton.serves = mix_triton.supports
    own = mix_triton.MixTiles(Tile(16, 0, 32, 0), Tile(16, 0, 32, 0), Tile(16, 0, 32, 0))
    mix_triton._TABLE = mix_triton._TABLE if case.table else {("", "half"): own, ("", "float32"): own}
    mix_triton._AREA, mix_triton._AREA_BACKWARD = (2048, 1024) if case.table else (256, 128)


def poison() -> None:
    """Make memory that was never written visible."""

    def filling(plain):
        def filled(*arguments, **options):
            x = plain(*arguments, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        setattr(owner, name, filling(getattr(owner, name)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    table = mix_triton._TABLE
    cases = [Case(**x) for x in json.load(sys.stdin)]
    poison()
    results = []
    for case in cases:
        mix_triton._TABLE = table
        results.append(run(case))
    print(json.dumps(results))
    print(triton.__version__, mixing.__name__, file=sys.stderr)
