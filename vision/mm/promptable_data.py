"""Sets of images with object masks in mmengine, to train and judge `PromptableSegmentor`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from vision.data.promptable import CocoInstances, MaskPairs, PanopticPngs
from vision.data.promptable_joint import RepeatedSets, SkipBroken, TransformedSets
from vision.data.promptable_transforms import LargeScaleJitter, ResizeAndPad
from vision.data.sa1b import Sa1b

SETS: dict[str, Callable[..., Any]] = {
    cls.__name__: cls for cls in (MaskPairs, CocoInstances, PanopticPngs, Sa1b)
}
TRANSFORMS: dict[str, Callable[..., Any]] = {
    cls.__name__: cls for cls in (LargeScaleJitter, ResizeAndPad)
}
_PATHS = ("images", "masks", "annotations", "pngs", "folder")


@DATASETS.register_module()
class PromptableDataset(Dataset):
    """Images with object masks from one or several sets.

    Args:
        sets: configs: "type", a name in `SETS`, and its arguments; paths are below `data_root`.
            "transform" is the set's own transform, None for none.
        data_root: folder that the sets' paths are relative to.
        repeats: how often each set is gone through in an epoch, 1 for all by default.
        transform: config of the sets that name none of their own: "type", a name in `TRANSFORMS`,
            and its arguments; None leaves images as they are, for evaluation.
        max_masks: the most objects of an image, drawn anew in every epoch (60 in RWKV-SAM's
            recipe); None for all, for evaluation.
        strict: raise at a broken sample, for evaluation; else the next good one takes its place,
            see `vision.data.promptable_joint.SkipBroken`.
        seed: of all random choices.

    Raises:
        ValueError: no set, an unknown type, or what a set or a transform refuses.
        TypeError: an argument that a set or a transform does not have.
    """

    metainfo: dict[str, Any] = {}

    def __init__(
        self,
        sets: Sequence[Mapping[str, Any]],
        data_root: str = "",
        repeats: Sequence[int] | None = None,
        transform: Mapping[str, Any] | None = None,
        max_masks: int | None = 60,
        strict: bool = False,
        seed: int = 0,
    ) -> None:
        if not sets:
            raise ValueError("PromptableDataset wants one set or more, got none")
        members, transforms = [], []
        for config in sets:
            options = {**config}
            own = options.pop("transform", transform)
            for key in _PATHS:
                if key in options:
                    options[key] = Path(data_root) / options[key]
            members.append(_build("set", SETS, options))
            transforms.append(own and _build("transform", TRANSFORMS, own))
        joined = RepeatedSets(members, repeats)
        self.transformed = TransformedSets(joined, transforms, max_masks, seed)
        self.samples = SkipBroken(self.transformed, strict)

    def set_epoch(self, epoch: int) -> None:
        """Make the samples of another epoch."""
        self.transformed.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample.

        Returns:
            "inputs" uint8 (3, H, W), "masks" bool (N, H, W), "name" of the file and "dataset",
            the short name of its set.
        """
        sample = self.samples[index]
        pixels = np.ascontiguousarray(sample["image"].transpose(2, 0, 1))
        return {
            "inputs": torch.from_numpy(pixels),
            "masks": torch.from_numpy(sample["masks"]),
            "name": sample["name"],
            "dataset": sample["dataset"],
        }


def _build(what: str, known: Mapping[str, Callable[..., Any]], config: Mapping[str, Any]) -> Any:
    """Build a set or a transform from its config."""
    options = {**config}
    kind = options.pop("type", None)
    if kind not in known:
        raise ValueError(f"no {what} {kind!r} for prompts; there are {', '.join(known)}")
    return known[kind](**options)
