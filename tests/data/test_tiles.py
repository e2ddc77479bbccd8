"""Tiles: they cover every pixel, their weights sum to 1, the blend is seamless and frugal."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision.data.tiles import blend_tiles, check_tiles, tile_starts, tile_weights


@st.composite
def sides(draw: st.DrawFn) -> tuple[int, int, int]:
    """Length of a side, tile, overlap."""
    tile = draw(st.integers(1, 40))
    return draw(st.integers(1, 200)), tile, draw(st.integers(0, tile - 1))


@settings(deadline=None, max_examples=30)
@given(sides())
def test_weights_sum_to_one_and_fall_off(side: tuple[int, int, int]) -> None:
    length, tile, overlap = side
    starts = tile_starts(length, tile, overlap)
    tile = min(tile, length)
    assert starts[0] == 0
    assert starts[-1] + tile == length
    assert all(overlap <= one + tile - other < tile for one, other in pairwise(starts))
    weights = tile_weights(length, tile, starts)
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert weights.min() > 0
    for before, after in pairwise(weights):
        if overlap and 2 * overlap <= tile:  # a border next to one neighbour alone
            assert before[-1] <= 0.5 / overlap + 1e-12
            assert after[0] <= 0.5 / overlap + 1e-12


@settings(deadline=None, max_examples=40)
@given(sides(), st.integers(1, 60))
def test_blend_of_what_needs_no_context_is_the_whole(
    side: tuple[int, int, int], width: int
) -> None:
    height, tile, overlap = side
    image = torch.randn(3, height, width, dtype=torch.float64)
    asked = []

    def logits_of(top: int, bottom: int, left: int, right: int) -> Tensor:
        asked.append((top, bottom, left, right))
        return 2 * image[:, top:bottom, left:right]

    bands = [band.clone() for band in blend_tiles(logits_of, (height, width), tile, overlap)]
    torch.testing.assert_close(torch.cat(bands, 1), 2 * image, rtol=1e-12, atol=1e-12)
    sizes = {(bottom - top, right - left) for top, bottom, left, right in asked}
    assert sizes == {(min(tile, height), min(tile, width))}
    assert all(band.shape[1] <= tile for band in bands)
    assert len(set(asked)) == len(asked)


def test_blend_has_no_seams() -> None:
    # Every tile says something else: from one to the next the blend goes in small steps.
    tiles = iter(range(100))
    bands = blend_tiles(
        lambda top, bottom, left, right: torch.full((1, 32, 32), float(next(tiles) % 2)),
        (32, 176),
        32,
        16,
    )
    steps = torch.cat([band.clone() for band in bands], 1)[0, 0].diff().abs()
    assert steps.max() <= 1.01 / 16


@pytest.mark.parametrize(
    ("tile", "overlap", "words"),
    [
        (16, 4, "at least 32 px, got 16"),
        (64, 64, "overlap by 0 to 63 px, got 64; a quarter of the tile, 16, is usual"),
        (64, -1, "got -1"),
    ],
)
def test_no_such_tiles(tile: int, overlap: int, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_tiles(tile, overlap, 32)
