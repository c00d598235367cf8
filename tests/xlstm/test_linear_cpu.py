"""The linear maps of few rows: against float64, and left alone wherever torch's own are needed."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vilma.testing import assert_close
from vilma.xlstm import linear_cpu, xLSTMLargeBlock
from vilma.xlstm.linear_cpu import MAX_ROWS, linears


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(linear_cpu, "MIN_WEIGHTS", 0)


compiled = pytest.mark.skipif(not linear_cpu._EXTENSION.is_available(), reason="no C++ compiler")


class Ran(TorchDispatchMode):
    """Whether the operator was called."""

    ours = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ours |= function is torch.ops.vilma.linears.default
        return function(*args, **(kwargs or {}))


def runs_ours(x, *maps):
    with Ran() as ran:
        linears(x, *maps)
    return ran.ours


def exact(f, x):
    y = x.double() @ f.weight.double().T
    return y if f.bias is None else y + f.bias.double()


@compiled
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32])
@pytest.mark.parametrize("depth, widths", [(512, (64, 8, 128)), (129, (7,)), (5, (1, 3)), (16, (65, 200))])
def test_against_float64(rows, depth, widths):
    torch.manual_seed(rows)
    maps = [nn.Linear(depth, width, bias=j != 1) for j, width in enumerate(widths)]
    x = torch.randn(rows, depth)
    with torch.no_grad():
        assert runs_ours(x, *maps)
        found = linears(x, *maps)
        for y, f in zip(found, maps, strict=True):
            assert y.shape == (rows, f.out_features)
            assert_close(y.double(), exact(f, x), 3e-7)


@compiled
def test_rounds_like_a_library_of_matrix_products():
    """Long sums are split: one running sum of 4096 terms would be several times as far off."""
    torch.manual_seed(0)
    f, x = nn.Linear(4096, 64, bias=False), torch.randn(16, 4096) + 1
    nn.init.uniform_(f.weight)
    with torch.no_grad():
        assert_close(linears(x, f)[0].double(), exact(f, x), 1e-6)


@compiled
def test_any_layout_of_x():
    f = nn.Linear(24, 10)
    whole = torch.randn(3, 9, 48)
    with torch.no_grad():
        for x in (whole[:, -4:, :24], whole[..., ::2], whole.mT[:, :24].mT, whole[0, 0, :24]):
            assert runs_ours(x, f)
            assert_close(linears(x, f)[0].double(), exact(f, x), 3e-7)


GUARDED = """
import ctypes, mmap, torch
from vilma.xlstm import linear_cpu, xLSTMLargeBlock

linear_cpu.MIN_WEIGHTS = 0
size = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * size)
forbidden = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
libc = ctypes.CDLL(None)
assert libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(size), 0) == 0
f = torch.nn.Linear(5, 3, bias=False)
weight = torch.frombuffer(memory, dtype=torch.float32, offset=size - 4 * 15, count=15).view(3, 5)
f.weight = torch.nn.Parameter(weight.copy_(torch.ones(3, 5)))
with torch.no_grad():
    assert torch.equal(linear_cpu.linears(torch.ones(2, 5), f)[0], torch.full((2, 3), 5.0))
"""


@compiled
@pytest.mark.skipif(sys.platform != "linux", reason="guards memory with mprotect")
def test_reads_no_more_than_the_weights():
    result = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@compiled
def test_a_row_does_not_depend_on_the_others():
    """Bit for bit: an action sees nothing of later ones, an episode nothing of other episodes."""
    f, x = nn.Linear(160, 70), torch.randn(MAX_ROWS, 160)
    with torch.no_grad():
        whole = linears(x, f)[0]
        for rows in (1, 5, 8, 16, 20):
            assert torch.equal(linears(x[:rows], f)[0], whole[:rows])


@compiled
def test_threads_share_the_work():
    f, x = nn.Linear(512, 700), torch.randn(16, 512)
    with torch.no_grad():
        alone = linears(x, f)[0]
        torch.set_num_threads(2)
        try:
            assert torch.equal(linears(x, f)[0], alone)
        finally:
            torch.set_num_threads(1)


class Wrapped(nn.Linear):
    pass


def hooked():
    f = nn.Linear(8, 4)
    f.register_forward_hook(lambda module, args, output: output)
    return f


@torch.no_grad()
@pytest.mark.parametrize(
    "f, x",
    [
        (nn.Linear(8, 4), torch.randn(MAX_ROWS + 1, 8)),
        (nn.Linear(8, 4).double(), torch.randn(3, 8, dtype=torch.float64)),
        (nn.Linear(8, 4).bfloat16(), torch.randn(3, 8, dtype=torch.bfloat16)),
        (nn.Linear(8, 4), torch.randn(0, 8)),
        (nn.Linear(8, 4, device="meta"), torch.randn(3, 8, device="meta")),
        (Wrapped(8, 4), torch.randn(3, 8)),
        (hooked(), torch.randn(3, 8)),
    ],
    ids=["rows", "float64", "bfloat16", "empty", "device", "subclass", "hook"],
)
def test_torch_does_the_rest(f, x):
    assert not runs_ours(x, f)
    y, z = linears(x, f)[0], f(x)
    assert y.shape == z.shape and y.dtype == z.dtype
    assert x.is_meta or torch.equal(y, z)


def test_with_gradients_and_transforms_it_is_torch_as_well(monkeypatch):
    f, x = nn.Linear(8, 4), torch.randn(3, 8)
    assert not runs_ours(x, f)
    assert linears(x, f)[0].requires_grad
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert linears(x, f)[0].dtype == torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(lambda row: linears(row, f)[0])(x), f(x))
        tangent = torch.func.jvp(lambda x: linears(x, f)[0], (x,), (torch.ones_like(x),))[1]
        torch.testing.assert_close(tangent, f.weight.sum(1).expand(3, 4))
        with forward_ad.dual_level():
            y = linears(forward_ad.make_dual(x, torch.ones_like(x)), f)[0]
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, tangent)
        monkeypatch.setattr(linear_cpu._EXTENSION, "_loaded", linear_cpu.cpu_build.BuildError("no compiler"))
        monkeypatch.setattr(linear_cpu._EXTENSION, "_warned", True)
        assert not runs_ours(x, f)


@compiled
def test_small_maps_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(linear_cpu, "MIN_WEIGHTS", 2 * 8 * 4)
    f, x = nn.Linear(8, 4), torch.randn(3, 8)
    with torch.no_grad():
        assert runs_ours(x, f, f) and not runs_ours(x, f)


def test_shapes_that_do_not_fit_get_torchs_message():
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linears(torch.randn(3, 7), nn.Linear(8, 4))


def test_compiled_programs_keep_torchs():
    f, x = nn.Linear(8, 4), torch.randn(3, 8)
    with torch.no_grad():
        graphs = []
        run = torch.compile(
            lambda x: linears(x, f, f)[1],
            fullgraph=True,
            backend=lambda graph, _: graphs.append(graph) or graph,
        )
        torch.testing.assert_close(run(x), f(x))
    assert "linears" not in graphs[0].code


def test_traced_programs_keep_torchs():
    """And none of the questions asked of x: a trace is checked against one that is made without gradients."""
    block = xLSTMLargeBlock(32, 2)
    traced = torch.jit.trace(block, torch.randn(1, 4, 32))
    x = torch.randn(2, 7, 32)
    assert_close(traced(x), block(x), 1e-6)


@compiled
def test_operator():
    f, x = nn.Linear(8, 4), torch.randn(2, 3, 8)
    weights = [f.weight.detach(), f.weight.detach()]
    torch.library.opcheck(
        torch.ops.vilma.linears,
        (x, weights, [f.bias.detach(), None]),
        test_utils=("test_schema", "test_faketensor"),
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linears(x, f, f)
    assert counter.get_total_flops() == 2 * (2 * 6 * 8 * 4)
