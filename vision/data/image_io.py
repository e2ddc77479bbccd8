"""Read images and label masks from files, and say what is wrong when it does not work."""

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

# What Pillow raises on files that are no image, are cut off or have a broken checksum.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_T = TypeVar("_T")


class ImageReadError(ValueError):
    """A file that should hold an image cannot be read as one.

    It is no OSError on purpose: loops that skip samples on OSError would hide it.
    """


class LabelError(ValueError):
    """A mask or an annotation holds a label outside of the classes."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an image file as 8-bit RGB.

    Accepts what Pillow reads: 8-bit RGB, greyscale, bilevel, palette, CMYK, YCbCr, and 16-bit
    greyscale, whose full range 0..65535 becomes 0..255. Transparent pixels are blended over white.
    The EXIF orientation is applied. Of an animation the first frame is read.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ImageReadError: no such file, a directory, not an image, truncated, or floating-point or
            32-bit pixels, whose range is unknown.
    """
    return _with_file(path, "an image file", lambda file: decode_image(file, str(path)))


def decode_image(file: BinaryIO, name: str) -> np.ndarray:
    """Read an image from an open binary file, for example a member of a tar file.

    Args:
        file: at its start, seekable.
        name: what error messages call it.

    Returns:
        uint8 (H, W, 3), RGB; see `read_image`.

    Raises:
        ImageReadError: see `read_image`.
    """
    decoded = _decode(file, name)
    try:
        image = ImageOps.exif_transpose(decoded)
    except _DECODE_ERRORS as error:
        raise ImageReadError(
            f"{name}: wanted readable EXIF data, got {error}; remove the EXIF data"
        ) from error
    if image.mode.startswith("I;16") or (image.mode == "I" and decoded.format == "PNG"):
        grey = np.asarray(image).astype(np.uint32)
        grey = ((grey + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ImageReadError(
            f"{name}: wanted 8-bit pixels or 16-bit greyscale, got Pillow mode {image.mode!r} "
            "(32 bits, range unknown); scale it and save it as 8-bit PNG"
        )
    return on_white(image)


def on_white(image: Image.Image) -> np.ndarray:
    """Return a Pillow image of 8-bit channels as uint8 RGB (H, W, 3), blended over white."""
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def read_mask(
    path: str | os.PathLike[str], num_classes: int | None = None, ignore_index: int = 255
) -> np.ndarray:
    """Read a label mask: one class index a pixel, from a greyscale or palette image.

    Pixels come as they are stored; an EXIF orientation is not applied.

    Args:
        num_classes: labels must be 0 .. num_classes - 1, or `ignore_index`; None: not checked.
        ignore_index: the label of pixels without a class.

    Returns:
        (H, W), uint8, or int32 for 16-bit files. Bilevel files give 0 and 1.

    Raises:
        ImageReadError: unreadable (see `read_image`), a colour image, or a JPEG, whose compression
            changes labels.
        LabelError: a label is neither a class nor `ignore_index`.
    """
    name = str(path)
    image = _with_file(path, "a mask file", lambda file: _decode(file, name))
    if image.format in ("JPEG", "MPO"):
        raise ImageReadError(
            f"{name}: wanted a losslessly stored label mask, got a JPEG, which changes labels near "
            "edges; save masks as PNG"
        )
    if image.mode not in ("1", "L", "P", "I;16", "I;16B", "I;16L", "I"):
        raise ImageReadError(
            f"{name}: wanted a mask with one class index a pixel (greyscale or palette PNG), got "
            f"a {image.mode} image; map its colours to class indices 0, 1, ... first"
        )
    mask = np.array(image)
    mask = mask.astype(np.uint8 if image.mode in ("1", "L", "P") else np.int32)
    if num_classes is not None:
        check_labels(mask, num_classes, ignore_index, name)
    return mask


def check_labels(mask: np.ndarray, num_classes: int, ignore_index: int, name: str) -> None:
    """Check that every label is a class or `ignore_index`.

    Args:
        mask: integers of any shape.
        name: what the error message calls the mask.

    Raises:
        LabelError: names the wrong labels.
    """
    wrong = (mask != ignore_index) & ((mask < 0) | (mask >= num_classes))
    if wrong.any():
        values = np.unique(mask[wrong])
        shown = ", ".join(str(v) for v in values[:10]) + (", ..." if len(values) > 10 else "")
        raise LabelError(
            f"{name}: wanted labels 0..{num_classes - 1} ({num_classes} classes) or "
            f"{ignore_index} (ignored), got {shown} in {int(wrong.sum())} of {mask.size} pixels; "
            "raise num_classes, set ignore_index, or map the labels to class indices"
        )


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """List the image files of a folder and of its subfolders, sorted by path.

    Files count by suffix (`IMAGE_SUFFIXES`, in either case); names that begin with a dot do not.

    Raises:
        ValueError: the folder is missing, is a file, or holds no image.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "a file" if root.exists() else "nothing"
        raise ValueError(f"wanted a folder of images, got {what} at {root}; check the path")
    found = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "." and path.is_file()
    )
    if not found:
        raise ValueError(
            f"wanted images ({', '.join(IMAGE_SUFFIXES)}) in {root} or its subfolders, found none"
        )
    return found


def _with_file(path: str | os.PathLike[str], wanted: str, read: Callable[[BinaryIO], _T]) -> _T:
    """Open `path` and read it; a path that is no file becomes an ImageReadError."""
    place = Path(path)
    if place.is_dir():
        raise ImageReadError(
            f"{place}: wanted {wanted}, got a directory; name one file, or use list_images"
        )
    try:
        file = place.open("rb")
    except OSError as error:
        raise ImageReadError(
            f"{place}: wanted {wanted}, cannot open it ({error.strerror}); check the path and its "
            f"permissions, seen from {Path.cwd()}"
        ) from error
    with file:
        return read(file)


def _decode(file: BinaryIO, name: str) -> Image.Image:
    """Decode all pixels, also when another library allowed Pillow to pad truncated files."""
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Image.open(file)
        image.load()
    except _DECODE_ERRORS as error:
        raise ImageReadError(
            f"{name}: wanted an image that Pillow can read (JPEG, PNG, WebP, TIFF, ...), got "
            f"{_describe(file)} ({error}); replace or remove it"
        ) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    return image


def _describe(file: BinaryIO) -> str:
    if file.closed:
        return "an unreadable file"
    start = file.seek(0) or file.read(16)
    size = file.seek(0, os.SEEK_END)
    return f"{size} bytes that begin with {start!r}" if size else "an empty file"
