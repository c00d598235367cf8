"""The blocks of the first xLSTM paper and their stacks: against the equations, step by step, in any dtype."""

import io
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vilma.testing import assert_close
from vilma.xlstm import (
    BlockState,
    MLSTMState,
    mlstm,
    mLSTMBlock,
    slstm_positions,
    sLSTMBlock,
    xlstm_stack,
)

PATTERNS = ("1:0", "0:1", "1:1")


def disturb(module, scale=0.3):
    """Float64, with every gate, norm, skip and recurrent weight doing something."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def leaves(state):
    """The tensors of nested states."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if torch.is_tensor(leaf)]


def layer_norm(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight)


def head_norm(heads, weight):
    """heads: one tensor (B, T, D / H) a head."""
    parts = weight.chunk(len(heads))
    return torch.cat([layer_norm(h, w) for h, w in zip(heads, parts, strict=True)], -1)


def causal_conv(x, weight, bias):
    """silu of the convolution: the tap k of a kernel of K sees the input K - 1 - k steps ago."""
    y = bias.expand_as(x).clone()
    for k in range(weight.shape[-1]):
        ago = weight.shape[-1] - 1 - k
        y[:, ago:] += weight[:, 0, k] * x[:, : x.shape[1] - ago]
    return y * torch.sigmoid(y)


def mlstm_block_by_equations(w, x, num_heads):
    """Figure 10 of arXiv 2405.04517, with dense matrices and the recurrent mLSTM."""
    u, z = (layer_norm(x, w["norm.weight"]) @ w["proj_up.weight"].T).chunk(2, -1)
    a = causal_conv(u, w["conv.weight"], w["conv.bias"])
    qkv = [y @ torch.block_diag(*w[f"{name}.weight"]).T for name, y in (("q", a), ("k", a), ("v", u))]
    i, f = (torch.cat(qkv, -1) @ w[f"{g}gate.weight"].T + w[f"{g}gate.bias"] for g in "if")
    q, k, v = (torch.stack(y.chunk(num_heads, -1), 1) for y in qkv)
    h = mlstm(q, k, v, i.transpose(1, 2), f.transpose(1, 2), backend="naive")
    y = (head_norm(h.unbind(1), w["outnorm.weight"]) + w["skip"] * a) * (z * torch.sigmoid(z))
    return x + y @ w["proj_down.weight"].T


def slstm_by_equations(i, f, z, o, r, b):
    """Equations 8 to 18, one head and one step at a time; i, f, z, o (B, T, H, D)."""
    outputs = []
    for head in range(i.shape[2]):
        h = c = n = m = torch.zeros_like(i[:, 0, head])
        of_head = []
        for t in range(i.shape[1]):
            gates = [
                g[:, t, head] + h @ r[head, :, index] + b[index, head] for index, g in enumerate((i, f, z, o))
            ]
            forgotten = torch.log(torch.sigmoid(gates[1])) + m
            m = gates[0] if t == 0 else torch.maximum(gates[0], forgotten)
            keep, write = torch.exp(forgotten - m), torch.exp(gates[0] - m)
            c = keep * c + write * torch.tanh(gates[2])
            n = keep * n + write
            h = torch.sigmoid(gates[3]) * c / n
            of_head.append(h)
        outputs.append(torch.stack(of_head, 1))
    return outputs


def slstm_block_by_equations(w, x, num_heads):
    """Figure 9: the convolution feeds the input and forget gates only."""
    y = layer_norm(x, w["norm.weight"])
    a = causal_conv(y, w["conv.weight"], w["conv.bias"])
    gates = [
        torch.stack((source @ torch.block_diag(*w[f"{g}gate.weight"]).T).chunk(num_heads, -1), 2)
        for g, source in (("i", a), ("f", a), ("z", y), ("o", y))
    ]
    x = x + head_norm(slstm_by_equations(*gates, w["recurrent"], w["bias"]), w["outnorm.weight"])
    gate, up = (layer_norm(x, w["norm_ffn.weight"]) @ w["ffn.proj_up.weight"].T).chunk(2, -1)
    gate = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return x + (gate * up) @ w["ffn.proj_down.weight"].T


@pytest.mark.parametrize(
    "make, by_equations",
    [(mLSTMBlock, mlstm_block_by_equations), (sLSTMBlock, slstm_block_by_equations)],
)
@pytest.mark.parametrize("dim, num_heads, kernel_size", [(32, 4, 4), (24, 2, 3)])
def test_blocks_follow_the_equations(make, by_equations, dim, num_heads, kernel_size):
    block = disturb(make(dim, num_heads, conv_kernel_size=kernel_size))
    x = torch.randn(2, 9, dim, dtype=torch.float64, requires_grad=True)
    y, expected = block(x), by_equations(dict(block.named_parameters()), x, num_heads)
    assert_close(y, expected, 1e-10)
    g = torch.randn_like(y)
    names = ["x", *(name for name, _ in block.named_parameters())]
    of_block, of_equations = (
        torch.autograd.grad((y * g).sum(), [x, *block.parameters()]) for y in (y, expected)
    )
    for name, a, b in zip(names, of_block, of_equations, strict=True):
        assert b.any(), name
        assert_close(a, b, 1e-8, name)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_steps_equal_sequence(cut, pattern):
    """A sequence at once, or its start and then step by step: the same outputs and states."""
    stack = disturb(xlstm_stack(32, 2, pattern))
    x = torch.randn(3, 8, 32, dtype=torch.float64)
    whole, states = stack(x, return_state=True)
    assert_close(stack(x), whole, 1e-14)
    outputs, state = [], None
    if cut:
        start, state = stack(x[:, :cut], return_state=True)
        outputs = list(start.unbind(1))
    for x_t in x[:, cut:].unbind(1):
        before = [y.clone() for y in leaves(state)]
        y, following = stack.step(x_t, state)
        assert all(torch.equal(a, b) for a, b in zip(before, leaves(state), strict=True))
        outputs.append(y)
        state = following
    assert_close(torch.stack(outputs, 1), whole, 1e-10)
    assert torch.utils._pytree.tree_structure(state) == torch.utils._pytree.tree_structure(states)
    for a, b in zip(leaves(state), leaves(states), strict=True):
        assert_close(a, b, 1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_split_sequence_has_the_gradients_of_the_whole(pattern):
    stack = disturb(xlstm_stack(32, 2, pattern))
    x = torch.randn(2, 11, 32, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)

    def split():
        state, outputs = None, []
        for part in x.split([4, 1, 6], 1):
            y, state = stack(part, state, return_state=True)
            outputs.append(y)
        return torch.cat(outputs, 1)

    inputs = [x, *stack.parameters()]
    for a, b in zip(*(torch.autograd.grad((y * g).sum(), inputs) for y in (split(), stack(x))), strict=True):
        assert_close(a, b, 1e-8)


def test_prefill_then_steps_of_the_published_size():
    """xLSTM[7:1] of 8 blocks and width 512, float32: at once, or a prefix and then steps, to 1e-4."""
    stack = xlstm_stack(512, 8, "7:1").eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        x = torch.randn(2, 96, 512)
        whole = stack(x)
        y, state = stack(x[:, :80], return_state=True)
        outputs = list(y.unbind(1))
        for x_t in x[:, 80:].unbind(1):
            y, state = stack.step(x_t, state)
            outputs.append(y)
    y = torch.stack(outputs, 1)
    assert (y - whole).abs().max() <= 1e-4 * whole.abs().max()
    assert_close(y, whole, 1e-5)


class Calls(TorchDispatchMode):
    """The operators that were run, with the sizes of their results."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen.append((str(function), [tuple(y.shape) for y in leaves(out)]))
        return out


def test_a_step_does_the_same_work_after_any_history():
    """The same operators on the same sizes after 16 and after 16,384 steps."""
    stack = xlstm_stack(16, 2, "1:1", proj_factor=1.0).eval()
    seen = []
    with torch.no_grad():
        for history in (16, 16_384):
            _, state = stack(torch.randn(1, history, 16), return_state=True)
            with Calls() as calls:
                y, following = stack.step(torch.randn(1, 16), state)
            assert torch.isfinite(y).all()
            assert [a.shape for a in leaves(state)] == [a.shape for a in leaves(following)]
            # no view into the sequence may keep its memory alive
            assert sum(a.untyped_storage().nbytes() for a in leaves(state)) < 32_768
            seen.append(calls.seen)
    assert seen[0] == seen[1] and len(seen[0]) > 20


@pytest.mark.parametrize("pattern", PATTERNS)
def test_causal(pattern):
    stack = disturb(xlstm_stack(32, 2, pattern))
    x = torch.randn(1, 10, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6:] += torch.randn(1, 4, 32)
    assert torch.equal(stack(x)[:, :6], stack(changed)[:, :6])
    assert (stack(x)[:, 6:] - stack(changed)[:, 6:]).abs().amax((0, 2)).min() > 1e-2


@pytest.mark.parametrize("pattern", PATTERNS)
def test_only_the_last_positions(pattern):
    stack = disturb(xlstm_stack(32, 2, pattern))
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    y, state = stack(x, return_state=True)
    tail, same = stack(x, return_state=True, last=3)
    assert_close(tail, y[:, -3:], 1e-14)
    for a, b in zip(leaves(state), leaves(same), strict=True):
        assert torch.equal(a, b)
    for wrong in (0, 8):
        with pytest.raises(ValueError, match=f"last={wrong} for 7 steps"):
            stack(x, last=wrong)


def test_patterns():
    assert slstm_positions(8, "7:1") == (1,) and slstm_positions(12, "7:1") == (1, 3)
    assert slstm_positions(16, "7:1") == (1, 3) and slstm_positions(20, "7:1") == (1, 3, 5)
    assert slstm_positions(5, "1:0") == () and slstm_positions(3, "0:1") == (0, 1, 2)
    assert slstm_positions(4, "1:1") == (1, 3) and slstm_positions(4, "1:3") == (0, 1, 3)
    assert slstm_positions(1, "7:1") == (0,)

    def kinds(*args, **options):
        return "".join(type(block).__name__[0] for block in xlstm_stack(16, *args, **options).blocks)

    assert kinds(8, "7:1") == "msmmmmmm" and kinds(2) == "mm" and kinds(2, "0:1") == "ss"
    assert kinds(4, slstm_at=(0, 3)) == "smms" and kinds(4, "0:1", slstm_at=()) == "mmmm"
    for wrong in ("7", "0:0", "a:1", "1:-1", "", "7:1:1"):
        with pytest.raises(ValueError, match='pass "a:b"'):
            slstm_positions(8, wrong)
    with pytest.raises(ValueError, match=r"slstm_at=\[8\]; pass positions from 0 to 7"):
        xlstm_stack(16, 8, slstm_at=[8])


def test_published_sizes():
    """Parameters of the stacks of LRAM (arXiv 2410.22391), counted in the public package."""
    for num_blocks, dim, millions in ((8, 512, 12.9342), (12, 768, 43.154768)):
        with torch.device("meta"):
            stack = xlstm_stack(dim, num_blocks, "7:1")
        assert sum(p.numel() for p in stack.parameters()) == pytest.approx(millions * 1e6, abs=100)
    assert mLSTMBlock(40).proj_down.in_features == 128  # 80 and
    assert sLSTMBlock(40).ffn.proj_down.in_features == 64  # 52, rounded up to a multiple of 64


def test_initialisation():
    block = mLSTMBlock(256, num_blocks=4)
    small, back = (2 / (5 * 256)) ** 0.5, 2 / (4 * 16)
    for layer in (block.proj_up, block.q, block.k, block.v):
        assert layer.weight.std().item() == pytest.approx(small, rel=0.05)
    assert block.proj_down.weight.std().item() == pytest.approx(back, rel=0.05)
    assert not block.igate.weight.any() and not block.fgate.weight.any()
    assert 0 < block.igate.bias.abs().max() < 0.6
    assert torch.allclose(block.fgate.bias, torch.linspace(3, 6, 4))
    assert torch.equal(block.skip, torch.ones(512))
    assert not block.norm.weight.any() and not block.outnorm.weight.any()

    block = sLSTMBlock(256, block_index=1, num_blocks=4)
    for layer in (block.igate, block.fgate, block.zgate, block.ogate, block.ffn.proj_up):
        assert layer.weight.std().item() == pytest.approx(small, rel=0.08)
    assert block.ffn.proj_down.weight.std().item() == pytest.approx(back, rel=0.05)
    assert not block.recurrent.any() and not block.bias[[0, 2, 3]].any()
    for head in block.bias[1]:
        for j in (0, 1, 31, 63):
            assert head[j].item() == pytest.approx(5 - 12 * (j / 63) ** (0.3 + 1.3 / 3), abs=1e-4)
    depths = [block.bias[1, 0, 32].item() for block in xlstm_stack(64, 3, "0:1", num_heads=1).blocks]
    assert depths == pytest.approx([5 - 12 * (32 / 63) ** p for p in (0.3, 0.95, 1.6)], abs=1e-4)

    stack = xlstm_stack(32, 2, "1:1")
    fresh = {name: p.clone() for name, p in stack.named_parameters()}
    disturb(stack).float()
    for block in (*stack.blocks, stack.out_norm):
        block.reset_parameters()
    assert not stack.out_norm.weight.any() and not stack.blocks[1].recurrent.any()
    for name in ("blocks.0.fgate.bias", "blocks.1.bias", "blocks.0.skip", "blocks.1.norm_ffn.weight"):
        assert torch.equal(stack.get_parameter(name), fresh[name])
    for name in ("blocks.0.proj_up.weight", "blocks.1.ffn.proj_up.weight"):
        redrawn = stack.get_parameter(name)
        assert not torch.equal(redrawn, fresh[name])
        assert redrawn.std().item() == pytest.approx((2 / (5 * 32)) ** 0.5, rel=0.08)


def test_dropout_acts_on_both_branches_and_in_training_only():
    for block in (mLSTMBlock(32, dropout=1.0), sLSTMBlock(32, dropout=1.0)):
        x = torch.randn(2, 5, 32)
        assert torch.equal(block(x), x)
        assert (block.eval()(x) - x).abs().amax() > 0.1
    stack = xlstm_stack(32, 2, "1:1", dropout=0.5)
    assert not torch.equal(stack(x), stack(x))
    assert torch.equal(stack.eval()(x), stack(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trains_in_low_precision_and_autocast(dtype):
    stack = disturb(xlstm_stack(32, 2, "1:1"), 0.1)
    x = torch.randn(2, 12, 32)
    expected = stack(x.double())
    stack.float()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y, state = stack(x, return_state=True)
        step, _ = stack.step(x[:, 0], state)
    y.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in stack.parameters())
    assert torch.isfinite(step).all()
    assert_close(y, expected, 2e-6 if dtype == torch.float32 else 3e-2)
    if dtype == torch.bfloat16:
        y, state = stack.to(dtype)(x.to(dtype), return_state=True)
        assert y.dtype == dtype and stack.step(x[:, 0].to(dtype), state)[0].dtype == dtype


def test_compiles_without_graph_breaks():
    stack = xlstm_stack(32, 2, "1:1")
    x = torch.randn(2, 12, 32, requires_grad=True)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    inputs = [x, *stack.parameters()]
    for a, b in zip(*(torch.autograd.grad(m(x).square().sum(), inputs) for m in (compiled, stack))):
        assert_close(a, b, 1e-5)
    step = torch.compile(stack.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        _, state = stack(x, return_state=True)
        for _ in range(2):
            (y, following), (expected, state) = step(x[:, 0], state), stack.step(x[:, 0], state)
            for a, b in zip(leaves((y, following)), leaves((expected, state)), strict=True):
                assert_close(a, b, 1e-5)


class Step(torch.nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x_t, state):
        return self.stack.step(x_t, state)


def test_exports_with_its_states():
    """Sequences of any length and batch, and a step that is saved and loaded with the types of its states."""
    stack = xlstm_stack(32, 2, "1:1").eval()
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        sizes = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("T", min=2, max=4096)}
        program = torch.export.export(
            stack,
            (torch.randn(2, 12, 32),),
            {"return_state": True},
            dynamic_shapes={"x": sizes, "return_state": None},
        ).module()
        expected, state = stack(x, return_state=True)
        y, same = program(x, return_state=True)
        for a, b in zip(leaves((y, same)), leaves((expected, state)), strict=True):
            assert_close(a, b, 1e-5)

        file = io.BytesIO()
        torch.export.save(torch.export.export(Step(stack), (x[:, 0], state)), file)
        file.seek(0)
        y, following = torch.export.load(file).module()(x[:, 0], state)
        assert_close(y, stack.step(x[:, 0], state)[0], 1e-5)
    assert all(type(s) is BlockState for s in following) and type(following[0].cell) is MLSTMState
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)[1]) is BlockState


def test_errors():
    with pytest.raises(ValueError, match=r"num_heads=3 must divide the inner width 64 \(proj_factor \* dim"):
        mLSTMBlock(32, 3)
    with pytest.raises(ValueError, match="num_heads=5 must divide dim=32"):
        sLSTMBlock(32, 5)
    for heads in (0, -1):
        message = rf"num_heads={heads} must divide .*; possible: 1, 2, 4, 8, 16, 32"
        for pattern in ("1:0", "0:1"):
            with pytest.raises(ValueError, match=message):
                xlstm_stack(32, 1, pattern, num_heads=heads)
    for pattern in ("1:0", "0:1"):
        with pytest.raises(ValueError, match=r"x has shape \(2, 0, 32\); pass \(B, T, D\)"):
            xlstm_stack(32, 1, pattern)(torch.randn(2, 0, 32))
    with pytest.raises(RuntimeError, match="triton"):
        xlstm_stack(32, 1, "0:1", backend="triton")(torch.randn(1, 2, 32))
