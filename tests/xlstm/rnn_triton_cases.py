"""Runs the recurrent Triton kernels against float64: `TRITON_INTERPRET=1 python rnn_triton_cases.py`.

Standard input: a JSON list of cases (dictionaries, see `Case`). Standard output, last line: a JSON list with
one dictionary of RMS ratios a case. TRITON_INTERPRET=1 is Triton's interpreter, which needs no GPU. Takes any
Python that has torch, triton and, on its path, vilma.
"""

import dataclasses
import json
import os
import sys

import torch
from torch import Tensor

from vilma.xlstm import rnn_triton
from vilma.xlstm.mlstm_naive import sequence_starts
from vilma.xlstm.mlstm_triton_tiles import kind_of
from vilma.xlstm.rnn import rnn, rnn_step
from vilma.xlstm.rnn_naive import CELLS, rnn_naive, rnn_step_naive
from vilma.xlstm.rnn_torch import Form
from vilma.xlstm.rnn_triton_tiles import Plan, plan_for

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@dataclasses.dataclass(frozen=True)
class Case:
    cell: str = "slstm"
    batch: int = 2
    steps: int = 5
    heads: int = 1
    dim: int = 16
    reverse: bool = False
    bias: bool = True
    state: bool = False
    last: bool = False
    reset: bool = False
    clip: float | None = None
    form: str | None = None  # resident, whole, alternating; None: the table's
    tile: tuple[int, int] | None = None  # bd, bk of the tiled kernels; None: the table's
    dtype: str = "float32"
    gates: str = "normal"  # or mixed30: uniform in [-30, 30]
    layout: str = "btghd"  # order of wx in memory
    step: bool = False
    operator: bool = False  # through `rnn` and autograd, with the table's plan
    alone: str = ""  # the only output with a gradient: h, or a state's name


def inputs_of(case: Case) -> tuple[list[Tensor | None], list[Tensor | None], Tensor | None]:
    """wx, r, b; the state; reset."""
    generator = torch.Generator().manual_seed(3)
    kinds, dtype = CELLS[case.cell], getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wx = normal(case.batch, case.steps, len(kinds.wx), case.heads, case.dim)
    if case.gates == "mixed30":
        wx = torch.rand(wx.shape, generator=generator, dtype=torch.float64) * 60.0 - 30.0
    elif "f" in kinds.wx:
        wx[:, :, 1] += 1.0
    r = normal(case.heads, case.dim, len(kinds.r), case.dim) * case.dim**-0.5
    b = 0.5 * normal(len(kinds.b), case.heads, case.dim) if case.bias else None
    state: list[Tensor | None] = [None] * len(kinds.states)
    if case.state:
        state = [0.5 * normal(case.batch, case.heads, case.dim) for _ in kinds.states]
        if case.cell == "slstm":
            # n: some of the elements empty, some below 1, some above
            state[2] = (state[2].abs() * 3.0).where(normal(*state[2].shape) > -0.5, 0.0)
            state[1] = state[1].where(state[2] > 0.0, 0.0)
    order = ["btghd".index(x) for x in case.layout]
    wx = wx.permute(order).contiguous().permute([order.index(j) for j in range(5)])
    given = [None if x is None else x.to(DEVICE, dtype) for x in (wx, r, b)]
    reset = None
    if case.reset:
        reset = (torch.rand(case.batch, case.steps, generator=generator) < 0.25).to(DEVICE)
    return given, [None if x is None else x.to(DEVICE, torch.float32) for x in state], reset


def reference(case: Case, given, state, reset, weights):
    wx, r, b = (None if x is None else x.double().detach().requires_grad_() for x in given)
    start = [
        torch.zeros(case.batch, case.heads, case.dim, dtype=torch.float64, device=DEVICE)
        if x is None
        else x.double().detach().requires_grad_()
        for x in state
    ]
    if case.step:
        last = rnn_step_naive(wx[:, 0], r, b, start, case.cell, None)
        return [last[0], *last], []
    h, last = rnn_naive(wx, r, b, start, reset, case.cell, case.reverse, case.clip)
    loss = sum((x * w.double()).sum() for x, w in zip((h, *last), weights) if w is not None)
    wrt = [x for x in (wx, r, b, *start) if x is not None and x.requires_grad]
    grads = torch.autograd.grad(loss, wrt, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wrt)]
    return [h, *last] if case.last else [h], grads


def plan_of(case: Case) -> Plan | None:
    plan = plan_for(kind_of(torch.device(DEVICE)), getattr(torch, case.dtype), case.cell, case.dim, case.form)
    if case.tile is None:
        return plan
    bd, bk = case.tile
    return Plan(plan.form, *(x._replace(bd=bd, bk=bk) for x in plan[1:]))


def ours(case: Case, given, state, reset, weights):
    wx, r, b = given
    if case.operator:
        return through_operator(case, given, state, reset, weights)
    form, plan = Form(case.cell, case.reverse, case.clip), plan_of(case)
    if case.step:
        h, last = rnn_triton.step(wx[:, 0], r, b, state, form, plan.step)
        return [h, *last], []
    starts = None if reset is None else sequence_starts(reset, case.reverse)
    h, last = rnn_triton.forward(wx, r, b, state, starts, form, case.last, plan)
    dwx, dr, db, dstate = rnn_triton.backward(weights, wx, r, b, state, starts, h, last, form, plan)
    grads = [x for x in (dwx, dr, db, *dstate) if x is not None]
    for x, y in zip(grads, [x for x in (*given, *state) if x is not None]):
        assert x.dtype == y.dtype, (x.dtype, y.dtype)
    return [h, *last] if case.last else [h], grads


def through_operator(case: Case, given, state, reset, weights):
    wx, r, b = (None if x is None else x.detach().requires_grad_() for x in given)
    start = tuple(x.detach().requires_grad_() for x in state) if case.state else None
    options = {"cell": case.cell, "backend": "triton"}
    if case.step:
        with torch.no_grad():
            h, last = rnn_step(wx[:, 0], r, b, start, **options)
        return [h, *last], []
    options |= {"reverse": case.reverse, "grad_clip": case.clip, "reset": reset}
    h, last = rnn(wx, r, b, start, return_state=True, **options)
    used = [(x, w) for x, w in zip((h, *last), weights) if w is not None]
    wrt = [x for x in (wx, r, b, *(start or ())) if x is not None]
    grads = torch.autograd.grad([x for x, _ in used], wrt, [w for _, w in used])
    return [h, *last] if case.last else [h], grads


def run(case: Case) -> dict[str, float]:
    given, state, reset = inputs_of(case)
    generator = torch.Generator().manual_seed(7)
    names = CELLS[case.cell].states
    shape = (case.batch, case.heads, case.dim)
    weights: list[Tensor | None] = [torch.randn(case.batch, case.steps, *shape[1:], generator=generator)]
    weights += [torch.randn(shape, generator=generator) for _ in names]
    weights = [x.to(DEVICE) for x in weights]
    weights[0] = weights[0].to(given[0].dtype)
    if not case.last:
        weights[1:] = [None] * len(names)
    if case.alone:
        weights = [x if case.alone == y else None for x, y in zip(weights, ("out", *names))]
    expected, expected_grads = reference(case, given, state, reset, weights)
    outputs, grads = ours(case, given, state, reset, weights)
    assert len(outputs) == len(expected) and len(grads) == len(expected_grads)
    errors = {name: ratio(x, y) for name, x, y in zip(("out", *names), outputs, expected)}
    wrt = ["wx", "r", *(["b"] if case.bias else []), *names]
    return errors | {"d" + name: ratio(x, y) for name, x, y in zip(wrt, grads, expected_grads)}


def ratio(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape, (x.shape, y.shape)
    if not torch.isfinite(x).all():
        return float("inf")
    difference = (x.double() - y.detach()).square().mean().sqrt().item()
    scale = y.detach().square().mean().sqrt().item()
    return difference / scale if scale else difference


def poison() -> None:
    """Make memory that was never written visible."""

    def filled(make):
        def call(*args, **options):
            x = make(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return call

    torch.empty, torch.empty_like = filled(torch.empty), filled(torch.empty_like)
    Tensor.new_empty = filled(Tensor.new_empty)


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = [Case(**x) for x in json.load(sys.stdin)]
    poison()
    print(json.dumps([run(case) for case in cases]))
