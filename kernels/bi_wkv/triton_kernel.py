"""Bi-WKV in Triton: launchers of the kernels in `triton_jit`.

Two designs. Resident, for few tokens: a program has all tokens of its channels and carries the sums
from sweep to sweep itself (1 launch forward, 2 backward). Split, for many: the tokens are shared
out to several programs, and short launches carry the sums from one to the next (3 and 5).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from ..triton_support import LAUNCH, ceil_div, check_item, choose

# Tokens up to which the resident design is the default, and is tried at all.
_RESIDENT, _RESIDENT_AT_MOST = 512, 2048


@dataclass(frozen=True)
class Tiles:
    """Tile shapes of a launch, all but `length` powers of two.

    Attributes:
        plain_group: tokens unrolled into registers at moderate decay.
        group: the same at any decay, where a token needs more registers; divides `plain_group`.
        segments: runs of tokens that a program works on side by side.
        block_c: channels of a program.
        num_warps: warps of a program.
        length: tokens in a segment, a multiple of `plain_group`; None chooses the resident design,
            whose segments together hold all tokens.
    """

    plain_group: int
    group: int
    segments: int
    block_c: int
    num_warps: int
    length: int | None = None


FORWARD = Tiles(plain_group=8, group=4, segments=8, block_c=32, num_warps=8)
BACKWARD = Tiles(plain_group=4, group=2, segments=8, block_c=32, num_warps=8)


def _candidates(default: Tiles, tokens: int) -> list[Tiles]:
    split = [replace(default, length=length) for length in (64, 32, 128, 256)]
    if tokens > _RESIDENT_AT_MOST:
        return split
    return [default, *split] if tokens <= _RESIDENT else [*split, default]


def _choose(default: Tiles, name: str, run: Callable[[Tiles], object], k: Tensor) -> Tiles:
    batch, tokens, channels = k.shape
    sizes = ((batch * channels).bit_length(), tokens.bit_length())
    key = (f"bi_wkv {name}", *sizes, channels % 64, k.dtype, k.device)
    return choose(key, _candidates(default, tokens), run)


@dataclass(frozen=True)
class _Plan:
    """Sizes of a launch that follow from the tiles and the shape (B, T, C) of the keys."""

    tiles: Tiles
    shape: torch.Size

    @cached_property
    def length(self) -> int:
        """Tokens in a segment."""
        if self.tiles.length is not None:
            return self.tiles.length
        group = self.tiles.plain_group
        return ceil_div(self.shape[1], self.tiles.segments * group) * group

    @cached_property
    def segments(self) -> int:
        """Segments of an item, in whole programs."""
        rows = self.tiles.segments
        return ceil_div(self.shape[1], self.length * rows) * rows

    @cached_property
    def columns(self) -> int:
        """Programs that the channels need."""
        return ceil_div(self.shape[2], self.tiles.block_c)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs of a sweep."""
        return self.shape[0] * (self.segments // self.tiles.segments), self.columns

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What every sweep is told: tokens, channels, segments, tokens in a segment."""
        return self.shape[1], self.shape[2], self.segments, self.length

    @property
    def constants(self) -> dict[str, int | bool]:
        """Compile-time arguments of the sweeps."""
        return {
            "PLAIN_GROUP": self.tiles.plain_group,
            "GROUP": self.tiles.group,
            "SEGMENTS": self.tiles.segments,
            "BLOCK_C": self.tiles.block_c,
            "num_warps": self.tiles.num_warps,
            **LAUNCH,
        }

    def group_states(self, like: Tensor) -> Tensor:
        """Return room for a state of every group."""
        return self._states(like, self.length // self.tiles.group)

    def border_states(self, like: Tensor) -> Tensor:
        """Return room for the four states of every segment."""
        return self._states(like, 4)

    def _states(self, like: Tensor, each: int) -> Tensor:
        rows = self.shape[0] * self.columns * self.segments * each
        return like.new_empty(rows, 4, self.tiles.block_c, dtype=torch.float32)

    def carry(self, borders: Tensor, w: Tensor) -> None:
        """Launch what runs between two sweeps of the split design."""
        from .triton_jit import carry_kernel

        carry_kernel[self.shape[0], self.columns](
            borders, w, self.shape[2], self.segments, self.length, self.tiles.block_c,
            num_warps=1, **LAUNCH,
        )  # fmt: skip


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, tiles: Tiles | None = None) -> Tensor:
    """Compute Bi-WKV.

    Args:
        w: decay per token, (C,).
        u: bonus of the token itself, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        tiles: tile shapes (default: the fastest, measured at the first call).

    Returns:
        (B, T, C) in v's dtype, contiguous.

    Raises:
        ValueError: an item has 2^30 elements or more.
    """
    check_item("bi_wkv", k)
    w, u, k, v = (x.contiguous() for x in (w, u, k, v))
    run = partial(_forward, w, u, k, v)
    with torch.cuda.device_of(k):
        return run(tiles or _choose(FORWARD, "forward", run, k))


def _forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> Tensor:
    from .triton_jit import output_kernel, summary_kernel

    plan = _Plan(tiles, k.shape)
    resident = tiles.length is None
    rights, borders = plan.group_states(k), plan.border_states(k)
    y = torch.empty_like(v)
    if not resident:
        summary_kernel[plan.grid](k, v, w, u, rights, borders, *plan.sizes, **plan.constants)
        plan.carry(borders, w)
    output_kernel[plan.grid](
        k, v, w, u, y, rights, borders, *plan.sizes, RESIDENT=resident, **plan.constants
    )
    return y


def backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    gy: Tensor,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of Bi-WKV; those of w and u are the same in every run.

    Args:
        w: decay per token, (C,).
        u: bonus of the token itself, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        y: the output, unused: it is computed again without the rounding.
        gy: gradient of the output, (B, T, C).
        tiles: tile shapes (default: the fastest, measured at the first call).

    Returns:
        Gradients of w, u, k, v, contiguous, each in its input's dtype.

    Raises:
        ValueError: an item has 2^30 elements or more.
    """
    check_item("bi_wkv", k)
    w, u, k, v, gy = (x.contiguous() for x in (w, u, k, v, gy))
    run = partial(_backward, w, u, k, v, gy)
    with torch.cuda.device_of(k):
        return run(tiles or _choose(BACKWARD, "backward", run, k))


def _backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, gy: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .triton_jit import gradient_kernel, gradient_summary_kernel, summary_kernel

    plan = _Plan(tiles, k.shape)
    resident = tiles.length is None
    lefts, rights, g_lefts = (plan.group_states(k) for _ in range(3))
    borders, g_borders = plan.border_states(k), plan.border_states(k)
    gk, gv = torch.empty_like(k), torch.empty_like(v)
    shares = k.new_empty(2, k.shape[0] * plan.segments, k.shape[2], dtype=torch.float32)
    states = (lefts, rights, g_lefts, borders, g_borders)
    if not resident:
        summary_kernel[plan.grid](k, v, w, u, rights, borders, *plan.sizes, **plan.constants)
        plan.carry(borders, w)
    gradient_summary_kernel[plan.grid](
        k, v, gy, w, u, *states, *plan.sizes, RESIDENT=resident, **plan.constants
    )
    if not resident:
        plan.carry(g_borders, w)
    gradient_kernel[plan.grid](
        k, v, gy, w, u, gk, gv, *shares, *states, *plan.sizes, **plan.constants
    )
    gw, gu = shares.sum(1)
    return gw.to(w.dtype), gu.to(u.dtype), gk, gv
