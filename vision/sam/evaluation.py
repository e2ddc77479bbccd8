"""Prompts made from true masks, and what a model answers, at the size of the original image.

The tight box, and clicks as in interactive segmentation (number of clicks, NoC: arXiv:2102.06583):
the first inside of the object, each further one inside of the largest error, always at the same
place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision.data.instances import box_of_mask, boxes_of_masks, interior_point
from vision.metrics import mask_iou
from vision.metrics.prompt_baselines import fill_boxes

from .model import RwkvSam
from .predictor import Predictor
from .transforms import resize_longest_side

_Key = TypeVar("_Key", str, float)


def resize_to_square(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image to a square whatever its shape, bilinear with antialiasing (Pillow's).

    Args:
        image: uint8 (H, W, 3).

    Returns:
        uint8 (side, side, 3), a new array.
    """
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


# How an image comes to the model; the published numbers of ovsam and of sam-hq differ in it.
RESIZES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "keep_ratio": resize_longest_side,
    "squash": resize_to_square,
}


def click_name(count: int) -> str:
    """What the answer after so many clicks is called: "click", "click2", "click3", ..."""
    return "click" if count == 1 else f"click{count}"


def correcting_click(pred: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the click that corrects a prediction, in the middle of what is most wrong.

    Of what was missed and of what was wrongly found, the region counts whose innermost pixel lies
    deeper; the missed one in a tie. With nothing predicted it is the first click on the object.

    Args:
        pred: bool (H, W).
        true: bool (H, W).

    Returns:
        x, y, float32 (2,), the indices of a wrong pixel; and its label, 1 missed or 0 wrongly
        found.

    Raises:
        ValueError: nothing is wrong.
    """
    regions = {1: true & ~pred, 0: pred & ~true}
    clicks = [(interior_point(r), label) for label, r in regions.items() if r.any()]
    if not clicks:
        raise ValueError("the prediction has no wrong pixel to click on; leave the object out")
    return max(clicks, key=lambda click: _squared_depth(regions[click[1]], click[0]))


def _squared_depth(region: np.ndarray, point: np.ndarray) -> int:
    """Squared distance in pixels of a point of a region to what lies nearest beside it."""
    x0, y0, x1, y1 = box_of_mask(region).astype(int)
    rows, columns = np.nonzero(~np.pad(region[y0:y1, x0:x1], 1))
    x, y = point.astype(int)
    return int(((columns - 1 + x0 - x) ** 2 + (rows - 1 + y0 - y) ** 2).min())


@dataclass(frozen=True)
class PromptAnswers:
    """What a model answered for the N objects of one image.

    Attributes:
        resize: how the image was resized, a key of `RESIZES`.
        masks: by kind of prompt, "box" or `click_name`, bool (N, H, W) on the CPU.
        expected_iou: by kind of prompt, the IoU that the model expects, float32 (N,).
        clicks_needed: by target IoU, how many clicks reached it, int64 (N,); the most clicks that
            were tried where it was not reached.
    """

    resize: str
    masks: dict[str, Tensor]
    expected_iou: dict[str, Tensor]
    clicks_needed: dict[float, Tensor]


class PromptEvaluator:
    """Asks a model for objects whose masks are known.

    The image is encoded once. Boxes and further clicks ask for one mask; the first click for three,
    of which the one that the model expects most of is taken (a single-mask model has only one).
    Each further click goes along with those before it and with the last mask's logits.

    Args:
        model: put into eval mode when called.
        resize: "keep_ratio" (longest side to `model.image_size`, as ovsam evaluates) or "squash"
            (to a square, as sam-hq does); their numbers are not comparable.
        box: answer the tight box of each object, outermost pixels inclusive.
        clicks: numbers of clicks after which the masks are kept.
        targets: IoU values of which the number of clicks needed is counted.
        max_clicks: the most clicks on an object; None for the largest of `clicks`.
        batch_size: the most objects whose masks exist at a time at the original size.
        clip_to_box: leave out of an answer to a box what lies outside of it. A filled box and
            GrabCut have nothing there either; published numbers of SAM's kind are without.

    Raises:
        ValueError: an argument is out of range, or nothing is asked.
    """

    def __init__(
        self,
        model: RwkvSam,
        resize: str = "keep_ratio",
        box: bool = True,
        clicks: Sequence[int] = (1, 3, 5),
        targets: Sequence[float] = (0.85, 0.9),
        max_clicks: int | None = None,
        batch_size: int = 16,
        clip_to_box: bool = False,
    ) -> None:
        if resize not in RESIZES:
            raise ValueError(f"no resize {resize!r}; there are {', '.join(RESIZES)}")
        most = max(clicks, default=0) if max_clicks is None else max_clicks
        if min(clicks, default=1) < 1 or most < max(clicks, default=0):
            raise ValueError(
                f"clicks want numbers from 1 to max_clicks, got {tuple(clicks)} and {max_clicks}"
            )
        if not all(0 < target <= 1 for target in targets):
            raise ValueError(f"targets want an IoU in 0..1, above 0, got {tuple(targets)}")
        if batch_size < 1:
            raise ValueError(f"batch_size wants 1 or more, got {batch_size}")
        if not box and not most:
            raise ValueError("wanted box=True or some clicks, got neither; there is nothing to ask")
        self.model = model
        self.resize = resize
        self.box = box
        self.clicks = tuple(clicks)
        self.targets = tuple(targets) if most else ()
        self.max_clicks = most
        self.batch_size = batch_size
        self.clip_to_box = clip_to_box

    def __call__(self, image: np.ndarray, masks: np.ndarray) -> PromptAnswers:
        """Ask for all objects of an image.

        Args:
            image: uint8 RGB (H, W, 3).
            masks: bool (N, H, W), N at least 1, none empty.

        Raises:
            ValueError: another shape or dtype, no object, or an empty mask.
        """
        _check(image, masks)
        predictor = Predictor(self.model)
        pixels = torch.from_numpy(RESIZES[self.resize](image, self.model.image_size))
        predictor.set_torch_image(pixels.permute(2, 0, 1)[None], image.shape[:2])
        parts = [
            self._ask(predictor, masks[i : i + self.batch_size])
            for i in range(0, len(masks), self.batch_size)
        ]
        found, expected, needed = zip(*parts, strict=True)
        return PromptAnswers(self.resize, _joined(found), _joined(expected), _joined(needed))

    def _ask(
        self, predictor: Predictor, true: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[float, np.ndarray]]:
        """Masks, expected IoU, and clicks needed for some objects."""
        masks: dict[str, np.ndarray] = {}
        expected: dict[str, np.ndarray] = {}
        if self.box:
            boxes = boxes_of_masks(torch.from_numpy(true))
            found, iou, _ = predictor.predict(box=boxes, multimask_output=False)
            masks["box"], expected["box"] = found[:, 0], iou[:, 0]
            if self.clip_to_box:
                masks["box"] &= fill_boxes(boxes, (true.shape[1], true.shape[2])).numpy()
        clicking = _Clicking(predictor, true, self.max_clicks)
        reached: list[np.ndarray] = []  # IoU after each click
        for count in range(1, self.max_clicks + 1):
            best = np.max([np.zeros(len(true)), *reached], axis=0)
            wanted = count <= max(self.clicks, default=0)
            clicking.click(wanted | (best < max(self.targets, default=0)))
            reached.append(_iou(clicking.masks, true))
            if count in self.clicks:
                name = click_name(count)
                masks[name], expected[name] = clicking.masks.copy(), clicking.expected.copy()
        return masks, expected, {t: _first(np.stack(reached) >= t) for t in self.targets}


class _Clicking:
    """Clicks on objects of one image, the answers, and what the next clicks build on.

    Attributes:
        masks: the last answers, bool (N, H, W).
        expected: IoU that the model expects of them, float32 (N,).
    """

    def __init__(self, predictor: Predictor, true: np.ndarray, most: int) -> None:
        self.masks = np.zeros_like(true)
        self.expected = np.zeros(len(true), np.float32)
        self._predictor = predictor
        self._true = true
        self._coords = np.zeros((len(true), most, 2), np.float32)
        self._labels = np.zeros((len(true), most), np.int64)
        self._logits: np.ndarray | None = None  # (N, 1, 4h, 4w)
        self._count = 0

    def click(self, wanted: np.ndarray) -> None:
        """Correct the wanted objects, bool (N,); a mask without an error stays as it is."""
        first = self._logits is None
        chosen = np.flatnonzero(wanted & (self.masks != self._true).any((1, 2)))
        if not len(chosen):
            return
        for i in chosen:
            click = correcting_click(self.masks[i], self._true[i])
            self._coords[i, self._count], self._labels[i, self._count] = click
        self._count += 1
        masks, iou, logits = self._predictor.predict(
            self._coords[chosen, : self._count],
            self._labels[chosen, : self._count],
            mask_input=None if self._logits is None else self._logits[chosen],
            multimask_output=first and not self._predictor.model.mask_decoder.single_mask,
        )
        best = iou.argmax(1)
        rows = np.arange(len(chosen))
        self.masks[chosen], self.expected[chosen] = masks[rows, best], iou[rows, best]
        if self._logits is None:
            self._logits = logits[rows, best][:, None]  # every object gets the first click
        else:
            self._logits[chosen] = logits[rows, best][:, None]


def _iou(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    return mask_iou(torch.from_numpy(pred), torch.from_numpy(true)).numpy()


def _joined(parts: Sequence[dict[_Key, np.ndarray]]) -> dict[_Key, Tensor]:
    return {key: torch.from_numpy(np.concatenate([p[key] for p in parts])) for key in parts[0]}


def _first(reached: np.ndarray) -> np.ndarray:
    """Count the clicks, bool (clicks, N), up to the first True; all of them if there is none."""
    return np.where(reached.any(0), reached.argmax(0) + 1, len(reached))


def _check(image: np.ndarray, masks: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"wanted an image uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if masks.dtype != bool or masks.shape[1:] != image.shape[:2] or not len(masks):
        raise ValueError(
            f"wanted true masks bool (N, {image.shape[0]}, {image.shape[1]}), N at least 1, of the "
            f"image's size, got {masks.dtype} {masks.shape}; threshold them, do not resize them"
        )
    empty = np.flatnonzero(~masks.any((1, 2)))
    if len(empty):
        raise ValueError(
            f"mask {empty[0]} of {len(masks)} is empty, and has no prompt; drop the object first"
        )
