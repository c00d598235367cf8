"""The recurrent cells: every backend against the recurrence in float64, every option, errors."""

import itertools

import pytest
import torch

from vilma.testing import assert_close
from vilma.xlstm import rnn, rnn_cpu, rnn_step, rnn_torch
from vilma.xlstm.rnn_naive import CELLS, rnn_step_naive

needs_compiler = pytest.mark.skipif(not rnn_cpu.is_available(), reason="no C++ compiler (see the warning)")
cells = pytest.mark.parametrize("cell", CELLS)
fast = pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_compiler)])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def draw(cell, batch, steps, heads, dim, *, state=False, bias=True, seed=0, scale=1.0):
    """wx, r, b or None, and the states or None, float32."""
    generator = torch.Generator().manual_seed(seed)
    kind = CELLS[cell]

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    wx = scale * normal(batch, steps, len(kind.wx), heads, dim)
    r = normal(heads, dim, len(kind.r), dim) * dim**-0.5
    b = normal(len(kind.b), heads, dim) if bias else None
    given = None
    if state:
        given = [normal(batch, heads, dim) for _ in kind.states]
        if cell == "slstm":  # some below 1, where max(F n + I, 1) may stop the gradient, and some empty
            given[2] = given[2].abs() + 0.1
            given[2][..., 0], given[1][..., 0] = 0.0, 0.0
    return wx, r, b, given


def results(inputs, double=False, run=rnn, **options):
    """h, the last states and the gradient of every input, for one linear loss on all outputs, by name."""
    wx, r, b, state = inputs
    dtype = torch.float64 if double else None
    wx, r, b = (x if x is None else x.to(dtype or x.dtype).detach().requires_grad_() for x in (wx, r, b))
    if state is not None:
        state = [x.to(dtype or x.dtype).detach().requires_grad_() for x in state]
    h, last = run(wx, r, b, state, return_state=True, **options)
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
        for x in (h, *last)
    )
    given = {"wx": wx, "r": r, "b": b} | {f"{name}0": x for name, x in zip("hcnm", state or ())}
    given = {name: x for name, x in given.items() if x is not None}
    grads = torch.autograd.grad(loss, list(given.values()))
    found = {"h": h} | {f"{name}_last": x for name, x in zip("hcnm", last)}
    return found | {f"d{name}": x for name, x in zip(given, grads)}


def assert_same(actual, expected, ratio):
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert_close(x, expected[name], ratio, name)


SHAPES = [
    (2, 1, 1, 3),
    (1, 37, 2, 16),
    (3, 40, 2, 20),
    (5, 9, 3, 24),
    (9, 34, 1, 33),
    (33, 5, 2, 8),
    (1, 1, 1, 1),
]


@fast
@cells
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(backend, cell, shape):
    """Every combination of direction, resets, initial state and bias, against the naive twin."""
    batch, steps = shape[:2]
    for reverse, with_reset, state, bias in itertools.product((False, True), repeat=4):
        inputs = draw(cell, *shape, state=state, bias=bias)
        reset = torch.rand(batch, steps) < 0.2 if with_reset else None
        options = {"cell": cell, "reverse": reverse, "reset": reset}
        expected = results(inputs, double=True, backend="naive", **options)
        assert_same(results(inputs, backend=backend, **options), expected, 2e-5)


@cells
@pytest.mark.parametrize("state, bias", [(False, True), (True, False)])
def test_torch_equals_naive_in_float64(cell, state, bias):
    steps = 2 * rnn_torch._BLOCK + 3
    inputs = draw(cell, 2, steps, 2, 3, state=state, bias=bias)
    for reverse, with_reset in itertools.product((False, True), repeat=2):
        reset = torch.rand(2, steps) < 0.1 if with_reset else None
        options = {"cell": cell, "reverse": reverse, "reset": reset}
        actual = results(inputs, double=True, backend="torch", **options)
        assert_same(actual, results(inputs, double=True, backend="naive", **options), 1e-12)


@cells
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_gradcheck(cell, backend):
    """Finite differences of h and of the last states, by every input."""
    for reverse, with_reset, state in itertools.product((False, True), repeat=3):
        wx, r, b, given = draw(cell, 2, 4, 1, 2, state=state)
        if cell == "slstm" and state:
            given[2] += 1.0  # away from the kinks
        inputs = [x.double().requires_grad_() for x in (wx, r, b, *(given or ()))]
        reset = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool) if with_reset else None

        def run(wx, r, b, *state, reverse=reverse, reset=reset):
            options = {"cell": cell, "reverse": reverse, "reset": reset, "backend": backend}
            h, last = rnn(wx, r, b, state or None, return_state=True, **options)
            return h, *last

        # every flag along random directions, one of them element by element
        whole = reverse and with_reset and state
        assert torch.autograd.gradcheck(run, inputs, fast_mode=not whole)


@cells
def test_naive_has_second_derivatives(cell):
    inputs = [x.double().requires_grad_() for x in draw(cell, 1, 3, 1, 2)[:3]]
    assert torch.autograd.gradgradcheck(lambda *given: rnn(*given, cell=cell, backend="naive"), inputs)


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
def test_equals_torch(cell):
    """torch.nn's own cells, whose gates come in another order and whose recurrence is dense."""
    kind = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}[cell]
    layer = kind(3, 5, batch_first=True)
    x = torch.randn(2, 7, 3)
    order = {"lstm": (0, 1, 2, 3), "gru": (2, 0, 1), "elman": (0,)}[cell]  # of their h-gates, in ours
    wx = (x @ layer.weight_ih_l0.T + layer.bias_ih_l0).view(2, 7, -1, 1, 5)
    r = layer.weight_hh_l0.view(-1, 5, 5)[list(order)].permute(2, 0, 1)[None]
    b = layer.bias_hh_l0.view(-1, 1, 5)[list(order)]
    if cell == "gru":
        # theirs mixes z the other way round: z h + (1 - z) n, with gates r, z, n
        b = torch.cat((b, torch.zeros(1, 1, 5)))
    for backend in ("naive", "torch", "auto"):
        assert_close(rnn(wx, r, b, cell=cell, backend=backend)[:, :, 0], layer(x)[0], 1e-6)


@fast
@cells
@directions
def test_split_anywhere_equals_whole(backend, cell, reverse):
    inputs = draw(cell, 2, 20, 2, 6, state=True)
    options = {"cell": cell, "reverse": reverse, "backend": backend}
    whole = results(inputs, **options)
    for cut in (1, 7, 16, 19):

        def split(wx, r, b, state, return_state, cut=cut, **options):
            first, second = slice(0, cut), slice(cut, None)
            if reverse:
                first, second = second, first
            h1, state = rnn(wx[:, first], r, b, state, return_state=True, **options)
            h2, state = rnn(wx[:, second], r, b, state, return_state=True, **options)
            return torch.cat((h2, h1) if reverse else (h1, h2), 1), state

        assert_same(results(inputs, run=split, **options), whole, 2e-5)


@pytest.mark.parametrize("backend", ["naive", "torch", pytest.param("cpu", marks=needs_compiler)])
@cells
@pytest.mark.parametrize("state", [False, True], ids=["zero", "state"])
def test_steps_equal_sequence(backend, cell, state):
    for dim in (6, 40):
        wx, r, b, given = draw(cell, 3, 9, 2, dim, state=state)
        h, last = rnn(wx, r, b, given, cell=cell, return_state=True, backend=backend)
        outputs = []
        for x in wx.unbind(1):
            h_t, given = rnn_step(x, r, b, given, cell=cell, backend=backend)
            outputs.append(h_t)
        assert_close(torch.stack(outputs, 1), h, 1e-6)
        for x, y in zip(given, last, strict=True):
            assert_close(x, y, 1e-6)


@fast
@cells
def test_step_has_gradients(backend, cell):
    wx, r, b, state = draw(cell, 2, 1, 2, 5, state=True)
    options = {"cell": cell, "backend": backend}

    def step(wx, r, b, state, return_state, **options):
        h, state = rnn_step(wx[:, 0], r, b, state, **options)
        return h[:, None], state

    expected = results((wx, r, b, state), double=True, cell=cell, backend="naive")
    assert_same(results((wx, r, b, state), run=step, **options), expected, 1e-5)


@fast
@cells
@directions
def test_reset_equals_separate_sequences(backend, cell, reverse):
    wx, r, b, state = draw(cell, 2, 21, 2, 5, state=True)
    reset = torch.zeros(2, 21, dtype=torch.bool)
    reset[:, [4, 5, 13]] = True
    options = {"cell": cell, "reverse": reverse, "backend": backend}

    def separate(wx, r, b, state, return_state, **options):
        pieces = list(wx.split([4, 1, 8, 8], 1))
        order = range(3, -1, -1) if reverse else range(4)
        outputs = [None] * 4
        for j in order:
            outputs[j], last = rnn(pieces[j], r, b, state, return_state=True, **options)
            state = None
        return torch.cat(outputs, 1), last

    wx, r, b, state = inputs = (wx, r, b, state)
    actual, expected = results(inputs, reset=reset, **options), results(inputs, run=separate, **options)
    assert_same(actual, expected, 2e-5)


@fast
@cells
def test_reset_of_the_first_step_drops_the_state(backend, cell):
    wx, r, b, state = draw(cell, 2, 6, 2, 5, state=True)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[:, 0] = True
    options = {"cell": cell, "backend": backend}
    h = rnn(wx, r, b, state, reset=reset, **options)
    assert_close(h, rnn(wx, r, b, **options), 1e-6)
    found = results((wx, r, b, state), reset=reset, **options)
    assert all((x == 0).all() for name, x in found.items() if name.endswith("0"))
    # in reverse the first step is the last one that is run, and nothing comes after it
    h = rnn(wx, r, b, state, reset=reset, reverse=True, **options)
    assert_close(h, rnn(wx, r, b, state, reverse=True, **options), 1e-6)


@fast
@cells
def test_reverse_equals_flipped(backend, cell):
    wx, r, b, state = draw(cell, 2, 20, 2, 5, state=True)

    def flipped(wx, r, b, state, return_state, **options):
        h, last = rnn(wx.flip(1), r, b, state, return_state=True, **options)
        return h.flip(1), last

    options = {"cell": cell, "backend": backend}
    expected = results((wx, r, b, state), run=flipped, **options)
    assert_same(results((wx, r, b, state), reverse=True, **options), expected, 1e-5)


@pytest.mark.parametrize("backend", ["naive", "torch", pytest.param("cpu", marks=needs_compiler)])
@cells
@directions
def test_grad_clip_clips_at_every_step(backend, cell, reverse):
    """What comes through r is clamped before anything is added: by hand, with autograd step by step."""
    wx, r, b, state = draw(cell, 2, 7, 2, 5, state=True)
    w = torch.randn(2, 7, 2, 5)
    bound = 0.05

    def clipped_by_hand():
        leaves = [x.double().requires_grad_() for x in (wx, r, b, *state)]
        x, r_, b_, *given = leaves
        reads, states, outputs = [], [tuple(given)], []
        order = range(6, -1, -1) if reverse else range(7)
        for t in order:
            h, *rest = states[-1]
            reads.append(h.detach().clone().requires_grad_())  # what r reads is cut from the graph
            own = [y.detach().requires_grad_() for y in (h, *rest)]
            states[-1] = (states[-1], own)
            outputs.append(step_with(x[:, t], r_, b_, own, reads[-1], cell))
            states.append(outputs[-1])
        grads = [torch.zeros_like(y) for y in states[-1]]
        total = [torch.zeros_like(y) for y in (x, r_, b_)]
        for t, output, read, (_, own) in reversed(list(zip(order, outputs, reads, states))):
            grads[0] = grads[0] + w[:, t]
            found = torch.autograd.grad(output, [x, r_, b_, read, *own], grads, allow_unused=True)
            found = [torch.zeros((), dtype=torch.float64) if y is None else y for y in found]
            total = [a + y for a, y in zip(total, found)]
            through = found[3].clamp(-bound, bound)
            grads = [y + torch.zeros_like(z) for y, z in zip(found[4:], own)]
            grads[0] = grads[0] + through
        return [*total, *grads]

    expected = clipped_by_hand()
    inputs = [x.clone().requires_grad_() for x in (wx, r, b, *state)]
    options = {"cell": cell, "reverse": reverse, "backend": backend}
    h = rnn(*inputs[:3], inputs[3:], grad_clip=bound, **options)
    actual = torch.autograd.grad(h, inputs, w)
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y, 1e-5)
    h = rnn(*inputs[:3], inputs[3:], **options)
    free = torch.autograd.grad(h, inputs, w)
    assert (free[0] - actual[0]).norm() > 0.05 * free[0].norm()


def step_with(wx, r, b, state, read, cell):
    """A step in which r reads `read` and everything else the state."""
    recurrent = torch.einsum("bhi,higo->bgho", read, r)
    zero = torch.zeros_like(r)
    if cell == "gru":
        shifted = b[:3] + recurrent  # (B, 3, H, D)
        g, rr, rz = shifted.unbind(1)
        z = torch.sigmoid(wx[:, 1] + rz)
        n = torch.tanh(wx[:, 2] + b[3] + torch.sigmoid(wx[:, 0] + rr) * g)
        return (z * state[0] + (1 - z) * n,)
    return rnn_step_naive(wx + recurrent, zero, b, state, cell, None)


@fast
@cells
def test_grad_clip_of_zero_cuts_and_of_much_does_nothing(backend, cell):
    inputs = draw(cell, 2, 20, 2, 5, state=True)
    reset = torch.rand(2, 20) < 0.1
    for clip in (0.0, 1e-2, 1e6):
        options = {"cell": cell, "grad_clip": clip, "reset": reset}
        expected = results(inputs, double=True, backend="naive", **options)
        assert_same(results(inputs, backend=backend, **options), expected, 2e-5)
    options = {"cell": cell, "reset": reset, "backend": backend}
    expected = results(inputs, **options)
    assert_same(results(inputs, grad_clip=1e6, **options), expected, 1e-7)


@pytest.mark.parametrize("backend", ["naive", "torch", pytest.param("cpu", marks=needs_compiler)])
@cells
def test_extreme_gates(backend, cell):
    gates = CELLS[cell].wx
    kinds = [{}] + [{name: value} for name in gates for value in (-30.0, 30.0, -200.0, 200.0)]
    for fixed in kinds:
        wx, r, b, state = draw(cell, 2, 40, 2, 8, scale=1.0 if fixed else 30.0)
        for name, value in fixed.items():
            wx[:, :, gates.index(name)] = value
        found = results((wx, r, b, state), cell=cell, backend=backend)
        assert all(torch.isfinite(x).all() for x in found.values()), fixed
        if all(abs(value) == 30.0 for value in fixed.values()):
            expected = results((wx, r, b, state), double=True, cell=cell, backend="naive")
            # in absolute terms: a GRU that keeps its zero state has h = 1e-13
            assert torch.allclose(found["h"].double(), expected["h"], rtol=1e-4, atol=1e-5), fixed


@pytest.mark.parametrize("backend", ["naive", "torch", pytest.param("cpu", marks=needs_compiler)])
@pytest.mark.parametrize("state", [False, True], ids=["zero", "state"])
@directions
def test_infinite_input_gates(backend, state, reverse):
    """A step that is masked or that replaces all: as a gate of 1e4, gradients included, and never NaN."""
    infinite, r, b, given = draw("slstm", 2, 20, 2, 8, state=state)
    large = infinite.clone()
    for t, sign in ((0, -1.0), (4, -1.0), (9, 1.0), (12, -1.0), (19, -1.0)):
        infinite[:, t, 0], large[:, t, 0] = sign * torch.inf, sign * 1e4
    for cut in (20, 11):  # at 11 what is left begins with an m that is infinite, or about to be

        def run(wx, r, b, state, return_state, cut=cut, **options):
            parts = [x for x in wx.split([cut, 20 - cut], 1) if x.shape[1]]
            found = {}
            for j in range(len(parts))[:: -1 if reverse else 1]:
                found[j], state = rnn(parts[j], r, b, state, return_state=True, reverse=reverse, **options)
            return torch.cat([found[j] for j in range(len(parts))], 1), state[:3]

        found = results((infinite, r, b, given), run=run, backend=backend)
        expected = results((large, r, b, given), run=run, double=True, backend="naive")
        assert_same(found, expected, 1e-5)


@fast
def test_slstm_from_an_infinite_m(backend):
    """What a step with an infinite input gate leaves behind."""
    wx, r, b, (h, c, n, _) = draw("slstm", 2, 9, 2, 8, state=True)
    for sign in (-1.0, 1.0):
        found, expected = (
            rnn(wx, r, b, (h, c, n + 1.0, torch.full_like(c, sign * m)), backend=backend)
            for m in (torch.inf, 1e4)
        )
        assert_close(found, expected, 1e-6)


@fast
def test_slstm_from_very_negative_input_gates(backend):
    """From zero the first m is i itself: the forget factor exp(log f - i) must not overflow on its zero."""
    wx, r, b, _ = draw("slstm", 2, 8, 1, 200)
    wx[:, :, 0] = -torch.linspace(60.0, 200.0, 200)
    b[0] = 0.0
    found = results((wx, 0.1 * r, b, None), backend=backend)
    expected = results((wx, 0.1 * r, b, None), double=True, backend="naive")
    assert_same(found, expected, 1e-4)


@fast
@cells
def test_small_numbers_keep_their_precision(backend, cell):
    """tanh near 0 must not be a difference of numbers near 1."""
    wx, r, _, _ = draw(cell, 2, 1, 1, 64, scale=1e-5)
    expected = rnn(wx.double(), r.double(), cell=cell, backend="naive")
    assert_close(rnn(wx, r, cell=cell, backend=backend), expected, 1e-6)


@fast
@cells
def test_nan_is_not_hidden(backend, cell):
    wx, r, b, _ = draw(cell, 2, 10, 1, 4)
    for gate in range(wx.shape[2]):
        spoiled = wx.clone()
        spoiled[0, 6, gate, 0, 1] = float("nan")
        h = rnn(spoiled, r, b, cell=cell, backend=backend)
        assert torch.isfinite(h[:, :6]).all() and torch.isfinite(h[1]).all() and h[0, 6, 0, 1].isnan()


def layouts():
    wx, r, b, state = draw("slstm", 2, 20, 3, 8, state=True)
    projected = torch.randn(2, 20, 3 * 4 * 8).unflatten(-1, (3, 4, 8)).transpose(2, 3)
    wide = torch.randn(2, 20, 4, 3, 16)
    yield projected, r.transpose(1, 3).contiguous().transpose(1, 3), b, state
    yield wide[..., ::2], r, b.transpose(1, 2).contiguous().transpose(1, 2), state
    yield wx.transpose(0, 1).contiguous().transpose(0, 1), r, b, [x.mT.contiguous().mT for x in state]
    yield wx[:, :1].expand(2, 20, 4, 3, 8), r[:1].expand(3, 8, 4, 8), b[:, :, :1].expand(4, 3, 8), state
    yield torch.randn(2, 20, 8, 4, 3).permute(0, 1, 3, 4, 2), r, b, state


@fast
@pytest.mark.parametrize("index", range(5))
def test_layouts(backend, index):
    """Any strides: bit for bit what contiguous tensors give."""
    wx, r, b, state = list(layouts())[index]
    same = wx.contiguous(), r.contiguous(), b.contiguous(), [x.contiguous() for x in state]
    expected = results(same, backend=backend)
    for name, x in results((wx, r, b, state), backend=backend).items():
        assert torch.equal(x, expected[name]), name


@fast
@cells
@pytest.mark.parametrize("dtype, ratio", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(backend, cell, dtype, ratio):
    wx, r, b, state = draw(cell, 2, 40, 2, 16, state=True)
    inputs = (wx.to(dtype), r.to(dtype), b, [x.to(dtype) for x in state])
    actual = results(inputs, cell=cell, backend=backend)
    expected = results(inputs, double=True, cell=cell, backend="naive")
    assert actual["h"].dtype == actual["dwx"].dtype == actual["dr"].dtype == actual["dh0"].dtype == dtype
    assert actual["db"].dtype == actual["h_last"].dtype == torch.float32
    for name, x in actual.items():
        assert_close(x, expected[name], 1e-5 if name.endswith("last") else ratio, name)
    # the sums are those of float32: only what is stored is rounded
    single = rnn(*(x.float() for x in inputs[:3]), [x.float() for x in inputs[3]], cell=cell, backend=backend)
    assert torch.equal(rnn(*inputs, cell=cell, backend=backend), single.to(dtype))


@fast
@cells
def test_only_what_is_used(backend, cell):
    """A loss on one output alone, and gradients of some inputs alone."""
    wx, r, b, state = draw(cell, 1, 12, 2, 5, state=True)
    for pick in range(1 + len(state)):
        found = {}
        for double, name in ((False, backend), (True, "naive")):
            dtype = torch.float64 if double else torch.float32
            given = [x.to(dtype, copy=True).requires_grad_() for x in (wx, r, b, *state)]
            h, last = rnn(*given[:3], given[3:], cell=cell, return_state=True, backend=name)
            loss = (h, *last)[pick].sin().sum()
            found[name] = torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
        for x, y in zip(found[backend], found["naive"]):
            assert torch.allclose(x.double(), y, rtol=1e-4, atol=1e-5)
    r.requires_grad_()
    rnn(wx, r, b, cell=cell, backend=backend).sum().backward()
    assert r.grad.abs().sum() > 0


@fast
@cells
def test_uninitialised_memory_is_never_read(backend, cell):
    poisoned = [x if x is None else torch.full_like(x, float("nan")) for x in draw(cell, 8, 40, 2, 40)[:3]]
    results((*poisoned, None), cell=cell, backend=backend)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(3).isnan().all()
        for state, steps in itertools.product((False, True), (1, 19)):
            inputs = draw(cell, 3, steps, 2, 7, state=state)
            found = results(inputs, cell=cell, backend=backend)
            assert all(torch.isfinite(x).all() for x in found.values())
            with torch.no_grad():
                h, last = rnn_step(inputs[0][:, 0], *inputs[1:], cell=cell, backend=backend)
            assert all(torch.isfinite(x).all() for x in (h, *last))
    finally:
        torch.use_deterministic_algorithms(False)


@fast
@cells
def test_inputs_and_states_stay_as_they_are(backend, cell):
    wx, r, b, state = draw(cell, 2, 9, 2, 5, state=True)
    before = [x.clone() for x in (wx, r, b, *state)]
    results((wx, r, b, state), cell=cell, backend=backend)
    for r_, name in ((r, backend), (r, "naive"), (r.clone().requires_grad_(), backend)):
        h, last = rnn_step(wx[:, 0], r_, b, state, cell=cell, backend=name)
        h.detach().zero_()
        assert last[0].abs().sum() > 0
    with torch.no_grad():
        h, last = rnn(wx, r, b, state, cell=cell, return_state=True, backend=backend)
        h.zero_()
        assert last[0].abs().sum() > 0
    for x, y in zip((wx, r, b, *state), before):
        assert torch.equal(x, y)


def test_autocast_is_kept_out():
    wx, r, b, _ = draw("slstm", 2, 9, 2, 8)
    for backend in ("naive", "torch", "auto"):
        expected = rnn(wx, r, b, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(rnn(wx, r, b, backend=backend), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cell": "rwkv"}, "cell='rwkv'; known cells: slstm, lstm, gru, elman"),
        ({"backend": "cuda"}, "backend='cuda'; known backends"),
        ({"wx": torch.ones(2, 3, 4, 2, 5, dtype=torch.long)}, r"wx has dtype torch.int64.*wx.float\(\)"),
        ({"wx": None}, "wx is a NoneType"),
        ({"wx": torch.ones(2, 4, 2, 5)}, r"wx has shape \(2, 4, 2, 5\); a sequence has \(B, T, G, H, D\)"),
        ({"wx": torch.ones(2, 0, 4, 2, 5)}, "every size must be at least 1"),
        ({"wx": torch.ones(2, 3, 3, 2, 5)}, r"3 gates; cell='slstm' has 4.*i, f, z, o"),
        ({"r": torch.ones(2, 5, 4, 6)}, r"r has shape \(2, 5, 4, 6\); pass \(H, D, G, D\) = \(2, 5, 4, 5\)"),
        ({"r": torch.ones(2, 5, 4, 5, dtype=torch.float64)}, "r has dtype float64 but wx has torch.float32"),
        ({"r": torch.ones(2, 5, 4, 5, device="meta")}, "r is on meta but wx is on cpu"),
        ({"b": torch.ones(4, 5, 2)}, r"b has shape \(4, 5, 2\); pass \(G, H, D\) = \(4, 2, 5\)"),
        ({"state": torch.ones(2, 2, 5)}, r"state is a Tensor.*takes a tuple \(h, c, n, m\)"),
        ({"state": (torch.ones(2, 2, 5),) * 2}, "state has 2 entries"),
        (
            {"state": (torch.ones(2, 2, 4),) * 4},
            r"state h has shape \(2, 2, 4\); pass \(B, H, D\) = \(2, 2, 5\)",
        ),
        ({"state": (torch.ones(2, 2, 5), None, None, None)}, "state c has shape NoneType"),
        ({"state": (torch.ones(2, 2, 5, dtype=torch.int32),) * 4}, "state h has dtype torch.int32"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"reset is torch.bool \(2, 4\); pass"),
        ({"reset": torch.zeros(2, 3)}, "reset is torch.float32"),
        ({"grad_clip": -1.0}, "grad_clip is -1.0"),
        ({"grad_clip": float("nan")}, "grad_clip is nan"),
        ({"grad_clip": "x"}, "grad_clip is 'x'; pass a number of 0 or more, or None"),
        ({"grad_clip": [1.0]}, r"grad_clip is \[1.0\]; pass a number"),
    ],
)
def test_errors(change, message):
    given = {"wx": torch.ones(2, 3, 4, 2, 5), "r": torch.ones(2, 5, 4, 5), **change}
    with pytest.raises(ValueError, match=message):
        rnn(**given)
    if "reset" in change or "grad_clip" in change:
        return
    if isinstance(given["wx"], torch.Tensor):
        if given["wx"].dim() == 4:
            return
        given["wx"] = given["wx"][:, 0] if given["wx"].shape[1] else torch.ones(2, 4, 0, 5)
    with pytest.raises(ValueError, match=message.split(";")[0].replace("2, 0, 4, 2, 5", "2, 4, 0, 5")):
        rnn_step(given.pop("wx"), **given)


def test_gru_has_a_bias_more():
    wx, r, b, _ = draw("gru", 2, 3, 1, 4)
    with pytest.raises(ValueError, match=r"b has shape \(3, 1, 4\).*G = g, r, z, n"):
        rnn(wx, r, b[:3], cell="gru")


def test_a_step_wants_one_step():
    wx, r, b, _ = draw("slstm", 2, 3, 1, 4)
    with pytest.raises(ValueError, match=r"one step has \(B, G, H, D\)"):
        rnn_step(wx, r, b)


def test_a_forced_backend_that_cannot_run():
    wx, r, b, _ = draw("slstm", 2, 3, 1, 4)
    with pytest.raises(RuntimeError, match="backend 'triton' is not available"):
        rnn(wx, r, b, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' is not available"):
        rnn_step(wx[:, 0], r.requires_grad_(), b, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: tensors are on meta"):
        rnn(wx.to("meta"), r.to("meta"), backend="cpu")
