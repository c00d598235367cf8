"""The kernel layer: recurrences as functions of tensors, and the few layers both model families use."""

from .blocks import BlockStack, xLSTMLargeBlock
from .layers import BlockDiagonalLinear, MultiHeadNorm
from .mlstm import MLSTMState, mlstm, mlstm_step

__all__ = [
    "BlockDiagonalLinear",
    "BlockStack",
    "MLSTMState",
    "MultiHeadNorm",
    "mlstm",
    "mlstm_step",
    "xLSTMLargeBlock",
]
