"""Losses of predicted masks, on points sampled from them (PointRend, arXiv:1912.08193).

Each gives one value a mask, (N,): the caller takes the mean, the weighted sum, or the least of
several masks for one prompt.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps at points between their pixels, bilinear, zeros outside.

    Args:
        maps: (N, C, H, W).
        points: x, y as shares of width and height, in 0 .. 1, (N, P, 2).

    Returns:
        (N, C, P).
    """
    grid = (2 * points - 1)[:, :, None]  # (N, P, 1, 2)
    return F.grid_sample(maps, grid.to(maps.dtype), align_corners=False)[..., 0]


@torch.no_grad()
def sample_uncertain_points(
    logits: Tensor,
    count: int = 12_544,
    oversample: float = 3.0,
    share: float = 0.75,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose points, most of them where the prediction is close to its threshold.

    Args:
        logits: of one mask each, (N, 1, H, W).
        count: points a mask, P.
        oversample: candidates over `count`, at least 1.
        share: of the points that are the most uncertain candidates; the rest are random.
        generator: of the random numbers, on the device of `logits`.

    Returns:
        x, y as shares of width and height, in 0 .. 1, (N, P, 2).

    Raises:
        ValueError: another shape, or a number out of range.
    """
    if logits.ndim != 4 or logits.shape[1] != 1:
        raise ValueError(f"wanted logits of one mask each (N, 1, H, W), got {tuple(logits.shape)}")
    if count < 1 or oversample < 1 or not 0 <= share <= 1:
        raise ValueError(
            f"wanted count >= 1, oversample >= 1 and share in 0..1, got {count}, {oversample}, "
            f"{share}"
        )

    def draw(number: int) -> Tensor:
        return torch.rand(
            len(logits), number, 2, generator=generator, device=logits.device, dtype=torch.float32
        )

    candidates = draw(int(count * oversample))
    distance = point_sample(logits.float(), candidates)[:, 0].abs()  # from the threshold
    uncertain = int(count * share)
    nearest = distance.topk(uncertain, dim=1, largest=False).indices
    kept = candidates.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([kept, draw(count - uncertain)], dim=1)


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross entropy of each mask.

    Args:
        logits: (N, P).
        targets: in 0 .. 1, (N, P).

    Returns:
        (N,).
    """
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


def dice_loss(logits: Tensor, targets: Tensor, eps: float = 1.0) -> Tensor:
    """One minus twice the overlap over the sum of both areas (arXiv:1606.04797, areas linear).

    Args:
        logits: (N, P).
        targets: in 0 .. 1, (N, P).
        eps: added above and below, so that two empty masks agree.

    Returns:
        In 0 .. 1, (N,).
    """
    p = logits.sigmoid()
    return 1 - (2 * (p * targets).sum(1) + eps) / (p.sum(1) + targets.sum(1) + eps)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Mean focal loss of each mask (arXiv:1708.02002).

    Args:
        logits: (N, P).
        targets: 0 or 1, (N, P).
        alpha: weight of the foreground; the background has one minus it. Negative: no weights.
        gamma: exponent that lowers what is already right.

    Returns:
        (N,).
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    wrong = p + targets - 2 * p * targets
    loss = wrong**gamma * entropy
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss.mean(1)


@torch.no_grad()
def _true_iou(logits: Tensor, targets: Tensor) -> Tensor:
    pred, target = logits.flatten(1) > 0, targets.flatten(1) > 0.5
    union = (pred | target).sum(1)
    return torch.where(union > 0, (pred & target).sum(1) / union.clamp(min=1), 1.0)


def iou_regression_loss(predicted: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Squared error of a predicted IoU, so that scores rank masks.

    Args:
        predicted: IoU that the model expects, (N,).
        logits: of its masks, (N, H, W).
        targets: in 0 .. 1, of the same shape.

    Returns:
        (N,); only `predicted` gets a gradient.
    """
    return (predicted - _true_iou(logits, targets).to(predicted.dtype)).square()
