"""What the two mixers of VRWKV6 share: a token shift in every head, and proportions from the data.

Source: RWKV-6 (arXiv:2404.05892) as OpenGVLab/Vision-RWKV takes it to grids. Tokens past the grid
(a class token, which comes last) are not shifted: they are their own neighbour.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vision.kernels.shift_mix.plain import shift

from .kept_grid import KeptGrid
from .shift_mix import SHIFTS, Grid, ShiftMix

# Width of the two low-rank maps, as published.
MIX_RANK = 32
DECAY_RANK = 64
_LORA_INIT = 1e-4


def head_shift(
    x: Tensor,
    hw: Grid,
    head_size: int,
    *,
    kind: str = "q_shift",
    pixels: int = 1,
    channel_gamma: float = 0.25,
) -> Tensor:
    """Shift the tokens of a grid, the channels of every head grouped for themselves.

    Args:
        x: tokens, row-major over the grid, then those past it, (B, H*W + extra, C).
        hw: grid height and width.
        head_size: channels of a head, a divisor of C.
        kind: name in `SHIFTS`.
        pixels: how far to move, in patches, at least 1.
        channel_gamma: share of a head's channels that moves in one direction.

    Returns:
        The shape of x; zeros enter at the border, tokens past the grid stay.

    Raises:
        ValueError: there are fewer tokens than places on the grid.
    """
    edges, grid = SHIFTS[kind](head_size, hw, channel_gamma)
    if isinstance(grid, KeptGrid):
        options: dict[str, Any] = {"kind": kind, "pixels": pixels, "channel_gamma": channel_gamma}
        return grid.pick(head_shift(grid.spread(x), (grid[0], grid[1]), head_size, **options))
    h, w = grid
    if x.shape[1] < h * w:
        raise ValueError(f"head_shift got {x.shape[1]} tokens for a grid of {h} x {w} = {h * w}")
    batch, tokens, channels = x.shape
    heads = x[:, : h * w].reshape(batch, h * w, channels // head_size, head_size).transpose(1, 2)
    moved = shift(heads.flatten(0, 1), h, w, pixels, edges)  # (B * heads, H*W, N)
    moved = moved.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch, h * w, channels)
    return moved if tokens == h * w else torch.cat([moved, x[:, h * w :]], 1)


class HeadShiftMix(ShiftMix):
    """Do as `ShiftMix`, shifting by `head_shift`.

    Args:
        initial: first value of each proportion, name -> (C,).
        head_size: channels of a head, a divisor of C.
        shift: name in `SHIFTS`.
        shift_pixels: how far to shift, in patches, at least 1.
        channel_gamma: share of a head's channels that moves in one direction.

    Raises:
        ValueError: an unknown shift, or a distance, share or head size out of range.
    """

    def __init__(
        self,
        initial: Mapping[str, Tensor],
        head_size: int,
        shift: str = "q_shift",
        shift_pixels: int = 1,
        channel_gamma: float = 0.25,
    ) -> None:
        super().__init__(initial, shift, shift_pixels, channel_gamma)
        dim = len(next(iter(initial.values())))
        if head_size < 1 or dim % head_size:
            raise ValueError(
                f"embed_dim must be a multiple of head_size, got {dim} and {head_size}"
            )
        if shift_pixels < 1:
            raise ValueError(f"VRWKV6 needs shift_pixels of at least 1, got {shift_pixels}")
        self.head_size = head_size

    def shifted(self, x: Tensor, hw: Grid) -> Tensor:
        """Return the neighbour of every token, (B, T, C)."""
        return head_shift(
            x,
            hw,
            self.head_size,
            kind=self.shift,
            pixels=self.shift_pixels,
            channel_gamma=self.channel_gamma,
        )

    def forward(self, x: Tensor, hw: Grid) -> tuple[Tensor, ...]:
        """Return one mixed copy of the tokens (B, T, C) for each name, in the names' order."""
        moved = self.shifted(x, hw)
        own = x - moved
        return tuple(torch.addcmul(moved, own, getattr(self, name)) for name in self.names)


class DataShiftMix(HeadShiftMix):
    """Mix tokens with their neighbours in proportions that a low-rank map takes from the tokens.

    With s the shifted tokens, `mixed_n = x + (s - x) * (mu_n + lora_n(x + (s - x) * mu_x))`:
    the share of the neighbour, where `ShiftMix` learns that of the token.

    Args:
        initial: first value of each mu but mu_x, name -> (C,).
        base: first value of mu_x, (C,).
        **options: as for `HeadShiftMix`.
    """

    def __init__(
        self,
        initial: Mapping[str, Tensor],
        base: Tensor,
        head_size: int,
        shift: str = "q_shift",
        shift_pixels: int = 1,
        channel_gamma: float = 0.25,
    ) -> None:
        super().__init__(initial, head_size, shift, shift_pixels, channel_gamma)
        self.x = nn.Parameter(base.clone())
        self.down = nn.Parameter(lora_init(len(base), len(initial) * MIX_RANK))
        self.up = nn.Parameter(lora_init(len(initial), MIX_RANK, len(base)))

    def forward(self, x: Tensor, hw: Grid) -> tuple[Tensor, ...]:
        """Return one mixed copy of the tokens (B, T, C) for each name, in the names' order."""
        batch, tokens, _ = x.shape
        other = self.shifted(x, hw) - x
        code = torch.tanh((x + other * self.x) @ self.down)  # (B, T, names * rank)
        code = code.unflatten(2, (len(self.names), MIX_RANK)).flatten(0, 1).transpose(0, 1)
        lora = (code @ self.up).unflatten(1, (batch, tokens))  # (names, B, T, C)
        mu = torch.stack([getattr(self, name) for name in self.names])[:, None, None]
        return torch.addcmul(x, other, lora + mu).unbind()


def lora_init(*shape: int) -> Tensor:
    """First values of a low-rank map: uniform and almost nothing."""
    return torch.empty(shape).uniform_(-_LORA_INIT, _LORA_INIT)
