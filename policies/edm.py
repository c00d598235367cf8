"""Diffusion in the terms of EDM (Karras et al. 2022, arXiv 2206.00364; tables and equations are theirs).

Plain functions. ``net(x, sigma) -> F`` is the raw network F of the paper; ``denoiser(x, sigma) -> D`` the
preconditioned one. Shapes: x (B, ...), sigma (B,). The settings in use are those of BESO and PointMapPolicy
(arXiv 2510.20406): sigma in [0.001, 80], sigma_data 0.5, log-logistic training noise, an exponential
schedule and 4 DDIM steps.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

Net = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor, Tensor], None]


def c_skip(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Weight of the noisy input in D (Table 1)."""
    return sigma_data**2 / (sigma**2 + sigma_data**2)


def c_out(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Weight of the network output in D (Table 1)."""
    return sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()


def c_in(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Scale of the network input: gives it unit variance (Table 1)."""
    return 1 / (sigma**2 + sigma_data**2).sqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """What the network is told about the noise level (Table 1)."""
    return sigma.log() / 4


def denoise(net: Net, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """D(x; sigma) = c_skip x + c_out F(c_in x, sigma) (eq. 7); x (B, ...), sigma (B,)."""
    s = _like(sigma, x)
    f = net(c_in(s, sigma_data) * x, sigma).to(x.dtype)
    return c_skip(s, sigma_data) * x + c_out(s, sigma_data) * f


def edm_loss(
    net: Net, x: Tensor, noise: Tensor, sigma: Tensor, sigma_data: float = 0.5, mask: Tensor | None = None
) -> Tensor:
    """Mean squared error of the raw network against its effective training target (eq. 8).

    x is clean, ``x + sigma * noise`` is what the network sees (noise: standard normal, shaped like x). With
    lambda(sigma) = 1 / c_out^2 there is no further weight. ``mask`` (bool, the leading dimensions of x) keeps
    only the True elements in the mean; without any the loss is 0.
    """
    s = _like(sigma, x)
    noised = x + s * noise
    target = (x - c_skip(s, sigma_data) * noised) / c_out(s, sigma_data)
    error = (net(c_in(s, sigma_data) * noised, sigma).to(x.dtype) - target).square()
    return masked_mean(error, mask)


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of error (B, ...) where ``mask`` (bool, its leading dimensions) is True; 0 where it nowhere is."""
    if mask is None:
        return error.mean()
    keep = mask.reshape(mask.shape + (1,) * (error.ndim - mask.ndim)).to(error.dtype)
    return (error * keep).sum() / keep.expand_as(error).sum().clamp(min=1)


def log_logistic(
    u: Tensor,
    loc: float = math.log(0.5),
    scale: float = 0.5,
    sigma_min: float = 0.001,
    sigma_max: float = 80.0,
) -> Tensor:
    """Inverse CDF of the truncated log-logistic: u in (0, 1) -> sigma in (sigma_min, sigma_max).

    ln sigma is logistic with location ``loc`` and scale ``scale`` (BESO, arXiv 2304.02532, the training noise
    of PointMapPolicy). Draw with ``log_logistic(torch.rand(n))``.
    """
    low, high = (_sigmoid((math.log(s) - loc) / scale) for s in (sigma_min, sigma_max))
    return (torch.logit(low + u * (high - low)) * scale + loc).exp()


def sigmas_exponential(n: int, sigma_min: float = 0.001, sigma_max: float = 80.0) -> Tensor:
    """n sigmas, linear in ln sigma from sigma_max to sigma_min, then 0; shape (n + 1,)."""
    return _with_zero(_ramp(n, math.log(sigma_max), math.log(sigma_min)).exp())


def sigmas_karras(n: int, sigma_min: float = 0.001, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """n sigmas, linear in sigma^(1/rho) from sigma_max to sigma_min, then 0 (eq. 5); shape (n + 1,)."""
    return _with_zero(_ramp(n, sigma_max ** (1 / rho), sigma_min ** (1 / rho)) ** rho)


def sigmas_linear(n: int, sigma_min: float = 0.001, sigma_max: float = 80.0) -> Tensor:
    """n sigmas, linear from sigma_max to sigma_min, then 0; shape (n + 1,)."""
    return _with_zero(_ramp(n, sigma_max, sigma_min))


def sample_ddim(denoiser: Net, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """x <- (s'/s) x + (1 - s'/s) D(x; s): DDIM (arXiv 2010.02502) in sigma, first-order DPM-Solver.

    x (B, ...) starts as sigmas[0] * standard normal noise; the last step (s' = 0) returns D itself. The same
    update as Euler, without the division by a step length. ``callback(step, x, sigma, denoised)`` sees x
    before each step.
    """
    for step, (sigma, after) in enumerate(_pairs(sigmas, x)):
        denoised = denoiser(x, sigma.expand(len(x)))
        if callback is not None:
            callback(step, x, sigma, denoised)
        ratio = after / sigma
        x = ratio * x + (1 - ratio) * denoised
    return x


def sample_euler(denoiser: Net, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Euler's method on the probability flow ODE dx/dsigma = (x - D)/sigma (Algorithm 1, uncorrected)."""
    for step, (sigma, after) in enumerate(_pairs(sigmas, x)):
        denoised = denoiser(x, sigma.expand(len(x)))
        if callback is not None:
            callback(step, x, sigma, denoised)
        x = x + (after - sigma) * (x - denoised) / sigma
    return x


def sample_heun(denoiser: Net, x: Tensor, sigmas: Tensor, callback: Callback | None = None) -> Tensor:
    """Heun's second-order method on the same ODE (Algorithm 1); the last step, to sigma 0, is Euler's."""
    for step, (sigma, after) in enumerate(_pairs(sigmas, x)):
        denoised = denoiser(x, sigma.expand(len(x)))
        if callback is not None:
            callback(step, x, sigma, denoised)
        slope = (x - denoised) / sigma
        euler = x + (after - sigma) * slope
        if step < len(sigmas) - 2:  # known without looking at a value on the device
            slope_after = (euler - denoiser(euler, after.expand(len(x)))) / after
            x = x + (after - sigma) * (slope + slope_after) / 2
        else:
            x = euler
    return x


SCHEDULES = {"exponential": sigmas_exponential, "karras": sigmas_karras, "linear": sigmas_linear}
SAMPLERS = {"ddim": sample_ddim, "euler": sample_euler, "heun": sample_heun}


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x.dtype).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def _pairs(sigmas: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    sigmas = sigmas.to(x)
    return pairwise(sigmas)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _ramp(n: int, start: float, end: float) -> Tensor:
    if n < 1:
        raise ValueError(f"a sigma schedule needs at least 1 step, got {n}")
    return torch.linspace(start, end, n, dtype=torch.float64)


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()
