"""The mLSTM against float64 golden vectors: output, last state and every gradient, at their tolerance."""

import pytest
import torch

from vilma.testing import golden, golden_cases
from vilma.xlstm import MLSTMState, mlstm
from vilma.xlstm.mlstm import _zero_state
from vilma.xlstm.mlstm_naive import mlstm_parallel_naive

CASES = [case for case in golden_cases("kernels") if case["kind"].startswith("mlstm")]
LOOSE = ("ext30", "ip30", "fm30")  # i - cumsum(log f) cancels, and the floor exp(-m) guards nothing


def parallel(q, k, v, i, f, state, *, gate, normalize, return_state, eps):
    normalize = gate == "exp" if normalize is None else normalize
    state = state or _zero_state(q, v, gate, q.dtype)
    h, last = mlstm_parallel_naive(q, k, v, i, f, state, None, gate, normalize, False, eps)
    return h, MLSTMState(*last)


def chunkwise(chunk_size):
    def run(*args, **options):
        return mlstm(*args, backend="torch", chunk_size=chunk_size, **options)

    return run


def recurrent(*args, **options):
    return mlstm(*args, backend="naive", **options)


FORMS = {
    "recurrent": recurrent,
    "parallel": parallel,
    "auto": mlstm,
    "chunk16": chunkwise(16),
    "chunk64": chunkwise(64),
}


@pytest.mark.parametrize(
    "form, dtype",
    # the plain parallel form cancels in float32: it is a float64 reference only
    [(form, torch.float64) for form in FORMS]
    + [(form, torch.float32) for form in FORMS if form != "parallel"],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"][6:-4])
def test_golden(case, form, dtype):
    stored = golden("kernels", case["file"])
    given = {name: x.to(dtype) for name, x in stored.items()}
    inputs = {name: given[name].clone().requires_grad_() for name in "qkvif"}
    state = None
    if "c0" in given:
        c0, n0, m0 = given["c0"], given["n0"], given["m0"].squeeze(-1)
        state = MLSTMState(*(x.clone().requires_grad_() for x in (c0, n0, m0)))
    h, last = FORMS[form](
        *inputs.values(),
        state,
        gate="exp" if case["kind"] == "mlstm_exp" else "sigmoid",
        normalize=case.get("normalize"),
        return_state=True,
        eps=case["eps"],
    )
    (h * given["w"]).sum().backward()

    results = {"h": h, "c_last": last.c, "n_last": last.n}
    results |= {f"d{name}": x.grad for name, x in inputs.items()}
    if last.m is not None:
        results["m_last"] = last.m[..., None]
    if state is not None:
        results |= {"dc0": state.c.grad, "dn0": state.n.grad, "dm0": state.m.grad[..., None]}
    expected = {name for name in stored if name[0] == "d" and not name.endswith("custbw")}
    assert expected | {"h", "c_last", "n_last"} <= set(results)

    tolerance = 1e-6 if dtype == torch.float64 else 2e-4 if case["gate"] in LOOSE else 1e-5
    for name, actual in results.items():
        reference = stored[name].double()
        bound = tolerance * reference.abs().max()
        if name == "di" and dtype == torch.float32:
            bound = bound * 2
        if name == "df" and (case["gate"] in ("fm30", "fp30") or (case["S"] == 1 and state is None)):
            # the true df is about zero
            bound = max(bound, 1e-6 * stored["di"].double().abs().max())
        error = (actual.detach().double() - reference).abs().max()
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


def test_the_normaliser_is_part_of_the_gradient():
    """The vectors tell the exact gradient from the truncated one of the public kernels."""
    stored = golden("kernels", "mlstm_exp_s33_zero.npz")
    inputs = [stored[name].double().requires_grad_() for name in "qkvif"]
    (mlstm(*inputs) * stored["w"].double()).sum().backward()
    truncated = stored["dq_custbw"].double()
    assert (inputs[0].grad - truncated).norm() > 0.1 * truncated.norm()
