"""Masks of everything in an image, from point prompts on a grid, without any user."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms
from tqdm import tqdm

from vision.data.instances import boxes_of_masks
from vision.data.rle import Rle, area_of_rle, decode_rle, encode_masks, uncompressed_rle

from .amg_crops import Crop, build_point_grids, crop_boxes, is_box_near_crop_edge
from .amg_masks import (
    fill_small_holes,
    paste_masks,
    remove_small_islands,
    stability_score,
)
from .model import ImageEmbedding, RwkvSam
from .transforms import ImageLike, as_rgb, resize_longest_side, scale_coords

# Pixels of the logits that are looked at together: with all that is computed from them, about
# 100 MiB. More is not faster on a CPU.
_PIXELS_AT_ONCE = 2**23

OUTPUT_MODES: dict[str, Callable[[Rle], Any]] = {
    "binary_mask": decode_rle,
    "uncompressed_rle": uncompressed_rle,
    "coco_rle": lambda rle: rle,
}


@dataclass(frozen=True)
class _Mask:
    """A mask in the frame of the whole image; boxes are x0, y0, x1, y1."""

    rle: Rle
    box: list[int]
    predicted_iou: float
    stability_score: float
    point: list[float]
    crop_box: tuple[int, int, int, int]


class AutomaticMaskGenerator:
    """Segments everything in an image (arguments and results of SamAutomaticMaskGenerator).

    Every point of a grid is a prompt for three masks (one, of a single-mask model). Masks that the
    model itself rates low, that change much with the threshold, that are cut by a crop or that
    repeat another mask are dropped. Never more than a few masks exist as pixels at a time,
    whatever the number of prompts: what stays is kept as run lengths.

    Args:
        points_per_side: of the grid on the whole image; None with `point_grids`.
        points_per_batch: prompts that the mask decoder gets at once; fewer need less memory.
        pred_iou_thresh: masks need a predicted IoU above it; 0 keeps all.
        stability_score_thresh: masks need at least this stability score, which is the IoU of the
            masks at `model.mask_threshold` plus and minus `stability_score_offset`.
        stability_score_offset: in logits.
        box_nms_thresh: of two masks of a crop whose boxes have a higher IoU, the one with the
            higher predicted IoU stays.
        crop_n_layers: layer i = 1 .. crop_n_layers looks at (2**i)**2 overlapping crops, each
            encoded like an image of its own. Finds small objects; costs accordingly.
        crop_nms_thresh: of two masks of different crops whose boxes have a higher IoU, the one of
            the smaller crop stays.
        crop_overlap_ratio: overlap of neighbours in layer 1 as a share of the image's short side.
        crop_n_points_downscale_factor: layer i has points_per_side / factor**i points a side.
        point_grids: instead of `points_per_side`: one grid for each layer, (n, 2), x, y in 0..1.
        min_mask_region_area: holes and islands of fewer pixels are removed from the masks, and the
            masks that repeat another one after it; 0: off.
        output_mode: what "segmentation" is: "binary_mask": bool (H, W); "coco_rle": COCO's
            compressed run lengths, ready for JSON; "uncompressed_rle": lists of counts.
        progress: show a bar with the prompts done and to do.

    Raises:
        ValueError: an argument is out of range, or both or none of points_per_side and
            point_grids are given.
    """

    def __init__(
        self,
        model: RwkvSam,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: Sequence[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
        progress: bool = False,
    ) -> None:
        if output_mode not in OUTPUT_MODES:
            raise ValueError(f"no output_mode {output_mode!r}; there are {', '.join(OUTPUT_MODES)}")
        _check_at_least(
            1,
            points_per_batch=points_per_batch,
            crop_n_points_downscale_factor=crop_n_points_downscale_factor,
        )
        _check_at_least(
            0,
            stability_score_offset=stability_score_offset,
            crop_n_layers=crop_n_layers,
            min_mask_region_area=min_mask_region_area,
        )
        if not 0 <= crop_overlap_ratio < 1:
            raise ValueError(f"crop_overlap_ratio wants 0 <= ratio < 1, got {crop_overlap_ratio}")
        if (points_per_side is None) == (point_grids is None):
            raise ValueError(
                "wanted one of points_per_side and point_grids, got "
                f"{'none' if point_grids is None else 'both; set points_per_side=None'}"
            )
        if point_grids is not None:
            self.point_grids = _checked_grids(point_grids, crop_n_layers)
        elif points_per_side is not None:
            self.point_grids = build_point_grids(
                points_per_side, crop_n_layers, crop_n_points_downscale_factor
            )
        self.model = model.eval()
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode
        self.progress = progress

    @torch.no_grad()
    def generate(self, image: ImageLike) -> list[dict[str, Any]]:
        """Segment everything in an image.

        Args:
            image: see `vision.sam.transforms.as_rgb`.

        Returns:
            A record for each mask:
            "segmentation": see `output_mode`;
            "area": in pixels;
            "bbox": x, y, width, height, from the first to the last pixel of the mask, so that the
            width and height of a single pixel are 0 (as segment-anything counts);
            "predicted_iou": of the mask with the object, by the model;
            "point_coords": [[x, y]], the prompt;
            "stability_score": see the class;
            "crop_box": x, y, width, height of the crop that the mask was found in.

        Raises:
            ValueError: see `as_rgb`.
            TypeError: see `as_rgb`.
        """
        pixels = as_rgb(image)
        crops = crop_boxes(pixels.shape[:2], self.crop_n_layers, self.crop_overlap_ratio)
        masks: list[_Mask] = []
        prompts = sum(len(self.point_grids[crop.layer]) for crop in crops)
        with tqdm(total=prompts, unit="prompt", disable=not self.progress) as bar:
            for crop in crops:
                masks += self._masks_of_crop(pixels, crop, bar)
        if len(crops) > 1:
            # A smaller crop shows the object in more detail.
            smallness = [1 / _box_area(mask.crop_box) for mask in masks]
            masks = _without_repeats(masks, smallness, self.crop_nms_thresh)
        if self.min_mask_region_area > 0:
            masks = self._without_small_regions(masks)
        return [self._record(mask) for mask in masks]

    def _masks_of_crop(self, image: np.ndarray, crop: Crop, bar: tqdm) -> list[_Mask]:
        """Return the masks that all points of a crop give, without repeats."""
        x0, y0, x1, y1 = crop.box
        pixels = resize_longest_side(image[y0:y1, x0:x1], self.model.image_size)
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.model.device)
        embedding = self.model.encode_image(x)
        points = self.point_grids[crop.layer] * (x1 - x0, y1 - y0)
        masks: list[_Mask] = []
        for start in range(0, len(points), self.points_per_batch):
            batch = points[start : start + self.points_per_batch]
            masks += self._masks_of_points(embedding, batch, crop.box, image.shape[:2])
            bar.update(len(batch))
        return _without_repeats(masks, [mask.predicted_iou for mask in masks], self.box_nms_thresh)

    def _masks_of_points(
        self,
        embedding: ImageEmbedding,
        points: np.ndarray,
        crop_box: tuple[int, int, int, int],
        size: tuple[int, int],
    ) -> list[_Mask]:
        """Return the good masks of some prompts.

        Args:
            embedding: of the crop.
            points: x, y in pixels of the crop, (N, 2).
            size: height and width of the whole image.
        """
        x0, y0, x1, y1 = crop_box
        crop_size = (y1 - y0, x1 - x0)
        coords = torch.as_tensor(
            scale_coords(points, crop_size, embedding.input_size),
            dtype=torch.float32,
            device=self.model.device,
        )
        labels = torch.ones(len(points), 1, dtype=torch.int64, device=coords.device)
        low_res, iou = self.model.predict_masks(
            embedding,
            points=(coords[:, None], labels),
            multimask_output=not self.model.mask_decoder.single_mask,
        )
        in_image = (points + np.array((x0, y0))).repeat(iou.shape[1], axis=0).tolist()
        low_res, iou = low_res.flatten(0, 1), iou.flatten(0, 1).float()  # (N * M, ...)
        predicted = iou.tolist()
        good = torch.arange(len(iou), device=iou.device)
        if self.pred_iou_thresh > 0:
            good = good[iou > self.pred_iou_thresh]

        padded = self.model.padded_size(embedding.input_size)
        largest = max(padded[0] * padded[1], size[0] * size[1])
        step = max(1, _PIXELS_AT_ONCE // largest)
        masks = []
        for start in range(0, len(good), step):
            chunk = good[start : start + step]
            stability, boxes, rles, kept = self._compress(
                self.model.upscale_masks(low_res[None, chunk], embedding.input_size, crop_size)[0],
                crop_box,
                size,
            )
            for i, rle, box, score in zip(
                chunk[kept].tolist(), rles, boxes, stability, strict=True
            ):
                masks.append(_Mask(rle, box, predicted[i], score, in_image[i], crop_box))
        return masks

    def _compress(
        self, logits: Tensor, crop_box: tuple[int, int, int, int], size: tuple[int, int]
    ) -> tuple[list[float], list[list[int]], list[Rle], Tensor]:
        """Keep the stable masks that the crop does not cut.

        Args:
            logits: of the crop, (N, y1 - y0, x1 - x0).
            size: height and width of the whole image.

        Returns:
            Of the masks kept: stability, boxes and run lengths in the whole image, and indices.
        """
        threshold = self.model.mask_threshold
        stability = stability_score(logits, threshold, self.stability_score_offset)
        kept = (stability >= self.stability_score_thresh).nonzero()[:, 0]
        masks = logits[kept] > threshold
        boxes = boxes_of_masks(masks)
        whole = ~is_box_near_crop_edge(boxes, crop_box, size)
        masks, boxes, kept = masks[whole], boxes[whole], kept[whole]
        boxes = boxes + boxes.new_tensor([*crop_box[:2], *crop_box[:2]])
        rles = encode_masks(paste_masks(masks, crop_box, size))
        return stability[kept].tolist(), boxes.tolist(), rles, kept

    def _without_small_regions(self, masks: list[_Mask]) -> list[_Mask]:
        """Clean the masks; of those that became alike, one that was clean before stays."""
        cleaned, unchanged = [], []
        for mask in masks:
            pixels, filled = fill_small_holes(decode_rle(mask.rle), self.min_mask_region_area)
            pixels, removed = remove_small_islands(pixels, self.min_mask_region_area)
            if filled or removed:
                new = torch.from_numpy(pixels)[None]
                mask = replace(mask, rle=encode_masks(new)[0], box=boxes_of_masks(new)[0].tolist())
            cleaned.append(mask)
            unchanged.append(float(not (filled or removed)))
        return _without_repeats(cleaned, unchanged, max(self.box_nms_thresh, self.crop_nms_thresh))

    def _record(self, mask: _Mask) -> dict[str, Any]:
        return {
            "segmentation": OUTPUT_MODES[self.output_mode](mask.rle),
            "area": area_of_rle(mask.rle),
            "bbox": _xywh(mask.box),
            "predicted_iou": mask.predicted_iou,
            "point_coords": [mask.point],
            "stability_score": mask.stability_score,
            "crop_box": _xywh(mask.crop_box),
        }


def _without_repeats(masks: list[_Mask], scores: list[float], thresh: float) -> list[_Mask]:
    """Return the masks by falling score, without those whose box has an IoU > thresh with one."""
    boxes = torch.tensor([mask.box for mask in masks], dtype=torch.float32).reshape(-1, 4)
    return [masks[i] for i in nms(boxes, torch.tensor(scores), thresh).tolist()]


def _xywh(box: Sequence[int]) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def _box_area(box: Sequence[int]) -> int:
    _, _, width, height = _xywh(box)
    return width * height


def _check_at_least(least: int, **arguments: float) -> None:
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name} wants {least} or more, got {value}")


def _checked_grids(grids: Sequence[np.ndarray], n_layers: int) -> list[np.ndarray]:
    """Return the grids as float64; ValueError if they are not one for each layer, in 0..1."""
    if len(grids) != n_layers + 1:
        raise ValueError(
            f"point_grids wants one grid for each layer 0 .. {n_layers}, got {len(grids)}"
        )
    checked = [np.asarray(grid, np.float64) for grid in grids]
    for layer, grid in enumerate(checked):
        if (
            grid.ndim != 2
            or grid.shape[1] != 2
            or grid.min(initial=0) < 0
            or grid.max(initial=0) > 1
        ):
            raise ValueError(
                f"point_grids[{layer}] wants x, y in 0..1, (n, 2), got {grid.shape} with values "
                f"{grid.min(initial=0):.4g}..{grid.max(initial=0):.4g}"
            )
    return checked
