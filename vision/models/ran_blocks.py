"""Blocks of Residual Attention Network (arXiv:1704.06904): units, soft masks, attention modules.

The layers are those of the authors' Caffe definitions: convolutions without bias, max-pooling of
3 px with stride 2 that rounds the size up and does not pad, bilinear resizing that keeps the
corners.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CARDINALITY = 32  # groups of AttentionNeXt's 3x3 convolutions


def conv(in_chs: int, out_chs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1, without bias."""
    return nn.Conv2d(
        in_chs, out_chs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )


def norm_act(channels: int) -> nn.Sequential:
    """Batch normalisation and ReLU."""
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class HalvingPool(nn.MaxPool2d):
    """Max-pooling to half the size, rounded down; a map of one pixel's height or width is kept."""

    def __init__(self) -> None:
        super().__init__(kernel_size=3, stride=2, padding=0, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H // 2, W // 2), or itself when a side would vanish."""
        if min(x.shape[-2:]) < 2:
            return x
        if x.device.type != "cpu" or x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        # torch vectorises it over channels that lie together: faster, both conversions included.
        return super().forward(x.contiguous(memory_format=torch.channels_last)).contiguous()


def resize_as(x: Tensor, like: Tensor) -> Tensor:
    """Map (B, C, h, w) to (B, C, H, W), the height and width of another one."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


class Recomputable(nn.Module):
    """A part that can forget its inner activations and compute them again for the gradients."""

    grad_checkpointing = False

    def compute(self, x: Tensor) -> Tensor:
        """The part's own forward pass."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the part's output."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            contexts = partial(_checkpoint_contexts, self)
            return checkpoint(self.compute, x, use_reentrant=False, context_fn=contexts)
        return self.compute(x)


def _checkpoint_contexts(
    part: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _frozen_statistics(part)


@contextmanager
def _frozen_statistics(part: nn.Module) -> Iterator[None]:
    """Keep running statistics: a batch that is computed a second time has been counted."""
    norms: list[Any] = [m for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


class PreActUnit(Recomputable):
    """Bottleneck residual unit with pre-activation (arXiv:1603.05027), a quarter as wide inside.

    Args:
        in_chs: channels of the input.
        out_chs: channels of the output.
        stride: of the 3x3 convolution.
    """

    pre_activation = True
    folds = (("conv1", "bn2"), ("conv2", "bn3"))

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        mid = out_chs // 4
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.conv1 = conv(in_chs, mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv2 = conv(mid, mid, 3, stride)
        self.bn3 = nn.BatchNorm2d(mid)
        self.conv3 = conv(mid, out_chs)
        same = in_chs == out_chs and stride == 1
        self.proj = None if same else conv(in_chs, out_chs, 1, stride)

    def compute(self, x: Tensor) -> Tensor:
        """Raw sum of the shortcut and the branch; a projection reads the activated input."""
        y = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.proj is None else self.proj(y)
        y = F.relu(self.bn2(self.conv1(y)), inplace=True)
        y = F.relu(self.bn3(self.conv2(y)), inplace=True)
        return self.conv3(y).add_(shortcut)


class ResNeXtUnit(Recomputable):
    """Residual unit with grouped 3x3 convolution and post-activation (arXiv:1611.05431).

    Args:
        in_chs: channels of the input.
        out_chs: channels of the output; half as many inside, in 32 groups.
        stride: of the 3x3 convolution.
    """

    pre_activation = False
    folds = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("proj", "proj_bn"))

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        mid = out_chs // 2
        self.conv1 = conv(in_chs, mid)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv(mid, mid, 3, stride, groups=gcd(mid, CARDINALITY))
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = conv(mid, out_chs)
        self.bn3 = nn.BatchNorm2d(out_chs)
        same = in_chs == out_chs and stride == 1
        self.proj = nn.Identity() if same else conv(in_chs, out_chs, 1, stride)
        self.proj_bn = nn.Identity() if same else nn.BatchNorm2d(out_chs)

    def compute(self, x: Tensor) -> Tensor:
        """Activated sum of the shortcut and the branch."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.proj_bn(self.proj(x)) + self.bn3(self.conv3(y)), inplace=True)


UNITS: dict[str, type[PreActUnit] | type[ResNeXtUnit]] = {
    "preact": PreActUnit,
    "resnext": ResNeXtUnit,
}
Unit = Callable[[int, int], nn.Module]


def unit_row(unit: Unit, channels: int, count: int) -> nn.Sequential:
    """`count` units of one width in a row."""
    return nn.Sequential(*(unit(channels, channels) for _ in range(count)))


def channel_attention(x: Tensor) -> Tensor:
    """Channels of each position scaled to length 1 (equation 5 of the paper); in [-1, 1]."""
    return F.normalize(x, dim=1)


def spatial_attention(x: Tensor) -> Tensor:
    """Sigmoid after standardising each channel over its map (equation 6); in (0, 1)."""
    var, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    return torch.sigmoid((x - mean) * torch.rsqrt(var + 1e-5))


MASK_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mixed": torch.sigmoid,
    "channel": channel_attention,
    "spatial": spatial_attention,
}


class MaskHead(Recomputable):
    """Two 1x1 convolutions and the activation that make a mask of a map.

    Args:
        channels: of the map and of the mask.
        pre_activation: normalise and activate before the first convolution.
        activation: a name in `MASK_ACTIVATIONS`.
    """

    folds = (("conv1", "bn"),)

    def __init__(self, channels: int, pre_activation: bool, activation: str) -> None:
        super().__init__()
        self.norm = norm_act(channels) if pre_activation else nn.Identity()
        self.conv1 = conv(channels, channels)
        self.bn = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels)
        self.activation = MASK_ACTIVATIONS[activation]

    def compute(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the mask (B, C, H, W)."""
        x = F.relu(self.bn(self.conv1(self.norm(x))), inplace=True)
        return self.activation(self.conv2(x))


class EncoderDecoderMask(nn.Module):
    """Soft mask branch: down by pooling, up by resizing, one skip unit a level (figure 2).

    A level whose pooling would leave nothing of a small map is computed without the pooling, so
    that any input size works and every parameter is used.

    Args:
        channels: of the map and of the mask.
        head: makes the mask.
        unit: makes a residual unit.
        depth: number of poolings.
        r: residual units between two poolings.
        bottom: residual units at the lowest level.
    """

    def __init__(
        self, channels: int, head: nn.Module, unit: Unit, depth: int, r: int, bottom: int
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(
                f"an encoder-decoder mask wants a mask_depth of 1 or more, got {depth}; "
                "mask='local' has no pooling"
            )
        self.pool = HalvingPool()
        levels = depth - 1
        self.down = nn.ModuleList(unit_row(unit, channels, r) for _ in range(levels))
        self.down.append(unit_row(unit, channels, bottom))
        self.skip = nn.ModuleList(unit(channels, channels) for _ in range(levels))
        self.up = nn.ModuleList(unit_row(unit, channels, r) for _ in range(levels))
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the mask (B, C, H, W)."""
        maps = [x]
        for down in self.down:
            maps.append(down(self.pool(maps[-1])))
        y = maps.pop()
        for skip, up in zip(reversed(self.skip), reversed(self.up), strict=True):
            level = maps.pop()
            y = up(skip(level) + resize_as(y, level))
        return self.head(resize_as(y, x))


class LocalMask(nn.Module):
    """Soft mask branch of three residual units without pooling (table 4 of the paper).

    Args:
        channels: of the map and of the mask.
        head: makes the mask.
        unit: makes a residual unit.
    """

    def __init__(self, channels: int, head: nn.Module, unit: Unit) -> None:
        super().__init__()
        self.units = unit_row(unit, channels, 3)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the mask (B, C, H, W)."""
        return self.head(self.units(x))


def attention_residual(trunk: Tensor, mask: Tensor) -> Tensor:
    """(1 + M) T: attention residual learning, equation 3 of the paper."""
    return torch.addcmul(trunk, trunk, mask)


def naive_attention(trunk: Tensor, mask: Tensor) -> Tensor:
    """M T: the paper's naive attention learning, equation 1."""
    return trunk * mask


ATTENTION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arl": attention_residual,
    "nal": naive_attention,
}


class Attention(NamedTuple):
    """What an attention module makes on its way, each (B, C, H, W).

    Attributes:
        trunk: features T of the trunk branch.
        mask: soft mask M.
        attended: T after the mask is applied.
    """

    trunk: Tensor
    mask: Tensor
    attended: Tensor


class AttentionModule(nn.Module):
    """Trunk branch and soft mask branch between two rows of residual units.

    Args:
        channels: of all maps.
        unit: makes a residual unit.
        mask: the soft mask branch.
        attention: how the mask is applied, a name in `ATTENTION`.
        p: residual units before the branches, and again after them.
        t: residual units of the trunk branch.
    """

    def __init__(
        self, channels: int, unit: Unit, mask: nn.Module, attention: str, p: int, t: int
    ) -> None:
        super().__init__()
        self.pre = unit_row(unit, channels, p)
        self.trunk = unit_row(unit, channels, t)
        self.mask = mask
        self.post = unit_row(unit, channels, p)
        self.combine = ATTENTION[attention]

    def attend(self, x: Tensor) -> Attention:
        """Map (B, C, H, W) to the branches' outputs, before the last units."""
        x = self.pre(x)
        trunk, mask = self.trunk(x), self.mask(x)
        return Attention(trunk, mask, self.combine(trunk, mask))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H, W)."""
        return self.post(self.attend(x).attended)
