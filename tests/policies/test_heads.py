import math

import numpy as np
import pytest
import torch

from vilma.policies.heads import HEADS, DiffusionHead, FlowHead, RegressionHead
from vilma.testing import assert_close

STEPS = 20


def diffusion(eta=0.0, steps=STEPS, prediction="epsilon", clip=None, train_steps=STEPS):
    return DiffusionHead(eta, train_steps, steps, "squaredcos_cap_v2", prediction, clip)


def alphas(count=STEPS):
    """Cumulative products of the cosine schedule (arXiv 2102.09672, eq. 17) in float64."""

    def f(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((i + 1) / count) / f(i / count), 0.999) for i in range(count)]
    return np.cumprod(1 - np.array(betas))


def test_flow_converges_to_the_exact_one_of_a_gaussian():
    """For data N(mu, s^2) the velocity and the flow are known: x_1 = z goes to mu + s z."""
    mu, s = 0.3, 0.7

    def net(x, sigma):
        t = (sigma / (1 + sigma))[:, None, None]
        centred = (x - (1 - t) * mu) / ((1 - t) ** 2 * s**2 + t**2)
        return t * centred - (mu + (1 - t) * s**2 * centred)

    z = torch.randn(8, 4, 2)
    errors = [(FlowHead("uniform", n).sample(net, z) - (mu + s * z)).abs().max().item() for n in (40, 80)]
    assert errors[1] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_flow_loss_of_the_exact_velocity(times):
    """Of a single datum a the velocity at x_t is (x_t - a) / t."""
    a = torch.randn(1, 4, 2).expand(64, 4, 2)

    def net(x, sigma):
        t = (sigma / (1 + sigma))[:, None, None]
        return (x - a) / t

    head = FlowHead(times, 4)
    assert head.loss(net, a) < 1e-4
    torch.testing.assert_close(
        head.sample(net, torch.randn(64, 4, 2)), a, rtol=0, atol=2e-3
    )  # a straight line
    assert FlowHead(times, 4).loss(lambda x, s: 0 * x, a) > 0.5


def exact(prediction, a):
    """The network that knows the single datum a, at noise level sigma of x = alpha a + spread eps."""

    def net(x, sigma):
        sigma = sigma.double()[:, None, None]
        alpha = (1 + sigma**2) ** -0.5
        spread = sigma * alpha
        eps = (x.double() - alpha * a) / spread
        out = {"epsilon": eps, "sample": a.double().expand_as(eps), "v_prediction": alpha * eps - spread * a}
        return out[prediction].to(x.dtype)

    return net


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_diffusion_loss_and_sampling_of_the_exact_network(prediction):
    a = torch.rand(1, 4, 2) * 2 - 1
    for eta in (0.0, 1.0):
        head = diffusion(eta, 5, prediction)
        assert head.loss(exact(prediction, a), a.expand(32, 4, 2)) < 1e-5
        assert head.loss(lambda x, s: 0 * x, a.expand(32, 4, 2)) > 0.05
        noise = torch.randn(3, *head.noise_shape(4, 2))
        torch.testing.assert_close(
            head.sample(exact(prediction, a), noise), a.expand(3, 4, 2), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_diffusion_steps_against_the_equations(eta):
    """All steps, with a network that is wrong: DDIM's eq. 12 and DDPM's posterior (eq. 7), in float64."""
    head, bar = diffusion(eta), alphas()

    def net(x, sigma):
        return torch.sin(x) + 0.1 * sigma.log()[:, None, None]

    noise = torch.randn(2, *head.noise_shape(4, 2))
    x = (noise[:, 0]).double().numpy()
    for index, t in enumerate(reversed(range(STEPS))):
        now, before = bar[t], bar[t - 1] if t else 1.0
        eps = np.sin(x) + 0.1 * math.log(math.sqrt((1 - now) / now))
        start = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        if eta:
            beta = 1 - now / before
            mean = (math.sqrt(before) * beta * start + math.sqrt(now / before) * (1 - before) * x) / (1 - now)
            spread = math.sqrt(beta * (1 - before) / (1 - now))
            x = mean + spread * noise[:, 1 + index].double().numpy()
        else:
            x = math.sqrt(before) * start + math.sqrt(1 - before) * eps
    assert_close(head.sample(net, noise).double(), torch.from_numpy(x), 1e-3)


def test_few_steps_start_from_pure_noise():
    head = diffusion(steps=4, train_steps=100)
    assert head.timesteps == [99, 74, 49, 24]
    assert head.noise_shape(4, 2) == (1, 4, 2) and diffusion(1.0, 4).noise_shape(4, 2) == (5, 4, 2)


def test_clip():
    noise = torch.randn(2, 1, 4, 2)
    wild = diffusion(prediction="sample", clip=0.5).sample(lambda x, s: 9 * torch.ones_like(x), noise)
    torch.testing.assert_close(wild, torch.full_like(wild, 0.5))


def test_regression():
    action = torch.randn(5, 4, 2)
    head = RegressionHead()
    assert_close(head.loss(lambda x, s: torch.zeros(5, 4, 2), action), action.square().mean(), 1e-6)
    assert head.sample(lambda x, s: action, torch.randn(5, 0)) is action


@pytest.mark.parametrize("head", HEADS)
def test_padding_does_not_count(tiny_policy, head):
    policy = tiny_policy(head=head)
    action, mask = torch.randn(6, 4, 3), torch.rand(6, 4) < 0.5
    changed = torch.where(mask[..., None], action, action + 3)

    def loss(a):
        torch.manual_seed(0)
        return policy.head.loss(lambda x, s: torch.zeros(6, 4, 3) if x is None else torch.sin(x), a, mask)

    torch.testing.assert_close(loss(action), loss(changed))
    torch.manual_seed(0)
    assert not torch.allclose(
        policy.head.loss(lambda x, s: torch.zeros(6, 4, 3) if x is None else torch.sin(x), changed),
        loss(action),
    )


def test_noise_of_a_row_is_its_own(tiny_policy, tiny_batch):
    """Ancestral sampling too: what a row does depends on its seed, not on its neighbours."""
    batch = tiny_batch()
    seen = {k: v if k == "task" else v[:, 0] for k, v in batch.items() if k != "action"}
    policy = tiny_policy(head="ddpm", sampling_steps=5)
    policy.seed_rows([0, 1, 2], [4, 5, 6])
    together = policy.select_action(seen)
    policy.reset()
    policy.seed_rows([0], [6])
    alone = policy.select_action({k: v[2:] for k, v in seen.items()})
    torch.testing.assert_close(alone[0], together[2], rtol=1e-4, atol=1e-4)
