"""Every fusion x head x backbone: builds, overfits a batch, is saved and loaded, is a fixed program."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vilma.policies.views as views
from vilma.policies import PointMapPolicy
from vilma.policies.backbones import BACKBONES
from vilma.policies.fusion import MODALITIES
from vilma.policies.heads import HEADS
from vilma.training.optim import OptimConfig, build_optimizer

# The scenes are made up: what the first batch's look says of them does not matter.
pytestmark = pytest.mark.filterwarnings("ignore::vilma.pointmap.check.GeometryWarning")

# Heads of diffusers see the pictures soonest where the network predicts actions.
FAST = {"noise_draws": 8, "prediction": "sample"}
PRODUCT = list(itertools.product(HEADS, BACKBONES))
# Every fusion, head, backbone and place of the noise token, and most of their pairs.
DIAGONAL = [
    (fusion, HEADS[i % 5], BACKBONES[i % 3], ("first", "last")[i // 2 % 2])
    for i, fusion in enumerate(MODALITIES)
]


@pytest.fixture
def told_apart(tiny_batch):
    """Three samples whose pictures alone, colour and distance, say which action is theirs."""
    batch = tiny_batch() | {"task": ["lift"] * 3, "observation.state": torch.zeros(3, 1, 2)}
    for camera in ("front", "wrist"):
        images, depth = batch[f"observation.images.{camera}"], batch[f"observation.depth.{camera}"]
        batch[f"observation.pose.{camera}"][:] = torch.eye(4)
        for i in range(3):
            images[i] //= 4
            images[i, :, i] += 180
            depth[i] = 0.3 + 0.5 * i + 0.1 * depth[i]
    return batch


def measure(policy, batch):
    """The loss of a fixed set of draws."""
    policy.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return sum(policy(batch)[0].item() for _ in range(8)) / 8


def check(policy, batch, folder, rounds=20):
    assert all(p.requires_grad for p in policy.parameters())
    optimizer = build_optimizer(OptimConfig(lr=6e-3, weight_decay=0.0), policy)  # raises if one were missing
    swapped = batch | {"action": batch["action"].roll(1, 0)}
    before = measure(policy, batch)
    for _ in range(rounds):
        policy.train()
        for _ in range(20):
            loss, _ = policy(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        after, others = measure(policy, batch), 0.0
        if after < 0.6 * before and (others := measure(policy, swapped)) > 1.3 * after:
            break
    assert after < 0.6 * before, f"the loss went from {before:.3f} to {after:.3f}"
    # A diffusion loss falls far without any look at the pictures; that of others' actions must not.
    assert others > 1.3 * after, f"the loss is {after:.3f}, of actions of other samples {others:.3f}"
    policy.save_pretrained(folder)
    loaded = PointMapPolicy.from_pretrained(folder)
    assert loaded.config == policy.config
    seen = {k: v if k == "task" else v[:, 0] for k, v in batch.items() if k != "action"}
    for model in (policy, loaded):
        model.seed(3)
    for _ in range(3):  # beyond one chunk
        action = policy.select_action(seen)
        assert action.isfinite().all() and torch.equal(action, loaded.select_action(seen))


@pytest.mark.parametrize("fusion, head, backbone, noise_token", DIAGONAL)
def test_diagonal(tiny_policy, told_apart, tmp_path, fusion, head, backbone, noise_token):
    changes = {"modality": fusion, "head": head, "backbone": backbone, "noise_token": noise_token}
    check(tiny_policy(**FAST, **changes), told_apart, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("fusion", MODALITIES)
def test_whole_product(tiny_policy, told_apart, tmp_path, fusion):
    failed = []
    shift = list(MODALITIES).index(fusion)
    for number, (head, backbone) in enumerate(PRODUCT):
        noise_token = ("first", "last")[(number + shift) % 2]
        changes = {"modality": fusion, "head": head, "backbone": backbone, "noise_token": noise_token}
        try:
            check(tiny_policy(**FAST, **changes), told_apart, tmp_path / str(number))
        except AssertionError as error:
            failed.append(f"{head} {backbone} {noise_token}: {error}")
    assert not failed, "\n".join(failed)


class _NoStalls(TorchDispatchMode):
    """Fails on what a CUDA graph cannot hold: values read on the host, host data brought in, random draws."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "rand", "normal", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        assert not any(name == word or name.startswith(f"{word}_") for word in self.FORBIDDEN), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", [h for h in HEADS if not h.startswith("dd")])
@pytest.mark.parametrize("modality", ["cat", "depth", "dp3"])
def test_a_chunk_is_a_fixed_program(tiny_policy, tiny_batch, monkeypatch, head, modality):
    """Checks of values are left out on an accelerator; here they are switched off by hand."""
    camera = views.Camera
    monkeypatch.setattr(views, "Camera", lambda *a, check=True: camera(*a, check=False))
    policy = tiny_policy(
        head=head,
        modality=modality,
        noise_token="last",
        sampler="heun",
        workspace=((-1, -1, -1), (1, 1, 1)),
        crops={"wrist": (2, 2, 12, 12)},
        resize={"front": (20, 20)},
        gripper_index=(2,),
    ).eval()
    batch = tiny_batch()
    with torch.inference_mode():
        goal = policy.text(batch["task"])
        noise = torch.randn(3, *policy.head.noise_shape(4, 3))
        wanted = policy.chunk(batch, goal, noise)
        with _NoStalls():
            again = policy.chunk(batch, goal, noise)
        assert torch.equal(again, wanted)


def test_stalls_are_noticed():
    with pytest.raises(AssertionError), _NoStalls():
        torch.ones(3).sum().item()
    with pytest.raises(AssertionError), _NoStalls():
        torch.tensor([1.0, 2.0])


def test_sampling_with_the_prefix_read_once(tiny_policy, tiny_batch, monkeypatch):
    """Whole policies: the same chunk when every step runs all tokens again."""
    for backbone in BACKBONES:
        policy = tiny_policy(backbone=backbone, noise_token="last", sampling_steps=6).eval()
        batch = tiny_batch()
        lengths = []
        policy.denoiser.stack.blocks[0].register_forward_hook(
            lambda module, args, out, lengths=lengths: lengths.append(args[0].shape[1])
        )
        with torch.no_grad():
            goal, noise = policy.text(batch["task"]), torch.randn(3, 4, 3)
            cached = policy.chunk(batch, goal, noise)
            assert lengths == [6] + [5] * 6  # goal, 4 pictures and the state once; then sigma and 4 actions
            monkeypatch.setattr(policy.denoiser, "remember", lambda context: None)
            plain = policy.chunk(batch, goal, noise)
            assert lengths[7:] == [11] * 6
        torch.testing.assert_close(cached, plain, rtol=1e-5, atol=1e-5)
