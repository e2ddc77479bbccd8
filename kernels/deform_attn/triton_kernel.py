"""Deformable attention in Triton: launchers of the kernels in `triton_jit`.

A launch forward and one backward. The gradient of the values is a scatter: samples add to pixels
in any order, in float32, so its last bits may differ from run to run. Under
`torch.use_deterministic_algorithms` integers of 64 bits are added instead, and it is the same in
every run, as all else always is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..triton_support import LAUNCH, ceil_div, choose

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Tiles:
    """Tile shapes of a launch, powers of two.

    Attributes:
        elements: of a program, its rows times the channels it takes at once.
        num_warps: warps of a program.
        block: most channels of a head that are taken at once.
    """

    elements: int
    num_warps: int
    block: int = 128

    def constants(self, levels: int, channels: int) -> dict[str, int]:
        """Return the compile-time arguments for some levels and channels of a head."""
        block = min(self.block, 1 << (channels - 1).bit_length())
        return {"LEVELS": levels, "ROWS": ceil_div(self.elements, block), "BLOCK": block}


DEFAULT = Tiles(256, 4)
_CANDIDATES = (DEFAULT, Tiles(256, 2), Tiles(512, 4), Tiles(1024, 8))


def _check(value: Tensor, locations: Tensor) -> None:
    """Check that the kernels can count what belongs to one item in 31 bits."""
    _, pixels, heads, channels = value.shape
    queries, samples = locations.shape[1], locations.shape[3] * locations.shape[4]
    if heads * max(pixels * channels, queries * channels, 2 * queries * samples) >= 1 << 30:
        raise ValueError(
            "the backend 'triton' of deform_attn takes less than 2^30 numbers an item, got value "
            f"{tuple(value.shape)} and locations {tuple(locations.shape)}; call it for some of the "
            "heads at a time"
        )


def _choose(
    name: str,
    run: Callable[[Tiles], object],
    value: Tensor,
    locations: Tensor,
    shapes: Shapes,
) -> Tiles:
    *_, points, _ = locations.shape
    rows = (locations.numel() // (2 * len(shapes) * points)).bit_length()
    sizes = (rows, value[..., 0].numel().bit_length(), value.shape[3], len(shapes), points)
    key = (f"deform_attn {name}", *sizes, value.dtype, value.device)
    return choose(key, _CANDIDATES, run)


def _launch(
    kernel: Any,
    tiles: Tiles,
    value: Tensor,
    locations: Tensor,
    shapes: Shapes,
    *more: Tensor | None,
    across: bool,
) -> None:
    """Run a kernel for the rows of all items and, where it says so, for blocks of channels."""
    batch, pixels, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    constants = tiles.constants(len(shapes), channels)
    blocks = ceil_div(channels, constants["BLOCK"]) if across else 1
    sides = tuple(2 * side + 1 for shape in shapes for side in shape)
    kernel[batch * ceil_div(queries * heads, constants["ROWS"]), blocks](
        value, locations, *more, sides, pixels, queries, heads, channels, points,
        **constants, num_warps=tiles.num_warps, **LAUNCH,
    )  # fmt: skip


def forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, tiles: Tiles | None = None
) -> Tensor:
    """Serve the backend "triton"; see `deform_attn`.

    Args:
        value: the maps of all levels, (B, S, M, D).
        locations: of the samples, (B, Q, M, L, P, 2).
        weights: of the samples, (B, Q, M, L, P).
        shapes: height and width of each level.
        tiles: tile shapes (default: the fastest, measured at the first call).

    Returns:
        (B, Q, M·D) in value's dtype, contiguous.

    Raises:
        ValueError: an item has 2^30 numbers or more.
    """
    _check(value, locations)
    value, locations, weights = (x.contiguous() for x in (value, locations, weights))
    run = partial(_forward, value, locations, weights, shapes)
    with torch.cuda.device_of(value):
        return run(tiles or _choose("forward", run, value, locations, shapes))


def _forward(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes, tiles: Tiles
) -> Tensor:
    from .triton_jit import forward_kernel

    batch, _, heads, channels = value.shape
    y = value.new_empty(batch, locations.shape[1], heads * channels)
    _launch(forward_kernel, tiles, value, locations, shapes, weights, y, across=True)
    return y


def backward(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad: Tensor,
    shapes: Shapes,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward`.

    Those of locations and weights are the same in every run; that of value is so to the last bits
    only under `torch.use_deterministic_algorithms` (see above), where it is NaN throughout if
    `grad` or `weights` are not finite.

    Args:
        value: the maps of all levels, (B, S, M, D).
        locations: of the samples, (B, Q, M, L, P, 2).
        weights: of the samples, (B, Q, M, L, P).
        grad: gradient of the output, (B, Q, M·D).
        shapes: height and width of each level.
        tiles: tile shapes (default: the fastest, measured at the first call).

    Returns:
        Gradients of value, locations and weights, contiguous, each in its input's dtype.

    Raises:
        ValueError: an item has 2^30 numbers or more.
    """
    _check(value, locations)
    value, locations, weights, grad = (x.contiguous() for x in (value, locations, weights, grad))
    run = partial(_backward, value, locations, weights, grad, shapes)
    with torch.cuda.device_of(value):
        return run(tiles or _choose("backward", run, value, locations, shapes))


def _scale(weights: Tensor, grad: Tensor, samples: int) -> Tensor:
    """Return what makes integers of the terms of the gradient of value.

    Args:
        weights: of the samples, any shape.
        grad: gradient of the output, any shape.
        samples: most that may add to one pixel.

    Returns:
        A power of two such that 62 bits hold any sum of `samples` products of a weight and a
        gradient times it, a float32 scalar on their device; NaN if one of them is not finite.
    """
    most = [torch.linalg.vector_norm(x, torch.inf).float() for x in (weights, grad)]
    bound = most[0] * most[1]
    exponent = 62 - samples.bit_length() - torch.frexp(bound).exponent
    scale = torch.exp2(exponent.clamp_max(126).double()).float()  # within float32, so its inverse
    return scale.where(bound.isfinite(), torch.nan)


def _backward(
    value: Tensor, locations: Tensor, weights: Tensor, grad: Tensor, shapes: Shapes, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_jit import backward_kernel

    scale, dtype = None, torch.float32
    if torch.are_deterministic_algorithms_enabled():
        scale, dtype = _scale(weights, grad, locations.shape[1] * locations.shape[4]), torch.int64
    sums = torch.zeros_like(value, dtype=dtype)
    gl, gw = torch.empty_like(locations), torch.empty_like(weights)
    more = (weights, grad, sums, scale, gl, gw)
    _launch(backward_kernel, tiles, value, locations, shapes, *more, across=False)
    gv = sums if scale is None else sums * scale.reciprocal()
    return gv.to(value.dtype), gl, gw
