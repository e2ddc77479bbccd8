"""Token shift and the learnt interpolation between a token and its shifted neighbour."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def q_shift(x: Tensor, hw: tuple[int, int], pixels: int = 1, channel_gamma: float = 0.25) -> Tensor:
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
    h, w = hw
    b, t, c = x.shape
    if h * w != t:
        raise ValueError(f"q_shift got {t} tokens for a grid of {h} x {w} = {h * w}")
    grid = x.reshape(b, h, w, c)
    edge = [int(c * channel_gamma * j) for j in range(5)]
    across, down = min(pixels, w), min(pixels, h)
    # F.pad counts from the last axis: (channels, width, height); a negative pad cuts.
    pads = (
        (0, 0, across, -across),
        (0, 0, -across, across),
        (0, 0, 0, 0, down, -down),
        (0, 0, 0, 0, -down, down),
    )
    parts = [F.pad(grid[..., edge[j] : edge[j + 1]], pad) for j, pad in enumerate(pads)]
    if edge[4] < c:
        parts.append(grid[..., edge[4] :])
    return torch.cat(parts, dim=-1).view(b, t, c)


def single_shift(
    x: Tensor, hw: tuple[int, int], pixels: int = 1, channel_gamma: float = 0.25
) -> Tensor:
    """Give every token the one `pixels` places before it in the sequence.

    The shift of the language model, and of upstream's masked autoencoder, whose kept tokens have
    no grid. `hw` and `channel_gamma` are accepted so that all shifts are called alike.

    Args:
        x: tokens (B, T, C).
        hw: grid height and width, not used.
        pixels: how far to move, in tokens, at least 1.
        channel_gamma: not used.

    Returns:
        (B, T, C); zeros enter at the start.
    """
    step = min(pixels, x.shape[1])
    return F.pad(x, (0, 0, step, -step))


SHIFTS: dict[str, Callable[[Tensor, tuple[int, int], int, float], Tensor]] = {
    "q_shift": q_shift,
    "single_shift": single_shift,
}


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
        shifted = SHIFTS[self.shift](x, hw, self.shift_pixels, self.channel_gamma)
        return tuple(torch.lerp(shifted, x, getattr(self, name).to(x.dtype)) for name in self.names)
