"""Tokens of some places of a grid, where the others are masked."""

import torch
from torch import Tensor


class KeptGrid(tuple[int, int]):
    """Height and width of a grid of which only some places have a token.

    Stands for `hw` of a block whose tokens (B, K, C) are those of the kept places. A shift over the
    grid moves between true neighbours; a neighbour that is masked is one beyond the border, zero.
    With every place kept that is the shift of the whole grid.

    Args:
        hw: grid height H and width W.
        kept: places of the tokens, row-major over the grid, rising, int64 (B, K).

    Raises:
        ValueError: another shape, no place, or places outside of the grid or not rising.
    """

    kept: Tensor

    def __new__(cls, hw: tuple[int, int], kept: Tensor) -> "KeptGrid":
        """Make the pair, and remember the places."""
        if kept.ndim != 2 or kept.dtype != torch.int64 or 0 in kept.shape:
            raise ValueError(
                "kept wants int64 places (B, K), at least one each, got "
                f"{kept.dtype} {tuple(kept.shape)}"
            )
        places = hw[0] * hw[1]
        inside = kept[:, 0].min() >= 0 and kept[:, -1].max() < places
        if not inside or not (kept.diff() > 0).all():
            raise ValueError(
                f"kept wants rising places 0..{places - 1} of a grid of {hw[0]} x {hw[1]}, got "
                f"{int(kept.min())}..{int(kept.max())}{'' if inside else ', not all inside'}"
            )
        grid = super().__new__(cls, hw)
        grid.kept = kept
        return grid

    @property
    def tokens(self) -> int:
        """Number K of tokens of an image."""
        return self.kept.shape[1]

    def spread(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """Put tokens (B, K, C) into their places, (B, H*W, C).

        Args:
            x: tokens of the kept places.
            fill: what the masked places get, (C,); None for zeros.
        """
        if x.shape[:2] != self.kept.shape:
            raise ValueError(
                f"got tokens {tuple(x.shape)} for kept places {tuple(self.kept.shape)}"
            )
        size = (len(x) * self[0] * self[1], x.shape[2])
        whole = x.new_zeros(size) if fill is None else fill.to(x.dtype).expand(size)
        whole = whole.index_copy(0, self._rows(), x.flatten(0, 1))
        return whole.unflatten(0, (len(x), -1))

    def pick(self, whole: Tensor) -> Tensor:
        """Take the kept of the tokens of all places: (B, H*W, C) to (B, K, C)."""
        return whole.flatten(0, 1).index_select(0, self._rows()).unflatten(0, self.kept.shape)

    def masked(self) -> Tensor:
        """Tell which places have no token, bool (B, H*W)."""
        masked = self.kept.new_ones((len(self.kept), self[0] * self[1]), dtype=torch.bool)
        return masked.scatter(1, self.kept, False)

    def _rows(self) -> Tensor:
        """Numbers of the kept places in the flattened batch of grids, (B*K,)."""
        first = torch.arange(len(self.kept), device=self.kept.device) * (self[0] * self[1])
        return (self.kept + first[:, None]).flatten()
