"""The xLSTM-7B block and the stack: against the equations, step by step, in any dtype."""

import pytest
import torch
import torch.nn.functional as F

from vilma.testing import assert_close, golden
from vilma.xlstm import BlockStack, MultiHeadNorm, mlstm, xLSTMLargeBlock


def make_block(dim=32, num_heads=4, **options):
    block = xLSTMLargeBlock(dim, num_heads, **options).double()
    with torch.no_grad():  # gates and norms that do something
        for name, parameter in block.named_parameters():
            if "gate_preact" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter))
            if name.endswith("igate_preact.bias"):
                parameter.add_(10.0)
    return block


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def by_equations(w, x, heads):
    """The block as arXiv 2503.13427 writes it, one tensor operation at a time, with the recurrent mLSTM."""
    y = rms_norm(x, w["norm_mlstm.weight"])

    def project(name):
        return y @ w[f"mlstm_layer.{name}.weight"].T + w.get(f"mlstm_layer.{name}.bias", 0.0)

    q, k, v = (torch.stack(project(name).chunk(heads, -1), 1) for name in "qkv")
    i, f = (15 * torch.tanh(project(f"{name}gate_preact") / 15).transpose(1, 2) for name in "if")
    h = mlstm(q, k, v, i, f, backend="naive")
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    h = torch.cat(h.unbind(1), -1) * w["mlstm_layer.multihead_norm.weight"]
    x = x + (torch.sigmoid(project("ogate_preact")) * h) @ w["mlstm_layer.out_proj.weight"].T
    y = rms_norm(x, w["norm_ffn.weight"])
    gate, up = y @ w["ffn.proj_up_gate.weight"].T, y @ w["ffn.proj_up.weight"].T
    return x + (F.silu(gate) * up) @ w["ffn.proj_down.weight"].T


@pytest.mark.parametrize("qk_dim_factor, v_dim_factor", [(0.5, 1.0), (1.0, 0.5)])
def test_block_follows_the_equations(qk_dim_factor, v_dim_factor):
    block = make_block(qk_dim_factor=qk_dim_factor, v_dim_factor=v_dim_factor)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    assert_close(block(x), by_equations(dict(block.named_parameters()), x, 4), 1e-10)


@pytest.mark.parametrize("rows", [1, 16, 33])
def test_inference_follows_the_equations(rows):
    """In float32 without gradients, where few rows take another kernel; large enough that they do."""
    block = make_block(256, 4).requires_grad_(False)
    x = torch.randn(1, rows, 256, dtype=torch.float64)
    exact = by_equations(dict(block.named_parameters()), x, 4)
    block = block.float()
    assert_close(block(x.float()).double(), exact, 1e-5)
    stepped, state = [], None
    for x_t in x.float().unbind(1):
        with torch.no_grad():
            y, state = block.step(x_t, state)
        stepped.append(y)
    assert_close(torch.stack(stepped, 1).double(), exact, 1e-5)
    with torch.no_grad():
        assert_close(block(x.float()).double(), exact, 1e-5)


def test_parameters_are_those_of_the_reference():
    stored = golden("pmp", "xlstm_denoiser_tiny.npz")
    prefix = "w/encoder."
    expected = {
        name.removeprefix(prefix): tuple(x.shape) for name, x in stored.items() if name.startswith(prefix)
    }
    stack = BlockStack([xLSTMLargeBlock(32, 4) for _ in range(2)], torch.nn.RMSNorm(32, eps=1e-6))
    assert {name: tuple(x.shape) for name, x in stack.named_parameters()} == expected
    with torch.device("meta"):
        assert xLSTMLargeBlock(512, 8).ffn.proj_up.out_features == 1408
        block = xLSTMLargeBlock(4096, 8)  # xLSTM-7B's
    assert block.ffn.proj_up.out_features == 10944 and block.mlstm_layer.multihead_norm.head_dim == 512
    assert block.mlstm_layer.q.out_features == 2048


@pytest.mark.parametrize("cut", [0, 5])
def test_steps_equal_sequence(cut):
    """A sequence at once, or its start and then step by step: the same outputs and states."""
    stack = BlockStack([make_block(), make_block()], torch.nn.RMSNorm(32)).double()
    x = torch.randn(3, 8, 32, dtype=torch.float64)
    whole, states = stack(x, return_state=True)
    assert_close(stack(x), whole, 1e-14)
    outputs, state = ([], None)
    if cut:
        start, state = stack(x[:, :cut], return_state=True)
        outputs = list(start.unbind(1))
    for x_t in x[:, cut:].unbind(1):
        y, state = stack.step(x_t, state)
        outputs.append(y)
    assert_close(torch.stack(outputs, 1), whole, 1e-10)
    for given, expected in zip(state, states, strict=True):
        for a, b in zip(given, expected):
            assert_close(a, b, 1e-10)


def test_the_state_given_is_not_changed():
    block = make_block()
    _, state = block(torch.randn(2, 3, 32, dtype=torch.float64), return_state=True)
    before = [x.clone() for x in state]
    block.step(torch.randn(2, 32, dtype=torch.float64), state)
    block(torch.randn(2, 3, 32, dtype=torch.float64), state)
    assert all(torch.equal(a, b) for a, b in zip(state, before))


def test_causal():
    block = make_block()
    x = torch.randn(1, 10, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6:] += 1.0
    assert torch.equal(block(x)[:, :6], block(changed)[:, :6])


def test_gates_are_capped():
    block = make_block()
    with torch.no_grad():
        block.mlstm_layer.igate_preact.weight.mul_(1e6)
        block.mlstm_layer.fgate_preact.weight.mul_(1e6)
    y = block(torch.randn(2, 20, 32, dtype=torch.float64))
    assert torch.isfinite(y).all()


def test_initialisation():
    block = xLSTMLargeBlock(256, 4, num_blocks=4)
    layer = block.mlstm_layer
    assert not layer.igate_preact.weight.any() and not layer.fgate_preact.weight.any()
    assert torch.equal(layer.igate_preact.bias, torch.full((4,), -10.0))
    assert torch.allclose(layer.fgate_preact.bias, torch.linspace(3, 6, 4))
    assert layer.q.weight.std().item() == pytest.approx((2 / (5 * 256)) ** 0.5, rel=0.05)
    for weight in (layer.out_proj.weight, block.ffn.proj_down.weight):
        assert weight.std().item() == pytest.approx(2 / (4 * 16), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_trains_in_low_precision_and_autocast(dtype):
    block = make_block().float()
    x = torch.randn(2, 12, 32)
    expected = block.double()(x.double())
    block.float()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = block(x)
    y.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
    assert_close(y, expected, 1e-5 if dtype == torch.float32 else 3e-2)
    if dtype == torch.bfloat16:
        assert block.to(dtype)(x.to(dtype)).dtype == dtype


def test_multi_head_norm():
    norm = MultiHeadNorm(3, 8, bias=True).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    expected = F.group_norm(x.reshape(10, 24), 3, norm.weight, norm.bias, eps=1e-6).view(2, 5, 24)
    assert_close(norm(x), expected, 1e-12)
    with pytest.raises(ValueError, match=r"\(\.\.\., 3, 8\)"):
        norm(x.transpose(-1, -2))


def test_errors():
    with pytest.raises(ValueError, match="num_heads=5 must divide"):
        xLSTMLargeBlock(32, 5)
    for heads in (0, -2):
        with pytest.raises(ValueError, match=rf"num_heads={heads} must divide .*; possible: 1, 2, 4, 8, 16$"):
            xLSTMLargeBlock(32, heads)
    with pytest.raises(ValueError, match="possible: none"):
        xLSTMLargeBlock(32, 1, qk_dim_factor=0.01)
    with pytest.raises(ValueError, match=r"x has shape \(2, 0, 32\); pass \(B, T, D\)"):
        xLSTMLargeBlock(32, 4)(torch.randn(2, 0, 32))
    stack = BlockStack([xLSTMLargeBlock(32, 4)])
    with pytest.raises(ValueError, match="got 2 states for 1 blocks"):
        stack(torch.randn(1, 2, 32), [None, None])


def test_a_stack_of_nothing_has_last_positions():
    x = torch.randn(2, 7, 32)
    assert torch.equal(BlockStack([])(x, last=2), x[:, -2:])
    with pytest.raises(ValueError, match="last=8 for 7 steps"):
        BlockStack([])(x, last=8)


def test_only_the_last_positions():
    stack = BlockStack([xLSTMLargeBlock(32, 4), xLSTMLargeBlock(32, 4)])
    x = torch.randn(2, 7, 32)
    y, state = stack(x, return_state=True)
    tail, same = stack(x, return_state=True, last=3)
    assert torch.equal(tail, y[:, -3:])
    for left, right in zip(same, state, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    for wrong in (0, -1, 8):
        with pytest.raises(ValueError):
            stack(x, last=wrong)
