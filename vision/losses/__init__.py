"""Losses as pure functions on tensors."""

from .masks import (
    dice_loss,
    focal_loss,
    iou_regression_loss,
    point_sample,
    sample_uncertain_points,
    sigmoid_cross_entropy,
)

__all__ = [
    "dice_loss",
    "focal_loss",
    "iou_regression_loss",
    "point_sample",
    "sample_uncertain_points",
    "sigmoid_cross_entropy",
]
