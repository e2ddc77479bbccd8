"""DigitScenes: the embedded data set, composed from what scikit-learn ships.

1,797 handwritten digits (8 x 8, 17 grey levels; UCI "Optical Recognition of Handwritten Digits",
test part) are pasted on crops of two photographs (china.jpg and flower.jpg, 427 x 640). Nothing is
downloaded and nothing is written to disk.
"""

from collections.abc import Callable
from functools import lru_cache
from math import cos, radians, sin
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from vision.data.epoch import SharedEpoch
from vision.data.instances import box_of_mask, interior_point

TASKS = ("classification", "segmentation", "promptable")
SPLITS = ("train", "val")
BACKGROUNDS = ("photo", "plain")
DIGITS = tuple("0123456789")

# The columns of the two photographs that each split may see: a crop never crosses the border.
PHOTO_COLUMNS = {"train": slice(0, 448), "val": slice(448, 640)}

MIN_SIZE = 8  # the digits are 8 x 8: a smaller scene could not show one
MAX_DIGITS = 255  # instance numbers of a scene are kept in uint8
_TRIES = 8  # places tried for a digit before the scene goes without it
_STRIP = 64  # rows blended at once: the float copies of a large scene stay in the cache


@lru_cache(maxsize=1)
def _all_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits as float32 (1797, 8, 8) in [0, 1], and their values, int64 (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


@lru_cache(maxsize=2)
def digits_of_split(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the digits of a split: every fifth of each class is for validation.

    The split depends on nothing but the digits' order, so train and validation stay apart whatever
    their seeds are.

    Args:
        split: "train" (1,437 digits) or "val" (360).

    Returns:
        Indices into scikit-learn's `load_digits`, int64 (N,), ascending; the digits, float32
        (N, 8, 8) in [0, 1]; their values 0..9, int64 (N,).

    Raises:
        ValueError: unknown split.
    """
    _check_choice("split", split, SPLITS)
    images, targets = _all_digits()
    by_class = np.argsort(targets, kind="stable")
    chosen = np.zeros(len(targets), bool)
    chosen[by_class[::5]] = True
    index = np.flatnonzero(chosen if split == "val" else ~chosen)
    return index, images[index], targets[index]


@lru_cache(maxsize=2)
def photos_of_split(split: str) -> tuple[np.ndarray, ...]:
    """Return the parts of the two photographs that belong to a split.

    Args:
        split: "train" (columns 0..447) or "val" (columns 448..639).

    Returns:
        Two uint8 RGB images, (427, 448, 3) or (427, 192, 3).

    Raises:
        ValueError: unknown split.
    """
    _check_choice("split", split, SPLITS)
    from sklearn.datasets import load_sample_images

    columns = PHOTO_COLUMNS[split]
    return tuple(np.ascontiguousarray(photo[:, columns]) for photo in load_sample_images().images)


class _Instance(NamedTuple):
    value: int  # 0..9
    window: tuple[slice, slice]  # rows and columns of the scene that hold all of the mask
    area: int  # pixels of the whole mask, before others covered it


class DigitScenes(Dataset):
    """Scenes of handwritten digits for classification, semantic and promptable segmentation.

    Sample `i` depends on (seed, split, i, epoch) and the options only, never on the worker or on
    the order of the calls. Its first digit is digit `i` of the split (modulo their number), so
    an epoch of the default length shows every digit of the split once as first digit.

    Every sample is a dict with "image", uint8 RGB (H, W, 3), and

    - classification: "label", int 0..9: the one digit in the image;
    - segmentation: "mask", uint8 (H, W): 0 is background, c + 1 is digit c;
    - promptable: N instances in the order of painting, later ones cover earlier ones. "masks", bool
      (N, H, W): the visible pixels, disjoint; "boxes", float32 (N, 4): x0, y0, x1, y1 around them,
      half-open; "points", float32 (N, 2): x, y, the indices of a visible pixel, random in the
      train split and the one farthest from the mask's edge in the val split; "labels", int64 (N,):
      1..10, as in the semantic mask. At least one instance, at most `num_digits[1]`: masks of 8
      instances take 134 MB at 4096 px.

    A mask is where the antialiased digit covers at least half of a pixel. Digits larger than 16 px
    get sharper edges than plain interpolation would give, about two pixels wide at any size.

    Args:
        task: "classification", "segmentation" or "promptable".
        split: "train" or "val"; they use different digits and different parts of the photographs.
        size: height and width in pixels, or one number for both; at least 8.
        length: number of samples; default: the number of digits, 1,437 train and 360 val.
        seed: of all random choices; not negative.
        background: "photo", or "plain" for one random colour.
        num_digits: fewest and most digits of a scene, (1, 1) in classification (the default),
            (2, 8) else. Fewer are painted where no place is left.
        scale: smallest and largest height of a digit as a share of the shorter side; default
            (0.6, 1) in classification, (0.15, 0.5) else. A digit is never smaller than 8 px.
        rotation: largest rotation to either side in degrees.
        contrast: smallest and largest difference of brightness between a digit and what it is
            painted on, as a share of the full range; at most 0.5, which always fits.
        min_visible: share of its pixels that an instance keeps at least under later ones.
        transform: applied to the finished sample; its result is returned.

    Raises:
        ValueError: an unknown task, split or background; a number out of range.
    """

    def __init__(
        self,
        task: str,
        split: str = "train",
        size: int | tuple[int, int] = 64,
        length: int | None = None,
        seed: int = 0,
        background: str = "photo",
        num_digits: tuple[int, int] | None = None,
        scale: tuple[float, float] | None = None,
        rotation: float = 20.0,
        contrast: tuple[float, float] = (0.25, 0.5),
        min_visible: float = 0.4,
        transform: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        _check_choice("task", task, TASKS)
        _check_choice("split", split, SPLITS)
        _check_choice("background", background, BACKGROUNDS)
        classify = task == "classification"
        num_digits = num_digits or ((1, 1) if classify else (2, 8))
        scale = scale or ((0.6, 1.0) if classify else (0.15, 0.5))
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < MIN_SIZE:
            raise ValueError(
                f"size wants a height and a width of at least {MIN_SIZE} px, got {size}; "
                f"the digits are {MIN_SIZE} x {MIN_SIZE}"
            )
        if length is not None and length < 1:
            raise ValueError(f"length wants at least 1 sample, got {length}; leave it out for all")
        if seed < 0:
            raise ValueError(f"seed wants 0 or more, got {seed}")
        _check_range("num_digits", num_digits, 1, MAX_DIGITS)
        _check_range("scale", scale, 0, 1)
        _check_range("contrast", contrast, 0, 0.5)
        _check_range("rotation", (0, rotation), 0, 180)
        _check_range("min_visible", (min_visible, 1), 0, 1)
        if classify and tuple(num_digits) != (1, 1):
            raise ValueError(
                f"classification shows one digit, got num_digits={num_digits}; "
                "leave it out, or choose the task 'segmentation' or 'promptable'"
            )
        self.task, self.split, self.seed, self.background = task, split, seed, background
        self.height, self.width = int(height), int(width)
        self.num_digits, self.scale, self.contrast = num_digits, scale, contrast
        self.rotation, self.min_visible, self.transform = rotation, min_visible, transform
        self.classes = DIGITS if classify else ("background", *DIGITS)
        self.length = len(digits_of_split(split)[0]) if length is None else int(length)
        self._epoch = SharedEpoch()

    def __repr__(self) -> str:
        return (
            f"DigitScenes({self.task!r}, split={self.split!r}, size=({self.height}, {self.width}), "
            f"length={self.length}, seed={self.seed})"
        )

    def __len__(self) -> int:
        return self.length

    @property
    def epoch(self) -> int:
        """The epoch that samples are made for; always 0 in the val split."""
        return int(self._epoch) if self.split == "train" else 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the scenes of an epoch; the val split has the same scenes in every epoch.

        Args:
            epoch: 0 or more.

        Raises:
            ValueError: a negative epoch.
        """
        self._epoch.set(epoch)

    def __getitem__(self, index: int) -> Any:
        if not -self.length <= index < self.length:
            raise IndexError(f"sample {index} of {self.length}")
        index %= self.length
        key = (SPLITS.index(self.split), self.epoch, index)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(self.seed, spawn_key=key)))
        image, instances, ids = self._compose(rng, index)
        sample = {"image": image, **_TARGETS[self.task](self, rng, instances, ids)}
        return sample if self.transform is None else self.transform(sample)

    def _compose(
        self, rng: np.random.Generator, index: int
    ) -> tuple[np.ndarray, list[_Instance], np.ndarray]:
        """Paint a scene: image, instances, and a map (H, W) of instance numbers from 1, else 0."""
        _, images, values = digits_of_split(self.split)
        canvas = self._background(rng)
        ids = np.zeros((self.height, self.width), np.uint8)
        instances: list[_Instance] = []
        low, high = self.num_digits
        for number in range(int(rng.integers(low, high + 1)) if high > low else high):
            which = int(rng.integers(len(images))) if number else index % len(images)
            for _ in range(_TRIES):
                chance = rng.random(8).tolist()
                alpha, window = self._warp(images[which], *chance[:4])
                mask = alpha >= 0.5
                area = int(np.count_nonzero(mask))
                if area and self._leaves_enough(ids, instances, mask, window):
                    self._paint(canvas[window], alpha, chance[4:])
                    instances.append(_Instance(int(values[which]), window, area))
                    ids[window][mask] = len(instances)
                    break
        return canvas, instances, ids

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        """Return a new uint8 RGB image (H, W, 3) of one colour or of a photograph's part."""
        shape = (self.height, self.width, 3)
        if self.background == "plain":
            return np.full(shape, rng.integers(0, 256, 3), np.uint8)
        import cv2

        photos = photos_of_split(self.split)
        pick, zoom, top, left, *tint = rng.random(7).tolist()
        photo = photos[int(pick * len(photos))]
        # Scene pixels that a pixel of the photograph covers: 0.5 to 4, more beyond 4096 px, so that
        # the crop stays near 1024 px and a large scene near one photograph in content.
        low = max(0.5, max(self.height, self.width) / 1024)
        zoom = low * (max(4.0, low) / low) ** zoom
        rows = _mirrored(top, round(self.height / zoom) + 1, photo.shape[0])
        cols = _mirrored(left, round(self.width / zoom) + 1, photo.shape[1])
        gain = 0.6 + 0.4 * np.array(tint, np.float32)
        table = (np.arange(256, dtype=np.float32)[:, None] * gain).astype(np.uint8)  # (256, 3)
        crop = cv2.LUT(photo[rows[:, None], cols], table[None])
        how = cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR
        return cv2.resize(crop, (self.width, self.height), interpolation=how)

    def _warp(
        self, digit: np.ndarray, size: float, angle: float, row: float, col: float
    ) -> tuple[np.ndarray, tuple[slice, slice]]:
        """Scale, rotate and place a digit; the four numbers are uniform in [0, 1).

        Returns:
            Coverage, float32 (h, w) in [0, 1], and the rows and columns of the scene it is for.
        """
        import cv2

        short = min(self.height, self.width)
        size = (self.scale[0] + (self.scale[1] - self.scale[0]) * size) * short
        size = min(max(size, MIN_SIZE), short)
        angle = radians((2 * angle - 1) * self.rotation)
        # Pixel centres have whole coordinates; the unrotated digit lies inside the scene.
        y = size / 2 - 0.5 + (self.height - size) * row
        x = size / 2 - 0.5 + (self.width - size) * col
        cosine, sine = cos(angle), sin(angle)
        reach = size * 0.625 * (abs(cosine) + abs(sine))  # a ninth pixel fades out around the digit
        y0, y1 = max(int(y - reach), 0), min(int(y + reach) + 2, self.height)
        x0, x1 = max(int(x - reach), 0), min(int(x + reach) + 2, self.width)
        step = 8 / size
        cosine, sine = cosine * step, sine * step
        x, y = x - x0, y - y0
        matrix = np.array(
            [
                [cosine, sine, 3.5 - cosine * x - sine * y],
                [-sine, cosine, 3.5 + sine * x - cosine * y],
            ]
        )
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        alpha = cv2.warpAffine(digit, matrix, (x1 - x0, y1 - y0), flags=flags)
        gain = max(1.0, size / 16)
        alpha -= 0.5
        alpha *= gain
        alpha += 0.5
        np.clip(alpha, 0, 1, out=alpha)
        return alpha, (slice(y0, y1), slice(x0, x1))

    def _leaves_enough(
        self,
        ids: np.ndarray,
        instances: list[_Instance],
        mask: np.ndarray,
        window: tuple[slice, slice],
    ) -> bool:
        """Say whether every instance stays visible when `mask` is painted over it."""
        if not instances:
            return True
        covered = np.bincount(ids[window][mask], minlength=len(instances) + 1)
        for number in np.flatnonzero(covered[1:]) + 1:
            instance = instances[number - 1]
            visible = np.count_nonzero(ids[instance.window] == number) - covered[number]
            if visible < max(1, self.min_visible * instance.area):
                return False
        return True

    def _paint(self, canvas: np.ndarray, alpha: np.ndarray, chance: list[float]) -> None:
        """Blend a digit of a contrasting colour into `canvas`, a view (h, w, 3) of the scene."""
        stride = 1 + min(canvas.shape[:2]) // 64
        mean = float(canvas[::stride, ::stride].mean())
        low, high = self.contrast
        contrast = 255 * (low + (high - low) * chance[0])
        above, below = mean + contrast, mean - contrast
        bright = above if above <= 255 and (chance[1] < 0.5 or below < 0) else below
        # Two free hues and the third that keeps the brightness.
        red, green = (80 * (c - 0.5) for c in chance[2:])
        colour = np.clip(np.array([red, green, -red - green], np.float32) + bright, 0, 255)
        for top in range(0, len(canvas), _STRIP):
            strip, cover = canvas[top : top + _STRIP], alpha[top : top + _STRIP, :, None]
            strip[...] = strip + cover * (colour - strip) + 0.5

    def _label(
        self, rng: np.random.Generator, instances: list[_Instance], ids: np.ndarray
    ) -> dict[str, Any]:
        return {"label": instances[0].value}

    def _semantic(
        self, rng: np.random.Generator, instances: list[_Instance], ids: np.ndarray
    ) -> dict[str, Any]:
        return {"mask": np.array([0, *(i.value + 1 for i in instances)], np.uint8)[ids]}

    def _prompts(
        self, rng: np.random.Generator, instances: list[_Instance], ids: np.ndarray
    ) -> dict[str, Any]:
        masks = np.zeros((len(instances), self.height, self.width), bool)
        boxes = np.zeros((len(instances), 4), np.float32)
        points = np.zeros((len(instances), 2), np.float32)
        for k, instance in enumerate(instances):
            rows, cols = instance.window
            mask = ids[instance.window] == k + 1
            masks[k][instance.window] = mask
            if self.split == "train":
                pixels = np.flatnonzero(mask)
                y, x = divmod(int(pixels[rng.integers(len(pixels))]), mask.shape[1])
                point = np.array([x, y], np.float32)
            else:
                point = interior_point(mask)
            corner = np.array([cols.start, rows.start], np.float32)
            points[k] = point + corner
            boxes[k] = box_of_mask(mask) + np.tile(corner, 2)
        labels = np.array([i.value + 1 for i in instances], np.int64)
        return {"masks": masks, "boxes": boxes, "points": points, "labels": labels}


_TARGETS: dict[str, Callable[..., dict[str, Any]]] = {
    "classification": DigitScenes._label,
    "segmentation": DigitScenes._semantic,
    "promptable": DigitScenes._prompts,
}


def _mirrored(start: float, count: int, period: int) -> np.ndarray:
    """Return `count` neighbouring indices below `period`, turning back at both ends."""
    index = (int(start * 2 * period) + np.arange(count)) % (2 * period)
    return np.minimum(index, 2 * period - 1 - index)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"no {name} {value!r}; there are {', '.join(choices)}")


def _check_range(name: str, pair: tuple[float, float], low: float, high: float) -> None:
    first, last = pair
    if not low <= first <= last <= high:
        raise ValueError(f"{name} wants {low} <= first <= last <= {high}, got {first}, {last}")
