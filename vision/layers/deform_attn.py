"""Multi-scale deformable attention (arXiv:2010.04159) as a layer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision.kernels.deform_attn import deform_attn


def pixel_centres(shapes: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
    """Centres of the pixels of several maps, one map after the other, row-major.

    Args:
        shapes: height and width of each map.
        like: a tensor on the device wanted; float64 gives float64, else float32.

    Returns:
        x and y from 0 to 1 over each map, (pixels of all maps, 2).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)

    def centres(count: int) -> Tensor:
        return (torch.arange(count, dtype=dtype, device=like.device) + 0.5) / count

    grids = [torch.meshgrid(centres(h), centres(w), indexing="ij") for h, w in shapes]
    return torch.cat([torch.stack((x, y), -1).flatten(0, 1) for y, x in grids])


class DeformableAttention(nn.Module):
    """Attention of every query to a few points around its place on several maps.

    Args:
        dim: channels C of queries, maps and output.
        num_heads: heads M.
        levels: number L of maps.
        points: samples a head takes of every map.
        ratio: width of the values over `dim`.

    Raises:
        ValueError: the heads do not divide the width of the values.
    """

    def __init__(
        self, dim: int, num_heads: int, levels: int, points: int = 4, ratio: float = 1.0
    ) -> None:
        super().__init__()
        width = int(dim * ratio)
        if width < 1 or width % num_heads:
            raise ValueError(
                f"deformable attention needs heads that divide the width of the values, got "
                f"{num_heads} heads for int({dim} * {ratio}) = {width}"
            )
        self.num_heads, self.levels, self.points = num_heads, levels, points
        self.offsets = nn.Linear(dim, num_heads * levels * points * 2)
        self.weights = nn.Linear(dim, num_heads * levels * points)
        self.value = nn.Linear(dim, width)
        self.output = nn.Linear(width, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let every head look in a direction of its own, point p at p pixels; equal weights."""
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        way = torch.stack((angle.cos(), angle.sin()), -1)
        way = way / way.abs().amax(-1, keepdim=True)  # onto the square around the query
        far = torch.arange(1, self.points + 1)[:, None] * way[:, None, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.offsets.bias.copy_(far.expand(-1, self.levels, -1, -1).flatten())
        for layer in (self.value, self.output):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.weights, self.value, self.output):
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, places: Tensor, feat: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C).
            places: x and y of the queries from 0 to 1 over the maps, (Q, 2), float32 at least:
                half precision has too few digits for them.
            feat: the maps one after the other, row-major, (B, S, C).
            shapes: height and width of each map.

        Returns:
            (B, Q, C).
        """
        heads = (self.num_heads, self.levels, self.points)
        offsets = self.offsets(query).unflatten(-1, (*heads, 2)).to(places.dtype)
        pixels = [torch.stack([_scalar(side, places) for side in (w, h)]) for h, w in shapes]
        locations = places[:, None, None, None] + offsets / torch.stack(pixels)[:, None]
        weights = self.weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        value = self.value(feat).unflatten(-1, (self.num_heads, -1))
        return self.output(deform_attn(value, locations, weights.unflatten(-1, heads[1:]), shapes))


def _scalar(side: int, like: Tensor) -> Tensor:
    return torch.scalar_tensor(side, dtype=like.dtype, device=like.device)
