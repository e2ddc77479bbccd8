"""Images of every form on their way to 8-bit RGB."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vision.data import ImageReadError
from vision.sam.transforms import as_rgb


def _picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "form",
    [
        lambda a, _: Image.fromarray(a),
        lambda a, _: torch.from_numpy(a),
        lambda a, _: torch.from_numpy(a).permute(2, 0, 1),
        lambda a, _: a.astype(np.float64) / 255,
        lambda a, _: a.astype(np.float32),
        lambda a, _: torch.from_numpy(a).permute(2, 0, 1) / 255,
        lambda a, _: np.asfortranarray(a),
        lambda a, folder: folder / "a.png",
        lambda a, folder: str(folder / "a.png"),
    ],
)
def test_image_forms(form: Any, tmp_path: Path) -> None:
    picture = _picture()
    Image.fromarray(picture).save(tmp_path / "a.png")
    np.testing.assert_array_equal(as_rgb(form(picture, tmp_path)), picture)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA"])
def test_pillow_modes(mode: str) -> None:
    image = Image.fromarray(_picture()).convert(mode)
    np.testing.assert_array_equal(as_rgb(image), np.array(image.convert("RGB")))


def test_transparent_pillow_image_lies_on_white() -> None:
    image = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    assert (as_rgb(image) == 255).all()


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 5), np.uint8), "greyscale"),
        (np.zeros((3, 4, 5), np.uint8), "transpose"),
        (np.zeros((4, 5, 4), np.uint8), "fourth channel"),
        (np.zeros((2, 4, 5, 3), np.uint8), "set_image_batch"),
        (np.zeros((4, 5, 2), np.uint8), r"wants \(H, W, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), "at least one pixel"),
        (torch.zeros(4, 5), "greyscale"),
        (torch.zeros(1, 3, 4, 5), "set_image_batch"),
        (torch.zeros(2, 4, 5), r"\(3, H, W\) or \(H, W, 3\)"),
        (np.full((4, 5, 3), np.nan), "NaN"),
        (np.full((4, 5, 3), np.inf), "infinity"),
        (np.full((4, 5, 3), -0.5), "mean and standard deviation"),
        (np.full((4, 5, 3), 300.0), r"300\.\.300"),
        (np.full((4, 5, 3), 1.5), "may be either"),
        (torch.full((3, 4, 5), 1.01), "may be either"),
        (Image.new("F", (4, 5)), "mode 'F'"),
        (Image.new("I;16", (4, 5)), "8-bit"),
        (Image.new("RGB", (0, 5)), "at least one pixel"),
    ],
)
def test_wrong_images(image: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        as_rgb(image)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 5, 3), np.int64), "int64.*uint8"),
        (np.zeros((4, 5, 3), bool), "bool"),
        (torch.zeros(3, 4, 5, dtype=torch.int32), "int32"),
        ([[0, 0, 0]], "list"),
        (None, "NoneType"),
    ],
)
def test_things_that_are_no_images(image: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        as_rgb(image)


def test_image_format_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'RGB' or 'BGR', got 'rgb'"):
        as_rgb(_picture(), "rgb")
    for image in (Image.fromarray(_picture()), tmp_path / "a.png"):
        with pytest.raises(ValueError, match="leave it out"):
            as_rgb(image, "BGR")
    with pytest.raises(ImageReadError, match=r"a\.png"):
        as_rgb(tmp_path / "a.png")
