"""PointMapPolicy (arXiv 2510.20406): a diffusion policy on RGB images and structured point maps.

One encoder a camera and modality gives one token a picture (or several); fused (``fusion.py``), they
condition, with the task text and the noise level, a denoiser (``denoiser.py``) over chunks of actions,
trained and sampled by a head (``heads.py``): the paper's is the causal xLSTM with EDM.

B batch, To observation steps, N = B To pictures, K tokens of a picture, H horizon, A action size, n
observation tokens, E width of a text's vector.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vilma.pointmap.augment import frame_jitter
from vilma.pointmap.check import warn_about_geometry
from vilma.pointmap.encoders import build_encoder

from . import framed
from .denoiser import Denoiser
from .fusion import FUSIONS, MODALITIES
from .heads import build_head
from .language import build_text_encoder
from .normalization import Normalizer
from .pointmap_config import PointMapPolicyConfig
from .policy import Policy
from .views import Views

__all__ = ["PointMapPolicy", "PointMapPolicyConfig"]

_CLOUD = "cloud"  # stands for all cameras where one cloud is made of them


class PointMapPolicy(Policy):
    """The policy; ``stats`` are a data set's statistics, ``pretrained=False`` builds the encoders without
    looking for their pretrained weights (when a checkpoint follows)."""

    config_class = PointMapPolicyConfig

    def __init__(
        self, config: PointMapPolicyConfig, stats: Mapping[str, Any] | None = None, *, pretrained: bool = True
    ):
        super().__init__(config)
        c = config
        modality = MODALITIES[c.modality]
        self.merges_cameras = modality.merges_cameras
        self.streams = ("xyzrgb",) if self.merges_cameras and c.cloud_colors else modality.streams
        self.views = Views(c, self.streams, c.valid_channel or self.merges_cameras)
        self.text = build_text_encoder(
            c.text_encoder, c.text_dim, tasks=c.tasks, weights=c.text_weights, cache=c.text_cache
        )
        cameras = (_CLOUD,) if self.merges_cameras else c.cameras
        self.encoders = nn.ModuleDict(
            {
                f"{camera}_{stream}": self._encoder(stream, pretrained)
                for camera in cameras
                for stream in self.streams
            }
        )
        widths = {encoder.num_features for encoder in self.encoders.values()}
        if c.encoder_features is None and len(widths) > 1:
            raise ValueError(
                f"the encoders give tokens of different widths {sorted(widths)}: set encoder_features"
            )
        width = c.encoder_features or (widths.pop() if widths else c.dim)
        self.adapters = nn.ModuleDict(
            {
                name: nn.Linear(encoder.num_features, width)
                for name, encoder in self.encoders.items()
                if encoder.num_features != width
            }
        )
        sizes = {"dim": c.fusion_dim, "layers": c.fusion_layers, "heads": c.fusion_heads, "cameras": cameras}
        self.fusion = FUSIONS[modality.fusion](
            self.streams,
            width,
            c.modality_dropout,
            **(sizes if modality.fusion == "attention" else {}),
        )
        width = self.fusion.width
        self.state_proj = nn.Linear(c.state_dim, width) if c.use_state else None
        self.head = build_head(c)
        self.denoiser = Denoiser(
            latent_dim=width,
            goal_dim=c.text_dim,
            action_dim=c.action_dim,
            num_obs_tokens=c.obs_horizon * (self._count_tokens(cameras) + c.use_state),
            horizon=c.horizon,
            dim=c.dim,
            num_blocks=c.num_blocks,
            num_heads=c.num_heads,
            backbone=c.backbone,
            noise_token=c.noise_token if self.head.takes_noise else "none",
            ffn_factor=c.ffn_factor,
            kernel=c.xlstm_kernel,
        )
        self.action_normalizer = Normalizer(c.action_normalization, c.action_dim, "action")
        self.state_normalizer = (
            Normalizer(c.state_normalization, c.state_dim, "observation.state") if c.use_state else None
        )
        if stats:
            self.set_statistics(stats)
        self._looked_at_geometry = False

    @property
    def observation_keys(self) -> tuple[str, ...]:
        return self.views.keys + ("observation.state",) * self.config.use_state

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
        """The head's loss of a batch: the observation keys (B, To, ...), ``task``, ``action`` (B, H, A) whose
        first step belongs to the last observation, and ``action_is_pad`` (B, H) if some are padding.

        Augmentation draws from ``seed`` (B,) int64 where the batch has one. The first batch in training mode
        is looked at for geometry of another convention (`vilma.pointmap.warn_about_geometry`).
        """
        c = self.config
        self._check_present(batch)
        self._look_at_geometry(batch)
        action, mask = self.targets(batch)
        seeds = self.views.draw(len(action), action.device, batch.get("seed"))
        if seeds is not None and self.training and c.augment.moves_frame:
            motion = frame_jitter(c.augment, seeds)
            action = framed.moved(action, c.frame_action, motion)
            if c.use_state:
                state = batch["observation.state"].float()
                batch = {**batch, "observation.state": framed.moved(state, c.frame_state, motion)}
        action = self.action_normalizer.normalize(action)
        context = self.context(batch, self.text(batch["task"]), seeds)
        if c.noise_draws > 1 and self.head.takes_noise:
            context, action = (x.repeat_interleave(c.noise_draws, 0) for x in (context, action))
            mask = None if mask is None else mask.repeat_interleave(c.noise_draws, 0)
        loss = self.head.loss(lambda x, s: self.denoiser(x, s, context), action, mask)
        return loss, {"loss": loss.detach()}

    def targets(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The checked actions (B, H, A) of a batch in their own units, and where they count in the loss,
        (B, H) bool; None: everywhere."""
        c, count = self.config, len(batch["task"])
        if "action" not in batch:
            raise ValueError(f"the batch lacks action; it has {', '.join(sorted(batch))}")
        action = batch["action"].float()
        if action.shape != (count, c.horizon, c.action_dim):
            wanted = (count, c.horizon, c.action_dim)
            raise ValueError(f"action must have shape {wanted}, got {tuple(action.shape)}")
        if "action_is_pad" not in batch or c.loss_on_padding:
            return action, None
        is_pad = batch["action_is_pad"]
        if is_pad.shape != (count, c.horizon):
            raise ValueError(f"action_is_pad must have shape {(count, c.horizon)}, got {tuple(is_pad.shape)}")
        return action, ~is_pad.bool()

    def predict_chunk(
        self, obs: Mapping[str, Any], generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        self._check_present(obs)
        goal = self.text(obs["task"])
        shape = self.head.noise_shape(self.config.horizon, self.config.action_dim)
        if generators is None:
            noise = torch.randn(len(goal), *shape, device=goal.device)
        else:
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(goal.device)
        return self.chunk(obs, goal, noise)

    def chunk(self, obs: Mapping[str, Any], goal: Tensor, noise: Tensor) -> Tensor:
        """Actions (B, H, A) in their own units from observations (B, To, ...), the task's vectors (B, E) and
        noise (B, ...) of the head's `noise_shape`.

        A fixed sequence of operations on the device: nothing is drawn, no value is looked at and nothing is
        copied from the host, so that a CUDA graph can hold all of it.
        """
        context = self.context(obs, goal)
        memory = self.denoiser.remember(context)
        action = self.head.sample(lambda x, s: self.denoiser(x, s, context, memory), noise)
        action = self.action_normalizer.unnormalize(action)
        for index in self.config.gripper_index:
            action[..., index] = torch.where(action[..., index] >= 0, 1.0, -1.0)
        return action

    def encode(self, obs: Mapping[str, Any]) -> Tensor:
        """Context (B, 1 + n, D) of the denoiser from observations (B, To, ...): all that is free of noise."""
        self._check_present(obs)
        return self.context(obs, self.text(obs["task"]))

    def context(self, obs: Mapping[str, Any], goal: Tensor, seeds: Tensor | None = None) -> Tensor:
        """As `encode`, for task vectors (B, E); seeds (B,) of the augmentation, drawn if none are given."""
        c = self.config
        batch, steps = len(goal), c.obs_horizon
        cond = goal.repeat_interleave(steps, 0)
        seeds = self.views.draw(batch, goal.device) if seeds is None else seeds
        lost = self.fusion.draw(batch, goal.device)
        lost = None if lost is None else lost.repeat_interleave(steps, 0)
        tokens = []
        for camera, pictures in self._pictures(obs, seeds):
            found = {}
            for stream, picture in pictures.items():
                name = f"{camera}_{stream}"
                token = self.encoders[name](picture, cond)
                token = self.adapters[name](token) if name in self.adapters else token
                found[stream] = token[:, None] if token.ndim == 2 else token
            tokens.append(self.fusion(camera, found, lost))
        if self.state_proj is not None:
            state = obs["observation.state"]
            if state.shape != (batch, steps, c.state_dim):
                wanted = (batch, steps, c.state_dim)
                raise ValueError(f"observation.state must have shape {wanted}, got {tuple(state.shape)}")
            state = self.state_normalizer.normalize(state.float())
            tokens.append(self.state_proj(state.flatten(0, 1))[:, None])
        joined = torch.cat(tokens, dim=1)
        return self.denoiser.context(joined.view(batch, -1, joined.shape[-1]), goal[:, None])

    def pictures(self, obs: Mapping[str, Any], camera: str) -> dict[str, Tensor]:
        """What the encoders of ``camera`` see, {stream: (N, C, h, w)} (`vilma.policies.views.Views`)."""
        return self.views(obs, camera, self.views.draw(len(obs["task"]), self.device))

    def _pictures(self, obs: Mapping[str, Any], seeds: Tensor | None):
        pictures = [(camera, self.views(obs, camera, seeds)) for camera in self.config.cameras]
        if not self.merges_cameras:
            return pictures
        stride, stream = self.config.cloud_stride, self.streams[0]
        flat = [p[stream][..., ::stride, ::stride].flatten(2) for _, p in pictures]
        return [(_CLOUD, {stream: torch.cat(flat, dim=2)[:, :, None]})]

    def _encoder(self, stream: str, pretrained: bool) -> nn.Module:
        c = self.config
        channels = self.views.channels(stream)
        if self.merges_cameras:
            return build_encoder(
                "point_cloud", channels, num_features=c.cloud_features, points=c.cloud_points
            )
        if stream == "rgb":
            weights = {"pretrained": c.rgb_pretrained and pretrained, "weights": c.rgb_weights}
            return build_encoder(c.rgb_encoder, channels, c.text_dim, **weights, **c.rgb_encoder_options)
        if stream == "depth":
            name = c.depth_encoder or c.rgb_encoder
            options = c.depth_encoder_options if c.depth_encoder else c.rgb_encoder_options
            return build_encoder(name, channels, c.text_dim, **(options | c.depth_encoder_options))
        return build_encoder(c.xyz_encoder, channels, c.text_dim, **c.xyz_encoder_options)

    @torch.no_grad()
    def _count_tokens(self, cameras: Sequence[str]) -> int:
        """Observation tokens of one step; encoders with local tokens are tried on a blank picture."""
        count = 0
        for camera in cameras:
            found = {}
            for stream in self.streams:
                encoder = self.encoders[f"{camera}_{stream}"]
                found[stream] = 1
                if getattr(encoder, "local_tokens", False):
                    size = self.views.picture_size(camera)
                    if size is None:
                        raise ValueError(
                            f"local tokens need the size of the pictures of {camera}: set image_size, "
                            "crops or resize"
                        )
                    weight = next(encoder.parameters())
                    blank = weight.new_zeros(1, self.views.channels(stream), *size)
                    training = encoder.training
                    tokens = encoder.eval()(blank, weight.new_zeros(1, self.config.text_dim))
                    encoder.train(training)
                    found[stream] = tokens.shape[1]
            kind = MODALITIES[self.config.modality].fusion
            if kind == "add":
                count += max(found.values())
            else:
                count += 1 if kind == "attention" else sum(found.values())
        return count

    def _look_at_geometry(self, batch: Mapping[str, Any]) -> None:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or capturing or self._looked_at_geometry or not self.training:
            return
        self._looked_at_geometry = True
        c = self.config
        warn_about_geometry(
            batch,
            c.cameras,
            reference_frame=c.reference_frame,
            depth_range=c.depth_range,
            workspace=c.workspace,
            stacklevel=6,  # forward, two frames of nn.Module, and who called the policy
        )

    def _check_present(self, obs: Mapping[str, Any]) -> None:
        absent = [key for key in (*self.observation_keys, "task") if key not in obs]
        if absent:
            raise ValueError(f"the observation lacks {', '.join(absent)}; it has {', '.join(sorted(obs))}")
        if isinstance(obs["task"], str) or not len(obs["task"]):
            raise ValueError(f"task must be a list of B strings, got {obs['task']!r}")
        for key in self.observation_keys:
            if not isinstance(obs[key], Tensor):
                raise ValueError(f"{key} must be a tensor (B, To, ...), got {type(obs[key]).__name__}")
