"""From a network over action chunks to a loss and a sampler: the policy heads of the X-IL design space.

``net(x (B, H, A), sigma (B,)) -> (B, H, A)`` is the denoiser given its context; sigma is a noise level in the
sense of EDM (noise over signal) for every head, so one embedding serves all. Samplers take a fixed number of
steps, draw nothing themselves and look at no value on the device.

B batch, H horizon, A action size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vilma.extras import require

from . import edm

Net = Callable[[Tensor | None, Tensor | None], Tensor]


class Head(nn.Module):
    """Base. ``takes_noise`` is False for a head whose network sees neither an action nor a noise level."""

    takes_noise = True

    def loss(self, net: Net, action: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar loss of clean actions (B, H, A); mask (B, H): True where they count."""
        raise NotImplementedError

    def noise_shape(self, horizon: int, action_dim: int) -> tuple[int, ...]:
        """Shape of one sample's standard normal noise for `sample`."""
        return (horizon, action_dim)

    def sample(self, net: Net, noise: Tensor) -> Tensor:
        """Actions (B, H, A) from noise (B, *noise_shape)."""
        raise NotImplementedError


class EDMHead(Head):
    """EDM (arXiv 2206.00364) with log-logistic training noise: BESO's and PointMapPolicy's."""

    def __init__(
        self,
        sigma_min: float,
        sigma_max: float,
        sigma_data: float,
        noise_loc: float,
        noise_scale: float,
        sampler: str,
        schedule: str,
        steps: int,
    ):
        super().__init__()
        self.range, self.sigma_data = (sigma_min, sigma_max), sigma_data
        self.noise = (noise_loc, noise_scale)
        self.sampler = edm.SAMPLERS[sampler]
        self.register_buffer("sigmas", edm.SCHEDULES[schedule](steps, sigma_min, sigma_max), persistent=False)

    def loss(self, net: Net, action: Tensor, mask: Tensor | None = None) -> Tensor:
        uniform = torch.rand(len(action), device=action.device)
        sigma = edm.log_logistic(uniform, *self.noise, *self.range)
        return edm.edm_loss(net, action, torch.randn_like(action), sigma, self.sigma_data, mask)

    def sample(self, net: Net, noise: Tensor) -> Tensor:
        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            return edm.denoise(net, x, sigma, self.sigma_data)

        return self.sampler(denoiser, noise * self.range[1], self.sigmas)


class FlowHead(Head):
    """Rectified flow (arXiv 2209.03003): x_t = (1 - t) a + t z, the network gives z - a, Euler from t = 1.

    times: "uniform", or "logit_normal" (arXiv 2403.03206) for more of the middle.
    """

    def __init__(self, times: str, steps: int):
        super().__init__()
        self.times, self.steps = times, steps

    def loss(self, net: Net, action: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.times == "uniform":
            t = torch.rand(len(action), device=action.device)
        else:
            t = torch.randn(len(action), device=action.device).sigmoid()
        noise = torch.randn_like(action)
        share = t.to(action.dtype)[:, None, None]
        flow = net((1 - share) * action + share * noise, _flow_sigma(t))
        return edm.masked_mean((flow.to(action.dtype) - (noise - action)).square(), mask)

    def sample(self, net: Net, noise: Tensor) -> Tensor:
        x = noise
        for step in range(self.steps):
            t = torch.full((len(x),), 1 - step / self.steps, device=x.device)
            x = x - net(x, _flow_sigma(t)).to(x.dtype) / self.steps
        return x


class DiffusionHead(Head):
    """DDPM (arXiv 2006.11239) and DDIM (arXiv 2010.02502) through diffusers' scheduler, as Diffusion Policy.

    eta: 0 is DDIM; 1 is DDPM's ancestral sampling, exactly so with as many steps as in training. Its noise is
    drawn beforehand: one chunk for the start and one for each step. clip: predicted actions are held within
    +- this; none leaves them.
    """

    def __init__(
        self,
        eta: float,
        train_steps: int,
        steps: int,
        beta_schedule: str,
        prediction: str,
        clip: float | None,
    ):
        super().__init__()
        module = require("diffusers.schedulers.scheduling_ddim", "robot")
        self.scheduler = module.DDIMScheduler(
            num_train_timesteps=train_steps,
            beta_schedule=beta_schedule,
            prediction_type=prediction,
            clip_sample=clip is not None,
            clip_sample_range=clip or 1.0,
            # From the last step, whose input is pure noise, whatever `steps`.
            timestep_spacing="trailing",
        )
        self.scheduler.set_timesteps(steps)
        self.timesteps = self.scheduler.timesteps.tolist()
        self.eta, self.prediction = eta, prediction
        alpha = self.scheduler.alphas_cumprod.double()
        self.register_buffer("alpha", alpha.sqrt().float(), persistent=False)
        self.register_buffer("spread", (1 - alpha).sqrt().float(), persistent=False)
        self.register_buffer("sigma", ((1 - alpha) / alpha).sqrt().float(), persistent=False)

    def loss(self, net: Net, action: Tensor, mask: Tensor | None = None) -> Tensor:
        step = torch.randint(0, len(self.sigma), (len(action),), device=action.device)
        noise = torch.randn_like(action)
        alpha, spread = (table[step].to(action.dtype)[:, None, None] for table in (self.alpha, self.spread))
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: action,
            "v_prediction": lambda: alpha * noise - spread * action,
        }[self.prediction]()
        output = net(alpha * action + spread * noise, self.sigma[step]).to(action.dtype)
        return edm.masked_mean((output - target).square(), mask)

    def noise_shape(self, horizon: int, action_dim: int) -> tuple[int, ...]:
        return (1 + (len(self.timesteps) if self.eta else 0), horizon, action_dim)

    def sample(self, net: Net, noise: Tensor) -> Tensor:
        x = noise[:, 0]
        for index, step in enumerate(self.timesteps):
            output = net(x, self.sigma[step].expand(len(x))).to(x.dtype)
            drawn = noise[:, 1 + index] if self.eta else None
            x = self.scheduler.step(output, step, x, eta=self.eta, variance_noise=drawn).prev_sample
        return x


class RegressionHead(Head):
    """Behaviour cloning: the network's queries give the actions, mean squared error."""

    takes_noise = False

    def loss(self, net: Net, action: Tensor, mask: Tensor | None = None) -> Tensor:
        return edm.masked_mean((net(None, None).to(action.dtype) - action).square(), mask)

    def noise_shape(self, horizon: int, action_dim: int) -> tuple[int, ...]:
        return (0,)

    def sample(self, net: Net, noise: Tensor) -> Tensor:
        return net(None, None)


HEADS = ("edm", "ddpm", "ddim", "flow", "regression")


def build_head(c: Any) -> Head:
    """The head of a `PointMapPolicyConfig`."""
    if c.head == "edm":
        noise = (c.noise_loc, c.noise_scale)
        return EDMHead(
            c.sigma_min, c.sigma_max, c.sigma_data, *noise, c.sampler, c.schedule, c.sampling_steps
        )
    if c.head == "flow":
        return FlowHead(c.flow_times, c.sampling_steps)
    if c.head in ("ddpm", "ddim"):
        eta = 1.0 if c.head == "ddpm" else 0.0
        steps = (c.diffusion_steps, c.sampling_steps)
        return DiffusionHead(eta, *steps, c.beta_schedule, c.prediction, c.clip_sample)
    if c.head == "regression":
        return RegressionHead()
    raise ValueError(f"unknown head {c.head!r}; known: {', '.join(HEADS)}")


def _flow_sigma(t: Tensor) -> Tensor:
    """Noise over signal at time t, kept within e^+-8 (t = 1 has no signal)."""
    return (t / (1 - t).clamp_min(math.exp(-20))).clamp(math.exp(-8), math.exp(8))
