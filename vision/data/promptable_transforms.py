"""Joint transforms of an image and its object masks to a square, for promptable training.

Masks are resized like the image, by area (down) or linearly (up), and cut at one half: nearest
neighbour would move them by up to half a source pixel against the image and break thin parts.
"""

import os
import random
from typing import Any

import numpy as np

from .image_io import LabelError
from .promptable import take_objects

_MEAN_COLOUR = (124, 116, 104)  # about 0 once normalised, as a predictor pads


class ResizeAndPad:
    """Resize an image so that its longer side is `size`, and pad it to a square at bottom or right.

    Args:
        size: side of the square in pixels.
        min_area: masks with fewer pixels then are dropped.
        fill: colour of the padding.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self, size: int, min_area: int = 32, fill: tuple[int, int, int] = _MEAN_COLOUR
    ) -> None:
        if size < 1 or min_area < 1:
            raise ValueError(f"wanted size and min_area of 1 or more, got {size} and {min_area}")
        self.size, self.min_area, self.fill = size, min_area, fill
        self._whole = self._pipeline((size, size), flip=0.0, colour=0.0)

    def __call__(
        self, sample: dict[str, Any], rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        """Return the transformed sample.

        Args:
            sample: "image" uint8 (H, W, 3), "masks" bool (N, H, W), "name", and what else
                `vision.data.promptable` gives.
            rng: not used.

        Returns:
            A new dict with an image (size, size, 3) and the masks that are left; "dropped" are the
            indices of those that are not, int64 (K,).

        Raises:
            ValueError: masks of another shape or dtype.
            LabelError: no mask is left; names the file.
        """
        found = self._run(self._whole, sample, 0)
        if not len(found["masks"]):
            raise LabelError(
                f"{sample.get('name', 'a sample')}: none of {len(sample['masks'])} masks has "
                f"{self.min_area} pixels in an image resized to {self.size}; remove it or lower "
                "min_area"
            )
        return found

    def _pipeline(self, sides: tuple[int, int], flip: float, colour: float) -> Any:
        """Resize to a longer side drawn from a range, both included; flip, recolour, crop, pad."""
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations
        import cv2

        resize = albumentations.LongestMaxSize(
            list(range(sides[0], sides[1] + 1)),
            mask_interpolation=cv2.INTER_LINEAR,
            area_for_downscale="image_mask",
        )
        crop = albumentations.RandomCrop(
            self.size,
            self.size,
            pad_if_needed=True,
            pad_position="top_left",  # of the image, so that the padding is bottom and right
            fill=self.fill,
        )
        strengths = (colour, colour, colour, colour / 4)  # brightness, contrast, saturation, hue
        return albumentations.Compose(
            [
                resize,
                albumentations.HorizontalFlip(p=flip),
                albumentations.ColorJitter(*strengths, p=float(colour > 0)),
                crop,
            ]
        )

    def _run(self, pipeline: Any, sample: dict[str, Any], seed: int) -> dict[str, Any]:
        """Transform, and drop the masks that became too small."""
        image, masks = sample["image"], sample["masks"]
        if masks.dtype != np.bool_ or masks.ndim != 3 or masks.shape[1:] != image.shape[:2]:
            raise ValueError(
                f"wanted bool masks (N, {image.shape[0]}, {image.shape[1]}), got {masks.dtype} "
                f"{masks.shape}"
            )
        if not len(masks):
            raise LabelError(f"{sample.get('name', 'a sample')}: there is no mask")
        # One generator for all steps: albumentations' own seeding gives each the same numbers.
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        done = pipeline(image=image, masks=masks.view(np.uint8) * np.uint8(255))
        moved = done["masks"] > 127
        large = moved.sum((1, 2)) >= self.min_area
        found = {**sample, "image": done["image"], "masks": moved}
        return {**take_objects(found, large), "dropped": np.flatnonzero(~large)}


class LargeScaleJitter(ResizeAndPad):
    """Resize by a random ratio, flip, crop to a square at random, pad at bottom or right.

    Args:
        size: side of the square in pixels.
        ratio: smallest and largest longer side of the resized image over `size`; every side between
            is equally likely (large-scale jitter, arXiv:2012.07177: 0.1 to 2).
        flip: probability of a horizontal flip.
        colour: strength of changes of brightness, contrast and saturation (relative) and, a quarter
            of it, hue; 0 for none.
        min_area: masks with fewer pixels then are dropped.
        tries: how often a sample that is left without a mask is drawn again; then the image is only
            resized and padded.
        fill: colour of the padding.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        size: int,
        ratio: tuple[float, float] = (0.1, 2.0),
        flip: float = 0.5,
        colour: float = 0.0,
        min_area: int = 32,
        tries: int = 10,
        fill: tuple[int, int, int] = _MEAN_COLOUR,
    ) -> None:
        super().__init__(size, min_area, fill)
        low, high = ratio
        if not 0 < low <= high or not 0 <= flip <= 1 or not 0 <= colour <= 1 or tries < 1:
            raise ValueError(
                "wanted 0 < ratio[0] <= ratio[1], flip and colour in 0 .. 1 and tries >= 1, got "
                f"{ratio}, {flip}, {colour} and {tries}"
            )
        self.tries = tries
        sides = (max(1, round(low * size)), max(1, round(high * size)))
        self._jitter = self._pipeline(sides, flip, colour)

    def __call__(
        self, sample: dict[str, Any], rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        """Return the transformed sample; see `ResizeAndPad`.

        Args:
            sample: as there.
            rng: of the random choices; a seeded one gives the same sample again, None another.
        """
        rng = np.random.default_rng() if rng is None else rng
        for _ in range(self.tries):
            found = self._run(self._jitter, sample, int(rng.integers(2**62)))
            if len(found["masks"]):
                return found
        return super().__call__(sample)
