"""Boxes and points that belong to instance masks."""

import numpy as np
import torch
from torch import Tensor


def box_of_mask(mask: np.ndarray) -> np.ndarray:
    """Return the smallest box around the True pixels of a mask.

    Args:
        mask: bool, (H, W), with at least one True pixel.

    Returns:
        float32 (4,): x0, y0, x1, y1 in pixels. The box is half-open: x1 and y1 are one past the
        last pixel, so that a single pixel has width and height 1.

    Raises:
        ValueError: no pixel is True.
    """
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        raise ValueError("an empty mask has no box; drop the instance first")
    cols = np.flatnonzero(mask.any(axis=0))
    return np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], np.float32)


def boxes_of_masks(masks: Tensor) -> Tensor:
    """Return the outermost pixels of masks, both inclusive, as segment-anything counts boxes.

    Args:
        masks: bool, (N, H, W).

    Returns:
        int64 (N, 4): x0, y0, x1, y1, the indices of the outermost pixels; zeros for an empty mask.
    """
    # The largest byte is `any`, which torch takes far longer for on a CPU.
    pixels = masks.view(torch.uint8)
    x0, x1, any_pixel = _first_last(pixels.amax(dim=1))
    y0, y1, _ = _first_last(pixels.amax(dim=2))
    return torch.stack([x0, y0, x1, y1], dim=1) * any_pixel[:, None]


def _first_last(line: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first and last index of a 1 in each row of zeros and ones, and if there is one."""
    highest, first = line.max(dim=1)
    return first, line.shape[1] - 1 - line.flip(1).argmax(dim=1), highest


def interior_point(mask: np.ndarray) -> np.ndarray:
    """Return the True pixel that is farthest from every False pixel and from the image border.

    It is the usual first click when promptable segmentation is evaluated.

    Args:
        mask: bool, (H, W), with at least one True pixel.

    Returns:
        float32 (2,): x, y, the indices of a pixel of the mask.

    Raises:
        ValueError: no pixel is True.
    """
    import cv2

    x0, y0, x1, y1 = box_of_mask(mask).astype(int)
    crop = np.pad(mask[y0:y1, x0:x1], 1).view(np.uint8)
    distance = cv2.distanceTransform(crop, cv2.DIST_L2, 3)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    return np.array([x0 + x - 1, y0 + y - 1], np.float32)
