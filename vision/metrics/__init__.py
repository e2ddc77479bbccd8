"""Measures of quality as pure functions on tensors."""

from .masks import (
    boundary_dilation,
    boundary_iou,
    mask_boundary,
    mask_iou,
    overlap,
)

__all__ = ["boundary_dilation", "boundary_iou", "mask_boundary", "mask_iou", "overlap"]
