"""Shift and mix in ordinary torch operators, and the explicit backward of the backend "torch"."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..seam import compute_dtype


def shift(x: Tensor, h: int, w: int, pixels: int, edges: Sequence[int]) -> Tensor:
    """Move four groups of channels by `pixels` patches, one in each direction.

    Args:
        x: tokens, row-major over the grid, (B, H*W, C).
        h: grid height.
        w: grid width.
        pixels: how far to move, in patches; negative moves all groups the other way.
        edges: channels where the groups that take the left, right, upper and lower neighbour
            begin, and where the last one ends.

    Returns:
        (B, H*W, C); zeros enter at the border.
    """
    grid = x.unflatten(1, (h, w))
    across = max(-w, min(pixels, w))
    down = max(-h, min(pixels, h))
    # F.pad counts from the last axis: (channels, width, height); a negative pad cuts.
    pads = (
        (0, 0, across, -across),
        (0, 0, -across, across),
        (0, 0, 0, 0, down, -down),
        (0, 0, 0, 0, -down, down),
    )
    parts = [F.pad(grid[..., edges[j] : edges[j + 1]], pad) for j, pad in enumerate(pads)]
    if edges[4] < x.shape[2]:
        parts.append(grid[..., edges[4] :])
    return torch.cat(parts, dim=-1).flatten(1, 2)


def shift_mix_plain(
    x: Tensor, mu: Tensor, h: int, w: int, pixels: int, edges: Sequence[int]
) -> list[Tensor]:
    """Compute `shift_mix` (see there) so that plain autograd gives the gradients."""
    shifted = shift(x, h, w, pixels, edges)
    dtype = torch.promote_types(x.dtype, mu.dtype)
    wide, shifted = x.to(dtype), shifted.to(dtype)
    return [torch.lerp(shifted, wide, one.to(dtype)).to(x.dtype) for one in mu.unbind()]


def forward(
    x: Tensor, mu: Tensor, h: int, w: int, pixels: int, edges: Sequence[int]
) -> list[Tensor]:
    """Serve the backend "torch"; see `shift_mix`."""
    return shift_mix_plain(x, mu, h, w, pixels, edges)


def backward(
    x: Tensor,
    mu: Tensor,
    grads: Sequence[Tensor],
    h: int,
    w: int,
    pixels: int,
    edges: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `shift_mix`.

    Args:
        x: tokens, (B, H*W, C).
        mu: proportions, (N, C).
        grads: gradient of each mixed copy, N times (B, H*W, C).
        h: grid height.
        w: grid width.
        pixels: how far to move, in patches.
        edges: limits of the groups of channels.

    Returns:
        Gradients of x and mu, each in its input's dtype.
    """
    dtype = compute_dtype(x, mu)
    difference = x.to(dtype) - shift(x, h, w, pixels, edges).to(dtype)
    kept = torch.zeros(x.shape, dtype=dtype, device=x.device)
    moved = torch.zeros_like(kept)
    gmu = torch.empty(mu.shape, dtype=dtype, device=mu.device)
    for n, grad in enumerate(grads):
        wide, one = grad.to(dtype), mu[n].to(dtype)
        kept.addcmul_(wide, one)
        moved.addcmul_(wide, 1 - one)
        gmu[n] = (wide * difference).sum((0, 1))
    gx = kept.add_(shift(moved, h, w, -pixels, edges))
    return gx.to(x.dtype), gmu.to(mu.dtype)
