"""VRWKV-Adapter: four maps of strides 4, 8, 16 and 32 from a plain backbone.

ViT-Adapter (arXiv:2205.08534) around a Vision-RWKV (arXiv:2403.02308), or around a ViT. Published
weights: OpenGVLab/Vision-RWKV, Apache-2.0.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vision.layers.adapter import Extractor, Injector, SpatialPrior, init_adapter
from vision.layers.batch_norm import BatchNorm2d
from vision.layers.conv import map_to_tokens, tokens_to_map
from vision.layers.deform_attn import pixel_centres
from vision.layers.padding import pad_to_multiple

from .checkpoint import fetching, with_weights_of_file
from .vrwkv import VisionRWKV, published_cfg
from .vrwkv_adapter_weights import checkpoint_filter_fn

__all__ = ["BackboneAdapter", "checkpoint_filter_fn"]

_STRIDES = (4, 8, 16, 32)
# Which of n interactions' tokens are added to each of the four maps.
FLAVOURS: dict[str, Callable[[int], list[int]]] = {
    "segmentation": lambda n: [math.ceil((level + 1) * n / 4) - 1 for level in range(4)],
    "detection": lambda n: [n - 1] * 4,
}


@dataclass(frozen=True)
class _Plain:
    """How a family of plain backbones is run in steps.

    Attributes:
        tokens: images to tokens before the first block (B, T, C) and their grid.
        block: one block on tokens and their grid.
    """

    tokens: Callable[[Any, Tensor], tuple[Tensor, tuple[int, int]]]
    block: Callable[[Any, nn.Module, Tensor, tuple[int, int]], Tensor]


def _vit_tokens(backbone: Any, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    hw = backbone.patch_embed.dynamic_feat_size(x.shape[-2:])
    return backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(x)))), hw


def _vit_block(backbone: Any, block: nn.Module, x: Tensor, hw: tuple[int, int]) -> Tensor:
    if backbone.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x)
    return block(x)


_PLAIN: dict[type[nn.Module], _Plain] = {
    VisionRWKV: _Plain(VisionRWKV._tokens, VisionRWKV._run_block),
    VisionTransformer: _Plain(_vit_tokens, _vit_block),
}


class Interaction(nn.Module):
    """One exchange between backbone and pyramid: injector, blocks of the backbone, extractors.

    Args:
        injector: pyramid to backbone.
        extractors: backbone to pyramid, one after the other.
    """

    def __init__(self, injector: Injector, extractors: Sequence[Extractor]) -> None:
        super().__init__()
        self.injector = injector
        self.extractors = nn.ModuleList(extractors)


class BackboneAdapter(nn.Module):
    """A pyramid of four maps around a plain backbone; timm's contract as far as it has no classes.

    Any input size of at least one pixel is accepted: images are padded with zeros at the bottom
    and the right to multiples of 32 (and of the patch), and the maps cover the padded image.

    Args:
        backbone: a `VisionRWKV` without a class token (also VRWKV6), or timm's VisionTransformer
            with `class_token=False, global_pool="avg", dynamic_img_size=True`. It becomes a part:
            its final norm and classifier are dropped.
        flavour: "segmentation" adds the tokens of the interactions one by one to the four maps,
            "detection" adds the last ones to all; the parameters are the same.
        conv_width: channels of the convolutional pyramid at stride 4.
        points: samples a head of the deformable attention takes of every map.
        num_heads: its heads.
        deform_ratio: width of its values over the backbone's channels.
        ffn_ratio: hidden width of the pyramid's feed-forward layers, likewise.
        interaction_indexes: first and last block of each interaction; by default four equal parts
            (one a block where there are fewer).
        extra_extractors: extractors after the last interaction's own.
        drop_path_rate: stochastic depth of the pyramid's feed-forward branches.

    Raises:
        ValueError: a backbone that is not plain in this sense, an unknown flavour, or interactions
            that are not all blocks in order.
    """

    num_classes = 0

    def __init__(
        self,
        backbone: nn.Module,
        flavour: str = "segmentation",
        conv_width: int = 64,
        points: int = 4,
        num_heads: int = 6,
        deform_ratio: float = 1.0,
        ffn_ratio: float = 0.25,
        interaction_indexes: Sequence[tuple[int, int]] | None = None,
        extra_extractors: int = 2,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if flavour not in FLAVOURS:
            raise ValueError(f"no flavour {flavour!r}; there are {', '.join(FLAVOURS)}")
        self._plain = _plain_kind(backbone)
        body: Any = backbone
        body.prune_intermediate_layers(1, prune_norm=True, prune_head=True)
        self.backbone: Any = body
        depth = len(body.blocks)
        self.embed_dim = self.num_features = dim = int(body.embed_dim)
        self.interaction_indexes = _parts(depth, interaction_indexes)
        self.sources = FLAVOURS[flavour](len(self.interaction_indexes))
        self.grad_checkpointing = False

        # VRWKV's norm before the first block comes after the first injector.
        self.norm_pre: nn.Module = nn.Identity()
        if isinstance(backbone, VisionRWKV):
            self.norm_pre, body.norm_pre = body.norm_pre, nn.Identity()
        self.level_embed = nn.Parameter(torch.empty(3, dim))
        self.spm = SpatialPrior(body.patch_embed.proj.in_channels, conv_width, dim)

        def extractor() -> Extractor:
            return Extractor(dim, num_heads, points, deform_ratio, ffn_ratio, drop_path_rate)

        last = len(self.interaction_indexes) - 1
        self.interactions = nn.ModuleList(
            Interaction(
                Injector(dim, num_heads, points, deform_ratio),
                [extractor() for _ in range(1 + extra_extractors * (i == last))],
            )
            for i in range(last + 1)
        )
        self.up: nn.Module = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norms = nn.ModuleList(BatchNorm2d(dim) for _ in range(4))
        self.feature_info = [
            {"module": f"norms.{i}", "num_chs": dim, "reduction": stride}
            for i, stride in enumerate(_STRIDES)
        ]
        nn.init.normal_(self.level_embed)
        init_adapter(
            module for part in (self.spm, self.interactions, self.up) for module in part.modules()
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters of more than one dimension that should not decay."""
        return {"level_embed", *(f"backbone.{name}" for name in self.backbone.no_weight_decay())}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters by depth (timm's layer decay); see `beside_layers`."""
        return {
            "stem": r"^backbone\.(?:pos_embed|patch_embed|norm_pre)|^norm_pre",
            "blocks": r"^backbone\.blocks\.(\d+)"
            if coarse
            else [(r"^backbone\.blocks\.(\d+)", None), (r"^backbone\.norm\.", (99999,))],
        }

    @torch.jit.ignore
    def beside_layers(self) -> set[str]:
        """Names of the parameters of the adapter, which learn at the full rate in layer decay."""
        own = ("level_embed", "spm.", "interactions.", "up.", "norms.")
        return {name for name, _ in self.named_parameters() if name.startswith(own)}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: keep only the inputs of the blocks for the backward pass."""
        self.grad_checkpointing = enable
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """An Identity: there is no classifier."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Do nothing for no classes.

        Raises:
            ValueError: classes are wanted.
        """
        _refuse_classes(num_classes)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make another size the backbone's native one."""
        self.backbone.set_input_size(img_size)

    def _run(self, module: nn.Module, *args: Any) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args)
        return module(*args)

    def _maps(self, x: Tensor, take: Sequence[int]) -> list[Tensor]:
        """Compute some of the four maps (B, C, h, w)."""
        x = pad_to_multiple(x, math.lcm(_STRIDES[-1], *self.backbone.patch_embed.patch_size))
        c1, *maps = self.spm(x)
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        pyramid = torch.cat(
            [map_to_tokens(m) + e for m, e in zip(maps, self.level_embed, strict=True)], 1
        )
        x, hw = self._plain.tokens(self.backbone, x)
        centres, grid = pixel_centres(shapes, x), pixel_centres([hw], x)
        answers = []
        interactions: Any = self.interactions
        for part, (first, last) in zip(interactions, self.interaction_indexes, strict=True):
            x = self._run(part.injector, x, grid, pyramid, shapes)
            if first == 0:
                x = self.norm_pre(x)
            for block in self.backbone.blocks[first : last + 1]:
                x = self._plain.block(self.backbone, block, x, hw)
            for extractor in part.extractors:
                pyramid = self._run(extractor, pyramid, centres, x, hw, shapes)
            answers.append(x)

        parts = pyramid.split([h * w for h, w in shapes], 1)
        maps = [tokens_to_map(part, shape) for part, shape in zip(parts, shapes, strict=True)]
        found = []
        for i in take:
            y = maps[i - 1] if i else self.up(maps[0]) + c1
            source = tokens_to_map(answers[self.sources[i]], hw)
            if source.shape[2:] != y.shape[2:]:
                source = F.interpolate(
                    source, size=y.shape[2:], mode="bilinear", align_corners=False
                )
            # On a CPU torch 2.15 gives batch norm wrong gradients for one image whose map is a view
            # of its tokens; a plain copy until it is right.
            found.append(self.norms[i]((y + source).contiguous()))
        return found

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute some of the four maps.

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n maps if a number, all if None, else the maps named, in order of
                their strides; negative numbers count from the end.
            norm: changes nothing, every map is normalised.
            stop_early: changes nothing, every map needs the whole backbone.
            output_fmt: "NCHW" for maps (B, C, h, w), "NLC" for tokens (B, h*w, C).
            intermediates_only: leave the map of stride 32 out of the answer.

        Returns:
            The maps, or (map of stride 32, maps).

        Raises:
            ValueError: an unknown output format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take = sorted(feature_take_indices(4, indices)[0])
        wanted = take if intermediates_only or 3 in take else [*take, 3]
        found = self._maps(x, wanted)
        maps = found[: len(take)]
        if output_fmt == "NLC":
            maps = [map_to_tokens(y) for y in maps]
        return maps if intermediates_only else (found[-1], maps)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the maps `indices` do not need; return the indices kept."""
        take, _ = feature_take_indices(4, indices)
        for i in range(4):
            if i not in take:
                self.norms[i] = nn.Identity()
        if 0 not in take:
            self.up, self.spm.projs[0] = nn.Identity(), nn.Identity()
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the map of stride 32 (B, C, h, w)."""
        return self._maps(x, [3])[0]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W) to the four maps (B, C, h, w), strides 4, 8, 16 and 32."""
        return self._maps(x, range(4))


def _plain_kind(backbone: nn.Module) -> _Plain:
    found = next((kind for cls, kind in _PLAIN.items() if isinstance(backbone, cls)), None)
    if found is None:
        raise ValueError(
            f"the adapter takes {' or '.join(cls.__name__ for cls in _PLAIN)}, got "
            f"{type(backbone).__name__}; pyramids need no adapter"
        )
    extra = [getattr(backbone, name, None) for name in ("cls_token", "reg_token")]
    if any(token is not None for token in extra):
        raise ValueError(
            "the adapter needs a backbone without class or register tokens; build it with "
            "class_token=False and global_pool='avg'"
        )
    if isinstance(backbone, VisionTransformer) and not backbone.dynamic_img_size:
        raise ValueError("the adapter needs a VisionTransformer with dynamic_img_size=True")
    return found


def _parts(depth: int, indexes: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """First and last block of every interaction."""
    if indexes is None:
        ends = [round(depth * i / min(4, depth)) for i in range(min(4, depth) + 1)]
        return [(a, b - 1) for a, b in itertools.pairwise(ends)]
    parts = [(first, last) for first, last in indexes]
    if [i for first, last in parts for i in range(first, last + 1)] != list(range(depth)):
        raise ValueError(
            f"the interactions must be all {depth} blocks in order, as pairs of the first and the "
            f"last block, got {parts}"
        )
    return parts


def _refuse_classes(num_classes: int) -> None:
    if num_classes:
        raise ValueError(
            f"an adapter has no classifier, num_classes={num_classes} was asked for; put a head "
            "on its maps, or create the plain backbone"
        )


def _build(
    backbone: str,
    num_classes: int = 0,
    flavour: str = "segmentation",
    conv_width: int = 64,
    points: int = 4,
    deform_heads: int = 6,
    deform_ratio: float = 1.0,
    ffn_ratio: float = 0.25,
    interaction_indexes: Sequence[tuple[int, int]] | None = None,
    extra_extractors: int = 2,
    drop_path_rate: float = 0.0,
    **backbone_args: Any,
) -> BackboneAdapter:
    """Build backbone and adapter; arguments as for `BackboneAdapter`, the rest the backbone's."""
    _refuse_classes(num_classes)
    body = timm.create_model(
        backbone, num_classes=0, drop_path_rate=drop_path_rate, **backbone_args
    )
    return BackboneAdapter(
        body,
        flavour,
        conv_width,
        points,
        deform_heads,
        deform_ratio,
        ffn_ratio,
        interaction_indexes,
        extra_extractors,
        drop_path_rate,
    )


def _cfg(filename: str = "", side: int = 512) -> dict[str, Any]:
    first = ("spm.stages.0.0.conv", "backbone.patch_embed.proj")
    options = {"num_classes": 0, "classifier": None, "crop_pct": 1.0, "first_conv": first}
    papers = {"paper_ids": ("arXiv:2403.02308", "arXiv:2205.08534")}
    return published_cfg(filename, input_size=(3, side, side), **options, **papers)


def _cfgs(size: str, plain: str, of: str) -> dict[str, dict[str, Any]]:
    """The backbone's weights, which training starts from, and the two published adapters."""
    name = f"vrwkv_adapter_{size}"
    return {
        f"{name}.{of}": _cfg(plain),
        f"{name}.ade20k": _cfg(f"upernet_{name}_512_160k_ade20k.pth"),
        f"{name}.coco": _cfg(f"mask_rcnn_{name}_fpn_1x_coco.pth"),
    }


default_cfgs = generate_default_cfgs(
    {
        "vrwkv_adapter_nano.untrained": _cfg(side=224),
        **_cfgs("tiny", "vrwkv_t_in1k_224.pth", "in1k"),
        **_cfgs("small", "vrwkv_s_in1k_224.pth", "in1k"),
        **_cfgs("base", "vrwkv_b_in1k_224.pth", "in1k"),
        **_cfgs("large", "vrwkv_l_in22k_192.pth", "in22k"),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    if pretrained:
        kwargs = with_weights_of_file(kwargs)
    with fetching(variant, "https://huggingface.co/OpenGVLab/Vision-RWKV"):
        return build_model_with_cfg(
            _build,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **kwargs,
        )


@register_model
def vrwkv_adapter_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-nano (patches of 8) with a narrow adapter: for tests and CPU examples. No weights."""
    args = {"backbone": "vrwkv_nano_patch8_224", "conv_width": 16, "deform_heads": 4, **kwargs}
    return _create("vrwkv_adapter_nano", pretrained, **args)


@register_model
def vrwkv_adapter_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-T with an adapter, 8.4 M parameters, 16.4 G multiply-adds at 512 px."""
    args = {"backbone": "vrwkv_tiny_patch16_224", "init_values": 1.0, **kwargs}
    return _create("vrwkv_adapter_tiny", pretrained, **args)


@register_model
def vrwkv_adapter_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-S with an adapter, 29.3 M parameters, 46.0 G multiply-adds at 512 px."""
    args = {"backbone": "vrwkv_small_patch16_224", "init_values": 1e-5, **kwargs}
    return _create("vrwkv_adapter_small", pretrained, **args)


@register_model
def vrwkv_adapter_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-B with an adapter, 106.6 M parameters, 145.5 G multiply-adds at 512 px."""
    args = {"backbone": "vrwkv_base_patch16_224", "deform_ratio": 0.5, "deform_heads": 12, **kwargs}
    return _create("vrwkv_adapter_base", pretrained, **args)


@register_model
def vrwkv_adapter_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV-L with an adapter, 351.9 M parameters, 421.3 G multiply-adds at 512 px."""
    args = {
        "backbone": "vrwkv_large_patch16_192",
        "deform_ratio": 0.5,
        "deform_heads": 16,
        **kwargs,
    }
    return _create("vrwkv_adapter_large", pretrained, **args)
