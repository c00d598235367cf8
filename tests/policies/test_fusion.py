import pytest
import torch

from vilma.policies.fusion import FUSIONS, AddFusion, AttentionFusion, CatFusion

# The scenes of the tiny policy here are random: what the first batch's look says of them does not matter.
pytestmark = pytest.mark.filterwarnings("ignore::vilma.pointmap.check.GeometryWarning")


def tokens(batch=5, rgb=1, xyz=1, width=8):
    return {"rgb": torch.randn(batch, rgb, width), "xyz": torch.randn(batch, xyz, width)}


def fusion(kind, dropout=0.0):
    options = (
        {"cameras": ("front", "wrist"), "dim": 16, "layers": 2, "heads": 2} if kind is AttentionFusion else {}
    )
    return kind(("rgb", "xyz"), 8, dropout, **options)


def test_cat_and_add():
    seen = tokens()
    assert torch.equal(fusion(CatFusion)("front", seen), torch.cat([seen["rgb"], seen["xyz"]], 1))
    torch.testing.assert_close(fusion(AddFusion)("front", seen), seen["rgb"] + seen["xyz"])
    assert not list(fusion(CatFusion).parameters())
    with pytest.raises(ValueError, match=r"equally many tokens of rgb, xyz, got \[1, 3\]"):
        fusion(AddFusion)("front", tokens(xyz=3))


def test_attention_gives_one_token_of_all():
    model, seen = fusion(AttentionFusion), tokens(rgb=4, xyz=3)
    out = model("front", seen)
    assert out.shape == (5, 1, 16) and model.width == 16
    assert not torch.allclose(out, model("wrist", seen))
    swapped = {"rgb": seen["rgb"].flip(1), "xyz": seen["xyz"]}
    torch.testing.assert_close(model("front", swapped), out)  # a set of tokens of each kind
    for name in seen:
        assert not torch.allclose(model("front", seen | {name: seen[name] + 1}), out)
    model("front", seen).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "query.wrist")


@pytest.mark.parametrize("kind", FUSIONS.values())
def test_dropout_replaces_one_modality_of_a_sample(kind):
    model = fusion(kind, dropout=0.5)
    lost = torch.cat([model.draw(50, torch.device("cpu")) for _ in range(20)])
    share = torch.bincount(lost + 1, minlength=3) / 1000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.25, 0.25]), atol=0.06, rtol=0)
    assert model.eval().draw(50, torch.device("cpu")) is None
    seen = tokens(3)
    out = model("front", seen, torch.tensor([-1, 0, 1]))
    torch.testing.assert_close(out[0], model("front", seen)[0])
    blind = model("front", seen | {"rgb": seen["rgb"] + 1}, torch.tensor([-1, 0, 1]))
    assert [torch.equal(a, b) for a, b in zip(out, blind)] == [False, True, False]
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.missing.values())


def test_policy_with_dropout_learns_and_acts(tiny_policy, tiny_batch):
    for modality in ("cat", "add", "attention"):
        policy = tiny_policy(modality=modality, modality_dropout=0.5, obs_horizon=2)
        policy.train()(tiny_batch(batch=6, steps=2))[0].backward()
        policy.eval()
        batch = tiny_batch(steps=2)
        with torch.no_grad():
            assert torch.equal(policy.encode(batch), policy.encode(batch))
    with pytest.raises(ValueError, match=r"fusion heads \(3\) must divide"):
        tiny_policy(modality="attention", fusion_heads=3)
