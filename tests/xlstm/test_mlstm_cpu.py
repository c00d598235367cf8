"""The compiled CPU backend against float64, golden vectors and itself in pieces; how it builds and fails."""

import itertools
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vilma.testing import assert_close, golden, golden_cases, random_mlstm, random_mlstm_state
from vilma.xlstm import MLSTMState, mlstm, mlstm_cpu, mlstm_step
from vilma.xlstm.mlstm_chunkwise import Form

needs_compiler = pytest.mark.skipif(not mlstm_cpu.is_available(), reason="no C++ compiler (see the warning)")
FORMS = [("exp", True), ("exp", False), ("sigmoid", True), ("sigmoid", False)]
forms = pytest.mark.parametrize("gate, normalize", FORMS)
GATES = ("ip30", "im30", "fp30", "fm30", "mixed30")


def state_for(gate, *sizes):
    c, n, m = random_mlstm_state(*sizes)
    return (c, n, m) if gate == "exp" else (c, n)


def results(inputs, double=False, run=mlstm, **options):
    """h, the last state and the gradient of every input for one linear loss on all outputs, by name."""
    if double:
        inputs = [x.double() for x in inputs]
    inputs = [x.detach().requires_grad_() for x in inputs]
    state = MLSTMState(*(*inputs[5:], None)[:3]) if len(inputs) > 5 else None
    h, last = run(*inputs[:5], state, return_state=True, **options)
    outputs = [x for x in (h, *last) if x is not None]
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in outputs
    )
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return dict(zip("hcnm", outputs)) | {f"d{name}": x for name, x in zip("qkvifcnm", grads)}


def assert_same(actual, expected, ratio):
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        y = expected[name]
        y = torch.zeros_like(x) if y is None else y
        if name == "df":
            # df is a difference of terms of the size of di, and about zero where nothing is remembered
            scale = torch.stack((y, expected["di"])).square().mean((1, 2, 3)).sqrt().max()
            assert (x - y).square().mean().sqrt() <= ratio * scale, name
        else:
            assert_close(x, y, ratio, name)


SHAPES = [  # (B, H, T, Dk, Dv), chunk size
    ((2, 2, 1, 3, 5), None),
    ((2, 1, 37, 16, 24), None),
    ((1, 2, 196, 96, 96), None),
    ((1, 2, 130, 20, 33), 64),
    ((1, 2, 45, 8, 17), 7),
    ((1, 1, 300, 48, 80), 96),
    ((1, 1, 257, 16, 16), None),
]


@needs_compiler
@forms
@pytest.mark.parametrize("shape, chunk_size", SHAPES)
def test_equals_float64(gate, normalize, shape, chunk_size):
    batch, heads, steps, dim_qk, dim_v = shape
    for reverse, with_reset, with_state in itertools.product((False, True), repeat=3):
        inputs = random_mlstm(*shape)
        if with_state:
            inputs += state_for(gate, batch, heads, dim_qk, dim_v)
        reset = torch.rand(batch, steps) < 0.1 if with_reset else None
        options = {"gate": gate, "normalize": normalize, "reverse": reverse, "reset": reset}
        actual = results(inputs, backend="cpu", chunk_size=chunk_size, **options)
        assert_same(actual, results(inputs, double=True, backend="torch", **options), 1e-5)


@needs_compiler
@pytest.mark.parametrize(
    "case",
    [case for case in golden_cases("kernels") if case["kind"].startswith("mlstm")],
    ids=lambda case: case["file"][6:-4],
)
@pytest.mark.parametrize("chunk_size", [None, 24])
def test_golden(case, chunk_size):
    stored = golden("kernels", case["file"])
    inputs = {name: stored[name].clone().requires_grad_() for name in "qkvif"}
    state = None
    if "c0" in stored:
        state = MLSTMState(*(stored[name].clone() for name in ("c0", "n0")), stored["m0"].squeeze(-1).clone())
        for x in state:
            x.requires_grad_()
    h, last = mlstm(
        *inputs.values(),
        state,
        gate="exp" if case["kind"] == "mlstm_exp" else "sigmoid",
        normalize=case.get("normalize"),
        return_state=True,
        chunk_size=chunk_size,
        backend="cpu",
        eps=case["eps"],
    )
    (h * stored["w"]).sum().backward()
    actual = {"h": h, "c_last": last.c, "n_last": last.n} | {f"d{name}": x.grad for name, x in inputs.items()}
    if last.m is not None:
        actual["m_last"] = last.m[..., None]
    if state is not None:
        actual |= {"dc0": state.c.grad, "dn0": state.n.grad, "dm0": state.m.grad[..., None]}
    for name, x in actual.items():
        reference = stored[name].double()
        bound = (2e-4 if case["gate"] in ("ext30", "ip30", "fm30") else 1e-5) * reference.abs().max()
        if name == "di":
            bound = 2 * bound
        if name == "df" and (case["gate"] in ("fm30", "fp30") or (case["S"] == 1 and state is None)):
            bound = max(bound, 1e-6 * stored["di"].double().abs().max())  # the true df is about zero
        error = (x.detach().double() - reference).abs().max()
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


@needs_compiler
@forms
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_split_anywhere_equals_whole(gate, normalize, reverse):
    options = {"gate": gate, "normalize": normalize, "reverse": reverse, "backend": "cpu", "chunk_size": 16}
    inputs = random_mlstm(2, 2, 50, 12, 20) + state_for(gate, 2, 2, 12, 20)
    whole = results(inputs, **options)
    for cut in (1, 16, 31, 49):

        def split(q, k, v, i, f, state, return_state, cut=cut, **options):
            first, second = slice(0, cut), slice(cut, None)
            if reverse:
                first, second = second, first
            h1, state = mlstm(*(x[:, :, first] for x in (q, k, v, i, f)), state, return_state=True, **options)
            h2, state = mlstm(
                *(x[:, :, second] for x in (q, k, v, i, f)), state, return_state=True, **options
            )
            return torch.cat((h2, h1) if reverse else (h1, h2), 2), state

        assert_same(results(inputs, run=split, **options), whole, 1e-5)


@needs_compiler
@forms
@pytest.mark.parametrize("with_state", [False, True], ids=["zero", "state"])
def test_steps_equal_sequence(gate, normalize, with_state):
    options = {"gate": gate, "normalize": normalize, "backend": "cpu"}
    inputs = random_mlstm(3, 2, 20, 12, 20)
    given = MLSTMState(*(*state_for(gate, 3, 2, 12, 20), None)[:3]) if with_state else None
    h, last = mlstm(*inputs, given, return_state=True, **options)
    state, outputs = given, []
    for x in zip(*(x.unbind(2) for x in inputs)):
        h_t, state = mlstm_step(*x, state, **options)
        outputs.append(h_t)
    assert_close(torch.stack(outputs, 2), h, 1e-5)
    for x, y in zip(state, last):
        assert (x is None) == (y is None)
        if x is not None:
            assert_close(x, y, 1e-5)


@needs_compiler
@pytest.mark.parametrize("gates", GATES)
@forms
def test_extreme_gates(gate, normalize, gates):
    for steps in (200, 300):
        inputs = random_mlstm(1, 2, steps, 8, 8, gates=gates)
        options = {"gate": gate, "normalize": normalize}
        if not (gate == "exp" and not normalize):  # else h itself has the range of exp(30)
            expected = results(inputs, double=True, backend="torch", **options)
            assert_same(results(inputs, backend="cpu", **options), expected, 2e-4)
        assert all(torch.isfinite(x).all() for x in results(inputs, backend="cpu", **options).values())


@needs_compiler
def test_forget_gates_near_one_and_infinite_gates():
    q, k, v, i, f = random_mlstm(1, 2, 300, 8, 8)
    inputs = (q, k, v, i, torch.full_like(f, 16.0))
    assert_same(results(inputs, backend="cpu"), results(inputs, double=True, backend="torch"), 5e-5)
    i[..., 5], f[..., 7], f[..., 9] = float("-inf"), float("-inf"), float("inf")
    h, last = mlstm(q, k, v, i, f, return_state=True, backend="cpu")
    expected, expected_last = mlstm(
        *(x.double() for x in (q, k, v, i, f)), return_state=True, backend="torch"
    )
    for x, y in zip((h, *last), (expected, *expected_last)):
        assert_close(x, y, 1e-5)


@needs_compiler
def test_nan_is_not_hidden():
    inputs = random_mlstm(1, 1, 100, 8, 8)
    for given in range(5):
        spoiled = [x.clone() for x in inputs]
        spoiled[given][0, 0, 60] = float("nan")
        h = mlstm(*spoiled, backend="cpu")
        assert torch.isfinite(h[:, :, :48]).all() and h[0, 0, 60].isnan().any()


@needs_compiler
@pytest.mark.parametrize("dtype, ratio", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, ratio):
    inputs = [x.to(dtype) for x in random_mlstm(2, 2, 70, 16, 24)]
    actual, expected = results(inputs, backend="cpu"), results(inputs, double=True, backend="torch")
    assert {name: x.dtype for name, x in actual.items() if name in "hcnm"} == {
        "h": dtype,
        **dict.fromkeys("cnm", torch.float32),
    }
    for name, x in actual.items():
        assert name in "hcnm" or x.dtype == dtype
        assert_close(x, expected[name], 1e-5 if name in "cnm" else ratio, name)
    # the sums are those of float32: only what is stored is rounded
    single = mlstm(*(x.float() for x in inputs), backend="cpu")
    assert torch.equal(mlstm(*inputs, backend="cpu"), single.to(dtype))


def layouts():
    q, k, v, i, f = random_mlstm(2, 3, 70, 4, 8)
    fused = torch.randn(2, 70, 3 * (4 + 4 + 8))
    projected = [x.unflatten(-1, (3, -1)).transpose(1, 2) for x in fused.split((12, 12, 24), -1)]
    gates = torch.randn(2, 70, 6).transpose(1, 2).split(3, 1)
    wide = torch.randn(2, 3, 70, 16)
    yield (*projected, *gates)
    yield q.transpose(2, 3).contiguous().transpose(2, 3), k, wide[..., ::2], i, f
    yield q[:1, :1].expand(2, 3, -1, -1), k, v[:, :, :1].expand(-1, -1, 70, -1), i, f[:, :1].expand(-1, 3, -1)
    yield tuple(x[:, :1, :, :1] if x.dim() == 4 else x[:, :1] for x in (q, k, v, i, f))
    yield tuple(x[:, :, ::7] for x in (q, k, v, i, f))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", range(5))
def test_layouts(index, dtype):
    """Any strides, read in place: bit for bit what contiguous tensors give."""
    inputs = [x.to(dtype) for x in list(layouts())[index]]
    assert dtype != torch.float32 or any(x.stride() != x.contiguous().stride() for x in inputs) or index == 3
    actual, expected = (
        results(inputs, backend="cpu"),
        results([x.contiguous() for x in inputs], backend="cpu"),
    )
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@needs_compiler
def test_nothing_is_copied():
    q, k, v, i, f = next(layouts())
    form, state = Form(True, True, False, 16, 1e-6), (None, None, None)
    with Operations() as seen:
        h, last, saved = mlstm_cpu.forward(q, k, v, i, f, state, None, form, True, True)
        grads = (torch.ones(()).expand(h.shape), None, None, None)
        dq, *_ = mlstm_cpu.backward(grads, q, k, v, i, f, state, None, None, last, saved, form)
    assert seen.names <= {"empty_like", "new_empty", "ones", "expand", "detach"}, seen.names
    assert h.transpose(1, 2).is_contiguous() and dq.transpose(1, 2).is_contiguous()


@needs_compiler
def test_uninitialised_memory_is_never_read():
    """Neither torch's nor the work space that is kept between calls."""
    poison = [torch.full_like(x, float("nan")) for x in random_mlstm(1, 1, 300, 40, 40)]
    results(poison, backend="cpu")
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(3).isnan().all()
        for steps, (gate, normalize) in itertools.product((5, 300), FORMS):
            inputs = random_mlstm(1, 2, steps, 5, 7) + state_for(gate, 1, 2, 5, 7)
            actual = results(inputs, gate=gate, normalize=normalize, backend="cpu")
            assert all(torch.isfinite(x).all() for x in actual.values())
    finally:
        torch.use_deterministic_algorithms(False)


WITHOUT_MEMORY = """
import resource, torch
from vilma.testing import random_mlstm
from vilma.xlstm import mlstm

torch.set_num_threads(1)
small, large = random_mlstm(1, 1, 300, 8, 8), random_mlstm(1, 1, 1, 3000, 3000)
mlstm(*random_mlstm(1, 1, 5, 4, 4), backend="cpu")
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))
try:
    {call}
    print("ran")
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
print(mlstm(*small, backend="cpu").isfinite().all().item())
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_a_call_without_memory_harms_no_later_one():
    """The work space that a thread keeps is whole again after it could not grow."""
    call = 'mlstm(*large, return_state=False, backend="cpu")'
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY.format(call=call)], capture_output=True, text=True
    )
    assert result.returncode == 0, (result.returncode, result.stderr)
    assert result.stdout.split()[1] == "True" and result.stdout.split()[0] != "ran", result.stdout


@needs_compiler
def test_threads_change_nothing():
    inputs = random_mlstm(3, 3, 300, 16, 24)
    one = results(inputs, backend="cpu")
    torch.set_num_threads(2)
    try:
        two = results(inputs, backend="cpu")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(x, two[name]) for name, x in one.items())


@needs_compiler
def test_only_what_is_used():
    """A loss on one output alone, and gradients of some inputs alone."""
    inputs = random_mlstm(1, 2, 40, 6, 5)
    for pick in range(4):
        grads = {}
        for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "torch")):
            given = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
            h, last = mlstm(*given, return_state=True, backend=backend, chunk_size=16)
            loss = (h, *last)[pick].sin().sum()
            grads[backend] = torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)
        for x, y in zip(grads["cpu"], grads["torch"]):
            assert torch.allclose(x.double(), y, rtol=1e-4, atol=1e-5)
    w = inputs[2].clone().requires_grad_()
    mlstm(*inputs[:2], w, *inputs[3:], backend="cpu").sum().backward()
    assert w.grad.abs().sum() > 0


@needs_compiler
def test_kept_for_backward_is_linear_in_time():
    def kept(steps):
        inputs = [x.requires_grad_() for x in random_mlstm(1, 2, steps, 96, 96)]
        total, seen = 0, {x.data_ptr() for x in inputs}

        def pack(x):
            nonlocal total
            if x.data_ptr() not in seen:
                seen.add(x.data_ptr())
                total += x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            mlstm(*inputs, backend="cpu")
        return total

    sizes = {steps: kept(steps) for steps in (196, 512, 1024, 2048, 4096)}
    print("bytes kept beside the arguments, two heads of 96:", sizes)
    assert sizes[196] == 2 * 196 * 4
    for a, b in itertools.pairwise(list(sizes.values())[1:]):
        assert b <= 2.2 * a


def test_float64_takes_the_plain_path():
    inputs = random_mlstm(1, 1, 9, 4, 4, dtype=torch.float64)
    assert torch.equal(mlstm(*inputs, backend="cpu"), mlstm(*inputs, backend="torch"))


SCRIPT = """
import sys, warnings
{before}
import torch
from vilma.testing import random_mlstm
from vilma.xlstm import mlstm, mlstm_step
assert "triton" not in sys.modules or sys.modules["triton"] is None or not {blocked}
inputs = random_mlstm(1, 2, 9, 4, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    h = mlstm(*inputs)
    mlstm_step(*(x[:, :, 0] for x in inputs))
    mlstm(*inputs)
ours = [str(w.message) for w in caught if "mLSTM" in str(w.message)]
error = (h - mlstm(*inputs, backend="torch")).abs().max().item()
assert error < 1e-5
print(len(ours), "|", *ours)
try:
    mlstm(*inputs, backend="cpu")
    print("forced: runs")
except RuntimeError as problem:
    print("forced:", problem)
"""


def in_a_fresh_process(block_triton=False, **environment):
    before = "sys.modules['triton'] = None" if block_triton else ""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before, blocked=block_triton)],
        env={**os.environ, "CXX": "", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_a_compiler_and_without_triton(tmp_path):
    """One warning that says what to install, and the eager path; forced by name, an error that says it."""
    said = in_a_fresh_process(True, PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert said.startswith("1 | ")
    assert "slower eager path" in said and said.count("install g++ (") == 2
    assert "forced: backend 'cpu' is not available: no C++ compiler found" in said


def test_a_failing_build_says_so(tmp_path):
    said = in_a_fresh_process(CXX="false", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert said.startswith("1 | ") and "failed; a g++" in said
    assert not list(tmp_path.rglob("*.so*"))


@needs_compiler
def test_works_where_triton_cannot_be_imported():
    assert in_a_fresh_process(True, CXX=os.environ.get("CXX", "")) == "0 |\nforced: runs\n"


@needs_compiler
@pytest.mark.long
def test_processes_that_build_at_once(tmp_path):
    command = [sys.executable, "-c", SCRIPT.format(before="", blocked=False)]
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(3)]
    assert {p.communicate()[0] for p in running} == {b"0 |\nforced: runs\n"}
    assert sorted(x.suffix for x in (tmp_path / "vilma").iterdir()) == [".lock", ".so"]


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize(
    "sizes, forward_bound, bound",
    [((8, 4, 196), 1.15, 1.2), ((8, 4, 784), 0.55, 0.6), ((1, 4, 4096), 0.17, 0.17)],
)
def test_speed_beside_attention(sizes, forward_bound, bound):
    """Time of one thread over that of causal attention at the same shape, interleaved in one process."""
    q, k, v, i, f = (x.requires_grad_() for x in random_mlstm(*sizes, 96, 96))
    w = torch.randn_like(v)

    def attention():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def cell():
        return mlstm(q, k, v, i, f, backend="cpu")

    best = {}
    for _ in range(5):
        for name, run, inputs in (("sdpa", attention, (q, k, v)), ("mlstm", cell, (q, k, v, i, f))):
            with torch.no_grad():
                begin = time.process_time()
                run()
                forward = time.process_time() - begin
            begin = time.process_time()
            torch.autograd.grad(run(), inputs, w)
            both = time.process_time() - begin
            best[name] = tuple(map(min, best.get(name, (1e9, 1e9)), (forward, both)))
    ratios = [a / b for a, b in zip(best["mlstm"], best["sdpa"])]
    print(f"{sizes}: forward {ratios[0]:.3f}, forward and backward {ratios[1]:.3f} of causal attention")
    assert ratios[0] <= forward_bound and ratios[1] <= bound
