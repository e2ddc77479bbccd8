"""What a box alone gives, without any learning: the box itself, and GrabCut."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_GAUSSIANS = 5  # of GrabCut, for each of object and background


def fill_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paint boxes.

    Args:
        boxes: x0, y0, x1, y1, the outermost pixels, inclusive, (N, 4).
        size: height and width.

    Returns:
        bool (N, *size).

    Raises:
        ValueError: another shape.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"wanted boxes x0, y0, x1, y1 as (N, 4), got {tuple(boxes.shape)}")
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    x, y = (torch.arange(side, device=boxes.device) for side in (size[1], size[0]))
    return ((y >= y0) & (y <= y1))[:, :, None] & ((x >= x0) & (x <= x1))[:, None]


def grab_cut(
    image: np.ndarray, boxes: Tensor, iterations: int = 5, max_side: int | None = None
) -> tuple[Tensor, Tensor]:
    """Segment what is in boxes by GrabCut (OpenCV's, Rother et al. 2004).

    GrabCut wants pixels to learn from: where fewer lie in the box, or beside it in the image, than
    it has Gaussians, the filled box is the answer. That it finds nothing in a box is an answer,
    too. OpenCV's random numbers are seeded for each box, so that the same comes out again. An image
    of a megapixel takes seconds to minutes for each box: see `max_side`.

    Args:
        image: uint8 RGB (H, W, 3).
        boxes: as for `fill_boxes`, within the image.
        iterations: of fitting colours and cutting.
        max_side: an image whose longer side has more pixels is cut at this size, and the masks are
            enlarged again; None for no limit.

    Returns:
        Masks, bool (N, H, W); and which are filled boxes, bool (N,).

    Raises:
        ValueError: another image or shape, or no iteration.
    """
    import cv2

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or iterations < 1:
        raise ValueError(
            f"wanted an image uint8 (H, W, 3) and 1 iteration or more, got {image.dtype} "
            f"{image.shape} and {iterations}"
        )
    height, width = image.shape[:2]
    longer = max(height, width)
    if max_side is not None and longer > max_side:
        small = (
            max(1, round(width * max_side / longer)),
            max(1, round(height * max_side / longer)),
        )
        scale = torch.tensor([small[0] / width, small[1] / height]).repeat(2)
        ends = boxes + torch.tensor([0, 0, 1, 1])  # half-open, so that no box loses its last pixel
        shrunk = (ends * scale).round().long()
        shrunk[:, :2] = shrunk[:, :2].minimum(torch.tensor(small) - 1)
        shrunk[:, 2:] = (shrunk[:, 2:] - 1).maximum(shrunk[:, :2])
        found, too_few = grab_cut(
            cv2.resize(image, small, interpolation=cv2.INTER_AREA), shrunk, iterations
        )
        logits = found[:, None].float()
        whole = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
        return (whole[:, 0] > 0.5) & fill_boxes(boxes, (height, width)), too_few
    masks = fill_boxes(boxes, (height, width))
    inside = masks.sum((1, 2))
    beside = height * width - inside
    too_few = torch.minimum(inside, beside) < _GAUSSIANS
    for i in (~too_few).nonzero()[:, 0].tolist():
        x0, y0, x1, y1 = (int(side) for side in boxes[i])
        labels = np.zeros(image.shape[:2], np.uint8)
        models = np.zeros((1, 13 * _GAUSSIANS)), np.zeros((1, 13 * _GAUSSIANS))
        cv2.setRNGSeed(0)
        rectangle = (x0, y0, x1 - x0 + 1, y1 - y0 + 1)
        cv2.grabCut(image, labels, rectangle, *models, iterations, cv2.GC_INIT_WITH_RECT)
        found = (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)
        masks[i] = torch.from_numpy(found)
    return masks, too_few
