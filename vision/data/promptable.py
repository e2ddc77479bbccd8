"""Images with the masks of single objects, to train and to judge promptable segmentation.

Every data set gives samples `{"image": uint8 (H, W, 3), "masks": bool (N, H, W), "name": file}`.
A broken file raises an error that names it; what is left out on purpose is counted.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .image_io import LabelError, list_images, read_image, read_mask
from .rle import decode_rle, polygons_to_rle


class MaskPairs:
    """One object an image: a folder of images and one of masks with the same stems.

    The layout of DIS5K, COIFT, HRSOD, ThinObject5K.

    Args:
        images: folder of images; subfolders count.
        masks: folder of greyscale masks, with the images' relative paths and any suffix.
        threshold: pixels above it belong to the object.

    Raises:
        ValueError: a folder without images, or an image without a mask.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        masks: str | os.PathLike[str],
        threshold: int = 128,
    ) -> None:
        found = {_stem(path, Path(masks)): path for path in list_images(masks)}
        self.images = list_images(images)
        stems = [_stem(path, Path(images)) for path in self.images]
        missing = [stem for stem in stems if stem not in found]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(stems)} images in {images} have no mask in {masks}: "
                f"{', '.join(missing[:5])}; masks want the same names"
            )
        self.masks = [found[stem] for stem in stems]
        self.threshold = threshold

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Raises:
            ImageReadError: image or mask cannot be read.
            LabelError: the mask is empty, or of another size than the image.
        """
        path = self.masks[index]
        image, mask = read_image(self.images[index]), read_mask(path) > self.threshold
        if mask.shape != image.shape[:2]:
            raise LabelError(
                f"{path}: wanted a mask of {image.shape[0]} x {image.shape[1]} pixels (height, "
                f"width) as {self.images[index].name} has, got {mask.shape[0]} x {mask.shape[1]}"
            )
        if not mask.any():
            raise LabelError(f"{path}: no pixel is above {self.threshold}, the mask is empty")
        return {"image": image, "masks": mask[None], "name": str(self.images[index])}


class CocoInstances:
    """The objects of a COCO-format file: polygons, run lengths in either form.

    Args:
        annotations: JSON file with images and annotations.
        images: folder that the file names are relative to.
        min_area: smaller objects, in pixels of their mask, are left out.
        max_masks: the largest objects of an image that are given; None for all.

    Attributes:
        left_out: how many of what was left out: "crowd" regions, "small" objects, and "images"
            that have no object then.

    Raises:
        ValueError: no such file, no JSON, or annotations of an image that the file does not list.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str],
        min_area: float = 0,
        max_masks: int | None = None,
    ) -> None:
        path = Path(annotations)
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"wanted a COCO annotation file, got {path} ({error})") from error
        lacking = {"images", "annotations"} - set(content if isinstance(content, dict) else ())
        if lacking:
            raise ValueError(f"{path} lacks {' and '.join(sorted(lacking))} of a COCO file")
        listed = {image["id"]: image for image in content["images"]}
        stray = sorted({a["image_id"] for a in content["annotations"]} - set(listed), key=str)
        if stray:
            raise ValueError(
                f"{path} has annotations of {len(stray)} images that it does not list, ids "
                f"{', '.join(map(str, stray[:5]))}; add the images or remove the annotations"
            )
        self.folder = Path(images)
        self.left_out: Counter[str] = Counter()
        objects: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            if annotation.get("iscrowd", 0):
                self.left_out["crowd"] += 1
            elif annotation.get("area", min_area) < min_area:
                self.left_out["small"] += 1
            else:
                objects[annotation["image_id"]].append(annotation)
        for found in objects.values():
            found.sort(key=lambda annotation: -annotation.get("area", 0))
            del found[len(found) if max_masks is None else max_masks :]
        self.objects = [(image, objects[key]) for key, image in listed.items() if objects[key]]
        self.left_out["images"] = len(listed) - len(self.objects)

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample; "category_ids" are the objects' categories, int64 (N,), 0 without one.

        Raises:
            ImageReadError: the image cannot be read.
            LabelError: a mask is empty or of another size than the image.
        """
        record, objects = self.objects[index]
        path = self.folder / record["file_name"]
        image = read_image(path)
        masks = np.stack([_mask(a, image.shape[:2], path) for a in objects])
        categories = np.array([a.get("category_id", 0) for a in objects], np.int64)
        return {"image": image, "masks": masks, "name": str(path), "category_ids": categories}


class RepeatedSets:
    """Several data sets one after another, each as often as it is to count.

    Args:
        sets: what to join.
        repeats: how often each is gone through, 1 for all by default.

    Raises:
        ValueError: another number of repeats than sets, or one below 1.
    """

    def __init__(self, sets: Sequence[Any], repeats: Sequence[int] | None = None) -> None:
        repeats = [1] * len(sets) if repeats is None else list(repeats)
        if len(repeats) != len(sets) or min(repeats, default=0) < 1:
            raise ValueError(
                f"wanted {len(sets)} numbers of repeats, 1 or more, one a data set, got {repeats}"
            )
        self.sets = list(sets)
        self.lengths = [len(s) * n for s, n in zip(sets, repeats, strict=True)]

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample of the set that the index falls into.

        Raises:
            IndexError: past the end.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index} of {len(self)}")
        for members, length in zip(self.sets, self.lengths, strict=True):
            if index < length:
                return members[index % len(members)]
            index -= length
        raise AssertionError


def _stem(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _mask(annotation: dict[str, Any], size: tuple[int, int], path: Path) -> np.ndarray:
    """The mask of one annotation, bool (H, W)."""
    shape = annotation["segmentation"]
    name = f"{path}, annotation {annotation.get('id')}"
    rle = polygons_to_rle(shape, size) if isinstance(shape, list) else shape
    if tuple(rle["size"]) != size:
        raise LabelError(
            f"{name}: wanted run lengths of {size[0]} x {size[1]} pixels (height, width) as the "
            f"image has, got {rle['size'][0]} x {rle['size'][1]}"
        )
    mask = decode_rle(rle)
    if not mask.any():
        raise LabelError(f"{name}: the mask is empty; remove the annotation")
    return mask
