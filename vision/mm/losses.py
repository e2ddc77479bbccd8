"""Losses in OpenMMLab form."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class PixelCrossEntropy(nn.Module):
    """Cross entropy of a segmentation map, averaged over the pixels that have a class.

    mmseg's own loss fails when class weights meet ignored pixels (it indexes the weights with the
    ignored label), and averages over the ignored pixels otherwise.

    Args:
        class_weight: weight of each class; None for equal ones.
        label_smoothing: share of the target spread over all classes.
        loss_weight: factor on the loss.
        loss_name: name in the log; must begin with "loss_".
    """

    def __init__(
        self,
        class_weight: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        loss_weight: float = 1.0,
        loss_name: str = "loss_ce",
    ) -> None:
        super().__init__()
        weight = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float32)
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", weight, persistent=False)
        self.label_smoothing = label_smoothing
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(
        self,
        logits: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = 255,
    ) -> Tensor:
        """Mean loss of a batch.

        Args:
            logits: (B, classes, H, W).
            label: class indices (B, H, W).
            weight: weight of each pixel (B, H, W), as mmseg's samplers give it; None for equal.
            ignore_index: label of pixels without a class.

        Returns:
            A scalar; 0 if no pixel has a class.
        """
        per_pixel = F.cross_entropy(
            logits.float(),
            label,
            weight=self.class_weight,
            ignore_index=ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        known = label != ignore_index
        share = known.to(per_pixel.dtype)
        if self.class_weight is not None:
            share = share * self.class_weight[label.where(known, 0)]
        if weight is not None:
            per_pixel, share = per_pixel * weight, share * weight
        return self.loss_weight * per_pixel.sum() / share.sum().clamp_min(1e-12)
