"""Pictures for people: masks over images, and sheets of samples."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

_CAPTION_HEIGHT = 14  # of Pillow's built-in font
_GAP = 2


def palette(num_classes: int) -> np.ndarray:
    """Return distinct colours by the PASCAL VOC colour map (VOC development kit).

    The bits of the class index are dealt to the three channels in turn, highest bit of the colour
    first; class 0 is black, and no two of the first 2**24 classes share a colour.

    Returns:
        uint8 (num_classes, 3), RGB.

    Raises:
        ValueError: `num_classes` is not in 1 .. 2**24.
    """
    if not 1 <= num_classes <= 2**24:
        raise ValueError(f"palette wants 1 .. 2**24 classes, got {num_classes}")
    index = np.arange(num_classes)
    colours = np.zeros((num_classes, 3), np.uint8)
    for level in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * level + channel) & 1) << (7 - level)).astype(
                np.uint8
            )
    return colours


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    palette: np.ndarray,
    alpha: float = 0.5,
    skip: Collection[int] = (255,),
) -> np.ndarray:
    """Blend the colours of a label mask over an image.

    Args:
        image: uint8 RGB (H, W, 3).
        mask: integer labels (H, W).
        palette: uint8 RGB (num_classes, 3); see `palette`.
        alpha: weight of the colour, 0 .. 1.
        skip: labels whose pixels stay as they are; add 0 when it is background.

    Returns:
        uint8 RGB (H, W, 3), a new array.

    Raises:
        ValueError: other shapes, or a label without a colour.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image wants uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if mask.shape != image.shape[:2]:
        raise ValueError(
            f"mask wants the image's height and width {image.shape[:2]}, got "
            f"{mask.shape}; resize it with nearest neighbour"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha wants 0 .. 1, got {alpha}")
    painted = ~np.isin(mask, list(skip))
    labels = mask[painted].astype(np.int64)
    if labels.size and not 0 <= labels.min() <= labels.max() < len(palette):
        raise ValueError(
            f"labels want 0..{len(palette) - 1} (the palette) or skip={tuple(skip)}, got "
            f"{labels.min()}..{labels.max()}"
        )
    result = image.copy()
    blended = (1 - alpha) * image[painted] + alpha * palette[labels].astype(np.float32)
    result[painted] = np.rint(blended).astype(np.uint8)
    return result


def draw_sample(sample: Mapping[str, Any], alpha: float = 0.5) -> np.ndarray:
    """Draw what a sample is annotated with over its image.

    Args:
        sample: as `DigitScenes` gives it: "image" and any of "mask" (0 is left as it is), "masks",
            "boxes" and "points".

    Returns:
        uint8 RGB (H, W, 3), a new array.
    """
    picture = sample["image"]
    if "mask" in sample:
        labelled = sample["mask"][sample["mask"] != 255]
        colours = palette(int(labelled.max(initial=0)) + 1)
        picture = overlay(picture, sample["mask"], colours, alpha, skip=(0, 255))
    colours = palette(len(sample.get("labels", ())) + 1)
    for mask, colour in zip(sample.get("masks", ()), colours[1:], strict=True):
        picture = overlay(picture, mask.astype(np.uint8), np.stack([colour, colour]), alpha, (0,))
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for x0, y0, x1, y1 in sample.get("boxes", ()):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline="yellow")
    radius = 1 + min(canvas.size) // 100
    for x, y in sample.get("points", ()):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), "red", "white")
    return np.array(canvas)


def contact_sheet(
    tiles: Sequence[np.ndarray],
    captions: Sequence[str] | None = None,
    columns: int = 4,
) -> Image.Image:
    """Arrange images in rows, each with its caption below.

    Args:
        tiles: uint8 RGB (H, W, 3), sizes may differ; every cell has the largest height and width.
        captions: one for each tile; a line that is wider than the cell is cut.
        columns: tiles in a row.

    Returns:
        An RGB image; save it with `.save("sheet.png")`.

    Raises:
        ValueError: no tiles, fewer than one column, or another number of captions.
    """
    if not tiles:
        raise ValueError("contact_sheet wants at least one tile, got none")
    if columns < 1:
        raise ValueError(f"columns wants 1 or more, got {columns}")
    if captions is not None and len(captions) != len(tiles):
        raise ValueError(f"wanted a caption for each of {len(tiles)} tiles, got {len(captions)}")
    columns = min(columns, len(tiles))
    width = max(tile.shape[1] for tile in tiles) + _GAP
    height = max(tile.shape[0] for tile in tiles) + _GAP
    height += _CAPTION_HEIGHT if captions is not None else 0
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), "white")
    for index, tile in enumerate(tiles):
        cell = Image.new("RGB", (width - _GAP, height - _GAP), "white")
        cell.paste(Image.fromarray(tile), (0, 0))
        if captions is not None:
            ImageDraw.Draw(cell).text((1, tile.shape[0] + 1), captions[index], fill="black")
        row, column = divmod(index, columns)
        sheet.paste(cell, (_GAP + column * width, _GAP + row * height))
    return sheet
