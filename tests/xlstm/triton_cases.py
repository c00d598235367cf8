"""Runs mLSTM Triton kernels against the float64 recurrence: `TRITON_INTERPRET=1 python triton_cases.py`.

Standard input: a JSON list of cases (dictionaries, see `Case`). Standard output, last line: a JSON list with
one dictionary of RMS ratios a case. TRITON_INTERPRET=1 is Triton's interpreter, which needs no GPU. Takes any
Python that has torch, triton and, on its path, vilma. The last line of standard error is Triton's version.
"""

import contextlib
import dataclasses
import json
import os
import sys

import torch
import triton
from torch import Tensor

from vilma.testing import random_mlstm, random_mlstm_state
from vilma.xlstm import mlstm_triton
from vilma.xlstm.mlstm_naive import mlstm_recurrent_naive, mlstm_step_naive, sequence_starts
from vilma.xlstm.mlstm_triton import Tile, Tiles

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 1
    heads: int = 1
    steps: int = 5
    dim_qk: int = 16
    dim_v: int = 16
    gate: str = "exp"
    normalize: bool = True
    reverse: bool = False
    state: bool = False
    last: bool = False
    reset: bool = False
    chunk: int | None = None
    tile: tuple[int, int, int, int] | None = (16, 16, 16, 16)  # bt, bs, bk, bv; None: the table's
    joint: bool = False
    dtype: str = "float32"
    gates: str = "normal"
    closed: bool = False  # every third forget gate is -inf
    eps: float = 1e-6
    layout: str = "bhtd"  # or "bthd", or "far": 2^31 elements lie between the first and the last row
    step: bool = False
    tf32: bool = False  # products of one TF32 product, as the hardware cuts numbers to it


def inputs_of(case: Case) -> tuple[list[Tensor], list[Tensor | None], Tensor | None]:
    sizes = (case.batch, case.heads, case.steps, case.dim_qk, case.dim_v)
    dtype = getattr(torch, case.dtype)
    given = [x.to(dtype) for x in random_mlstm(*sizes, dtype=torch.float64, device=DEVICE, gates=case.gates)]
    given[3:] = [x.float() for x in given[3:]]
    if case.closed:
        given[4][..., 2::3] = float("-inf")
    if case.layout == "bthd":
        given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    if case.layout == "far":
        given[:3] = [_far(x) for x in given[:3]]
    state = [None, None, None]
    if case.state:
        state = list(random_mlstm_state(case.batch, case.heads, case.dim_qk, case.dim_v, device=DEVICE))
        if case.gate != "exp":
            state[2] = None
    starts = None
    if case.reset:
        generator = torch.Generator().manual_seed(5)
        reset = (torch.rand(case.batch, case.steps, generator=generator) < 0.15).to(DEVICE)
        starts = sequence_starts(reset, case.reverse)
    return given, state, starts


def _far(x: Tensor) -> Tensor:
    """x in a buffer of which hardly anything is ever touched."""
    apart = -(-(2**31) // ((x.shape[0] - 1) * 16)) * 16
    buffer = torch.UntypedStorage((apart * (x.shape[0] - 1) + x[0].numel()) * x.element_size(), device=DEVICE)
    y = torch.tensor([], dtype=x.dtype, device=DEVICE)
    return y.set_(buffer, 0, x.shape, (apart, *x.stride()[1:])).copy_(x)


def reference(case: Case, given, state, starts, weights):
    leaves = [x.double().detach().requires_grad_() for x in given]
    new = {"dtype": torch.float64, "device": DEVICE}
    zero = (
        torch.zeros(case.batch, case.heads, case.dim_qk, case.dim_v, **new),
        torch.zeros(case.batch, case.heads, case.dim_qk, **new),
        torch.zeros(case.batch, case.heads, **new) if case.gate == "exp" else None,
    )
    start = [
        z if x is None else x.double().detach().requires_grad_() if case.state else z
        for x, z in zip(state, zero)
    ]
    if case.step:
        h, last = mlstm_step_naive(*(x[:, :, 0] for x in leaves), start, case.gate, case.normalize, case.eps)
        return [h, *last], []
    # the recurrence takes a mask of `reset`; `starts` is what it makes of it
    reset = (
        starts
        if starts is None or not case.reverse
        else torch.cat((starts[:, :1] & False, starts[:, :-1]), 1)
    )
    h, last = mlstm_recurrent_naive(*leaves, start, reset, case.gate, case.normalize, case.reverse, case.eps)
    outputs = [h, *last] if case.last else [h]
    loss = sum((x * w.double()).sum() for x, w in zip(outputs, weights) if x is not None)
    wrt = leaves + [x for x in start if x is not None and x.requires_grad]
    grads = torch.autograd.grad(loss, wrt, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wrt)]
    return outputs, grads


def ours(case: Case, given, state, starts, weights):
    options = {"gate": case.gate, "normalize": case.normalize, "eps": case.eps}
    if case.step:
        h, last = mlstm_triton.step(*(x[:, :, 0] for x in given), state, **options)
        return [h, *last], []
    tiles = None
    if case.tile is not None:
        tile = Tile(*case.tile)
        other = tile._replace(bt=tile.bs, bs=tile.bt)
        tiles = Tiles(case.chunk or case.steps, tile, tile, tile, tile if case.joint else None, tile, other)
    options |= {"reverse": case.reverse, "chunk_size": case.chunk or (tiles and case.steps), "tiles": tiles}
    h, last, saved = mlstm_triton.forward(*given, state, starts, return_state=case.last, **options)
    dlast = weights[1:] if case.last else (None, None, None)
    grads = mlstm_triton.backward(saved, weights[0].to(h.dtype), dlast, **options)
    return [h, *last] if case.last else [h], [g for g in grads if g is not None]


def run(case: Case) -> dict[str, float]:
    given, state, starts = inputs_of(case)
    generator = torch.Generator().manual_seed(7)
    b, h = case.batch, case.heads
    shapes = ((b, h, case.steps, case.dim_v), (b, h, case.dim_qk, case.dim_v), (b, h, case.dim_qk), (b, h))
    weights: list = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    weights[0] = weights[0].to(given[0].dtype)
    if case.gate != "exp":
        weights[3] = None
    expected, expected_grads = reference(case, given, state, starts, weights)
    with single_tf32(case.tf32):
        outputs, grads = ours(case, given, state, starts, weights)
    errors = {}
    for name, x, y in zip("hcnm", outputs, expected):
        if y is not None:
            errors[name] = ratio(x, y)
    names = ["q", "k", "v", "i", "f", "c0", "n0", "m0"]
    assert len(grads) == len(expected_grads), (len(grads), len(expected_grads))
    for name, x, y in zip(names, grads, expected_grads):
        # two that are sums of terms which may cancel: beside the terms
        scale = None
        if name == "f":
            scale = max(rms(y), rms(expected_grads[3]))
        elif name == "m0":
            scale = max(rms(y), (state[0].double() * expected_grads[5]).norm().item())
        errors["d" + name] = ratio(x, y, scale)
    return errors


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def ratio(x: Tensor, y: Tensor, scale: float | None = None) -> float:
    assert x.shape == y.shape, (x.shape, y.shape)
    if not torch.isfinite(x).all():
        return float("inf")
    difference = rms(x.double() - y.detach())
    scale = rms(y.detach()) if scale is None else scale
    return difference / scale if scale else difference


@contextlib.contextmanager
def single_tf32(wanted: bool):
    """torch's setting, and an interpreter that cuts the operands of TF32 products off, as matrix units do."""
    if not wanted:
        yield
        return
    interpreter = triton.runtime.interpreter
    whole, setting = interpreter.InterpreterBuilder.create_dot, torch.backends.cuda.matmul

    def cut(x):
        return interpreter.TensorHandle((x.data.view("uint32") & 0xFFFFE000).view("float32"), x.dtype)

    def create_dot(self, a, b, d, precision, *rest):
        if DEVICE == "cpu" and precision.name == "TF32":
            a, b = cut(a), cut(b)
        return whole(self, a, b, d, precision, *rest)

    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    interpreter.InterpreterBuilder.create_dot = create_dot
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_dot = whole
        setting.fp32_precision = before


def poison() -> None:
    """Make memory that was never written visible."""
    empty, like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(float("nan")) if x.is_floating_point() else x

    torch.empty = lambda *a, **k: fill(empty(*a, **k))
    torch.empty_like = lambda *a, **k: fill(like(*a, **k))


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = [Case(**x) for x in json.load(sys.stdin)]
    poison()
    print(json.dumps([run(case) for case in cases]))
    print(triton.__version__, file=sys.stderr)
