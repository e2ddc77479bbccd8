"""Masks as run lengths: COCO's compressed strings and plain lists of counts.

Runs go down the columns, begin with the length of the first run of zeros (0 if the first pixel is
set) and alternate (pycocotools).
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor


class Rle(TypedDict):
    """One mask: `size` is height, width; `counts` is COCO's string or the list of run lengths."""

    size: list[int]
    counts: str | list[int]


def encode_masks(masks: Tensor) -> list[Rle]:
    """Encode masks as COCO's compressed run lengths.

    Args:
        masks: bool, (N, H, W), on any device.

    Returns:
        N of them, ready for JSON.

    Raises:
        ValueError: another shape or dtype.
    """
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(f"wanted bool masks (N, H, W), got {masks.dtype} {tuple(masks.shape)}")
    # pycocotools reads column-major (H, W, N), which is row-major (N, W, H).
    columns = masks.transpose(1, 2).contiguous().view(torch.uint8).cpu().numpy()
    encoded = coco_mask.encode(columns.transpose(2, 1, 0))
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in encoded]


def decode_rle(rle: Rle) -> np.ndarray:
    """Return the mask of run lengths in either form: bool, (H, W)."""
    return coco_mask.decode(compressed_rle(rle)).view(bool)


def compressed_rle(rle: Rle) -> Rle:
    """Return COCO's compressed form of run lengths in either form.

    Raises:
        ValueError: the counts of a list are not those of a mask of this size.
    """
    counts = rle["counts"]
    if isinstance(counts, str):
        return rle
    height, width = rle["size"]
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(
            f"run lengths of a {height} x {width} mask want counts >= 0 that add up to "
            f"{height * width}, got {len(counts)} with the sum {sum(counts)}"
        )
    found = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": found["counts"].decode("ascii")}


def polygons_to_rle(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Rle:
    """Return the run lengths of the union of polygons.

    Args:
        polygons: each x0, y0, x1, y1, ... in pixels, of three points at least.
        size: height and width of the mask.

    Raises:
        ValueError: no polygon, or one of too few numbers.
    """
    wrong = [len(p) for p in polygons if len(p) < 6 or len(p) % 2]
    if wrong or not polygons:
        raise ValueError(
            "polygons want at least three points as x0, y0, x1, y1, ..., got "
            f"{f'{wrong[0]} numbers' if wrong else 'none'}"
        )
    merged = coco_mask.merge(coco_mask.frPyObjects([list(p) for p in polygons], *size))
    return {"size": list(size), "counts": merged["counts"].decode("ascii")}


def uncompressed_rle(rle: Rle) -> Rle:
    """Return run lengths in either form as a list of counts."""
    if not isinstance(rle["counts"], str):
        return rle
    pixels = decode_rle(rle).ravel(order="F")
    starts = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    counts = np.diff(starts, prepend=0, append=pixels.size).tolist()
    return {"size": rle["size"], "counts": [0, *counts] if pixels[0] else counts}


def area_of_rle(rle: Rle) -> int:
    """Return the number of pixels of run lengths in either form."""
    return int(coco_mask.area(compressed_rle(rle)))


def box_of_rle(rle: Rle) -> list[float]:
    """Return x, y, width, height as COCO counts them: a single pixel is 1 wide and 1 high."""
    return coco_mask.toBbox(compressed_rle(rle)).tolist()
