"""Prompts as people write them, checked and brought to the tensors that the model takes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .transforms import scale_boxes, scale_coords

_POINTS = (
    "point_coords wants (P, 2), the x, y of P points on one object, or (N, P, 2) for N objects"
)
_BOX = "box wants x0, y0, x1, y1 as (4,), or (N, 4) for N objects"


@dataclass(frozen=True)
class Prompts:
    """Prompts for N objects of one image; coordinates in pixels of the original image.

    Attributes:
        coords: x, y, float64 (N, P, 2).
        labels: 1 foreground, 0 background, -1 padding, (N, P); None without points.
        boxes: x0, y0, x1, y1, float64 (N, 4).
        masks: logits, float32 (N, 1, h, w).
        several: whether they came with an axis for objects, which the answer then has as well.
    """

    coords: np.ndarray | None
    labels: np.ndarray | None
    boxes: np.ndarray | None
    masks: np.ndarray | None
    several: bool

    def tensors(
        self, original_size: tuple[int, int], input_size: tuple[int, int], device: torch.device
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Coordinates, labels, boxes and masks with coordinates in pixels of the encoded image.

        Args:
            original_size: height and width of the original image.
            input_size: height and width of the encoded image.
        """
        coords, labels, boxes = self.coords, self.labels, self.boxes
        if coords is not None:
            coords = scale_coords(coords, original_size, input_size)
        if boxes is not None:
            boxes = scale_boxes(boxes, original_size, input_size)
        return (
            _tensor(coords, torch.float32, device),
            _tensor(labels, torch.int64, device),
            _tensor(boxes, torch.float32, device),
            _tensor(self.masks, torch.float32, device),
        )


def read_prompts(
    mask_size: tuple[int, int], point_coords: Any, point_labels: Any, box: Any, mask_input: Any
) -> Prompts:
    """Check the prompts of one image: arrays, tensors or nested lists of numbers.

    Args:
        mask_size: h and w that the model wants of a mask.
        point_coords: x, y in pixels of the original image, (P, 2), or (N, P, 2) for N objects.
        point_labels: 1 foreground, 0 background, -1 padding, (P,) or (N, P).
        box: x0, y0, x1, y1 in pixels of the original image, (4,), or (N, 4) for N objects.
        mask_input: logits, (1, h, w), or (N, 1, h, w) for N objects.

    Raises:
        ValueError: no prompt, or what is wrong with which of them.
    """
    if point_labels is not None and point_coords is None:
        raise ValueError("point_labels came without point_coords; give both, or neither")
    coords = None if point_coords is None else _read_coords(point_coords)
    labels = None if coords is None else _read_labels(point_labels, coords.shape[:-1])
    boxes = None if box is None else _read_boxes(box)
    masks = None if mask_input is None else _read_masks(mask_input, mask_size)
    # With the number of axes that each kind has for one object.
    kinds = {"point_coords": (coords, 2), "box": (boxes, 1), "mask_input": (masks, 3)}
    given = {name: (a, axes) for name, (a, axes) in kinds.items() if a is not None}
    if not given:
        raise ValueError("wanted a prompt, got none; give points, a box or a mask")
    counts = {name: len(a) if a.ndim > axes else 1 for name, (a, axes) in given.items()}
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise ValueError(f"{empty[0]} wants at least one object, got none; make no call then")
    if len(set(counts.values())) > 1:
        raise ValueError(
            "points, box and mask of one call belong together, object by object: wanted each for "
            f"the same number of objects, got {counts}; N boxes take points (N, P, 2), labels "
            "(N, P) and masks (N, 1, h, w), and objects with fewer points are padded with label -1"
        )
    return Prompts(
        coords=_with_objects(coords, 2),
        labels=_with_objects(labels, 1),
        boxes=_with_objects(boxes, 1),
        masks=_with_objects(masks, 3),
        several=any(a.ndim > axes for a, axes in given.values()),
    )


def _read_coords(value: Any) -> np.ndarray:
    coords = _numbers(value, "point_coords", _POINTS)
    if coords.shape == (2,):
        raise ValueError(f"{_POINTS}, got (2,); write one point as [[x, y]]")
    if coords.ndim not in (2, 3) or coords.shape[-1] != 2 or coords.shape[-2] == 0:
        raise ValueError(f"{_POINTS}, got {coords.shape}; leave it out if there is no point")
    return coords.astype(np.float64)


def _read_labels(value: Any, wanted: tuple[int, ...]) -> np.ndarray:
    meaning = "1 for foreground, 0 for background, -1 for padding"
    if value is None:
        raise ValueError(f"point_coords came without point_labels; give {meaning}")
    labels = _numbers(value, "point_labels", f"point_labels wants {meaning}")
    if labels.shape != wanted:
        raise ValueError(
            f"point_labels wants one label for each point, {wanted}, got {labels.shape}"
        )
    wrong = labels[~np.isin(labels, (-1, 0, 1))]
    if wrong.size:
        raise ValueError(f"point_labels wants {meaning}, got {np.unique(wrong).tolist()}")
    return labels.astype(np.int64)


def _read_boxes(value: Any) -> np.ndarray:
    boxes = _numbers(value, "box", _BOX)
    if boxes.ndim == 3 and boxes.shape[-1] == 4:
        raise ValueError(
            f"{_BOX} of this image, got {boxes.shape}; boxes of several images go to "
            "predict_batch(box_batch=[...]) after set_image_batch, an array (N, 4) for each image"
        )
    if boxes.ndim not in (1, 2) or boxes.shape[-1] != 4:
        raise ValueError(f"{_BOX}, got {boxes.shape}")
    corners = boxes.astype(np.float64).reshape(-1, 4)
    wrong = corners[(corners[:, 2] < corners[:, 0]) | (corners[:, 3] < corners[:, 1])]
    if len(wrong):
        raise ValueError(
            f"{_BOX} with x0 <= x1 and y0 <= y1, got {wrong[0].tolist()}; the last two are the "
            "lower right corner, not width and height"
        )
    return corners.reshape(boxes.shape)


def _read_masks(value: Any, size: tuple[int, int]) -> np.ndarray:
    h, w = size
    wanted = f"mask_input wants logits (1, {h}, {w}), or (N, 1, {h}, {w}) for N objects"
    masks = _numbers(value, "mask_input", wanted)
    if masks.ndim not in (3, 4) or masks.shape[-3:] != (1, h, w):
        advice = "give low-resolution logits that predict returned for this image"
        if masks.shape == (h, w):
            advice = "add an axis: mask_input[None]"
        elif masks.ndim == 3 and masks.shape[-2:] == (h, w):
            advice = "choose one of the masks: low_res_logits[best : best + 1]"
        elif masks.ndim == 4 and masks.shape[-2:] == (h, w):
            advice = "choose one mask of each object: low_res_logits[range(N), best][:, None]"
        raise ValueError(f"{wanted}, got {masks.shape}; {advice}")
    return masks.astype(np.float32)


def _numbers(value: Any, name: str, wanted: str) -> np.ndarray:
    """An array of finite numbers."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.double() if value.is_floating_point() else value
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{wanted}, got rows of different lengths ({error})") from error
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{wanted}, got {name} of dtype {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{wanted}, got NaN or infinity in {name}")
    return array


def _with_objects(array: np.ndarray | None, axes: int) -> np.ndarray | None:
    """Give an array for one object, which has `axes` axes, one for objects."""
    return array[None] if array is not None and array.ndim == axes else array


def _tensor(array: np.ndarray | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    return None if array is None else torch.as_tensor(array, dtype=dtype, device=device)
