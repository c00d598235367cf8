"""The recurrent cells inside torch.compile, torch.export, the FLOP counter and autograd's corners."""

import io
import types
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

from vilma.testing import assert_close
from vilma.xlstm import rnn, rnn_cpu, rnn_operators, rnn_step, rnn_torch
from vilma.xlstm.rnn_naive import CELLS

cells = pytest.mark.parametrize("cell", CELLS)
FAST = ["torch"] + ["cpu"] * rnn_cpu.is_available()


class Mixer(nn.Module):
    """x (B, T, 8) -> (B, T, 24) through a cell of three heads, and its last state."""

    def __init__(self, cell="slstm", **options):
        super().__init__()
        kind = CELLS[cell]
        self.sizes = len(kind.wx), 3, 8
        self.projection = nn.Linear(8, len(kind.wx) * 3 * 8)
        self.r = nn.Parameter(torch.randn(3, 8, len(kind.r), 8) / 3)
        self.b = nn.Parameter(torch.randn(len(kind.b), 3, 8))
        self.options = {"cell": cell, **options}

    def forward(self, x, state=None):
        wx = self.projection(x).unflatten(-1, self.sizes)
        h, state = rnn(wx, self.r, self.b, state, return_state=True, **self.options)
        return h.flatten(2), state


OPTIONS = [{}, {"cell": "gru", "reverse": True, "grad_clip": 0.1}, {"cell": "lstm", "backend": "torch"}]


def check_compiled(options, backend):
    torch._dynamo.reset()
    plain = Mixer(**options)
    compiled = torch.compile(plain, fullgraph=True, backend=backend)
    for batch in (5,) if options else (2, 5):
        x = torch.randn(batch, 9, 8, requires_grad=True)
        found = []
        for module in (compiled, plain):
            h, state = module(x)
            loss = h.sum() + state[-1].square().sum()
            found.append((h, *torch.autograd.grad(loss, [x, *plain.parameters()])))
        for a, b in zip(*found):
            assert_close(a, b, 1e-5)
    with torch.no_grad():
        _, state = plain(x)
        for given in (None, state):
            (h, last), (expected, expected_last) = compiled(x, given), plain(x, given)
            assert_close(h, expected, 1e-5)
            for a, b in zip(last, expected_last, strict=True):
                assert_close(a, b, 1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiles_without_a_break(options):
    check_compiled(options, "aot_eager")


@pytest.mark.long
def test_compiles_to_code():
    check_compiled({}, "inductor")


def inputs_of(cell, batch=3, steps=9, heads=2, dim=5, state=True):
    """wx, r, b and the states, as one list."""
    kind = CELLS[cell]
    given = [
        torch.randn(batch, steps, len(kind.wx), heads, dim),
        torch.randn(heads, dim, len(kind.r), dim) / 3,
    ]
    given.append(torch.randn(len(kind.b), heads, dim))
    if state:
        given += [torch.rand(batch, heads, dim) + 1.0 for _ in kind.states]
    return given


@pytest.mark.parametrize("backend", FAST)
@cells
def test_step_compiles(cell, backend):
    torch._dynamo.reset()
    wx, *rest = inputs_of(cell)
    inputs = [wx[:, 0], *rest]

    def run(wx, r, b, *state):
        return rnn_step(wx, r, b, state, cell=cell, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(compiled(*inputs)[1], run(*inputs)[1], strict=True):
            assert_close(a, b, 1e-6)
    inputs = [x.requires_grad_() for x in inputs]
    for a, b in zip(*(torch.autograd.grad(f(*inputs)[0].sum(), inputs) for f in (compiled, run))):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_dynamic_batch_and_length(strict):
    module = Mixer().eval()
    sizes = {"x": {0: Dim("batch"), 1: Dim("steps", max=4096)}}
    with torch.no_grad():
        program = export(module, (torch.randn(2, 9, 8),), dynamic_shapes=sizes, strict=strict)
    assert [n for n in program.graph.nodes if n.target == torch.ops.vilma.rnn.default]
    for shape in ((1, 1, 8), (5, 300, 8)):
        x = torch.randn(shape)
        assert_close(program.module()(x)[0], module(x)[0], 1e-6)


def test_an_exported_program_can_be_trained():
    module = Mixer()
    program = export(module, (torch.randn(2, 9, 8),), dynamic_shapes={"x": {0: Dim("batch")}}).module()
    x = torch.randn(4, 9, 8)
    program(x)[0].sum().backward()
    expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    found = dict(program.named_parameters())
    for (name, _), b in zip(module.named_parameters(), expected, strict=True):
        assert_close(found[name].grad, b, 1e-5)


def test_an_exported_step_can_be_saved():
    class Step(nn.Module):
        def forward(self, wx, r, b, state):
            return rnn_step(wx, r, b, state)

    wx, r, b, *state = inputs_of("slstm")
    given = wx[:, 0], r, b, tuple(state)
    buffer = io.BytesIO()
    torch.export.save(export(Step(), given), buffer)
    buffer.seek(0)
    program = torch.export.load(buffer)
    for a, b in zip(program.module()(*given)[1], rnn_step(*given)[1], strict=True):
        assert_close(a, b, 1e-6)


def call_of(cell, backend, *, state, grad_clip=None, dtype=torch.float32):
    wx, r, b, *given = (x.to(dtype).requires_grad_() for x in inputs_of(cell, state=state))
    reset = torch.rand(3, 9) < 0.3 if state else None
    given = (*given, None, None, None, None)[:4]
    return wx, r, b if state else None, *given, reset, cell, state, grad_clip, backend, True, True


@pytest.mark.parametrize("backend", FAST)
@cells
def test_registrations(cell, backend):
    """Schema, fake implementation and autograd, as torch's own check sees them."""
    for state, dtype in ((True, torch.float32), (False, torch.bfloat16), (False, torch.float64)):
        call = call_of(cell, backend, state=state, grad_clip=0.1 if state else None, dtype=dtype)
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        torch.library.opcheck(torch.ops.vilma.rnn.default, call, test_utils=checks)
        outputs = [x.detach() for x in torch.ops.vilma.rnn(*call)]
        given = [x.detach() if isinstance(x, torch.Tensor) else x for x in call[:12]]
        grads = (torch.randn_like(outputs[0]), None, None, None, None)
        call = (*given, *grads, *outputs)
        torch.library.opcheck(torch.ops.vilma.rnn_backward.default, call, test_utils=checks)


def test_registration_with_dynamic_shapes():
    torch.library.opcheck(torch.ops.vilma.rnn.default, call_of("slstm", "auto", state=True))


@pytest.mark.parametrize("backend", FAST)
@cells
def test_registration_of_the_step(cell, backend):
    wx, r, b, *state = inputs_of(cell)
    state = (*state, None, None, None)[:4]
    torch.library.opcheck(torch.ops.vilma.rnn_step.default, (wx[:, 0], r, b, *state, cell, backend))
    none = (None,) * 4
    torch.library.opcheck(
        torch.ops.vilma.rnn_step.default, (wx[:, 0].bfloat16(), r, None, *none, cell, backend)
    )


def flops(run):
    with FlopCounterMode(display=False) as counter:
        found = run()
    return counter.get_total_flops(), found


@pytest.mark.parametrize("backend", FAST)
@cells
def test_flops_are_those_of_the_products_with_r(cell, backend):
    gates = len(CELLS[cell].r)
    wx, r, b, *state = (x.requires_grad_() for x in inputs_of(cell, 2, 7, 3, 5))
    one = 2 * 2 * 3 * gates * 5 * 5
    for given, steps in ((state, 7), (None, 6)):
        count, h = flops(lambda given=given: rnn(wx, r, b, given, cell=cell, backend=backend))
        assert count == steps * one
        count, _ = flops(lambda h=h: torch.autograd.grad(h.sum(), (wx, r)))
        assert count == 2 * steps * one
    with torch.no_grad():
        assert flops(lambda: rnn_step(wx[:, 0], r, b, state, cell=cell, backend=backend))[0] == one


@pytest.mark.parametrize("backend", FAST)
def test_second_derivative_is_refused(backend):
    inputs = [x.requires_grad_() for x in inputs_of("slstm", state=False)]
    h = rnn(*inputs, backend=backend)
    grads = torch.autograd.grad(h.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='naive'"):
        torch.autograd.grad(sum(x.square().sum() for x in grads), inputs)


@cells
def test_traces_with_gradients(cell):
    """torch.jit.trace checks what it recorded against a second trace, which it makes without gradients."""
    module, x = Mixer(cell), torch.randn(2, 9, 8)
    traced = torch.jit.trace(module, x)
    found = []
    for f in (traced, module):
        h, _ = f(x)
        found.append((h, *torch.autograd.grad(h.square().sum(), module.parameters())))
    for a, b in zip(*found):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", FAST)
@cells
def test_a_gradient_nobody_prepared_for(cell, backend):
    """The operator called without save=True, as a program exported for inference would."""
    *call, _ = call_of(cell, backend, state=True)
    inputs = [x for x in call if isinstance(x, torch.Tensor) and x.requires_grad]
    for a, b in zip(
        *(torch.autograd.grad(torch.ops.vilma.rnn(*call, save)[0].sum(), inputs) for save in (False, True))
    ):
        assert torch.equal(a, b)


def test_a_gpu_without_triton_says_so_once(monkeypatch):
    """The choice looks at a tensor's device and dtype only, so what stands for one will do."""
    monkeypatch.setattr(rnn_operators, "_why_no_triton", lambda device: "no triton here")
    rnn_operators._warn_of_the_loop.cache_clear()

    def choose(dtype):
        wx = types.SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert rnn_operators.backend_for("auto", wx) is rnn_torch
        return [str(warning.message) for warning in caught]

    assert choose(torch.float64) == []
    (said,) = choose(torch.bfloat16)
    assert "slower loop on this GPU: no triton here; install" in said
    assert choose(torch.float32) == []
    rnn_operators._warn_of_the_loop.cache_clear()
