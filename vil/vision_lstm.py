"""Vision-LSTM for timm: the whole family, both published generations.

Vision-LSTM: xLSTM as Generic Vision Backbone (Alkin, Beck, Pöppel, Hochreiter and Brandstetter, arXiv
2406.04303). Patches pass through residual mLSTM layers that traverse them row by row, forward and backward in
turn.

Generation 1 (``vil_*``) has causal 1-D convolutions and no biases; generation 2 (``vil2_*``) has 2-D
convolutions, biases, pairs of layers as blocks, and concatenates the first and last token for the classifier.
Official weights of both load unchanged: see `vilma.vil.checkpoints`.

Shapes: B batch, C channels of the image, (Y, X) grid of tokens, d width, E inner width.
"""

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function
from timm.models._manipulate import checkpoint, checkpoint_seq
from torch import Tensor, nn

from vilma.xlstm.layers import LayerNorm

from .checkpoints import checkpoint_filter_fn, resize_positions
from .layers import ViLBlock, ViLBlockPair, ViLLayer
from .patches import PatchEmbed, positive_pair

__all__ = ["VisionLSTM", "checkpoint_filter_fn"]

POOLS = ("", "avg", "first", "bilateral_avg", "bilateral_flatten")
CONVOLUTIONS = ("2d", "causal1d")
INITS = ("original", "original-fixed")


@register_notrace_function
def add_positions(x: Tensor, table: Tensor) -> Tensor:
    """x (B, Y, X, d) + table (1, ., ., d), resized to the grid of x where it has another one."""
    return x + resize_positions(table, x.shape[1], x.shape[2])


class VisionLSTM(nn.Module):
    """Vision-LSTM (arXiv 2406.04303); the defaults are those of generation 2.

    Args:
        img_size: nominal size of an image, from which the position table has its size. Other sizes and aspect
            ratios work unless ``dynamic_img_size=False``: the table is resized (bicubic) as they come.
        patch_size, stride: of the patches; stride defaults to patch_size, a smaller one overlaps them.
        in_chans, num_classes: of the image and of the classifier (0: none).
        global_pool: ``bilateral_flatten`` (first and last token side by side), ``bilateral_avg`` (their
            mean), ``avg``, ``first``, or ``''`` for the map.
        embed_dim, depth: width and number of blocks (pairs of sub-blocks if ``paired``).
        num_heads, expansion, qkv_block_width: of each mLSTM layer.
        paired: blocks are pairs of a forward and a backward sub-block, else single ones in turn.
        conv_kind, conv_kernel_size: ``2d`` (odd kernel) or ``causal1d``.
        proj_bias, norm_bias: biases of the projections and of the norms inside blocks and behind them.
        final_norm, norm_eps: the norm behind the last block.
        fc_norm, fc_norm_eps: a LayerNorm between pooling and classifier.
        drop_rate, drop_path_rate, drop_path_decay: dropout before the classifier; stochastic depth, the
            same at each depth unless drop_path_decay has it grow from 0.
        init_mode: ``original`` (as the official models were trained) or ``original-fixed`` (its scale
            divided by the number of sub-blocks, as was intended).
        dynamic_img_size, dynamic_img_pad: take images of any size; pad them to whole patches.

    Raises:
        ValueError: options that are not known or do not fit together.
    """

    __jit_unused_properties__ = ("head_hidden_size",)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "bilateral_flatten",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 4,
        expansion: int = 2,
        qkv_block_width: int = 4,
        paired: bool = True,
        conv_kind: str = "2d",
        conv_kernel_size: int = 3,
        proj_bias: bool = True,
        norm_bias: bool = True,
        final_norm: bool = True,
        norm_eps: float = 1e-6,
        fc_norm: bool = True,
        fc_norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_decay: bool = False,
        init_mode: str = "original",
        dynamic_img_size: bool = True,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _check("global_pool", global_pool, POOLS)
        _check("conv_kind", conv_kind, CONVOLUTIONS)
        _check("init_mode", init_mode, INITS)
        _check_counts(
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            expansion=expansion,
            qkv_block_width=qkv_block_width,
            conv_kernel_size=conv_kernel_size,
        )
        _check_classes(num_classes)
        if conv_kind == "2d" and conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size={conv_kernel_size}: a 2d convolution needs an odd one")
        inner = expansion * embed_dim
        if inner % num_heads or inner % qkv_block_width:
            raise ValueError(
                f"the inner width expansion * embed_dim = {inner} must be a multiple of "
                f"num_heads={num_heads} and of qkv_block_width={qkv_block_width}"
            )
        img_size, patch_size = positive_pair("img_size", img_size), positive_pair("patch_size", patch_size)
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.embed_dim = embed_dim
        self.paired, self.init_mode, self.dynamic_img_size = paired, init_mode, dynamic_img_size
        self.output_fmt, self.grad_checkpointing = "NHWC", False

        stride = patch_size if stride is None else positive_pair("stride", stride)
        self.patch_embed = PatchEmbed(
            img_size, patch_size, stride, in_chans, embed_dim, dynamic_img_size, dynamic_img_pad, **dd
        )
        self.pos_embed = nn.Parameter(torch.empty(1, *self.patch_embed.grid_size, embed_dim, **dd))
        rates = [drop_path_rate] * depth
        if drop_path_decay:
            rates = [drop_path_rate * j / max(depth - 1, 1) for j in range(depth)]
        block = dict(
            dim=embed_dim,
            num_heads=num_heads,
            expansion=expansion,
            block_width=qkv_block_width,
            conv_kind=conv_kind,
            conv_kernel_size=conv_kernel_size,
            proj_bias=proj_bias,
            norm_bias=norm_bias,
            **dd,
        )
        if paired:
            blocks = [ViLBlockPair(drop_path=rate, **block) for rate in rates]
        else:
            blocks = [ViLBlock(drop_path=rate, reverse=j % 2 == 1, **block) for j, rate in enumerate(rates)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Identity()
        if final_norm:
            self.norm = LayerNorm(embed_dim, norm_bias, norm_eps, residual_weight=True).to(**dd)
        self.feature_info = [
            {"module": f"blocks.{j}", "num_chs": embed_dim, "reduction": max(stride)} for j in range(depth)
        ]
        width = self.head_hidden_size
        self.fc_norm = nn.LayerNorm(width, eps=fc_norm_eps, **dd) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(width, num_classes, **dd) if num_classes > 0 else nn.Identity()
        if self.pos_embed.device.type != "meta":
            self.init_weights()

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier sees: 2 d for ``bilateral_flatten``, else d."""
        return self.num_features * (2 if self.global_pool == "bilateral_flatten" else 1)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise every parameter as the official code does (which needs no reset of modules before)."""
        trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed.reset_parameters()
        layers = [module for module in self.modules() if isinstance(module, ViLLayer)]
        for layer in layers:
            layer.reset_parameters(len(layers) if self.init_mode == "original-fixed" else 1)
        for module in self.modules():
            if isinstance(module, LayerNorm | nn.LayerNorm):
                module.reset_parameters()
        if isinstance(self.head, nn.Linear):
            _init_head(self.head)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Stem, pairs of a forward and a backward sub-block, head; the final norm is of the last pair.

        Both sub-blocks of a pair share the rate of layer decay in either generation, as published.
        """
        blocks = [(r"^blocks\.(\d+)", None)]
        if not self.paired:
            count = len(self.blocks)
            blocks = [(rf"^blocks\.(?:{j}|{j + 1})\.", (j // 2,)) for j in range(0, count, 2)]
        return {"stem": r"^pos_embed|^patch_embed", "blocks": [*blocks, (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; a pooling of another width also takes a new fc_norm."""
        dd = get_device_dtype(self)
        _check_classes(num_classes)
        if global_pool is not None:
            _check("global_pool", global_pool, POOLS)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
            old, width = self.fc_norm, self.head_hidden_size
            if isinstance(old, nn.LayerNorm) and old.normalized_shape != (width,):
                self.fc_norm = nn.LayerNorm(width, eps=old.eps, **dd).train(self.training)
                self.fc_norm.requires_grad_(old.weight.requires_grad)
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, **dd)
            if self.head.weight.device.type != "meta":
                _init_head(self.head)
        self.head.train(self.training)

    @torch.jit.ignore
    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Another nominal size: the position table is resized, and the patch kernel resampled."""
        self.patch_embed.set_input_size(img_size, patch_size)
        rows, columns = self.patch_embed.grid_size
        if self.pos_embed.shape[1:3] != (rows, columns):
            with torch.no_grad():
                table = resize_positions(self.pos_embed, rows, columns)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [dict(info, reduction=reduction) for info in self.feature_info]
        _record_input_size(self, self.patch_embed.img_size, patch_size)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, height, width) -> (B, Y, X, d), normalised."""
        x = add_positions(self.patch_embed(x), self.pos_embed)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        """(B, Y, X, d) -> (B, d or 2 d), or the map itself."""
        if self.global_pool == "avg":
            return x.mean((1, 2))
        if self.global_pool == "first":
            return x[:, 0, 0]
        if self.global_pool == "bilateral_avg":
            return (x[:, 0, 0] + x[:, -1, -1]) / 2
        if self.global_pool == "bilateral_flatten":
            return torch.cat([x[:, 0, 0], x[:, -1, -1]], -1)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict:
        """Maps behind blocks, each (B, d, Y, X), or (B, Y, X, d) or (B, N, d) with output_fmt NHWC or NLC.

        Args:
            indices: the last n blocks, those of a list (negative ones from the end), or None for all.
            norm: put them through the final norm.
            stop_early: leave out the blocks behind the last one that is wanted, and the final norm.
            intermediates_only: return the list, else also the result of `forward_features`.
            output_dict: return both by name: image_features, image_intermediates.
        """
        _check("output_fmt", output_fmt, ("NCHW", "NHWC", "NLC"))
        wanted, last = feature_take_indices(len(self.blocks), indices)
        x = add_positions(self.patch_embed(x), self.pos_embed)
        maps = []
        for j, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            if j in wanted:
                maps.append(self.norm(x) if norm else x)
        if output_fmt == "NCHW":
            maps = [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        elif output_fmt == "NLC":
            maps = [y.flatten(1, 2) for y in maps]
        if intermediates_only and not output_dict:
            return maps
        complete = not stop_early or last == len(self.blocks) - 1
        if output_dict:
            result = {"image_intermediates": maps}
            if not intermediates_only:
                result["image_features"] = self.norm(x) if complete else x
            return result
        return (self.norm(x) if complete else x), maps

    @torch.jit.ignore
    def get_intermediate_layers(
        self, x: Tensor, n: int | list[int] = 1, reshape: bool = False, norm: bool = False
    ) -> list[Tensor]:
        """Maps behind the last n blocks or those of a list: (B, N, d), or (B, d, Y, X) with ``reshape``."""
        return self.forward_intermediates(
            x, n, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True
        )

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last of ``indices``, classifier and norm; returns the indices."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return wanted


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, known))}")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}; pass at least 1")


def _check_classes(num_classes: int) -> None:
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes}; pass their number, or 0 for no classifier")


def _init_head(head: nn.Linear) -> None:
    trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)


def _record_input_size(model: nn.Module, img_size: tuple[int, int], patch_size) -> None:
    """Where timm keeps what a model was changed to (newer versions do)."""
    try:
        from timm.models._input import update_model_input_size
    except ImportError:
        return
    update_model_input_size(model, img_size, patch_size=patch_size)


def _cfg(file: str | None, top1: float, stride: int = 16, **kwargs) -> dict:
    """A pretrained configuration: ``file`` at the official address, its accuracy in the description."""
    side = (224 - 16) // stride + 1
    return {
        "url": f"https://ml.jku.at/research/vision_lstm/download/{file}.th" if file else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (side, side),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "description": f"ImageNet-1K top-1 {top1} % at 224 px, as published",
        "origin_url": "https://github.com/NX-AI/vision-lstm",
        "paper_name": "Vision-LSTM: xLSTM as Generic Vision Backbone",
        "paper_ids": "arXiv:2406.04303",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vil_tiny_patch16_224.e800_in1k": _cfg("vil_tiny16_e800_in1k", 77.3),
        "vil_tiny_patch16_224.e400_in1k": _cfg("vil_tiny16_e400_in1k", 76.1),
        "vil_tinyplus_patch16_224.e800_in1k": _cfg("vil_tinyplus16_e800_in1k", 78.1),
        "vil_tinyplus_patch16_224.e400_in1k": _cfg("vil_tinyplus16_e400_in1k", 77.2),
        "vil_small_patch16_224.e400_in1k": _cfg("vil_small16_e400_in1k", 80.7),
        "vil_smallplus_patch16_224.e400_in1k": _cfg("vil_smallplus16_e400_in1k", 80.9),
        "vil_base_patch16_224.e400_in1k": _cfg("vil_base16_e400_in1k", 81.6),
        # accuracy published, weights not: the official entry of this name fetches those of stride 16
        "vil_tinyplus_patch16_stride8_224.untrained": _cfg(
            None,
            80.0,
            stride=8,
            description="ImageNet-1K top-1 80.0 % at 224 px, as published (weights not published)",
        ),
        "vil_smallplus_patch16_stride8_224.e400_in1k": _cfg(
            "vil_smallplus16_e400_in1k_stride8", 82.2, stride=8
        ),
        "vil_base_patch16_stride8_224.e400_in1k": _cfg("vil_base16_e400_in1k_stride8", 82.7, stride=8),
        "vil2_tiny_patch16_224.e800_in1k": _cfg("vil2_tiny16_e800_in1k", 78.3),
        "vil2_tiny_patch16_224.e400_in1k": _cfg("vil2_tiny16_e400_in1k", 77.2),
        "vil2_small_patch16_224.e400_in1k": _cfg("vil2_small16_e400_in1k", 81.5),
        "vil2_base_patch16_224.e400_in1k": _cfg("vil2_base16_e400_in1k", 82.4),
    }
)

GENERATION_1 = {
    "global_pool": "bilateral_avg",
    "paired": False,
    "conv_kind": "causal1d",
    "conv_kernel_size": 4,
    "proj_bias": False,
    "norm_bias": False,
    "norm_eps": 1e-5,
    "fc_norm_eps": 1e-6,
}


def _create_vil(variant: str, pretrained: bool = False, **kwargs) -> VisionLSTM:
    if kwargs.get("features_only"):
        kwargs["num_classes"] = 0  # which a checkpoint then need not have either
    out_indices = kwargs.pop("out_indices", min(3, kwargs["depth"]))
    return build_model_with_cfg(
        VisionLSTM,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def vil_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = dict(GENERATION_1, embed_dim=192, depth=24)
    return _create_vil("vil_tiny_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vil_tinyplus_patch16_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = dict(GENERATION_1, embed_dim=192, depth=29)
    return _create_vil("vil_tinyplus_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vil_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = dict(GENERATION_1, embed_dim=384, depth=24)
    return _create_vil("vil_small_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vil_smallplus_patch16_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = dict(GENERATION_1, embed_dim=384, depth=26)
    return _create_vil("vil_smallplus_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vil_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = dict(GENERATION_1, embed_dim=768, depth=24)
    return _create_vil("vil_base_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vil_tinyplus_patch16_stride8_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = dict(GENERATION_1, embed_dim=192, depth=29, stride=8)
    return _create_vil("vil_tinyplus_patch16_stride8_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vil_smallplus_patch16_stride8_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = dict(GENERATION_1, embed_dim=384, depth=26, stride=8)
    return _create_vil("vil_smallplus_patch16_stride8_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vil_base_patch16_stride8_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = dict(GENERATION_1, embed_dim=768, depth=24, stride=8)
    return _create_vil("vil_base_patch16_stride8_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vil2_tiny_patch16_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = {"embed_dim": 192, "depth": 12}
    return _create_vil("vil2_tiny_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vil2_small_patch16_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = {"embed_dim": 384, "depth": 12}
    return _create_vil("vil2_small_patch16_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vil2_base_patch16_224(pretrained: bool = False, **kwargs) -> VisionLSTM:
    model_args = {"embed_dim": 768, "depth": 12}
    return _create_vil("vil2_base_patch16_224", pretrained, **dict(model_args, **kwargs))
