"""The Triton mLSTM without a GPU: kernels in the interpreter against float64, and what compiling them gives.

The interpreter is switched on by an environment variable that is read when triton is imported, and compiling
needs it off: both run in processes of their own. VILMA_TRITON_PYTHON names another Python for them, to test
another Triton.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vilma.xlstm import mlstm_triton
from vilma.xlstm.mlstm_triton_tiles import chunk_of, tiles_for

HERE = Path(__file__).resolve().parent
FORMS = [("exp", True), ("exp", False), ("sigmoid", True), ("sigmoid", False)]


def run(script: str, payload: list[dict], *, interpret: bool = False) -> list[str]:
    """Lines of a script's standard output."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret))}
    paths = [str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [
            os.environ.get("VILMA_TRITON_PYTHON", sys.executable),
            "-W",
            "ignore",
            str(HERE / script),
        ],
        input=json.dumps(payload),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def ratios(cases: list[dict], *, interpret: bool = True) -> list[dict[str, float]]:
    return json.loads(run("triton_cases.py", cases, interpret=interpret)[-1])


def check(case: dict, found: dict[str, float], limit: float) -> None:
    wrong = {name: error for name, error in found.items() if not error <= limit}
    assert not wrong, f"{case}: above {limit:.0e}: {wrong}"


def limit_of(case: dict) -> float:
    if case.get("dtype", "float32") != "float32":
        # the interpreter cuts bfloat16 off instead of rounding it
        return 1.5e-2 if case["dtype"] == "bfloat16" else 2e-3
    return 2e-4 if case.get("gates", "normal") != "normal" else 1e-5


WHOLE = {"state": True, "last": True}
FAST = {
    "one step": {"steps": 1, **WHOLE},
    "whole 48": {"steps": 21, "dim_qk": 48, "dim_v": 48, "tile": [16, 16, 64, 64], "joint": True},
    "whole 80/96 reverse": {
        "steps": 18,
        "dim_qk": 80,
        "dim_v": 96,
        "reverse": True,
        "tile": [16, 16, 128, 32],
    },
    "whole 128 sigmoid": {
        **{"steps": 17, "dim_qk": 128, "dim_v": 128, "gate": "sigmoid", "normalize": False},
        "tile": [32, 16, 32, 128],
    },
    "chunks": {"steps": 23, "chunk": 9, "batch": 2, "dim_qk": 24, "dim_v": 40, "layout": "bthd", **WHOLE},
    "chunks reverse reset": {"steps": 23, "chunk": 9, "heads": 2, "reverse": True, "reset": True, **WHOLE},
    "chunks sigmoid": {"steps": 23, "chunk": 10, "gate": "sigmoid", "reverse": True, **WHOLE},
    "chunks plain exp": {"steps": 20, "chunk": 8, "normalize": False, "joint": True, **WHOLE},
    "chunks zero state": {"steps": 20, "chunk": 8, "eps": 0.3, "tile": [32, 16, 16, 16]},
    "chunks bfloat16": {"steps": 20, "chunk": 8, "dtype": "bfloat16"},
    "mixed30": {"steps": 40, "chunk": 17, "gates": "mixed30", "tile": [32, 16, 16, 16], **WHOLE},
    "step": {"step": True, "steps": 1, "heads": 2, "dim_qk": 80, "dim_v": 48, "state": True},
    "step sigmoid zero": {"step": True, "steps": 1, "gate": "sigmoid", "normalize": False},
}


@pytest.fixture(scope="module")
def fast_ratios():
    return dict(zip(FAST, ratios(list(FAST.values()))))


@pytest.mark.parametrize("name", FAST)
def test_interpreter(name, fast_ratios):
    check(FAST[name], fast_ratios[name], limit_of(FAST[name]))


def sweep() -> list[dict]:
    cases = []
    for (gate, normalize), reverse in itertools.product(FORMS, (False, True)):
        form = {"gate": gate, "normalize": normalize, "reverse": reverse}
        cases += [
            {
                "steps": 23,
                "chunk": 9,
                "batch": 2,
                "dim_qk": 24,
                "dim_v": 40,
                "layout": "bthd",
                **form,
                **WHOLE,
            },
            {"steps": 23, "chunk": 9, "heads": 2, "reset": True, **form, **WHOLE},
            {"steps": 19, "dim_qk": 24, "dim_v": 20, "tile": [16, 16, 32, 32], "joint": True, **form},
            {"steps": 7, "dim_qk": 5, "dim_v": 3, **form, **WHOLE},
            {"steps": 33, "chunk": 16, "state": True, **form},
            {"steps": 33, "chunk": 16, "last": True, **form},
            {"steps": 17, "last": True, **form},
        ]
    for steps in (*range(1, 6), 15, 16, 17, 31, 32, 33, 49):
        cases.append({"steps": steps, "dim_qk": 16, "dim_v": 24, **WHOLE})
        cases.append({"steps": steps, "chunk": 16, "dim_qk": 16, "dim_v": 24, "reverse": True})
    for dim_qk, dim_v in ((16, 48), (48, 48), (80, 80), (96, 96), (96, 128), (128, 64), (128, 128)):
        for gate, reverse in (("exp", False), ("sigmoid", True)):
            form = {"dim_qk": dim_qk, "dim_v": dim_v, "gate": gate, "reverse": reverse, "layout": "bthd"}
            cases.append({"steps": 37, "tile": [32, 16, 128, 128], "joint": True, **form})
            cases.append({"steps": 37, "chunk": 20, "tile": [16, 32, 32, 64], **form, **WHOLE})
    for gates, gate in itertools.product(("ip30", "im30", "fp30", "fm30", "mixed30"), ("exp", "sigmoid")):
        # n0 has no weight that a float32 could hold once gates of -30 have closed
        cases.append({"gates": gates, "gate": gate, "steps": 40, "chunk": 17, "tile": [32, 16, 16, 16]})
        cases.append({"gates": gates, "gate": gate, "steps": 40, "last": True})
    for dtype, gate in itertools.product(("bfloat16", "float16"), ("exp", "sigmoid")):
        cases.append({"dtype": dtype, "gate": gate, "steps": 23, "chunk": 9})
        cases.append({"dtype": dtype, "gate": gate, "steps": 23, "joint": True})
    for (gate, normalize), state in itertools.product(FORMS, (False, True)):
        form = {"gate": gate, "normalize": normalize, "state": state}
        cases.append({"step": True, "steps": 1, "batch": 2, "heads": 2, "dim_qk": 80, "dim_v": 48, **form})
    return cases


@pytest.mark.long
def test_interpreter_sweep():
    cases = sweep()
    wrong = []
    for case, found in zip(cases, ratios(cases)):
        try:
            check(case, found, limit_of(case))
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_the_gpu():
    """The same cases with the table's tiles, and the sizes the interpreter is too slow for."""
    cases = [{**case, "tile": None} for case in [*FAST.values(), *sweep()]]
    for dim_qk, dim_v, chunk in itertools.product((256,), (512,), (128, 256, 512)):
        cases.append({"steps": 700, "chunk": chunk, "dim_qk": dim_qk, "dim_v": dim_v, **WHOLE})
    for case, found in zip(cases, ratios(cases, interpret=False)):
        check(case, found, limit_of(case))


# Shared memory: what sm_86 and sm_89 have, an H100, an MI300.
LIMITS = {
    "sm_80": {"registers": 255, "shared": 99 * 1024},
    "sm_90": {"registers": 255, "shared": 227 * 1024},
    "gfx942": {"registers": 512, "shared": 64 * 1024},
}
SHAPES = [
    {"steps": 50, "dim_qk": 64, "dim_v": 64},
    {"steps": 196, "dim_qk": 96, "dim_v": 96},
    {"steps": 4096, "dim_qk": 96, "dim_v": 96, "state": True},
    {"steps": 4096, "dim_qk": 96, "dim_v": 96, "gate": "sigmoid", "normalize": False},
    {"steps": 4096, "dim_qk": 256, "dim_v": 512},
    {"steps": 4096, "dim_qk": 192, "dim_v": 192, "reverse": True, "reset": True},
    {"steps": 196, "dim_qk": 96, "dim_v": 96, "dtype": "float32"},
    {"steps": 4096, "dim_qk": 256, "dim_v": 512, "dtype": "float32"},
    {"steps": 4096, "dim_qk": 96, "dim_v": 96, "dtype": "float32", "precision": "tf32"},
]
NO_PRODUCT = ("gates", "summarise_chunks", "chain_stabiliser", "chain_gradient", "grad_gates", "step")


@pytest.mark.skip(
    reason="TODO until the tile table is settled: sm_80 has not passed, the others were not finished"
)
@pytest.mark.parametrize("target", LIMITS)
def test_compiled_resources(target):
    """Nothing spills to memory, and tiles fit, at every entry of the table."""
    jobs = [{"target": target, **shape} for shape in SHAPES if target != "gfx942" or "precision" not in shape]
    wrong = []
    for line in run("triton_compile.py", jobs):
        found = json.loads(line)
        print(line)
        over = [name for name, most in LIMITS[target].items() if not found.get(name, most + 1) <= most]
        if found.get("spills", 1):
            over.append("spills")
        exact = "float32" in found.get("shape", "") and "tf32" not in found["shape"]
        if (
            not found.get("matrix")
            and found["kernel"] not in NO_PRODUCT
            and not (exact and target != "gfx942")
        ):
            over.append("matrix")
        if over:
            wrong.append(f"{over}: {line}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", ["sm80", "sm90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_table_has_an_entry_for_every_head_size(kind, dtype):
    for dim_qk, dim_v in itertools.product((1, 16, 48, 96, 128, 129, 256, 512, 1024), repeat=2):
        tiles = tiles_for(kind, dtype, dim_qk, dim_v)
        given = [x for x in tiles[1:] if x is not None]
        assert all(size & (size - 1) == 0 and size >= 16 for tile in given for size in tile[:4])
        if tiles.grad_kv is None:
            assert tiles.grad_k is not None and tiles.grad_v is not None
        else:
            assert tiles.grad_kv.bk >= dim_qk and tiles.grad_kv.bv >= dim_v
        assert chunk_of(200, None, tiles) == 200
        assert chunk_of(4096, None, tiles) == tiles.chunk
        assert chunk_of(10, 64, tiles) == 10


def test_unsupported_arguments_are_named():
    q = torch.zeros(1, 1, 2, 4)
    assert mlstm_triton.supports(q, q) == (True, "")
    assert "float64" in mlstm_triton.supports(q.double(), q.double())[1]
    assert "1025" in mlstm_triton.supports(q, torch.zeros(1, 1, 2, 1025))[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    able, why = mlstm_triton.available("cpu")
    assert not able and "tensors are on cpu" in why


def test_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from vilma.xlstm import mlstm_triton\n"
        "able, why = mlstm_triton.available()\n"
        "assert not able and 'cannot be imported' in why, why\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parents[1])
