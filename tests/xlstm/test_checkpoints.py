"""State dictionaries of the public package, against what it computes with them."""

import pytest
import torch

from vilma.testing import assert_close, golden
from vilma.xlstm import from_xlstm_package, xlstm_stack


def stored():
    arrays = golden("xlstm_stack", "msm_d32.npz")
    weights = {name.removeprefix("w/"): w for name, w in arrays.items() if name.startswith("w/")}
    return arrays, weights


def test_the_block_stack_of_the_public_package():
    """Outputs and input gradients of the package's own stack, at once and step by step."""
    arrays, weights = stored()
    stack = xlstm_stack(32, 3, slstm_at=[1])
    stack.load_state_dict(from_xlstm_package(weights))
    assert_close(stack(arrays["x"]), arrays["y"], 3e-6)
    stack.double()
    x = arrays["x"].double().requires_grad_()
    y = stack(x)
    assert_close(y, arrays["y"], 1e-6)  # they are stored in float32
    (dx,) = torch.autograd.grad((y * arrays["g"].double()).sum(), x)
    assert_close(dx, arrays["dx"], 1e-6)
    state, outputs = None, []
    for x_t in x.unbind(1):
        y, state = stack.step(x_t, state)
        outputs.append(y)
    assert_close(torch.stack(outputs, 1), arrays["y"], 1e-6)


def test_the_other_layout_of_the_recurrent_weights():
    """The CUDA cell keeps (H, Din, G Dout) and (H, G, D), the plain one (H, G Dout, Din) and (G, H, D)."""
    _, weights = stored()
    expected = from_xlstm_package(weights)
    kernel, bias = "blocks.1.xlstm.slstm_cell._recurrent_kernel_", "blocks.1.xlstm.slstm_cell._bias_"
    other = weights | {
        kernel: torch.einsum("hgoi->higo", weights[kernel].view(4, 4, 8, 8)).reshape(4, 8, 32),
        bias: torch.einsum("ghd->hgd", weights[bias].view(4, 4, 8)).reshape(-1),
    }
    ours = from_xlstm_package(other)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_part_of_a_larger_model():
    _, weights = stored()
    model = {f"xlstm_block_stack.{name}": w for name, w in weights.items()}
    model |= {
        "lm_head.weight": torch.zeros(1),
        "xlstm_block_stack.blocks.0.xlstm.mlstm_cell.causal_mask": None,
    }
    ours = from_xlstm_package(model, "xlstm_block_stack.")
    assert ours.keys() == xlstm_stack(32, 3, slstm_at=[1]).state_dict().keys()


def test_errors():
    _, weights = stored()
    with pytest.raises(ValueError, match=r"no place for 1 of 43 keys, such as \['lm_head.weight'\]"):
        from_xlstm_package(weights | {"lm_head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no key starts with prefix='encoder\.'"):
        from_xlstm_package(weights, "encoder.")
