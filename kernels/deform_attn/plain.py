"""Multi-scale deformable attention by `grid_sample`, and the backward of the backend "torch"."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..seam import compute_dtype

Shapes = Sequence[tuple[int, int]]


def _by_level(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Maps (B·M, D, H, W), grids (B·M, Q, P, 2) and weights (B·M, 1, Q, P) of each level."""
    dtype = compute_dtype(value, locations, weights)
    maps = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes], 2)
    grids = (2 * locations.to(dtype) - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)
    shares = weights.to(dtype).permute(3, 0, 2, 1, 4).flatten(1, 2).unsqueeze(2)
    return [
        (pixels.unflatten(2, hw), grid, share)
        for pixels, grid, share, hw in zip(maps, grids, shares, shapes, strict=True)
    ]


def _sample(pixels: Tensor, grid: Tensor) -> Tensor:
    """Samples (B·M, D, Q, P) of maps (B·M, D, H, W)."""
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def deform_attn_plain(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Compute `deform_attn` (see there) so that plain autograd gives the gradients."""
    levels = _by_level(value, locations, weights, shapes)
    parts = [(_sample(pixels, grid) * share).sum(3) for pixels, grid, share in levels]
    out = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]  # (B·M, D, Q)
    batch, _, heads, _ = value.shape
    return out.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2).to(value.dtype)


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Serve the backend "torch"; see `deform_attn`."""
    return deform_attn_plain(value, locations, weights, shapes)


def backward(
    value: Tensor, locations: Tensor, weights: Tensor, grad: Tensor, shapes: Shapes
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `deform_attn`, with the samples taken anew instead of kept.

    Args:
        value: as for `deform_attn`.
        locations: as for `deform_attn`.
        weights: as for `deform_attn`.
        grad: gradient of the output, (B, Q, M·D).
        shapes: as for `deform_attn`.

    Returns:
        Gradients of value, locations and weights, each in its input's dtype.
    """
    batch, _, heads, channels = value.shape
    by_head = grad.unflatten(2, (heads, channels)).permute(0, 2, 3, 1).flatten(0, 1)
    gvs, gls, gws = [], [], []
    for pixels, grid, share in _by_level(value, locations, weights, shapes):
        up = by_head.to(pixels.dtype).unsqueeze(3)  # (B·M, D, Q, 1)
        gws.append((_sample(pixels, grid) * up).sum(1))
        g_pixels, g_grid = torch.ops.aten.grid_sampler_2d_backward(
            up * share, pixels, grid, 0, 0, False, [True, True]
        )  # bilinear, zeros beyond the border, corners not aligned
        gvs.append(g_pixels.flatten(2))
        gls.append(2 * g_grid)
    split = (batch, heads)
    gv = torch.cat(gvs, 2).unflatten(0, split).permute(0, 3, 1, 2)
    gl = torch.stack(gls).unflatten(1, split).permute(1, 3, 2, 0, 4, 5)
    gw = torch.stack(gws).unflatten(1, split).permute(1, 3, 2, 0, 4)
    return gv.to(value.dtype), gl.to(locations.dtype), gw.to(weights.dtype)
