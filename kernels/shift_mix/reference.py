"""The definition of shift and mix, token by token, in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def shift_mix_definition(
    x: Tensor, mu: Tensor, h: int, w: int, pixels: int, edges: Sequence[int]
) -> list[Tensor]:
    """Look up every token's neighbour by its place; plain autograd gives the gradients.

    Args:
        x: tokens, row-major over the grid, (B, H*W, C).
        mu: proportions, (N, C).
        h: grid height.
        w: grid width.
        pixels: how far the neighbour is, in patches.
        edges: limits of the groups of channels.

    Returns:
        N tensors (B, H*W, C) in float64.
    """
    x, mu = x.double(), mu.double()
    place, exists = _neighbours(h, w, pixels, edges, x.shape[2], x.device)
    neighbour = x.gather(1, place.expand_as(x)).where(exists, 0)
    return [neighbour * (1 - one) + x * one for one in mu]


def _neighbours(
    h: int, w: int, pixels: int, edges: Sequence[int], channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the neighbour's index (0 if it has none) and whether there is one, both (T, C)."""
    token = torch.arange(h * w, device=device)[:, None]
    group = torch.bucketize(
        torch.arange(channels, device=device), torch.tensor(edges[1:], device=device), right=True
    )
    steps = pixels * torch.tensor([(0, -1), (0, 1), (-1, 0), (1, 0), (0, 0)], device=device)
    row, column = token // w + steps[group, 0], token % w + steps[group, 1]
    exists = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return (row * w + column).where(exists, 0), exists


def forward(
    x: Tensor, mu: Tensor, h: int, w: int, pixels: int, edges: Sequence[int]
) -> list[Tensor]:
    """Serve the backend "reference"; see `shift_mix`."""
    return [y.to(x.dtype) for y in shift_mix_definition(x, mu, h, w, pixels, edges)]


def backward(
    x: Tensor,
    mu: Tensor,
    grads: Sequence[Tensor],
    h: int,
    w: int,
    pixels: int,
    edges: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of the definition; arguments and result as `plain.backward`.

    Autograd does not run inside a custom operator.
    """
    place, exists = _neighbours(h, w, pixels, edges, x.shape[2], x.device)
    wide = x.double()
    difference = wide - wide.gather(1, place.expand_as(x)).where(exists, 0)
    g = torch.stack([grad.double() for grad in grads])  # (N, B, T, C)
    one = mu.double()[:, None, None]
    gx = (g * one).sum(0)
    gx.scatter_add_(1, place.expand_as(x), (g * (1 - one)).sum(0).where(exists, 0))
    return gx.to(x.dtype), (g * difference).sum((1, 2)).to(mu.dtype)
