"""Clouds for the DP3-style baseline: farthest-point sampling and a PointNet encoder (arXiv 2403.03954).

B: clouds; N: points of a cloud; M: sampled points; C: channels of a point, the first three x, y, z;
H, W: rows and columns of the point map they come from. torch only, no compiled extension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .point_map import PointMap


def farthest_points(points: Tensor, count: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices (B, M) of ``count`` points chosen greedily far apart, and which of them are points, (B, M).

    points (B, N, 3); valid (B, N), all by default. The first choice is the first valid point, each further
    one the valid point with the largest distance to those chosen, the lowest index on ties: the same on every
    device and run. With fewer valid points than ``count``, the rest of the mask is False (index 0 there).
    Cost O(B N M); thin large clouds beforehand.
    """
    if points.ndim != 3 or points.shape[-1] != 3 or count < 1:
        raise ValueError(f"wanted points (B, N, 3) and count >= 1, got {tuple(points.shape)} and {count}")
    batch, number = points.shape[:2]
    if valid is None:
        valid = torch.ones(batch, number, dtype=torch.bool, device=points.device)
    if valid.shape != (batch, number) or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool ({batch}, {number}), got {valid.dtype} {tuple(valid.shape)}")
    points = points.detach().masked_fill(~valid[..., None], 0)  # a hole may hold anything, NaN too
    points = points.float() if points.dtype in (torch.float16, torch.bfloat16) else points
    # Squared distance to the nearest chosen point; -1: never to be chosen.
    distance = torch.where(valid, torch.inf, -1.0).to(points.dtype)
    x, y, z = (coordinate.contiguous() for coordinate in points.unbind(-1))
    apart, along = torch.empty_like(x), torch.empty_like(x)
    chosen, known = [], []
    for _ in range(count):
        best, index = distance.max(dim=1, keepdim=True)
        known.append(best > -1)
        chosen.append(torch.where(known[-1], index, 0))
        torch.sub(x, x.gather(1, index), out=apart)
        apart.mul_(apart)
        for coordinate in (y, z):
            torch.sub(coordinate, coordinate.gather(1, index), out=along)
            apart.addcmul_(along, along)
        torch.minimum(distance, apart, out=distance)
        # Taken: a copy of it elsewhere, at distance 0, may still be chosen when nothing else is left.
        distance.scatter_(1, index, -1)
    return torch.cat(chosen, 1), torch.cat(known, 1)


def gather_points(points: Tensor, index: Tensor) -> Tensor:
    """Rows (B, M, C) of points (B, N, C) at indices (B, M)."""
    return points.gather(1, index[..., None].expand(-1, -1, points.shape[-1]))


def merged_cloud(maps: Sequence[PointMap], colors: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The points of several cameras in one frame as one cloud (B, N, 3 or 6), and which are points, (B, N).

    maps: point maps (B, H, W, 3) in one frame, cropped as wanted. colors: for each (B, 3, H, W), appended.
    """
    if len({seen.frame for seen in maps}) > 1:
        raise ValueError(f"clouds of several frames do not mix: {', '.join(str(m.frame) for m in maps)}")
    clouds = [seen.points.flatten(1, 2) for seen in maps]
    if colors is not None:
        pairs = zip(clouds, colors, strict=True)
        clouds = [torch.cat([cloud, rgb.movedim(1, -1).flatten(1, 2).to(cloud)], -1) for cloud, rgb in pairs]
    return torch.cat(clouds, 1), torch.cat([seen.valid.flatten(1, 2) for seen in maps], 1)


class PointNetEncoder(nn.Module):
    """DP3's encoder: each point through Linear-LayerNorm-ReLU of widths 64, 128, 256, the maximum over the
    points, then Linear-LayerNorm.

    forward(cloud (B, N, in_chans), valid (B, N) | None) -> (B, num_features). A cloud without a valid point
    is encoded as if the maximum were 0, what ReLU leaves of nothing.
    """

    def __init__(self, in_chans: int = 3, num_features: int = 64, widths: Sequence[int] = (64, 128, 256)):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((in_chans, *widths[:-1]), widths, strict=True):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        self.mlp = nn.Sequential(*layers)
        self.projection = nn.Sequential(nn.Linear(widths[-1], num_features), nn.LayerNorm(num_features))
        self.in_chans = in_chans
        self.num_features = num_features

    def forward(self, cloud: Tensor, valid: Tensor | None = None) -> Tensor:
        if cloud.shape[-1] != self.in_chans:
            raise ValueError(f"cloud must be (B, N, {self.in_chans}), got {tuple(cloud.shape)}")
        if not torch.is_grad_enabled() or cloud.device.type != "cpu" or torch.compiler.is_compiling():
            return self.projection(self._features(cloud, valid).max(1)[0])
        # A third of the time on a CPU: only points that are the maximum of a feature get a gradient, so only
        # they are run with one. (Elsewhere their number would have to be waited for.)
        with torch.no_grad():
            winner = self._features(cloud, valid).argmax(1)
        used = torch.zeros(cloud.shape[:2], dtype=torch.bool).scatter_(1, winner, True)
        row = used.flatten().cumsum(0).view(used.shape) - 1
        features = self._features(cloud[used], None if valid is None else valid[used])
        return self.projection(features.gather(0, row.gather(1, winner)))

    def _features(self, cloud: Tensor, valid: Tensor | None) -> Tensor:
        """(..., widths[-1]) of each point; 0, below every value after ReLU, where there is none."""
        points = self.mlp(cloud)
        return points if valid is None else points.masked_fill(~valid[..., None], 0)


class PointCloudEncoder(nn.Module):
    """A picture of points to one vector the DP3 way: the valid pixels, farthest-point sampled, then PointNet.

    forward(x (N, C, H, W), cond, unused) -> (N, num_features), the contract of
    `vilma.pointmap.encoders.build_encoder`. in_chans: x, y, z, the valid channel, and, with 7, three colours
    after it. ``points`` are sampled from those pixels of a grid ``stride`` apart.
    """

    is_conditioned = False

    def __init__(self, in_chans: int = 4, num_features: int = 64, points: int = 512, stride: int = 1):
        super().__init__()
        if in_chans not in (4, 7):
            raise ValueError(
                "a point cloud needs the channels x, y, z, valid (and three colours), 4 or 7; "
                f"got {in_chans}: set valid_channel: true"
            )
        self.network = PointNetEncoder(in_chans - 1, num_features)
        self.num_features = num_features
        self.points, self.stride = points, stride

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        x = x[..., :: self.stride, :: self.stride]
        cloud, valid = x.flatten(2).mT, x[:, 3].flatten(1) > 0.5
        if torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling():
            cloud, valid = _without_common_holes(cloud, valid, self.points)
        index, known = farthest_points(cloud[..., :3], self.points, valid)
        cloud = gather_points(torch.cat([cloud[..., :3], cloud[..., 4:]], -1), index)
        return self.network(cloud, known)


def _without_common_holes(cloud: Tensor, valid: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """cloud (B, N, C) and valid (B, N) with each cloud's points in front, in their order, cut to the largest
    number of points in any (at least ``least``): sampling chooses the same ones, in less time."""
    most = max(int(valid.sum(1).max()), min(least, valid.shape[1]))
    if most > 0.8 * valid.shape[1]:
        return cloud, valid
    front = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return gather_points(cloud, front), valid.gather(1, front)
