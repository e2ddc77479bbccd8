"""Data sets of the zoo in OpenMMLab form."""

import copy
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATASETS
from mmseg.datasets import BaseSegDataset
from torch.utils.data import Dataset

from vision.data import (
    AlbumentationsTransform,
    ClassificationTransform,
    DigitScenes,
    LabelNoise,
    create_classification_dataset,
)


class ClassifierInputs:
    """Transform a sample of vision.data to what `ImageClassifier` takes: uint8 image and label.

    Args:
        options: keywords of `vision.data.ClassificationTransform` (input_size, auto_augment, ...),
            and `albumentations`, transforms of `vision.data.AlbumentationsTransform` that augment
            before it; None for the image as it is.
        train: whether to augment.
    """

    def __init__(self, options: dict[str, Any] | None, train: bool) -> None:
        options = dict(options or {})
        steps = options.pop("albumentations", [])
        self.augment = AlbumentationsTransform(steps) if steps and train else None
        # The model normalises: see ClassificationPreprocessor.
        self.transform = (
            ClassificationTransform(train, normalize=False, **options) if options else None
        )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Sample with "image" (H, W, 3) and "label" to "inputs" (3, h, w) and "labels"."""
        if self.augment is not None:
            sample = self.augment(sample)
        if self.transform is None:
            inputs = torch.from_numpy(np.ascontiguousarray(sample["image"].transpose(2, 0, 1)))
        else:
            inputs = self.transform(sample)["image"]
        return {"inputs": inputs, "labels": sample["label"]}


class _Labelled(Dataset):
    """What both classification data sets share: a vision.data data set below."""

    samples: Any

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]

    @property
    def metainfo(self) -> dict[str, Any]:
        """Class names, kept in the checkpoints."""
        return {"classes": tuple(self.samples.classes)}


@DATASETS.register_module()
class LabelledImages(_Labelled):
    """Images with a class each, for `ImageClassifier`.

    Args:
        data_root: folder or tar file.
        split: see `vision.data.create_classification_dataset`.
        transform: see `ClassifierInputs`.
        test_mode: no augmentation.
        **reader: passed to `create_classification_dataset` (name, class_map, num_classes, ...).
    """

    def __init__(
        self,
        data_root: str,
        split: str | None,
        transform: dict[str, Any],
        test_mode: bool = False,
        **reader: Any,
    ) -> None:
        self.samples = create_classification_dataset(
            data_root, split, transform=ClassifierInputs(transform, not test_mode), **reader
        )


@DATASETS.register_module()
class DigitClassification(_Labelled):
    """`DigitScenes` with one digit each, for `ImageClassifier`.

    Args:
        split: "train" or "val".
        transform: see `ClassifierInputs`; None for the scene as it is.
        **options: passed to `DigitScenes`.
    """

    def __init__(self, split: str, transform: dict[str, Any] | None = None, **options: Any) -> None:
        inputs = ClassifierInputs(transform, split == "train")
        self.samples = DigitScenes("classification", split, transform=inputs, **options)

    def set_epoch(self, epoch: int) -> None:
        """Make the scenes of another epoch."""
        self.samples.set_epoch(epoch)


@DATASETS.register_module()
class NoisyLabels(Dataset):
    """A classification data set with a share of wrong labels, for training; see `LabelNoise`.

    Args:
        dataset: config of the data set.
        level: probability that a label is wrong.
        seed: of the choice of the wrong labels.
    """

    def __init__(self, dataset: dict[str, Any], level: float, seed: int = 0) -> None:
        self.dataset = DATASETS.build(dataset)
        classes = len(self.dataset.metainfo["classes"])
        self.samples = LabelNoise(self.dataset, level, classes, seed, key="labels")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]

    @property
    def metainfo(self) -> dict[str, Any]:
        """Class names, kept in the checkpoints."""
        return self.dataset.metainfo


@DATASETS.register_module()
class DigitSceneSegmentation(BaseSegDataset):
    """`DigitScenes` with many digits each, for mmseg models; the pipeline loads nothing.

    Args:
        split: "train" or "val".
        size: height and width of a scene in pixels.
        length: number of scenes.
        pipeline: mmseg transforms after loading.
        test_mode: as in mmseg.
        **options: passed to `DigitScenes` (seed, scale, num_digits, ...).
    """

    METAINFO = {
        "classes": ("background", *"0123456789"),
        "palette": [
            [30, 30, 30], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200],
            [245, 130, 48], [145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60],
            [250, 190, 212],
        ],
    }  # fmt: skip

    def __init__(
        self,
        split: str,
        size: int | tuple[int, int],
        length: int,
        pipeline: list[dict[str, Any]],
        test_mode: bool = False,
        **options: Any,
    ) -> None:
        self.scenes = DigitScenes("segmentation", split, size=size, length=length, **options)
        self.split = split
        super().__init__(pipeline=pipeline, test_mode=test_mode)

    def load_data_list(self) -> list[dict[str, Any]]:
        """One entry per scene; scenes are composed when asked for."""
        return [
            {"scene": i, "img_path": f"digits_{self.split}_{i:05d}.png"}
            for i in range(len(self.scenes))
        ]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Compose scene `idx`: image (H, W, 3) RGB and label map (H, W)."""
        info = copy.deepcopy(super().get_data_info(idx))
        scene = self.scenes[info["scene"]]
        size = scene["image"].shape[:2]
        return info | {
            "img": scene["image"],
            "gt_seg_map": scene["mask"],
            "seg_fields": ["gt_seg_map"],
            "img_shape": size,
            "ori_shape": size,
            "reduce_zero_label": False,
            "label_map": None,
        }

    def set_epoch(self, epoch: int) -> None:
        """Make the scenes of another epoch."""
        self.scenes.set_epoch(epoch)


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid, 11 classes, street scenes (Brostow et al., 2009), in mmseg's folder layout.

    `img_dir/{train,val,test}/*.jpg` and `ann_dir/{train,val,test}/*.png`; a mask holds class
    indices 0..10, and 255 for void.
    """

    METAINFO = {
        "classes": (
            "sky", "building", "pole", "road", "sidewalk", "tree", "sign_symbol", "fence", "car",
            "pedestrian", "bicyclist",
        ),
        "palette": [
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222],
            [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0],
            [0, 128, 192],
        ],
    }  # fmt: skip
