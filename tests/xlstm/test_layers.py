"""The layers that both model families use, against dense and plain twins."""

import pytest
import torch

from vilma.testing import assert_close
from vilma.xlstm.layers import BlockDiagonalLinear, CausalConv1d, LayerNorm, MultiHeadNorm


@pytest.mark.parametrize(
    "features, block_width", [(64, 4), (24, 4), (12, 4), (6, 3), (10, 1), (64, 64), (96, 48)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, 20])
def test_block_diagonal_linear_is_a_block_diagonal_matrix(features, block_width, bias, rows):
    layer = BlockDiagonalLinear(features, block_width, bias).double()
    x = torch.randn(2, rows, features, dtype=torch.float64, requires_grad=True)
    dense = torch.block_diag(*layer.weight)
    expected = x @ dense.T + (layer.bias if bias else 0.0)
    assert_close(layer(x), expected, 1e-14)
    w = torch.randn_like(expected)
    for a, b in zip(
        *(torch.autograd.grad((y * w).sum(), [x, *layer.parameters()]) for y in (layer(x), expected))
    ):
        assert_close(a, b, 1e-13)


def test_block_diagonal_linear_by_its_formula():
    layer = BlockDiagonalLinear(32, 4).double()
    x = torch.randn(5, 32, dtype=torch.float64)
    y = layer(x)
    for g, o in ((0, 0), (3, 1), (7, 3)):
        expected = sum(layer.weight[g, o, i] * x[:, 4 * g + i] for i in range(4)) + layer.bias[4 * g + o]
        assert_close(y[:, 4 * g + o], expected, 1e-14)


def test_block_diagonal_linear_shapes_and_dtypes():
    layer = BlockDiagonalLinear(32, 4)
    x = torch.randn(3, 32)
    assert_close(layer(x.expand(2, 3, 32)), layer(x).expand(2, 3, 32), 1e-6)
    assert layer(x[0]).shape == (32,)
    assert_close(layer(x.T.contiguous().T), layer(x), 1e-6)
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert set(dict(layer.named_parameters())) == {"weight", "bias"} and layer.weight.shape == (8, 4, 4)
    assert layer.weight.abs().max() <= 0.5 and BlockDiagonalLinear(32, 4, bias=False).bias is None
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16


def test_block_diagonal_linear_errors():
    with pytest.raises(ValueError, match="features=10 is no multiple of block_width=4"):
        BlockDiagonalLinear(10, 4)
    with pytest.raises(ValueError, match=r"pass \(\.\.\., features\) = \(\.\.\., 8\)"):
        BlockDiagonalLinear(8, 4)(torch.randn(2, 12))


def by_mean_and_variance(x, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual_weight", [True, False])
def test_norms_learn_a_weight_or_its_distance_from_one(residual_weight, bias):
    options = {"bias": bias, "eps": 1e-3, "residual_weight": residual_weight}
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    plain = by_mean_and_variance(x, 1e-3)
    for norm, expected in (
        (MultiHeadNorm(3, 8, **options).double(), plain.flatten(-2)),
        (LayerNorm(8, **options).double(), plain),
    ):
        assert_close(norm(x), expected, 1e-12)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(torch.randn_like(parameter))
        weight = 1 + norm.weight if residual_weight else norm.weight
        assert_close(norm(x), expected * weight + (norm.bias if bias else 0), 1e-12)
        assert len(list(norm.parameters())) == 1 + bias
        norm.reset_parameters()
        assert_close(norm(x), expected, 1e-12)


def conv_by_its_formula(conv, x, past):
    """y_t = bias + sum_j w[K - 1 - j] x_{t-j}, one term at a time; past: the inputs before the first."""
    inputs = [*past.unbind(1), *x.unbind(1)]
    outputs = []
    for t in range(x.shape[1]):
        window = inputs[t : t + conv.kernel_size]
        y = sum(conv.weight[:, 0, k] * x_t for k, x_t in enumerate(window))
        outputs.append(y if conv.bias is None else y + conv.bias)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("kernel_size, bias", [(4, True), (3, False), (1, True)])
def test_causal_conv_by_its_formula(kernel_size, bias, steps):
    conv = CausalConv1d(6, kernel_size, bias).double()
    x = torch.randn(2, steps, 6, dtype=torch.float64, requires_grad=True)
    past = torch.randn(2, kernel_size - 1, 6, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros_like(past)
    inputs = [x, *conv.parameters(), *([past] if past.numel() else [])]
    w = torch.randn_like(x)
    for state, before in ((None, zeros), (past, past)):
        for reverse in (False, True):
            y, last = conv(x, state, return_state=True, reverse=reverse)
            assert torch.equal(conv(x, state, reverse=reverse), y)
            run = x.flip(1) if reverse else x
            expected = conv_by_its_formula(conv, run, before)
            assert_close(y, expected.flip(1) if reverse else expected, 1e-14)
            seen = torch.cat([before, run], 1)
            assert torch.equal(last, seen[:, seen.shape[1] - (kernel_size - 1) :])
            losses = ((y * w).sum(), (expected * (w.flip(1) if reverse else w)).sum())
            for a, b in zip(
                *(torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True) for loss in losses)
            ):
                assert (a is None) == (b is None)
                if a is not None:
                    assert_close(a, b, 1e-13)


def test_causal_conv_is_that_of_torch():
    conv, reference = CausalConv1d(6, 4), torch.nn.Conv1d(6, 6, 4, groups=6, padding=3)
    conv.load_state_dict(reference.state_dict())
    x = torch.randn(3, 10, 6)
    assert_close(conv(x), reference(x.mT)[..., :10].mT, 1e-6)
    assert conv(x).is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(conv(x), reference(x.mT)[..., :10].mT.float(), 1e-2)
    assert conv.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert conv.weight.abs().max() <= 0.5 and CausalConv1d(6, bias=False).bias is None


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_causal_conv_steps_equal_the_sequence(cut, kernel_size):
    conv = CausalConv1d(6, kernel_size).double()
    x = torch.randn(2, 8, 6, dtype=torch.float64)
    whole, last = conv(x, return_state=True)
    outputs, state = [], None
    if cut:
        start, state = conv(x[:, :cut], return_state=True)
        outputs = list(start.unbind(1))
    for x_t in x[:, cut:].unbind(1):
        before = None if state is None else state.clone()
        y, following = conv.step(x_t, state)
        assert before is None or torch.equal(before, state)
        outputs.append(y)
        state = following
    assert_close(torch.stack(outputs, 1), whole, 1e-14)
    assert torch.equal(state, last)


def test_causal_conv_errors():
    conv = CausalConv1d(6)
    with pytest.raises(ValueError, match="kernel_size=0"):
        CausalConv1d(6, 0)
    with pytest.raises(ValueError, match=r"pass \(B, T, D\) = \(B, T, 6\)"):
        conv(torch.randn(2, 6, 9))
    with pytest.raises(ValueError, match=r"pass \(B, D\) = \(B, 6\)"):
        conv.step(torch.randn(2, 1, 6))
    with pytest.raises(ValueError, match=r"pass \(B, K - 1, D\) = \(2, 3, 6\)"):
        conv(torch.randn(2, 5, 6), torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match=r"state is 1; pass \(B, K - 1, D\) = \(2, 3, 6\)"):
        conv(torch.randn(2, 5, 6), 1)
