"""The definition of multi-scale deformable attention, in float64."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shapes = Sequence[tuple[int, int]]


class _Corner(NamedTuple):
    """One of the four pixels around the samples of a level, all (B, Q, M, P)."""

    level: int
    pixel: Tensor  # its index among the pixels of all levels
    there: Tensor  # whether the sample is near the map and the pixel on it
    share_x: Tensor
    share_y: Tensor
    sign_x: int  # of the derivative of share_x by x
    sign_y: int


def _corners(locations: Tensor, shapes: Shapes) -> Iterator[_Corner]:
    start = 0
    for level, (height, width) in enumerate(shapes):
        x = locations[..., level, :, 0].double() * width - 0.5
        y = locations[..., level, :, 1].double() * height - 0.5
        near = (x > -1) & (x < width) & (y > -1) & (y < height)
        x, y = x.where(near, 0), y.where(near, 0)
        left, top = x.detach().floor(), y.detach().floor()
        for column, share_x, sign_x in ((left, left + 1 - x, -1), (left + 1, x - left, 1)):
            for row, share_y, sign_y in ((top, top + 1 - y, -1), (top + 1, y - top, 1)):
                there = near & (column >= 0) & (column < width) & (row >= 0) & (row < height)
                pixel = start + (row * width + column).where(there, 0).long()
                yield _Corner(level, pixel, there, share_x, share_y, sign_x, sign_y)
        start += height * width


def _places(value: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the item (B, 1, 1, 1) and of the head (M, 1)."""
    batch, _, heads, _ = value.shape
    item = torch.arange(batch, device=value.device)[:, None, None, None]
    return item, torch.arange(heads, device=value.device)[:, None]


def deform_attn_definition(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes
) -> Tensor:
    """Compute `deform_attn` (see there) in float64; plain autograd gives the gradients.

    A sample that lies a whole pixel or more beyond the outermost centres counts nothing, and so
    does a corner outside of the map.
    """
    value, weights = value.double(), weights.double()
    item, head = _places(value)
    out = value.new_zeros(*locations.shape[:3], value.shape[3])
    for corner in _corners(locations, shapes):
        share = weights[..., corner.level, :] * corner.share_x * corner.share_y
        picked = value[item, corner.pixel, head]  # (B, Q, M, P, D)
        out = out + torch.einsum("bqmp,bqmpd->bqmd", share.where(corner.there, 0), picked)
    return out.flatten(2)


def forward(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """Serve the backend "reference"; see `deform_attn`."""
    return deform_attn_definition(value, locations, weights, shapes).to(value.dtype)


def backward(
    value: Tensor, locations: Tensor, weights: Tensor, grad: Tensor, shapes: Shapes
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the definition; arguments and result as `plain.backward`.

    Autograd does not run inside a custom operator.
    """
    wide, shares = value.double(), weights.double()
    grad = grad.double().unflatten(2, value.shape[2:])  # (B, Q, M, D)
    item, head = _places(value)
    gv, gl, gw = (torch.zeros_like(x, dtype=torch.float64) for x in (value, locations, weights))
    for level, pixel, there, share_x, share_y, sign_x, sign_y in _corners(locations, shapes):
        share = shares[..., level, :].where(there, 0)
        dot = torch.einsum("bqmd,bqmpd->bqmp", grad, wide[item, pixel, head]).where(there, 0)
        part = (share * share_x * share_y)[..., None] * grad[..., None, :]
        gv.index_put_((item, pixel, head), part, accumulate=True)
        gw[..., level, :] += dot * share_x * share_y
        height, width = shapes[level]
        gl[..., level, :, 0] += dot * share * share_y * (sign_x * width)
        gl[..., level, :, 1] += dot * share * share_x * (sign_y * height)
    return gv.to(value.dtype), gl.to(locations.dtype), gw.to(weights.dtype)
