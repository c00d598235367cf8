"""The names by which the kernel layer is called: positional ones in their order, then the keywords."""

import inspect

import pytest

from vilma.xlstm import (
    BlockStack,
    MLSTMState,
    mlstm,
    mlstm_step,
    mLSTMBlock,
    rnn,
    rnn_step,
    sLSTMBlock,
    xLSTMLargeBlock,
)

MLSTM = "gate normalize reverse return_state reset chunk_size backend eps"
FUNCTIONS = [
    (mlstm, "q k v i f state", MLSTM),
    (mlstm_step, "q k v i f state", "gate normalize backend eps"),
    (rnn, "wx r b state", "cell reverse return_state reset grad_clip backend"),
    (rnn_step, "wx_t r b state", "cell backend"),
]


@pytest.mark.parametrize(
    "function, positional, keywords", FUNCTIONS, ids=lambda x: getattr(x, "__name__", "")
)
def test_functions(function, positional, keywords):
    parameters = inspect.signature(function).parameters.values()
    of_kind = {kind: [x.name for x in parameters if x.kind == kind] for kind in {x.kind for x in parameters}}
    assert of_kind == {
        inspect.Parameter.POSITIONAL_OR_KEYWORD: positional.split(),
        inspect.Parameter.KEYWORD_ONLY: keywords.split(),
    }


def test_state():
    assert MLSTMState._fields == ("c", "n", "m")


@pytest.mark.parametrize("block", [mLSTMBlock, sLSTMBlock, xLSTMLargeBlock, BlockStack])
def test_blocks(block):
    assert list(inspect.signature(block.forward).parameters)[:4] == ["self", "x", "state", "return_state"]
    assert list(inspect.signature(block.step).parameters) == ["self", "x_t", "state"]
