"""The options of `PointMapPolicy`."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from vilma.pointmap.augment import AugmentConfig

from . import edm, framed
from .backbones import BACKBONES
from .fusion import MODALITIES
from .heads import HEADS
from .language import TEXT_ENCODERS
from .normalization import MODES
from .views import RGB_NORMALIZATION

Vector = tuple[float, float, float]

_COUNTS = (
    "action_dim",
    "obs_horizon",
    "horizon",
    "execute",
    "noise_draws",
    "sampling_steps",
    "diffusion_steps",
    "num_blocks",
    "fusion_layers",
    "cloud_points",
    "cloud_stride",
)


@dataclass(frozen=True)
class PointMapPolicyConfig:
    """Options of ``PointMapPolicy``; the defaults are the paper's RoboCasa size where it states one.

    cameras: names, in token order; none for a policy on the state alone. image_size: expected (H, W) a
    camera, others are refused; no entry accepts any. crops: the pixels (top, left, height, width) that are
    used; no entry uses all. resize: (H, W) that the encoders see; RGB bilinear with antialiasing, points by
    nearest pixel after unprojection. shift: random shift of at most so many of these pixels in training;
    ``paired_shift`` moves point maps along with their images, the paper moved the images only. augment:
    further changes in training, before all of these.

    modality: the pictures and how their tokens are fused (`vilma.policies.fusion.MODALITIES`): rgb, depth,
    xyz, 6ch, add, cat (the paper's PMP), attention, dp3. modality_dropout: probability that a training sample
    loses one of two modalities. fusion_*: size of the attention fusion. cloud_*: of dp3's point cloud: points
    kept by farthest-point sampling out of every ``cloud_stride``-th pixel, width, with colours.

    rgb_encoder, xyz_encoder: names for ``vilma.pointmap.encoders.build_encoder`` with its options; 6ch takes
    the latter. depth_encoder: None is the RGB encoder's architecture, from scratch. rgb_pretrained: start the
    RGB encoders from the file ``rgb_weights``, or else from timm's hub. encoder_features: width of an
    observation token; encoders of another width get a linear map to it. None: the encoders' own, which must
    then agree.

    depth_range: (near, far) in metres, readings outside are holes. depth_center, depth_scale: the depth
    modality sees (d - center) / scale. workspace: lowest and highest (x, y, z) in the reference frame, points
    outside are holes. point_center, point_scale: the network sees (p - center) / scale; None: raw metres, as
    in the paper. valid_channel: one more channel tells holes from points.

    text_encoder: hashed, table (of ``tasks``) or clip (``text_weights``, embeddings in ``text_cache``).

    frame_state, frame_action: which numbers of state and action are written in the reference frame, first
    indices by kind (`vilma.policies.framed.KINDS`), e.g. {position: [0], quaternion: [3]}. Needed by
    ``augment.frame_*``, which displaces the frame of the points: these move along. {}: none, so that the
    points alone are displaced (cameras calibrated badly against the robot).

    use_state adds one token from ``observation.state`` (state_dim). action_normalization and
    state_normalization: mean_std, min_max or none. gripper_index: action dimensions whose sign is executed
    (-1 or 1). ``horizon`` actions are predicted from obs_horizon observations, the first ``execute`` are
    executed.

    backbone: xlstm, bixlstm or transformer; dim, num_blocks, num_heads, ffn_factor: its size. xlstm_kernel: a
    backend of ``vilma.xlstm.mlstm``. noise_token: "first" as the paper, or "last": after the observations,
    which are then read once a chunk instead of at every denoising step.

    head: edm, ddpm, ddim, flow or regression. sigma_*, noise_*, sampler, schedule: of edm. diffusion_steps,
    beta_schedule, prediction, clip_sample: of ddpm and ddim. flow_times: of flow. sampling_steps: of all.
    noise_draws: noise levels for each sample, on one encoding. loss_on_padding: count the padded actions
    after an episode's end in the loss.
    """

    cameras: tuple[str, ...]
    action_dim: int
    reference_frame: str
    action_kind: str
    type: str = "pointmap"
    modality: str = "cat"
    modality_dropout: float = 0.0
    fusion_dim: int = 512
    fusion_layers: int = 4
    fusion_heads: int = 8
    cloud_points: int = 512
    cloud_stride: int = 1
    cloud_features: int = 64
    cloud_colors: bool = False
    image_size: dict[str, tuple[int, int]] = field(default_factory=dict)
    crops: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    resize: dict[str, tuple[int, int]] = field(default_factory=dict)
    shift: dict[str, int] = field(default_factory=dict)
    paired_shift: bool = True
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    frame_state: dict[str, tuple[int, ...]] | None = None
    frame_action: dict[str, tuple[int, ...]] | None = None
    rgb_encoder: str = "convnextv2_tiny"
    rgb_encoder_options: dict[str, Any] = field(default_factory=dict)
    rgb_pretrained: bool = False
    rgb_weights: str | None = None
    rgb_normalization: str = "imagenet"
    depth_encoder: str | None = None
    depth_encoder_options: dict[str, Any] = field(default_factory=dict)
    xyz_encoder: str = "convnextv2_tiny"
    xyz_encoder_options: dict[str, Any] = field(default_factory=dict)
    encoder_features: int | None = None
    depth_range: tuple[float, float] | None = None
    depth_center: float = 0.0
    depth_scale: float = 1.0
    workspace: tuple[Vector, Vector] | None = None
    point_center: Vector | None = None
    point_scale: Vector | None = None
    valid_channel: bool = True
    text_encoder: str = "hashed"
    text_dim: int = 512
    text_weights: str = "openai"
    text_cache: str | None = None
    tasks: tuple[str, ...] = ()
    use_state: bool = False
    state_dim: int = 0
    state_normalization: str = "mean_std"
    action_normalization: str = "min_max"
    gripper_index: tuple[int, ...] = ()
    obs_horizon: int = 1
    horizon: int = 10
    execute: int = 10
    backbone: str = "xlstm"
    dim: int = 512
    num_blocks: int = 8
    num_heads: int = 8
    ffn_factor: float | None = None
    xlstm_kernel: str = "auto"
    noise_token: str = "first"
    head: str = "edm"
    sigma_min: float = 0.001
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    noise_loc: float = math.log(0.5)
    noise_scale: float = 0.5
    noise_draws: int = 1
    sampler: str = "ddim"
    schedule: str = "exponential"
    sampling_steps: int = 4
    diffusion_steps: int = 100
    beta_schedule: str = "squaredcos_cap_v2"
    prediction: str = "epsilon"
    clip_sample: float | None = None
    flow_times: str = "uniform"
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
            "text_encoder": TEXT_ENCODERS,
            "backbone": BACKBONES,
            "noise_token": ("first", "last"),
            "head": HEADS,
            "sampler": tuple(edm.SAMPLERS),
            "schedule": tuple(edm.SCHEDULES),
            "prediction": ("epsilon", "sample", "v_prediction"),
            "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
            "flow_times": ("uniform", "logit_normal"),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if len(set(self.cameras)) < len(self.cameras) or not (self.cameras or self.use_state):
            raise ValueError(
                f"cameras must name at least one camera, each once; got {list(self.cameras)}. A policy on "
                "the state alone needs use_state"
            )
        if not self.cameras and self.modality == "dp3":
            raise ValueError("modality dp3 makes one cloud of all cameras, and cameras names none")
        for camera in self.cameras:
            if not re.fullmatch(r"\w+", camera):
                raise ValueError(f"a camera name consists of letters, digits and underscores; got {camera!r}")
        for name in ("image_size", "crops", "resize", "shift"):
            unknown = [camera for camera in getattr(self, name) if camera not in self.cameras]
            if unknown:
                raise ValueError(
                    f"{name} names {', '.join(unknown)}; the cameras are {', '.join(self.cameras)}"
                )
        for name in _COUNTS:
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
        self._check_frame_jitter()
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"wanted 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")
        if self.point_scale is not None and min(self.point_scale) <= 0:
            raise ValueError(f"point_scale must be positive, got {list(self.point_scale)}")
        if self.depth_scale <= 0:
            raise ValueError(f"depth_scale must be positive, got {self.depth_scale}")
        if self.workspace is not None and any(low >= high for low, high in zip(*self.workspace)):
            raise ValueError(f"every minimum of workspace must be below its maximum, got {self.workspace}")
        if any(pixels < 0 for pixels in self.shift.values()):
            raise ValueError(f"shift counts pixels and cannot be negative, got {self.shift}")
        if not 0 <= self.modality_dropout < 1:
            raise ValueError(f"modality_dropout must lie in [0, 1), got {self.modality_dropout}")
        if self.modality_dropout and len(MODALITIES[self.modality].streams) < 2:
            raise ValueError(f"modality_dropout needs two modalities, {self.modality!r} has one: set it to 0")
        if self.rgb_weights is not None and not self.rgb_pretrained:
            raise ValueError("rgb_weights names a file, but rgb_pretrained is false: set it to true")
        if self.head in ("ddpm", "ddim") and self.sampling_steps > self.diffusion_steps:
            raise ValueError(
                f"sampling_steps ({self.sampling_steps}) must not exceed diffusion_steps "
                f"({self.diffusion_steps})"
            )

    def _check_frame_jitter(self) -> None:
        framed.check_parts(self.frame_action or {}, self.action_dim, "frame_action")
        framed.check_parts(self.frame_state or {}, self.state_dim, "frame_state")
        if not self.augment.moves_frame:
            return
        if self.reference_frame == "camera" or not {"xyz", "xyzrgb"} & set(MODALITIES[self.modality].streams):
            raise ValueError(
                "augment.frame_translation and frame_rotation displace points in a frame that the cameras "
                f"share; modality {self.modality!r} in the {self.reference_frame} frame has none: set them "
                "to 0"
            )
        silent = ["frame_action"] * (self.frame_action is None)
        silent += ["frame_state"] * (self.use_state and self.frame_state is None)
        if silent:
            raise ValueError(
                "augment.frame_translation and frame_rotation displace the points; say with "
                f"{' and '.join(silent)} which numbers are written in the same frame and move along, e.g. "
                "{position: [0], quaternion: [3]}, or {} for none (cameras calibrated badly)"
            )
