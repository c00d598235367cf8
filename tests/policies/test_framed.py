"""State and action that move along with the reference frame, against rotation matrices in float64."""

import math

import pytest
import torch

from vilma.pointmap.augment import AugmentConfig, frame_jitter, sample_seeds
from vilma.policies.framed import check_parts, moved


def skew(v):
    x, y, z = v.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3))


def matrix_of_vector(r):
    return torch.linalg.matrix_exp(skew(r))


def matrix_of_quaternion(q):
    """R p = p + 2 w (u x p) + 2 u x (u x p)."""
    u = skew(q[..., :3])
    return torch.eye(3, dtype=q.dtype) + 2 * q[..., 3:, None] * u + 2 * u @ u


@pytest.mark.parametrize("degrees", [5.0, 180.0])
def test_against_matrices(degrees):
    g = torch.Generator().manual_seed(0)
    config = AugmentConfig(frame_translation=0.5, frame_rotation=degrees, frame_pivot=(0.4, 0.1, 0.9))
    motion = frame_jitter(config, sample_seeds(0, torch.arange(40))).double()
    x = torch.randn(40, 2, 15, generator=g, dtype=torch.float64)
    x[..., 6:10] /= x[..., 6:10].norm(dim=-1, keepdim=True)
    parts = {"position": (0,), "vector": (3,), "quaternion": (6,), "rotation_vector": (10,)}
    new = moved(x, parts, motion)
    r, t = motion[:, None, :3, :3], motion[:, None, :3, 3]
    torch.testing.assert_close(new[..., :3], (r @ x[..., :3, None])[..., 0] + t)
    torch.testing.assert_close(new[..., 3:6], (r @ x[..., 3:6, None])[..., 0])
    for part, matrix in ((slice(6, 10), matrix_of_quaternion), (slice(10, 13), matrix_of_vector)):
        torch.testing.assert_close(matrix(new[..., part]), r @ matrix(x[..., part]), atol=1e-6, rtol=0)
    assert torch.equal(new[..., 13:], x[..., 13:])


def test_orientations_stay_on_their_side():
    """A gripper that points down is half a turn about x: the other number for it would be a jump."""
    config = AugmentConfig(frame_rotation=5.0)
    motion = frame_jitter(config, sample_seeds(1, torch.arange(64)))
    for sign in (1.0, -1.0):
        vector = torch.tensor([[sign * math.pi, 0, 0]]).expand(64, -1)
        new = moved(vector, {"rotation_vector": (0,)}, motion)
        assert (new - vector).norm(dim=-1).max() < 3 * math.radians(5)
        quaternion = torch.tensor([[sign, 0, 0, 0.0]]).expand(64, -1)
        new = moved(quaternion, {"quaternion": (0,)}, motion)
        assert (new - quaternion).norm(dim=-1).max() < math.radians(5)
    still = moved(torch.zeros(1, 3), {"rotation_vector": (0,)}, torch.eye(4)[None])
    assert torch.equal(still, torch.zeros(1, 3))


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"place": (0,)}, "names place; the kinds are position, vector, quaternion, rotation_vector"),
        ({"quaternion": (4,)}, r"the quaternion at 4 \(4 numbers\) leaves the 7 numbers"),
        ({"position": (0,), "vector": (2,)}, "the vector at 2 .* overlaps another"),
        ({"position": (-1,)}, "leaves the 7"),
    ],
)
def test_parts_that_do_not_fit(parts, message):
    with pytest.raises(ValueError, match=message):
        check_parts(parts, 7, "frame_state")
