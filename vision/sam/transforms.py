"""Images and coordinates on their way into the frame that the model sees."""

import os
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision.data.image_io import on_white, read_image

ImageLike = np.ndarray | Image.Image | Tensor | str | os.PathLike[str]
ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)

# An image in 0..255 whose brightest value lies below this would look black; one in 0..1 whose
# values overshoot (bicubic resizing, sharpening) stays below it.
_LEAST_BYTE_MAXIMUM = 16


def longest_side_size(original_size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the height and width, at least 1, of an image resized to `side` at its longest."""
    scale = side / max(original_size)
    height, width = (max(1, int(length * scale + 0.5)) for length in original_size)
    return height, width


def resize_longest_side(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image so that its longest side has `side` pixels, as segment-anything does.

    Bilinear with antialiasing (Pillow's): exactly what SAM's image encoders were trained on.

    Args:
        image: uint8 (H, W, 3).

    Returns:
        uint8 (h, w, 3), a new array; see `longest_side_size`.
    """
    height, width = longest_side_size(image.shape[:2], side)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized)


def scale_coords(
    coords: ArrayT, original_size: tuple[int, int], input_size: tuple[int, int]
) -> ArrayT:
    """Move points from the original image into the resized one; swap the sizes to move back.

    Args:
        coords: x, y in pixels, (..., 2).
        original_size: height and width.
        input_size: height and width.

    Returns:
        (..., 2), floating point; integers become float64 (numpy) or float32 (torch).
    """
    x = coords[..., 0] * (input_size[1] / original_size[1])
    y = coords[..., 1] * (input_size[0] / original_size[0])
    if isinstance(coords, Tensor):
        return torch.stack([x, y], dim=-1)
    return np.stack([x, y], axis=-1)


def scale_boxes(
    boxes: ArrayT, original_size: tuple[int, int], input_size: tuple[int, int]
) -> ArrayT:
    """Move boxes from the original image into the resized one; see `scale_coords`.

    Args:
        boxes: x0, y0, x1, y1 in pixels, (..., 4).
    """
    corners = boxes.reshape(*boxes.shape[:-1], 2, 2)
    return scale_coords(corners, original_size, input_size).reshape(boxes.shape)


def as_rgb(image: ImageLike, image_format: str = "RGB") -> np.ndarray:
    """Bring whatever a caller calls an image to 8-bit RGB.

    Args:
        image: path of an image file (see `vision.data.read_image`); Pillow image with 8-bit
            channels, transparent pixels blended over white, EXIF orientation not applied; array
            (H, W, 3); or tensor (3, H, W) or (H, W, 3). Arrays and tensors are uint8, or
            floating point in 0..1 or 0..255.
        image_format: order of the channels of an array or tensor, "RGB" or "BGR".

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: another shape, an empty image, or values whose range is wrong or unclear.
        TypeError: something else than an image, or another dtype.
    """
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"image_format wants 'RGB' or 'BGR', got {image_format!r}")
    if isinstance(image, np.ndarray | Tensor):
        pixels = _channels_last(image)
        if image_format == "BGR":
            pixels = pixels[..., ::-1]
        return np.ascontiguousarray(_as_bytes(pixels))
    if image_format != "RGB":
        raise ValueError(
            f"image_format={image_format!r} is for arrays and tensors; files and Pillow images "
            "say themselves how their channels lie: leave it out"
        )
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image).expanduser())
    raise TypeError(
        "an image is a numpy array (H, W, 3), a Pillow image, a torch tensor (3, H, W) or a path, "
        f"got {type(image).__name__}"
    )


def byte_scale(pixels: np.ndarray | Tensor) -> float:
    """Return what brings the pixels to 0..255: 255 for floating point in 0..1, else 1.

    Raises:
        ValueError: not finite, outside of 0..255, or neither surely 0..1 nor surely 0..255.
        TypeError: neither uint8 nor floating point.
    """
    floating = (
        pixels.is_floating_point()
        if isinstance(pixels, Tensor)
        else np.issubdtype(pixels.dtype, np.floating)
    )
    if not floating:
        if pixels.dtype in (np.uint8, torch.uint8):
            return 1.0
        raise TypeError(
            f"an image wants uint8, or floating point in 0..1 or 0..255, got {pixels.dtype}; "
            "scale it to 0..255 and convert it to uint8"
        )
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite((low, high)).all():
        raise ValueError("an image wants finite values, got NaN or infinity; clean it first")
    if low < 0 or high > 255:
        raise ValueError(
            f"a floating-point image wants values in 0..1 or 0..255, got {low:.4g}..{high:.4g}; "
            "give it as it was before mean and standard deviation were applied, or clip it"
        )
    if 1 < high < _LEAST_BYTE_MAXIMUM:
        raise ValueError(
            "a floating-point image wants values in 0..1 or 0..255, and "
            f"{low:.4g}..{high:.4g} may be either; clip it to 0..1, or convert it to uint8"
        )
    return 255.0 if high <= 1 else 1.0


def _channels_last(image: np.ndarray | Tensor) -> np.ndarray:
    """Check the shape of an array or tensor; (H, W, 3)."""
    shape = tuple(image.shape)
    if 0 in shape:
        raise ValueError(f"an image wants at least one pixel, got {shape}")
    if isinstance(image, Tensor):
        if len(shape) != 3 or 3 not in (shape[0], shape[2]):
            raise _wrong_shape("a tensor image wants (3, H, W) or (H, W, 3)", shape)
        image = image.detach().cpu()
        image = image.permute(1, 2, 0) if shape[0] == 3 else image
        return (image.float() if image.is_floating_point() else image).numpy()
    if len(shape) != 3 or shape[2] != 3:
        raise _wrong_shape("an array image wants (H, W, 3)", shape)
    return image


def _wrong_shape(wanted: str, shape: tuple[int, ...]) -> ValueError:
    advice = "give one RGB image"
    if len(shape) == 2:
        advice = "a greyscale image: repeat it three times along a new last axis"
    elif len(shape) == 4:
        advice = "a batch: give one image, or a list of images to set_image_batch"
    elif len(shape) == 3 and shape[0] == 3:
        advice = "channels come last: use image.transpose(1, 2, 0)"
    elif len(shape) == 3 and 4 in (shape[0], shape[2]):
        advice = "drop the fourth channel, or give a Pillow image"
    return ValueError(f"{wanted}, got {shape}; {advice}")


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    scale = byte_scale(pixels)
    return pixels if pixels.dtype == np.uint8 else np.rint(pixels * scale).astype(np.uint8)


def _from_pillow(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise ValueError(f"an image wants at least one pixel, got {image.size} (width, height)")
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(
            f"a Pillow image wants 8-bit channels, got mode {image.mode!r}, whose range is "
            "unknown; scale it to 0..255 and convert it to 'L' or 'RGB', or give a file's path"
        )
    return on_white(image)
