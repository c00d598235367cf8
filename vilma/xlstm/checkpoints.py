"""A filter that turns published state dictionaries into ours."""

import re
from collections.abc import Mapping

from torch import Tensor

_STACK = {"post_blocks_norm": "out_norm"}
_BLOCK = {"xlstm_norm": "norm", "xlstm.conv1d.conv": "conv"}
_MLSTM = _BLOCK | {
    "xlstm.proj_up": "proj_up",
    "xlstm.q_proj": "q",
    "xlstm.k_proj": "k",
    "xlstm.v_proj": "v",
    "xlstm.mlstm_cell.igate": "igate",
    "xlstm.mlstm_cell.fgate": "fgate",
    "xlstm.mlstm_cell.outnorm": "outnorm",
    "xlstm.learnable_skip": "skip",
    "xlstm.proj_down": "proj_down",
}
_SLSTM = _BLOCK | {
    # the package feeds the layer it calls fgate to the input gate of its cell, and igate to the forget gate
    "xlstm.fgate": "igate",
    "xlstm.igate": "fgate",
    "xlstm.zgate": "zgate",
    "xlstm.ogate": "ogate",
    "xlstm.slstm_cell._recurrent_kernel_": "recurrent",
    "xlstm.slstm_cell._bias_": "bias",
    "xlstm.group_norm": "outnorm",
    "ffn_norm": "norm_ffn",
    "ffn.proj_up": "ffn.proj_up",
    "ffn.proj_down": "ffn.proj_down",
}


def from_xlstm_package(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The state dictionary of an ``xLSTMBlockStack`` of the PyPI package ``xlstm`` as one of `xlstm_stack`.

    Reads both forms of its sLSTM cell, which lay out their weights differently: ``vanilla`` and ``cuda``. The
    package's defaults are those of `xlstm_stack`, but for ``bias=False`` and the number of heads.

    Args:
        state_dict: with keys ``<prefix>blocks.<j>.*`` and ``<prefix>post_blocks_norm.*``.
        prefix: of the keys to take, such as ``xlstm_block_stack.`` of its ``xLSTMLMModel``.

    Returns:
        ``blocks.<j>.*`` and ``out_norm.*``, for `load_state_dict`. Tensors are views where they can be.

    Raises:
        ValueError: a key under the prefix that the stack has no place for, or none at all.
    """
    theirs = {key.removeprefix(prefix): x for key, x in state_dict.items() if key.startswith(prefix)}
    recurrent = {
        key.partition(".xlstm.")[0]: x for key, x in theirs.items() if key.endswith("._recurrent_kernel_")
    }
    ours, unknown = {}, []
    for key, x in theirs.items():
        match = re.fullmatch(r"(blocks\.\d+)\.(.+)", key)
        block, name = match.groups() if match else ("", key)
        if name.endswith("causal_mask"):  # a buffer of old versions
            continue
        kernel = recurrent.get(block)
        renamed = _rename(name, (_MLSTM if kernel is None else _SLSTM) if block else _STACK)
        if renamed is None:
            unknown.append(key)
            continue
        if renamed == "recurrent":
            x = _recurrent(x)
        elif renamed == "bias":
            x = _bias(x, kernel)
        ours[f"{block}.{renamed}".lstrip(".")] = x
    if unknown:
        raise ValueError(
            f"no place for {len(unknown)} of {len(theirs)} keys, such as {unknown[:3]}; pass the state "
            "dictionary of an xLSTMBlockStack, with its prefix where it is part of another model"
        )
    if not ours:
        raise ValueError(f"no key starts with prefix={prefix!r}; the keys start as {list(state_dict)[:3]}")
    return ours


def _rename(name: str, names: dict[str, str]) -> str | None:
    if name in names:
        return names[name]
    module, _, parameter = name.rpartition(".")
    return f"{names[module]}.{parameter}" if module in names and parameter in ("weight", "bias") else None


def _is_vanilla(kernel: Tensor) -> bool:
    """Whether a recurrent kernel is (H, G Dout, Din), the vanilla cell's, and not (H, Din, G Dout)."""
    return kernel.shape[1] == 4 * kernel.shape[2]


def _recurrent(kernel: Tensor) -> Tensor:
    """(H, Din, G, Dout)."""
    if _is_vanilla(kernel):
        return kernel.unflatten(1, (4, -1)).permute(0, 3, 1, 2)
    return kernel.unflatten(2, (4, -1))


def _bias(bias: Tensor, kernel: Tensor) -> Tensor:
    """(G, H, D), from (G H D) of the vanilla cell or (H G D) of the other one."""
    heads = kernel.shape[0]
    if _is_vanilla(kernel):
        return bias.view(4, heads, -1)
    return bias.view(heads, 4, -1).transpose(0, 1)
