"""What tests of every room share: comparison by RMS ratio, random gates and states, golden vectors."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROOT = Path(__file__).resolve().parent.parent
_SHARED = _ROOT.parent / "shared" / "fixtures"
_COPIES = _ROOT / "tests" / "data" / "golden"


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of ``expected``, in float64 (0 when both are all zero)."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    difference = (actual - expected).square().mean().sqrt().item()
    if difference == 0.0:
        return 0.0
    scale = expected.square().mean().sqrt().item()
    return difference / scale if scale > 0.0 else float("inf")


def assert_close(actual: Tensor, expected: Tensor, ratio: float, name: str = "") -> None:
    """Fail unless shapes agree and the difference has an RMS of at most ``ratio`` times that of ``expected``.

    One figure for a whole tensor: a bound on single elements must be loose enough for its worst one and then
    says little about the rest. Anything non-finite in ``actual`` or ``expected`` fails.
    """
    label = name or "tensor"
    for which, value in (("actual", actual), ("expected", expected)):
        if not torch.isfinite(value).all():
            raise AssertionError(f"{label}: {which} holds a non-finite value")
    error = rms_ratio(actual, expected)
    if not error <= ratio:
        raise AssertionError(f"{label}: RMS ratio {error:.3e} is above {ratio:.1e}")


def golden_dir(family: str) -> Path:
    """The folder of golden vectors ``../shared/fixtures/<family>``; skips the running test when absent."""
    folder = _SHARED / family
    if not folder.is_dir():
        _skip(f"golden vectors not found: {folder} (expected beside the repository)")
    return folder


def golden(family: str, file: str) -> dict[str, Tensor]:
    """Load one golden vector (.npz or .safetensors) as named tensors.

    Looks in ``../shared/fixtures/<family>``, then among the small copies in ``tests/data/golden/<family>``;
    skips the running test when neither holds it.
    """
    for folder in (_SHARED / family, _COPIES / family):
        path = folder / file
        if path.is_file():
            break
    else:
        _skip(f"golden vector {family}/{file} not found in {_SHARED} or {_COPIES}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import numpy as np

    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def golden_cases(family: str) -> list[dict[str, Any]]:
    """The entries of the family's ``index.json`` whose files are here (all, or the small copies)."""
    for folder in (_SHARED / family, _COPIES / family):
        index = folder / "index.json"
        if index.is_file():
            cases = json.loads(index.read_text())["cases"]
            return [case for case in cases if (folder / case["file"]).is_file()]
    return []


def random_mlstm(
    batch: int,
    heads: int,
    steps: int,
    dim_qk: int,
    dim_v: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    gates: str = "normal",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random ``q, k (B, H, T, Dk), v (B, H, T, Dv), i, f (B, H, T)``.

    ``gates``: ``normal`` (as trained: i around 0, f around 3), ``mixed30`` (both uniform in [-30, 30]),
    or ``<i|f><p|m>30`` (that gate fixed at +30 or -30, the other normal). Values do not depend on
    ``dtype`` or ``device`` except for rounding.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = normal(batch, heads, steps, dim_qk), normal(batch, heads, steps, dim_qk)
    v = normal(batch, heads, steps, dim_v)
    i, f = normal(batch, heads, steps), normal(batch, heads, steps) + 3.0
    if gates == "mixed30":
        i = torch.rand(i.shape, generator=generator, dtype=torch.float64) * 60.0 - 30.0
        f = torch.rand(f.shape, generator=generator, dtype=torch.float64) * 60.0 - 30.0
    elif gates in ("ip30", "im30"):
        i = torch.full_like(i, 30.0 if gates == "ip30" else -30.0)
    elif gates in ("fp30", "fm30"):
        f = torch.full_like(f, 30.0 if gates == "fp30" else -30.0)
    elif gates != "normal":
        raise ValueError(f"gates={gates!r}; known: normal, mixed30, ip30, im30, fp30, fm30")
    q, k, v, i, f = (x.to(device=device, dtype=dtype) for x in (q, k, v, i, f))
    return q, k, v, i, f


def random_mlstm_state(
    batch: int,
    heads: int,
    dim_qk: int,
    dim_v: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """A random mLSTM state ``c (B, H, Dk, Dv), n (B, H, Dk), m (B, H)``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, dim_qk, dim_v), (batch, heads, dim_qk), (batch, heads))
    c, n, m = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(device=device, dtype=dtype) for x in (c, n, 0.5 * m))


def _skip(reason: str) -> None:
    import pytest

    pytest.skip(reason)
