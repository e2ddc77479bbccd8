"""Parts of ViT-Adapter (arXiv:2205.08534): a convolutional pyramid beside plain blocks.

The pyramid's tokens are those of the maps of strides 8, 16 and 32, one map after the other.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .activation import gelu
from .batch_norm import BatchNorm2d
from .conv import map_to_tokens, tokens_to_map
from .deform_attn import DeformableAttention

Shapes = Sequence[tuple[int, int]]
_EPS = 1e-6


class ConvNormAct(nn.Module):
    """A 3 x 3 convolution without bias, batch norm, ReLU."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False)
        self.norm = BatchNorm2d(out_chans)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        return self.norm(self.conv(x)).relu_()


class SpatialPrior(nn.Module):
    """Four maps of strides 4, 8, 16 and 32 from the image, by convolutions.

    Args:
        in_chans: channels of the image.
        width: channels at stride 4; twice as many at stride 8, four times beyond.
        dim: channels of the maps put out.
    """

    def __init__(self, in_chans: int, width: int, dim: int) -> None:
        super().__init__()
        stem = [ConvNormAct(i, width, s) for i, s in ((in_chans, 2), (width, 1), (width, 1))]
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1)),
                *(ConvNormAct(widths[i], widths[i + 1], 2) for i in range(3)),
            ]
        )
        self.projs = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (B, in_chans, H, W), H and W multiples of 32, to maps (B, dim, H/4, W/4) ..."""
        maps = []
        for stage, proj in zip(self.stages, self.projs, strict=True):
            x = stage(x)
            maps.append(proj(x))
        return maps


class ConvFFN(nn.Module):
    """Feed-forward layer with a depthwise convolution on each map between its linear layers.

    Args:
        dim: channels C.
        hidden: channels between the linear layers.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        """Tokens (B, S, C) of the maps of these heights and widths to tokens of the same shape."""
        parts = self.fc1(x).split([h * w for h, w in shapes], 1)
        mixed = [
            map_to_tokens(self.dwconv(tokens_to_map(part, hw)))
            for part, hw in zip(parts, shapes, strict=True)
        ]
        return self.fc2(gelu(torch.cat(mixed, 1)))


class Injector(nn.Module):
    """Bring what the pyramid sees into the tokens of the backbone: `x + gamma * attn(x, pyramid)`.

    Args:
        dim: channels C.
        num_heads: heads of the deformable attention.
        points: samples a head takes of every map.
        ratio: width of its values over `dim`.
        init_values: first value of gamma; 0 leaves the backbone as it was trained.
    """

    def __init__(
        self, dim: int, num_heads: int, points: int, ratio: float, init_values: float = 0.0
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=_EPS)
        self.attn = DeformableAttention(dim, num_heads, 3, points, ratio)
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor, places: Tensor, pyramid: Tensor, shapes: Shapes) -> Tensor:
        """Change tokens.

        Args:
            x: tokens of the backbone, (B, T, C).
            places: their centres from 0 to 1, (T, 2).
            pyramid: tokens of the pyramid, (B, S, C).
            shapes: height and width of its maps.

        Returns:
            (B, T, C).
        """
        attended = self.attn(self.query_norm(x), places, self.feat_norm(pyramid), shapes)
        return x + self.gamma * attended


class Extractor(nn.Module):
    """Bring what the backbone knows into the pyramid, by deformable attention and a `ConvFFN`.

    Args:
        dim: channels C.
        num_heads: heads of the deformable attention.
        points: samples a head takes.
        ratio: width of its values over `dim`.
        ffn_ratio: hidden width of the feed-forward layer over `dim`.
        drop_path: stochastic depth of the feed-forward branch.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        points: int,
        ratio: float,
        ffn_ratio: float,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=_EPS)
        self.attn = DeformableAttention(dim, num_heads, 1, points, ratio)
        self.ffn_norm = nn.LayerNorm(dim, eps=_EPS)
        self.ffn = ConvFFN(dim, int(dim * ffn_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, pyramid: Tensor, places: Tensor, x: Tensor, hw: tuple[int, int], shapes: Shapes
    ) -> Tensor:
        """Change the pyramid.

        Args:
            pyramid: tokens of the pyramid, (B, S, C).
            places: their centres from 0 to 1 over each map, (S, 2).
            x: tokens of the backbone, (B, T, C).
            hw: its grid.
            shapes: height and width of the pyramid's maps.

        Returns:
            (B, S, C).
        """
        attended = self.attn(self.query_norm(pyramid), places, self.feat_norm(x), [hw])
        pyramid = pyramid + attended
        return pyramid + self.drop_path(self.ffn(self.ffn_norm(pyramid), shapes))


def init_adapter(modules: Iterable[nn.Module]) -> None:
    """Set the first values of an adapter's layers as ViT-Adapter does.

    Linear layers by a truncated normal distribution of deviation 0.02, convolutions by a normal one
    of deviation sqrt(2 / (area * output channels / groups)), no biases; deformable attention by its
    own rule.
    """
    modules = list(modules)
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-2, b=2)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for module in modules:
        if isinstance(module, DeformableAttention):
            module.reset_parameters()
