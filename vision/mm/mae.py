"""Masked autoencoding in mmengine: model, images without labels, metric (arXiv:2111.06377)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import Tensor
from torch.utils.data import Dataset

from vision.data import list_images, read_image
from vision.models.factory import check_model_name
from vision.models.mae import MaskedAutoencoder, masked_mse, mean_of_visible

from .backbone import names_without_decay, parameter_depths, timm_weights
from .classifier import ClassificationPreprocessor
from .datasets import ClassifierInputs

_GREY = 0.5  # of masked patches in pictures


@MODELS.register_module()
class MAEPretrainer(BaseModel):
    """A Vision-RWKV that learns to paint masked patches; see `vision.models.mae`.

    Beside its loss it gives, as "mean_of_visible", that of predicting every patch as the mean of
    the image's visible ones. Its checkpoints load as those of the backbone (`checkpoint=` of
    `ZooBackbone` and `ImageClassifier`); the decoder is left out.

    Args:
        model_name: name of the encoder, as in `timm.list_models("vrwkv*")`.
        decoder: arguments of `MAEDecoder`: dim, depth, and options of its blocks.
        mask_ratio: share of the patches that are masked.
        norm_pix: predict each patch less its mean, over its standard deviation.
        seed: of the masks of an evaluation, which are those of the images' numbers.
        checkpoint: weights of the encoder to start from, "published", or None.
        grad_checkpointing: recompute the encoder's blocks in the backward pass to save memory.
        **model_args: passed to `timm.create_model`.

    Raises:
        ValueError: no such model, or one that is no Vision-RWKV; a ratio out of range.
    """

    def __init__(
        self,
        model_name: str,
        decoder: dict[str, Any] | None = None,
        mask_ratio: float = 0.75,
        norm_pix: bool = False,
        seed: int = 0,
        checkpoint: str | None = None,
        grad_checkpointing: bool = False,
        **model_args: Any,
    ) -> None:
        check_model_name(model_name)
        encoder = timm.create_model(
            model_name, num_classes=0, **timm_weights(checkpoint), **model_args
        )
        cfg = encoder.pretrained_cfg
        super().__init__(data_preprocessor=ClassificationPreprocessor(cfg["mean"], cfg["std"]))
        self.mae = MaskedAutoencoder(encoder, decoder, mask_ratio, norm_pix)
        self.seed = seed
        if grad_checkpointing:
            encoder.set_grad_checkpointing()

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter of the encoder, 0 at the input."""
        return parameter_depths(self, self.mae.encoder)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that should not decay."""
        return {*names_without_decay(self, self.mae.encoder), "mae.decoder.pos_embed"}

    def forward(
        self, inputs: Tensor, index: Tensor | None = None, mode: str = "tensor", **meta: Any
    ) -> Any:
        """Mask and paint.

        Args:
            inputs: normalised images (B, 3, H, W).
            index: numbers of the images, (B,), that the masks of a prediction follow from; without
                them, and in training, masks are random.
            mode: "loss" for {"loss", "mean_of_visible"}; "predict" for one dict per image with
                both as "mse" and "mean_of_visible", and the pictures "masked" and "painted", uint8
                (3, H, W); "tensor" for predicted patches (B, patches, P).
            **meta: what else the data set put into the sample; not used.

        Raises:
            ValueError: an unknown mode, or images that are not of whole patches.
        """
        if mode not in ("loss", "predict", "tensor"):
            raise ValueError(f"no mode {mode!r}; there are 'loss', 'predict' and 'tensor'")
        fixed = index if mode == "predict" else None
        found = self.mae(inputs, None if fixed is None else self._noise(fixed, inputs))
        if mode == "tensor":
            return found.prediction
        error = masked_mse(*found)
        simple = mean_of_visible(found.target, found.masked)
        floor = masked_mse(simple, found.target, found.masked)
        if mode == "loss":
            return {"loss": error.mean(), "mean_of_visible": floor.mean()}
        painted = self._pixels(self.mae.paint(inputs, found))
        hidden = self._pixels(inputs, found.masked)
        rows = zip(error.tolist(), floor.tolist(), hidden, painted, strict=True)
        names = ("mse", "mean_of_visible", "masked", "painted")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def _noise(self, index: Tensor, inputs: Tensor) -> Tensor:
        """Random numbers of the patches (B, T) that depend on the images' numbers alone."""
        patch = self.mae.patch_size
        count = (inputs.shape[2] // patch[0]) * (inputs.shape[3] // patch[1])
        rows = []
        for number in index.tolist():
            generator = torch.Generator().manual_seed(self.seed + number)
            rows.append(torch.rand(count, generator=generator))
        return torch.stack(rows).to(inputs.device)

    def _pixels(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """Normalised images as uint8, with the masked patches in grey."""
        stats = self.data_preprocessor
        pixels = images.float() * stats.std + stats.mean
        if masked is not None:
            patch, (height, width) = self.mae.patch_size, images.shape[2:]
            cells = masked.view(-1, 1, height // patch[0], width // patch[1])
            cells = cells.repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)
            pixels = torch.where(cells, 255 * _GREY, pixels)
        return pixels.round().clamp(0, 255).to(torch.uint8).cpu()


@DATASETS.register_module()
class UnlabelledImages(Dataset):
    """Images of folders and their subfolders, without labels.

    Args:
        data_root: folder that the others are relative to.
        data_prefix: folders of images, by any names; {} for `data_root` itself.
        transform: see `vision.mm.datasets.ClassifierInputs`.
        test_mode: no augmentation.

    Raises:
        ValueError: a folder without images.
    """

    metainfo: dict[str, Any] = {}

    def __init__(
        self,
        data_root: str,
        transform: dict[str, Any],
        data_prefix: dict[str, str] | None = None,
        test_mode: bool = False,
    ) -> None:
        folders = list((data_prefix or {}).values()) or [""]
        self.paths = [path for folder in folders for path in list_images(Path(data_root) / folder)]
        self.transform = ClassifierInputs(transform, not test_mode)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One image: "inputs" uint8 (3, H, W), and its "index".

        Raises:
            ImageReadError: a file that cannot be read.
        """
        sample = {"image": read_image(self.paths[index]), "label": 0}
        return {"inputs": self.transform(sample)["inputs"], "index": index}


@METRICS.register_module()
class ReconstructionError(BaseMetric):
    """Mean squared error over masked patches, and that of the mean of the visible ones.

    Returns of `evaluate`: {"mse", "mean_of_visible"}, in the units of the model's loss, each the
    mean over the images.

    Args:
        collect_device: "cpu" or "gpu", where results of several processes are gathered.
        prefix: put before the metric's names.
    """

    default_prefix = "mae"

    def __init__(self, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep two numbers an image."""
        self.results += [(sample["mse"], sample["mean_of_visible"]) for sample in data_samples]

    def compute_metrics(self, results: list[tuple[float, float]]) -> dict[str, float]:
        """Over all images."""
        names = ("mse", "mean_of_visible")
        return {
            name: sum(column) / len(column)
            for name, column in zip(names, zip(*results, strict=True), strict=True)
        }
