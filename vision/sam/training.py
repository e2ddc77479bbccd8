"""What a promptable model learns from: losses of sampled prompts and of corrected ones.

The rounds are those of Segment Anything (arXiv:2304.02643, appendix A): a first prompt, then clicks
where the prediction is wrong, with the last prediction as a mask prompt.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vision.data.prompt_sampling import PromptSampler, SampledPrompts, next_click
from vision.losses import (
    dice_loss,
    iou_regression_loss,
    point_sample,
    sample_uncertain_points,
    sigmoid_cross_entropy,
)

from .model import STRIDE, ImageEmbedding, RwkvSam

# Pixels of enlarged logits that are looked at together, about 130 MiB.
_PIXELS_AT_ONCE = 2**25


class PromptableLoss:
    """Losses of the objects of a batch of images.

    Args:
        sampler: draws the first prompts.
        corrections: rounds of clicks after them.
        num_points: points a mask at which the losses are taken.
        ce_weight: of the cross entropy.
        dice_weight: of the dice loss.
        iou_weight: of the squared error of the predicted IoU.
        others_weight: of the mean over the three masks beside the best of them, so that a head
            that is never the best learns all the same (arXiv:1612.00197); 0 as Segment Anything.
    """

    def __init__(
        self,
        sampler: PromptSampler,
        corrections: int = 1,
        num_points: int = 12_544,
        ce_weight: float = 5.0,
        dice_weight: float = 5.0,
        iou_weight: float = 1.0,
        others_weight: float = 0.05,
    ) -> None:
        if corrections < 0 or num_points < 1:
            raise ValueError(
                f"wanted corrections >= 0 and num_points >= 1, got {corrections} and {num_points}"
            )
        self.sampler = sampler
        self.corrections = corrections
        self.num_points = num_points
        self.others_weight = others_weight
        self.weights = {"ce": ce_weight, "dice": dice_weight, "iou": iou_weight}

    def __call__(
        self, model: RwkvSam, images: ImageEmbedding, masks: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Sample prompts, decode those of all images together, and compare.

        Args:
            model: its decoder is trained, and what `images` was computed by.
            images: embedding of B images.
            masks: of the objects of each, B times bool (N, H, W), the size of the encoded images,
                none empty.

        Returns:
            Weighted losses by name, each the mean over objects and rounds: "loss_ce",
            "loss_dice" and "loss_iou".

        Raises:
            ValueError: no object at all, or masks of another size or number than the images.
        """
        sizes = {tuple(m.shape[1:]) for m in masks}
        if len(masks) != len(images) or sizes != {tuple(images.input_size)}:
            raise ValueError(
                f"wanted masks of {len(images)} images of {tuple(images.input_size)} pixels, got "
                f"{len(masks)} of {', '.join(map(str, sorted(sizes)))}"
            )
        every = torch.cat(list(masks))
        if not len(every):
            raise ValueError("a batch without any object has no loss; leave such images out")
        image = images.repeat([len(m) for m in masks])
        h, w = image.embedding.shape[-2:]
        bottom, right = STRIDE * h - every.shape[1], STRIDE * w - every.shape[2]
        targets = F.pad(every, (0, right, 0, bottom))  # the frame of the logits
        on_cpu = every.cpu()
        prompts = self.sampler(on_cpu, (4 * h, 4 * w))
        found: dict[str, list[Tensor]] = defaultdict(list)
        for round_ in range(self.corrections + 1):
            logits, iou = self._decode(model, image, prompts)
            for name, value in self._losses(logits, iou, targets, every).items():
                found[name].append(value)
            if round_ < self.corrections:
                prompts = _corrected(prompts, logits.detach()[:, :1], on_cpu)
        return {
            f"loss_{name}": self.weights[name] * torch.stack(values).mean()
            for name, values in found.items()
        }

    @staticmethod
    def _decode(
        model: RwkvSam, image: ImageEmbedding, prompts: SampledPrompts
    ) -> tuple[Tensor, Tensor]:
        """All masks of N prompts, one an image: logits (N, M, 4h, 4w), predicted IoU (N, M)."""
        h, w = image.embedding.shape[-2:]
        device = image.embedding.device
        sparse, dense = model.prompt_encoder(
            (prompts.coords.to(device), prompts.labels.to(device)),
            None,
            prompts.masks.to(device),
            (STRIDE * h, STRIDE * w),
            prompts.with_mask.to(device),
        )
        every = False if model.mask_decoder.single_mask else None
        place = model.prompt_encoder.position.grid((h, w))
        # Corners came as points, so one padding point too many was added.
        return model.mask_decoder(
            image.embedding, place, sparse[:, :-1], dense, image.share, multimask_output=every
        )

    def _losses(
        self, logits: Tensor, iou: Tensor, targets: Tensor, masks: Tensor
    ) -> dict[str, Tensor]:
        """Of the single mask, and of the best of those for ambiguous prompts.

        `targets` are `masks` in the frame of the logits.
        """
        count, several = logits.shape[:2]
        flat = logits.float().flatten(0, 1)[:, None]  # (N * M, 1, 4h, 4w)
        points = sample_uncertain_points(flat, self.num_points)
        truth = targets.to(flat)[:, None].repeat_interleave(several, 0)
        at_points = point_sample(truth, points)[:, 0]
        guess = point_sample(flat, points)[:, 0]
        losses = {
            "ce": sigmoid_cross_entropy(guess, at_points),
            "dice": dice_loss(guess, at_points),
            "iou": _iou_loss(iou.float(), logits.detach().float(), masks),
        }
        losses = {name: value.view(count, several) for name, value in losses.items()}
        total = sum(self.weights[name] * losses[name] for name in ("ce", "dice"))
        assert isinstance(total, Tensor)
        used = {}
        for name in ("ce", "dice"):
            value = losses[name][:, 0].mean()
            if several > 1:
                best = total[:, 1:].argmin(1, keepdim=True)
                value = value + losses[name][:, 1:].gather(1, best).mean()
                value = value + self.others_weight * losses[name][:, 1:].mean()
            used[name] = value
        return {**used, "iou": losses["iou"].mean()}


def _iou_loss(iou: Tensor, logits: Tensor, masks: Tensor) -> Tensor:
    """Of the predicted IoU (N, M) of logits (N, M, 4h, 4w), at the size of masks (N, H, W).

    Thin parts, which a quarter of the size does not have, decide what a mask is worth.
    """
    height, width = masks.shape[1:]
    rows = max(1, _PIXELS_AT_ONCE // (16 * logits[0].numel()))  # objects
    parts = []
    for expected, z, true in zip(
        iou.split(rows), logits.split(rows), masks.split(rows), strict=True
    ):
        whole = F.interpolate(z, scale_factor=4, mode="bilinear", align_corners=False)
        whole = whole[..., :height, :width].flatten(0, 1)
        parts.append(
            iou_regression_loss(
                expected.flatten(), whole, true.repeat_interleave(iou.shape[1], 0).to(whole.device)
            )
        )
    return torch.cat(parts)


def _corrected(prompts: SampledPrompts, logits: Tensor, masks: Tensor) -> SampledPrompts:
    """Add the click that corrects the prediction, and the prediction as a mask prompt."""
    logits = logits.float().cpu()
    size = masks.shape[1:]
    whole = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    pred = whole[:, 0, : size[0], : size[1]] > 0
    longer = prompts.add(*next_click(pred, masks))
    used = torch.ones(len(masks), dtype=torch.bool)
    return SampledPrompts(longer.coords, longer.labels, logits, used, prompts.kinds)
