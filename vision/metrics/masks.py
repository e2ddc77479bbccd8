"""How well masks agree: IoU of the areas and of the bands along their boundaries.

Boundary IoU: arXiv:2103.16562. Values are per mask; a mean over images is the caller's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-8  # of the published evaluation: two empty masks have an IoU of 0


def overlap(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Count the pixels in both masks and in either.

    Args:
        pred: bool, (..., H, W).
        target: bool, of the same shape.

    Returns:
        Intersection and union in pixels, int64 (...).

    Raises:
        ValueError: another dtype, or shapes that differ.
    """
    if pred.dtype != torch.bool or target.dtype != torch.bool or pred.shape != target.shape:
        raise ValueError(
            f"wanted two bool masks of one shape (..., H, W), got {pred.dtype} "
            f"{tuple(pred.shape)} and {target.dtype} {tuple(target.shape)}; threshold logits, and "
            "resize the prediction to the target's size"
        )
    return (pred & target).sum((-2, -1)), (pred | target).sum((-2, -1))


def _iou(pred: Tensor, target: Tensor) -> Tensor:
    intersection, union = overlap(pred, target)
    return intersection.double() / (union.double() + _EPS)


def mask_iou(pred: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of masks, bool (..., H, W): float64 (...), 0 for two empty ones.

    Raises:
        ValueError: see `overlap`.
    """
    return _iou(pred, target)


def boundary_dilation(height: int, width: int, ratio: float = 0.02) -> int:
    """Width in pixels of the band of `mask_boundary`: a share of the diagonal, at least 1."""
    return max(1, round(ratio * math.hypot(height, width)))


def mask_boundary(mask: Tensor, dilation: int | None = None) -> Tensor:
    """The part of a mask within some pixels of its boundary; the image's border is boundary, too.

    Args:
        mask: bool, (..., H, W).
        dilation: distance d in pixels, in a square of side 2d + 1; None for `boundary_dilation`.

    Returns:
        bool, of the same shape.

    Raises:
        ValueError: another dtype, or a distance below 1.
    """
    if mask.dtype != torch.bool or mask.ndim < 2:
        raise ValueError(f"wanted a bool mask (..., H, W), got {mask.dtype} {tuple(mask.shape)}")
    d = boundary_dilation(*mask.shape[-2:]) if dilation is None else dilation
    if d < 1:
        raise ValueError(f"dilation wants 1 pixel or more, got {d}")
    inner = _all_within(mask, d)
    inner = _all_within(inner.transpose(-1, -2), d).transpose(-1, -2)
    return mask & ~inner


def _all_within(mask: Tensor, d: int) -> Tensor:
    """Whether all pixels up to d to the left and right are True; there are none past the border."""
    # Sums in a window cost the same for every d, unlike an erosion in d steps.
    total = F.pad(mask.to(torch.int32), (d + 1, d)).cumsum(-1, dtype=torch.int32)
    window = total[..., 2 * d + 1 :] - total[..., : mask.shape[-1]]
    return window == 2 * d + 1


def boundary_iou(pred: Tensor, target: Tensor, dilation: int | None = None) -> Tensor:
    """Intersection over union of the boundaries of masks (arXiv:2103.16562).

    Args:
        pred: bool, (..., H, W), at the size of the original image.
        target: bool, of the same shape.
        dilation: as for `mask_boundary`.

    Returns:
        float64 (...), 0 for two empty masks.

    Raises:
        ValueError: see `overlap` and `mask_boundary`.
    """
    return _iou(mask_boundary(pred, dilation), mask_boundary(target, dilation))
