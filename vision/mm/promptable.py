"""Promptable segmentation in mmengine: model, embedded data set and metric."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import Tensor
from torch.utils.data import Dataset

from vision.data import DigitScenes, boxes_of_masks, interior_point
from vision.data.prompt_sampling import PromptSampler
from vision.metrics import boundary_iou, mask_iou
from vision.sam import create_sam
from vision.sam.training import PromptableLoss

from .backbone import names_without_decay, parameter_depths


@MODELS.register_module()
class PromptableSegmentor(BaseModel):
    """RWKV-SAM, encoder and decoder trained together.

    Args:
        model_name: one of `vision.sam.list_sams()`.
        checkpoint: weights to start from; None for random ones.
        prompts: keywords of `PromptSampler`.
        loss: keywords of `PromptableLoss`.
        **overrides: passed to `vision.sam.create_sam`.
    """

    def __init__(
        self,
        model_name: str,
        checkpoint: str | None = None,
        prompts: dict[str, Any] | None = None,
        loss: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(data_preprocessor=BaseDataPreprocessor())
        self.sam = create_sam(model_name, checkpoint, **overrides)
        self.criterion = PromptableLoss(PromptSampler(**(prompts or {})), **(loss or {}))

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter, 0 at the input, for layer-wise learning rates."""
        return parameter_depths(self, self.sam.encoder.get_submodule("model"))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the encoder asks not to decay."""
        return names_without_decay(self, self.sam.encoder.get_submodule("model"))

    def forward(
        self, inputs: Sequence[Tensor], masks: Sequence[Tensor], mode: str = "tensor", **meta: Any
    ) -> Any:
        """Run the model.

        Args:
            inputs: images of one size, uint8 RGB (3, H, W).
            masks: of the objects of each, bool (N, H, W), none empty.
            mode: "loss" for losses by name; "predict" for one dict per image (see `_predict`);
                "tensor" for the image embeddings (B, dim, h, w).
            **meta: what else the data set put into the sample; not used.

        Raises:
            ValueError: images of several sizes in training, or an unknown mode.
        """
        if mode == "predict":
            return [self._predict(x, m) for x, m in zip(inputs, masks, strict=True)]
        sizes = {tuple(x.shape[1:]) for x in inputs}
        if len(sizes) > 1:
            raise ValueError(f"a batch wants images of one size, got {sorted(sizes)}; crop or pad")
        images = self.sam.encode_image(torch.stack(list(inputs)))
        if mode == "tensor":
            return images.embedding
        if mode != "loss":
            raise ValueError(f"no mode {mode!r}; there are 'loss', 'predict' and 'tensor'")
        found: dict[str, list[Tensor]] = defaultdict(list)
        for i, targets in enumerate(masks):
            for name, value in self.criterion(self.sam, images[i], targets).items():
                found[name].append(value)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def _predict(self, x: Tensor, masks: Tensor) -> dict[str, Any]:
        """Answer the true box, and one click at the point farthest from the edge.

        Returns:
            "true" masks, and for "box" and "click" the masks found, bool (N, H, W) on the CPU, and
            under "box_iou", "click_iou" what the model expects of them, (N,).
        """
        size = (x.shape[1], x.shape[2])
        image = self.sam.encode_image(x[None])
        targets = masks.cpu()
        boxes = boxes_of_masks(targets).to(x.device, torch.float32)
        places = np.stack([interior_point(mask.numpy()) for mask in targets])
        clicks = torch.from_numpy(places)[:, None].to(x.device)
        ones = torch.ones(clicks.shape[:2], device=x.device)
        several = not self.sam.mask_decoder.single_mask
        found: dict[str, Any] = {"true": targets}
        for kind, prompt, ambiguous in (
            ("box", {"boxes": boxes}, False),
            ("click", {"points": (clicks, ones)}, several),
        ):
            logits, iou = self.sam.predict_masks(image, **prompt, multimask_output=ambiguous)
            best = iou.argmax(1)
            rows = torch.arange(len(best), device=best.device)
            whole = self.sam.upscale_masks(logits[rows, best][:, None], size, size)
            found[kind] = (whole[:, 0] > self.sam.mask_threshold).cpu()
            found[f"{kind}_iou"] = iou[rows, best].float().cpu()
        return found


@DATASETS.register_module()
class DigitPrompts(Dataset):
    """`DigitScenes` with a mask for each digit, for `PromptableSegmentor`.

    Args:
        split: "train" or "val".
        **options: passed to `DigitScenes` (size, length, num_digits, ...).
    """

    metainfo: dict[str, Any] = {}

    def __init__(self, split: str, **options: Any) -> None:
        self.scenes = DigitScenes("promptable", split, **options)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One scene: "inputs" uint8 (3, H, W), "masks" bool (N, H, W)."""
        scene = self.scenes[index]
        pixels = np.ascontiguousarray(scene["image"].transpose(2, 0, 1))
        return {"inputs": torch.from_numpy(pixels), "masks": torch.from_numpy(scene["masks"])}

    def set_epoch(self, epoch: int) -> None:
        """Make the scenes of another epoch."""
        self.scenes.set_epoch(epoch)


@METRICS.register_module()
class PromptedMaskIoU(BaseMetric):
    """IoU and boundary IoU of the masks that prompts gave, mean over the objects in percent.

    Returns of `evaluate`: for "box" and "click" {"box_mIoU", "box_mBIoU", "box_rank"}; the rank is
    Spearman's correlation of expected and true IoU, times 100.

    Args:
        collect_device: "cpu" or "gpu", where results of several processes are gathered.
        prefix: put before the metric's names.
    """

    default_prefix = "sam"

    def __init__(self, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep three numbers an object and prompt."""
        for sample in data_samples:
            true = sample["true"]
            self.results.append(
                {
                    kind: torch.stack(
                        [
                            mask_iou(sample[kind], true),
                            boundary_iou(sample[kind], true),
                            sample[f"{kind}_iou"].double(),
                        ]
                    ).numpy()
                    for kind in ("box", "click")
                }
            )

    def compute_metrics(self, results: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Means over all objects."""
        found = {}
        for kind in ("box", "click"):
            iou, boundary, expected = np.concatenate([r[kind] for r in results], axis=1)
            found[f"{kind}_mIoU"] = 100 * float(iou.mean())
            found[f"{kind}_mBIoU"] = 100 * float(boundary.mean())
            found[f"{kind}_rank"] = 100 * _rank_correlation(expected, iou)
        return found


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation; 0 where one of the two does not vary."""
    from scipy.stats import rankdata

    ranks = [rankdata(x) for x in (a, b)]
    if any(r.std() == 0 for r in ranks):
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])
