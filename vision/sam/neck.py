"""From the encoder's last map(s) to the image embedding."""

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn


class Neck(nn.Module):
    """Project the deepest map, or the two deepest, to the decoder's width (arXiv:2406.19369).

    Args:
        channels: channels of the maps, the one of stride 16 first.
        dim: channels of the image embedding.
    """

    def __init__(self, channels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.projs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, dim, 1, bias=False),
                LayerNorm2d(dim, eps=1e-6),
                nn.Conv2d(dim, dim, 3, padding=1, bias=False),
                LayerNorm2d(dim, eps=1e-6),
            )
            for width in channels
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, channels, h, w), deeper ones smaller, to (B, dim, h, w) of the first."""
        y = self.projs[0](maps[0])
        for proj, x in zip(self.projs[1:], maps[1:], strict=True):
            size = y.shape[-2:]
            y = y + F.interpolate(proj(x), size=size, mode="bilinear", align_corners=False)
        return y
