"""The mLSTM inside torch.compile, torch.export, the FLOP counter and autograd's corners."""

import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

from vilma.testing import assert_close, random_mlstm, random_mlstm_state
from vilma.xlstm import mlstm, mlstm_step


class Mixer(nn.Module):
    """x (B, T, 8) -> (B, T, 32) through an mLSTM of four heads, and its last state."""

    def __init__(self, **options):
        super().__init__()
        self.projection = nn.Linear(8, 3 * 32 + 2 * 4)
        self.options = options

    def forward(self, x, state=None):
        q, k, v, gates = self.projection(x).split((32, 32, 32, 8), -1)
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in (q, k, v))
        i, f = gates.transpose(1, 2).split(4, 1)
        h, state = mlstm(q, k, v, i, f, state, return_state=True, **self.options)
        return h.transpose(1, 2).flatten(2), state


OPTIONS = [{}, {"gate": "sigmoid", "reverse": True, "chunk_size": 4}, {"backend": "torch"}]


def check_compiled(options, backend):
    torch._dynamo.reset()
    plain = Mixer(**options)
    compiled = torch.compile(plain, fullgraph=True, backend=backend)
    for batch in (5,) if options else (2, 5):
        x = torch.randn(batch, 9, 8, requires_grad=True)
        results = []
        for module in (compiled, plain):
            h, state = module(x)
            loss = h.sum() + state.c.square().sum()
            results.append((h, *torch.autograd.grad(loss, [x, *plain.parameters()])))
        for a, b in zip(*results):
            assert_close(a, b, 1e-5)
    with torch.no_grad():
        _, state = plain(x)
        for given in (None, state):
            (h, last), (expected, expected_last) = compiled(x, given), plain(x, given)
            assert_close(h, expected, 1e-5)
            assert_close(last.c, expected_last.c, 1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiles_without_a_break(options):
    check_compiled(options, "aot_eager")


@pytest.mark.long
def test_compiles_to_code():
    check_compiled({}, "inductor")


def step_inputs():
    inputs = [x[:, :, 0] for x in random_mlstm(3, 2, 1, 5, 6)]
    _, state = mlstm_step(*inputs)
    return inputs, state


@pytest.mark.parametrize("backend", ["auto", "torch", "cpu"])
def test_step_compiles(backend):
    torch._dynamo.reset()
    inputs, state = step_inputs()

    def run(*given):
        return mlstm_step(*given, state, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs)[0], run(*inputs)[0], 1e-6)
    inputs = [x.requires_grad_() for x in inputs]
    for a, b in zip(*(torch.autograd.grad(f(*inputs)[0].sum(), inputs) for f in (compiled, run))):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_dynamic_batch_and_length(strict):
    module = Mixer().eval()
    sizes = {"x": {0: Dim("batch"), 1: Dim("steps", max=4096)}}
    with torch.no_grad():
        program = export(module, (torch.randn(2, 9, 8),), dynamic_shapes=sizes, strict=strict)
    assert [n for n in program.graph.nodes if n.target == torch.ops.vilma.mlstm.default]
    for shape in ((1, 1, 8), (5, 300, 8)):
        x = torch.randn(shape)
        assert_close(program.module()(x)[0], module(x)[0], 1e-6)


def test_an_exported_program_can_be_trained():
    module = Mixer()
    program = export(module, (torch.randn(2, 9, 8),), dynamic_shapes={"x": {0: Dim("batch")}}).module()
    x = torch.randn(4, 9, 8)
    program(x)[0].sum().backward()
    expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    for a, b in zip(program.parameters(), expected):
        assert_close(a.grad, b, 1e-5)


def test_an_exported_step_can_be_saved():
    class Step(nn.Module):
        def forward(self, q, k, v, i, f, state):
            return mlstm_step(q, k, v, i, f, state)

    inputs, state = step_inputs()
    buffer = io.BytesIO()
    torch.export.save(export(Step(), (*inputs, state)), buffer)
    buffer.seek(0)
    program = torch.export.load(buffer)
    for a, b in zip(program.module()(*inputs, state)[1], mlstm_step(*inputs, state)[1]):
        assert_close(a, b, 1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_a_dynamic_length_where_parameters_learn(strict):
    module = Mixer()
    steps = Dim("T", min=2, max=4096)
    program = export(module, (torch.randn(2, 9, 8),), dynamic_shapes={"x": {1: steps}}, strict=strict)
    x = torch.randn(2, 700, 8)
    h, expected = program.module()(x)[0], module(x)[0]
    assert_close(h, expected, 1e-6)
    parameters = list(module.parameters())
    expected = torch.autograd.grad(expected.sum(), parameters)
    h.sum().backward()
    for a, b in zip(parameters, expected):
        assert_close(a.grad, b, 1e-5)


def calls():
    inputs = [x.requires_grad_() for x in random_mlstm(2, 3, 7, 5, 6)]
    state = [x.requires_grad_() for x in random_mlstm_state(2, 3, 5, 6)]
    reset = torch.rand(2, 7) < 0.3
    none = (None,) * 3
    yield *inputs, *state, reset, True, True, True, 3, 1e-6, "auto", True, True
    yield *inputs, *none, None, False, False, False, None, 1e-6, "torch", False, True


ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# what an operator does with strides and aliases
LAYOUT_CHECKS = ("test_schema", "test_faketensor")


def check_registrations(call, checks=ALL_CHECKS):
    """Schema, fake implementation and autograd, as torch's own check sees them."""
    torch.library.opcheck(torch.ops.vilma.mlstm.default, call, test_utils=checks)
    outputs = [x.detach() for x in torch.ops.vilma.mlstm(*call)]
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in call[:15]]
    last = [torch.randn_like(x) if call[15] and x.numel() else None for x in outputs[1:4]]
    call = (*given, torch.randn_like(outputs[0]), *last, None, *outputs[1:])
    torch.library.opcheck(torch.ops.vilma.mlstm_backward.default, call, test_utils=checks)


@pytest.mark.parametrize("index", [0, 1])
def test_registrations(index):
    check_registrations(list(calls())[index])


LAYOUTS = {
    "one feature": lambda x: x[..., :1],
    "time first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one feature, time first": lambda x: (x[..., :1] if x.dim() == 4 else x).mT.contiguous().mT,
    "one feature of time first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)[..., :1],
    "every other": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2],
    "features first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize("backend, dtype", [("torch", torch.float64), ("auto", torch.float32)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_registrations_of_any_layout(layout, backend, dtype):
    q, k, v, *gates = random_mlstm(2, 3, 7, 4, 6, dtype=dtype)
    qkv = [LAYOUTS[layout](x) for x in (q, k, v)]
    gates = [x.mT.contiguous().mT for x in gates]
    state = random_mlstm_state(2, 3, qkv[0].shape[-1], qkv[2].shape[-1], dtype=dtype)
    state = [x.mT.contiguous().mT for x in state]
    inputs = [x.detach().requires_grad_() for x in (*qkv, *gates, *state)]
    call = (*inputs, None, True, True, False, 3, 1e-6, backend, True, True)
    check_registrations(call, ALL_CHECKS if layout == "one feature of time first" else LAYOUT_CHECKS)
    step = [x.detach()[:, :, 0] for x in inputs[:5]]
    step = (*step, *(x.detach() for x in inputs[5:]), True, True, 1e-6, backend)
    torch.library.opcheck(torch.ops.vilma.mlstm_step.default, step, test_utils=LAYOUT_CHECKS)


def test_a_forced_backend_is_checked_where_a_gradient_is_wanted():
    inputs = [x[:, :, 0].requires_grad_() for x in random_mlstm(1, 1, 1, 3, 3)]
    with pytest.raises(RuntimeError, match="backend 'triton' is not available"):
        mlstm_step(*inputs, backend="triton")


def test_registration_of_the_step():
    inputs, state = step_inputs()
    torch.library.opcheck(torch.ops.vilma.mlstm_step.default, (*inputs, *state, True, True, 1e-6, "auto"))


def flops(run):
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_flops_are_those_of_the_causal_half(backend):
    inputs = [x.requires_grad_() for x in random_mlstm(2, 4, 196, 96, 96)]
    count, h = flops(lambda: mlstm(*inputs, backend=backend))
    pairs = 196 * 197 // 2
    assert count == 2 * 4 * 2 * pairs * (96 + 96)
    count, _ = flops(lambda: torch.autograd.grad(h.sum(), inputs))
    assert count == 2 * 4 * 2 * pairs * 5 * 96
    # two chunks of three steps and one of one; the state is written in six steps and read in four
    small = random_mlstm(1, 1, 7, 5, 6)
    count, _ = flops(lambda: mlstm(*small, chunk_size=3, backend=backend))
    assert count == 2 * ((6 + 6 + 1) * (5 + 6) + (6 + 4) * 5 * 6)
    count, _ = flops(lambda: mlstm(*small, return_state=True, backend=backend))
    assert count == 2 * (7 * 8 // 2 * (5 + 6) + 7 * 5 * 6)


def test_flops_of_long_sequences_are_linear():
    a, b = (flops(lambda t=t: mlstm(*random_mlstm(1, 1, t, 16, 16)))[0] for t in (2048, 4096))
    assert b == pytest.approx(2 * a, rel=0.02)


def test_flops_of_a_step():
    inputs, state = step_inputs()
    assert flops(lambda: mlstm_step(*inputs, state))[0] == 4 * 3 * 2 * 5 * 6


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_forward_mode_is_refused(backend):
    inputs = random_mlstm(1, 1, 4, 3, 3)
    for run, given in ((mlstm, inputs), (mlstm_step, [x[:, :, 0] for x in inputs])):
        for at in range(5):
            with forward_ad.dual_level():
                run(*given, backend=backend)
                dual = list(given)
                dual[at] = forward_ad.make_dual(given[at], torch.ones_like(given[at]))
                with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*backend='naive'"):
                    run(*dual, backend=backend)
                h = run(*dual, backend="naive")
                assert forward_ad.unpack_dual(h if run is mlstm else h[0]).tangent.any()


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_second_derivative_is_refused(backend):
    inputs = [x.requires_grad_() for x in random_mlstm(1, 1, 4, 3, 3)]
    h = mlstm(*inputs, backend=backend)
    grads = torch.autograd.grad(h.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='naive'"):
        torch.autograd.grad(sum(x.square().sum() for x in grads), inputs)


def test_a_gradient_nobody_prepared_for():
    """The operator called without save=True, as a program exported for inference would."""
    inputs = [x.requires_grad_() for x in random_mlstm(1, 2, 20, 4, 4)]
    call = (*inputs, None, None, None, None, True, True, False, 8, 1e-6, "auto", False)
    for a, b in zip(
        *(torch.autograd.grad(torch.ops.vilma.mlstm(*call, save)[0].sum(), inputs) for save in (False, True))
    ):
        assert torch.equal(a, b)


def test_traces_with_gradients():
    """torch.jit.trace checks what it recorded against a second trace, which it makes without gradients."""
    inputs = [x.requires_grad_() for x in random_mlstm(2, 2, 9, 4, 6)]
    traced = torch.jit.trace(mlstm, tuple(inputs))
    h, traced_h = mlstm(*inputs), traced(*inputs)
    assert torch.equal(traced_h, h)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (traced_h, h))):
        assert torch.equal(a, b)


INTERPRETED = """
import torch
from vilma.testing import random_mlstm, random_mlstm_state, rms_ratio
from vilma.xlstm import MLSTMState, mlstm, mlstm_step


def time_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]


worst = 0.0
for options in ({}, {"chunk_size": 16, "reverse": True}, {"gate": "sigmoid"}):
    inputs = [x.requires_grad_() for x in random_mlstm(1, 2, 20, 16, 16)]
    state = [x.requires_grad_() for x in random_mlstm_state(1, 2, 16, 16)] if "reverse" in options else []
    results = []
    for backend in ("triton", "torch"):
        given = MLSTMState(*state) if state else None
        h, last = mlstm(*inputs, given, return_state=True, backend=backend, **options)
        loss = h.sum() + sum(x.square().sum() for x in last if x is not None)
        grads = torch.autograd.grad(loss, [*inputs, *state])
        results.append([h, *grads])
        with torch.no_grad():
            step = mlstm_step(*(x[:, :, 0] for x in inputs), backend=backend)
            results[-1] += [step[0], step[1].c]
    worst = max([worst] + [rms_ratio(a, b) for a, b in zip(*results, strict=True)])
for layout, chunk_size in (
    (time_first, 4),
    (lambda x: x.mT.contiguous().mT, None),
    (lambda x: x.mT.contiguous().mT[..., :1], None),
):
    q, k, v, *gates = random_mlstm(2, 2, 7, 16, 16)
    inputs = [x.requires_grad_() for x in (*map(layout, (q, k, v)), *(x.mT.contiguous().mT for x in gates))]
    call = (*inputs, None, None, None, None, True, True, False, chunk_size, 1e-6, "triton", False, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vilma.mlstm.default, call, test_utils=tests)
    outputs = [x.detach() for x in torch.ops.vilma.mlstm(*call)]
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in call[:15]]
    call = (*given, torch.randn_like(outputs[0]), None, None, None, *outputs)
    torch.library.opcheck(torch.ops.vilma.mlstm_backward.default, call, test_utils=tests)
print(worst)
"""


def test_triton_through_the_operators():
    """The backend's adapter, in Triton's interpreter (chosen at import); the kernels have their own tests."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1e-5
