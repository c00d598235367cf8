import copy
import dataclasses

import numpy as np
import pytest
import torch

from vilma.pointmap.augment import AugmentConfig, frame_jitter
from vilma.policies import PointMapPolicy, PointMapPolicyConfig, load_policy
from vilma.policies.fusion import MODALITIES

# The scenes here are random: what the first batch's look says of them does not matter.
pytestmark = pytest.mark.filterwarnings("ignore::vilma.pointmap.check.GeometryWarning")

CAMERAS = ("front", "wrist")
HEIGHT, WIDTH = 24, 32
SMALL = {"features": 32, "channels": [8, 8, 8]}
BASE = PointMapPolicyConfig(
    cameras=CAMERAS,
    action_dim=7,
    reference_frame="world",
    action_kind="controller",
    rgb_encoder="spatial_softmax",
    rgb_encoder_options=SMALL,
    xyz_encoder="spatial_softmax",
    xyz_encoder_options=SMALL | {"expect_channels": 3, "mask_channel": 3},
    depth_range=(0.05, 3.0),
    use_state=True,
    state_dim=5,
    horizon=6,
    execute=3,
    dim=32,
    num_blocks=2,
    num_heads=4,
)


def config(**changes):
    return dataclasses.replace(BASE, **changes)


def statistics(action_dim=7, state_dim=5):
    def one(dim):
        return {"mean": [0.1] * dim, "std": [0.5] * dim, "min": [-1.0] * dim, "max": [1.0] * dim}

    return {"action": one(action_dim), "observation.state": one(state_dim)}


def make_batch(batch=3, steps=1, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=g)

    data = {
        "task": ["lift the cube", "open the drawer", "lift the can"][:batch] * (batch // 3 + 1),
        "action": 2 * rand(batch, 6, 7) - 1,
        "action_is_pad": torch.zeros(batch, 6, dtype=torch.bool),
        "observation.state": rand(batch, steps, 5),
    }
    data["task"] = data["task"][:batch]
    for camera in CAMERAS:
        pose = torch.eye(4).repeat(batch, steps, 1, 1)
        pose[..., :3, :3] = torch.linalg.qr(rand(batch, steps, 3, 3))[0]
        pose[..., :3, 0] *= torch.linalg.det(pose[..., :3, :3])[..., None]
        pose[..., :3, 3] = rand(batch, steps, 3)
        intrinsics = torch.tensor([[30.0, 0, WIDTH / 2], [0, 31.0, HEIGHT / 2], [0, 0, 1]])
        data |= {
            f"observation.images.{camera}": (255 * rand(batch, steps, 3, HEIGHT, WIDTH)).to(torch.uint8),
            f"observation.depth.{camera}": 0.3 + rand(batch, steps, HEIGHT, WIDTH),
            f"observation.intrinsics.{camera}": intrinsics.repeat(batch, steps, 1, 1),
            f"observation.pose.{camera}": pose,
        }
    return data


def observation(batch=3, seed=0):
    """A batch as a vectorised environment returns it: arrays without a time axis."""
    data = make_batch(batch, seed=seed)
    return {
        key: value if key == "task" else value[:, 0].numpy()
        for key, value in data.items()
        if not key.startswith("action")
    }


def make_policy(stats=True, **changes):
    return PointMapPolicy.from_config(config(**changes), statistics() if stats else None)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("steps", [1, 2])
def test_variants_build_train_and_act(modality, steps):
    policy = make_policy(modality=modality, obs_horizon=steps, noise_draws=2, shift={"front": 2})
    policy.train()
    loss, logs = policy(make_batch(steps=steps))
    loss.backward()
    assert loss.isfinite()
    assert logs["loss"] == loss.detach()
    tokens = steps * ({"cat": 4, "dp3": 1}.get(modality, 2) + 1)
    assert policy.denoiser.position.shape[1] == 1 + tokens + 6
    actions = policy.select_action(observation())
    assert actions.shape == (3, 7)
    assert actions.dtype == torch.float32
    assert actions.isfinite().all()


@pytest.mark.parametrize("encoder", ["film_resnet18", "resnet18"])
def test_timm_encoders(encoder):
    policy = make_policy(rgb_encoder=encoder, rgb_encoder_options={}, encoder_features=48)
    loss, _ = policy(make_batch())
    loss.backward()
    assert set(policy.adapters) == {f"{camera}_{kind}" for camera in CAMERAS for kind in ("rgb", "xyz")}
    assert policy.encoders["front_rgb"].is_conditioned == encoder.startswith("film")


@pytest.mark.parametrize("changes", [{}, {"xyz_encoder": "film_resnet18", "xyz_encoder_options": {}}])
def test_every_parameter_receives_a_gradient(changes):
    policy = make_policy(encoder_features=40, obs_horizon=2, **changes)
    batch = make_batch(steps=2)
    for _ in range(2):  # FiLM starts at zero: its inputs move from the second step on
        optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
        optimizer.zero_grad()
        policy(batch)[0].backward()
        optimizer.step()
    missing = [name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert all(p.requires_grad for p in policy.parameters())


def test_overfits_one_batch():
    policy = make_policy(state_normalization="none", action_normalization="none", noise_draws=16)
    batch = make_batch()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    losses = []
    for _ in range(70):
        loss, _ = policy(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.3 * losses[0]
    chunk = torch.stack([policy.select_action(observation()) for _ in range(3)], 1)
    error = (chunk - batch["action"][:, :3]).square().mean().sqrt()
    assert error < 0.4 * batch["action"].square().mean().sqrt()


def test_point_maps_against_plain_geometry():
    """Unprojection written out pixel by pixel in float64: crop, frame, depth range, workspace and scale."""
    low, high = (0.0, 0.0, 0.2), (1.2, 1.2, 1.4)
    center, scale = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    policy = make_policy(
        crops={"wrist": (3, 5, 16, 20)},
        depth_range=(0.4, 1.2),
        workspace=(low, high),
        point_center=center,
        point_scale=scale,
    ).eval()
    batch = make_batch()
    batch["observation.depth.wrist"][0, 0, 5, 8] = float("nan")
    got = policy.pictures(batch, "wrist")
    assert got["xyz"].shape == (3, 4, 16, 20)
    valid_share = got["xyz"][:, 3].mean().item()
    assert 0.1 < valid_share < 0.9
    depth = batch["observation.depth.wrist"].double().numpy()
    intrinsics = batch["observation.intrinsics.wrist"].double().numpy()
    pose = batch["observation.pose.wrist"].double().numpy()
    for b, row, column in ((0, 2, 3), *np.ndindex(3, 16, 20)):
        v, u = row + 3, column + 5
        z = depth[b, 0, v, u]
        ray = np.linalg.inv(intrinsics[b, 0]) @ [u + 0.5, v + 0.5, 1]
        point = (pose[b, 0] @ [*(ray * z), 1])[:3]
        is_valid = 0.4 < z < 1.2 and (point >= low).all() and (point <= high).all()
        assert got["xyz"][b, 3, row, column] == is_valid
        wanted = (point - center) / scale if is_valid else np.zeros(3)
        np.testing.assert_allclose(got["xyz"][b, :3, row, column], wanted, atol=1e-5)
    image = batch["observation.images.wrist"][:, 0, :, 3:19, 5:25].double() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    wanted = (image - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(got["rgb"].double(), wanted, atol=1e-5, rtol=0)


def test_float_images_and_the_camera_frame():
    policy = make_policy(reference_frame="camera").eval()
    batch = make_batch()
    assert not [key for key in policy.observation_keys if "pose" in key]
    same = dict(batch)
    for camera in CAMERAS:
        del same[f"observation.pose.{camera}"]
        same[f"observation.images.{camera}"] = batch[f"observation.images.{camera}"].float() / 255
    for kind, picture in policy.pictures(batch, "front").items():
        torch.testing.assert_close(policy.pictures(same, "front")[kind], picture)
    z = policy.pictures(batch, "front")["xyz"][:, 2]
    torch.testing.assert_close(z, batch["observation.depth.front"][:, 0])


def test_raw_metres_by_default():
    policy = make_policy(valid_channel=False, xyz_encoder_options=SMALL).eval()
    batch = make_batch()
    points = policy.pictures(batch, "front")["xyz"]
    assert points.shape == (3, 3, HEIGHT, WIDTH)
    pose = batch["observation.pose.front"][:, 0]
    camera = (points.flatten(2).mT - pose[:, None, :3, 3]) @ pose[:, :3, :3]
    torch.testing.assert_close(camera[..., 2], batch["observation.depth.front"].reshape(3, -1))


@pytest.mark.parametrize("paired", [True, False])
def test_shift_moves_points_with_their_pixels(paired):
    policy = make_policy(shift={"front": 4}, paired_shift=paired, crops={"front": (2, 6, 20, 20)})
    batch = make_batch(batch=16)
    # Depth and colour carry the same pattern, so that they can be compared after the shift.
    pattern = batch["observation.images.front"][:, :, 0].float()
    batch["observation.depth.front"] = 1 + pattern / 255
    policy.eval()
    still = policy.pictures(batch, "front")
    policy.train()
    moved = policy.pictures(batch, "front")

    def depth(picture):
        pose = batch["observation.pose.front"][:, 0]
        return ((picture["xyz"][:, :3].flatten(2).mT - pose[:, None, :3, 3]) @ pose[:, :3, 2:])[..., 0]

    def red(picture):
        return 1 + (picture["rgb"][:, 0] * 0.229 + 0.485).flatten(1)

    torch.testing.assert_close(depth(still), red(still), atol=1e-4, rtol=0)
    assert not torch.equal(still["rgb"], moved["rgb"])
    agree = [torch.allclose(d, r, atol=1e-4) for d, r in zip(depth(moved), red(moved))]
    if paired:
        assert all(agree)
    else:
        torch.testing.assert_close(moved["xyz"], still["xyz"])
        assert not all(agree)
    # Each picture is the window at one whole-pixel offset of at most 4; beyond the image its edge repeats.
    full = torch.nn.functional.pad(pattern, (4, 4, 4, 4), mode="replicate")[:, 0]
    offsets = set()
    for image, row in zip(full, red(moved)):
        found = [
            (y, x)
            for y in range(9)
            for x in range(9)
            if torch.allclose(1 + image[2 + y : 22 + y, 6 + x : 26 + x].flatten() / 255, row, atol=1e-4)
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) > 8


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_without_depth_the_map_is_a_hole_and_nothing_breaks(value):
    policy = make_policy(workspace=((-1, -1, -1), (1, 1, 1)), point_center=(0.5, 0.5, 0.5))
    batch = make_batch()
    for camera in CAMERAS:
        batch[f"observation.depth.{camera}"].fill_(value)
        batch[f"observation.images.{camera}"].zero_()
    assert not policy.pictures(batch, "front")["xyz"].any()
    loss, _ = policy(batch)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters())
    blank = observation()
    for camera in CAMERAS:
        blank[f"observation.depth.{camera}"][:] = value
    assert policy.select_action(blank).isfinite().all()


def test_padded_actions_are_left_out_of_the_loss():
    batch = make_batch()
    batch["action_is_pad"][0, 4:] = True
    batch["action_is_pad"][2, 1:] = True
    changed = batch | {"action": batch["action"].clone()}
    changed["action"][batch["action_is_pad"]] += 0.5

    def loss(policy, data):
        torch.manual_seed(3)
        return policy(data)[0]

    policy = make_policy(noise_draws=2)
    torch.testing.assert_close(loss(policy, batch), loss(policy, changed))
    policy = make_policy(loss_on_padding=True)
    assert (loss(policy, batch) - loss(policy, changed)).abs() > 1e-3


def test_noise_draws_share_one_encoding():
    policy = make_policy(noise_draws=4)
    counts = []
    policy.encoders["front_rgb"].register_forward_hook(lambda module, args, out: counts.append(len(out)))
    policy.denoiser.register_forward_hook(lambda module, args, out: counts.append(len(out)))
    policy(make_batch())
    assert counts == [3, 12]


def test_dtypes_of_a_batch_do_not_matter():
    """Data sets and simulators hand out float64, half precision and integers; values decide, not types."""
    policy = make_policy().eval()
    batch = make_batch()
    batch["action_is_pad"][:, 4:] = True
    halves = {key: v.half().float() if "depth" in key else v for key, v in batch.items() if key != "task"}
    batch |= {k: v.float() / 255 if "images" in k else v for k, v in halves.items()}

    def loss(changed):
        torch.manual_seed(3)
        return policy(batch | changed)[0].item()

    wanted = loss({})
    for part, kinds in {
        "images": (torch.float64,),
        "depth": (torch.float64, torch.float16),
        "intrinsics": (torch.float64,),
        "pose": (torch.float64,),
        "state": (torch.float64,),
        "action": (torch.float64,),
        "action_is_pad": (torch.uint8, torch.float32),
    }.items():
        keys = [key for key in batch if key == part or f"observation.{part}" in key]
        for kind in kinds:
            assert loss({key: batch[key].to(kind) for key in keys}) == wanted, (part, kind)
    whole = {key: (255 * v).round() for key, v in batch.items() if "images" in key}
    assert loss({k: v.to(torch.uint8) for k, v in whole.items()}) == pytest.approx(wanted, rel=1e-6)
    assert loss({k: v.to(torch.int64) for k, v in whole.items()}) == pytest.approx(wanted, rel=1e-6)


def test_bfloat16_autocast():
    policy = make_policy()
    torch.manual_seed(0)
    full, _ = policy(make_batch())
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _ = policy(make_batch())
    half.backward()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert policy.select_action(observation()).isfinite().all()


def test_save_and_load_give_the_same_actions_bit_for_bit(tmp_path):
    policy = make_policy(shift={"front": 3}, gripper_index=(6,))
    for name in ("a", "b"):
        policy.save_pretrained(tmp_path / name)
        loaded = PointMapPolicy.from_pretrained(tmp_path / name)
        assert loaded.config == policy.config
        for model in (policy, loaded):
            model.seed(4)
        for step in range(7):
            seen = observation(seed=step)
            assert torch.equal(policy.select_action(seen), loaded.select_action(seen))
        policy = loaded
    assert type(load_policy(tmp_path / "a")) is PointMapPolicy


def test_actions_are_in_the_data_s_units():
    stats = statistics()
    stats["action"]["min"] = [9.0] * 6 + [-1.0]
    stats["action"]["max"] = [11.0] * 5 + [9.0, 1.0]
    policy = PointMapPolicy.from_config(config(gripper_index=(6,)), stats)
    torch.nn.init.zeros_(policy.denoiser.head.weight)
    actions = policy.select_action(observation())
    assert (actions[:, :5] - 10).abs().max() < 0.5
    assert (actions[:, 5] == 9).all()  # constant in the data
    assert set(actions[:, 6].tolist()) <= {-1.0, 1.0}


def test_seeds():
    policy = make_policy()

    def rollout(seed):
        policy.seed(seed)
        return policy.select_action(observation())

    assert torch.equal(rollout(1), rollout(1))
    assert not torch.equal(rollout(1), rollout(2))


def test_copies_are_independent():
    policy = make_policy()
    policy.select_action(observation())
    other = copy.deepcopy(policy)
    other.reset()
    assert policy.needs_observation(3) == [False] * 3
    assert other.needs_observation(3) == [True] * 3


def test_observations_that_do_not_fit():
    policy = make_policy(image_size={"front": (HEIGHT, WIDTH)}, crops={"wrist": (4, 4, 20, 20)})
    seen = observation()
    depth = seen["observation.depth.front"]
    for change, message in (
        (
            {"observation.images.wrist": None},
            "lacks observation.images.wrist; it has observation.depth.front",
        ),
        ({"observation.depth.front": depth[:, ::2]}, r"camera 'front' must share one view"),
        ({"observation.depth.front": depth[..., None]}, r"depth.front has shape .* wanted \(B, H, W\)"),
        (
            {"observation.images.wrist": seen["observation.images.wrist"].transpose(0, 2, 3, 1)},
            "images.wrist must",
        ),
        ({"observation.state": np.zeros((3, 4))}, r"state must have shape \(3, 1, 5\), got \(3, 1, 4\)"),
        ({"task": ["lift", "", "lift"]}, "task text must contain at least one word, got ''"),
    ):
        broken = {key: value for key, value in (seen | change).items() if value is not None}
        policy.reset()
        with pytest.raises(ValueError, match=message):
            policy.select_action(broken)
    small = dict(seen)
    for kind in ("images", "depth"):
        small[f"observation.{kind}.front"] = seen[f"observation.{kind}.front"][..., ::2]
    policy.reset()
    with pytest.raises(ValueError, match=r"front is \(24, 16\), the policy was made for \(24, 32\)"):
        policy.select_action(small)
    for kind in ("images", "depth"):
        seen[f"observation.{kind}.wrist"] = seen[f"observation.{kind}.wrist"][..., :20, :]
    policy.reset()
    with pytest.raises(
        ValueError, match=r"crop \(4, 4, 20, 20\) of camera 'wrist' leaves observation.images.wrist"
    ):
        policy.select_action(seen)


def test_batches_that_do_not_fit():
    policy = make_policy()
    batch = make_batch()
    for change, message in (
        ({"action": batch["action"][:, :5]}, r"action must have shape \(3, 6, 7\), got \(3, 5, 7\)"),
        ({"action": batch["action"][:2]}, r"action must have shape \(3, 6, 7\), got \(2, 6, 7\)"),
        ({"action_is_pad": torch.zeros(3, 5, dtype=torch.bool)}, r"action_is_pad must have shape \(3, 6\)"),
        ({"task": "lift"}, "task must be a list of B strings, got 'lift'"),
        ({"task": []}, r"task must be a list of B strings, got \[\]"),
        ({"observation.depth.wrist": np.ones((3, 1, 24, 32))}, r"depth\.wrist must be a tensor .*ndarray"),
        ({"observation.state": None}, r"observation\.state must be a tensor .* got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            policy(batch | change)
    for key in ("observation.intrinsics.front", "observation.pose.wrist"):
        for wrong in (batch[key][:, 0], batch[key][0, 0], batch[key][:1], batch[key][..., :2, :]):
            with pytest.raises(ValueError, match=rf"{key} must have shape \(3, 1, \d, \d\), got"):
                policy(batch | {key: wrong})
    with pytest.raises(ValueError, match="the batch lacks action; it has action_is_pad"):
        policy({key: value for key, value in batch.items() if key != "action"})
    with pytest.raises(ValueError, match="no statistics for action"):
        make_policy(stats=False)(batch)
    with pytest.raises(ValueError, match=r"statistics lack 'observation.state'; they have action"):
        PointMapPolicy.from_config(config(), {"action": statistics()["action"]})
    with pytest.raises(ValueError, match="mean of action must hold 7 values"):
        PointMapPolicy.from_config(config(), statistics(action_dim=6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": "rgbd"}, "modality must be one of rgb, depth, xyz, 6ch, add, .*; got 'rgbd'"),
        ({"cameras": (), "use_state": False}, "at least one camera"),
        ({"cameras": ("a.b",)}, "letters, digits and underscores; got 'a.b'"),
        ({"crops": {"side": (0, 0, 4, 4)}}, "crops names side; the cameras are front, wrist"),
        ({"execute": 7}, r"execute \(7\) must not exceed the horizon \(6\)"),
        ({"state_dim": 0}, "use_state needs state_dim"),
        ({"gripper_index": (7,)}, r"gripper_index \[7\] leaves the 7 action dimensions"),
        ({"sigma_min": 100.0}, "0 < sigma_min < sigma_max"),
        ({"point_scale": (1.0, 0.0, 1.0)}, "point_scale must be positive"),
        ({"reference_frame": "table"}, "reference_frame must be one of world, base, camera"),
        ({"sampling_steps": 0}, "sampling_steps must be at least 1"),
        ({"shift": {"front": -1}}, "cannot be negative"),
        ({"resize": {"side": (8, 8)}}, "resize names side; the cameras are front, wrist"),
        ({"workspace": ((0, 0, 1), (1, 1, 1))}, "every minimum of workspace must be below its maximum"),
        ({"modality_dropout": 1.0}, r"modality_dropout must lie in \[0, 1\)"),
        ({"modality": "rgb", "modality_dropout": 0.1}, "needs two modalities, 'rgb' has one"),
        ({"rgb_weights": "w.safetensors"}, "rgb_pretrained is false"),
        ({"head": "ddim", "sampling_steps": 200}, r"must not exceed diffusion_steps \(100\)"),
        ({"depth_scale": 0.0}, "depth_scale must be positive"),
        ({"head": "vae"}, "head must be one of edm, ddpm, ddim, flow, regression"),
        ({"backbone": "mamba"}, "backbone must be one of xlstm, bixlstm, transformer"),
    ],
)
def test_impossible_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_encoders_of_different_width_need_a_common_one():
    with pytest.raises(ValueError, match=r"different widths \[24, 32\]: set encoder_features"):
        make_policy(rgb_encoder_options=SMALL | {"features": 24})


def test_depth_sees_scaled_metres_and_needs_no_camera():
    policy = make_policy(modality="depth", depth_range=(0.4, 1.2), depth_center=0.8, depth_scale=0.2).eval()
    assert {key.split(".")[1] for key in policy.observation_keys} == {"depth", "state"}
    batch = make_batch()
    depth = batch["observation.depth.front"][:, 0]
    picture = policy.pictures(batch, "front")["depth"]
    valid = (depth > 0.4) & (depth < 1.2)
    torch.testing.assert_close(picture[:, 0], torch.where(valid, (depth - 0.8) / 0.2, 0))
    assert torch.equal(picture[:, 1], valid.float())
    bare = make_policy(modality="depth", valid_channel=False).eval()
    assert bare.pictures(batch, "front")["depth"].shape == (3, 1, HEIGHT, WIDTH)


def test_six_channels_are_points_and_colours_of_the_same_pixels():
    batch = make_batch()
    both = make_policy(modality="6ch", crops={"wrist": (2, 4, 16, 20)}).eval().pictures(batch, "wrist")
    apart = make_policy(crops={"wrist": (2, 4, 16, 20)}).eval().pictures(batch, "wrist")
    assert torch.equal(both["xyzrgb"], torch.cat([apart["xyz"], apart["rgb"]], 1))
    assert both["xyzrgb"].shape[1] == 7


def test_resize_keeps_measured_points():
    """Points by nearest pixel after unprojection, colours antialiased; then the shift, in the new pixels."""
    policy = make_policy(resize={"front": (36, 16)}, crops={"front": (0, 0, 24, 28)}).eval()
    batch = make_batch()
    got, plain = policy.pictures(batch, "front"), make_policy().eval().pictures(batch, "front")
    rows, columns = torch.arange(36) * 24 // 36, torch.arange(16) * 28 // 16
    torch.testing.assert_close(got["xyz"], plain["xyz"][:, :, rows][:, :, :, columns], atol=1e-5, rtol=1e-5)
    wanted = torch.nn.functional.interpolate(
        plain["rgb"][..., :28], (36, 16), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(got["rgb"], wanted, atol=1e-5, rtol=1e-4)
    moving = make_policy(resize={"front": (36, 16)}, shift={"front": 3}, paired_shift=False).train()
    assert moving.pictures(batch, "front")["rgb"].shape == (3, 3, 36, 16)
    full = make_policy(resize={"front": (36, 16)}).eval().pictures(batch, "front")
    torch.testing.assert_close(moving.pictures(batch, "front")["xyz"], full["xyz"])


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_policy_trained_with_augmentation_acts_on_its_own_keys(modality):
    """A simulator renders only what `observation_keys` names: depth alone comes without its camera."""
    augment = AugmentConfig(shift=2, crop=(20, 20), brightness=0.2, camera_translation=0.02)
    policy = make_policy(modality=modality, augment=augment).train()
    policy(make_batch())[0].backward()
    keys = (*policy.observation_keys, "task")
    assert policy.select_action({key: observation()[key] for key in keys}).shape == (3, 7)


def test_augmentation_reaches_pictures_and_points_in_training_only():
    still_state = {"frame_state": {}, "frame_action": {}}
    policy = make_policy(augment=AugmentConfig(frame_translation=0.1, brightness=0.3), **still_state)
    batch = make_batch()
    still = policy.eval().pictures(batch, "front")
    torch.testing.assert_close(still["xyz"], make_policy().eval().pictures(batch, "front")["xyz"])
    moved = policy.train().pictures(batch, "front")
    offset = (moved["xyz"] - still["xyz"])[:, :3]
    assert offset.abs().max() > 1e-3
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-5, rtol=0)
    assert not torch.equal(moved["rgb"], still["rgb"])
    policy(batch)[0].backward()
    for modality in ("rgb", "depth", "dp3"):
        make_policy(modality=modality, augment=AugmentConfig(camera_translation=0.02)).train()(batch)
    del batch["observation.depth.front"]
    policy = make_policy(modality="rgb", augment=AugmentConfig(camera_translation=0.02))
    assert policy.select_action(observation()).isfinite().all()
    with pytest.raises(ValueError, match=r"lacks observation.depth.front, which augmentation needs"):
        policy.train()(batch)


def test_frame_jitter_moves_what_is_written_in_the_frame():
    """Points, state and action of a sample by one motion, and nothing else; in training only."""
    augment = AugmentConfig(frame_translation=0.1, frame_rotation=20, frame_pivot=(0.3, 0.1, 0.2))
    policy = make_policy(
        augment=augment, frame_state={"position": (1,)}, frame_action={"vector": (0, 3)}, obs_horizon=2
    )
    for normalizer in (policy.action_normalizer, policy.state_normalizer):
        normalizer.set_statistics(
            {"mean": [0.0] * normalizer.dim, "std": [1.0] * normalizer.dim}
            | {"min": [-1.0] * normalizer.dim, "max": [1.0] * normalizer.dim}
        )
    batch = make_batch(steps=2) | {"seed": torch.tensor([5, 6, 7])}
    seen, states, actions = [], [], []
    policy.encoders["front_xyz"].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    policy.state_proj.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    policy.head.loss = lambda net, action, mask: actions.append(action) or action.sum()
    for training in (False, True, True):
        policy.train(training)(batch)
    batch["seed"] = batch["seed"] + 1
    policy(batch)
    motion = frame_jitter(augment, torch.tensor([5, 6, 7]))
    rotation, offset = motion[:, :3, :3], motion[:, :3, 3]

    def turned(x):
        return torch.einsum("bij,b...j->b...i", rotation, x)

    points = seen[0][:, :3].unflatten(0, (3, 2)).movedim(2, -1)
    moved = seen[1][:, :3].unflatten(0, (3, 2)).movedim(2, -1)
    torch.testing.assert_close(moved, turned(points) + offset[:, None, None, None], atol=1e-5, rtol=0)
    before, after = (s.view(3, 2, 5) for s in states[:2])
    torch.testing.assert_close(after[..., 1:4], turned(before[..., 1:4]) + offset[:, None])
    assert torch.equal(after[..., [0, 4]], before[..., [0, 4]])
    for part in (slice(0, 3), slice(3, 6)):
        torch.testing.assert_close(actions[1][..., part], turned(actions[0][..., part]))
    assert torch.equal(actions[1][..., 6], actions[0][..., 6])
    assert torch.equal(actions[2], actions[1]) and not torch.allclose(actions[3], actions[1], atol=1e-3)


def test_frame_jitter_is_refused_where_it_would_tear_points_and_actions_apart():
    augment = AugmentConfig(frame_rotation=3.0)
    with pytest.raises(ValueError, match=r"say with frame_action and frame_state which .*\{\} for none"):
        config(augment=augment)
    with pytest.raises(ValueError, match="say with frame_state which"):
        config(augment=augment, frame_action={"vector": (0,)})
    with pytest.raises(ValueError, match="frame_action: the vector at 5"):
        config(frame_action={"vector": (5,)})
    config(augment=augment, frame_action={}, use_state=False)
    for changes in ({"modality": "rgb"}, {"modality": "depth"}, {"reference_frame": "camera"}):
        with pytest.raises(ValueError, match="has none: set them to 0"):
            config(augment=augment, frame_action={}, frame_state={}, **changes)


def test_a_moved_camera_sees_points_in_its_own_frame():
    """Without poses there is no other frame: the third coordinate stays the depth along the new axis."""
    augment = AugmentConfig(camera_translation=0.05, camera_rotation=8)
    policy = make_policy(reference_frame="camera", augment=augment, depth_range=None).train()
    batch = make_batch()
    for camera in CAMERAS:
        batch[f"observation.depth.{camera}"].fill_(0.5)
    seen = policy.pictures(batch, "front")["xyz"]
    intrinsics = batch["observation.intrinsics.front"][0, 0]
    column = torch.arange(WIDTH) + 0.5
    wanted = (column - intrinsics[0, 2]) / intrinsics[0, 0] * seen[:, 2]
    torch.testing.assert_close(seen[:, 0], wanted, atol=1e-5, rtol=0)
    assert (seen[:, 2] - 0.5).abs().max() > 1e-3


def test_nothing_is_drawn_in_evaluation():
    policy = make_policy(augment=AugmentConfig(crop=(20, 20), shift=2, hue=0.1), modality_dropout=0.2).eval()
    batch, state = make_batch(), torch.get_rng_state()
    goal = policy.text(batch["task"])
    assert torch.equal(policy.context(batch, goal), policy.context(batch, goal))
    assert torch.equal(torch.get_rng_state(), state)


def test_local_tokens_are_counted():
    policy = make_policy(
        rgb_encoder="film_resnet18",
        rgb_encoder_options={"local_tokens": True},
        encoder_features=40,
        image_size=dict.fromkeys(CAMERAS, (HEIGHT, WIDTH)),
    )
    assert policy.denoiser.num_obs_tokens == 2 * (1 + 1 * 1 + 1) + 1
    assert policy.train()(make_batch())[0].isfinite()
    with pytest.raises(ValueError, match="local tokens need the size of the pictures of front"):
        make_policy(rgb_encoder="resnet18", rgb_encoder_options={"local_tokens": True}, encoder_features=40)
