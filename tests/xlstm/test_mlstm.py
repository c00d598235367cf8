"""What holds for the mLSTM whatever the numbers: splits, directions, resets, layouts, gradients, errors."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from vilma.testing import assert_close, random_mlstm, random_mlstm_state, rms_ratio
from vilma.xlstm import MLSTMState, mlstm, mlstm_cpu, mlstm_step
from vilma.xlstm.mlstm_naive import mlstm_parallel_naive

FORMS = [("exp", True), ("exp", False), ("sigmoid", True), ("sigmoid", False)]
forms = pytest.mark.parametrize("gate, normalize", FORMS)
needs_compiler = pytest.mark.skipif(not mlstm_cpu.is_available(), reason="no C++ compiler (see the warning)")
backends = pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_compiler)])


def state_for(gate, *sizes, dtype=torch.float64, seed=1):
    c, n, m = random_mlstm_state(*sizes, dtype=dtype, seed=seed)
    return MLSTMState(c, n, m if gate == "exp" else None)


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors if x is not None]


def outputs_and_gradients(run, inputs, seed=3):
    """Outputs of ``run(*inputs)``, and every input's gradient of a random combination of all of them."""
    inputs = leaves(inputs)
    outputs = [x for x in run(*inputs) if x is not None]
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in outputs
    )
    return outputs, torch.autograd.grad(loss, inputs, allow_unused=True)


def assert_same(run, reference, inputs, ratio):
    outputs, gradients = outputs_and_gradients(run, inputs)
    expected_outputs, expected_gradients = outputs_and_gradients(reference, inputs)
    assert len(outputs) == len(expected_outputs)
    for name, x, y in zip("hcnm", outputs, expected_outputs):
        assert_close(x, y, ratio, name)
    for name, x, y in zip("qkvifcnm", gradients, expected_gradients):
        if y is None:
            assert x is None or not x.any(), f"d{name} should be zero"
        elif name == "f":
            # df is a difference of terms of the size of di, and about zero where nothing is remembered
            scale = torch.stack((y, expected_gradients[3])).square().mean((1, 2, 3)).sqrt().max()
            assert (x - y).square().mean().sqrt() <= ratio * scale, "df"
        else:
            assert_close(x, y, ratio, f"d{name}")


def runner(gate, **options):
    """A function of q k v i f [c n [m]] that returns h and the last state as one tuple."""

    def run(q, k, v, i, f, *state):
        state = MLSTMState(*(*state, None)[:3]) if state else None
        h, last = mlstm(q, k, v, i, f, state, gate=gate, return_state=True, **options)
        return h, *last

    return run


@forms
@pytest.mark.parametrize("with_state", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
def test_gradcheck(gate, normalize, with_state, reverse, with_reset):
    for steps, chunk_size in ((1, None), (2, 1), (7, 3)):
        inputs = random_mlstm(2, 1, steps, 3, 2, dtype=torch.float64, seed=steps)
        reset = torch.tensor([[True], [False]]).expand(2, steps).clone() if with_reset else None
        if with_reset and steps > 2:
            reset[:, 1:] = False
            reset[0, 2], reset[1, 3] = True, True
        if with_state:
            inputs = (*inputs, *state_for(gate, 2, 1, 3, 2))
        run = runner(gate, normalize=normalize, reverse=reverse, reset=reset, chunk_size=chunk_size)
        outputs = lambda *given: tuple(x for x in run(*given) if x is not None)  # noqa: B023, E731
        assert torch.autograd.gradcheck(
            outputs, leaves(inputs), eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=steps > 2
        )


@forms
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("with_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("steps, chunk_size", [(1, None), (13, None), (13, 4), (13, 13), (32, 8), (33, 8)])
def test_torch_equals_naive(gate, normalize, reverse, with_reset, steps, chunk_size):
    inputs = (
        *random_mlstm(3, 2, steps, 5, 7, dtype=torch.float64),
        *state_for(gate, 3, 2, 5, 7),
    )
    reset = torch.rand(3, steps) < 0.2 if with_reset else None
    options = {"normalize": normalize, "reverse": reverse, "reset": reset}
    assert_same(
        runner(gate, chunk_size=chunk_size, **options),
        runner(gate, backend="naive", **options),
        inputs,
        1e-10,
    )


def parallel(gate, normalize):
    """As `runner`, through the T x T matrix."""

    def run(q, k, v, i, f, *state):
        state = (*state, None)[:3]
        h, last = mlstm_parallel_naive(q, k, v, i, f, state, None, gate, normalize, False, 1e-6)
        return h, *last

    return run


def stepped(gate, normalize):
    """As `runner`, one `mlstm_step` after another."""

    def run(q, k, v, i, f, *state):
        state, h = MLSTMState(*(*state, None)[:3]), []
        for x in zip(*(x.unbind(2) for x in (q, k, v, i, f))):
            h_t, state = mlstm_step(*x, state, gate=gate, normalize=normalize)
            h.append(h_t)
        return torch.stack(h, 2), *state

    return run


def recurrence(gate, normalize):
    return runner(gate, normalize=normalize, backend="naive")


@forms
@pytest.mark.parametrize("path", [recurrence, parallel, stepped])
@pytest.mark.parametrize("steps", [1, 3])
def test_gradcheck_of_the_other_paths(gate, normalize, path, steps):
    inputs = (*random_mlstm(1, 1, steps, 3, 2, dtype=torch.float64), *state_for(gate, 1, 1, 3, 2))
    run = path(gate, normalize)
    outputs = lambda *given: tuple(x for x in run(*given) if x is not None)  # noqa: E731
    assert torch.autograd.gradcheck(
        outputs, leaves(inputs), eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=steps > 1
    )


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("gates", ["normal", "ip30", "im30", "fp30", "fm30", "mixed30"])
def test_gradient_through_eps_and_m(gates, eps):
    """A large eps, and gates at their ends, make what m adds to the gradient visible."""
    inputs = (
        *random_mlstm(2, 2, 11, 4, 6, dtype=torch.float64, gates=gates),
        *state_for("exp", 2, 2, 4, 6),
    )
    assert_same(runner("exp", eps=eps, chunk_size=4), runner("exp", eps=eps, backend="naive"), inputs, 1e-8)


@forms
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_split_anywhere_equals_whole(gate, normalize, reverse):
    steps = 11
    inputs = (*random_mlstm(2, 2, steps, 4, 6, dtype=torch.float64), *state_for(gate, 2, 2, 4, 6))
    whole = runner(gate, normalize=normalize, reverse=reverse)
    for cut in range(1, steps):

        def split(q, k, v, i, f, *state, cut=cut):
            first, second = slice(0, cut), slice(cut, None)
            if reverse:
                first, second = second, first
            h1, *state = whole(*(x[:, :, first] for x in (q, k, v, i, f)), *state)
            state = [x for x in state if x is not None]
            h2, *state = whole(*(x[:, :, second] for x in (q, k, v, i, f)), *state)
            return torch.cat((h2, h1) if reverse else (h1, h2), 2), *state

        assert_same(split, whole, inputs, 1e-9)


@forms
def test_steps_equal_sequence(gate, normalize):
    inputs = (*random_mlstm(2, 3, 9, 4, 6, dtype=torch.float64), *state_for(gate, 2, 3, 4, 6))
    assert_same(stepped(gate, normalize), runner(gate, normalize=normalize), inputs, 1e-10)


@forms
def test_reverse_equals_flip(gate, normalize):
    inputs = (*random_mlstm(2, 2, 21, 4, 6, dtype=torch.float64), *state_for(gate, 2, 2, 4, 6))

    def flipped(q, k, v, i, f, *state):
        h, *last = runner(gate, normalize=normalize)(*(x.flip(2) for x in (q, k, v, i, f)), *state)
        return h.flip(2), *last

    assert_same(runner(gate, normalize=normalize, reverse=True, chunk_size=8), flipped, inputs, 1e-10)


@forms
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_reset_equals_separate_sequences(gate, normalize, reverse, chunk_size):
    inputs = (*random_mlstm(1, 2, 15, 4, 6, dtype=torch.float64), *state_for(gate, 1, 2, 4, 6))
    begins = [0, 4, 5, 8, 14]
    reset = torch.zeros(1, 15, dtype=torch.bool)
    reset[0, begins[1:]] = True
    one = runner(gate, normalize=normalize, reverse=reverse)

    def separate(q, k, v, i, f, *state):
        pieces = [slice(a, b) for a, b in itertools.pairwise([*begins, 15])]
        entered = len(pieces) - 1 if reverse else 0
        results = [
            one(*(x[:, :, piece] for x in (q, k, v, i, f)), *(state if j == entered else ()))
            for j, piece in enumerate(pieces)
        ]
        return torch.cat([h for h, *_ in results], 2), *results[0 if reverse else -1][1:]

    packed = runner(gate, normalize=normalize, reverse=reverse, reset=reset, chunk_size=chunk_size)
    assert_same(packed, separate, inputs, 1e-10)


def test_reset_at_the_first_step_drops_the_state():
    inputs = random_mlstm(2, 1, 5, 3, 4)
    reset = torch.zeros(2, 5, dtype=torch.bool)
    reset[1, 0] = True
    state = state_for("exp", 2, 1, 3, 4, dtype=torch.float32)
    h = mlstm(*inputs, state, reset=reset)
    assert_close(h[:1], mlstm(*inputs, state)[:1], 1e-6)
    assert_close(h[1:], mlstm(*inputs)[1:], 1e-6)


@functools.cache
def extreme(gate, normalize, gates, steps):
    """Inputs, their outputs and gradients in float64, and the RMS ratios that are asked of each in float32.

    1e-4. But where all input gates are +30 the normaliser has no floor, and where it is about zero any
    rounding is multiplied: half the error of the recurrence in float32 is asked for there.
    """
    inputs = [x.float() for x in random_mlstm(1, 2, steps, 8, 8, dtype=torch.float64, gates=gates)]
    run = runner(gate, normalize=normalize, backend="naive")
    exact = outputs_and_gradients(run, [x.double() for x in inputs])
    limits = [[1e-4] * len(x) for x in exact]
    if gates == "ip30" and gate == "exp" and normalize:
        single = outputs_and_gradients(run, inputs)
        limits = [[max(1e-4, rms_ratio(x, y) / 2) for x, y in zip(*pair)] for pair in zip(single, exact)]
    return inputs, exact, limits


@pytest.mark.parametrize("gates", ["ip30", "im30", "fp30", "fm30", "mixed30"])
@forms
@backends
def test_extreme_gates_in_float32(gate, normalize, gates, backend):
    """Finite, and as accurate as ordinary ones: whole (T = 200) and in chunks (T = 300)."""
    run = runner(gate, normalize=normalize, backend=backend)
    for steps in (200, 300):
        inputs, (expected, expected_gradients), (limits, gradient_limits) = extreme(
            gate, normalize, gates, steps
        )
        actual, gradients = outputs_and_gradients(run, inputs)
        for name, x, y, limit in zip("hcnm", actual, expected, limits):
            assert_close(x, y, limit, name)
        for name, x, y, limit in zip("qkvi", gradients, expected_gradients, gradient_limits):
            assert_close(x, y, limit, f"d{name}")
        assert torch.isfinite(gradients[4]).all()
        error = (gradients[4] - expected_gradients[4]).abs().max()
        scale = max(expected_gradients[4].abs().max(), expected_gradients[3].abs().max())
        assert error <= gradient_limits[4] * scale


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
@backends
def test_minus_infinity_closes_a_gate(gate, backend):
    """i = -inf: the step writes nothing. f = -inf: nothing older is left."""
    q, k, v, i, f = random_mlstm(1, 1, 12, 4, 4)
    i[..., 3] = float("-inf")
    f[..., 7] = float("-inf")
    options = {"gate": gate, "backend": backend}
    outputs, gradients = outputs_and_gradients(runner(**options), (q, k, v, i, f))
    assert all(torch.isfinite(x).all() for x in (*outputs, *gradients))
    v2 = v.clone()
    v2[:, :, 3] += 1.0
    assert torch.equal(mlstm(q, k, v, i, f, **options), mlstm(q, k, v2, i, f, **options))
    after = mlstm(*(x[:, :, 7:] for x in (q, k, v, i, f)), normalize=False, **options)
    assert_close(mlstm(q, k, v, i, f, normalize=False, **options)[:, :, 7:], after, 1e-6)


@backends
def test_padding_leaves_the_last_state_exact(backend):
    q, k, v, i, f = random_mlstm(1, 2, 20, 4, 4)
    _, short = mlstm(*(x[:, :, :13] for x in (q, k, v, i, f)), return_state=True, backend=backend)
    i[..., 13:], f[..., 13:] = -1e30, 1e30
    _, padded = mlstm(q, k, v, i, f, return_state=True, backend=backend)
    for x, y in zip(padded, short):
        assert_close(x, y, 1e-6)


@pytest.mark.parametrize("chunk_size", [None, 8])
@backends
def test_c_and_n_are_in_units_of_the_m_returned(chunk_size, backend):
    """m is rounded to float32 when it is handed on; C and n must be scaled by what was handed on."""
    q, k, v, i, f = random_mlstm(1, 3, 64, 4, 4)
    state = state_for("exp", 1, 3, 4, 4, dtype=torch.float32)
    options = {"return_state": True, "chunk_size": chunk_size, "backend": backend}
    _, last = mlstm(q, k, v, i - 300.0, f - 3.0, state, **options)
    unit = state.m.double() + F.logsigmoid((f - 3.0).double()).sum(-1)  # nothing was written: C exp(m) decays
    factor = torch.exp(unit - last.m.double())
    assert_close(last.c, state.c * factor[..., None, None], 1e-6)
    assert_close(last.n, state.n * factor[..., None], 1e-6)


@pytest.mark.parametrize("steps", [19, 300])
@backends
def test_layouts(steps, backend):
    """Strided, sliced, expanded and size-1 inputs give what contiguous ones give."""

    def check(*inputs):
        run = runner("exp", backend=backend)
        expected, expected_gradients = outputs_and_gradients(run, [x.contiguous() for x in inputs])
        leaf = [x.detach().requires_grad_() for x in inputs]
        outputs = run(*leaf)
        for x, y in zip(outputs, expected):
            assert_close(x, y, 1e-6)
        generator = torch.Generator().manual_seed(3)
        loss = sum(
            (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
            for x in outputs
        )
        for x, y in zip(torch.autograd.grad(loss, leaf), expected_gradients):
            assert_close(x, y, 1e-6)

    q, k, v, i, f = random_mlstm(2, 3, steps, 4, 8)
    fused = torch.randn(2, steps, 3 * (4 + 4 + 8))
    q2, k2, v2 = (x.unflatten(-1, (3, -1)).transpose(1, 2) for x in fused.split((12, 12, 24), -1))
    gates = torch.randn(2, steps, 6).transpose(1, 2)
    check(q2, k2, v2, gates[:, :3], gates[:, 3:])
    check(q.transpose(2, 3).contiguous().transpose(2, 3), k, v[..., ::2], i, f)
    check(
        q[:1, :1].expand(2, 3, -1, -1),
        k,
        v[:, :, :1].expand(-1, -1, steps, -1),
        i,
        f[:, :1].expand(-1, 3, -1),
    )
    check(*(x[:1, :, :1] for x in (q, k, v, i, f)))
    check(q[..., :1], k[..., :1], v[..., :1], i, f)
    check(*(x[:, :1] for x in (q, k, v, i, f)))


def test_h_takes_the_layout_of_v():
    q, k, v, i, f = random_mlstm(2, 3, 5, 4, 8)
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    assert mlstm(q, k, v, i, f).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype, ratio", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_half_precision(dtype, ratio, backend):
    inputs = [x.to(dtype) for x in random_mlstm(2, 2, 300, 16, 16)]
    run = runner("exp", backend=backend)
    outputs, gradients = outputs_and_gradients(run, inputs)
    expected, expected_gradients = outputs_and_gradients(run, [x.double() for x in inputs])
    assert [x.dtype for x in outputs] == [dtype, *[torch.float32] * 3]
    for name, x, y in zip("hcnm", outputs, expected):
        assert_close(x, y, ratio if name == "h" else 1e-5, name)
    for name, x, y in zip("qkvif", gradients, expected_gradients):
        assert x.dtype == dtype
        assert_close(x, y, ratio, f"d{name}")


def one_step(q, k, v, i, f):
    h, state = mlstm_step(*(x[:, :, 0] for x in (q, k, v, i, f)))
    return h, *state


RUNS = {name: runner("exp", backend=name) for name in ("torch", "cpu", "naive")} | {"step": one_step}


@pytest.mark.parametrize("name", [pytest.param(x, marks=needs_compiler) if x == "cpu" else x for x in RUNS])
def test_autocast_changes_nothing_inside(name):
    run = RUNS[name]
    inputs = random_mlstm(2, 2, 20, 16, 16)
    plain, plain_gradients = outputs_and_gradients(run, inputs)

    def under_autocast(*given):
        with torch.autocast("cpu", torch.bfloat16):
            return run(*given)

    outputs, gradients = outputs_and_gradients(under_autocast, inputs)
    for x, y in zip((*outputs, *gradients), (*plain, *plain_gradients)):
        assert torch.equal(x, y)
    if name in ("torch", "cpu"):  # also around the backward, which is theirs
        with torch.autocast("cpu", torch.bfloat16):
            outputs, gradients = outputs_and_gradients(run, inputs)
        for x, y in zip((*outputs, *gradients), (*plain, *plain_gradients)):
            assert torch.equal(x, y)


def test_float64_stays_float64():
    inputs = random_mlstm(1, 1, 5, 3, 4, dtype=torch.float64)
    h, last = mlstm(*inputs, return_state=True)
    assert {x.dtype for x in (h, *last)} == {torch.float64}


@backends
def test_kept_for_backward_is_linear_in_time(backend):
    def kept(steps):
        inputs = leaves(random_mlstm(1, 2, steps, 32, 32))
        total, seen = 0, {x.data_ptr() for x in inputs}

        def pack(x):
            nonlocal total
            if x.data_ptr() not in seen:
                seen.add(x.data_ptr())
                total += x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            mlstm(*inputs, backend=backend)
        return total

    sizes = {steps: kept(steps) for steps in (512, 1024, 2048, 4096)}
    print("bytes kept beside the arguments:", sizes)
    for a, b in itertools.pairwise(sizes.values()):
        assert b <= 2.2 * a


def test_unused_outputs_and_inputs_without_gradient():
    q, k, v, i, f = random_mlstm(1, 2, 9, 4, 4, dtype=torch.float64)
    for pick in range(4):
        grads = {}
        for backend in ("torch", "naive"):
            inputs = leaves((q, k, v, i, f))
            h, last = mlstm(*inputs, return_state=True, backend=backend, chunk_size=4)
            (h, *last)[pick].sin().sum().backward()
            grads[backend] = [x.grad for x in inputs]
        for x, y in zip(grads["torch"], grads["naive"]):
            y = torch.zeros_like(x) if y is None else y
            assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)
    w = v.clone().requires_grad_()
    mlstm(q, k, w, i, f).sum().backward()
    assert w.grad.abs().sum() > 0


def test_second_derivative_is_refused():
    """Also where the gradient would otherwise count as a constant: as one term of a larger loss."""
    inputs = leaves(random_mlstm(1, 1, 4, 3, 3))
    for given in inputs:
        (grad,) = torch.autograd.grad(mlstm(*inputs).sum(), given, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivative.*backend='naive'"):
            (grad.square().sum() + given.sum()).backward()
    (grad,) = torch.autograd.grad(mlstm(*inputs, backend="naive").sum(), inputs[0], create_graph=True)
    grad.square().sum().backward()


@backends
def test_poisoned_memory_is_never_read(backend):
    torch.use_deterministic_algorithms(True)  # fills whatever memory torch hands out with NaN
    try:
        assert torch.empty(3).isnan().all() and torch.ones(3).new_empty(3).isnan().all()
        for steps, (gate, normalize) in itertools.product((5, 300), FORMS):
            inputs = random_mlstm(1, 2, steps, 4, 4, dtype=torch.float32)
            run = runner(gate, normalize=normalize, backend=backend)
            outputs, gradients = outputs_and_gradients(run, inputs)
            assert all(torch.isfinite(x).all() for x in (*outputs, *gradients))
    finally:
        torch.use_deterministic_algorithms(False)


def good(**changes):
    q, k, v, i, f = random_mlstm(2, 3, 5, 4, 8)
    return {"q": q, "k": k, "v": v, "i": i, "f": f} | changes


ERRORS = {
    "k": (lambda x: good(k=x["k"][..., :2]), "k has shape .*pass q's shape"),
    "v": (lambda x: good(v=x["v"][:, :, :4]), "v has shape"),
    "q dim": (lambda x: good(q=x["q"][0]), r"pass \(B, H, T, Dk\)"),
    "gate last axis": (lambda x: good(i=x["i"][..., None]), r"i\.squeeze\(-1\)"),
    "gate shape": (lambda x: good(f=x["f"][:, :, :4]), r"f has shape .*\(B, H, T\)"),
    "integers": (lambda x: good(q=x["q"].long()), r"q has dtype torch.int64.*q\.float"),
    "one dtype": (lambda x: good(k=x["k"].double()), "give q, k, v one dtype"),
    "devices": (lambda x: good(v=x["v"].to("meta")), "v is on meta but q is on cpu"),
    "no steps": (lambda x: {name: y[:, :, :0] for name, y in x.items()}, "at least 1"),
    "not a tensor": (lambda x: good(i=[1.0]), "i is a list"),
    "gate name": (lambda x: good(gate="relu"), "known gates: exp, sigmoid"),
    "backend name": (lambda x: good(backend="cuda"), "known backends: auto, triton, cpu, torch, naive"),
    "chunk": (lambda x: good(chunk_size=0), "chunk_size is 0"),
    "fractional chunk": (lambda x: good(chunk_size=2.5), r"chunk_size is 2\.5; pass a positive whole number"),
    "chunk of a flag": (lambda x: good(chunk_size=True), "chunk_size is True"),
    "negative eps": (lambda x: good(eps=-1e-6), "eps is -1e-06; pass a number that is not negative"),
    "eps nan": (lambda x: good(eps=float("nan")), "eps is nan"),
    "eps not a number": (lambda x: good(eps="small"), "eps is 'small'"),
    "reset shape": (lambda x: good(reset=torch.zeros(5, 2, dtype=torch.bool)), r"\(B, T\) = \(2, 5\)"),
    "reset dtype": (lambda x: good(reset=torch.zeros(2, 5)), "torch.bool"),
    "state type": (lambda x: good(state=x["q"]), "MLSTMState"),
    "state shape": (lambda x: good(state=state_for("exp", 2, 3, 8, 4)), r"state\.c has shape"),
    "state without m": (lambda x: good(state=state_for("sigmoid", 2, 3, 4, 8)), r"state\.m is None"),
    "state with m": (lambda x: good(state=state_for("exp", 2, 3, 4, 8), gate="sigmoid"), "has no m"),
    "state without n": (
        lambda x: good(state=state_for("exp", 2, 3, 4, 8)._replace(n=None)),
        r"state\.n is None",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_pass(name):
    make, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        mlstm(**make(good()))


def test_step_errors():
    q, k, v, i, f = (x[:, :, 0] for x in good().values())
    with pytest.raises(ValueError, match="a sequence goes to mlstm"):
        mlstm_step(*good().values())
    with pytest.raises(ValueError, match=r"f\.squeeze\(-1\)"):
        mlstm_step(q, k, v, i, f[..., None])


@pytest.mark.parametrize("backend", ["triton"])
def test_a_forced_backend_that_cannot_run_says_why(backend):
    with pytest.raises(RuntimeError, match=f"backend '{backend}' is not available: "):
        mlstm(**good(backend=backend))


def test_state_without_normaliser_memory():
    inputs = random_mlstm(1, 2, 5, 3, 4)
    c, n, _ = state_for("sigmoid", 1, 2, 3, 4, dtype=torch.float32)
    h = mlstm(*inputs, MLSTMState(c, None, None), gate="sigmoid")
    assert_close(h, mlstm(*inputs, MLSTMState(c, n, None), gate="sigmoid"), 1e-6)
