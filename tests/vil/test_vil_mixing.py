"""The mixing: operator and compiled code against the plain twin in float64, directions, memory, threads."""

import threading

import pytest
import torch

from vilma.bench import kept_bytes
from vilma.testing import assert_close, rms_ratio
from vilma.vil import mixing, mixing_cpu
from vilma.vil.mixing import MixWeights, convolve, mix, mix_plain

EPS = 1e-5


def weights(inner, heads, *, conv="2d", kernel=3, width=4, bias=True, dtype=torch.float32, seed=0):
    """Random ones of a size at which float32 is a fair approximation: forget gates near 1, as trained."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=0.5):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def offset():
        return normal(inner) if bias else None

    shape = (inner, 1, kernel, kernel) if conv == "2d" else (inner, 1, kernel)
    gate = (heads, 3 * inner)
    block = (inner // width, width, width)
    values = MixWeights(
        normal(*shape),
        normal(inner),
        normal(*block),
        offset(),
        normal(*block),
        offset(),
        normal(*block),
        offset(),
        normal(*gate, scale=0.1 / inner**0.5),
        normal(heads),
        normal(*gate, scale=0.1 / inner**0.5),
        3 + normal(heads),
        normal(inner),
        offset(),
        normal(inner),
    )
    return MixWeights(*(x if x is None else x.to(dtype).requires_grad_() for x in values))


def image(*shape, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(function, u, w, reverse):
    y = function(u, w, reverse, EPS)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names = ["u", *(name for name, x in w._asdict().items() if x is not None)]
    wanted = [u, *(x for x in w if x is not None)]
    return y, dict(zip(names, torch.autograd.grad(y, wanted, upstream.to(y.dtype))))


def in_double(u, w):
    twin = MixWeights(*(x if x is None else x.detach().double().requires_grad_() for x in w))
    return u.detach().double().requires_grad_(), twin


def compare(grads, exact, ratio):
    """i_bias moves all input gates together, which cancels in h: its error has the scale of f_bias."""
    for name, value in exact.items():
        if name == "i_bias":
            assert (grads[name] - value).abs().max() <= 10 * ratio * exact["f_bias"].abs().max()
        else:
            assert_close(grads[name], value, ratio, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("conv, kernel", [("2d", 3), ("2d", 5), ("causal1d", 4), ("causal1d", 3)])
def test_operator_in_float64_equals_plain(conv, kernel, bias, reverse):
    w = weights(24, 2, conv=conv, kernel=kernel, width=3, bias=bias, dtype=torch.float64)
    u = image(2, 3, 5, 48, dtype=torch.float64)
    y, grads = gradients(mix, u, w, reverse)
    y_plain, expected = gradients(mix_plain, u, w, reverse)
    assert_close(y, y_plain, 1e-13, "y")
    compare(grads, expected, 1e-12)


def test_gradcheck():
    w = weights(4, 2, width=2, dtype=torch.float64)
    u = image(1, 2, 2, 8, dtype=torch.float64)
    given = [x for x in w if x is not None]

    def run(u, *values):
        return mix(u, MixWeights(*values), True, EPS)

    torch.autograd.gradcheck(run, (u, *given), eps=1e-6, atol=1e-6)


COMPILED = (  # inner, heads, grid, convolution, kernel
    (64, 4, (4, 4), "2d", 3),
    (64, 2, (2, 19), "2d", 5),
    (128, 8, (3, 5), "2d", 1),
    (64, 4, (3, 7), "causal1d", 4),
    (64, 1, (1, 33), "causal1d", 3),
    (384, 4, (7, 7), "2d", 3),
)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inner, heads, grid, conv, kernel", COMPILED)
def test_compiled_equals_float64(inner, heads, grid, conv, kernel, bias, reverse):
    w = weights(inner, heads, conv=conv, kernel=kernel, bias=bias)
    u = image(2, *grid, 2 * inner)
    assert mixing_cpu.serves(u, w)
    y, grads = gradients(mix, u, w, reverse)
    y_exact, exact = gradients(mix_plain, *in_double(u, w), reverse)
    assert_close(y, y_exact, 2e-6, "y")
    _, plain = gradients(mix_plain, u, w, reverse)  # how far float32 gets here at all
    worst = max(rms_ratio(plain[name], exact[name]) for name in exact if name != "i_bias")
    assert worst < 2e-4
    compare(grads, exact, max(2e-5, 2 * worst))


def test_compiled_map_of_one_token():
    w, u = weights(64, 4), image(2, 1, 1, 128)
    y, grads = gradients(mix, u, w, False)
    y_exact, exact = gradients(mix_plain, *in_double(u, w), False)
    assert_close(y, y_exact, 2e-6)
    for name in ("v_weight", "norm_weight", "skip"):  # h is v but for its sign: the rest cancels
        assert_close(grads[name], exact[name], 2e-5, name)


@pytest.mark.parametrize("dtype, ratio", [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_without_compiled_code(dtype, ratio, monkeypatch):
    """What runs on other devices and in other precisions, here on the CPU."""
    monkeypatch.setattr(mixing_cpu, "serves", lambda u, w: False)
    w, u = weights(64, 4, dtype=dtype), image(2, 4, 4, 128, dtype=dtype)
    y, grads = gradients(mix, u, w, True)
    assert y.dtype == dtype
    y_exact, exact = gradients(mix_plain, *in_double(u, w), True)
    assert_close(y, y_exact, ratio, "y")
    assert all(x.dtype == dtype for x in grads.values())
    compare(grads, exact, 3 * ratio)


@pytest.mark.parametrize("conv", ["2d", "causal1d"])
def test_reverse_is_a_flip_of_the_tokens(conv):
    """Both directions on a flipped map: an independent statement of what reverse means."""
    w = weights(64, 4, conv=conv, kernel=3)
    u = image(2, 3, 5, 128)
    flipped = u.flip(1, 2)
    assert_close(mix(u, w, True, EPS), mix(flipped, w, False, EPS).flip(1, 2), 1e-6)


def test_convolution_is_that_of_torch():
    a = image(2, 4, 6, 8, dtype=torch.float64).detach()
    two = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, dtype=torch.float64)
    y = convolve(a, two.weight, two.bias, False)
    assert_close(y, two(a.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), 1e-14)
    one = torch.nn.Conv1d(8, 8, 4, padding=3, groups=8, dtype=torch.float64)
    tokens = a.flatten(1, 2)
    y = convolve(a, one.weight, one.bias, False).flatten(1, 2)
    assert_close(y, one(tokens.mT)[..., :24].mT, 1e-14)


def test_inputs_of_any_layout_and_place():
    w = weights(64, 4)
    u = image(2, 4, 4, 128).detach()
    expected = mix(u, w, False, EPS)
    shifted = torch.empty(u.numel() + 1)[1:].view(u.shape).copy_(u)  # not at the address of a vector
    transposed = u.transpose(1, 2).contiguous().transpose(1, 2)
    for same in (shifted, transposed):
        assert torch.equal(mix(same, w, False, EPS), expected)
        loss, other = mix(same.requires_grad_(), w, False, EPS), mix(u.requires_grad_(), w, False, EPS)
        (mine,), (theirs,) = (torch.autograd.grad(x.square().sum(), v) for x, v in ((loss, same), (other, u)))
        assert torch.equal(mine, theirs)


def test_images_after_another_are_the_same_as_all_at_once(monkeypatch):
    w, u = weights(64, 4), image(5, 3, 4, 128)
    y = mix(u, w, True, EPS)
    for images in (1, 2):
        monkeypatch.setattr(mixing_cpu, "_CACHE", images * 6 * 12 * 128)
        assert mixing_cpu.images_at_once(u) == images
        with torch.no_grad():
            assert torch.equal(mix(u, w, True, EPS), y)


def test_memory_that_is_lent_passes_between_modes(monkeypatch):
    """It may have been made in inference mode, be too small, or be used by a second model in between."""
    monkeypatch.setattr(mixing_cpu, "_KEPT", threading.local())
    w, small, large = weights(64, 4), image(1, 2, 2, 128), image(3, 4, 4, 128)
    expected = [gradients(mix, u, w, False) for u in (small, large)]
    with torch.inference_mode():
        first = mix(small, w, False, EPS)
    with torch.no_grad():
        assert torch.equal(mix(large, w, False, EPS), expected[1][0])
        assert torch.equal(mix(small, w, False, EPS), expected[0][0])
    assert torch.equal(first, expected[0][0])
    y, grads = gradients(mix, large, w, False)
    assert torch.equal(y, expected[1][0])
    assert all(torch.equal(grads[name], value) for name, value in expected[1][1].items())
    monkeypatch.setattr(mixing_cpu, "_KEPT", threading.local())
    with torch.device("meta"), torch.no_grad():  # where a model is being built, memory is real all the same
        assert torch.equal(mix(large, w, False, EPS), y)
    monkeypatch.setattr(mixing_cpu, "_MOST_LENT", 0)
    with torch.no_grad():
        assert torch.equal(mix(large, w, False, EPS), y)


def test_threads_agree(monkeypatch):
    monkeypatch.setattr(mixing_cpu, "_SERIAL", 0)
    w, u = weights(64, 4), image(5, 6, 6, 128)
    y, grads = gradients(mix, u, w, True)
    torch.set_num_threads(2)
    try:
        y_two, grads_two = gradients(mix, u, w, True)
        _, again = gradients(mix, u, w, True)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(y, y_two)
    assert all(torch.equal(grads_two[name], value) for name, value in again.items())
    compare(grads_two, grads, 2e-6)


def test_keeps_only_its_input_the_memory_and_the_gates():
    w, u = weights(64, 4), image(2, 4, 4, 128)
    tokens, inner, heads = 32, 64, 4
    kept = kept_bytes(lambda: mix(u, w, False, EPS), [u, *(x for x in w if x is not None)])
    assert kept <= 4 * tokens * (inner + 4 * heads)


def test_what_was_not_kept_is_computed_again():
    w, u = weights(64, 4), image(2, 4, 4, 128)
    y, grads = gradients(lambda *x: torch.ops.vilma.vil_mix(x[0], *x[1], *x[2:], False)[0], u, w, True)
    y_kept, expected = gradients(mix, u, w, True)
    assert torch.equal(y, y_kept)
    for name, value in expected.items():
        assert torch.equal(grads[name], value), name


def test_second_derivative_is_refused():
    w, u = weights(64, 4), image(1, 2, 2, 128)
    (du,) = torch.autograd.grad(mix(u, w, False, EPS).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        du.sum().backward()


def test_operator_is_registered_completely():
    w, u = weights(64, 4), image(1, 2, 3, 128)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vilma.vil_mix, (u, *w, True, EPS, True), test_utils=tests)


@pytest.mark.parametrize("reverse", [False, True])
def test_plain_is_compiled_as_one_graph(reverse):
    """What a compiler is given on a GPU, where it fuses what surrounds the mLSTM."""
    torch._dynamo.reset()
    w, u = weights(64, 4), image(2, 3, 4, 128)
    compiled = torch.compile(mix_plain, backend="aot_eager", fullgraph=True)
    y, grads = gradients(compiled, u, w, reverse)
    expected, exact = gradients(mix_plain, u, w, reverse)
    assert_close(y, expected, 1e-6)
    compare(grads, exact, 5e-5)


def test_wide_and_narrow_are_inverse():
    weight = torch.randn(6, 4, 4)
    wide = mixing._wide(weight)
    assert wide.shape == (2, 12, 12) and torch.equal(mixing._narrow(wide, 4), weight)
    assert wide.count_nonzero() == weight.numel()
