import math

import pytest
import torch

from vilma.policies import edm
from vilma.testing import assert_close, golden

LOW, HIGH = 0.001, 80.0


def toy_network(z):
    """The inner network of the golden vectors: tanh(a W + b + context), sigma entering as ln(sigma) / 4."""
    tokens = z["state"].mean(1) @ z["U"] + z["goal"].mean(1) @ z["V"]

    def net(x, sigma):
        context = torch.tanh(tokens + z["c"] * (sigma.log() / 4)[:, None])
        return torch.tanh(x @ z["W"] + z["b"] + context[:, None])

    return net


def test_scalings():
    z = golden("pmp", "edm_scalings.npz")
    for name in ("c_skip", "c_out", "c_in"):
        torch.testing.assert_close(getattr(edm, name)(z["sigma"], 0.5), z[name], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(edm.c_noise(z["sigma"]), z["c_noise"], rtol=1e-6, atol=1e-8)


def test_loss_and_denoiser():
    z = golden("pmp", "edm_loss.npz")
    net = toy_network(z)
    seen = {}

    def spy(x, sigma):
        seen["x"], seen["out"] = x, net(x, sigma)
        return seen["out"]

    loss = edm.edm_loss(spy, z["action"], z["noise"], z["sigma"])
    torch.testing.assert_close(loss, z["loss"], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(seen["out"], z["model_output"], rtol=2e-5, atol=2e-6)
    noised = seen["x"] / edm.c_in(z["sigma"])[:, None, None]
    torch.testing.assert_close(noised, z["noised"], rtol=2e-5, atol=2e-6)
    denoised = edm.denoise(net, z["noised"], z["sigma"])
    torch.testing.assert_close(denoised, z["denoised"], rtol=2e-5, atol=2e-6)


def test_masked_loss_is_the_mean_over_what_is_kept():
    x, noise = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    sigma = torch.tensor([0.1, 1.0, 5.0])
    mask = torch.rand(3, 4) < 0.5

    def net(y, s):
        return torch.sin(y) * s[:, None, None]

    s = sigma[:, None, None]
    target = (x - edm.c_skip(s) * (x + s * noise)) / edm.c_out(s)
    wanted = (net(edm.c_in(s) * (x + s * noise), sigma) - target).square()[mask].mean()
    assert_close(edm.edm_loss(net, x, noise, sigma, mask=mask), wanted, 1e-6)
    assert edm.edm_loss(net, x, noise, sigma, mask=torch.zeros_like(mask)) == 0
    full = edm.edm_loss(net, x, noise, sigma, mask=torch.ones_like(mask))
    assert_close(full, edm.edm_loss(net, x, noise, sigma), 1e-6)


def test_schedules():
    z = golden("pmp", "sigma_schedules.npz")
    for name, wanted in z.items():
        kind, steps = name.split("_")
        got = edm.SCHEDULES[kind](int(steps), LOW, HIGH)
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-7)
    for schedule in edm.SCHEDULES.values():
        assert schedule(1, LOW, HIGH).tolist() == [HIGH, 0.0]
        with pytest.raises(ValueError, match="at least 1 step, got 0"):
            schedule(0, LOW, HIGH)


def test_log_logistic():
    z = golden("pmp", "loglogistic.npz")
    sigma = edm.log_logistic(z["u"], math.log(0.5), 0.5, LOW, HIGH)
    torch.testing.assert_close(sigma, z["sigma"], rtol=1e-9, atol=0)
    draws = edm.log_logistic(torch.rand(4096))
    assert draws.min() >= LOW
    assert draws.max() <= HIGH * 1.001
    quantiles = torch.quantile(draws.double(), z["sample_quantile_levels"])
    torch.testing.assert_close(quantiles, z["sample_quantiles"], rtol=0.15, atol=0)


def test_samplers_follow_the_golden_trajectory():
    z = golden("pmp", "sampler_traj.npz")
    net = toy_network(z)
    xs, ds = [], []

    def denoiser(x, sigma):
        return edm.denoise(net, x, sigma)

    def callback(step, x, sigma, denoised):
        assert step == len(xs)
        xs.append(x)
        ds.append(denoised)

    final = edm.sample_ddim(denoiser, z["x_init"], z["sigmas"], callback)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.stack(xs), z["traj"], **close)
    torch.testing.assert_close(torch.stack(ds), z["denoised"], **close)
    torch.testing.assert_close(final, z["final"], **close)
    torch.testing.assert_close(
        edm.sample_euler(denoiser, z["x_init"], z["sigmas"]), z["final_euler"], **close
    )
    torch.testing.assert_close(edm.sample_heun(denoiser, z["x_init"], z["sigmas"]), z["final_heun"], **close)


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
def test_samplers_converge_to_the_exact_flow_of_a_gaussian(name, order):
    """For data N(mu, s^2) the optimal denoiser and the flow are known in closed form."""
    mu, s = 0.3, 0.7

    def denoiser(x, sigma):
        return (s**2 * x + sigma[:, None] ** 2 * mu) / (s**2 + sigma[:, None] ** 2)

    x = torch.tensor([[10.0, -4.0], [2.0, 0.5]], dtype=torch.float64)
    exact = mu + (x - mu) * s / math.sqrt(s**2 + 10.0**2)
    errors = []
    for steps in (40, 80):
        sigmas = torch.cat([torch.linspace(math.log(10), math.log(1e-3), steps).exp(), torch.zeros(1)])
        sigmas[0] = 10.0
        errors.append((edm.SAMPLERS[name](denoiser, x, sigmas.double()) - exact).abs().max().item())
    assert errors[1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.25)
