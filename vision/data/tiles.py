"""Predict an image tile by tile: tiles that overlap, weights that fall off towards their borders.

For images whose maps do not fit into memory at once. What is held is one tile and a band of logits
as high as a tile, never the logits of the whole image.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def check_tiles(tile: int, overlap: int, smallest: int = 1) -> None:
    """Raise ValueError unless tiles of this side can overlap so far.

    Args:
        tile: side of a tile, pixels.
        overlap: pixels that neighbours share at least.
        smallest: least side of a tile.
    """
    if tile < smallest:
        raise ValueError(f"a tile has a side of at least {smallest} px, got {tile}")
    if not 0 <= overlap < tile:
        raise ValueError(
            f"tiles of {tile} px overlap by 0 to {tile - 1} px, got {overlap}; a quarter of the "
            f"tile, {tile // 4}, is usual"
        )


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles along one side begin: as few as needed, spread evenly.

    Args:
        length: of the side, pixels.
        tile: side of a tile; every tile is as long, or as the side if that is shorter.
        overlap: pixels that neighbours share at least.
    """
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [i * (length - tile) // (count - 1) for i in range(count)]


def tile_weights(length: int, tile: int, starts: list[int]) -> Tensor:
    """Return the weights of the tiles along one side, (tiles, tile); they sum to 1 everywhere.

    A weight rises from the tile's border over what it shares with its neighbour; the borders of
    the image have none.

    Args:
        length: of the side, pixels.
        tile: side of a tile, at most `length`.
        starts: where the tiles begin, the first at 0, the last ending with the side.
    """
    place = torch.arange(tile, dtype=torch.float64) + 0.5
    weights = torch.ones(len(starts), tile, dtype=torch.float64)
    for i in range(1, len(starts)):
        shared = starts[i - 1] + tile - starts[i]
        ramp = (place / max(shared, 1)).clamp(max=1)
        weights[i] = torch.minimum(weights[i], ramp)
        weights[i - 1] = torch.minimum(weights[i - 1], ramp.flip(0))
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    for start, weight in zip(starts, weights, strict=True):
        weight /= total[start : start + tile]
    return weights


def blend_tiles(
    logits_of: Callable[[int, int, int, int], Tensor], hw: tuple[int, int], tile: int, overlap: int
) -> Iterator[Tensor]:
    """Yield the blended logits of an image, from its top to its bottom.

    Args:
        logits_of: for the top, bottom, left and right of a tile, its logits (classes, height,
            width).
        hw: height and width of the image, pixels; a side shorter than a tile makes the tiles as
            short.
        tile: side of a tile, pixels.
        overlap: pixels that neighbours share at least; 0 shows the borders.

    Yields:
        Bands (classes, rows, W) of the dtype of the logits, which together are H rows. The caller
        is done with a band before it asks for the next one.

    Raises:
        ValueError: no such tiles.
    """
    check_tiles(tile, overlap)
    (height, width), (high, wide) = hw, (min(tile, side) for side in hw)
    tops, lefts = (tile_starts(side, tile, overlap) for side in hw)
    down, across = tile_weights(height, high, tops), tile_weights(width, wide, lefts)
    band: Tensor | None = None  # of the rows that tiles at `top` cover
    for i, top in enumerate(tops):
        for left, weight in zip(lefts, across, strict=True):
            logits = logits_of(top, top + high, left, left + wide)
            if band is None:
                band = logits.new_zeros(len(logits), high, width)
            weight = down[i].outer(weight).to(logits)
            band[:, :, left : left + wide].addcmul_(logits, weight)
        assert band is not None
        done = (tops[i + 1] if i + 1 < len(tops) else height) - top
        yield band[:, :done]
        band = torch.cat([band[:, done:], torch.zeros_like(band[:, :done])], 1)
