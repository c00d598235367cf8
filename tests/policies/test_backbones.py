import pytest
import torch

from vilma.policies.backbones import BACKBONES, TransformerBlock, build_backbone
from vilma.policies.denoiser import Denoiser
from vilma.testing import assert_close


def stack(name, seed=0, **options):
    torch.manual_seed(seed)
    model = build_backbone(name, 32, 4, 4, tail=5, **options).double().eval()
    for parameter in model.parameters():  # fresh gates are almost constant: make everything count
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("name", BACKBONES)
def test_prefix_read_once(name):
    model, x = stack(name), torch.randn(2, 12, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = model(x, last=5)
        memory = model.remember(x[:, :7])
        assert_close(model(x[:, 7:], memory, last=5), whole, 1e-12)
        assert_close(model(x[:, 7:], memory, last=5), whole, 1e-12)  # the memory is not used up
        assert whole.shape == (2, 5, 32)
        y = x.clone()
        y[:, :7] += 1
        assert not torch.allclose(model(y, last=5), whole)


@pytest.mark.parametrize("name", ["xlstm", "transformer"])
def test_parallel_equals_recurrent(name):
    model, x = stack(name), torch.randn(2, 12, 32, dtype=torch.float64)
    with torch.no_grad():
        state, steps = None, []
        for token in x.unbind(1):
            out, state = model.step(token, state)
            steps.append(out)
        assert_close(torch.stack(steps, 1), model(x), 1e-12)


@pytest.mark.parametrize("kernel", ["naive", "torch", "cpu"])
def test_kernels_agree(kernel):
    """Parallel (naive) and chunkwise forms against the recurrence, over more than one chunk."""
    from vilma.xlstm import mlstm

    t = torch.zeros(1, 1, 1, 4)
    try:
        mlstm(t, t, t, t[..., 0], t[..., 0], backend=kernel)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"{kernel} does not run here: {error}")
    model, x = stack("xlstm", kernel=kernel).float(), torch.randn(2, 150, 32)
    with torch.no_grad():
        state, steps = None, []
        exact = stack("xlstm")
        for token in x.double().unbind(1):
            out, state = exact.step(token, state)
            steps.append(out)
        assert_close(model(x).double(), torch.stack(steps, 1), 2e-5)


def test_attention_against_the_definition():
    torch.manual_seed(0)
    block = TransformerBlock(16, 2).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    y = block.norm_attention(x)
    q, k, v = (part.view(6, 2, 8) for part in (block.qkv(y)[0]).split(16, -1))
    rows = []
    for t in range(6):
        weights = torch.einsum("hd,shd->hs", q[t], k[: t + 1]).div(8**0.5).softmax(-1)
        rows.append(torch.einsum("hs,shd->hd", weights, v[: t + 1]).flatten())
    mixed = x + block.out_proj(torch.stack(rows))
    z = block.norm_ffn(mixed)
    wanted = mixed + block.proj_down(torch.nn.functional.silu(block.proj_up_gate(z)) * block.proj_up(z))
    assert_close(block(x), wanted, 1e-12)
    assert_close(block(x, last=2), wanted[:, -2:], 1e-12)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("tokens", [1, 5, 16, 40])
def test_inference_takes_the_form_for_few_rows(name, tokens):
    """Without gradients weights are multiplied by another kernel; wide enough that it is used."""
    torch.manual_seed(0)
    model = build_backbone(name, 256, 2, 4, tail=min(tokens, 3)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    x = torch.randn(1, tokens, 256)
    with_gradients = model(x)
    with torch.no_grad():
        assert_close(model(x), with_gradients, 1e-5)
        exact = model.double()(x.double())
    assert_close(with_gradients.double(), exact, 1e-5)


def denoiser(backbone, noise_token):
    torch.manual_seed(0)
    sizes = {"latent_dim": 24, "goal_dim": 16, "action_dim": 7, "num_obs_tokens": 4, "horizon": 6}
    return Denoiser(
        **sizes, dim=32, num_heads=4, num_blocks=3, backbone=backbone, noise_token=noise_token
    ).eval()


@pytest.mark.parametrize("noise_token", ["first", "last"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_who_sees_whom(backbone, noise_token):
    """An action sees what lies before it, bit for bit; bixlstm's actions see each other both ways."""
    model = denoiser(backbone, noise_token)
    obs, goal, x = torch.randn(2, 4, 24), torch.randn(2, 1, 16), torch.randn(2, 6, 7)
    sigma = torch.tensor([0.3, 4.0])
    with torch.no_grad():
        before = model(x, sigma, model.context(obs, goal))
        x[:, -1] += 1
        after = model(x, sigma, model.context(obs, goal))
        assert not torch.equal(before[:, -1], after[:, -1])
        assert torch.equal(before[:, :-1], after[:, :-1]) == (backbone != "bixlstm")
        obs[:, -1] += 1
        assert not torch.equal(model(x, sigma, model.context(obs, goal))[:, 0], after[:, 0])
        assert not torch.equal(model(x, 2 * sigma, model.context(obs, goal))[:, 0], after[:, 0])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_denoiser_with_memory_equals_the_plain_one(backbone):
    model = denoiser(backbone, "last")
    x, sigma = torch.randn(2, 6, 7), torch.tensor([0.3, 4.0])
    with torch.no_grad():
        context = model.context(torch.randn(2, 4, 24), torch.randn(2, 1, 16))
        memory = model.remember(context)
        torch.testing.assert_close(
            model(x, sigma, context, memory), model(x, sigma, context), rtol=1e-5, atol=1e-5
        )
    assert denoiser(backbone, "first").remember(context) is None


def test_errors():
    with pytest.raises(ValueError, match="unknown backbone 'mamba'; known: xlstm, bixlstm, transformer"):
        build_backbone("mamba", 32, 2, 4, tail=5)
    with pytest.raises(ValueError, match="num_heads=5 must divide dim=32"):
        build_backbone("transformer", 32, 2, 5, tail=5)
    with pytest.raises(ValueError, match="reads backwards has no state"):
        stack("bixlstm")(torch.randn(1, 7, 32, dtype=torch.float64), return_state=True)
    with pytest.raises(ValueError, match="noise_token must be one of first, last, none; got 'middle'"):
        denoiser("xlstm", "middle")
