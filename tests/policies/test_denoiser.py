import pytest
import torch

from vilma.policies import edm
from vilma.policies.denoiser import Denoiser, SigmaEmbedding, from_reference_names
from vilma.testing import assert_close, golden


def tiny(**changes):
    sizes = {
        "latent_dim": 24,
        "goal_dim": 16,
        "action_dim": 7,
        "num_obs_tokens": 4,
        "horizon": 10,
        "dim": 32,
        "num_blocks": 2,
        "num_heads": 4,
    }
    return Denoiser(**(sizes | changes))


def golden_denoiser():
    z = golden("pmp", "xlstm_denoiser_tiny.npz")
    model = tiny()
    weights = {name[2:]: value for name, value in z.items() if name.startswith("w/")}
    model.load_state_dict(from_reference_names(weights))
    return model, z


def test_golden_output_loss_and_sample():
    model, z = golden_denoiser()
    close = {"rtol": 2e-4, "atol": 2e-5}
    with torch.no_grad():
        context = model.context(z["state"], z["goal"])

        def net(x, sigma):
            return model(x, sigma, context)

        torch.testing.assert_close(net(z["action"], z["sigma"]), z["net_out"], **close)
        denoised = edm.denoise(net, z["action"], z["sigma"])
        torch.testing.assert_close(denoised, z["denoised"], **close)
        loss = edm.edm_loss(net, z["loss_action"], z["loss_noise"], z["sigma"])
        torch.testing.assert_close(loss, z["loss"], **close)
        sample = edm.sample_ddim(
            lambda x, sigma: edm.denoise(net, x, sigma), z["x_init"], edm.sigmas_exponential(4)
        )
        torch.testing.assert_close(sample, z["ddim4"], rtol=2e-3, atol=2e-5)


def test_sigma_embedding():
    z = golden("pmp", "sigma_embedding.npz")
    embedding = SigmaEmbedding(32)
    weights = {"up.weight": z["w1"], "up.bias": z["b1"], "down.weight": z["w2"], "down.bias": z["b2"]}
    embedding.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(embedding(z["sigma"]), z["out"][:, 0], rtol=1e-5, atol=1e-6)


def test_causal_bit_for_bit():
    model = tiny().eval()
    obs, goal, x = torch.randn(2, 4, 24), torch.randn(2, 1, 16), torch.randn(2, 10, 7)
    sigma = torch.tensor([0.3, 4.0])
    with torch.no_grad():
        context = model.context(obs, goal)
        before = model(x, sigma, context)
        x[:, -1] += 1
        after = model(x, sigma, context)
        assert torch.equal(before[:, :-1], after[:, :-1])
        assert not torch.equal(before[:, -1], after[:, -1])
        obs[:, -1] += 1
        assert not torch.equal(model(x, sigma, model.context(obs, goal))[:, 0], after[:, 0])


def test_parallel_equals_recurrent():
    model = tiny().double().eval()
    tokens = torch.randn(2, 16, 32, dtype=torch.float64)
    with torch.no_grad():
        parallel, state, steps = model.stack(tokens), None, []
        for token in tokens.unbind(1):
            out, state = model.stack.step(token, state)
            steps.append(out)
    assert_close(torch.stack(steps, 1), parallel, 1e-12)


def test_output_is_that_of_the_whole_stack():
    model = tiny().eval()
    x, sigma = torch.randn(2, 10, 7), torch.tensor([0.3, 4.0])
    with torch.no_grad():
        context = model.context(torch.randn(2, 4, 24), torch.randn(2, 1, 16))
        actions = model.action_proj(x) + model.position[:, 5:]
        tokens = torch.cat([model.sigma_embed(sigma)[:, None], context, actions], dim=1)
        whole = model.head(model.stack(tokens))[:, -10:]
        assert_close(model(x, sigma, context), whole, 1e-6)


def test_initialisation():
    model = tiny(dim=256, num_heads=8)
    for name, value in model.named_parameters():
        if "norm" in name:
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name


def test_errors():
    model = tiny()
    with pytest.raises(ValueError, match="built for 4 observation tokens, got 3"):
        model.context(torch.randn(2, 3, 24), torch.randn(2, 1, 16))
    with pytest.raises(ValueError, match="no counterpart for the reference weight 'cond_layer'"):
        from_reference_names({"cond_layer": torch.zeros(1)})
    with pytest.raises(ValueError, match="even width"):
        SigmaEmbedding(33)
