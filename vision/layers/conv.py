"""Inverted residual convolutions with a LayerNorm, on maps and on tokens."""

from timm.layers import LayerNorm2d, make_divisible
from torch import Tensor, nn

from .activation import gelu


class MBConv(nn.Module):
    """Pre-norm inverted residual: `shortcut(x) + W_2 gelu(depthwise(gelu(W_1 norm(x))))`.

    Source: ViTamin, arXiv:2404.02132; no squeeze and excitation, no BatchNorm. The shortcut
    averages 3 x 3 pixels where the stride is 2 and is a 1 x 1 convolution where the width changes.
    Memory format: the norm leaves its result in channels_last, so all that follows runs in it.

    Args:
        in_chans: channels C of the input.
        out_chans: channels C' of the output.
        stride: 1 or 2.
        ratio: hidden width over `out_chans`, rounded to a multiple of 8.

    Raises:
        ValueError: another stride.
    """

    def __init__(
        self, in_chans: int, out_chans: int, *, stride: int = 1, ratio: float = 4.0
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"MBConv has a stride of 1 or 2, got {stride}")
        hidden = make_divisible(out_chans * ratio, 8)
        self.shortcut = nn.Sequential()
        if stride == 2:
            self.shortcut.add_module("pool", nn.AvgPool2d(3, 2, 1, count_include_pad=False))
        if in_chans != out_chans:
            self.shortcut.add_module("proj", nn.Conv2d(in_chans, out_chans, 1))
        self.norm = LayerNorm2d(in_chans, eps=1e-6)
        self.expand = nn.Conv2d(in_chans, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden)
        self.project = nn.Conv2d(hidden, out_chans, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        y = gelu(self.expand(self.norm(x)))
        y = gelu(self.depthwise(y))
        return self.shortcut(x) + self.project(y)


class MBConvBlock(nn.Module):
    """An `MBConv` of stride 1 in the place of a token block.

    Args:
        dim: channels C.
        mlp_ratio: hidden width over `dim`.
    """

    def __init__(self, dim: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.conv = MBConv(dim, dim, ratio=mlp_ratio)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Tokens (B, H*W, C) on the grid hw = (H, W) to tokens of the same shape."""
        return map_to_tokens(self.conv(tokens_to_map(x, hw)))


def tokens_to_map(x: Tensor, hw: tuple[int, int]) -> Tensor:
    """View tokens (B, H*W, C), row-major over hw = (H, W), as a channels_last map (B, C, H, W)."""
    return x.transpose(1, 2).unflatten(2, hw)


def map_to_tokens(x: Tensor) -> Tensor:
    """View a map (B, C, H, W) as tokens (B, H*W, C); contiguous if the map is channels_last."""
    return x.flatten(2).transpose(1, 2)
