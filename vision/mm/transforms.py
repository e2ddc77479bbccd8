"""mmseg transforms: safe loading, and albumentations from a config."""

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS

from vision.data import AlbumentationsTransform, check_labels, read_image, read_mask


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Read `img_path` as RGB uint8 (H, W, 3), whatever the file holds.

    Greyscale, palette, 16-bit and transparent images are converted; a damaged file is an error
    that names it. mmseg's own loader gives BGR: configs with this one set `bgr_to_rgb=False`.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add img, img_shape and ori_shape."""
        image = read_image(results["img_path"])
        size = image.shape[:2]
        return results | {"img": image, "img_shape": size, "ori_shape": size}


@TRANSFORMS.register_module()
class LoadMask(BaseTransform):
    """Read `seg_map_path` as class indices (H, W), checked against the number of classes.

    Args:
        num_classes: number of classes after `reduce_zero_label`; None for no check.
        ignore_index: label of pixels without a class.
    """

    def __init__(self, num_classes: int | None = None, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add gt_seg_map.

        Raises:
            LabelError: a pixel whose label is no class.
        """
        mask = read_mask(results["seg_map_path"])
        if results["reduce_zero_label"]:
            # 0 means "no class", and class n is stored as n + 1.
            mask = np.where((mask == 0) | (mask == 255), 256, mask) - 1
        if results.get("label_map"):
            table = np.arange(256)
            for old, new in results["label_map"].items():
                table[old] = new
            mask = table[mask]
        if self.num_classes is not None:
            name = str(results["seg_map_path"])
            check_labels(mask, self.num_classes, self.ignore_index, name)
        results["gt_seg_map"] = mask.astype(np.uint8)
        results["seg_fields"].append("gt_seg_map")
        return results


@TRANSFORMS.register_module()
class Albumentations(BaseTransform):
    """albumentations on the image and its label map.

    Args:
        transforms: list of {"type": name, **arguments}; OneOf, SomeOf and Sequential nest.
    """

    def __init__(self, transforms: list[dict[str, Any]]) -> None:
        self.compose = AlbumentationsTransform(transforms)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Transform img and gt_seg_map together."""
        sample = {"image": results["img"]}
        if "gt_seg_map" in results:
            sample["mask"] = results["gt_seg_map"]
        sample = self.compose(sample)
        results["img"] = sample["image"]
        results["img_shape"] = sample["image"].shape[:2]
        if "mask" in sample:
            results["gt_seg_map"] = sample["mask"]
        return results
