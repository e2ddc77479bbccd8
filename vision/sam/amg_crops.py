"""Where the automatic mask generator looks: crops of the image and grids of points."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Crop(NamedTuple):
    """A part of the image: x0, y0, x1, y1 in pixels, half-open; layer 0 is the whole image."""

    box: tuple[int, int, int, int]
    layer: int


def crop_boxes(size: tuple[int, int], n_layers: int, overlap_ratio: float) -> list[Crop]:
    """Return the whole image and, for each layer i = 1 .. n_layers, (2**i)**2 crops that overlap.

    Args:
        size: height and width of the image in pixels.
        n_layers: 0: the whole image alone.
        overlap_ratio: of two neighbours in layer 1, as a share of the image's short side; it
            halves with every further layer.
    """
    height, width = size
    crops = [Crop((0, 0, width, height), 0)]
    for layer in range(1, n_layers + 1):
        per_side = 2**layer
        overlap = int(overlap_ratio * min(size) * (2 / per_side))
        crop_w = math.ceil((overlap * (per_side - 1) + width) / per_side)
        crop_h = math.ceil((overlap * (per_side - 1) + height) / per_side)
        for column in range(per_side):
            for row in range(per_side):
                x0, y0 = (crop_w - overlap) * column, (crop_h - overlap) * row
                if x0 < width and y0 < height:  # in a tiny image, the last ones have no pixel
                    box = (x0, y0, min(x0 + crop_w, width), min(y0 + crop_h, height))
                    crops.append(Crop(box, layer))
    return crops


def build_point_grid(points_per_side: int) -> np.ndarray:
    """Return the centres of n x n equal cells of the unit square.

    Returns:
        float64 (n * n, 2): x, y in 0 .. 1, row by row.

    Raises:
        ValueError: fewer than one point a side.
    """
    if points_per_side < 1:
        raise ValueError(
            f"a point grid wants 1 or more points a side, got {points_per_side}; lower "
            "crop_n_points_downscale_factor or raise points_per_side"
        )
    centres = (np.arange(points_per_side) + 0.5) / points_per_side
    return np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)


def build_point_grids(points_per_side: int, n_layers: int, downscale: int) -> list[np.ndarray]:
    """Return a grid for layer 0 .. n_layers; layer i has int(n / downscale**i) points a side."""
    return [build_point_grid(int(points_per_side / downscale**i)) for i in range(n_layers + 1)]


def is_box_near_crop_edge(
    boxes: Tensor, crop_box: Sequence[int], size: tuple[int, int], tolerance: float = 20.0
) -> Tensor:
    """Tell which boxes end at an edge of the crop that is no edge of the image.

    What they hold may go on outside of the crop.

    Args:
        boxes: x0, y0, x1, y1 in pixels of the crop, (N, 4).
        crop_box: x0, y0, x1, y1 in pixels of the image.
        size: height and width of the image.
        tolerance: in pixels, inclusive.

    Returns:
        bool, (N,).
    """
    crop = torch.tensor(crop_box, dtype=torch.float32, device=boxes.device)
    image = crop.new_tensor([0, 0, size[1], size[0]])
    in_image = boxes + crop[[0, 1, 0, 1]]
    at_crop = (in_image - crop).abs() <= tolerance
    at_image = (in_image - image).abs() <= tolerance
    return (at_crop & ~at_image).any(dim=1)
