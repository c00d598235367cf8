"""Augmentation by physics: points keep their colours, planes stay planes, what was hidden becomes a hole."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vilma import config as configuration
from vilma.pointmap import AugmentConfig, Camera, PointMap, View
from vilma.pointmap.augment import (
    _mixed,
    _signed,
    _uniform,
    augment_view,
    frame_jitter,
    random_seeds,
    random_shift,
    random_shift_rgbd,
    sample_seeds,
)
from vilma.pointmap.camera import compose, opencv_from_opengl
from vilma.pointmap.repose import repose

from .test_camera import SIZE, skewed
from .test_point_map import looking_down, plane_depth


def test_shift_is_a_crop_of_the_padded_image():
    images = torch.randint(0, 255, (16, 2, 3, 12, 15), dtype=torch.uint8)
    out = random_shift(images, 3, torch.Generator().manual_seed(0))
    assert out.dtype == images.dtype and out.shape == images.shape
    padded = (
        F.pad(images.flatten(1, 2).float(), (3, 3, 3, 3), mode="replicate")
        .to(torch.uint8)
        .view(16, 2, 3, 18, 21)
    )
    seen = set()
    for before, after in zip(padded, out, strict=True):
        matches = [
            (v, u)
            for v in range(7)
            for u in range(7)
            if torch.equal(before[..., v : v + 12, u : u + 15], after)
        ]
        assert len(matches) == 1, "each sample moves as one, time steps included"
        seen.update(matches)
    assert len(seen) > 8
    assert torch.equal(out, random_shift(images, 3, torch.Generator().manual_seed(0)))
    assert torch.equal(random_shift(images, 0), images)


def test_shifts_are_even_over_their_range():
    column = torch.arange(9.0).view(1, 1, 1, 9).expand(4000, 1, 9, 9)
    moved = random_shift(column, 2, torch.Generator().manual_seed(0))[:, 0, 0, 4] - 4
    counts = torch.stack([(moved == k).sum() for k in range(-2, 3)])
    assert counts.sum() == 4000 and (counts - 800).abs().max() < 120, "five standard deviations"


def test_paired_shift_keeps_every_point_with_its_color():
    size, samples = (14, 18), 12
    generator = torch.Generator().manual_seed(1)
    depth = torch.rand(samples, 2, *size, generator=generator, dtype=torch.float64) + 0.5
    fovs = torch.linspace(30, 80, samples * 2).view(samples, 2)
    camera = Camera.from_fov(fovs, size, dtype=torch.float64)
    # Colour each pixel with its own point: after the shift, colour and point must still agree.
    images = PointMap.from_depth(depth, camera).to_image()
    moved, moved_depth, intrinsics = random_shift_rgbd(images, depth, camera.intrinsics, 4, generator)
    seen = PointMap.from_depth(moved_depth, Camera(intrinsics, camera.pose, size))
    assert 0.5 < seen.valid.double().mean() < 1
    torch.testing.assert_close(seen.points[seen.valid], moved.movedim(2, -1)[seen.valid])
    assert not torch.equal(intrinsics, camera.intrinsics)


def points_as_colors(samples=6, steps=2, size=(20, 26)):
    """A view whose colour is the point itself, so that any broken pairing shows."""
    depth = torch.rand(samples, steps, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    depth = torch.where(depth < 0.1, 0, depth + 0.5)
    camera = Camera.from_fov(
        50.0, size, looking_down().pose.expand(samples, steps, 4, 4), dtype=torch.float64
    )
    return View(PointMap.from_depth(depth, camera).to_image(), depth, camera, "top")


def disagreement(view):
    """Metres between colours and points of a view, worst over the valid pixels; the share that is valid."""
    seen = PointMap.from_depth(view.depth, view.camera)
    apart = (seen.points - view.rgb.movedim(-3, -1)).abs().amax(-1)
    return float(apart[seen.valid].max()), float(seen.valid.double().mean())


@pytest.mark.parametrize(
    "options", [{"shift": 3}, {"crop": (11, 9)}, {"shift": 2, "crop": (15, 20)}, {"camera_shift": {"top": 5}}]
)
def test_points_and_colors_move_together_unless_faithful(options):
    view, seeds = points_as_colors(), sample_seeds(0, torch.arange(6))
    before = disagreement(view)[1]
    out = augment_view(view, AugmentConfig(**options), seeds)
    apart, valid = disagreement(out)
    assert apart < 1e-12 and 0.4 < valid <= before + 0.1
    assert out.rgb.shape[-2:] == out.camera.size == options.get("crop", (20, 26))
    assert not torch.equal(out.camera.intrinsics[0], out.camera.intrinsics[1])
    unpaired = augment_view(view, AugmentConfig(**options, faithful=True), seeds)
    if "crop" not in options:
        assert torch.equal(unpaired.depth, view.depth), "the paper shifts pictures alone"
        assert torch.equal(unpaired.camera.intrinsics, view.camera.intrinsics)
        assert torch.equal(unpaired.rgb, out.rgb)
    if options != {"crop": (11, 9)}:
        assert disagreement(unpaired)[0] > 0.05


def test_shift_by_camera_name():
    view, seeds = points_as_colors(), sample_seeds(0, torch.arange(6))
    config = AugmentConfig(shift=3, camera_shift={"wrist": 0})
    assert torch.equal(augment_view(replace(view, name="wrist"), config, seeds).rgb, view.rgb)
    assert not torch.equal(augment_view(view, config, seeds).rgb, view.rgb)
    other = augment_view(replace(view, name="side"), config, seeds)
    assert not torch.equal(augment_view(view, config, seeds).rgb, other.rgb), "cameras draw apart"


def test_evaluation_takes_the_middle_and_nothing_else():
    view, seeds = points_as_colors(), random_seeds(6)
    config = AugmentConfig(
        shift=3, crop=(10, 12), brightness=0.5, hue=0.2, camera_translation=0.1, frame_rotation=9
    )
    out = augment_view(view, config, seeds, training=False)
    assert torch.equal(out.rgb, view.rgb[..., 5:15, 7:19]) and torch.equal(
        out.depth, view.depth[..., 5:15, 7:19]
    )
    assert disagreement(out)[0] < 1e-12
    assert torch.equal(augment_view(view, AugmentConfig(), seeds).rgb, view.rgb)


EVERYTHING = AugmentConfig(
    shift=2,
    crop=(16, 20),
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.1,
    frame_translation=0.02,
    frame_rotation=5,
    camera_translation=0.05,
    camera_rotation=5,
    repose_probability=0.7,
)


def test_a_sample_does_not_depend_on_its_neighbours():
    view = points_as_colors()
    view = replace(view, rgb=view.rgb.clamp(0, 1).float(), depth=view.depth.float())
    seeds = sample_seeds(7, 3, torch.arange(6))
    whole = augment_view(view, EVERYTHING, seeds)
    for k in (0, 4):
        one = View(view.rgb[k : k + 1], view.depth[k : k + 1], _part(view.camera, k), "top")
        one = augment_view(one, EVERYTHING, seeds[k : k + 1])
        assert torch.equal(one.rgb[0], whole.rgb[k]) and torch.equal(one.depth[0], whole.depth[k])
        assert torch.equal(one.camera.pose[0], whole.camera.pose[k])
    again = augment_view(view, EVERYTHING, seeds)
    assert torch.equal(again.rgb, whole.rgb) and torch.equal(again.depth, whole.depth)
    other = augment_view(view, EVERYTHING, sample_seeds(7, 4, torch.arange(6)))
    assert not torch.equal(other.rgb, whole.rgb)


def _part(camera, k):
    return Camera(camera.intrinsics, camera.pose[k : k + 1], camera.size)


def test_the_random_numbers_are_even_and_unrelated():
    seeds = sample_seeds(0, torch.arange(20000))
    assert len(seeds.unique()) == 20000 and (seeds >= 0).all()
    drawn = torch.cat([_uniform(seeds, "a", 2), _uniform(seeds, "b", 2)], 1).double()
    assert drawn.min() >= 0 and drawn.max() < 1
    torch.testing.assert_close(drawn.mean(0), torch.full((4,), 0.5).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(drawn.var(0), torch.full((4,), 1 / 12).double(), atol=0.003, rtol=0)
    both = torch.cat([drawn, drawn.roll(1, 0)], 1)
    assert (torch.corrcoef(both.T) - torch.eye(8)).abs().max() < 0.03
    assert not torch.equal(sample_seeds(0, 1, torch.arange(4)), sample_seeds(1, 0, torch.arange(4)))


def test_the_hash_is_splitmix64():
    """The first three numbers of SplitMix64 from seed 0, as published with its reference code."""
    golden = 0x9E3779B97F4A7C15
    states = torch.tensor([_signed(k * golden % 2**64) for k in range(3)])
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [n % 2**64 for n in _mixed(states).tolist()] == expected


def test_color_jitter_is_torchvisions():
    functional = pytest.importorskip("torchvision.transforms.functional")
    rgb = torch.rand(5, 2, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    seeds = sample_seeds(0, torch.arange(5))
    drawn = 2 * _uniform(seeds, "color", 4) - 1
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        out = augment_view(View(rgb), AugmentConfig(**{name: 0.4}), seeds).rgb
        adjust = getattr(functional, f"adjust_{name}")
        for sample in range(5):
            factor = float(0.4 * drawn[sample, k] + (name != "hue"))
            for step in range(2):
                torch.testing.assert_close(
                    out[sample, step], adjust(rgb[sample, step], factor), atol=2e-6, rtol=0
                )
    whole = augment_view(View((rgb * 255).byte()), AugmentConfig(brightness=0.4), seeds).rgb
    assert whole.dtype == torch.uint8 and (whole != (rgb * 255).byte()).any()
    gray = torch.full((5, 3, 4, 4), 0.4)
    assert torch.equal(augment_view(View(gray), AugmentConfig(hue=0.5), seeds).rgb, gray)


def test_color_jitter_leaves_the_geometry():
    view, seeds = points_as_colors(), random_seeds(6)
    view = replace(view, rgb=view.rgb.clamp(0, 1))
    out = augment_view(view, AugmentConfig(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.3), seeds)
    assert out.depth is view.depth and out.camera is view.camera and not torch.equal(out.rgb, view.rgb)


def test_frame_jitter_moves_all_cameras_rigidly_and_alike():
    view, seeds = points_as_colors(), sample_seeds(3, torch.arange(6))
    config = AugmentConfig(frame_translation=0.05, frame_rotation=8, frame_pivot=(0.2, -0.1, 0.8))
    transform = frame_jitter(config, seeds).double()
    torch.testing.assert_close(
        compose(transform, transform.inverse()), torch.eye(4).double().expand(6, 4, 4), atol=1e-6, rtol=0
    )
    pivot = torch.tensor([0.2, -0.1, 0.8, 1]).double()
    moved = ((transform @ pivot) - pivot)[:, :3].norm(dim=-1)
    assert (moved <= 0.05 + 1e-6).all() and moved.max() > 0.02, "the pivot only translates"
    angle = torch.rad2deg(((transform[:, :3, :3].diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2).acos())
    assert (angle <= 8.001).all() and angle.max() > 3
    for name in ("top", "wrist"):
        out = augment_view(replace(view, name=name), config, seeds)
        assert torch.equal(out.depth, view.depth) and torch.equal(out.rgb, view.rgb)
        expected = PointMap.from_depth(view.depth, view.camera).to_frame(transform[:, None])
        actual = PointMap.from_depth(out.depth, out.camera)
        torch.testing.assert_close(actual.points, expected.points, atol=1e-6, rtol=0)


def test_frame_axes_keep_the_heights():
    config = AugmentConfig(frame_translation=0.05, frame_axes=(1, 0.5, 0))
    seeds = sample_seeds(3, torch.arange(200))
    free = frame_jitter(replace(config, frame_axes=(1, 1, 1)), seeds)[:, :3, 3]
    moved = frame_jitter(config, seeds)[:, :3, 3]
    torch.testing.assert_close(moved, free * torch.tensor([1, 0.5, 0]))
    assert (
        free[:, 2].abs().max() > 0.03
        and not AugmentConfig(frame_translation=1, frame_axes=(0, 0, 0)).moves_frame
    )


def test_identity_repose_changes_nothing():
    view = points_as_colors()
    rgb, depth, camera = repose(view.rgb, view.depth, view.camera, view.camera.pose)
    torch.testing.assert_close(depth, view.depth, atol=1e-9, rtol=0)
    seen = view.depth > 0
    torch.testing.assert_close(rgb.movedim(-3, -1)[seen], view.rgb.movedim(-3, -1)[seen], atol=1e-6, rtol=0)
    assert camera.size == view.camera.size


def moved_pose(pose, seed=0, metres=0.1, degrees=8):
    config = AugmentConfig(frame_translation=metres, frame_rotation=degrees)
    motion = frame_jitter(config, sample_seeds(seed, torch.arange(1)))[0].to(pose)
    u, _, v = torch.linalg.svd(motion[:3, :3])  # rigid in float64, too
    motion[:3, :3] = u @ v
    return compose(pose, motion)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("make", [looking_down, skewed])
def test_a_plane_stays_a_plane(seed, make):
    camera = make()
    # In front of any camera: a plane facing it, tilted by about 35 degrees.
    normal = camera.pose[:3, :3] @ torch.tensor([0.5, 0.3, 1.0]).double()
    point = camera.pose[:3, 3] + camera.pose[:3, 2] * 0.9
    rays = camera.rays() @ camera.pose[:3, :3].T
    depth = ((point - camera.pose[:3, 3]) * normal).sum() / (rays * normal).sum(-1)
    assert (depth > 0.2).all()
    depth[5:9, 7:12] = 0
    colors = PointMap.from_depth(depth.clamp_min(0.3), camera).to_image()
    rgb, new_depth, new_camera = repose(colors, depth, camera, moved_pose(camera.pose, seed))
    seen = PointMap.from_depth(new_depth, new_camera)
    assert 0.5 < seen.valid.double().mean() < 1
    off = ((seen.points - point) * normal).sum(-1)[seen.valid] / normal.norm()
    assert off.abs().max() < 1e-9, "metres off the plane"
    # The colour is the point: bilinear sampling of a perspective picture is good to its curvature.
    apart = (rgb.movedim(0, -1) - seen.points).norm(dim=-1)[seen.valid]
    assert apart.median() < 1e-3 and apart.quantile(0.9) < 5e-3
    # The hole moves with what surrounds it, and nothing is invented inside.
    u, v = camera.project(seen.points)[0].unbind(-1)
    assert not ((v > 5.9) & (v < 7.1) & (u > 7.9) & (u < 10.1) & seen.valid).any()


def ray_cast(camera, box):
    """Depth of a box on the plane z = 0, seen by any camera: slab test in the world frame."""
    origin, rays = camera.pose[:3, 3], camera.rays() @ camera.pose[:3, :3].T
    table = -origin[2] / rays[..., 2]
    low, high = ((corner - origin) / rays for corner in box)
    enter, leave = torch.minimum(low, high).amax(-1), torch.maximum(low, high).amin(-1)
    return torch.where((enter < leave) & (enter > 0) & (enter < table), enter, table)


def test_a_box_is_seen_as_a_ray_caster_sees_it():
    size = (60, 80)
    box = torch.tensor([[-0.1, -0.12, 0.0], [0.08, 0.05, 0.5]]).double()
    camera = Camera.from_fov(50.0, size, looking_down().pose, dtype=torch.float64)
    depth = ray_cast(camera, box)
    pose = moved_pose(camera.pose, 4, 0.15, 6)
    _, new_depth, new_camera = repose(None, depth, camera, pose)
    truth = ray_cast(new_camera, box)
    seen = new_depth > 0
    assert seen.double().mean() > 0.6
    good = (new_depth - truth).abs() < 1e-6
    # A pixel on a silhouette may show either side of it.
    assert good[seen].double().mean() > 0.97
    # Where the source saw the true point (not hidden, inside the picture), there must be a reading.
    points = PointMap.from_depth(truth, new_camera).points
    uv, z = camera.project(points)
    u, v = uv.round().long().unbind(-1)
    inside = (u >= 1) & (u < size[1] - 1) & (v >= 1) & (v < size[0] - 1)
    saw = inside & ((depth[v.clamp(0, 59), u.clamp(0, 79)] - z).abs() < 0.01)
    assert seen[saw].double().mean() > 0.98
    hidden = inside & (z - depth[v.clamp(0, 59), u.clamp(0, 79)] > 0.03)
    assert hidden.sum() > 40 and seen[hidden].double().mean() < 0.35, "what was hidden is a hole"


def test_a_simulator_renders_what_reposing_predicts():
    """Picture and depth of one MuJoCo camera, re-posed, against MuJoCo's own rendering from there."""
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401  before mujoco's OpenGL, see test_camera
    mujoco = pytest.importorskip("mujoco")
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><statistic extent="1"/>
        <visual><quality offsamples="0" shadowsize="0"/><map znear="0.05" zfar="20"/></visual>
        <asset><texture name="t" type="2d" builtin="gradient" rgb1=".9 .2 .1" rgb2=".1 .3 .9" width="64"
        height="64"/><material name="m" texture="t" specular="0" texrepeat="1 1"/></asset>
        <worldbody><light pos="0 0 3" dir="0 0 -1" directional="true" castshadow="false" specular="0 0 0"/>
        <geom type="box" size="2 2 .1" pos="0 0 -.1" material="m"/>
        <geom type="box" size=".12 .1 .2" pos=".05 -.05 .2" euler="0 0 30" rgba=".2 .8 .3 1"/>
        <geom type="sphere" size=".1" pos="-.2 .25 .1" rgba=".8 .8 .2 1"/>
        <body name="rig" mocap="true"><camera name="eye" fovy="50"/></body></worldbody></mujoco>"""
    )
    data = mujoco.MjData(model)
    size = (96, 128)
    back = np.array([0.55, 0.1, 0.8]) / np.linalg.norm([0.55, 0.1, 0.8])
    right = np.cross([0, 0, 1], back) / np.linalg.norm(np.cross([0, 0, 1], back))
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.from_numpy(np.stack([right, -np.cross(back, right), -back], -1))
    pose[:3, 3] = torch.from_numpy(back * 1.2)
    there = moved_pose(pose, 4, 0.1, 8)
    try:
        renderer = mujoco.Renderer(model, *size)
    except Exception as error:  # no OpenGL raises whatever the platform raises
        pytest.skip(f"no OpenGL: {error}")
    shots = []
    with renderer:
        for one in (pose, there):
            gl = opencv_from_opengl(one)
            data.mocap_pos[0] = gl[:3, 3]
            mujoco.mju_mat2Quat(data.mocap_quat[0], gl[:3, :3].reshape(9).numpy().copy())
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, "eye")
            rgb = torch.from_numpy(renderer.render().copy()).movedim(-1, 0)
            renderer.enable_depth_rendering()
            shots.append((rgb, torch.from_numpy(renderer.render().copy())))
            renderer.disable_depth_rendering()
    camera = Camera.from_fov(50.0, size, pose)
    rgb, depth, _ = repose(*shots[0], camera, there)
    true_rgb, true_depth = shots[1]
    seen = depth > 0
    assert 0.6 < seen.double().mean() < 0.98
    assert ((depth - true_depth).abs() < 2e-3)[seen].double().mean() > 0.97
    apart = (rgb.float() - true_rgb.float()).abs().amax(0)
    still = (shots[0][0].float() - true_rgb.float()).abs().amax(0)
    assert apart[seen].quantile(0.95) < 12 < still[seen].quantile(0.95), "levels of 255"


def test_pictures_without_depth_and_half_precision():
    camera = Camera.from_fov(50.0, SIZE)
    rgb = torch.randint(0, 255, (3, *SIZE), dtype=torch.uint8)
    out, depth, _ = repose(rgb, torch.zeros(SIZE), camera, moved_pose(camera.pose, 1, 0.02, 2))
    assert out.dtype == torch.uint8 and (depth == 0).all() and out.float().std() > 20
    out, depth, _ = repose(rgb, torch.ones(SIZE).half(), camera, moved_pose(camera.pose, 1, 0.02, 2))
    assert depth.dtype == torch.float32 and (depth > 0).double().mean() > 0.8
    nothing = torch.full(SIZE, torch.nan)
    nothing[3:9, 4:20] = 0.7
    out, depth, _ = repose(None, nothing, camera, moved_pose(camera.pose, 1, 0.02, 2))
    assert out is None and depth.isfinite().all() and (depth > 0).any()


def test_reposed_samples_and_spared_ones():
    camera = Camera.from_fov(45.0, SIZE, looking_down().pose.expand(40, 4, 4), dtype=torch.float64)
    depth = plane_depth(looking_down(), 0.8).expand(40, *SIZE)
    view = View(PointMap.from_depth(depth, camera).to_image(), depth, camera, "top")
    config = AugmentConfig(camera_translation=0.1, camera_rotation=10, repose_probability=0.5)
    out = augment_view(view, config, sample_seeds(0, torch.arange(40)))
    moved = (out.camera.pose != camera.pose).flatten(1).any(1)
    assert 8 < moved.sum() < 32
    assert torch.equal(out.depth[~moved], depth[~moved]) and torch.equal(out.rgb[~moved], view.rgb[~moved])
    distance = (out.camera.pose - camera.pose)[:, :3, 3].norm(dim=-1)
    assert distance.max() <= 0.1 + 1e-6 and distance.max() > 0.07
    seen = PointMap.from_depth(out.depth, out.camera)
    assert (seen.points[..., 2] - 0.8)[seen.valid].abs().max() < 1e-6, "the table stays where it is"
    wrist = augment_view(replace(view, name="wrist"), config, sample_seeds(0, torch.arange(40)))
    assert not torch.equal(wrist.camera.pose, out.camera.pose), "cameras are moved each on its own"
    only = replace(config, repose_cameras=("side",))
    assert augment_view(view, only, sample_seeds(0, torch.arange(40))).depth is view.depth


def test_config_comes_from_yaml(tmp_path):
    file = tmp_path / "augment.yaml"
    configuration.dump(EVERYTHING, file)
    assert configuration.load(AugmentConfig, file) == EVERYTHING
    with pytest.raises(configuration.ConfigError, match="camera_translation"):
        configuration.decode(AugmentConfig, {"camera_translate": 1})
    with pytest.raises(configuration.ConfigError, match="hue must lie between 0 and"):
        configuration.decode(AugmentConfig, {"hue": 0.7})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: random_shift(torch.zeros(3, 8, 8), 1), r"\(N, \.\.\., C, H, W\)"),
        (lambda: random_shift(torch.zeros(2, 3, 8, 8), 8), "pad must be"),
        (lambda: random_shift_rgbd(torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4), torch.eye(3), 1), "share"),
        (
            lambda: random_shift_rgbd(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8), torch.eye(3), 1),
            "intrinsics",
        ),
        (lambda: AugmentConfig(shift=-1), "shift must lie"),
        (lambda: AugmentConfig(camera_shift={"a": -1}), "cannot be negative"),
        (lambda: AugmentConfig(frame_axes=(1, -1, 0)), "shares between 0 and 1"),
        (lambda: AugmentConfig(crop=(0, 4)), "at least 1 x 1"),
        (View, "rgb or depth"),
        (lambda: View(depth=torch.ones(2, 4, 4)), "belong together"),
        (lambda: View(depth=torch.ones(2, 4, 4), camera=skewed()), "camera is of size"),
        (lambda: augment_view(View(torch.ones(2, 3, 4, 4)), AugmentConfig(), torch.ones(2)), "int64"),
        (
            lambda: augment_view(View(torch.ones(2, 3, 4, 4)), AugmentConfig(crop=(5, 4)), random_seeds(2)),
            "larger than the pictures",
        ),
        (lambda: repose(None, torch.ones(4, 4), skewed(), torch.eye(4)), "camera's size"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
