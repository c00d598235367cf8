"""The recurrent cells' Triton kernels without a GPU: in the interpreter against float64, and compiled.

Both run in processes of their own, as those of `test_mlstm_triton` do.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vilma.xlstm import rnn_triton
from vilma.xlstm.rnn_torch import Form
from vilma.xlstm.rnn_triton_tiles import RESIDENT, WHOLE, plan_for

from .test_mlstm_triton import check, run

ROOT = Path(__file__).resolve().parents[2]
CELLS = ("slstm", "lstm", "gru", "elman")
FORMS = ("resident", "whole", "alternating")
KINDS = ("sm80", "sm90", "sm100", "gfx942")
ALL = {"state": True, "last": True, "reset": True}
TILED = {"dim": 24, "tile": [16, 16]}


def ratios(cases: list[dict], *, interpret: bool = True, packages: Path | None = None) -> list[dict]:
    done = run("rnn_triton_cases.py", cases, interpret=interpret, packages=packages)
    return json.loads(done.stdout.splitlines()[-1])


def limit_of(case: dict) -> float:
    """RMS ratio; the interpreter cuts bfloat16 off instead of rounding it."""
    return {"bfloat16": 1.5e-2, "float16": 2e-3}.get(case.get("dtype"), 1e-5)


FAST = {
    **{
        f"{x} resident": {"cell": x, "steps": 4, "reverse": reverse, "clip": 0.1, "batch": 3, **ALL}
        for x, reverse in zip(CELLS, (True, False, True, False))
    },
    **{
        f"{x} {form}": {"cell": x, "form": form, "steps": 3, "clip": 0.1, **ALL, **TILED}
        for x, form in zip(CELLS, ("alternating", "whole", "alternating", "whole"))
    },
    "one step of one": {"batch": 1, "steps": 1, "dim": 40, "bias": False},
    "two batch tiles": {"batch": 17, "steps": 3, "dim": 24, "layout": "gthbd"},
    "extremes": {"gates": "mixed30", "steps": 5, "state": True, "last": True},
    "bfloat16": {"dtype": "bfloat16", "steps": 4},
    "float16 alternating": {"cell": "gru", "dtype": "float16", "form": "alternating", "steps": 3, **TILED},
    "operator": {"cell": "slstm", "operator": True, "steps": 3, "dim": 24, "reverse": True, **ALL},
    "step": {"step": True, "steps": 1, "dim": 40, "heads": 2, "state": True},
    "step of the operator": {"step": True, "operator": True, "steps": 1, "cell": "gru"},
}


@pytest.fixture(scope="module")
def fast_ratios():
    return dict(zip(FAST, ratios(list(FAST.values())), strict=True))


@pytest.mark.parametrize("name", FAST)
def test_interpreter(name, fast_ratios):
    check(FAST[name], fast_ratios[name], limit_of(FAST[name]))


def sweep() -> list[dict]:
    cases = []
    for cell, form, reverse in itertools.product(CELLS, FORMS, (False, True)):
        cases.append({"cell": cell, "form": form, "reverse": reverse, "steps": 4, **ALL, **TILED})
    for cell, form in zip(CELLS, ("whole", "alternating", "resident", "alternating")):
        cases.append({"cell": cell, "form": form, "steps": 3, "bias": False, **TILED})
        cases.append({"cell": cell, "form": form, "steps": 4, "clip": 0.05, "state": True, **TILED})
        cases.append({"cell": cell, "steps": 5, "gates": "mixed30", "layout": "bthgd", "last": True})
        cases.append({"cell": cell, "form": form, "steps": 5, "gates": "mixed30", "state": True})
        cases.append({"cell": cell, "steps": 4, "clip": 0.0, "reset": True})
        cases += [{"cell": cell, "steps": 4, "dtype": x} for x in ("bfloat16", "float16")]
        cases.append({"cell": cell, "form": "whole", "steps": 3, "dtype": "bfloat16", **TILED})
        cases += [{"cell": cell, "step": True, "steps": 1, "dim": 80, "state": x} for x in (False, True)]
        cases.append({"cell": cell, "operator": True, "steps": 3, "clip": 0.1, **ALL})
    for dim, cell in itertools.product((16, 40, 64, 80), ("slstm", "gru")):
        cases.append({"cell": cell, "dim": dim, "form": "resident", "steps": 2, "heads": 2})
        cases.append({"cell": cell, "dim": dim, "form": "alternating", "steps": 2, "tile": [32, 32]})
    for batch, steps in ((1, 1), (2, 2), (15, 1), (16, 2), (17, 3), (1, 9)):
        cases.append({"batch": batch, "steps": steps, "state": True, "last": True})
        cases.append({"cell": "lstm", "form": "whole", "batch": batch, "steps": steps, **TILED})
    for name in ("h", "c", "n", "m"):
        cases.append({"alone": name, "steps": 4, "last": True, "state": True, "reverse": True})
    return cases


@pytest.mark.long
def test_interpreter_sweep():
    cases = sweep()
    wrong = []
    for case, found in zip(cases, ratios(cases), strict=True):
        try:
            check(case, found, limit_of(case))
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_the_gpu():
    """The same cases, and the sizes that the interpreter is too slow for."""
    cases = [*FAST.values(), *sweep()]
    for dim, dtype in itertools.product((16, 32, 64, 96, 128, 192, 320), ("bfloat16", "float32")):
        for cell, form in itertools.product(CELLS, (None, "whole", "alternating")):
            form_ = {"cell": cell, "form": form, "dim": dim, "dtype": dtype}
            cases.append({"batch": 21, "steps": 70, "heads": 3, **form_, **ALL})
    for case, found in zip(cases, ratios(cases, interpret=False), strict=True):
        # 70 steps add up; float32 sums of thousands of terms
        longer = case.get("steps", 5) > 20
        check(case, found, 2 * limit_of(case) if longer else limit_of(case))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_on_the_gpu_the_same_again(cell, form):
    """What changes between runs would be a race; a CUDA graph takes the launches."""
    dim = 64 if form == "resident" else 160
    generator = torch.Generator("cuda").manual_seed(0)
    gates = {"gru": 3, "elman": 1}.get(cell, 4)
    new = {"device": "cuda", "generator": generator}
    wx = torch.randn(33, 50, gates, 4, dim, **new).bfloat16()
    r = (torch.randn(4, dim, gates, dim, **new) * dim**-0.5).bfloat16()
    plan = plan_for("sm90", wx.dtype, cell, dim, form)
    none = (None,) * {"slstm": 4, "lstm": 2}.get(cell, 1)

    def once():
        h, _ = rnn_triton.forward(wx, r, None, none, None, Form(cell, False, None), False, plan)
        grads = rnn_triton.backward(
            (h, *none), wx, r, None, none, None, h, none, Form(cell, False, None), plan
        )
        return h, grads[0]

    first = once()
    for _ in range(5):
        assert all(torch.equal(x, y) for x, y in zip(first, once()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(first, captured))


# Shared memory: what sm_86 and sm_89 have, an H100, a B200, an MI300. On the first, r of four gates of 128
# features fills the registers, and there is no room for a part of it elsewhere: a few instructions spill.
LIMITS = {
    "sm_80": {"registers": 255, "shared": 99 * 1024, "spills": 24},
    "sm_90": {"registers": 255, "shared": 227 * 1024, "spills": 0},
    "sm_100": {"registers": 255, "shared": 227 * 1024, "spills": 0},
    "gfx942": {"registers": 512, "shared": 64 * 1024, "spills": 0},
}
# Every row of the table, with and without what costs registers.
SHAPES = [
    {"dim": 64},
    {"dim": 96, "reset": True, "clip": 1.0},
    {"dim": 96, "state": False},
    {"dim": 384},
    {"dim": 64, "dtype": "float32"},
    {"cell": "lstm", "dim": 192},
    {"cell": "gru", "dim": 96},
    {"cell": "gru", "dim": 768, "dtype": "float32"},
    {"cell": "elman", "dim": 256},
]


def faults(found: dict, spills: int = 0) -> list[str]:
    """What is wrong with a line of the report; ``spills`` are forgiven beyond the limit."""
    if "error" in found:
        return [found["error"]]
    limits = LIMITS[found["target"]]
    limits = limits | {"spills": max(limits["spills"], spills)}
    over = [name for name, most in limits.items() if found[name] > most]
    return over if found["matrix"] else [*over, "no matrix instructions"]


def jobs_for(target: str) -> list[dict]:
    precision = "ieee" if target == "gfx942" else "tf32x3"
    return [
        {"target": target, **shape, "precision": precision if "dtype" in shape else "ieee"}
        for shape in SHAPES
    ]


@pytest.mark.long
@pytest.mark.parametrize("target", [x for x in LIMITS if x != "sm_100"])
def test_compiled_resources(target):
    """Nothing spills to memory, and tiles fit, at every row of the table."""
    lines = run("rnn_triton_compile.py", jobs_for(target)).stdout.splitlines()
    print("\n".join(lines))
    found = [json.loads(line) for line in lines]
    kernels = {"forward_resident", "backward_resident", "forward_tiled", "replay", "backward_tiled"}
    assert {x["kernel"] for x in found} == kernels
    wrong = [f"{faults(x)}: {x}" for x in found if faults(x)]
    assert not wrong, "\n".join(wrong)


def test_a_new_batch_or_length_compiles_nothing():
    """What tells compiled kernels apart stays the same; with a head size that is no multiple of 16, too."""
    shapes = [{"dim": 24}, {"dim": 64, "cell": "gru"}, {"dim": 320, "cell": "lstm"}]
    sizes = [{"batch": 16, "steps": 3}, {"batch": 1, "steps": 1}, {"batch": 7, "steps": 33}]
    jobs = [{**shape, **size, "compile": False, "reset": True} for shape in shapes for size in sizes]
    lines = run("rnn_triton_compile.py", jobs).stdout.splitlines()
    # each key is printed once: forward, replay, backward and step of three head sizes
    assert len(lines) == 12, [json.loads(line)["kernel"] for line in lines]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_an_entry_for_every_head_size(kind, dtype):
    row = "sm90" if kind == "sm100" else kind
    for cell, dim in itertools.product(CELLS, (1, 16, 17, 64, 96, 128, 129, 256, 257, 768, 3000)):
        plan = plan_for(kind, dtype, cell, dim)
        for tile in plan[1:]:
            assert all(x & (x - 1) == 0 for x in (tile.bb, tile.bd, tile.bk, tile.warps))
            assert min(tile.bb, tile.bd, tile.bk) >= 16
        if plan.form == "resident":
            assert dim * dim * dtype.itemsize <= RESIDENT[row]
        else:
            assert (plan.form == "whole") == (dim <= WHOLE[row])
    assert plan_for(kind, torch.bfloat16, "slstm", 64 if kind == "gfx942" else 96).form == "resident"


def test_float64_is_refused_by_name():
    assert rnn_triton.supports(torch.zeros(1)) == (True, "")
    assert "float64" in rnn_triton.supports(torch.zeros(1, dtype=torch.float64))[1]


def test_import_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import vilma.xlstm.rnn_triton_backend"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
