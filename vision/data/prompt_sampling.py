"""Prompts drawn from true masks, as a user might have given them, to train promptable models.

Labels of points are those of `vision.sam.PromptEncoder`: 1 on the object, 0 off it, 2 and 3 the
corners of a box, -1 padding; so prompts of several kinds share a batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vision.metrics import boundary_dilation, mask_boundary

from .instances import boxes_of_masks

POSITIVE, NEGATIVE, TOP_LEFT, BOTTOM_RIGHT, PADDING = 1, 0, 2, 3, -1
SURE_LOGIT = 6.0  # of a sure pixel in a mask prompt, as a trained decoder gives them
_MOST_JITTER = 20.0  # pixels; Segment Anything, arXiv:2304.02643, appendix A


@dataclass(frozen=True)
class SampledPrompts:
    """Prompts of N instances.

    Attributes:
        coords: x, y in pixels of the masks, the indices of a pixel, float32 (N, P, 2).
        labels: int64 (N, P).
        masks: logits (N, 1, h, w); zeros where no mask is given.
        with_mask: which instances have a mask, bool (N,).
        kinds: what was drawn for each.
    """

    coords: Tensor
    labels: Tensor
    masks: Tensor
    with_mask: Tensor
    kinds: tuple[str, ...]

    def add(self, coords: Tensor, labels: Tensor) -> "SampledPrompts":
        """Append a point to each prompt: x, y (N, 2) and label (N,)."""
        return SampledPrompts(
            torch.cat([self.coords, coords[:, None].to(self.coords)], dim=1),
            torch.cat([self.labels, labels[:, None].to(self.labels)], dim=1),
            self.masks,
            self.with_mask,
            self.kinds,
        )


def tight_box(mask: Tensor) -> Tensor:
    """The outermost pixels of a mask, both inclusive, as the evaluations of SAM take them.

    Args:
        mask: bool, (H, W), with at least one True pixel.

    Returns:
        x0, y0, x1, y1, float32 (4,).

    Raises:
        ValueError: no pixel is True.
    """
    if not mask.any():
        raise ValueError("an empty mask has no prompt; drop the instance first")
    return boxes_of_masks(mask[None])[0].float()


def jittered_box(
    mask: Tensor, generator: torch.Generator | None = None, noise: float = 0.1
) -> Tensor:
    """The tight box with noise on each side, within the image.

    Args:
        mask: bool, (H, W), with at least one True pixel.
        generator: of the random numbers.
        noise: standard deviation over the box's width or height; 20 pixels at most come of it.

    Returns:
        x0, y0, x1, y1 with x0 <= x1 and y0 <= y1, float32 (4,).
    """
    box = tight_box(mask)
    side = (box[2:] - box[:2] + 1).repeat(2)
    moved = torch.randn(4, generator=generator) * noise * side
    box = box + moved.clamp(-_MOST_JITTER, _MOST_JITTER)
    most = torch.tensor([mask.shape[1] - 1, mask.shape[0] - 1]).repeat(2)
    box = torch.minimum(box.clamp(min=0), most.float())
    corners = box.view(2, 2)
    return torch.cat([corners.amin(0), corners.amax(0)])


def random_points(region: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Pixels of a region, each drawn from all of it.

    Args:
        region: bool, (H, W).
        count: number of points; a small region gives some of its pixels twice.
        generator: of the random numbers.

    Returns:
        x, y, float32 (count, 2), or (0, 2) if the region is empty.
    """
    pixels = region.nonzero()
    if not len(pixels):
        return torch.zeros(0, 2)
    drawn = torch.randint(len(pixels), (count,), generator=generator)
    return pixels[drawn].flip(1).float()


def noisy_mask(
    mask: Tensor, size: tuple[int, int], generator: torch.Generator | None = None
) -> Tensor:
    """Low-resolution logits of a mask with noise about its boundary (as in arXiv:2306.01567).

    Args:
        mask: bool, (H, W).
        size: height and width of the logits.
        generator: of the random numbers.

    Returns:
        float32 (1, *size).
    """
    share = F.interpolate(mask[None, None].float(), size, mode="area")
    # Continued past the image, whose border is no boundary here.
    d = boundary_dilation(*size)
    beyond = F.pad(share, (d, d, d, d), mode="replicate")[0] > 0.5
    near = mask_boundary(beyond, d) | mask_boundary(~beyond, d)
    small, uncertain = (x[:, d:-d, d:-d] for x in (beyond, near))
    logits = small.float() * 2 * SURE_LOGIT - SURE_LOGIT
    noise = torch.randn(logits.shape, generator=generator) * SURE_LOGIT
    return torch.where(uncertain, noise, logits)


def next_click(
    pred: Tensor, target: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw the click that corrects a prediction: any pixel that is wrong (arXiv:2304.02643).

    Args:
        pred: bool, (N, H, W).
        target: bool, (N, H, W).
        generator: of the random numbers.

    Returns:
        x, y float32 (N, 2) and labels int64 (N,): 1 where the object was missed, 0 where there is
        none, -1 where nothing is wrong.
    """
    coords, labels = torch.zeros(len(pred), 2), torch.full((len(pred),), PADDING)
    for i, wrong in enumerate(pred ^ target):
        place = random_points(wrong, 1, generator)
        if len(place):
            coords[i] = place[0]
            x, y = place[0].long().tolist()
            labels[i] = POSITIVE if target[i, y, x] else NEGATIVE
    return coords, labels


class PromptSampler:
    """Draws one prompt for each instance, of a kind drawn by chance.

    Args:
        weights: of the kinds: "box", "jittered_box", "points" (1 to `max_points` on the object),
            "corrected_points" (as many, and 1 to `max_points` beside it) and "noisy_mask" (with a
            point).
        max_points: the most points of either label.
        noise: of jittered boxes, see `jittered_box`.

    Raises:
        ValueError: an unknown kind, a negative weight, or no weight at all.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        max_points: int = 10,
        noise: float = 0.1,
    ) -> None:
        kinds = self._kinds()
        chosen = dict.fromkeys(kinds, 1.0) if weights is None else dict(weights)
        unknown = set(chosen) - set(kinds)
        if unknown or min(chosen.values(), default=0) < 0 or sum(chosen.values()) == 0:
            raise ValueError(
                f"weights want numbers >= 0, not all 0, for kinds out of {', '.join(kinds)}; got "
                f"{chosen}"
            )
        if max_points < 1:
            raise ValueError(f"max_points wants 1 or more, got {max_points}")
        self.names = tuple(chosen)
        self.weights = torch.tensor(list(chosen.values()), dtype=torch.float32)
        self.max_points = max_points
        self.noise = noise

    def _kinds(
        self,
    ) -> dict[str, Callable[[Tensor, torch.Generator | None], tuple[Tensor, list[int]]]]:
        return {
            "box": lambda mask, _: _corners(tight_box(mask)),
            "jittered_box": lambda mask, g: _corners(jittered_box(mask, g, self.noise)),
            "points": self._points,
            "corrected_points": self._corrected_points,
            "noisy_mask": lambda mask, g: (random_points(mask, 1, g), [POSITIVE]),
        }

    def _count(self, generator: torch.Generator | None) -> int:
        return int(torch.randint(1, self.max_points + 1, (), generator=generator))

    def _points(self, mask: Tensor, generator: torch.Generator | None) -> tuple[Tensor, list[int]]:
        points = random_points(mask, self._count(generator), generator)
        return points, [POSITIVE] * len(points)

    def _corrected_points(
        self, mask: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, list[int]]:
        inside, labels = self._points(mask, generator)
        x0, y0, x1, y1 = (int(side) for side in tight_box(mask))
        # Beside the object: within its box, half as large again on each side.
        beyond_x, beyond_y = (x1 - x0) // 2 + 1, (y1 - y0) // 2 + 1
        near = torch.zeros_like(mask)
        near[
            max(y0 - beyond_y, 0) : y1 + beyond_y + 1, max(x0 - beyond_x, 0) : x1 + beyond_x + 1
        ] = True
        outside = random_points(near & ~mask, self._count(generator), generator)
        return torch.cat([inside, outside]), labels + [NEGATIVE] * len(outside)

    def __call__(
        self,
        masks: Tensor,
        mask_size: tuple[int, int],
        generator: torch.Generator | None = None,
    ) -> SampledPrompts:
        """Draw.

        Args:
            masks: of the instances, bool (N, H, W), none of them empty.
            mask_size: height and width of mask prompts, four times those of the image embedding.
            generator: of the random numbers; a seeded one gives the same prompts again.

        Returns:
            The prompts, the shorter ones padded with points of label -1 (those without a box by
            one at least, as a decoder gets them from `vision.sam.PromptEncoder`).

        Raises:
            ValueError: an empty mask, another dtype or shape.
        """
        if masks.dtype != torch.bool or masks.ndim != 3:
            raise ValueError(f"wanted bool masks (N, H, W), got {masks.dtype} {tuple(masks.shape)}")
        kinds = self._kinds()
        drawn = torch.multinomial(self.weights, max(len(masks), 1), True, generator=generator)
        names = tuple(self.names[k] for k in drawn.tolist()[: len(masks)])
        prompts = [kinds[k](mask, generator) for k, mask in zip(names, masks, strict=True)]
        longest = max((len(found) + (TOP_LEFT not in found) for _, found in prompts), default=0)
        coords = torch.zeros(len(masks), longest, 2)
        labels = torch.full((len(masks), longest), PADDING)
        logits = torch.zeros(len(masks), 1, *mask_size)
        for i, (places, found) in enumerate(prompts):
            coords[i, : len(found)] = places
            labels[i, : len(found)] = torch.tensor(found)
            if names[i] == "noisy_mask":
                logits[i] = noisy_mask(masks[i], mask_size, generator)
        with_mask = torch.tensor([name == "noisy_mask" for name in names], dtype=torch.bool)
        return SampledPrompts(coords, labels, logits, with_mask, names)


def _corners(box: Tensor) -> tuple[Tensor, list[int]]:
    return box.view(2, 2), [TOP_LEFT, BOTTOM_RIGHT]
