"""SA-1B, the data set of Segment Anything, in samples as `vision.data.promptable` gives them."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .epoch import SharedEpoch
from .image_io import LabelError, list_images, read_image
from .promptable import mask_of_annotation, warn_left_out


class Sa1b:
    """SA-1B (arXiv:2304.02643): images with a JSON file of run lengths beside each.

    Args:
        folder: with NAME.jpg and NAME.json; subfolders count.
        max_masks: the most masks of an image; None for all. RWKV-SAM's recipe takes 30.
        min_area: masks that cover a smaller share of the image are left out, 0 .. 1. RWKV-SAM's
            recipe says "relative area 1/64", which is taken at its word: 1/64 of the pixels, a
            square of an eighth of the sides.
        largest: of too many masks take the largest, not random ones (others in every epoch).
        seed: of the random choice.
        name: short name of the set; default: of the folder.

    Attributes:
        left_out: how many "images" have no JSON file and how many "annotations" no image.

    Raises:
        ValueError: no image with a JSON file, or a number out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_masks: int | None = None,
        min_area: float = 0.0,
        largest: bool = False,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        if not 0 <= min_area < 1 or (max_masks is not None and max_masks < 1):
            raise ValueError(
                f"wanted min_area in 0 .. 1 and max_masks of 1 or more, got {min_area} and "
                f"{max_masks}"
            )
        root = Path(folder)
        images = list_images(root)
        files = set(root.rglob("*.json"))
        lone = [str(path) for path in images if path.with_suffix(".json") not in files]
        self.images = [path for path in images if path.with_suffix(".json") in files]
        strays = sorted(map(str, files - {path.with_suffix(".json") for path in self.images}))
        if not self.images:
            raise ValueError(f"{root}: none of {len(images)} images has a JSON file beside it")
        self.left_out = Counter(images=len(lone), annotations=len(strays))
        warn_left_out(f"images without a JSON file in {root}", lone)
        warn_left_out(f"JSON files without an image in {root}", strays)
        self.max_masks, self.min_area, self.largest = max_masks, min_area, largest
        self.seed = seed
        self.name = name or root.absolute().name
        self._epoch = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of another epoch."""
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Raises:
            ImageReadError: the image cannot be read.
            LabelError: the JSON file cannot be read or is not SA-1B's, a mask is broken, empty or
                of another size than the image, or all are too small.
        """
        path = self.images[index]
        source = path.with_suffix(".json")
        image = read_image(path)
        smallest = self.min_area * image.shape[0] * image.shape[1]
        try:
            listed = json.loads(source.read_bytes())["annotations"]
            objects = [a for a in listed if a["area"] >= smallest]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LabelError(
                f"{source}: wanted JSON with a list of annotations, each with an area, got "
                f"{type(error).__name__} ({error})"
            ) from error
        if not objects:
            raise LabelError(
                f"{source}: none of {len(listed)} masks covers {self.min_area:.3g} of the image"
            )
        objects = self._some(objects, index)
        masks = np.stack([mask_of_annotation(a, image.shape[:2], source) for a in objects])
        return {"image": image, "masks": masks, "name": str(path), "dataset": self.name}

    def _some(self, objects: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
        if self.max_masks is None or len(objects) <= self.max_masks:
            return objects
        if self.largest:
            return sorted(objects, key=lambda a: -a["area"])[: self.max_masks]
        rng = np.random.default_rng((self.seed, int(self._epoch), index))
        return [objects[i] for i in rng.choice(len(objects), self.max_masks, replace=False)]
