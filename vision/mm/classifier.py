"""Image classification in mmengine: preprocessor and model around a timm classifier."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from vision.models.factory import check_model_name

from .backbone import names_without_decay, parameter_depths, timm_weights


@MODELS.register_module()
class ClassificationPreprocessor(BaseDataPreprocessor):
    """Normalise images; in training also erase rectangles, and mix pairs.

    Args:
        mean: channel means for pixels in [0, 1].
        std: channel standard deviations for pixels in [0, 1].
        erase: keywords of `timm.data.random_erasing.RandomErasing`; None for no erasing.
        mixup: keywords of `timm.data.Mixup`; None for no mixing. Needs even batches.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        erase: dict[str, Any] | None = None,
        mixup: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1) * 255, persistent=False)
        self.erase = RandomErasing(device="cpu", **erase) if erase else None
        self.mixup = Mixup(**mixup) if mixup else None

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Prepare a batch.

        Args:
            data: "inputs" uint8 (B, 3, H, W); "labels" int64 (B,), which a prediction lacks.
            training: whether to erase and mix.

        Returns:
            The same with "inputs" float32, and "labels" (B, num_classes) when mixed.

        Raises:
            ValueError: an odd batch is to be mixed.
        """
        data = self.cast_data(data)
        inputs = (data["inputs"].float() - self.mean) / self.std
        if training and self.erase is not None:
            inputs = self.erase(inputs)
        if training and self.mixup is not None:
            if len(inputs) % 2:
                raise ValueError(
                    f"mixup pairs images, but the batch has {len(inputs)}; set drop_last=True "
                    "and an even batch_size in train_dataloader"
                )
            inputs, data["labels"] = self.mixup(inputs, data["labels"])
        return {**data, "inputs": inputs}


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A timm classifier with its loss.

    Args:
        model_name: name as in `timm.list_models()`.
        num_classes: number of classes.
        checkpoint: weights file to start from, "published", or None for random weights.
        label_smoothing: share of the target spread over all classes (mixup has its own).
        erase: keywords of timm's random erasing, applied to the normalised batch.
        mixup: keywords of `timm.data.Mixup`; `num_classes` and `label_smoothing` are filled in.
        grad_checkpointing: recompute the blocks in the backward pass to save memory.
        **model_args: passed to `timm.create_model`.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        checkpoint: str | None = None,
        label_smoothing: float = 0.0,
        erase: dict[str, Any] | None = None,
        mixup: dict[str, Any] | None = None,
        grad_checkpointing: bool = False,
        **model_args: Any,
    ) -> None:
        check_model_name(model_name)
        backbone = timm.create_model(
            model_name, num_classes=num_classes, **timm_weights(checkpoint), **model_args
        )
        if mixup:
            mixup = {"num_classes": num_classes, "label_smoothing": label_smoothing, **mixup}
        cfg = backbone.pretrained_cfg
        super().__init__(
            data_preprocessor=ClassificationPreprocessor(cfg["mean"], cfg["std"], erase, mixup)
        )
        self.backbone = backbone
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        if grad_checkpointing:
            backbone.set_grad_checkpointing()

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter, 0 at the input, for layer-wise learning rates."""
        return parameter_depths(self, self.backbone)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the model asks not to decay."""
        return names_without_decay(self, self.backbone)

    def forward(
        self, inputs: Tensor, labels: Tensor | None = None, mode: str = "tensor", **meta: Any
    ) -> Any:
        """Run the classifier.

        Args:
            inputs: normalised images (B, 3, H, W).
            labels: class indices (B,), or target probabilities (B, num_classes) in "loss" mode.
            mode: "loss" for {"loss": scalar}; "predict" for one dict per image with "scores"
                (num_classes,), probabilities, and "label" (the target, if given); "tensor" for
                logits (B, num_classes).
            **meta: what else the dataset put into the sample (a path); not used.

        Raises:
            ValueError: a label outside the classes, no labels in "loss" mode, or an unknown mode.
        """
        logits = self.backbone(inputs)
        if mode == "tensor":
            return logits
        if mode == "loss":
            if labels is None:
                raise ValueError("mode 'loss' needs labels")
            self._check_labels(labels)
            # Mixed targets are smoothed by the mixer already.
            smoothing = self.label_smoothing if labels.ndim == 1 else 0.0
            return {"loss": F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)}
        if mode == "predict":
            scores = logits.float().softmax(dim=1).cpu()
            if labels is None:
                return [{"scores": s} for s in scores]
            self._check_labels(labels)
            return [{"scores": s, "label": int(t)} for s, t in zip(scores, labels, strict=True)]
        raise ValueError(f"no mode {mode!r}; there are 'loss', 'predict' and 'tensor'")

    def _check_labels(self, labels: Tensor) -> None:
        if labels.ndim == 1 and (labels.min() < 0 or labels.max() >= self.num_classes):
            raise ValueError(
                f"labels lie in [{int(labels.min())}, {int(labels.max())}] but the model has "
                f"num_classes={self.num_classes}; set num_classes to the dataset's"
            )


@MODELS.register_module()
class FlipTTA(BaseModel):
    """Test-time augmentation of a classifier: mean over the image and its mirror image.

    Args:
        module: config of the `ImageClassifier`.
    """

    def __init__(self, module: dict[str, Any]) -> None:
        super().__init__()
        self.module = MODELS.build(module)

    def test_step(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """Predict a batch; see `ImageClassifier.forward`, mode "predict"."""
        data = self.module.data_preprocessor(data, False)
        plain = self.module(**data, mode="predict")
        mirrored = self.module(**{**data, "inputs": data["inputs"].flip(-1)}, mode="predict")
        return [
            {**a, "scores": (a["scores"] + b["scores"]) / 2}
            for a, b in zip(plain, mirrored, strict=True)
        ]

    def forward(self, inputs: Tensor, mode: str = "tensor", **data: Any) -> Any:
        """Run the classifier without augmentation."""
        return self.module(inputs, mode=mode, **data)
