"""A trained model from its config and checkpoint, applied to images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from mmseg.models.segmentors import BaseSegmentor
from mmseg.registry import DATASETS
from torch import Tensor, nn

from vision.models.checkpoint import check_fit, unwrap_state_dict

from .classifier import ImageClassifier
from .compat import cpu_safe_config
from .datasets import ClassifierInputs
from .reading import read_run_checkpoint
from .tiling import use_tiles

# Transforms that read files; a prediction starts from an image in memory.
_LOADERS = {"LoadImage", "LoadMask", "LoadImageFromFile", "LoadAnnotations"}

# Smallest side that a pyramid with a stride of 32 px can be built on; smaller images are padded.
_SMALLEST = 32


class Predictor:
    """A classifier or segmentor ready for single images.

    Args:
        config: path of the config file, or the config.
        checkpoint: file of `tools/train.py`.
        device: where to run.
        tiles: side of the tiles to segment in and their overlap, pixels (None: a quarter); None
            for whole images.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another model.
        ValueError: a model that is no classifier and no segmentor, or no such tiles.

    Attributes:
        classes: names of the classes.
        palette: a colour for each class, for segmentation; else None.
    """

    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: str | Path,
        device: str | torch.device,
        tiles: tuple[int, int | None] | None = None,
    ) -> None:
        cfg = config if isinstance(config, Config) else Config.fromfile(config)
        cpu_safe_config(cfg)
        if tiles is not None:
            use_tiles(cfg.model, *tiles)
        init_default_scope(cfg.get("default_scope", "mmengine"))
        self.device = torch.device(device)
        self.model = MODELS.build(cfg.model)
        if not isinstance(self.model, ImageClassifier | BaseSegmentor):
            raise ValueError(
                f"wanted a classifier or a segmentor, got a {cfg.model.type}; a promptable model "
                "answers prompts: tools/predict_prompt.py, or tools/auto_mask.py without any; what "
                "a detector finds is drawn by tools/test.py --show-dir"
            )
        load_strict(self.model, checkpoint)
        self.model.to(self.device).eval()
        dataset = dict(cfg.test_dataloader.dataset)
        self.segments = not isinstance(self.model, ImageClassifier)
        meta = read_run_checkpoint(checkpoint).get("meta", {}).get("dataset_meta") or {}
        classes = meta.get("classes") or getattr(DATASETS.get(dataset["type"]), "METAINFO", {}).get(
            "classes"
        )
        self.classes: list[str] = [str(c) for c in classes or range(self._outputs())]
        self.palette = meta.get("palette")
        if self.segments:
            steps = [t for t in dataset["pipeline"] if t["type"] not in _LOADERS]
            self._pipeline = Compose(steps)
        else:
            self._transform = ClassifierInputs(dataset.get("transform"), train=False)

    def _outputs(self) -> int:
        model: Any = self.model
        return int(model.decode_head.num_classes if self.segments else model.num_classes)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> Tensor:
        """Predict one image.

        Args:
            image: RGB uint8 (H, W, 3).

        Returns:
            Segmentation: class indices (H, W), int64. Classification: probabilities (classes,).
        """
        if self.segments:
            height, width = image.shape[:2]
            lack = [(0, max(0, _SMALLEST - side)) for side in (height, width)]
            image = np.pad(image, [*lack, (0, 0)])
            size = image.shape[:2]
            data = self._pipeline({"img": image, "img_shape": size, "ori_shape": size})
            found = self.model.test_step(pseudo_collate([data]))[0].pred_sem_seg.data[0]
            return found[:height, :width].cpu()
        inputs = self._transform({"image": image, "label": None})["inputs"][None]
        batch = self.model.data_preprocessor({"inputs": inputs})
        return self.model(**batch, mode="predict")[0]["scores"]


def load_strict(model: nn.Module, checkpoint: str | Path) -> None:
    """Load a trained model's weights; every key must fit.

    Raises:
        CheckpointError: the message lists the keys and shapes that do not fit.
    """
    state = unwrap_state_dict(read_run_checkpoint(checkpoint))
    check_fit(state, model.state_dict(), str(checkpoint))
    model.load_state_dict(state, strict=True)


def top_classes(scores: Tensor, classes: Sequence[str], k: int = 5) -> list[dict[str, Any]]:
    """The k most probable classes: [{"class": name, "score": probability}], best first."""
    best = scores.topk(min(k, len(scores)))
    return [
        {"class": classes[i], "score": round(float(s), 6)}
        for s, i in zip(best.values, best.indices.tolist(), strict=True)
    ]
