"""Average precision of instance masks as COCO counts it, and of their boundaries.

Boundary AP (arXiv:2103.16562): the IoU of two masks is the smaller one of mask IoU and boundary
IoU; a crowd region keeps the mask IoU.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .masks import boundary_dilation, mask_boundary


def check_results(results: Sequence[Mapping[str, Any]], coco: Mapping[str, Any], key: str) -> None:
    """Check detections against the annotations that they are to be compared with.

    Args:
        results: of COCO's results format.
        coco: see `vision.data.coco_file.read_coco`.
        key: what each must have besides image_id, category_id and score: "bbox" or "segmentation".

    Raises:
        ValueError: something else than a list of detections, or ids that the annotations lack.
    """
    needed = {"image_id", "category_id", "score", key}
    if not isinstance(results, list):
        raise ValueError(f"results want a list of detections, got {type(results).__name__}")
    for index, one in enumerate(results):
        lacking = needed - set(one if isinstance(one, dict) else ())
        if lacking:
            raise ValueError(
                f"detection {index} of {len(results)} lacks {' and '.join(sorted(lacking))}"
            )
    for ids, have in (("image_id", coco["images"]), ("category_id", coco["categories"])):
        known = {entry["id"] for entry in have}
        stray = sorted({one[ids] for one in results} - known, key=str)
        if stray:
            raise ValueError(
                f"detections have {len(stray)} values of {ids} that the annotations lack: "
                f"{', '.join(map(str, stray[:5]))}; take the annotations that belong to them"
            )


def mask_ap(
    coco: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    boundary_ratio: float | None = None,
    max_dets: int = 100,
) -> dict[str, float]:
    """Average precision of masks (pycocotools' COCOeval of type "segm"), or of their boundaries.

    Args:
        coco: annotations, see `vision.data.coco_file.read_coco`; not changed.
        results: detections with image_id, category_id, score and segmentation (run lengths, as
            COCO's results format has them).
        boundary_ratio: width of the boundary band over the image's diagonal, 0.02 as published;
            None for plain AP.
        max_dets: the best detections of an image and category that count. 300 is what LVIS counts;
            its federated rules (categories not annotated in an image) are not applied.

    Returns:
        In percent: "AP" (mean over IoU 0.5 to 0.95), "AP50", "AP75", "AP_small", "AP_medium",
        "AP_large", and the recall "AR"; NaN without any object of the kind.

    Raises:
        ValueError: see `check_results`; or max_dets below 1, or a ratio that is not above 0.
    """
    if max_dets < 1 or (boundary_ratio is not None and not boundary_ratio > 0):
        raise ValueError(
            f"wanted max_dets >= 1 and a boundary_ratio above 0, got {max_dets}, {boundary_ratio}"
        )
    check_results(results, coco, "segmentation")
    truth = [{"iscrowd": 0, **annotation} for annotation in coco["annotations"]]  # LVIS lacks it
    found = [
        {
            "id": index,
            "iscrowd": 0,
            "area": float(coco_mask.area(one["segmentation"])),
            **{k: one[k] for k in ("image_id", "category_id", "score", "segmentation")},
        }
        for index, one in enumerate(results, start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools speaks by print
        judge = _MaskEval(_index(coco, truth), _index(coco, found), boundary_ratio)
        judge.params.maxDets = [max_dets]
        judge.evaluate()
        judge.accumulate()
    precision, recall = (
        judge.eval["precision"],
        judge.eval["recall"],
    )  # (T, R, K, A, M), (T, K, A, M)
    at = {round(100 * t): i for i, t in enumerate(judge.params.iouThrs)}
    areas = {name: i for i, name in enumerate(judge.params.areaRngLbl)}
    whole = areas["all"]
    return {
        "AP": _percent(precision[:, :, :, whole, 0]),
        "AP50": _percent(precision[at[50], :, :, whole, 0]),
        "AP75": _percent(precision[at[75], :, :, whole, 0]),
        **{
            f"AP_{name}": _percent(precision[:, :, :, areas[name], 0])
            for name in ("small", "medium", "large")
        },
        "AR": _percent(recall[:, :, whole, 0]),
    }


def _percent(values: np.ndarray) -> float:
    """Mean of what pycocotools did not mark as absent."""
    present = values[values > -1]
    return 100 * float(present.mean()) if present.size else float("nan")


def _index(coco: Mapping[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    index = COCO()
    index.dataset = {
        "images": coco["images"],
        "categories": coco["categories"],
        "annotations": annotations,
    }
    index.createIndex()
    return index


class _MaskEval(COCOeval):
    """COCOeval whose IoU of two masks may be bounded by that of their boundaries."""

    def __init__(self, truth: COCO, found: COCO, boundary_ratio: float | None) -> None:
        super().__init__(truth, found, "segm")
        self.boundary_ratio = boundary_ratio

    def computeIoU(self, imgId: Any, catId: Any) -> Any:
        """IoU of detections, best first, and objects of one image and category, (D, G)."""
        iou = super().computeIoU(imgId, catId)
        truth, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if self.boundary_ratio is None or not truth or not found:
            return iou
        order = np.argsort([-one["score"] for one in found], kind="mergesort")
        found = [found[i] for i in order[: self.params.maxDets[-1]]]
        bands = [
            [_boundary_rle(one["segmentation"], self.boundary_ratio) for one in several]
            for several in (found, truth)
        ]
        no_crowd = [0] * len(truth)
        bounded = np.minimum(iou, coco_mask.iou(*bands, no_crowd))
        return np.where([bool(one["iscrowd"]) for one in truth], iou, bounded)


def _boundary_rle(rle: dict[str, Any], ratio: float) -> dict[str, Any]:
    """Run lengths of the boundary of a mask, see `mask_boundary`."""
    mask = coco_mask.decode(rle)
    d = boundary_dilation(mask.shape[0], mask.shape[1], ratio)
    x, y, width, height = (int(side) for side in coco_mask.toBbox(rle))
    # Outside of the box there is no mask, as there is none outside of the image.
    part = np.ascontiguousarray(mask[y : y + height, x : x + width]).view(bool)
    if part.size:
        band = mask_boundary(torch.from_numpy(part), d)
        mask[y : y + height, x : x + width] = band.numpy()
    return coco_mask.encode(mask)
