"""Transforms of samples: timm's for classification, albumentations' for images with masks."""

import inspect
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch

from vision.data.instances import box_of_mask, interior_point

_BOX_KEYS = ("boxes", "bboxes")


class ClassificationTransform:
    """timm's transforms (arXiv:2110.00476 and its ancestors) on a sample's "image".

    Random choices come from Python's, NumPy's and torch's global generators, which a DataLoader
    seeds differently in each worker.

    Args:
        train: random augmentation; else resize and centre crop.
        input_size: height and width of the result, or one number for both.
        mean: by channel, for pixels in [0, 1].
        std: by channel, for pixels in [0, 1].
        options: any other option of `timm.data.create_transform`: `auto_augment`, `re_prob`,
            `interpolation`, `scale`, `ratio`, `hflip`, `color_jitter`, `crop_pct`, ...

    Raises:
        TypeError: timm has no such option, or it changes what a sample is (`separate`, ...).
    """

    def __init__(
        self,
        train: bool,
        input_size: int | tuple[int, int],
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        **options: Any,
    ) -> None:
        from timm.data import create_transform

        own = {"is_training", "input_size", "mean", "std"}
        # They give tuples, patches or unnormalised arrays instead of one image tensor.
        other = {"separate", "use_prefetcher", "tf_preprocessing", "naflex", "patch_size"}
        other |= {"max_seq_len", "patchify", "patchify_channels_last", "patchify_flatten"}
        known = [k for k in inspect.signature(create_transform).parameters if k not in own | other]
        for option in options:
            if option not in known:
                raise TypeError(_unknown("option of ClassificationTransform", option, known))
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self._transform = create_transform(
            size, is_training=train, mean=tuple(mean), std=tuple(std), **options
        )

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sample with "image" as a tensor.

        Args:
            sample: "image", uint8 RGB (H, W, 3), and anything else, which is kept.

        Returns:
            A new dict; "image" is float32 (3, h, w), normalised; uint8 with `normalize=False`.
        """
        from PIL import Image

        return {**sample, "image": self._transform(Image.fromarray(sample["image"]))}

    def __repr__(self) -> str:
        return f"ClassificationTransform({self._transform})"


class AlbumentationsTransform:
    """A pipeline of albumentations from config dicts, on an image and all that belongs to it.

    Each transform is a dict with "type", a class of albumentations, and its arguments;
    "transforms" of a composition (OneOf, SomeOf, Sequential, ...) is again a list of such dicts:

        AlbumentationsTransform([
            {"type": "RandomCrop", "height": 256, "width": 256, "pad_if_needed": True},
            {"type": "OneOf", "transforms": [{"type": "Blur"}, {"type": "CLAHE"}], "p": 0.3},
        ])

    Masks are transformed with nearest neighbour. Where a transform moves pixels in from outside of
    the image, masks get `fill_mask`, 0 by default: pass `fill_mask=255` to those transforms when
    class 0 is not background.

    albumentations looks for a newer version on the network when it is imported;
    NO_ALBUMENTATIONS_UPDATE=1 is put into the environment before, unless the variable is set.

    Its transforms keep their own random generators, equal in all forked workers, and
    `Compose(seed=...)` gives each of them the same numbers (two flips would always go together).
    So every call takes a new seed from torch's global generator, which a DataLoader seeds
    differently in each worker, and shares one generator among all transforms:
    `torch.manual_seed` makes a run reproducible.

    Args:
        transforms: config dicts.
        min_box_area: boxes that have fewer pixels left in the image are dropped, with their labels;
            used only when a sample has boxes without masks.

    Raises:
        ValueError: an unknown type, or a value that albumentations refuses.
        TypeError: a type has no such argument.
    """

    def __init__(self, transforms: Sequence[Mapping[str, Any]], min_box_area: float = 1.0) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations

        # Two pipelines: one that tracks boxes refuses samples without them.
        self._pixels = albumentations.Compose([_build(config) for config in transforms])
        boxes = albumentations.BboxParams(
            "pascal_voc", label_fields=["index"], min_area=min_box_area, clip=True
        )
        with warnings.catch_warnings():
            # True and right of a pipeline that moves no pixels.
            warnings.filterwarnings("ignore", "Got processor for bboxes, but no transform")
            self._with_boxes = albumentations.Compose(
                [_build(config) for config in transforms], bbox_params=boxes
            )

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """Return the transformed sample.

        Args:
            sample: "image", uint8 or float32 (H, W, C); optionally "mask", integers (H, W);
                "masks", bool or integers (N, H, W), one an instance; "boxes" or "bboxes", (N, 4),
                x0, y0, x1, y1 in pixels; "points", (N, 2), with masks only; "labels", (N,).
                Anything else is kept.

        Returns:
            A new dict with the same keys and dtypes. With masks, instances without a pixel left
            are dropped from masks, boxes, points and labels, boxes are those of the new masks, and
            points the most interior pixels. Without masks, boxes are clipped to the image and those
            outside dropped with their labels. N may become 0.

        Raises:
            ValueError: boxes under both names, points without masks, or another number of
                instances in one of the keys.
        """
        boxes_key = _check_instances(sample)
        result = dict(sample)
        data: dict[str, Any] = {"image": sample["image"]}
        if "mask" in sample:
            data["mask"] = _for_opencv(sample["mask"])
        if "masks" in sample and len(sample["masks"]):
            data["masks"] = _for_opencv(np.asarray(sample["masks"]))
        pipeline = self._pixels
        if boxes_key is not None and "masks" not in sample:
            pipeline = self._with_boxes
            data["bboxes"] = np.asarray(sample[boxes_key], np.float32).reshape(-1, 4)
            data["index"] = np.arange(len(data["bboxes"]))
        seed = int(torch.randint(2**62, ()))
        pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        data = pipeline(**data)

        result["image"] = data["image"]
        if "mask" in sample:
            result["mask"] = _like(data["mask"], sample["mask"])
        if "masks" in sample:
            image = data["image"]
            hw = image.shape[-2:] if isinstance(image, torch.Tensor) else image.shape[:2]
            masks = np.asarray(data.get("masks", np.zeros((0, *hw))))
            masks = _like(masks, sample["masks"])
            keep = masks.any(axis=(1, 2))
            result["masks"] = masks[keep]
            if boxes_key is not None:
                result[boxes_key] = _each(box_of_mask, result["masks"], sample[boxes_key])
            if "points" in sample:
                result["points"] = _each(interior_point, result["masks"], sample["points"])
            if "labels" in sample:
                result["labels"] = np.asarray(sample["labels"])[keep]
        elif boxes_key is not None:
            result[boxes_key] = _like(np.asarray(data["bboxes"]).reshape(-1, 4), sample[boxes_key])
            if "labels" in sample:
                kept = np.asarray(data["index"], np.int64)
                result["labels"] = np.asarray(sample["labels"])[kept]
        return result


def _build(config: Mapping[str, Any]) -> Any:
    """Build one transform of albumentations from its config."""
    import albumentations

    if not isinstance(config, Mapping) or "type" not in config:
        raise ValueError(f"a transform wants a dict with 'type', got {config!r}")
    args = dict(config)
    kind = args.pop("type")
    parents = (albumentations.BasicTransform, albumentations.BaseCompose)
    known = {
        name: cls
        for name, cls in vars(albumentations).items()
        if inspect.isclass(cls) and issubclass(cls, parents) and not inspect.isabstract(cls)
    }
    if kind not in known:
        raise ValueError(_unknown("transform of albumentations", kind, list(known)))
    cls = known[kind]
    parameters = list(inspect.signature(cls).parameters)
    for name in args:
        if name not in parameters:
            raise TypeError(_unknown(f"argument of {kind}", name, parameters))
    if issubclass(cls, albumentations.BaseCompose):
        for name in ("transforms", "first", "second"):
            if isinstance(args.get(name), Mapping):
                args[name] = _build(args[name])
            elif args.get(name) is not None:
                args[name] = [_build(inner) for inner in args[name]]
    else:
        owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
        if "InitSchema" in vars(owner):
            args["strict"] = True  # else a refused value can become the default, with a warning
    return cls(**args)


def _check_instances(sample: Mapping[str, Any]) -> str | None:
    """Check that what belongs to instances has one length; return the key of the boxes."""
    keys = [key for key in _BOX_KEYS if key in sample]
    if len(keys) > 1:
        raise ValueError("a sample wants its boxes under one name, got 'boxes' and 'bboxes'")
    if "points" in sample and "masks" not in sample:
        raise ValueError("points want the masks they lie in, got none; leave 'points' out")
    per_instance = [key for key in ("masks", *_BOX_KEYS, "points") if key in sample]
    if per_instance:
        lengths = {k: len(sample[k]) for k in (*per_instance, "labels") if k in sample}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"wanted the same number of instances in every key, got {lengths}")
    return keys[0] if keys else None


def _for_opencv(mask: np.ndarray) -> np.ndarray:
    """Return a mask in a dtype that OpenCV transforms: bool -> uint8, wide integers -> int32."""
    if mask.dtype == np.bool_:
        return mask.astype(np.uint8)
    return mask if mask.dtype == np.uint8 else mask.astype(np.int32)


def _like(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    return np.asarray(new).astype(np.asarray(old).dtype, copy=False)


def _each(function: Any, masks: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Stack a function's value of every mask, in the shape and dtype of `old` but its length."""
    shape = (len(masks), np.asarray(old).shape[1])
    rows = [function(mask.astype(bool)) for mask in masks]
    return _like(np.array(rows, np.float32).reshape(shape), old)


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}"
    return f"no {what} is called {name!r}; {hint}"
