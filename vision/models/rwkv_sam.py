"""RWKV-SAM's image encoder: convolutions down to stride 16, then RWKV blocks.

Paper: Mamba or RWKV: Exploring High-Quality and High-Efficiency Segment Anything Model,
arXiv:2406.19369. Written from its description; the authors published no weights.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d, to_2tuple, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision.layers.activation import gelu
from vision.layers.block import Block
from vision.layers.conv import MBConv, MBConvBlock, map_to_tokens, tokens_to_map
from vision.layers.init import depth_ratio
from vision.layers.padding import pad_to_multiple
from vision.layers.pos_embed import resample_pos_embed

from .checkpoint import with_weights_of_file
from .classifier import TokenClassifier
from .rwkv_sam_weights import checkpoint_filter_fn

__all__ = ["ATTN_TYPES", "RwkvSamEncoder", "checkpoint_filter_fn"]

_STRIDE = 16  # of the token grid, in pixels
_EPS = 1e-6
# The mixed kinds single out these blocks whatever the depth: a network of 2 blocks has none.
_SINGLED_OUT = frozenset({2, 5, 8, 11})


def _mixed(single: str, other: str) -> Callable[[int], str]:
    return lambda layer: single if layer in _SINGLED_OUT else other


# The kind of block `layer`: rwkv, transformer or mbconv.
ATTN_TYPES: dict[str, Callable[[int], str]] = {
    "rwkv": lambda layer: "rwkv",
    "transformer": lambda layer: "transformer",
    "rwkv_transformer": _mixed("transformer", "rwkv"),
    "mbconv_rwkv": _mixed("rwkv", "mbconv"),
    "rwkv_mbconv": _mixed("mbconv", "rwkv"),
}


class Stem(nn.Module):
    """Two 3 x 3 convolutions, the first of stride 2, with a norm and a GELU between them.

    Args:
        in_chans: channels of the image.
        dim: channels of the output.
    """

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, 3, 2, 1)
        self.norm = LayerNorm2d(dim, eps=_EPS)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:  # always; the type allows none
                nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to a map (B, dim, H/2, W/2)."""
        # All that follows the norm runs in channels_last; a CPU is six times faster in it here.
        x = x.contiguous(memory_format=torch.channels_last)
        return self.conv2(gelu(self.norm(self.conv1(x))))


class RwkvSamEncoder(TokenClassifier):
    """Hybrid image encoder with a classification head; follows timm's model contract.

    Stem and two stages of `MBConv` give maps of stride 4 and 8, a convolution the tokens of stride
    16, on which the blocks work. Four outputs, in `forward_intermediates` and `features_only`:

    - stride 4, stride 8;
    - stride 16: the tokens after block `depth // 2`, without a norm;
    - stride 16: the tokens after the last block and the final norm.

    With `final_stage` the last two are the tokens after the final norm, and those brought to
    stride 32 by an `MBConv` that doubles the channels.

    Any input size of at least one pixel is accepted: sizes that are no multiple of 16 are padded
    with zeros at the bottom and the right, so the maps cover whole multiples of 16 pixels.

    Args:
        img_size: image height and width in pixels of the learnt position embedding.
        in_chans: channels of the input image.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: avg, max, avgmax, or "" to keep the tokens.
        embed_dims: channels at strides 4, 8 and 16; the stem has the first.
        conv_depths: number of `MBConv` at strides 4 and 8.
        depth: number of blocks at stride 16.
        mlp_ratio: hidden width of a block over its channels.
        attn_type: kind of each block, a name in `ATTN_TYPES`. The mixed kinds set the blocks 2, 5,
            8 and 11 apart, as far as there are so many.
        mixer: token mixer of the rwkv blocks, a name in `vision.layers.MIXERS`.
        mixer_options: options of that mixer.
        num_heads: heads of the transformer blocks.
        use_pos_embed: learn a position embedding; it is resampled to other sizes.
        final_stage: put out a map of stride 32 (see above).
        init_values: first value of the rwkv blocks' layer scale; None for no layer scale.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last rwkv or transformer block; rises linearly
            from 0.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "max", "avgmax"] = "avg",
        embed_dims: tuple[int, int, int] = (64, 128, 384),
        conv_depths: tuple[int, int] = (2, 4),
        depth: int = 14,
        mlp_ratio: float = 2.0,
        attn_type: str = "rwkv",
        mixer: str = "bi_wkv",
        mixer_options: Mapping[str, Any] | None = None,
        num_heads: int = 6,
        use_pos_embed: bool = False,
        final_stage: bool = False,
        init_values: float | None = 1e-2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        dim = embed_dims[2]
        width = 2 * dim if final_stage else dim
        super().__init__(num_classes, global_pool, width, width)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if attn_type not in ATTN_TYPES:
            raise ValueError(f"no attn_type {attn_type!r}; there are {', '.join(ATTN_TYPES)}")
        self.middle = depth // 2  # the block whose output is the third, without final_stage

        self.stem = Stem(in_chans, embed_dims[0])
        inputs = (embed_dims[0], *embed_dims[:2])
        self.stages = nn.ModuleList(
            nn.Sequential(
                MBConv(inputs[i], embed_dims[i], stride=2),
                *(MBConv(embed_dims[i], embed_dims[i]) for _ in range(conv_depths[i] - 1)),
            )
            for i in range(2)
        )
        self.pool: nn.Module = nn.Sequential()
        self.pool.add_module("norm", LayerNorm2d(embed_dims[1], eps=_EPS))
        self.pool.add_module("proj", nn.Conv2d(embed_dims[1], dim, 3, 2, 1))
        self.grid_size = _grid(img_size)
        self.pos_embed: nn.Parameter | None = None
        if use_pos_embed:
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid_size), dim))
            trunc_normal_(self.pos_embed, std=0.02)
        rates = [drop_path_rate * depth_ratio(layer, depth) for layer in range(depth)]
        make: dict[str, Callable[[int], nn.Module]] = {
            "rwkv": lambda layer: Block(
                dim,
                layer,
                depth,
                mixer=mixer,
                mixer_options=mixer_options,
                mlp_ratio=mlp_ratio,
                init_values=init_values,
                drop_path=rates[layer],
                norm_eps=_EPS,
            ),
            "transformer": lambda layer: Block(
                dim,
                layer,
                depth,
                mixer="attention",
                mixer_options={"num_heads": num_heads},
                channel_mixer="geglu",
                mlp_ratio=mlp_ratio,
                drop_path=rates[layer],
                norm_eps=_EPS,
            ),
            "mbconv": lambda layer: MBConvBlock(dim, mlp_ratio),
        }
        kind = ATTN_TYPES[attn_type]
        self.blocks = nn.ModuleList(make[kind(layer)](layer) for layer in range(depth))
        self.norm: nn.Module = nn.LayerNorm(dim, eps=_EPS)
        self.final_stage: nn.Module | None = MBConv(dim, 2 * dim, stride=2) if final_stage else None
        names = ["stages.0", "stages.1", f"blocks.{self.middle}", "norm"]
        if final_stage:
            names[2:] = ["norm", "final_stage"]
        widths = (*embed_dims, self.num_features)
        strides = (4, 8, _STRIDE, 2 * _STRIDE if final_stage else _STRIDE)
        self.feature_info = [
            {"module": name, "num_chs": width, "reduction": stride}
            for name, width, stride in zip(names, widths, strides, strict=True)
        ]
        self._add_head(drop_rate)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters of more than one dimension that should not decay."""
        return set() if self.pos_embed is None else {"pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters by depth (timm's layer decay)."""
        return {
            "stem": r"^stem",
            "stages": r"^stages\.(\d+)",
            "pool": r"^pool|^pos_embed",
            "blocks": r"^blocks\.(\d+)"
            if coarse
            else [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
            "final_stage": r"^final_stage",
        }

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another size the native one: resample the position embedding, if any, for good.

        Args:
            img_size: new height and width in pixels, rounded up to multiples of 16.
        """
        old, self.grid_size = self.grid_size, _grid(img_size)
        if self.pos_embed is not None:
            self.pos_embed = nn.Parameter(
                resample_pos_embed(self.pos_embed.detach(), old, self.grid_size),
                self.pos_embed.requires_grad,
            )

    def _run(self, module: nn.Module, *args: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args)
        return module(*args)

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map of stride 8 to the tokens before the first block (B, h*w, C) and the grid (h, w)."""
        x = self.pool(x)
        hw = (x.shape[2], x.shape[3])
        x = map_to_tokens(x)
        if self.pos_embed is not None:
            x = x + resample_pos_embed(self.pos_embed, self.grid_size, hw)
        return x, hw

    def _outputs(self, x: Tensor, norm: bool = False) -> Iterator[Tensor]:
        """Yield the four maps (B, C, h, w), each computed when it is asked for.

        With `norm` the final norm is applied to the tokens after the middle block as well.
        """
        x = self.stem(pad_to_multiple(x, _STRIDE))
        for stage in self.stages:
            for conv in stage.children():
                x = self._run(conv, x)
            yield x
        x, hw = self._tokens(x)
        for i, block in enumerate(self.blocks):
            x = self._run(block, x, hw)
            if i == self.middle and self.final_stage is None:
                yield tokens_to_map(self.norm(x) if norm else x, hw)
        x = tokens_to_map(self.norm(x), hw)
        yield x
        if self.final_stage is not None:
            yield self._run(self.final_stage, x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Run the encoder and collect some of its four outputs (see the class).

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n outputs if a number, all if None, else the outputs named; negative
                numbers count from the end.
            norm: apply the final norm to the tokens of the middle block, too.
            stop_early: do not compute what comes after the last output asked for.
            output_fmt: "NCHW" for maps (B, C, h, w), "NLC" for tokens (B, h*w, C).
            intermediates_only: leave the final map out of the answer.

        Returns:
            The outputs, or (final map (B, C, h, w), outputs).

        Raises:
            ValueError: an unknown output format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        found = []
        for i, y in enumerate(self._outputs(x, norm)):
            if i in take:
                found.append(map_to_tokens(y) if output_fmt == "NLC" else y)
            if i == last and (stop_early or intermediates_only):
                break
        return found if intermediates_only else (y, found)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the outputs `indices` do not need; return the indices kept.

        The final norm stays with an output that it is a part of, whatever `prune_norm` says.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        names = [info["module"] for info in self.feature_info]
        if last < 3 and self.final_stage is not None:
            self.final_stage = nn.Identity()
        if last < names.index("norm"):
            self.blocks = self.blocks[: self.middle + 1]
            if prune_norm or last < 2:
                self.norm = nn.Identity()
        if last < 2:
            self.stages = self.stages[: last + 1]
            self.pool, self.blocks, self.pos_embed = nn.Identity(), nn.ModuleList(), None
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the last map (B, C, h, w)."""
        for y in self._outputs(x):  # noqa: B007 -- the last one is wanted
            pass
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, C, h, w) to logits (B, num_classes), or to what the classifier is fed.

        With `global_pool=""` there is one answer a token, (B, h*w, num_classes).
        """
        return super().forward_head(map_to_tokens(x), pre_logits)


def _grid(img_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = to_2tuple(img_size)
    return math.ceil(height / _STRIDE), math.ceil(width / _STRIDE)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head",
        "paper_ids": "arXiv:2406.19369",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {f"rwkv_sam_{size}.untrained": _cfg() for size in ("nano", "tiny", "small", "base", "large")}
)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if pretrained:
        kwargs = with_weights_of_file(kwargs)
    return build_model_with_cfg(
        RwkvSamEncoder,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def rwkv_sam_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RWKV-SAM-nano, 64 channels, 4 blocks: for tests and CPU examples."""
    args = {"embed_dims": (16, 32, 64), "depth": 4, "num_heads": 4, **kwargs}
    return _create("rwkv_sam_nano", pretrained, **args)


@register_model
def rwkv_sam_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RWKV-SAM-T, 5.0 M parameters without head, 1.3 G multiply-adds at 224 px."""
    args = {"embed_dims": (32, 64, 192), **kwargs}
    return _create("rwkv_sam_tiny", pretrained, **args)


@register_model
def rwkv_sam_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RWKV-SAM-S, 19.7 M parameters without head, 5.1 G multiply-adds at 224 px."""
    args = {"embed_dims": (64, 128, 384), **kwargs}
    return _create("rwkv_sam_small", pretrained, **args)


@register_model
def rwkv_sam_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RWKV-SAM-B, 78.7 M parameters without head, 20.2 G multiply-adds at 224 px."""
    args = {"embed_dims": (128, 256, 768), **kwargs}
    return _create("rwkv_sam_base", pretrained, **args)


@register_model
def rwkv_sam_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RWKV-SAM-L, 139.1 M parameters without head, 34.7 G multiply-adds at 224 px.

    Its 1,024 channels go into 16 heads, not 6, where there is attention.
    """
    args = {"embed_dims": (160, 320, 1024), "num_heads": 16, **kwargs}
    return _create("rwkv_sam_large", pretrained, **args)
