"""Farthest-point sampling against a naive loop, PointNet against its definition and its size."""

import math
from itertools import pairwise

import pytest
import torch

from vilma.pointmap import PointMap
from vilma.pointmap.point_cloud import (
    PointCloudEncoder,
    PointNetEncoder,
    farthest_points,
    gather_points,
    merged_cloud,
)

from .test_camera import SIZE, skewed


def naive(points, count, valid):
    """One cloud, plain Python: the next point is the one whose nearest chosen point is farthest."""
    left = [n for n in range(len(points)) if valid[n]]
    chosen = []
    while left and len(chosen) < count:
        if not chosen:
            best = left[0]
        else:
            nearest = [min(math.dist(points[n], points[c]) for c in chosen) for n in left]
            best = left[nearest.index(max(nearest))]
        chosen.append(best)
        left.remove(best)
    return chosen


@pytest.mark.parametrize("count", [1, 7, 40])
def test_sampling_is_the_naive_loop(count):
    generator = torch.Generator().manual_seed(count)
    points = torch.randn(5, 40, 3, generator=generator, dtype=torch.float64)
    valid = torch.rand(5, 40, generator=generator) < torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0])[:, None]
    index, known = farthest_points(points, count, valid)
    assert index.shape == known.shape == (5, count)
    for k in range(5):
        expected = naive(points[k].tolist(), count, valid[k].tolist())
        assert index[k][known[k]].tolist() == expected
        assert known[k].tolist() == [True] * len(expected) + [False] * (count - len(expected))
    broken = points.masked_fill(~valid[..., None], torch.nan)
    assert torch.equal(farthest_points(broken, count, valid)[0], index)
    everything, _ = farthest_points(points, count)
    assert everything[1].tolist() == naive(points[1].tolist(), count, [True] * 40)
    torch.testing.assert_close(gather_points(points, everything)[2, 0], points[2, everything[2, 0]])


def test_sampling_of_a_lattice_with_ties_and_copies():
    """Whole numbers: every distance is exact, so ties are ties, and copies come last."""
    grid = torch.cartesian_prod(*[torch.arange(3.0)] * 3)
    points = torch.cat([grid, grid[:5]])[None]
    index, known = farthest_points(points, 32)
    assert known.all() and index[0].tolist() == naive(points[0].tolist(), 32, [True] * 32)
    assert sorted(index[0, 27:].tolist()) == [27, 28, 29, 30, 31], "copies are chosen last"
    half, _ = farthest_points(points.half(), 32)
    assert torch.equal(half, index)


def test_sampling_spreads():
    """A dense clump and a sparse ring: random choice would hardly see the ring."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.linspace(0, 2 * math.pi, 17)[:16]
    ring = torch.stack([angle.cos(), angle.sin(), torch.zeros(16)], -1)
    points = torch.cat([0.01 * torch.randn(2000, 3, generator=generator), ring])
    index, _ = farthest_points(points[None], 17)
    assert (index >= 2000).sum() == 16


def test_pointnet_is_dp3s():
    encoder = PointNetEncoder(3, 64).eval()
    # Linear, LayerNorm pairs: 3-64-128-256, then 256-64 with LayerNorm.
    sizes = [3, 64, 128, 256]
    expected = sum(a * b + b + 2 * b for a, b in pairwise(sizes)) + 256 * 64 + 64 + 128
    assert sum(p.numel() for p in encoder.parameters()) == expected
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(3, 50, 3, generator=generator)
    valid = torch.rand(3, 50, generator=generator) < 0.6
    out = encoder(cloud, valid)
    for k in range(3):
        torch.testing.assert_close(encoder(cloud[k : k + 1, valid[k]])[0], out[k], msg="holes do not speak")
    order = torch.randperm(50, generator=generator)
    torch.testing.assert_close(encoder(cloud[:, order], valid[:, order]), out)
    garbage = torch.where(valid[..., None], cloud, 1e4)
    torch.testing.assert_close(encoder(garbage, valid), out)
    nothing = encoder(cloud, torch.zeros_like(valid))
    assert nothing.isfinite().all() and torch.equal(nothing[0], nothing[1])


def test_pointnet_gradient_is_that_of_its_definition():
    encoder = PointNetEncoder(3, 16, (8, 16, 32)).double()
    cloud = torch.randn(3, 40, 3, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(3, 40) < 0.6
    valid[2] = False  # a cloud without a point
    wanted = encoder.projection(torch.where(valid[..., None], encoder.mlp(cloud), 0).amax(1))
    got = encoder(cloud, valid)
    torch.testing.assert_close(got, wanted)
    weights = torch.randn_like(wanted)
    inputs = [cloud, *encoder.parameters()]
    pairs = zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((wanted * weights).sum(), inputs),
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(encoder(cloud, valid), wanted)


def test_cloud_encoder_reads_point_images():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(2, *SIZE, generator=generator) + 0.5
    depth[0, :10] = 0
    seen = PointMap.from_depth(depth, skewed().to(torch.float32))
    encoder = PointCloudEncoder(4, points=64).eval()
    image = seen.to_image(mask=True)
    out = encoder(image)
    assert out.shape == (2, encoder.num_features == 64 and 64) and not encoder.is_conditioned
    cloud, valid = merged_cloud([seen])
    index, known = farthest_points(cloud, 64, valid)
    torch.testing.assert_close(out, encoder.network(gather_points(cloud, index), known))
    moved = image.clone()
    moved[0, :3, :10] = 7.0  # what lies in a hole is never read
    torch.testing.assert_close(encoder(moved), out)
    assert PointCloudEncoder(4, points=600, stride=2)(image).shape == (2, 64)
    colored = PointCloudEncoder(7, num_features=32, points=16)(torch.cat([image, torch.rand(2, 3, *SIZE)], 1))
    assert colored.shape == (2, 32)
    colored.sum().backward()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.4])
def test_training_on_a_cpu_samples_the_same_points(share):
    """Training leaves common holes out before sampling; acting, which looks at no value, does not."""
    torch.manual_seed(0)
    encoder = PointCloudEncoder(7, 16, points=30).double()
    x = torch.randn(4, 7, 20, 25, dtype=torch.float64)
    x[:, 3] = (torch.rand(4, 20, 25) < share).double()
    x[1, 3] = 0
    seen = []
    encoder.network.register_forward_pre_hook(lambda module, args: seen.append(args))
    trained = encoder(x)
    with torch.no_grad():
        acted = encoder(x)
    assert torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[0][0][seen[0][1]], seen[1][0][seen[1][1]])
    torch.testing.assert_close(trained, acted)


def test_clouds_of_cameras_merge():
    depth = torch.rand(2, *SIZE) - 0.2
    seen = PointMap.from_depth(depth, skewed().to(torch.float32), frame="world")
    other = PointMap.from_depth(
        depth[:, :4], skewed().to(torch.float32).crop(0, 0, 4, SIZE[1]), frame="world"
    )
    rgb = [torch.rand(2, 3, *SIZE), torch.rand(2, 3, 4, SIZE[1])]
    cloud, valid = merged_cloud([seen, other], rgb)
    number = SIZE[0] * SIZE[1]
    assert cloud.shape == (2, number + 4 * SIZE[1], 6) and valid.shape == cloud.shape[:2]
    torch.testing.assert_close(cloud[1, 5, 3:], rgb[0][1, :, 0, 5])
    torch.testing.assert_close(cloud[1, number + 3, :3], other.points[1, 0, 3])
    torch.testing.assert_close(
        cloud[0][valid[0]][:, :3], torch.cat([seen[0].to_cloud(), other[0].to_cloud()])
    )
    with pytest.raises(ValueError, match="do not mix: world, base"):
        merged_cloud([seen, other.to_frame(torch.eye(4), "base")])


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: farthest_points(torch.zeros(4, 3), 2), r"points \(B, N, 3\)"),
        (lambda: farthest_points(torch.zeros(1, 4, 3), 0), "count >= 1"),
        (lambda: farthest_points(torch.zeros(1, 4, 3), 2, torch.ones(1, 4)), "valid must be bool"),
        (lambda: PointNetEncoder(3)(torch.zeros(1, 4, 6)), r"\(B, N, 3\)"),
        (lambda: PointCloudEncoder(3), "valid_channel: true"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
