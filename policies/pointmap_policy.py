"""PointMapPolicy (arXiv 2510.20406): a diffusion policy on RGB images and structured point maps.

One encoder a camera and modality gives one token a picture; the tokens, the task text and the noise level
condition the causal xLSTM denoiser (``denoiser.py``) of an EDM (``edm.py``) over chunks of actions.

B batch, To observation steps, N = B To pictures, H horizon, A action size, n observation tokens.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vilma.pointmap import Camera, PointMap
from vilma.pointmap.encoders import build_encoder

from . import edm
from .denoiser import XLSTMDenoiser
from .language import TEXT_ENCODERS, build_text_encoder
from .normalization import MODES, Normalizer
from .policy import Policy

# Tokens of one camera, in the order of the paper's Cat fusion.
MODALITIES = {"rgb": ("rgb",), "xyz": ("xyz",), "cat": ("rgb", "xyz")}

RGB_NORMALIZATION = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "symmetric": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class PointMapPolicyConfig:
    """Options of ``PointMapPolicy``; the defaults are the paper's RoboCasa size where it states one.

    cameras: names, in token order. image_size: expected (H, W) a camera, others are refused; no entry accepts
    any. crops: the pixels (top, left, height, width) that are used; no entry uses all. shift: random shift of
    at most so many pixels in training; ``paired_shift`` moves point maps along with their images, the paper
    moved the images only.

    rgb_encoder, xyz_encoder: names for ``vilma.pointmap.encoders.build_encoder`` with its options.
    encoder_features: width of an observation token; encoders of another width get a linear map to it. None:
    the encoders' own, which must then agree.

    depth_range: (near, far) in metres, readings outside are holes. workspace: lowest and highest (x, y, z) in
    the reference frame, points outside are holes. point_center, point_scale: the network sees
    (p - center) / scale; None: raw metres, as in the paper. valid_channel: a fourth channel tells holes from
    points.

    use_state adds one token from ``observation.state`` (state_dim). action_normalization and
    state_normalization: mean_std, min_max or none. gripper_index: action dimensions whose sign is executed
    (-1 or 1). ``horizon`` actions are predicted from obs_horizon observations, the first ``execute`` are
    executed.

    sigma_*, noise_*: EDM and its training noise. noise_draws: noise levels for each sample, on one encoding.
    loss_on_padding: count the padded actions after an episode's end in the loss.
    """

    cameras: tuple[str, ...]
    action_dim: int
    reference_frame: str
    action_kind: str
    type: str = "pointmap"
    modality: str = "cat"
    image_size: dict[str, tuple[int, int]] = field(default_factory=dict)
    crops: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    shift: dict[str, int] = field(default_factory=dict)
    paired_shift: bool = True
    rgb_encoder: str = "convnextv2_tiny"
    rgb_encoder_options: dict[str, Any] = field(default_factory=dict)
    rgb_pretrained: bool = False
    rgb_normalization: str = "imagenet"
    xyz_encoder: str = "convnextv2_tiny"
    xyz_encoder_options: dict[str, Any] = field(default_factory=dict)
    encoder_features: int | None = None
    depth_range: tuple[float, float] | None = None
    workspace: tuple[Vector, Vector] | None = None
    point_center: Vector | None = None
    point_scale: Vector | None = None
    valid_channel: bool = True
    text_encoder: str = "hashed"
    text_dim: int = 512
    use_state: bool = False
    state_dim: int = 0
    state_normalization: str = "mean_std"
    action_normalization: str = "min_max"
    gripper_index: tuple[int, ...] = ()
    obs_horizon: int = 1
    horizon: int = 10
    execute: int = 10
    dim: int = 512
    num_blocks: int = 8
    num_heads: int = 8
    sigma_min: float = 0.001
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    noise_loc: float = math.log(0.5)
    noise_scale: float = 0.5
    noise_draws: int = 1
    sampler: str = "ddim"
    schedule: str = "exponential"
    sampling_steps: int = 4
    loss_on_padding: bool = False

    def __post_init__(self) -> None:
        for name, known in {
            "type": ("pointmap",),
            "modality": tuple(MODALITIES),
            "rgb_normalization": tuple(RGB_NORMALIZATION),
            "reference_frame": ("world", "base", "camera"),
            "action_kind": ("controller", "delta", "absolute"),
            "state_normalization": MODES,
            "action_normalization": MODES,
            "text_encoder": tuple(TEXT_ENCODERS),
            "sampler": tuple(edm.SAMPLERS),
            "schedule": tuple(edm.SCHEDULES),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if not self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise ValueError(f"cameras must name at least one camera, each once; got {list(self.cameras)}")
        for camera in self.cameras:
            if not re.fullmatch(r"\w+", camera):
                raise ValueError(f"a camera name consists of letters, digits and underscores; got {camera!r}")
        for name in ("image_size", "crops", "shift"):
            unknown = [camera for camera in getattr(self, name) if camera not in self.cameras]
            if unknown:
                raise ValueError(
                    f"{name} names {', '.join(unknown)}; the cameras are {', '.join(self.cameras)}"
                )
        for name in (
            "action_dim",
            "obs_horizon",
            "horizon",
            "execute",
            "noise_draws",
            "sampling_steps",
            "num_blocks",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.execute > self.horizon:
            raise ValueError(f"execute ({self.execute}) must not exceed the horizon ({self.horizon})")
        if self.use_state and self.state_dim < 1:
            raise ValueError("use_state needs state_dim, the size of observation.state")
        if any(not 0 <= index < self.action_dim for index in self.gripper_index):
            raise ValueError(
                f"gripper_index {list(self.gripper_index)} leaves the {self.action_dim} action dimensions"
            )
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"wanted 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if self.point_scale is not None and min(self.point_scale) <= 0:
            raise ValueError(f"point_scale must be positive, got {list(self.point_scale)}")
        if any(pixels < 0 for pixels in self.shift.values()):
            raise ValueError(f"shift counts pixels and cannot be negative, got {self.shift}")


class PointMapPolicy(Policy):
    """The policy; ``stats`` are a data set's statistics, ``pretrained=False`` builds the encoders without
    looking for their pretrained weights (when a checkpoint follows)."""

    config_class = PointMapPolicyConfig

    def __init__(
        self, config: PointMapPolicyConfig, stats: Mapping[str, Any] | None = None, *, pretrained: bool = True
    ):
        super().__init__(config)
        c = config
        self.text = build_text_encoder(c.text_encoder, c.text_dim)
        encoders: dict[str, nn.Module] = {}
        for camera in c.cameras:
            for kind in MODALITIES[c.modality]:
                encoders[f"{camera}_{kind}"] = build_encoder(
                    c.rgb_encoder if kind == "rgb" else c.xyz_encoder,
                    3 if kind == "rgb" or not c.valid_channel else 4,
                    cond_dim=c.text_dim,
                    pretrained=kind == "rgb" and c.rgb_pretrained and pretrained,
                    **(c.rgb_encoder_options if kind == "rgb" else c.xyz_encoder_options),
                )
        self.encoders = nn.ModuleDict(encoders)
        widths = {encoder.num_features for encoder in encoders.values()}
        if c.encoder_features is None and len(widths) > 1:
            raise ValueError(
                f"the encoders give tokens of different widths {sorted(widths)}: set encoder_features"
            )
        width = c.encoder_features or widths.pop()
        self.adapters = nn.ModuleDict(
            {
                name: nn.Linear(encoder.num_features, width)
                for name, encoder in encoders.items()
                if encoder.num_features != width
            }
        )
        self.state_proj = nn.Linear(c.state_dim, width) if c.use_state else None
        self.denoiser = XLSTMDenoiser(
            latent_dim=width,
            goal_dim=c.text_dim,
            action_dim=c.action_dim,
            num_obs_tokens=c.obs_horizon * (len(encoders) + c.use_state),
            horizon=c.horizon,
            dim=c.dim,
            num_blocks=c.num_blocks,
            num_heads=c.num_heads,
        )
        self.action_normalizer = Normalizer(c.action_normalization, c.action_dim, "action")
        self.state_normalizer = (
            Normalizer(c.state_normalization, c.state_dim, "observation.state") if c.use_state else None
        )
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in RGB_NORMALIZATION[c.rgb_normalization])
        self.register_buffer("rgb_mean", mean, persistent=False)
        self.register_buffer("rgb_std", std, persistent=False)
        center = torch.tensor(c.point_center or (0.0, 0.0, 0.0)).view(3, 1, 1)
        scale = torch.tensor(c.point_scale or (1.0, 1.0, 1.0)).view(3, 1, 1)
        self.register_buffer("point_center", center, persistent=False)
        self.register_buffer("point_scale", scale, persistent=False)
        if stats:
            self.set_statistics(stats)

    @property
    def observation_keys(self) -> tuple[str, ...]:
        kinds = MODALITIES[self.config.modality]
        parts = ["images"] if "rgb" in kinds else []
        if "xyz" in kinds:
            parts += ["depth", "intrinsics"]
            parts += [] if self.config.reference_frame == "camera" else ["pose"]
        keys = [f"observation.{part}.{camera}" for camera in self.config.cameras for part in parts]
        return tuple(keys + ["observation.state"] * self.config.use_state)

    def set_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Take ``{"action": {"mean", "std", "min", "max"}, "observation.state": ...}``, lists of floats."""
        for normalizer in (self.action_normalizer, self.state_normalizer):
            if normalizer is not None and normalizer.name in statistics:
                normalizer.set_statistics(statistics[normalizer.name])
            elif normalizer is not None and normalizer.mode != "none":
                raise ValueError(
                    f"the statistics lack {normalizer.name!r}; they have {', '.join(statistics)}"
                )
        self.statistics = dict(statistics)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """EDM loss of a batch: the observation keys (B, To, ...), ``task``, ``action`` (B, H, A) whose first
        step belongs to the last observation, and ``action_is_pad`` (B, H) if some are padding."""
        c = self.config
        action = batch["action"].float()
        if action.shape[1:] != (c.horizon, c.action_dim):
            raise ValueError(
                f"action must have shape (B, {c.horizon}, {c.action_dim}), got {tuple(action.shape)}"
            )
        action = self.action_normalizer.normalize(action)
        mask = None
        if "action_is_pad" in batch and not c.loss_on_padding:
            mask = ~batch["action_is_pad"]
        context = self.encode(batch)
        if c.noise_draws > 1:
            context, action = (x.repeat_interleave(c.noise_draws, 0) for x in (context, action))
            mask = None if mask is None else mask.repeat_interleave(c.noise_draws, 0)
        uniform = torch.rand(len(action), device=action.device)
        sigma = edm.log_logistic(uniform, c.noise_loc, c.noise_scale, c.sigma_min, c.sigma_max)
        noise = torch.randn_like(action)
        loss = edm.edm_loss(
            lambda x, s: self.denoiser(x, s, context), action, noise, sigma, c.sigma_data, mask
        )
        return loss, {"loss": loss.detach()}

    def predict_chunk(
        self, obs: Mapping[str, Any], generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        c = self.config
        context = self.encode(obs)
        shape = (c.horizon, c.action_dim)
        if generators is None:
            noise = torch.randn(len(context), *shape, device=context.device)
        else:
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(context.device)

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            return edm.denoise(lambda y, s: self.denoiser(y, s, context), x, sigma, c.sigma_data)

        sigmas = edm.SCHEDULES[c.schedule](c.sampling_steps, c.sigma_min, c.sigma_max)
        action = edm.SAMPLERS[c.sampler](denoiser, noise * c.sigma_max, sigmas)
        action = self.action_normalizer.unnormalize(action)
        for index in c.gripper_index:
            action[..., index] = torch.where(action[..., index] >= 0, 1.0, -1.0)
        return action

    def encode(self, obs: Mapping[str, Any]) -> Tensor:
        """Context (B, 1 + n, D) of the denoiser from observations (B, To, ...): all that is free of noise."""
        c = self.config
        absent = [key for key in (*self.observation_keys, "task") if key not in obs]
        if absent:
            raise ValueError(f"the observation lacks {', '.join(absent)}; it has {', '.join(sorted(obs))}")
        goal = self.text(obs["task"])
        batch, steps = len(goal), c.obs_horizon
        cond = goal.repeat_interleave(steps, 0)
        tokens = []
        for camera in c.cameras:
            for kind, picture in self.pictures(obs, camera).items():
                name = f"{camera}_{kind}"
                token = self.encoders[name](picture, cond)
                tokens.append(self.adapters[name](token) if name in self.adapters else token)
        if self.state_proj is not None:
            state = obs["observation.state"]
            if state.shape != (batch, steps, c.state_dim):
                wanted = (batch, steps, c.state_dim)
                raise ValueError(f"observation.state must have shape {wanted}, got {tuple(state.shape)}")
            state = self.state_normalizer.normalize(state.float())
            tokens.append(self.state_proj(state.flatten(0, 1)))
        stacked = torch.stack(tokens, dim=1).view(batch, steps * len(tokens), -1)
        return self.denoiser.context(stacked, goal[:, None])

    def pictures(self, obs: Mapping[str, Any], camera: str) -> dict[str, Tensor]:
        """What the encoders of ``camera`` see: "rgb" (N, 3, h, w) and/or "xyz" (N, 3 or 4, h, w).

        Cropped, normalised, and in training mode randomly shifted.
        """
        c = self.config
        kinds = MODALITIES[c.modality]
        batch = len(obs["task"])
        size = self._image_size(obs, camera)
        top, left, height, width = c.crops.get(camera, (0, 0, *size))
        margin = c.shift.get(camera, 0) if self.training else 0
        # The window with room to move, as far as the image goes.
        up, over = max(top - margin, 0), max(left - margin, 0)
        box = (up, over, min(top + height + margin, size[0]) - up, min(left + width + margin, size[1]) - over)
        seen = {}
        if "rgb" in kinds:
            image = obs[f"observation.images.{camera}"].flatten(0, 1)
            seen["rgb"] = image[:, :, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
        if "xyz" in kinds:
            seen["xyz"] = self._point_image(obs, camera, size, box)
        if margin:
            moves = torch.randint(-margin, margin + 1, (2, batch), device=self.device)
            moves = moves.repeat_interleave(c.obs_horizon, 1)
            for kind, picture in seen.items():
                moved = moves if kind == "rgb" or c.paired_shift else torch.zeros_like(moves)
                seen[kind] = _shifted(picture, top - up + moved[0], left - over + moved[1], height, width)
        if "rgb" in kinds:
            image = seen["rgb"]
            image = image if image.is_floating_point() else image.float().div_(255)
            seen["rgb"] = (image - self.rgb_mean) / self.rgb_std
        return seen

    def _point_image(self, obs: Mapping[str, Any], camera: str, size: tuple[int, int], box: tuple) -> Tensor:
        """Network layout (N, 3 or 4, h, w) of the point map in the pixels ``box``; holes are 0."""
        c = self.config
        up, over, rows, columns = box
        depth = obs[f"observation.depth.{camera}"].flatten(0, 1)[:, up : up + rows, over : over + columns]
        intrinsics = obs[f"observation.intrinsics.{camera}"].flatten(0, 1).float()
        if c.reference_frame == "camera":
            pose = torch.eye(4, device=intrinsics.device).expand(len(intrinsics), 4, 4)
        else:
            pose = obs[f"observation.pose.{camera}"].flatten(0, 1).float()
        # Looking at the values would stall an accelerator at every step.
        view = Camera(intrinsics, pose, size, check=intrinsics.device.type == "cpu")
        points = PointMap.from_depth(depth.float(), view.crop(up, over, rows, columns), c.depth_range)
        if c.workspace is not None:
            points = points.crop(c.workspace)
        image = points.to_image(mask=c.valid_channel)
        if c.point_center is not None or c.point_scale is not None:
            image[:, :3].sub_(self.point_center).div_(self.point_scale)
            image[:, :3].mul_(points.valid[:, None])  # holes stay 0
        return image

    def _image_size(self, obs: Mapping[str, Any], camera: str) -> tuple[int, int]:
        """(H, W) of the camera's pictures, after checking them against each other and the config."""
        c = self.config
        lead = (len(obs["task"]), c.obs_horizon)
        kinds = MODALITIES[c.modality]
        sizes = {}
        for kind, key, middle in (
            ("rgb", f"observation.images.{camera}", (3,)),
            ("xyz", f"observation.depth.{camera}", ()),
        ):
            if kind in kinds:
                shape = tuple(obs[key].shape)
                if shape[:-2] != lead + middle:
                    raise ValueError(f"{key} must have shape {(*lead, *middle, 'H', 'W')}, got {shape}")
                sizes[key] = shape[-2:]
        if len(set(sizes.values())) > 1:
            raise ValueError(f"image and depth of camera {camera!r} must share one view, got {sizes}")
        key, size = next(iter(sizes.items()))
        if size != c.image_size.get(camera, size):
            raise ValueError(
                f"{key} is {size}, the policy was made for {c.image_size[camera]} (its image_size)"
            )
        if camera in c.crops:
            top, left, height, width = c.crops[camera]
            if (
                min(top, left) < 0
                or min(height, width) < 1
                or top + height > size[0]
                or left + width > size[1]
            ):
                raise ValueError(
                    f"the crop {c.crops[camera]} of camera {camera!r} leaves {key}, which is {size}"
                )
        return size


def _shifted(picture: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """A window (N, C, height, width) of each picture (N, C, H, W), at its own top, left; edges replicate."""
    rows = (top[:, None] + torch.arange(height, device=top.device)).clamp(0, picture.shape[-2] - 1)
    columns = (left[:, None] + torch.arange(width, device=left.device)).clamp(0, picture.shape[-1] - 1)
    count, channels = picture.shape[:2]
    rows = rows[:, None, :, None].expand(count, channels, height, picture.shape[-1])
    columns = columns[:, None, None, :].expand(count, channels, height, width)
    return picture.gather(-2, rows).gather(-1, columns)
