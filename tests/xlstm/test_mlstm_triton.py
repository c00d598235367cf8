"""The Triton mLSTM without a GPU: kernels in the interpreter against float64, and what compiling them gives.

The interpreter is switched on by an environment variable that is read when triton is imported, and compiling
needs it off: both run in processes of their own.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vilma.xlstm import mlstm_triton, mlstm_triton_launch
from vilma.xlstm.mlstm_triton_tiles import Tile, block_of, carry_tile, chunk_of, float32_precision, tiles_for

HERE = Path(__file__).resolve().parent
FORMS = [("exp", True), ("exp", False), ("sigmoid", True), ("sigmoid", False)]
KINDS = ("sm80", "sm90", "sm100", "gfx942")


def run(script: str, payload: list[dict], *, interpret: bool = False, packages: Path | None = None):
    """The finished process of a script; modules in ``packages`` go before what is installed."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret))}
    paths = [str(packages or ""), str(HERE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / script)],
        input=json.dumps(payload),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def ratios(cases: list[dict], *, interpret: bool = True) -> list[dict[str, float]]:
    return json.loads(run("triton_cases.py", cases, interpret=interpret).stdout.splitlines()[-1])


def check(case: dict, found: dict[str, float], limit: float) -> None:
    wrong = {name: error for name, error in found.items() if not error <= limit}
    assert not wrong, f"{case}: above {limit:.0e}: {wrong}"


def limit_of(case: dict) -> float:
    if case.get("dtype", "float32") != "float32":
        # the interpreter cuts bfloat16 off instead of rounding it
        return 1.5e-2 if case["dtype"] == "bfloat16" else 2e-3
    if case.get("tf32") and not case.get("normalize", True):
        return 2e-3
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
    "closed gates": {"steps": 300, "chunk": 150, "closed": True, "tile": [64, 64, 16, 16], "last": True},
    "closed gates float16": {
        **{"steps": 300, "chunk": 150, "closed": True, "tile": [64, 64, 16, 16], "last": True},
        "dtype": "float16",
    },
    "closed gates sigmoid float16": {
        **{"steps": 300, "chunk": 150, "closed": True, "tile": [64, 64, 16, 16], "reverse": True},
        **{"dtype": "float16", "gate": "sigmoid"},
    },
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
    for normalize in (True, False):
        long = {"steps": 333, "chunk": 128, "dim_qk": 64, "dim_v": 96, "tile": [64, 64, 64, 128]}
        cases.append({"tf32": True, "normalize": normalize, **long, **WHOLE})
    for dtype in ("float32", "float16"):
        cases.append({"layout": "far", "batch": 3, "steps": 20, "chunk": 8, "dtype": dtype, **WHOLE})
    for chunk in (256, 512):
        large = {"steps": 520, "chunk": chunk, "dim_qk": 256, "dim_v": 512, "tile": [128, 128, 128, 128]}
        cases.append({**large, **WHOLE})
    # the tiles of the table
    cases += [{"steps": steps, "dim_qk": 96, "dim_v": 96, "tile": None} for steps in (70, 300)]
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
    for dim_qk, dim_v in ((256, 512), (192, 192), (1024, 64)):
        cases.append({"steps": 700, "dim_qk": dim_qk, "dim_v": dim_v, "tile": None, **WHOLE})
    for case, found in zip(cases, ratios(cases, interpret=False)):
        check(case, found, limit_of(case))


# Shared memory: what sm_86 and sm_89 have, an H100, a B200, an MI300. "others": kernels without products.
# Registers of the kernels with products: all that the architecture has. What binds there is that none spills.
LIMITS = {
    "sm_80": {"registers": 255, "shared": 99 * 1024, "others": 128},
    "sm_90": {"registers": 255, "shared": 227 * 1024, "others": 128},
    "sm_100": {"registers": 255, "shared": 227 * 1024, "others": 128},
    "gfx942": {"registers": 512, "shared": 64 * 1024, "others": 64},
}
PRODUCTS = ("forward_tile", "carry", "grad_q_tile", "grad_kv_tile")
WIDE = {"steps": 4096, "dim_qk": 256, "dim_v": 512}
# Every entry of the table, with one chunk and with many, with and without what costs registers.
SHAPES = [
    {"steps": 196},
    {"steps": 4096, "state": True},
    {"steps": 4096, "batch": 2, "kernels": ["carry"]},
    {"steps": 4096, "gate": "sigmoid", "normalize": False, "kernels": [*PRODUCTS, "gates"]},
    {**WIDE, "kernels": [*PRODUCTS, "gates"]},
    {**WIDE, "batch": 1, "kernels": ["carry"]},
    {**WIDE, "dtype": "float16", "kernels": ["forward_tile", "carry", "grad_q_tile"]},
    {
        "steps": 4096,
        "dim_qk": 192,
        "dim_v": 192,
        "reverse": True,
        "reset": True,
        "kernels": [*PRODUCTS, "gates"],
    },
    {**WIDE, "dtype": "float32", "kernels": [*PRODUCTS, "gates"]},
    {"steps": 4096, "dtype": "float32", "normalize": False, "precision": "tf32", "kernels": PRODUCTS},
]


def jobs_for(target: str) -> list[dict]:
    return [{"target": target, **shape} for shape in SHAPES if target != "gfx942" or "precision" not in shape]


def faults(found: dict, spills: int = 0) -> list[str]:
    """What is wrong with a line of the report."""
    limits = LIMITS[found["target"]]
    if "error" in found:
        return [found["error"]]
    product = found["kernel"].startswith(PRODUCTS)
    wrong = [] if found["spills"] <= spills else ["spills"]
    if found["registers"] > (limits["registers"] if product else limits["others"]):
        wrong.append("registers")
    if found["shared"] > limits["shared"]:
        wrong.append("shared memory")
    if product and not found["matrix"]:
        wrong.append("no matrix instructions")
    return wrong


@pytest.mark.long
@pytest.mark.parametrize("target", LIMITS)
def test_compiled_resources(target):
    """Nothing spills to memory, and tiles fit, at every entry of the table."""
    lines = run("triton_compile.py", jobs_for(target)).stdout.splitlines()
    print("\n".join(lines))
    found = [json.loads(line) for line in lines]
    assert {x["kernel"].removesuffix("_backward") for x in found} >= {
        "carry",
        "forward_tile",
        "gates",
        "step",
    }
    wrong = [f"{faults(x)}: {x}" for x in found if faults(x)]
    assert not wrong, "\n".join(wrong)


def test_another_length_or_batch_compiles_nothing():
    """What is compiled for one is compiled for all that lie on the same side of a few thresholds."""
    jobs, first = [], set()
    for base, *others in (
        ({"steps": 64, "batch": 16}, {"steps": 1}, {"steps": 33, "batch": 1}, {"batch": 3}),
        ({"steps": 256, "state": True}, {"steps": 129, "batch": 7}),
        ({"steps": 4096, "state": True}, {"steps": 257}, {"steps": 5001, "batch": 1}),
    ):
        first.add(len(jobs))
        sizes = {"target": "gfx942", "compile": False, "dim_qk": 96, "dim_v": 48}
        jobs += [{**sizes, **base, **other} for other in ({}, *others)]
    found = [json.loads(line) for line in run("triton_compile.py", jobs).stdout.splitlines()]
    assert {x["job"] for x in found} == first, [x for x in found if x["job"] not in first]


class FakeKernel:
    """Takes launches as a compiled one does, and counts those that had to look for it."""

    arg_names = ("X", "n", "A", "B")

    def __init__(self):
        self.looked, self.called = 0, []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            if constants:
                self.looked += 1
            else:
                self.called.append((grid, args))
            return self

        return launch


def test_a_launch_looks_for_its_kernel_once(monkeypatch):
    monkeypatch.setattr(mlstm_triton_launch, "_remembers", lambda: True)
    monkeypatch.setattr(mlstm_triton_launch, "_compiled", {})
    kernel, tile, x = FakeKernel(), Tile(0, 0, 0, 0, 4, 1), torch.zeros(64)

    def looks(*args, tile=tile, **constants) -> bool:
        before = kernel.looked
        mlstm_triton_launch.launch(kernel, 7, *args, tile=tile, **{"B": 2, "A": 1, **constants})
        return kernel.looked > before

    assert looks(x, 5)
    assert not looks(torch.ones(32), 9) and kernel.called[-1][0] == (7, 1, 1)
    assert kernel.called[-1][1][1:] == (9, 1, 2)  # constants in the order of the kernel's own arguments
    assert looks(x, 16) and looks(x, 1) and looks(x, 2**31)
    assert looks(x[1:], 5) and looks(x.double(), 5) and looks(x, None)
    assert looks(x, 5, A=3) and looks(x, 5, tile=tile._replace(warps=8))
    assert not looks(x, 5)


@pytest.mark.parametrize("steps, launched", [(256, ["gates", "forward_tile"]), (257, None)])
def test_a_short_sequence_has_no_states(monkeypatch, steps, launched):
    seen, sizes = [], []
    monkeypatch.setattr(mlstm_triton, "launch", lambda kernel, *_, **__: seen.append(kernel.fn.__name__))
    new, like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(a) or new(*a, **k))
    q = new(2, 3, steps, 64, device="meta")
    i = new(2, 3, steps, device="meta")
    options = {"gate": "exp", "normalize": True, "reverse": False, "chunk_size": None, "eps": 1e-6}
    saved = mlstm_triton.forward(q, q, q, i, i, **options, return_state=False)[2]
    mlstm_triton.backward(saved, like(q), **options)
    states = [size for size in sizes if size[-2:] == (64, 64)]
    if launched:
        assert seen[:2] == launched and len(seen) == 6 and not states
    else:
        assert "carry" in seen and states == [(6, 3, 64, 64)] * 3


@pytest.mark.parametrize("setting, precision", [("none", "tf32x3"), ("ieee", "tf32x3"), ("tf32", "tf32")])
def test_float32_products_are_whole_unless_torch_may_cut_them(monkeypatch, setting, precision):
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=setting))
    assert float32_precision(torch.device("cpu"), normalize=True) == "tf32x3"
    assert float32_precision(torch.device("cpu"), normalize=False) == precision


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_table_has_an_entry_for_every_head_size(kind, dtype):
    for dim_qk, dim_v in itertools.product((1, 16, 48, 96, 128, 129, 256, 512, 1024), repeat=2):
        tiles = tiles_for(kind, dtype, dim_qk, dim_v)
        given = [x for x in tiles if isinstance(x, Tile)]
        assert all(size & (size - 1) == 0 and size not in (1, 2, 4, 8) for tile in given for size in tile[:4])
        assert all(carry_tile(tiles, heads, dim_qk, dim_v) in given for heads in (1, 10000))
        if tiles.grad_kv is None:
            assert tiles.grad_k is not None and tiles.grad_v is not None
        else:
            assert tiles.grad_kv.bk >= dim_qk and tiles.grad_kv.bv >= dim_v
        assert chunk_of(200, None, tiles) == 200
        assert chunk_of(4096, None, tiles) == tiles.chunk
        assert chunk_of(10, 64, tiles) == 10


def test_few_heads_take_the_smaller_blocks():
    tiles = tiles_for("sm90", torch.bfloat16, 96, 96)
    assert carry_tile(tiles, 256, 96, 96) == tiles.carry != tiles.carry_few == carry_tile(tiles, 32, 96, 96)
    assert [block_of(x) for x in (1, 64, 65, 256, 257, 1024)] == [64, 64, 128, 256, 512, 1024]


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
