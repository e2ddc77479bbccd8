"""Token shift and the learnt interpolation between a token and its shifted neighbour."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from vision.kernels import shift_mix
from vision.kernels.shift_mix.plain import shift

from .kept_grid import KeptGrid

Grid = tuple[int, int]


def _quarters(channels: int, hw: Grid, gamma: float) -> tuple[list[int], Grid]:
    return [int(channels * gamma * j) for j in range(5)], hw


def _sequence(channels: int, hw: Grid, gamma: float) -> tuple[list[int], Grid]:
    tokens = hw.tokens if isinstance(hw, KeptGrid) else hw[0] * hw[1]
    return [0, channels, channels, channels, channels], (1, tokens)


# For a number of channels, a grid and the share of the channels in a group: the limits of the
# groups that take the left, right, upper and lower neighbour, and the grid to see it on.
SHIFTS: dict[str, Callable[[int, Grid, float], tuple[list[int], Grid]]] = {
    "q_shift": _quarters,
    "single_shift": _sequence,
}


def q_shift(x: Tensor, hw: Grid, pixels: int = 1, channel_gamma: float = 0.25) -> Tensor:
    """Move four groups of channels by `pixels` patches, one in each direction (arXiv:2403.02308).

    Group 0 takes the left neighbour, 1 the right, 2 the upper, 3 the lower one. Group `j` is the
    channels from `int(C * gamma * j)` to `int(C * gamma * (j + 1))`; channels past the fourth
    group stay where they are.

    Args:
        x: tokens, row-major over the grid, (B, H*W, C).
        hw: grid height and width.
        pixels: how far to move, in patches, at least 1.
        channel_gamma: share of the channels in one group, above 0 and at most 1/4.

    Returns:
        (B, H*W, C); zeros enter at the border.

    Raises:
        ValueError: H*W is not the number of tokens.
    """
    if hw[0] * hw[1] != x.shape[1]:
        raise ValueError(
            f"q_shift got {x.shape[1]} tokens for a grid of {hw[0]} x {hw[1]} = {hw[0] * hw[1]}"
        )
    edges, (h, w) = _quarters(x.shape[2], hw, channel_gamma)
    return shift(x, h, w, pixels, edges)


def single_shift(x: Tensor, pixels: int = 1) -> Tensor:
    """Give every token the one `pixels` places before it in the sequence.

    The shift of the language model, and of upstream's masked autoencoder, whose kept tokens have
    no grid.

    Args:
        x: tokens (B, T, C).
        pixels: how far to move, in tokens, at least 1.

    Returns:
        (B, T, C); zeros enter at the start.
    """
    edges, (h, w) = _sequence(x.shape[2], (1, x.shape[1]), 1.0)
    return shift(x, h, w, pixels, edges)


class ShiftMix(nn.Module):
    """Shift the tokens once, then mix them with the unshifted ones in several proportions.

    `mixed_n = x * mu_n + shift(x) * (1 - mu_n)` with a learnt `mu_n` (C,) for each name.

    Args:
        initial: first value of each proportion, name -> (C,).
        shift: name in `SHIFTS`.
        shift_pixels: how far to shift, in patches; 0 turns shift and mixing off, and the module
            has no parameters.
        channel_gamma: share of the channels that moves in one direction.

    Raises:
        ValueError: an unknown shift, or a distance or share out of range.
    """

    def __init__(
        self,
        initial: Mapping[str, Tensor],
        shift: str = "q_shift",
        shift_pixels: int = 1,
        channel_gamma: float = 0.25,
    ) -> None:
        super().__init__()
        if shift not in SHIFTS:
            raise ValueError(f"no token shift {shift!r}; there are {', '.join(SHIFTS)}")
        if shift_pixels < 0:
            raise ValueError(f"shift_pixels must be 0 (off) or more, got {shift_pixels}")
        if not 0 < channel_gamma <= 0.25:
            raise ValueError(f"channel_gamma must be above 0 and at most 1/4, got {channel_gamma}")
        self.shift = shift
        self.shift_pixels = shift_pixels
        self.channel_gamma = channel_gamma
        self.names = tuple(initial)
        if shift_pixels > 0:
            for name, value in initial.items():
                self.register_parameter(name, nn.Parameter(value.clone()))

    def extra_repr(self) -> str:
        """Settings shown by `print(model)`."""
        return f"{self.shift}, pixels={self.shift_pixels}, channel_gamma={self.channel_gamma}"

    def forward(self, x: Tensor, hw: tuple[int, int]) -> tuple[Tensor, ...]:
        """Return one mixed copy of the tokens (B, T, C) for each name, in the names' order."""
        if self.shift_pixels == 0:
            return (x,) * len(self.names)
        edges, grid = SHIFTS[self.shift](x.shape[2], hw, self.channel_gamma)
        mu = torch.stack([getattr(self, name) for name in self.names])
        if isinstance(grid, KeptGrid):
            whole = grid.spread(x)  # (B, H*W, C)
            mixed = shift_mix(whole, mu, (grid[0], grid[1]), pixels=self.shift_pixels, edges=edges)
            return tuple(map(grid.pick, mixed))
        return tuple(shift_mix(x, mu, grid, pixels=self.shift_pixels, edges=edges))
