"""The recurrent cells against float64 golden vectors: output, states and every gradient."""

import pytest
import torch

from vilma.testing import golden, golden_cases
from vilma.xlstm import rnn, rnn_cpu

CASES = [case for case in golden_cases("kernels") if case["kind"] in ("slstm", "lstm", "gru", "elman")]
needs_compiler = pytest.mark.skipif(not rnn_cpu.is_available(), reason="no C++ compiler (see the warning)")
BACKENDS = [("naive", torch.float64), ("torch", torch.float64), ("naive", torch.float32)]
BACKENDS += [("torch", torch.float32), ("auto", torch.float32)]
BACKENDS += [pytest.param("cpu", torch.float32, marks=needs_compiler)]


@pytest.mark.parametrize("backend, dtype", BACKENDS, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"][:-4])
def test_golden(case, backend, dtype):
    stored = {name: x.double() for name, x in golden("kernels", case["file"]).items()}
    wx = stored["Wx"].transpose(0, 1).to(dtype).requires_grad_()
    r, b = (stored[name].to(dtype).requires_grad_() for name in "Rb")
    state = [x.to(dtype).requires_grad_() for x in stored["s0"][0].unbind(1)]
    h, last = rnn(wx, r, b, state, cell=case["kind"], return_state=True, backend=backend)
    (h * stored["w"].transpose(0, 1)).sum().backward()

    results = {
        "states": (h, stored["states"][:, :, 0].transpose(0, 1)),
        "dWx": (wx.grad, stored["dWx"].transpose(0, 1)),
        "dR": (r.grad, stored["dR"]),
        "db": (b.grad, stored["db"]),
    }
    for j, (x, name) in enumerate(zip(last, "hcnm")):
        results[f"{name}_last"] = x, stored["last"][0, :, j]
    for j, (x, name) in enumerate(zip(state, "hcnm")):
        # the reference halves n's gradient where max(F n + I, 1) is at equality: everywhere when n is 0
        halved = name == "n" and not case["initial_state"]
        results[f"d{name}0"] = x.grad, stored["ds0"][0, :, j] * (2.0 if halved else 1.0)

    loose = dtype == torch.float32 and case["gate"] == "ext30"
    tolerance = 1e-6 if dtype == torch.float64 else 2e-4 if loose else 1e-5
    for name, (actual, reference) in results.items():
        bound = tolerance * reference.abs().max()
        error = (actual.detach().double() - reference).abs().max()
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"
