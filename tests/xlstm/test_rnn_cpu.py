"""The compiled CPU backend of the recurrent cells: sizes, threads, memory, how it builds, its speed."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vilma.bench import BOTH, FORWARD, Contender, measure
from vilma.testing import assert_close
from vilma.tools import bench_rnn
from vilma.xlstm import rnn, rnn_cpu, rnn_step
from vilma.xlstm.rnn_naive import CELLS
from vilma.xlstm.rnn_torch import Form

needs_compiler = pytest.mark.skipif(not rnn_cpu.is_available(), reason="no C++ compiler (see the warning)")
cells = pytest.mark.parametrize("cell", CELLS)


def inputs_of(cell, batch, steps, heads, dim):
    kind = CELLS[cell]
    wx = torch.randn(batch, steps, len(kind.wx), heads, dim)
    r = torch.randn(heads, dim, len(kind.r), dim) * dim**-0.5
    return [x.requires_grad_() for x in (wx, r, torch.randn(len(kind.b), heads, dim))]


def grads_of(inputs, run, **options):
    h, last = run(*inputs, return_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in (h, *last))
    return h, *torch.autograd.grad(loss, inputs)


@needs_compiler
@cells
@pytest.mark.parametrize("dim", [1, 15, 16, 17, 31, 48, 63, 96, 100, 130])
def test_every_size_of_a_head(cell, dim):
    """Whole vectors, the ones short of and beyond them, panels of one, two and three."""
    for batch in (1, 2, 3, 5, 8, 11):
        inputs = inputs_of(cell, batch, 3, 1, dim)
        expected = grads_of(inputs, rnn, cell=cell, backend="torch")
        for x, y in zip(grads_of(inputs, rnn, cell=cell, backend="cpu"), expected):
            assert_close(x, y, 5e-6)


@needs_compiler
@pytest.mark.parametrize("cell, dim", [("slstm", 768), ("gru", 520)])
def test_wide_heads(cell, dim):
    inputs = inputs_of(cell, 3, 4, 1, dim)
    expected = grads_of(inputs, rnn, cell=cell, backend="torch")
    for x, y in zip(grads_of(inputs, rnn, cell=cell, backend="cpu"), expected):
        assert_close(x, y, 5e-6)


@needs_compiler
@cells
def test_threads_change_little(cell):
    """Heads and tiles of the batch are spread; only sums over the batch are added up in another order."""
    inputs = inputs_of(cell, 40, 30, 1, 96)
    one = grads_of(inputs, rnn, cell=cell, backend="cpu")
    torch.set_num_threads(3)
    try:
        wx, r, b = inputs
        h = torch.empty(40, 30, 1, 96)
        _, tiles = rnn_cpu._problem(wx, r, b, (None,), None, None, h, Form(cell, False, None))
        three = grads_of(inputs, rnn, cell=cell, backend="cpu")
    finally:
        torch.set_num_threads(1)
    assert tiles > 2
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])
    for x, y in zip(one[2:], three[2:]):
        assert_close(x, y, 1e-6)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@needs_compiler
@cells
def test_nothing_is_copied(cell):
    """wx of any strides, and an upstream gradient that is expanded, are read in place."""
    kind = CELLS[cell]
    wx = torch.randn(2, 20, 3, len(kind.wx), 8).transpose(2, 3)
    _, r, b = (x.detach() for x in inputs_of(cell, 2, 20, 3, 8))
    form, none = Form(cell, False, None), (None,) * len(kind.states)
    with Operations() as seen:
        h, last, saved = rnn_cpu.forward(wx, r, b, none, None, form, True, True)
        dh = torch.ones(()).expand(h.shape)
        dwx, *_ = rnn_cpu.backward((dh, *none), wx, r, b, none, None, h, last, saved, form)
    assert seen.names <= {"empty_like", "new_empty", "ones", "expand", "detach", "select"}, seen.names
    assert dwx.stride() == wx.stride()


@cells
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpu", marks=needs_compiler)])
def test_kept_for_backward_is_linear_in_time(cell, backend):
    def kept(steps):
        inputs = inputs_of(cell, 1, steps, 2, 16)
        total, seen = 0, {x.data_ptr() for x in inputs}

        def pack(x):
            nonlocal total
            if x.data_ptr() not in seen:
                seen.add(x.data_ptr())
                total += x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            rnn(*inputs, cell=cell, backend=backend)
        return total

    assert 0 < kept(100) <= 9 * 4 * 100 * 32
    assert kept(200) <= 2.1 * kept(100)


@needs_compiler
def test_saved_tensors_may_come_back_elsewhere():
    """Hooks (offloading) return copies, at addresses that vectors cannot have."""
    inputs = inputs_of("slstm", 2, 5, 1, 20)
    expected = torch.autograd.grad(rnn(*inputs, backend="cpu").sum(), inputs)

    def unpack(x):
        moved = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
        return moved.copy_(x)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack):
        h = rnn(*inputs, backend="cpu")
    for x, y in zip(torch.autograd.grad(h.sum(), inputs), expected):
        assert torch.equal(x, y)


@needs_compiler
@cells
@pytest.mark.parametrize("dtype, ratio", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_a_step_in_half_precision(cell, dtype, ratio):
    """h is rounded once, the states not at all."""
    wx, r, b = (x.detach().to(dtype) for x in inputs_of(cell, 5, 1, 2, 20))
    state = [(torch.rand(5, 2, 20) + 1.0).to(dtype) for _ in CELLS[cell].states]
    h, last = rnn_step(wx[:, 0], r, b, state, cell=cell, backend="cpu")
    inputs = (wx[:, 0].double(), r.double(), b.double(), [x.double() for x in state])
    expected, expected_last = rnn_step(*inputs, cell=cell, backend="naive")
    assert h.dtype == dtype and all(x.dtype == torch.float32 for x in last)
    assert_close(h, expected, ratio)
    for x, y in zip(last, expected_last, strict=True):
        assert_close(x, y, 1e-6)


@needs_compiler
def test_float64_takes_the_plain_path():
    inputs = [x.double() for x in inputs_of("slstm", 2, 5, 1, 4)]
    assert torch.equal(rnn(*inputs, backend="cpu"), rnn(*inputs, backend="torch"))


SCRIPT = """
import sys, warnings
{before}
import torch
from vilma.xlstm import rnn, rnn_step
torch.manual_seed(0)
wx, r, b = torch.randn(2, 9, 4, 2, 4), torch.randn(2, 4, 4, 4), torch.randn(4, 2, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    h = rnn(wx, r, b)
    rnn_step(wx[:, 0], r, b)
    rnn(wx, r.requires_grad_(), b).sum().backward()
ours = [str(w.message) for w in caught if "recurrent cell" in str(w.message)]
error = (h - rnn(wx, r, b, backend="naive")).abs().max().item()
assert error < 1e-5
print(len(ours), "|", *ours)
try:
    rnn(wx, r, b, backend="cpu")
    print("forced: runs")
except RuntimeError as problem:
    print("forced:", problem)
"""


def in_a_fresh_process(before="", **environment):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(before=before)],
        env={**os.environ, "CXX": "", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


NO_TRITON = "sys.modules['triton'] = None"


def test_without_a_compiler_and_without_triton(tmp_path):
    """One warning that says what to install, and the eager path; forced by name, an error that says it."""
    said = in_a_fresh_process(NO_TRITON, PATH=str(tmp_path), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert said.startswith("1 | the recurrent cell runs its slower eager path")
    assert said.count("install g++ (") == 2
    assert "forced: backend 'cpu' is not available: no C++ compiler found" in said


def test_a_failing_build_says_so(tmp_path):
    said = in_a_fresh_process(CXX="false", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert said.startswith("1 | ") and said.count("failed; a g++") == said.count("install it (apt") == 2
    assert "false -std=c++17" in said and "-march=native" in said  # of the first try, as the message is
    assert not list(tmp_path.rglob("*.so*"))


def said_by_a_build(folder, monkeypatch, compiler):
    """The warning, which is the error too, of a build that cannot succeed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    monkeypatch.setenv("CXX", compiler)
    names = ("forward", "backward", "step")
    extension = rnn_cpu.cpu_build.Extension("the test", rnn_cpu.SOURCE, rnn_cpu.HEADERS, "vilma_rnn_", names)
    with pytest.warns(UserWarning, match="the test runs its slower eager path on this CPU") as caught:
        assert not extension.is_available() and not extension.is_available()
    with pytest.raises(rnn_cpu.BuildError) as error:
        extension.library()
    (said,) = [str(warning.message) for warning in caught]
    assert said.endswith(str(error.value))
    return said


def script_at(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("compiler", ["/nonexistent", "g++ '", " ", "''", "/not a file", "garbage"])
def test_a_compiler_that_cannot_be_run_says_what_to_do(tmp_path, monkeypatch, compiler):
    if compiler == "garbage":  # that may be executed
        compiler = script_at(tmp_path / "garbage", "\0")
    said = said_by_a_build(tmp_path, monkeypatch, compiler)
    advice = f"CXX={compiler!r} is no compiler that can be run; name one in CXX or unset it, install g++ (apt"
    assert advice in said and not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("status", [0, 1])
def test_a_compiler_that_leaves_no_file(tmp_path, monkeypatch, status):
    """The command that is named is the one whose message is shown."""
    compiler = script_at(
        tmp_path / "c++", f'#!/bin/sh\ncase "$*" in *native*) echo first >&2;; esac\nexit {status}'
    )
    said = said_by_a_build(tmp_path, monkeypatch, compiler)
    command, message = said.split(" failed; a g++ of version 12 or newer is known to work: install it (apt")
    assert "-march=native" in command and message.endswith("\nfirst")
    if not status:
        assert "exit status 0, no file" in said_by_a_build(tmp_path, monkeypatch, "true")


def test_a_result_that_cannot_be_loaded(tmp_path, monkeypatch):
    """As in a folder from which nothing may be executed; here the compiler writes no library."""
    script = '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho nothing > "$2"\n'
    said = said_by_a_build(tmp_path, monkeypatch, script_at(tmp_path / "c++", script))
    assert "cannot be built or loaded" in said
    assert "set TORCH_EXTENSIONS_DIR to a folder where files can be written and executed" in said


def test_a_step_for_a_gradient_builds_nothing(monkeypatch):
    """It runs on torch's own operators; only a backend that is forced has to be there."""

    def refuse():
        raise rnn_cpu.BuildError("not built")

    monkeypatch.setattr(rnn_cpu, "library", refuse)
    monkeypatch.setattr(rnn_cpu, "is_available", lambda: pytest.fail("asked for the compiled functions"))
    wx, r, b = inputs_of("slstm", 2, 1, 2, 4)
    rnn_step(wx[:, 0], r, b)[0].sum().backward()
    with pytest.raises(RuntimeError, match="backend 'cpu' is not available: not built"):
        rnn_step(wx[:, 0], r, b, backend="cpu")


@needs_compiler
@pytest.mark.parametrize("missing", ["triton", "vilma.xlstm.rnn_triton_backend"])
def test_works_where_triton_or_its_backend_cannot_be_imported(missing):
    said = in_a_fresh_process(f"sys.modules[{missing!r}] = None", CXX=os.environ.get("CXX", ""))
    assert said == "0 |\nforced: runs\n"


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("flags", ["-march=x86-64-v3", "-march=x86-64-v2"])
def test_narrower_vectors(tmp_path, monkeypatch, flags):
    """The same source for AVX2 and for SSE: other widths, other tiles."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("not an x86 processor with AVX2")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    # the last -march wins, and the build's own comes before the file
    (tmp_path / "c++").write_text(f'#!/bin/sh\nexec g++ "$@" {flags}\n')
    (tmp_path / "c++").chmod(0o755)
    narrow = rnn_cpu.cpu_build.Extension(
        "narrow", rnn_cpu.SOURCE, rnn_cpu.HEADERS, "vilma_rnn_", ("forward", "backward", "step")
    )
    monkeypatch.setattr(rnn_cpu, "_call", narrow.call)
    for cell in CELLS:
        for batch, dim in ((1, 17), (5, 40), (8, 96)):
            inputs = inputs_of(cell, batch, 3, 1, dim)
            expected = grads_of(inputs, rnn, cell=cell, backend="torch")
            for x, y in zip(grads_of(inputs, rnn, cell=cell, backend="cpu"), expected):
                assert_close(x, y, 5e-6)


def ratios(shape, slow, fast, forward_rounds, rounds):
    """Time of one row over that of another, forward and forward+backward: one thread, interleaved."""
    sizes = bench_rnn.SHAPES[shape].sizes
    inputs = [x.requires_grad_() for x in bench_rnn.draw(sizes, "slstm", torch.float32)]
    rows = []
    for name in (slow, fast):
        if name == "torch.nn":
            rows.append(bench_rnn.layer_of(bench_rnn.SHAPES[shape], "slstm", "cpu", torch.float32))
            continue
        run = bench_rnn.our_run(name, "slstm")
        rows.append(Contender(name, lambda run=run: run(*inputs), inputs))
    found = []
    for mode, count in ((FORWARD, forward_rounds), (BOTH, rounds)):
        one, other = measure(rows, rounds=count, modes=(mode,)).values()
        found.append(one.times[mode].over(other.times[mode]))
    print(f"{shape}: {slow} over {fast}: forward {found[0]:.2f}, forward+backward {found[1]:.2f}")
    return found


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize(
    "shape, slow, fast, forward, both",
    [
        ("vil_tiny_224", "loop", "vilma cpu", 4.5, 12.0),
        ("vil_tiny_448", "loop", "vilma cpu", 5.0, 40.0),
        ("vil_tiny_224", "lean loop", "vilma cpu", 1.8, 6.0),
        ("vil_tiny_224", "lean loop", "vilma torch", 1.0, 2.0),
        ("vil_tiny_224", "torch.nn", "vilma cpu", 0.0, 1 / 0.75),
    ],
)
def test_speed(shape, slow, fast, forward, both):
    """The ratios that are promised; "vilma torch" is what runs where there is no compiler."""
    long = shape == "vil_tiny_448"  # a loop that is quadratic takes half a minute
    measured = ratios(shape, slow, fast, 5, 1 if long else 7)
    assert measured[0] >= forward and measured[1] >= both
