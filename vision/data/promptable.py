"""Images with the masks of single objects, to train and to judge promptable segmentation.

Every data set gives samples `{"image": uint8 (H, W, 3), "masks": bool (N, H, W), "name": file,
"dataset": short name of the set}`, N >= 1 and no mask empty; some add "category_ids", int64 (N,).
A broken file raises an error that names it; what is left out on purpose is counted and, where whole
files are left out, logged.
"""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .coco_file import read_coco
from .image_io import ImageReadError, LabelError, list_images, read_image, read_mask
from .rle import decode_rle, polygons_to_rle

_LOG = logging.getLogger(__name__)
_PER_OBJECT = ("masks", "category_ids")


def take_objects(sample: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """Return the sample with some of its objects.

    Args:
        sample: of one of the data sets here.
        rows: indices of the objects, integers (M,), or which to keep, bool (N,).
    """
    return {**sample, **{key: sample[key][rows] for key in _PER_OBJECT if key in sample}}


def mask_of_annotation(annotation: dict[str, Any], size: tuple[int, int], path: Path) -> np.ndarray:
    """Decode the mask of a COCO-format annotation.

    Args:
        annotation: with a "segmentation": polygons, or run lengths in either form.
        size: height and width of the image.
        path: file that an error names.

    Returns:
        bool, (H, W), not empty.

    Raises:
        LabelError: broken, empty, or of another size.
    """
    name = f"{path}, annotation {annotation.get('id')}"
    try:
        shape = annotation["segmentation"]
        rle = polygons_to_rle(shape, size) if isinstance(shape, list) else shape
        found = tuple(rle["size"])
        mask = decode_rle(rle) if found == size else None
    except (KeyError, TypeError, ValueError) as error:
        raise LabelError(
            f"{name}: wanted polygons or run lengths, got {type(error).__name__} ({error})"
        ) from error
    if mask is None:
        raise LabelError(
            f"{name}: wanted run lengths of {size[0]} x {size[1]} pixels (height, width) as the "
            f"image has, got {' x '.join(map(str, found))}"
        )
    if not mask.any():
        raise LabelError(f"{name}: the mask is empty; remove the annotation")
    return mask


def warn_left_out(what: str, names: Sequence[str]) -> None:
    """Log a warning with the first names of what a data set leaves out, if there is any."""
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        _LOG.warning("left out %d %s: %s", len(names), what, shown)


class MaskPairs:
    """One object an image: a folder of images and one of masks with the same stems.

    The layout of DIS5K, COIFT, HRSOD, ThinObject5K.

    Args:
        images: folder of images; subfolders count.
        masks: folder of greyscale masks, with the images' relative paths and any suffix.
        threshold: pixels above it belong to the object.
        name: short name of the set; default: of the folder that `images` lies in.

    Attributes:
        left_out: how many "masks" have no image.

    Raises:
        ValueError: a folder without images, or an image without a mask.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        masks: str | os.PathLike[str],
        threshold: int = 128,
        name: str | None = None,
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
        lone = [str(found[stem]) for stem in sorted(set(found) - set(stems))]
        self.left_out = Counter(masks=len(lone))
        warn_left_out(f"masks without an image in {images}", lone)
        self.threshold = threshold
        self.name = name or Path(images).absolute().parent.name

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
        _check_size(path, mask, image, self.images[index].name)
        if not mask.any():
            raise LabelError(f"{path}: no pixel is above {self.threshold}, the mask is empty")
        name = str(self.images[index])
        return {"image": image, "masks": mask[None], "name": name, "dataset": self.name}


class CocoInstances:
    """The objects of a COCO-format file: polygons, run lengths in either form.

    Args:
        annotations: JSON file with images and annotations.
        images: folder that the file names are relative to.
        min_area: smaller objects, in pixels by the file's "area", are left out.
        max_masks: the largest objects of an image that are given; None for all.
        name: short name of the set; default: of the folder `images`.

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
        name: str | None = None,
    ) -> None:
        content = read_coco(annotations)
        self.folder = Path(images)
        self.name = name or self.folder.absolute().name
        self.left_out: Counter[str] = Counter()
        objects: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for annotation in _wanted(content["annotations"], min_area, self.left_out):
            objects[annotation["image_id"]].append(annotation)
        for found in objects.values():
            found.sort(key=lambda annotation: -annotation.get("area", 0))
            del found[len(found) if max_masks is None else max_masks :]
        self.objects = _with_objects(content, objects, Path(annotations), self.left_out)

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample; "category_ids" are the objects' categories, 0 without one.

        Raises:
            ImageReadError: the image cannot be read.
            LabelError: a mask is broken, empty or of another size than the image.
        """
        record, objects = self.objects[index]
        path = self.folder / record["file_name"]
        image = read_image(path)
        masks = np.stack([mask_of_annotation(a, image.shape[:2], path) for a in objects])
        sample = {"image": image, "masks": masks, "name": str(path), "dataset": self.name}
        return {**sample, "category_ids": _categories(objects)}


class PanopticPngs:
    """The segments of a COCO panoptic file with its folder of coloured PNGs.

    The layout of COCO panoptic, COCONut (arXiv:2404.08639) and EntitySeg (arXiv:2211.05776): a
    pixel of segment `id` has the colour id = R + 256 G + 256^2 B.

    Args:
        annotations: JSON file with images, annotations with "segments_info", and categories.
        images: folder that the images' file names are relative to.
        pngs: folder that the annotations' file names are relative to.
        things_only: leave out segments whose category is not "isthing".
        min_area: smaller segments, in pixels by the file's "area", are left out.
        name: short name of the set; default: of the folder `images`.

    Attributes:
        left_out: how many of what was left out: "stuff", "crowd" regions, "small" segments, and
            "images" that have no segment then.

    Raises:
        ValueError: no such file, no JSON, annotations that are not panoptic or of an image that the
            file does not list, or no category that is a thing where things are wanted.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str],
        pngs: str | os.PathLike[str],
        things_only: bool = True,
        min_area: float = 0,
        name: str | None = None,
    ) -> None:
        path = Path(annotations)
        content = read_coco(path)
        if any("segments_info" not in a for a in content["annotations"]):
            raise ValueError(
                f"{path} has annotations without segments_info, it is no panoptic file; read it "
                "with CocoInstances"
            )
        things = {c["id"] for c in content.get("categories", []) if c.get("isthing")}
        if things_only and not things:
            raise ValueError(
                f"{path}: no category has isthing = 1; add it or pass things_only=False"
            )
        self.folder = Path(images)
        self.name = name or self.folder.absolute().name
        self.left_out: Counter[str] = Counter()
        self.pngs: dict[Any, Path] = {}
        segments: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            found = annotation["segments_info"]
            if things_only:
                found = [s for s in found if s["category_id"] in things]
                self.left_out["stuff"] += len(annotation["segments_info"]) - len(found)
            segments[annotation["image_id"]] += _wanted(found, min_area, self.left_out)
            self.pngs[annotation["image_id"]] = Path(pngs) / annotation["file_name"]
        self.objects = _with_objects(content, segments, path, self.left_out)

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample; "category_ids" are the segments' categories.

        Raises:
            ImageReadError: the image cannot be read.
            LabelError: the PNG cannot be read, is of another size than the image, or lacks a
                segment.
        """
        record, segments = self.objects[index]
        path, png = self.folder / record["file_name"], self.pngs[record["id"]]
        image = read_image(path)
        try:
            colours = read_image(png)
        except ImageReadError as error:
            raise LabelError(f"{error} (segments of {path.name})") from error
        _check_size(png, colours, image, path.name)
        ids = colours @ np.array([1, 256, 256**2])  # (H, W)
        masks = np.stack([ids == segment["id"] for segment in segments])
        lost = [str(s["id"]) for s, mask in zip(segments, masks, strict=True) if not mask.any()]
        if lost:
            raise LabelError(
                f"{png}: no pixel has the colour of {len(lost)} of {len(segments)} segments, ids "
                f"{', '.join(lost[:5])}; take the PNGs that belong to the JSON file"
            )
        sample = {"image": image, "masks": masks, "name": str(path), "dataset": self.name}
        return {**sample, "category_ids": _categories(segments)}


def _stem(path: Path, root: Path) -> str:
    return path.relative_to(root).with_suffix("").as_posix()


def _wanted(
    objects: Iterable[dict[str, Any]], min_area: float, left_out: Counter[str]
) -> list[dict[str, Any]]:
    """Return the objects that are neither crowds nor small, and count the others."""
    kept = []
    for found in objects:
        if found.get("iscrowd", 0):
            left_out["crowd"] += 1
        elif found.get("area", min_area) < min_area:
            left_out["small"] += 1
        else:
            kept.append(found)
    return kept


def _with_objects(
    content: dict[str, Any],
    objects: dict[Any, list[dict[str, Any]]],
    path: Path,
    left_out: Counter[str],
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return the images of a COCO file that have an object, with them; count and log the others."""
    empty = [image["file_name"] for image in content["images"] if not objects.get(image["id"])]
    left_out["images"] = len(empty)
    warn_left_out(f"images without an object in {path}", empty)
    return [(i, objects[i["id"]]) for i in content["images"] if objects.get(i["id"])]


def _categories(objects: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([found.get("category_id", 0) for found in objects], np.int64)


def _check_size(path: Path, mask: np.ndarray, image: np.ndarray, name: str) -> None:
    """Check that what was read from `path` has height and width of the image `name`."""
    if mask.shape[:2] != image.shape[:2]:
        raise LabelError(
            f"{path}: wanted a mask of {image.shape[0]} x {image.shape[1]} pixels (height, "
            f"width) as {name} has, got {mask.shape[0]} x {mask.shape[1]}"
        )
