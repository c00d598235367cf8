"""From a batch's pictures, depth and cameras to what the encoders of a policy see.

B batch, To observation steps, N = B To pictures; H, W rows and columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vilma.pointmap import Camera, PointMap
from vilma.pointmap.augment import AugmentConfig, View, augment_view, random_seeds

RGB_NORMALIZATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

_NEEDS = {
    "rgb": ("images",),
    "depth": ("depth",),
    "xyz": ("depth", "intrinsics", "pose"),
    "xyzrgb": ("images", "depth", "intrinsics", "pose"),
}


class Views(nn.Module):
    """Pictures of one camera for the streams of a policy, by its `PointMapPolicyConfig`.

    ``forward(obs, camera, seeds)`` gives {stream: (N, C, h, w)}: cropped, resized, normalised and, in
    training mode, augmented. Channels: "rgb" 3; "depth" 1; "xyz" 3; "xyzrgb" points, then colours, 6; with
    ``valid_channel`` one more behind the geometry tells readings from holes.
    """

    def __init__(self, config: Any, streams: Sequence[str], valid_channel: bool):
        super().__init__()
        self.config, self.streams, self.valid_channel = config, tuple(streams), valid_channel
        self.augments = config.augment != AugmentConfig()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in RGB_NORMALIZATION[config.rgb_normalization])
        low, high = config.workspace or ((0.0,) * 3, (0.0,) * 3)
        for name, value in {
            "rgb_mean": mean,
            "rgb_std": std,
            "point_center": torch.tensor(config.point_center or (0.0, 0.0, 0.0)).view(3, 1, 1),
            "point_scale": torch.tensor(config.point_scale or (1.0, 1.0, 1.0)).view(3, 1, 1),
            "low": torch.tensor(low).view(3, 1, 1),
            "high": torch.tensor(high).view(3, 1, 1),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def channels(self, stream: str) -> int:
        return {"rgb": 3, "depth": 1, "xyz": 3, "xyzrgb": 6}[stream] + (
            stream != "rgb" and self.valid_channel
        )

    @property
    def keys(self) -> tuple[str, ...]:
        """Observation keys that are read."""
        parts = [part for stream in self.streams for part in _NEEDS[stream]]
        if self.config.reference_frame == "camera":
            parts = [part for part in parts if part != "pose"]
        return tuple(
            f"observation.{part}.{camera}" for camera in self.config.cameras for part in dict.fromkeys(parts)
        )

    def picture_size(self, camera: str) -> tuple[int, int] | None:
        """(h, w) of what `forward` gives, where the config tells it."""
        c = self.config
        if camera in c.resize:
            return c.resize[camera]
        if camera in c.crops:
            return c.crops[camera][2:]
        return c.augment.crop or c.image_size.get(camera)

    def draw(self, count: int, device: torch.device, seeds: Tensor | None = None) -> Tensor | None:
        """One seed a sample for all its cameras, ``seeds`` if given; None when nothing is augmented."""
        if not self.augments:
            return None
        if not self.training:  # only the middle crop is left: nothing may be drawn
            return torch.zeros(count, dtype=torch.int64, device=device)
        return random_seeds(count, device=device) if seeds is None else seeds.to(device)

    def forward(self, obs: Mapping[str, Any], camera: str, seeds: Tensor | None = None) -> dict[str, Tensor]:
        c = self.config
        view = self._view(obs, camera)
        if self.augments:
            view = augment_view(view, c.augment, seeds, self.training)
            if c.reference_frame == "camera" and view.camera is not None:
                # A camera that was moved sees points in its own new frame.
                eye = torch.eye(4, device=view.depth.device).expand_as(view.camera.pose)
                view = replace(view, camera=replace(view.camera, pose=eye, check=False))
        size = view.size
        top, left, height, width = self._crop(camera, size)
        margin = c.shift.get(camera, 0) if self.training else 0
        # The window with room to move, as far as the image goes; after a resize there is none.
        room = 0 if camera in c.resize else margin
        up, over = max(top - room, 0), max(left - room, 0)
        box = (up, over, min(top + height + room, size[0]) - up, min(left + width + room, size[1]) - over)
        seen = self._streams(view, box, c.resize.get(camera))
        if camera in c.resize:
            (up, over), (top, left), (height, width) = (0, 0), (0, 0), c.resize[camera]
        if margin:
            moves = torch.randint(-margin, margin + 1, (2, len(view)), device=self.rgb_mean.device)
            moves = moves.repeat_interleave(c.obs_horizon, 1)
            for stream, planes in seen.items():
                moved = moves if stream == "rgb" or c.paired_shift else torch.zeros_like(moves)
                seen[stream] = _shifted(planes, top - up + moved[0], left - over + moved[1], height, width)
        if "xyzrgb" in self.streams:
            rgb = self._normalized(seen.pop("rgb"))
            seen["xyzrgb"] = torch.cat([seen.pop("xyz"), rgb], dim=1)
        elif "rgb" in seen:
            seen["rgb"] = self._normalized(seen["rgb"])
        return {stream: seen[stream] for stream in self.streams}

    def _view(self, obs: Mapping[str, Any], camera: str) -> View:
        """The camera's checked pictures (B, To, ...); geometry also where augmentation renders anew."""
        c = self.config
        parts = {part for stream in self.streams for part in _NEEDS[stream]}
        if self.training and c.augment.moves_cameras:
            parts |= {"depth", "intrinsics", "pose"}
        taken = {}
        for part in ("images", "depth", "intrinsics", "pose"):
            key = f"observation.{part}.{camera}"
            if part not in parts or (part == "pose" and c.reference_frame == "camera"):
                continue
            if key not in obs:
                raise ValueError(f"the batch lacks {key}, which augmentation needs")
            taken[part] = obs[key]
        size = self._size(obs, camera, taken)
        pinhole = None
        if "intrinsics" in taken:
            intrinsics = taken["intrinsics"].float()
            if "pose" in taken:
                pose = taken["pose"].float()
            else:
                pose = torch.eye(4, device=intrinsics.device).expand(*intrinsics.shape[:-2], 4, 4)
            # Looking at the values would stall an accelerator at every step.
            pinhole = Camera(intrinsics, pose, size, check=intrinsics.device.type == "cpu")
        depth = taken["depth"].float() if "depth" in taken else None
        if depth is not None and pinhole is None:
            # Depth by itself: no view of it is asked for.
            eye = torch.eye(3, device=depth.device)
            pinhole = Camera(eye, torch.eye(4, device=depth.device), size, check=False)
        return View(taken.get("images"), depth, pinhole, camera)

    def _streams(
        self, view: View, box: tuple[int, int, int, int], resize: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        """ "rgb" as it comes, and "xyz" or "depth" with its valid channel, in the pixels ``box``, resized."""
        up, over, rows, columns = box
        seen = {}
        if view.rgb is not None and {"rgb", "xyzrgb"} & set(self.streams):
            image = view.rgb.flatten(0, 1)[:, :, up : up + rows, over : over + columns]
            if resize is not None:
                image = image if image.is_floating_point() else image.float().div_(255)
                image = torch.nn.functional.interpolate(image, resize, mode="bilinear", antialias=True)
            seen["rgb"] = image
        if view.depth is None or self.streams == ("rgb",):
            return seen
        depth = view.depth.flatten(0, 1)[:, up : up + rows, over : over + columns]
        if "depth" in self.streams:
            seen["depth"] = _nearest(self._depth_image(depth), resize)
        else:
            seen["xyz"] = _nearest(self._point_image(depth, view.camera, box), resize)
        return seen

    def _depth_image(self, depth: Tensor) -> Tensor:
        """(N, 1 or 2, h, w): centred and scaled depth, holes 0."""
        c = self.config
        near, far = c.depth_range or (0.0, float("inf"))
        valid = ((depth > near) & (depth < far))[:, None]
        planes = ((depth[:, None] - c.depth_center) / c.depth_scale).masked_fill(~valid, 0)
        return torch.cat([planes, valid.to(planes.dtype)], dim=1) if self.valid_channel else planes

    def _point_image(self, depth: Tensor, camera: Camera, box: tuple[int, int, int, int]) -> Tensor:
        """(N, 3 or 4, h, w): points of the pixels ``box`` in the reference frame, scaled; holes 0."""
        c = self.config
        up, over, rows, columns = box
        intrinsics, pose = camera.intrinsics.flatten(0, 1).clone(), camera.pose.flatten(0, 1)
        intrinsics[:, 0, 2] -= over
        intrinsics[:, 1, 2] -= up
        window = replace(camera, intrinsics=intrinsics, pose=pose, size=(rows, columns), check=False)
        points = PointMap.from_depth(depth, window, c.depth_range)
        valid = points.valid
        if c.workspace is not None:
            planes = points.points.movedim(-1, -3)
            valid = valid & ((planes >= self.low) & (planes <= self.high)).all(dim=-3)
            points = PointMap(planes.masked_fill(~valid[:, None], 0).movedim(-3, -1), valid)
        image = points.to_image(mask=self.valid_channel)
        if c.point_center is not None or c.point_scale is not None:
            image[:, :3].sub_(self.point_center).div_(self.point_scale)
            image[:, :3].mul_(valid[:, None])  # holes stay 0
        return image

    def _normalized(self, image: Tensor) -> Tensor:
        image = image.float() if image.is_floating_point() else image.float().div_(255)
        return (image - self.rgb_mean) / self.rgb_std

    def _size(self, obs: Mapping[str, Any], camera: str, taken: Mapping[str, Tensor]) -> tuple[int, int]:
        """(H, W) of the camera's pictures, after checking shapes against each other and the config."""
        c = self.config
        lead = (len(obs["task"]), c.obs_horizon)
        own = {"images": (3, "H", "W"), "depth": ("H", "W"), "intrinsics": (3, 3), "pose": (4, 4)}
        sizes = {}
        for part, values in taken.items():
            key, shape, wanted = f"observation.{part}.{camera}", tuple(values.shape), (*lead, *own[part])
            fits = len(shape) == len(wanted)
            if not fits or any(got != want for got, want in zip(shape, wanted) if isinstance(want, int)):
                raise ValueError(f"{key} must have shape {wanted}, got {shape}")
            if part in ("images", "depth"):
                sizes[key] = shape[-2:]
        if len(set(sizes.values())) > 1:
            raise ValueError(f"image and depth of camera {camera!r} must share one view, got {sizes}")
        key, size = next(iter(sizes.items()))
        if size != tuple(c.image_size.get(camera, size)):
            raise ValueError(
                f"{key} is {size}, the policy was made for {c.image_size[camera]} (its image_size)"
            )
        return size

    def _crop(self, camera: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
        top, left, height, width = self.config.crops.get(camera, (0, 0, *size))
        if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
            part = "images" if {"rgb", "xyzrgb"} & set(self.streams) else "depth"
            raise ValueError(
                f"the crop {(top, left, height, width)} of camera {camera!r} leaves "
                f"observation.{part}.{camera}, which is {size}"
            )
        return top, left, height, width


def _nearest(planes: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Nearest neighbours, source index floor(i in / out): each point stays a measured one."""
    if size is None:
        return planes
    for axis, length in zip((-2, -1), size):
        if planes.shape[axis] != length:
            index = torch.arange(length, device=planes.device) * planes.shape[axis] // length
            planes = planes.index_select(axis, index)
    return planes


def _shifted(picture: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """A window (N, C, height, width) of each picture (N, C, H, W), at its own top, left; edges replicate."""
    rows = (top[:, None] + torch.arange(height, device=top.device)).clamp(0, picture.shape[-2] - 1)
    columns = (left[:, None] + torch.arange(width, device=left.device)).clamp(0, picture.shape[-1] - 1)
    count, channels = picture.shape[:2]
    rows = rows[:, None, :, None].expand(count, channels, height, picture.shape[-1])
    columns = columns[:, None, None, :].expand(count, channels, height, width)
    return picture.gather(-2, rows).gather(-1, columns)
