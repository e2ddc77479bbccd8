"""Promptable segmentation in mmengine: model and embedded data set."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import Tensor
from torch.utils.data import Dataset

from vision.data import DigitScenes
from vision.data.prompt_sampling import PromptSampler
from vision.sam import create_sam
from vision.sam.checkpoint import PARTS
from vision.sam.evaluation import PromptEvaluator
from vision.sam.training import PromptableLoss

from .backbone import names_without_decay, parameter_depths


@MODELS.register_module()
class PromptableSegmentor(BaseModel):
    """RWKV-SAM, encoder and decoder trained together.

    Args:
        model_name: one of `vision.sam.list_sams()`.
        checkpoint: weights to start from; None for random ones.
        parts: which parts of the model that file gives, see `vision.sam.create_sam`: ("encoder",
            "neck") after distillation.
        frozen: parts that are not trained.
        prompts: keywords of `PromptSampler`.
        loss: keywords of `PromptableLoss`.
        evaluation: keywords of `PromptEvaluator`; None for the tight box and one click.
        **overrides: passed to `vision.sam.create_sam`.

    Raises:
        ValueError: a part of another name.
    """

    def __init__(
        self,
        model_name: str,
        checkpoint: str | None = None,
        parts: Sequence[str] | None = None,
        frozen: Sequence[str] = (),
        prompts: dict[str, Any] | None = None,
        loss: dict[str, Any] | None = None,
        evaluation: dict[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(data_preprocessor=BaseDataPreprocessor())
        self.sam = create_sam(model_name, checkpoint, parts, **overrides)
        if set(frozen) - set(PARTS):
            raise ValueError(f"frozen parts are among {', '.join(PARTS)}; got {', '.join(frozen)}")
        for part in frozen:
            self.sam.get_submodule(part).requires_grad_(False)
        self.criterion = PromptableLoss(PromptSampler(**(prompts or {})), **(loss or {}))
        if evaluation is None:
            evaluation = {"clicks": (1,), "targets": ()}
        self.evaluator = PromptEvaluator(self.sam, **evaluation)

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
            inputs: images, uint8 RGB (3, H, W), of one size unless the mode is "predict".
            masks: of the objects of each, bool (N, H, W), none empty.
            mode: "loss" for losses by name; "predict" for one dict per image, {"true": its masks on
                the CPU, "answers": PromptAnswers}; "tensor" for the embeddings (B, dim, h, w).
            **meta: what else the data set put into the sample; not used.

        Raises:
            ValueError: images of several sizes, or an unknown mode.
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
        return self.criterion(self.sam, images, masks)

    def _predict(self, x: Tensor, masks: Tensor) -> dict[str, Any]:
        true = masks.cpu()
        image = np.ascontiguousarray(x.permute(1, 2, 0).cpu().numpy())
        return {"true": true, "answers": self.evaluator(image, true.numpy())}


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
