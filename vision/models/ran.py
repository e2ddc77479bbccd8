"""Residual Attention Network (RAN): residual units with stacked soft attention masks.

Paper: Residual Attention Network for Image Classification, arXiv:1704.06904 (CVPR 2017). The
networks for ImageNet are those of the authors' Caffe definitions, layer by layer; of the networks
for CIFAR the paper gives depth and parameter counts alone, and they are a reconstruction.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .checkpoint import (
    check_names,
    read_checkpoint,
    split_prefix,
    unwrap_state_dict,
    with_weights_of_file,
)
from .ran_blocks import (
    ATTENTION,
    MASK_ACTIVATIONS,
    UNITS,
    Attention,
    AttentionModule,
    EncoderDecoderMask,
    HalvingPool,
    LocalMask,
    MaskHead,
    Recomputable,
    conv,
    norm_act,
    unit_row,
)
from .ran_caffe import from_caffe, is_caffe, read_caffemodel

__all__ = ["ResidualAttentionNet", "checkpoint_filter_fn"]

_POOLS = ("", "avg", "max", "avgmax")
_MASKS = ("encdec", "local", "none")


class Stem(nn.Module):
    """7x7 convolution of stride 2, normalised and activated.

    Args:
        in_chans: channels of the image.
        width: channels of the output.
    """

    folds = (("conv", "bn"),)

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.conv = conv(in_chans, width, 7, 2)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to (B, width, ceil(H / 2), ceil(W / 2))."""
        return nn.functional.relu(self.bn(self.conv(x)), inplace=True)


class SmallStem(nn.Module):
    """3x3 convolution for images of 32 px.

    Args:
        in_chans: channels of the image.
        width: channels of the output.
    """

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.conv = conv(in_chans, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to (B, width, H, W)."""
        return self.conv(x)


class ResidualAttentionNet(nn.Module):
    """Residual Attention Network; follows timm's model contract.

    A stage is a row of residual units, attention modules, and residual units again; its first unit
    changes width and, but for the first stage, halves the size. Any input size is accepted: masks
    are resized to the maps that they belong to, and a pooling that would leave nothing of a map
    (in some masks, below 31 px) is left out.

    Intermediate maps are the stem's output and the stages'. With pre-activation those of the stages
    are raw sums, which the next unit normalises.

    Args:
        in_chans: channels of the input image.
        num_classes: outputs of the classifier; 0 for none.
        global_pool: avg, max, avgmax, or "" to keep the map (without a classifier).
        small_stem: 3x3 convolution of stride 1, for CIFAR, instead of 7x7 and pooling to stride 4.
        stem_width: channels of the stem.
        widths: channels of each stage.
        m: attention modules of each stage.
        mask_depths: poolings of the masks in each stage (unused where there is no module).
        units_before: residual units before the modules of each stage, at least 1.
        units_after: residual units after the modules of each stage.
        unit: preact (arXiv:1603.05027) or resnext (arXiv:1611.05431, AttentionNeXt).
        p: residual units before the branches of a module, and again after them.
        t: residual units of the trunk branch.
        r: residual units between two poolings of the mask branch.
        mask_bottom: residual units at the mask's lowest level; None for 2 r.
        attention: arl for attention residual learning, (1 + M) T; nal for the naive M T.
        mask: encdec (down and up again), local (three units without pooling), or none: every
            module is then its p + t + p units in a row.
        mask_act: mixed (sigmoid), channel or spatial attention; table 1 of the paper.
        drop_rate: dropout before the classifier.

    Raises:
        ValueError: an unknown name, stages of different numbers, or counts that are too small.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["", "avg", "max", "avgmax"] = "avg",
        small_stem: bool = False,
        stem_width: int = 64,
        widths: Sequence[int] = (256, 512, 1024, 2048),
        m: Sequence[int] = (1, 1, 1, 0),
        mask_depths: Sequence[int] = (3, 2, 1, 0),
        units_before: Sequence[int] = (1, 1, 1, 3),
        units_after: Sequence[int] = (0, 0, 0, 0),
        unit: str = "preact",
        p: int = 1,
        t: int = 2,
        r: int = 1,
        mask_bottom: int | None = None,
        attention: str = "arl",
        mask: str = "encdec",
        mask_act: str = "mixed",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check_name("unit", unit, UNITS)
        _check_name("attention", attention, ATTENTION)
        _check_name("mask", mask, _MASKS)
        _check_name("mask_act", mask_act, MASK_ACTIVATIONS)
        per_stage = (widths, m, mask_depths, units_before, units_after)
        if len({len(values) for values in per_stage}) > 1:
            raise ValueError(
                "widths, m, mask_depths, units_before and units_after want one number for each "
                f"stage, got {', '.join(str(len(values)) for values in per_stage)} numbers"
            )
        bottom = 2 * r if mask_bottom is None else mask_bottom
        if min(t, r, bottom, *units_before) < 1 or p < 0:
            raise ValueError(
                "wanted t, r, mask_bottom and units_before of 1 or more and p of 0 or more, got "
                f"t={t}, r={r}, mask_bottom={bottom}, units_before={units_before}, p={p}"
            )
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]

        unit_type = UNITS[unit]
        self.stem = (SmallStem if small_stem else Stem)(in_chans, stem_width)
        self.stem_pool = nn.Identity() if small_stem else HalvingPool()

        def make_mask(channels: int, depth: int) -> nn.Module:
            head = MaskHead(channels, unit_type.pre_activation, mask_act)
            if mask == "local":
                return LocalMask(channels, head, unit_type)
            return EncoderDecoderMask(channels, head, unit_type, depth, r, bottom)

        def make_module(channels: int, depth: int) -> nn.Module:
            if mask == "none":
                return unit_row(unit_type, channels, p + t + p)
            branch = make_mask(channels, depth)
            return AttentionModule(channels, unit_type, branch, attention, p, t)

        self.stages = nn.ModuleList()
        stride = 1 if small_stem else 4
        self.feature_info = [
            {"module": "stem", "num_chs": stem_width, "reduction": 1 if small_stem else 2}
        ]
        previous = stem_width
        for i, (width, count, depth, before, after) in enumerate(zip(*per_stage, strict=True)):
            step = 1 if i == 0 else 2
            stage = nn.Sequential(unit_type(previous, width, step))
            stage.extend(unit_row(unit_type, width, before - 1))
            stage.extend(make_module(width, depth) for _ in range(count))
            stage.extend(unit_row(unit_type, width, after))
            self.stages.append(stage)
            stride *= step
            self.feature_info.append(
                {"module": f"stages.{i}", "num_chs": width, "reduction": stride}
            )
            previous = width
        self.norm = norm_act(previous) if unit_type.pre_activation else nn.Identity()
        _check_pool(global_pool, num_classes)
        self.head = ClassifierHead(previous, num_classes, global_pool, drop_rate)
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters of more than one dimension that should not decay: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort the parameters by depth (timm's layer decay)."""
        return {
            "stem": r"^stem\.",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm\.", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: keep only the inputs of units and mask heads.

        Running statistics are updated once a step, as without it.
        """
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer (an Identity when there are no classes)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: outputs of the new classifier; 0 for none.
            global_pool: new pooling; None keeps the present one.

        Raises:
            ValueError: an unknown pooling, or no pooling before a classifier.
        """
        pool = self.head.global_pool.pool_type if global_pool is None else global_pool
        _check_pool(pool, num_classes)
        self.num_classes = num_classes
        self.head.reset(num_classes, pool)
        self.head.to(self.stem.conv.weight.device, self.stem.conv.weight.dtype)
        self.head.apply(_init_weights)

    @torch.no_grad()
    def fold_norms(self) -> "ResidualAttentionNet":
        """Merge each normalisation that follows a convolution into it, in place; to deploy.

        Norms that follow a sum or a pooling stay. The result computes the same, faster, with other
        parameter names; it cannot be trained any more.

        Returns:
            The model itself.

        Raises:
            ValueError: the model is in training mode.
        """
        if self.training:
            raise ValueError("fold_norms needs running statistics: call model.eval() before")
        for module in self.modules():
            for conv_name, norm_name in getattr(module, "folds", ()):
                norm = getattr(module, norm_name)
                if isinstance(norm, nn.BatchNorm2d):
                    merged = fuse_conv_bn_eval(getattr(module, conv_name), norm)
                    setattr(module, conv_name, merged)
                    setattr(module, norm_name, nn.Identity())
        return self

    def _stem(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                "wanted a batch of images (B, in_chans, H, W) with no empty side, "
                f"got {tuple(x.shape)}"
            )
        return self.stem(x)

    def attention_maps(self, x: Tensor) -> dict[str, Attention]:
        """Trunk features before and after the mask, and the mask, of every attention module.

        Args:
            x: images (B, in_chans, H, W).

        Returns:
            Module name ("stages.0.1": stage 0, after one unit) -> maps (B, C, h, w); nothing for a
            network without masks.
        """
        found: dict[str, Attention] = {}
        x = self.stem_pool(self._stem(x))
        for i, stage in enumerate(self.stages):
            for j, block in enumerate(stage.children()):
                if isinstance(block, AttentionModule):
                    found[f"stages.{i}.{j}"] = maps = block.attend(x)
                    x = block.post(maps.attended)
                else:
                    x = block(x)
        return found

    def attention_masks(self, x: Tensor) -> dict[str, Tensor]:
        """The soft mask (B, C, h, w) of every attention module by name, for images."""
        return {name: maps.mask for name, maps in self.attention_maps(x).items()}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Run the network and collect the maps of the stem (0) and of the stages (1, 2, ...).

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n maps if a number, all if None, else the maps named; negative
                numbers count from the end.
            norm: apply the final norm and ReLU to the last stage's map.
            stop_early: do not run the stages after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: leave the final map out of the answer.

        Returns:
            The intermediates (B, C, h, w), or (final map, intermediates); the final map is after
            the final norm unless a stage was left out.

        Raises:
            ValueError: an unknown output format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        count = last if stop_early else len(self.stages)
        x = self._stem(x)
        found = [x] if 0 in take else []
        x = self.stem_pool(x)
        for i, stage in enumerate(self.stages[:count], 1):
            x = stage(x)
            if i in take:
                found.append(self.norm(x) if norm and i == len(self.stages) else x)
        if intermediates_only:
            return found
        return (self.norm(x) if count == len(self.stages) else x), found

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the intermediates `indices` do not need; return the indices kept."""
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        if prune_norm or last < len(self.stages):
            self.norm = nn.Identity()
        self.stages = self.stages[:last]
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to the map after the final norm (B, C, h, w)."""
        x = self.stem_pool(self._stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, C, h, w) to logits (B, num_classes), or to what the classifier is fed."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _check_name(what: str, name: str, known: Mapping[str, Any] | Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"no {what} {name!r}; there are {', '.join(map(repr, known))}")


def _check_pool(global_pool: str, num_classes: int) -> None:
    _check_name("global_pool", global_pool, _POOLS)
    if not global_pool and num_classes:
        raise ValueError("a classifier needs pooled features; num_classes=0 goes without pooling")


def _init_weights(module: nn.Module) -> None:
    # Normal with variance 2 / fan-in ("Delving deep into rectifiers"), the paper's choice.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Map own and Caffe weights to the names of `ResidualAttentionNet`; strict.

    Accepts our own files (plain, or from `tools/train.py`; heads outside of the network are left
    out) and the blobs of the authors' Caffe definitions (`vision.models.ran_caffe`). A checkpoint
    without a classifier gives no classifier keys.

    Args:
        state_dict: checkpoint as read from the file.
        model: the `ResidualAttentionNet` that will load the result.

    Raises:
        CheckpointError: keys that have no place in the model, or that the model misses; the
            message lists them.
    """
    state = unwrap_state_dict(state_dict)
    if is_caffe(state):
        return from_caffe(state, model)
    mapped, _ = split_prefix(state, r"stem\.conv\.weight", "Residual Attention Network")
    head = ("head.fc.weight", "head.fc.bias")
    check_names(mapped, model.state_dict(), head, "m, p, t, r, unit, mask")
    return mapped


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "paper_ids": "arXiv:1704.06904",
        **kwargs,
    }


def _cifar_cfg() -> dict[str, Any]:
    # The paper subtracts the mean and does not divide.
    return _cfg(
        num_classes=10,
        input_size=(3, 32, 32),
        pool_size=(8, 8),
        crop_pct=1.0,
        mean=(0.4914, 0.4822, 0.4465),
        std=(1.0, 1.0, 1.0),
    )


_CIFAR_DEPTHS = (56, 92, 128, 164, 236, 452)
default_cfgs = generate_default_cfgs(
    {
        **{f"{name}.untrained": _cfg() for name in ("ran56", "ran92", "ranext56", "ranext92")},
        **{f"ran_cifar{depth}.untrained": _cifar_cfg() for depth in _CIFAR_DEPTHS},
        "ran_nano.untrained": _cifar_cfg(),
        "resnet164_cifar.untrained": _cifar_cfg(),
    }
)


def read_weights(path: str | Path) -> Mapping[str, Any]:
    """Read a checkpoint, also one of Caffe (`.caffemodel`), for `checkpoint_filter_fn`."""
    caffe = Path(path).suffix == ".caffemodel"
    return read_caffemodel(Path(path)) if caffe else read_checkpoint(path)


def _create_ran(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    if pretrained:
        kwargs = with_weights_of_file(kwargs, read_weights)
    build = partial(build_model_with_cfg, ResidualAttentionNet, variant, pretrained)
    stages = len(kwargs.get("widths", (256, 512, 1024, 2048)))
    return build(
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(stages + 1)), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def ran56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Attention-56, 31.8 M parameters, 6.3 G multiply-adds at 224 px."""
    return _create_ran("ran56", pretrained, **kwargs)


@register_model
def ran92(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Attention-92, 52.5 M parameters, 10.5 G multiply-adds at 224 px."""
    return _create_ran("ran92", pretrained, **{"m": (1, 2, 3, 0), **kwargs})


@register_model
def ranext56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AttentionNeXt-56, 31.3 M parameters, 6.4 G multiply-adds at 224 px."""
    return _create_ran("ranext56", pretrained, **{"unit": "resnext", **kwargs})


@register_model
def ranext92(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """AttentionNeXt-92, 52.1 M parameters, 10.7 G multiply-adds at 224 px."""
    args = {"unit": "resnext", "m": (1, 2, 3, 0), **kwargs}
    return _create_ran("ranext92", pretrained, **args)


def _create_cifar(variant: str, count: int, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network for 32 px with `count` modules in each stage, and a unit before and after them.

    The paper gives the depth, 36 count + 20, and parameter counts; stem, widths and depths of the
    masks are reconstructed to fit them.
    """
    args = {
        "num_classes": 10,
        "small_stem": True,
        "stem_width": 16,
        "widths": (64, 128, 256),
        "m": (count,) * 3,
        "mask_depths": (3, 2, 1),
        "units_before": (1, 1, 1),
        "units_after": (1, 1, 1),
        **kwargs,
    }
    return _create_ran(variant, pretrained, **args)


@register_model
def ran_cifar56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Attention-56 for CIFAR (a reconstruction), 1.03 M parameters, 0.12 G multiply-adds."""
    return _create_cifar("ran_cifar56", 1, pretrained, **kwargs)


@register_model
def ran_cifar92(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Attention-92 for CIFAR (a reconstruction), 1.84 M parameters, 0.21 G multiply-adds."""
    return _create_cifar("ran_cifar92", 2, pretrained, **kwargs)


@register_model
def ran_cifar128(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Attention-128 for CIFAR (a reconstruction), 2.65 M parameters, 0.30 G multiply-adds."""
    return _create_cifar("ran_cifar128", 3, pretrained, **kwargs)


@register_model
def ran_cifar164(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Attention-164 for CIFAR (a reconstruction), 3.46 M parameters, 0.39 G multiply-adds."""
    return _create_cifar("ran_cifar164", 4, pretrained, **kwargs)


@register_model
def ran_cifar236(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Attention-236 for CIFAR (a reconstruction), 5.08 M parameters, 0.57 G multiply-adds."""
    return _create_cifar("ran_cifar236", 6, pretrained, **kwargs)


@register_model
def ran_cifar452(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Attention-452 for CIFAR (a reconstruction), 8.51 M parameters, 0.96 G multiply-adds.

    The paper's 8.6 M parameters are met with r, not 2 r, units at the lowest level of the masks.
    """
    args = {"p": 2, "t": 4, "r": 3, "mask_bottom": 3, **kwargs}
    return _create_cifar("ran_cifar452", 6, pretrained, **args)


@register_model
def ran_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`ran_cifar56` at a quarter of its width, 0.07 M parameters: for tests and CPU examples."""
    args = {"stem_width": 8, "widths": (16, 32, 64), **kwargs}
    return _create_cifar("ran_nano", 1, pretrained, **args)


@register_model
def resnet164_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Pre-activation ResNet-164 (arXiv:1603.05027), 1.70 M parameters: what the paper compares to.

    It is a `ResidualAttentionNet` without modules.
    """
    args = {"units_before": (18, 18, 18), "units_after": (0, 0, 0), **kwargs}
    return _create_cifar("resnet164_cifar", 0, pretrained, **args)
