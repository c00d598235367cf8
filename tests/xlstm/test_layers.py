"""The layers that both model families use, against dense and plain twins."""

import pytest
import torch

from vilma.testing import assert_close
from vilma.xlstm.layers import BlockDiagonalLinear


@pytest.mark.parametrize(
    "features, block_width", [(64, 4), (24, 4), (12, 4), (6, 3), (10, 1), (64, 64), (96, 48)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_block_diagonal_linear_is_a_block_diagonal_matrix(features, block_width, bias):
    layer = BlockDiagonalLinear(features, block_width, bias).double()
    x = torch.randn(2, 3, features, dtype=torch.float64, requires_grad=True)
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
