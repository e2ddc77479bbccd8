"""What becomes of automatic masks: a COCO data set, or a map of instances."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vision.data.rle import box_of_rle, decode_rle

Record = Mapping[str, Any]  # of `AutomaticMaskGenerator.generate`, with either kind of run lengths


def coco_image(file_name: str, size: tuple[int, int], records: Sequence[Record]) -> dict[str, Any]:
    """Describe one image and its masks, ready for JSON; `coco_dataset` joins the images.

    Args:
        file_name: of the image, as the data set shall call it.
        size: height and width in pixels.
        records: with output_mode "coco_rle".
    """
    annotations = [
        {
            "category_id": 1,
            "segmentation": record["segmentation"],
            "area": record["area"],
            "bbox": box_of_rle(record["segmentation"]),  # COCO's, one larger than the record's
            "iscrowd": 0,
            "score": record["predicted_iou"],
            "stability_score": record["stability_score"],
            "point_coords": record["point_coords"],
        }
        for record in records
    ]
    height, width = size
    return {"file_name": file_name, "height": height, "width": width, "annotations": annotations}


def coco_dataset(described: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Join what `coco_image` gave into a COCO data set of one category; ids count from 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(described, start=1):
        images.append({"id": image_id, **{k: v for k, v in image.items() if k != "annotations"}})
        for annotation in image["annotations"]:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    categories = [{"id": 1, "name": "object"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def instance_map(size: tuple[int, int], records: Sequence[Record]) -> np.ndarray:
    """Paint masks with numbers 1, 2, ... by falling area, so that small ones lie over large ones.

    Args:
        size: height and width in pixels.
        records: with run lengths, 65,535 at most.

    Returns:
        uint16 (H, W); 0 where no mask is.
    """
    ids = np.zeros(size, np.uint16)
    for index, record in enumerate(sorted(records, key=lambda r: -r["area"]), start=1):
        ids[decode_rle(record["segmentation"])] = index
    return ids
