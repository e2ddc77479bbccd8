"""What the automatic mask generator asks of masks: stability, boxes, small regions."""

import numpy as np
import torch
from torch import Tensor


def stability_score(logits: Tensor, threshold: float, offset: float) -> Tensor:
    """Return the IoU of the masks at `threshold + offset` and at `threshold - offset`.

    Args:
        logits: (N, H, W).
        offset: 0 or more.

    Returns:
        float32 (N,), 0 .. 1; 0 where no pixel is above the lower threshold.
    """
    # The mask at the higher threshold lies within the other.
    intersection = _count(logits > threshold + offset)
    union = _count(logits > threshold - offset)
    return intersection / union.clamp(min=1)


def _count(masks: Tensor) -> Tensor:
    """Return the number of True pixels of each mask, (N,)."""
    # On a CPU, torch adds up 16-bit integers many times as fast as it counts in 64 bits.
    narrow = torch.int16 if masks.shape[-1] < 2**15 else torch.int32
    return masks.sum(-1, dtype=narrow).sum(-1, dtype=torch.int32)


def paste_masks(
    masks: Tensor, crop_box: tuple[int, int, int, int], size: tuple[int, int]
) -> Tensor:
    """Put masks of a crop into the frame of the image.

    Args:
        masks: (N, y1 - y0, x1 - x0).
        crop_box: x0, y0, x1, y1 in pixels.
        size: height H and width W of the image.

    Returns:
        (N, H, W), False outside of the crop.
    """
    if masks.shape[1:] == size:
        return masks
    x0, y0, x1, y1 = crop_box
    whole = masks.new_zeros(len(masks), *size)
    whole[:, y0:y1, x0:x1] = masks
    return whole


def fill_small_holes(mask: np.ndarray, min_area: float) -> tuple[np.ndarray, bool]:
    """Fill the regions of False pixels (8-connected) that are smaller than `min_area` pixels.

    Args:
        mask: bool, (H, W).

    Returns:
        The mask, and whether it differs from the one given.
    """
    labels, areas = _regions(~mask)
    small = areas < min_area
    return (mask | small[labels], True) if small.any() else (mask, False)


def remove_small_islands(mask: np.ndarray, min_area: float) -> tuple[np.ndarray, bool]:
    """Remove the regions of True pixels (8-connected) that are smaller than `min_area` pixels.

    If all are, the largest stays.

    Args:
        mask: bool, (H, W).

    Returns:
        The mask, and whether a region of it was small.
    """
    labels, areas = _regions(mask)
    small = areas < min_area
    if not small.any():
        return mask, False
    large = ~small
    large[0] = False
    if not large.any():
        large[1 + areas[1:].argmax()] = True
    return large[labels], True


def _regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label the 8-connected regions of True pixels with 1, 2, ...; areas[0] is infinite."""
    import cv2

    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA].astype(np.float64)
    areas[0] = np.inf  # the False pixels are no region
    return labels, areas
