"""Shift and mix in Triton: launchers of the kernels in `triton_jit`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..cpu import MOST_MIXED
from ..triton_support import LAUNCH, ceil_div, check_item, choose

# What the kernels have arguments for.


@dataclass(frozen=True)
class Tiles:
    """Tokens and channels of a program, powers of two, and its warps."""

    block_t: int
    block_c: int
    num_warps: int


FORWARD = Tiles(16, 64, 4)
BACKWARD = Tiles(16, 64, 8)
# 4 elements a thread: with 8 proportions more of them overflow the registers.
_CANDIDATES = (Tiles(8, 64, 4), Tiles(8, 128, 8), Tiles(32, 32, 8))


def _grid(x: Tensor, tiles: Tiles) -> tuple[int, int]:
    batch, tokens, channels = x.shape
    return batch * ceil_div(tokens, tiles.block_t), ceil_div(channels, tiles.block_c)


def _constants(mu: Tensor, tiles: Tiles) -> dict[str, int | bool]:
    return {
        "N": mu.shape[0],
        "BLOCK_T": tiles.block_t,
        "BLOCK_C": tiles.block_c,
        "num_warps": tiles.num_warps,
        **LAUNCH,
    }


def _eight(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fill the arguments of a kernel up; it does not touch those past the last."""
    return [*tensors, *[tensors[0]] * (MOST_MIXED - len(tensors))]


def _choose(
    name: str, default: Tiles, run: Callable[[Tiles], object], x: Tensor, mu: Tensor
) -> Tiles:
    key = (f"shift_mix {name}", x.numel().bit_length(), *mu.shape, x.dtype, x.device)
    return choose(key, [default, *_CANDIDATES], run)


def forward(
    x: Tensor,
    mu: Tensor,
    h: int,
    w: int,
    pixels: int,
    edges: Sequence[int],
    tiles: Tiles | None = None,
) -> list[Tensor]:
    """Serve the backend "triton"; see `shift_mix`.

    Args:
        x: tokens, (B, H*W, C).
        mu: proportions, (N, C), N at most 8.
        h: grid height.
        w: grid width.
        pixels: how far to move, in patches.
        edges: limits of the groups of channels.
        tiles: tile shapes (default: the fastest, measured at the first call).

    Returns:
        N tensors (B, H*W, C) in x's dtype.

    Raises:
        ValueError: too many proportions, or an item has 2^30 elements or more.
    """
    check_item("shift_mix", x)
    run = partial(_forward, x.contiguous(), mu.contiguous(), (h, w), _reach(pixels, h, w), edges)
    with torch.cuda.device_of(x):
        return run(tiles or _choose("forward", FORWARD, run, x, mu))


def _reach(pixels: int, h: int, w: int) -> int:
    """Return a number of patches that leads as far but stays in the kernels' integers."""
    return min(pixels, max(h, w))


def _forward(
    x: Tensor, mu: Tensor, hw: tuple[int, int], pixels: int, edges: Sequence[int], tiles: Tiles
) -> list[Tensor]:
    from .triton_jit import forward_kernel

    ys = [torch.empty_like(x) for _ in range(mu.shape[0])]
    forward_kernel[_grid(x, tiles)](
        x, mu, *_eight(ys), *hw, x.shape[2], pixels, *edges[1:], **_constants(mu, tiles)
    )
    return ys


def backward(
    x: Tensor,
    mu: Tensor,
    grads: Sequence[Tensor],
    h: int,
    w: int,
    pixels: int,
    edges: Sequence[int],
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `shift_mix`; that of mu is the same in every run.

    Args:
        x: tokens, (B, H*W, C).
        mu: proportions, (N, C), N at most 8.
        grads: gradient of each mixed copy, N times (B, H*W, C).
        h: grid height.
        w: grid width.
        pixels: how far to move, in patches.
        edges: limits of the groups of channels.
        tiles: tile shapes (default: the fastest, measured at the first call).

    Returns:
        Gradients of x and mu, each in its input's dtype.

    Raises:
        ValueError: too many proportions, or an item has 2^30 elements or more.
    """
    check_item("shift_mix", x)
    whole = [grad.contiguous() for grad in grads]
    inputs = (x.contiguous(), mu.contiguous(), whole)
    run = partial(_backward, *inputs, (h, w), _reach(pixels, h, w), edges)
    with torch.cuda.device_of(x):
        return run(tiles or _choose("backward", BACKWARD, run, x, mu))


def _backward(
    x: Tensor,
    mu: Tensor,
    grads: Sequence[Tensor],
    hw: tuple[int, int],
    pixels: int,
    edges: Sequence[int],
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    from .triton_jit import backward_kernel

    grid = _grid(x, tiles)
    gx = torch.empty_like(x)
    shares = x.new_empty(grid[0], *mu.shape, dtype=torch.float32)
    backward_kernel[grid](
        x, mu, *_eight(grads), gx, shares, *hw, x.shape[2], pixels, *edges[1:],
        **_constants(mu, tiles),
    )  # fmt: skip
    return gx, shares.sum(0).to(mu.dtype)
