"""The Triton kernels around the mLSTM without a GPU: in the interpreter against float64, and compiled.

Both run in processes of their own, as those of `test_mlstm_triton` do. The kernels are reached through
`vilma.vil.mixing`, whose plain twin is what they are compared with.
"""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from vilma.vil.mixing import MixWeights
from vilma.xlstm import mix_triton

from .test_mlstm_triton import run

ALL_BIASES = ["conv_bias", "q_bias", "k_bias", "v_bias", "norm_bias"]


def ratios(cases: list[dict], *, interpret: bool = True) -> list[dict[str, float]]:
    return json.loads(run("mix_triton_cases.py", cases, interpret=interpret).stdout.splitlines()[-1])


def check(case: dict, found: dict[str, float]) -> None:
    """Against float64. The interpreter cuts bfloat16 off instead of rounding it."""
    limit = {"bfloat16": 2e-2, "float16": 5e-3}.get(case.get("dtype"), 2e-5)
    limits = dict.fromkeys(found, limit) | {"y": limit / 2, "gates": 1e-6}
    # moves all input gates together, which nearly cancels: a small difference of rounded numbers
    limits["di_bias"] = 5 * limit
    wrong = {name: error for name, error in found.items() if not error <= limits[name]}
    assert not wrong, f"{case}: {wrong}"


FAST = [
    {
        "batch": 1,
        "grid": [3, 4],
        "heads": 3,
        "dim": 12,
        "dtype": "float16",
        "parameters": "float32",
        "reverse": True,
        "layout": "padded",
    },
    {"grid": [2, 3], "conv": "causal", "kernel": 4, "without": ["q_bias", "norm_bias"]},
]
SWEEP = [
    *({"width": width, "batch": 1, "reverse": width > 4} for width in (1, 2, 8, 16)),
    *({"kernel": 5, "grid": [2, 7], "reverse": reverse, "layout": "turned"} for reverse in (False, True)),
    {"conv": "causal", "kernel": 3, "reverse": True, "layout": "batch last", "upstream": "expanded"},
    {"conv": "causal", "kernel": 1, "heads": 1, "dim": 48, "upstream": "batch last"},
    {"heads": 4, "dim": 96, "batch": 1, "grid": [3, 3], "table": True, "reverse": True},
    {"heads": 1, "dim": 80, "layout": "offset", "without": ALL_BIASES},
    {"heads": 9, "dim": 4, "without": ["conv_bias"], "save": False},
    {"grid": [1, 2], "batch": 3},
    {"dtype": "bfloat16", "batch": 3, "grid": [5, 4], "reverse": True},
    {"dtype": "bfloat16", "parameters": "float32", "table": True, "heads": 3, "dim": 20},
    {"dtype": "bfloat16", "gates": "float32", "without": ["k_bias", "v_bias"]},
    {"dtype": "float16", "heads": 4, "dim": 16, "kernel": 1, "table": True},
]


def test_interpreter():
    for case, found in zip(FAST, ratios(FAST), strict=True):
        check(case, found)


@pytest.mark.long
def test_interpreter_sweep():
    wrong = []
    for case, found in zip(SWEEP, ratios(SWEEP), strict=True):
        try:
            check(case, found)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_the_gpu():
    cases = [{**case, "table": True} for case in (*FAST, *SWEEP)]
    for inner, dtype, reverse in itertools.product((384, 768, 1536), ("bfloat16", "float32"), (False, True)):
        size = {"batch": 2, "grid": [14, 14], "heads": 4, "dim": inner // 4, "table": True}
        cases.append({**size, "dtype": dtype, "reverse": reverse})
    for case, found in zip(cases, ratios(cases, interpret=False), strict=True):
        check(case, found)


# Registers and shared memory: two programs of 8 warps, or four of 4, on a multiprocessor of an H100. SPILLS:
# instructions, of the kernels with products, which are held to 128 registers there: a hundredth of all.
LIMITS = {
    "sm_80": {"registers": 255, "shared": 48 * 1024},
    "sm_90": {"registers": 128, "shared": 64 * 1024},
    "gfx942": {"registers": 256, "shared": 64 * 1024},
}
SPILLS = {("sm_90", "project_backward"): 48, ("sm_90", "before"): 12}
PRODUCTS = ("before", "project_backward")
SHAPES = [
    {},
    {"inner": 768, "kernels": ["behind_backward"]},
    {"inner": 1536, "parameters": "float32", "kernels": [*PRODUCTS, "behind_backward"]},
]


@pytest.mark.long
@pytest.mark.parametrize("target", LIMITS)
def test_compiled_resources(target):
    """At the sizes of ViL-T, S and B: products are made by matrix instructions, room is left for others."""
    lines = run("mix_triton_compile.py", [{"target": target, **x} for x in SHAPES]).stdout.splitlines()
    print("\n".join(lines))
    found = [json.loads(line) for line in lines]
    kernels = {"behind", "behind_backward", "convolve_backward", "finish", *PRODUCTS}
    assert {x["kernel"] for x in found} == kernels
    wrong = [f"{x['faults']}: {x}" for x in ({**x, "faults": faults(x)} for x in found) if x["faults"]]
    assert not wrong, "\n".join(wrong)


def faults(found: dict) -> list[str]:
    if "error" in found:
        return [found["error"]]
    limits = LIMITS[found["target"]] | {"spills": SPILLS.get((found["target"], found["kernel"]), 0)}
    limits["narrow"] = 0  # see `mlstm_triton_tiles`
    over = [name for name, most in limits.items() if found[name] > most]
    return over + ["no matrix instructions"] * (found["kernel"] in PRODUCTS and not found["matrix"])


def test_another_batch_or_grid_compiles_nothing():
    sizes = {"target": "gfx942", "compile": False}
    others = ({}, {"batch": 5}, {"grid": [16, 16]}, {"grid": [7, 33], "batch": 1})
    found = run("mix_triton_compile.py", [{**sizes, **x} for x in others]).stdout.splitlines()
    assert {json.loads(x)["job"] for x in found} == {0}


def weights(inner=64, heads=4, width=4, kernel=(3, 3), dtype=torch.float32, **others) -> MixWeights:
    gate, block = torch.zeros(heads, 3 * inner), torch.zeros(inner // width, width, width)
    values = dict.fromkeys(MixWeights._fields, torch.zeros(inner))
    values |= {"conv_weight": torch.zeros(inner, 1, *kernel), "i_weight": gate, "f_weight": gate}
    values |= dict.fromkeys(("q_weight", "k_weight", "v_weight"), block)
    return MixWeights(**{name: x.to(dtype) for name, x in values.items()} | others)


def test_what_the_kernels_take():
    u = torch.zeros(2, 3, 5, 128)
    assert mix_triton.supports(u, weights()) and mix_triton.supports(u.bfloat16(), weights())
    assert mix_triton.supports(u, weights(kernel=(4,))) and mix_triton.supports(u, weights(q_bias=None))
    assert not mix_triton.supports(u.double(), weights(dtype=torch.float64))
    assert not mix_triton.supports(u, weights(skip=torch.zeros(64, dtype=torch.float64)))
    assert not mix_triton.supports(u, weights(width=64)) and not mix_triton.supports(
        u, weights(kernel=(2, 2))
    )
    assert not mix_triton.supports(torch.zeros(2, 3, 5, 2 * 3 * 16), weights(inner=48, heads=1, width=3))
    assert not mix_triton.serves(u, weights())  # on a CPU


def test_rows_copy_only_what_is_no_view():
    x = torch.zeros(2, 3, 5, 8)
    assert mix_triton.rows(x).data_ptr() == x.data_ptr()
    padded = torch.zeros(2, 3, 5, 12)[..., :8]
    assert mix_triton.rows(padded).data_ptr() == padded.data_ptr()
    batch_last = torch.zeros(3, 5, 2, 8).permute(2, 0, 1, 3)
    assert mix_triton.rows(batch_last).data_ptr() == batch_last.data_ptr()
    for other in (x.transpose(1, 2).contiguous().transpose(1, 2), x[:1, :1, :1, :1].expand(x.shape)):
        rows = mix_triton.rows(other)
        assert rows.shape == (2, 15, 8) and rows.stride(-1) == 1


@pytest.mark.parametrize("tiles, beside", [(1, 1), (7, 6), (784, 6), (1568, 24), (3, 4000)])
def test_shares_cover_all_tiles(tiles, beside, monkeypatch):
    monkeypatch.setattr(mix_triton, "_multiprocessors", lambda device: 132)
    shares, each = mix_triton._share(torch.device("cpu"), tiles, beside)
    assert shares * each >= tiles > (shares - 1) * each


def test_a_compiler_takes_the_operator_where_kernels_serve(monkeypatch):
    """On a GPU only; elsewhere, and for what they do not serve, as before."""
    from vilma.vil import mixing

    taken = []
    monkeypatch.setattr(mixing, "mix_plain", lambda *_: taken.append("plain"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    operator = SimpleNamespace(vil_mix=lambda *_: [taken.append("operator")])
    monkeypatch.setattr(torch, "ops", SimpleNamespace(vilma=operator))
    u = SimpleNamespace(is_cuda=True, shape=(2, 3, 5, 128), dtype=torch.bfloat16, numel=lambda: 3840)
    mixing.mix(u, weights(), False, 1e-5)
    u.dtype = torch.float64
    mixing.mix(u, weights(), False, 1e-5)
    u.is_cuda = False
    mixing.mix(u, weights(), False, 1e-5)
    assert taken == ["operator", "plain", "operator"]
