"""Shifts by whole pixels, alone and together with the geometry."""

import pytest
import torch
import torch.nn.functional as F

from vilma.pointmap import Camera, PointMap
from vilma.pointmap.augment import random_shift, random_shift_rgbd


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
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
