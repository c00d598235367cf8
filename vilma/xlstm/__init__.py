"""The kernel layer: recurrences as functions of tensors, and the few layers both model families use."""

from .blocks import BlockStack, xLSTMLargeBlock
from .checkpoints import from_xlstm_package
from .layers import BlockDiagonalLinear, CausalConv1d, LayerNorm, MultiHeadNorm
from .mlstm import MLSTMState, mlstm, mlstm_step
from .rnn import rnn, rnn_step
from .v1_blocks import BlockState, mLSTMBlock, slstm_positions, sLSTMBlock, xlstm_stack

__all__ = [
    "BlockDiagonalLinear",
    "BlockStack",
    "BlockState",
    "CausalConv1d",
    "LayerNorm",
    "MLSTMState",
    "MultiHeadNorm",
    "from_xlstm_package",
    "mLSTMBlock",
    "mlstm",
    "mlstm_step",
    "rnn",
    "rnn_step",
    "sLSTMBlock",
    "slstm_positions",
    "xLSTMLargeBlock",
    "xlstm_stack",
]
