"""Masks for prompts on an image that is encoded once: segment-anything's predictor, and more.

predictor = Predictor(create_sam("rwkv_sam_small", checkpoint))
predictor.set_image("photo.jpg")
masks, iou, low_res = predictor.predict(point_coords=[[320, 200]], point_labels=[1])
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .embedding_file import read_embedding, write_embedding
from .model import ImageEmbedding, RwkvSam
from .prompts import read_prompts
from .transforms import ImageLike, as_rgb, byte_scale, longest_side_size, resize_longest_side


@dataclass(frozen=True)
class _EncodedImage:
    """An image as the predictor keeps it, and its height and width before resizing."""

    embedding: ImageEmbedding
    original_size: tuple[int, int]


class Predictor:
    """Encode an image, then answer any number of prompts about it.

    Names and meanings are those of `segment_anything.SamPredictor`, and for lists of images those
    of sam2's `SAM2ImagePredictor`. Device and dtype follow the model, which is put into eval mode;
    masks are computed in float32.

    Args:
        model: see `vision.sam.create_sam`.
    """

    def __init__(self, model: RwkvSam) -> None:
        self.model = model.eval()
        self._images: list[_EncodedImage] = []
        self._is_batch = False

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def is_image_set(self) -> bool:
        """Whether there is an image, or a list of images, to predict on."""
        return bool(self._images)

    @property
    def original_size(self) -> tuple[int, int]:
        """Height and width of the image that was set."""
        return self._image().original_size

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the image as it was encoded: resized, not padded."""
        return self._image().embedding.input_size

    def reset_image(self) -> None:
        """Forget the image, or the list of images."""
        self._images = []
        self._is_batch = False

    def set_image(self, image: ImageLike, image_format: str = "RGB") -> None:
        """Encode an image, so that `predict` can be called for it.

        Args:
            image: array (H, W, 3) or tensor (3, H, W) or (H, W, 3), uint8 or floating point in
                0..1 or 0..255; Pillow image; or path. See `vision.sam.transforms.as_rgb`.
            image_format: order of the channels of an array or tensor, "RGB" or "BGR".

        Raises:
            ValueError: another shape, or values whose range is wrong or unclear. The predictor has
                no image then.
            TypeError: no image, or another dtype.
        """
        self.reset_image()
        self._images = self._encode([as_rgb(image, image_format)], batch_size=1)

    @torch.inference_mode()
    def set_torch_image(
        self, transformed_image: Tensor, original_image_size: tuple[int, int]
    ) -> None:
        """Encode an image that is resized already.

        Args:
            transformed_image: RGB, uint8 or floating point in 0..1 or 0..255, not normalised,
                (1, 3, H, W). A model that pads to a square wants `model.image_size` at the longest
                side; every other model takes any size.
            original_image_size: height and width before resizing; masks have this size, and
                coordinates are in its pixels.

        Raises:
            ValueError: another shape, or values whose range is wrong or unclear.
            TypeError: another dtype.
        """
        self.reset_image()
        shape = tuple(transformed_image.shape)
        if len(shape) != 4 or shape[:2] != (1, 3) or 0 in shape:
            raise ValueError(
                f"set_torch_image wants one RGB image (1, 3, H, W), got {shape}; set_image takes "
                "images of other forms, and set_image_batch several"
            )
        side = self.model.image_size
        if self.model.pad_to_square and max(shape[2:]) != side:
            raise ValueError(
                f"set_torch_image wants {side} pixels at the longest side, got {shape[2:]} as "
                "height and width; resize the image, or give it to set_image"
            )
        height, width = original_image_size
        pixels = transformed_image.to(self.device) * byte_scale(transformed_image)
        self._images = [_EncodedImage(self.model.encode_image(pixels), (height, width))]

    def set_image_batch(
        self, images: Sequence[ImageLike], image_format: str = "RGB", batch_size: int = 8
    ) -> None:
        """Encode several images, so that `predict_batch` can be called for them.

        Images that are padded to one size go through the encoder together.

        Args:
            images: each as for `set_image`.
            image_format: order of the channels of arrays and tensors, "RGB" or "BGR".
            batch_size: the most images in one pass of the encoder; bounds its memory.

        Raises:
            ValueError: no list of images, or what is wrong with which of them. The predictor has
                no images then.
        """
        self.reset_image()
        if not isinstance(images, list | tuple) or not images:
            got = "an empty one" if isinstance(images, list | tuple) else type(images).__name__
            raise ValueError(
                f"set_image_batch wants a list of images, got {got}; set_image takes one image"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size wants 1 or more, got {batch_size}")
        pixels = []
        for index, image in enumerate(images):
            with _naming(f"images[{index}]"):
                pixels.append(as_rgb(image, image_format))
        self._images = self._encode(pixels, batch_size)
        self._is_batch = True

    def predict(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predict the masks of one object, or of N objects at once.

        Prompts of several kinds may be mixed. They are arrays, tensors or nested lists, for one
        object, or with a first axis N; with it, also for N = 1, the results have it too.

        Args:
            point_coords: x, y in pixels of the original image, (P, 2), or (N, P, 2).
            point_labels: 1 foreground, 0 background, -1 padding, (P,), or (N, P).
            box: x0, y0, x1, y1 in pixels of the original image, (4,), or (N, 4).
            mask_input: logits (1, 4h, 4w), or (N, 1, 4h, 4w), such as the last result of an
                earlier call on this image.
            multimask_output: three masks for an ambiguous prompt, such as one point, instead of
                one; the predicted IoU tells which is best.
            return_logits: float32 logits instead of masks.

        Returns:
            Masks, bool (C, H, W) at the original size; predicted IoU (C,); and low-resolution
            logits (C, 4h, 4w) of the padded image, of which one can be the next call's
            `mask_input`. C is 3 or 1.

        Raises:
            RuntimeError: no image was set.
            ValueError: what is wrong with which prompt.
        """
        prompts = (point_coords, point_labels, box, mask_input)
        return self._predict(self._image(), prompts, multimask_output, return_logits)

    def predict_batch(
        self,
        point_coords_batch: Sequence[Any] | None = None,
        point_labels_batch: Sequence[Any] | None = None,
        box_batch: Sequence[Any] | None = None,
        mask_input_batch: Sequence[Any] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """Predict for each image of `set_image_batch`.

        Args:
            point_coords_batch: for each image what `predict` takes, or None; so are all others.
            point_labels_batch: see `point_coords_batch`.
            box_batch: see `point_coords_batch`.
            mask_input_batch: see `point_coords_batch`.
            multimask_output: as for `predict`.
            return_logits: as for `predict`.

        Returns:
            Lists, one entry an image, of masks, predicted IoU and low-resolution logits.

        Raises:
            RuntimeError: no list of images was set.
            ValueError: another number of entries than images, or what is wrong with which entry.
        """
        if not self._is_batch:
            raise RuntimeError("call set_image_batch before predict_batch; predict takes one image")
        kinds = {
            "point_coords_batch": point_coords_batch,
            "point_labels_batch": point_labels_batch,
            "box_batch": box_batch,
            "mask_input_batch": mask_input_batch,
        }
        count = len(self._images)
        for name, entries in kinds.items():
            if entries is not None and len(entries) != count:
                raise ValueError(
                    f"{name} wants an entry, or None, for each of {count} images, got "
                    f"{len(entries)}"
                )
        answers = []
        for index, image in enumerate(self._images):
            prompts = tuple(None if e is None else e[index] for e in kinds.values())
            with _naming(f"prompts of images[{index}]"):
                answers.append(self._predict(image, prompts, multimask_output, return_logits))
        masks, iou, low_res = zip(*answers, strict=True)
        return list(masks), list(iou), list(low_res)

    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the masks of N objects from tensors on the model's device.

        Args:
            point_coords: x, y in pixels of the resized image (see
                `vision.sam.transforms.scale_coords`), (N, P, 2).
            point_labels: 1 foreground, 0 background, -1 padding, (N, P).
            boxes: x0, y0, x1, y1 in pixels of the resized image, (N, 4).
            mask_input: logits (N, 1, 4h, 4w).
            multimask_output: as for `predict`.
            return_logits: as for `predict`.

        Returns:
            Masks (N, C, H, W), bool or float32; predicted IoU (N, C); low-resolution logits
            (N, C, 4h, 4w).

        Raises:
            RuntimeError: no image was set.
            ValueError: another shape, or another number of objects in one kind of prompt.
        """
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels go together; give both, or neither")
        prompts = (point_coords, point_labels, boxes, mask_input)
        return self._predict_torch(self._image(), prompts, multimask_output, return_logits)

    def get_image_embedding(self) -> Tensor:
        """Return the embedding of the image, (1, C, h, w).

        Raises:
            RuntimeError: no image was set.
        """
        # A tensor made in inference mode could not be trained on; its clone can.
        return self._image().embedding.embedding.clone()

    def save_embedding(self, path: str | os.PathLike[str]) -> None:
        """Write the encoded image, so that `load_embedding` brings it back without the encoder.

        Args:
            path: file ending in .safetensors, .pth or .pt; written whole or not at all.

        Raises:
            RuntimeError: no image was set.
            ValueError: another ending.
        """
        image = self._image()
        write_embedding(self.model, image.embedding, image.original_size, path)

    def load_embedding(self, path: str | os.PathLike[str]) -> None:
        """Set the image that `save_embedding` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: a damaged file, no file of an embedding, or one of another model or
                of other weights.
        """
        self.reset_image()
        self._images = [_EncodedImage(*read_embedding(self.model, path))]

    def _image(self) -> _EncodedImage:
        if self._is_batch:
            raise RuntimeError(
                "a list of images was set: call predict_batch, or set_image to work on one image"
            )
        if not self._images:
            raise RuntimeError("no image is set: call set_image, or load_embedding, first")
        return self._images[0]

    @torch.inference_mode()
    def _encode(self, images: Sequence[np.ndarray], batch_size: int) -> list[_EncodedImage]:
        """Encode uint8 images (H, W, 3); the result keeps their order."""
        side = self.model.image_size
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            input_size = longest_side_size(image.shape[:2], side)
            groups[self.model.padded_size(input_size)].append(index)
        encoded: dict[int, _EncodedImage] = {}
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                part = group[start : start + batch_size]
                encoded |= dict(
                    zip(part, self._encode_part([images[i] for i in part]), strict=True)
                )
        return [encoded[index] for index in range(len(images))]

    def _encode_part(self, images: Sequence[np.ndarray]) -> list[_EncodedImage]:
        """Encode images of one padded size in one pass."""
        resized = [
            torch.from_numpy(resize_longest_side(image, self.model.image_size)).to(self.device)
            for image in images
        ]
        sizes = [(x.shape[0], x.shape[1]) for x in resized]
        x = torch.cat([self.model.preprocess(x.permute(2, 0, 1)[None]) for x in resized])
        embedding = self.model.embed(x, sizes[0])
        return [
            _EncodedImage(replace(embedding[i], input_size=sizes[i]), image.shape[:2])
            for i, image in enumerate(images)
        ]

    def _predict(
        self, image: _EncodedImage, prompts: Sequence[Any], multimask_output: bool, logits: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        height, width = image.embedding.embedding.shape[-2:]
        checked = read_prompts((4 * height, 4 * width), *prompts)
        tensors = checked.tensors(image.original_size, image.embedding.input_size, self.device)
        answer = self._predict_torch(image, tensors, multimask_output, logits)
        masks, iou, low_res = (x.cpu().numpy() for x in answer)
        return (masks, iou, low_res) if checked.several else (masks[0], iou[0], low_res[0])

    @torch.inference_mode()
    def _predict_torch(
        self,
        image: _EncodedImage,
        prompts: Sequence[Tensor | None],
        multimask_output: bool,
        logits: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        coords, labels, boxes, masks = prompts
        points = None if coords is None or labels is None else (coords, labels)
        low_res, iou = self.model.predict_masks(
            image.embedding, points, boxes, masks, multimask_output
        )
        low_res = low_res.float()
        full = torch.empty(
            (*low_res.shape[:2], *image.original_size),
            dtype=torch.float32 if logits else torch.bool,
            device=low_res.device,
        )
        # One object at a time: float32 logits of all would take four times the result's memory.
        for index, one in enumerate(low_res.split(1)):
            large = self.model.upscale_masks(one, image.embedding.input_size, image.original_size)
            full[index] = large[0] if logits else large[0] > self.model.mask_threshold
        return full, iou.float(), low_res


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say which entry of a list an error is about."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what}: {error}") from error
