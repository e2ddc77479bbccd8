"""Vision-RWKV (VRWKV): a plain backbone with linear-cost, bidirectional token mixing.

Paper: Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures,
arXiv:2403.02308 (ICLR 2025). Published weights: OpenGVLab/Vision-RWKV, Apache-2.0; their operator
differs slightly from the paper's formula, which is the one computed here (see the README).
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vision.layers.block import Block
from vision.layers.init import depth_ratio
from vision.layers.kept_grid import KeptGrid
from vision.layers.patch_embed import PaddedPatchEmbed
from vision.layers.pos_embed import resample_pos_embed

from .checkpoint import (
    check_names,
    fetching,
    fit_pos_embed,
    rename,
    split_prefix,
    unwrap_state_dict,
    with_weights_of_file,
)
from .classifier import HEAD_NAMES, TokenClassifier, init_linear

_logger = logging.getLogger(__name__)

__all__ = ["VisionRWKV", "checkpoint_filter_fn", "create_vrwkv", "map_checkpoint", "published_cfg"]


class VisionRWKV(TokenClassifier):
    """Vision-RWKV backbone with a classification head; follows timm's model contract.

    Any input size of at least one pixel is accepted: sizes that are no multiple of the patch are
    padded with zeros at the bottom and the right, and the position embedding is resampled.

    Args:
        img_size: image height and width in pixels of the learnt position embedding.
        patch_size: side of a patch in pixels.
        in_chans: channels of the input image.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: avg, max, avgmax, token (see `class_token`), or "" to keep the tokens.
        embed_dim: channels C of the tokens.
        depth: number of blocks.
        mlp_ratio: hidden width of the channel mix over `embed_dim`.
        mixer: token mixer, a name in `vision.layers.MIXERS`.
        channel_mixer: feed-forward half, a name in `vision.layers.CHANNEL_MIXERS`.
        head_size: channels of a head, for mixers that have heads of the RWKV kind (VRWKV6); else
            None.
        class_token: append a learnt token after those of the grid, for mixers that can take it
            (VRWKV6); `global_pool` may then be "token", the others leave it out.
        shift: token shift, a name in `vision.layers.SHIFTS`.
        shift_pixels: distance of the shift in patches; 0 for none.
        channel_gamma: share of the channels that shifts in one direction.
        init_mode: first values of decay, bonus and mixes: fancy, local or global.
        post_norm: normalise after each branch instead of before.
        key_norm: LayerNorm on the operator's output and on the hidden layer of the channel mix.
        init_values: first value of the layer scale; None for no layer scale.
        final_norm: LayerNorm after the last block.
        head_hidden_size: width of a tanh layer before the classifier (large model); None for none.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "max", "avgmax", "token"] = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        mixer: str = "bi_wkv",
        channel_mixer: str = "channel_mix",
        head_size: int | None = None,
        class_token: bool = False,
        shift: str = "q_shift",
        shift_pixels: int = 1,
        channel_gamma: float = 0.25,
        init_mode: str = "fancy",
        post_norm: bool = False,
        key_norm: bool = False,
        init_values: float | None = None,
        final_norm: bool = True,
        head_hidden_size: int | None = None,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, "avg", embed_dim, head_hidden_size or embed_dim)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.embed_dim = embed_dim

        self.patch_embed = PaddedPatchEmbed(
            img_size=tuple(math.ceil(s / patch_size) * patch_size for s in to_2tuple(img_size)),
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self._set_pool(global_pool)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.norm_pre = nn.LayerNorm(embed_dim)
        of_heads: dict[str, Any] = {} if head_size is None else {"head_size": head_size}
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                layer,
                depth,
                mixer=mixer,
                channel_mixer=channel_mixer,
                mlp_ratio=mlp_ratio,
                post_norm=post_norm,
                init_values=init_values,
                drop_path=drop_path_rate * depth_ratio(layer, depth),
                shift=shift,
                shift_pixels=shift_pixels,
                channel_gamma=channel_gamma,
                init_mode=init_mode,
                key_norm=key_norm,
                **of_heads,
            )
            for layer in range(depth)
        )
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size}
            for i in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim) if final_norm else nn.Identity()
        self.pre_logits: nn.Module = nn.Identity()
        if head_hidden_size is not None:
            self.pre_logits = nn.Sequential()
            self.pre_logits.add_module("fc", nn.Linear(embed_dim, head_hidden_size))
            self.pre_logits.add_module("act", nn.Tanh())
        self._add_head(drop_rate)
        # What the published models ran (mmcls' init_cfg): every linear layer, no zeros.
        init_linear(self.modules())

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters of more than one dimension that should not decay."""
        return {"pos_embed"} if self.cls_token is None else {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters by depth (timm's layer decay)."""
        return {
            "stem": r"^pos_embed|^cls_token|^patch_embed|^norm_pre",
            "blocks": r"^blocks\.(\d+)"
            if coarse
            else [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another size the native one: resample the position embedding for good.

        Args:
            img_size: new height and width in pixels, rounded up to whole patches.
        """
        old = self.patch_embed.grid_size
        patch = self.patch_embed.patch_size
        whole = tuple(math.ceil(s / p) * p for s, p in zip(to_2tuple(img_size), patch, strict=True))
        self.patch_embed.set_input_size(whole)
        new = self.patch_embed.grid_size
        self.pos_embed = nn.Parameter(
            resample_pos_embed(self.pos_embed.detach(), old, new), self.pos_embed.requires_grad
        )

    def _set_pool(self, global_pool: str) -> None:
        if global_pool == "token" and self.cls_token is not None:
            self.global_pool = global_pool
        else:
            super()._set_pool(global_pool)

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Image (B, C, H, W) to tokens before the first block (B, T, C) and the grid (h, w)."""
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                "wanted a batch of images (B, in_chans, H, W) with no empty side, "
                f"got {tuple(x.shape)}"
            )
        hw = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        pos_embed = resample_pos_embed(self.pos_embed, self.patch_embed.grid_size, hw)
        # In this order the sum has its channels side by side, as what follows wants them.
        x = pos_embed + self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([x, self.cls_token.expand(len(x), -1, -1)], 1)
        return self.norm_pre(self.pos_drop(x)), hw

    def _run_block(self, block: nn.Module, x: Tensor, hw: tuple[int, int]) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, hw)
        return block(x, hw)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Run the blocks and collect what some of them put out.

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n blocks if a number, all if None, else the blocks named; negative
                numbers count from the end.
            norm: apply the final norm to every intermediate.
            stop_early: do not run the blocks after the last one asked for.
            output_fmt: "NCHW" for maps (B, C, h, w), "NLC" for tokens (B, h*w, C).
            intermediates_only: leave the final tokens out of the answer.
            return_prefix_tokens: make every intermediate a pair of the map or the tokens of the
                grid, and the class token (B, 1, C), which comes last here (timm's name).

        Returns:
            The intermediates, without the class token, or (final tokens after the final norm,
            intermediates).

        Raises:
            ValueError: an unknown output format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, hw = self._tokens(x)
        found = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run_block(block, x, hw)
            if i in take:
                found.append(self.norm(x) if norm else x)
        count = hw[0] * hw[1]
        maps: list[Any] = [y[:, :count] if self.cls_token is not None else y for y in found]
        if output_fmt == "NCHW":
            maps = [y.transpose(1, 2).unflatten(2, hw).contiguous() for y in maps]
        if return_prefix_tokens:
            maps = [(y, tokens[:, count:]) for y, tokens in zip(maps, found, strict=True)]
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the intermediates `indices` do not need; return the indices kept."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.pre_logits = nn.Identity()
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to tokens after the final norm, (B, h*w, C).

        A class token comes last and makes them one more.
        """
        x, hw = self._tokens(x)
        for block in self.blocks:
            x = self._run_block(block, x, hw)
        return self.norm(x)

    def forward_kept(self, x: Tensor, kept: Tensor) -> tuple[Tensor, KeptGrid]:
        """Run some patches of the images alone, as masked pretraining does.

        The position embedding is added once, before the others are left out. The operator takes
        the kept tokens as a sequence of their own, in the order of the grid: distances count kept
        tokens, and T is their number. The shift sees zeros where the grid has a masked patch (see
        `KeptGrid`); `shift="single_shift"` takes the kept token before, as upstream's masked
        autoencoder. With every patch kept that is `forward_features`.

        Args:
            x: images (B, in_chans, H, W).
            kept: numbers of the kept patches, row-major, rising, int64 (B, K).

        Returns:
            Tokens after the final norm, (B, K, C), and their places on the grid.

        Raises:
            ValueError: places that are not on the grid, or a model with a class token.
        """
        if self.cls_token is not None:
            raise ValueError("masked images want a model without a class token")
        x, hw = self._tokens(x)
        grid = KeptGrid(hw, kept)
        x = grid.pick(x)
        for block in self.blocks:
            x = self._run_block(block, x, grid)
        return self.norm(x), grid

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, h*w, C) to logits (B, num_classes), or to what the classifier is fed.

        With `global_pool=""` the token axis stays.
        """
        if self.cls_token is not None and self.global_pool:
            x = x[:, -1:] if self.global_pool == "token" else x[:, :-1]
        return self._classify(x, pre_logits, self.pre_logits)


# Upstream's names inside the backbone -> ours, in order; `layers.N` is `blocks.N` in its MAE.
_KEY_MAP = [
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.", "blocks."),
    (r"^blocks\.0\.ln0\.", "norm_pre."),
    (r"^ln1\.", "norm."),
    (r"^(blocks\.\d+)\.ln([12])\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.gamma([12])$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.att\.spatial_decay$", r"\1.mixer.decay"),
    (r"^(blocks\.\d+)\.att\.spatial_first$", r"\1.mixer.bonus"),
    (r"^(blocks\.\d+)\.att\.spatial_mix_([kvr])$", r"\1.mixer.shift_mix.\2"),
    (r"^(blocks\.\d+)\.ffn\.spatial_mix_([kr])$", r"\1.channel_mix.shift_mix.\2"),
    (r"^(blocks\.\d+)\.att\.key_norm\.", r"\1.mixer.norm."),
    (r"^(blocks\.\d+)\.ffn\.key_norm\.", r"\1.channel_mix.norm."),
    (r"^(blocks\.\d+)\.att\.", r"\1.mixer."),
    (r"^(blocks\.\d+)\.ffn\.", r"\1.channel_mix."),
]
# Heads outside the backbone: mmcls' linear head, the large model's two layers.
_HEAD_MAP = [
    (r"^head\.fc\.", "head."),
    (r"^head\.0\.", "pre_logits.fc."),
    (r"^head\.2\.", "head."),
]
# Parts of foreign checkpoints that are no part of a plain backbone.
_NOT_BACKBONE = re.compile(
    r"^(decode_head|auxiliary_head|neck|rpn_head|roi_head|data_preprocessor)\."  # seg., det.
    r"|^(level_embed$|spm\.|interactions\.|up\.|norm[1-4]\.)"  # adapter
    r"|^(mask_token$|decoder_pos_embed$|decoder_(embed|blocks|pred)\.|ln2\.)"  # MAE
    r"|^mae\.decoder\."  # ours: vision.models.mae
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Map published and own checkpoints to the names of `VisionRWKV`; strict.

    Accepts our own files (plain, or from `tools/train.py`) and OpenGVLab's: classification
    (`backbone.*`, `head.fc.*`), the large model's two-layer head (`head.0`, `head.2`), masked
    autoencoders (`blocks.*`; the decoder is left out), and the backbone of segmentation and
    detection checkpoints (heads and adapter parts are left out). The position embedding is
    resampled to the model's grid. A checkpoint without a head gives no head keys.

    Args:
        state_dict: checkpoint as read from the file.
        model: the `VisionRWKV` that will load the result.

    Raises:
        CheckpointError: keys that have no place in the model, keys the model misses, or a
            position embedding that is no square grid; the message lists them.
    """
    return map_checkpoint(state_dict, model)


def map_checkpoint(
    state_dict: Mapping[str, Any], model: Any, mixer_map: Sequence[tuple[str, str]] = ()
) -> dict[str, Tensor]:
    """Do as `checkpoint_filter_fn` for a family whose token mixer has parameters of its own.

    Args:
        state_dict: checkpoint as read from the file.
        model: the `VisionRWKV` that will load the result.
        mixer_map: patterns of upstream's names in the token mixer, which is `blocks.N.mixer`
            already, and ours; as for `rename`.
    """
    inside, outside = split_prefix(
        unwrap_state_dict(state_dict), r"patch_embed\.proj(?:ection)?\.weight", "Vision-RWKV"
    )
    mapped = rename(inside, [*_KEY_MAP, *mixer_map, *_HEAD_MAP], _NOT_BACKBONE)
    mapped |= rename(outside, _HEAD_MAP, _NOT_BACKBONE)
    wanted = model.state_dict()
    # Upstream's vectors are (1, 1, C), or (heads, C / heads).
    vectors = {name for name, value in wanted.items() if value.ndim == 1}
    mapped = {k: v.flatten() if k in vectors else v for k, v in mapped.items()}
    options = "post_norm, key_norm, init_values, final_norm, head_hidden_size, class_token"
    check_names(mapped, wanted, HEAD_NAMES, options)
    mapped["pos_embed"] = fit_pos_embed(mapped["pos_embed"], model.patch_embed.grid_size)
    return mapped


def _filled(mapped: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Add the model's own classifier where a checkpoint has none, as of masked pretraining."""
    own = model.state_dict()
    missing = {name: own[name] for name in HEAD_NAMES if name in own and name not in mapped}
    if missing:
        _logger.warning("the checkpoint has no classifier; the model's own stays as it is")
    return {**mapped, **missing}


def published_cfg(filename: str = "", **kwargs: Any) -> dict[str, Any]:
    """The `pretrained_cfg` of a model; without a file of OpenGVLab's it has no weights."""
    published = {
        "hf_hub_id": "OpenGVLab/Vision-RWKV",
        "hf_hub_filename": filename,
        "license": "apache-2.0",
        "origin_url": "https://github.com/OpenGVLab/Vision-RWKV",
    }
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2403.02308",
        **(published if filename else {}),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vrwkv_nano_patch8_224.untrained": published_cfg(),
        "vrwkv_tiny_patch16_224.in1k": published_cfg("vrwkv_t_in1k_224.pth"),
        "vrwkv_small_patch16_224.in1k": published_cfg("vrwkv_s_in1k_224.pth"),
        "vrwkv_base_patch16_224.in1k": published_cfg("vrwkv_b_in1k_224.pth"),
        "vrwkv_large_patch16_192.in22k_ft_in1k_384": published_cfg(
            "vrwkv_l_22kto1k_384.pth", input_size=(3, 384, 384), crop_pct=1.0
        ),
        "vrwkv_large_patch16_192.in22k": published_cfg(
            "vrwkv_l_in22k_192.pth", input_size=(3, 192, 192), crop_pct=1.0, num_classes=21841
        ),
    }
)


def create_vrwkv(
    variant: str,
    pretrained: bool = False,
    filter_fn: Callable[..., dict[str, Tensor]] = checkpoint_filter_fn,
    **kwargs: Any,
) -> nn.Module:
    """Build a `VisionRWKV` by timm's builder.

    Args:
        variant: name of the entry point.
        pretrained: load the published weights, or those of the file in the overlay.
        filter_fn: maps a checkpoint to the model's names.
        **kwargs: of the model and of timm's builder.

    Raises:
        RuntimeError: the published weights could not be fetched.
    """
    if pretrained:
        kwargs = with_weights_of_file(kwargs)
    page = "https://huggingface.co/OpenGVLab/Vision-RWKV"
    with fetching(variant, page) if pretrained else nullcontext():
        return build_model_with_cfg(
            VisionRWKV,
            variant,
            pretrained,
            pretrained_filter_fn=lambda state, model: _filled(filter_fn(state, model), model),
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **kwargs,
        )


@register_model
def vrwkv_nano_patch8_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-nano, 64 channels, 4 blocks, patches of 8: for tests and CPU examples. No weights."""
    args = {"patch_size": 8, "embed_dim": 64, "depth": 4, **kwargs}
    return create_vrwkv("vrwkv_nano_patch8_224", pretrained, **args)


@register_model
def vrwkv_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-T, 6.2 M parameters, 1.2 G multiply-adds at 224 px."""
    args = {"embed_dim": 192, "depth": 12, **kwargs}
    return create_vrwkv("vrwkv_tiny_patch16_224", pretrained, **args)


@register_model
def vrwkv_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-S, 23.8 M parameters, 4.6 G multiply-adds at 224 px."""
    args = {"embed_dim": 384, "depth": 12, "post_norm": True, "init_values": 1.0, **kwargs}
    return create_vrwkv("vrwkv_small_patch16_224", pretrained, **args)


@register_model
def vrwkv_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-B, 93.7 M parameters, 18.2 G multiply-adds at 224 px."""
    args = {"embed_dim": 768, "depth": 12, "post_norm": True, "init_values": 1e-5, **kwargs}
    return create_vrwkv("vrwkv_base_patch16_224", pretrained, **args)


@register_model
def vrwkv_large_patch16_192(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-L, 334.9 M parameters, 189.5 G multiply-adds at 384 px; position embedding of 192 px.

    The published classifier was fine-tuned at 384 px with the 192 px position embedding resampled
    on the fly, which is what the model does for an input of that size.
    """
    args = {
        "img_size": 192,
        "embed_dim": 1024,
        "depth": 24,
        "post_norm": True,
        "key_norm": True,
        "init_values": 1e-5,
        "head_hidden_size": 3072,
        **kwargs,
    }
    return create_vrwkv("vrwkv_large_patch16_192", pretrained, **args)
