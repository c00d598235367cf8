import importlib.util

import pytest
import torch

from vilma.policies.explain import grad_cam


@pytest.mark.parametrize(
    "changes, streams",
    [
        ({}, ["rgb", "xyz"]),
        ({"modality": "depth", "head": "regression"}, ["depth"]),
        ({"modality": "6ch", "head": "flow", "obs_horizon": 2}, ["xyzrgb"]),
        ({"xyz_encoder": "film_resnet18", "xyz_encoder_options": {}, "encoder_features": 16}, ["rgb", "xyz"]),
        (
            {
                "modality": "rgb",
                "rgb_encoder": "vil2_tiny_patch16_224",
                "rgb_encoder_options": {"depth": 2, "embed_dim": 48},
            },
            ["rgb"],
        ),
    ],
)
def test_one_map_for_each_camera_and_modality(tiny_policy, tiny_batch, changes, streams):
    policy = tiny_policy(**changes).train()
    batch = tiny_batch(steps=policy.config.obs_horizon)
    policy.encoders["front_" + streams[0]].eval()  # a frozen part keeps its own mode
    modes = [module.training for module in policy.modules()]
    before = torch.get_rng_state()
    found = grad_cam(policy, batch, draws=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in policy.modules()] == modes
    assert all(p.grad is None for p in policy.parameters())
    assert [(f.camera, f.stream) for f in found] == [(c, s) for c in ("front", "wrist") for s in streams]
    for f in found:
        assert f.heat.shape == (3, 16, 16) == (3, *f.picture.shape[2:])
        assert f.heat.isfinite().all() and (f.heat >= 0).all()
    torch.testing.assert_close(sum(f.share for f in found), torch.ones(3))
    again = grad_cam(policy, batch, draws=4)
    assert all(torch.equal(a.heat, b.heat) for a, b in zip(found, again))


def test_a_modality_that_is_not_read_has_no_share(tiny_policy, tiny_batch):
    policy = tiny_policy()
    torch.nn.init.zeros_(policy.encoders["wrist_xyz"].head.weight)
    found = {f"{f.camera}_{f.stream}": f for f in grad_cam(policy, tiny_batch(), draws=2)}
    assert not found["wrist_xyz"].share.any() and not found["wrist_xyz"].heat.any()
    assert found["front_rgb"].share.min() > 0


def test_of_a_network_that_pools_by_the_mean_it_is_grad_cam(tiny_policy, tiny_batch):
    """By Grad-CAM's own equations: the map's channels weighted by the gradient at the pooled features."""
    options = {"modality": "rgb", "cameras": ("front",), "head": "regression"}
    policy = tiny_policy(rgb_encoder="resnet18", rgb_encoder_options={"output_stride": 8}, **options).eval()
    batch = tiny_batch()
    network = policy.encoders["front_rgb"].network
    kept = []
    hooks = [
        network.layer4.register_forward_hook(lambda module, args, out: kept.append(out)),
        network.global_pool.register_forward_hook(lambda module, args, out: kept.append(out)),
    ]
    loss, _ = policy(batch)
    (gradient,) = torch.autograd.grad(3 * loss, kept[1])
    for hook in hooks:
        hook.remove()
    assert kept[0].shape == (3, 512, 2, 2)
    heat = torch.einsum("nc,nchw->nhw", gradient / 4, kept[0]).abs()
    wanted = torch.nn.functional.interpolate(heat[:, None], (16, 16), mode="bilinear")[:, 0]
    (found,) = grad_cam(policy, batch, draws=2)
    torch.testing.assert_close(found.heat, wanted.detach(), rtol=1e-4, atol=1e-6)


def test_clouds_have_no_map(tiny_policy, tiny_batch):
    with pytest.raises(ValueError, match="cannot be explained: cloud_xyz"):
        grad_cam(tiny_policy(modality="dp3"), tiny_batch())


def test_holes_are_shown_grey_and_leave_the_colours_alone():
    from vilma.tools.explain_policy import _shown

    picture = 5 + torch.rand(4, 8, 8)
    picture[:, :2] = 0
    image = torch.from_numpy(_shown(picture, "xyz", "imagenet"))
    assert (image[:2] == 0.75).all()
    torch.testing.assert_close(image[2:], torch.from_numpy(_shown(picture[:, 2:], "xyz", "imagenet")))
    assert (_shown(0 * picture, "depth", "imagenet") == 0.75).all()


def test_panel_of_an_episode(tiny_policy, tiny_batch, tmp_path):
    pytest.importorskip("matplotlib")
    from vilma.tools.explain_policy import episode_batch, panel

    policy = tiny_policy(obs_horizon=2)
    data = tiny_batch(batch=6)
    observations = [
        {k: v[i] if k == "task" else v[i, 0].numpy() for k, v in data.items() if k != "action"}
        for i in range(6)
    ]
    batch, frames = episode_batch(policy, observations, data["action"][:, 0].numpy(), 3)
    assert frames == [0, 2, 5] and batch["observation.state"].shape == (3, 2, 2)
    assert torch.equal(batch["action"][1], data["action"][2:6, 0])
    assert batch["action_is_pad"].tolist()[2] == [False, True, True, True]
    out = panel(grad_cam(policy, batch, draws=2), frames, "imagenet", tmp_path / "a" / "x.png", "title")
    assert out.stat().st_size > 10_000
    with pytest.raises(ValueError, match="frames 0 to 5, not"):
        episode_batch(policy, observations, data["action"][:, 0].numpy(), [7])


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="needs the extra robot")
def test_the_committed_policy_explained(tmp_path, capsys):
    from pathlib import Path

    from vilma.tools.explain_policy import main

    policy = Path(__file__).resolve().parents[1] / "data" / "demo_policy"
    out = tmp_path / "demo.png"
    assert main([str(policy), "--frames", "0", "10", "--seed", "7", "--draws", "4", "--out", str(out)]) == 0
    assert out.stat().st_size > 50_000
    assert "robot0_eye_in_hand rgb:" in capsys.readouterr().out
