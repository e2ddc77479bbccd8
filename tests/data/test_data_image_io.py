"""Reading images and masks: every kind of file, and every kind of broken file."""

import contextlib
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from vision.data import ImageReadError, LabelError, list_images, read_image, read_mask


def _ramp(height: int = 40, width: int = 50) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], -1).astype(np.uint8)


def _save(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_rgb_png_comes_back_exactly(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", Image.fromarray(_ramp()))
    got = read_image(path)
    assert got.dtype == np.uint8
    assert np.array_equal(got, _ramp())
    got[0, 0] = 1  # writable: transforms work in place
    assert np.array_equal(read_image(str(path)), _ramp())


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1)])
def test_tiny_images(tmp_path: Path, size: tuple[int, int]) -> None:
    path = _save(tmp_path / "a.png", Image.new("RGB", size, (1, 2, 3)))
    assert read_image(path).tolist() == [[[1, 2, 3]] * size[0]] * size[1]


def test_greyscale_and_bilevel_have_three_equal_channels(tmp_path: Path) -> None:
    grey = _ramp()[..., 0]
    got = read_image(_save(tmp_path / "l.png", Image.fromarray(grey)))
    assert np.array_equal(got, np.repeat(grey[..., None], 3, 2))
    bits = read_image(_save(tmp_path / "1.png", Image.fromarray(grey > 100)))
    assert np.array_equal(bits[..., 1], np.where(grey > 100, 255, 0))


def test_transparency_shows_white(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = 200, 10, 10, 255
    rgba[0, 1] = 0, 0, 0, 0
    rgba[1, 0] = 0, 0, 0, 51
    got = read_image(_save(tmp_path / "a.png", Image.fromarray(rgba)))
    assert got[0, 0].tolist() == [200, 10, 10]
    assert got[0, 1].tolist() == [255, 255, 255]
    assert got[1, 0].tolist() == [204, 204, 204]


def test_palette_with_and_without_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert read_image(_save(tmp_path / "p.png", image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    got = read_image(_save(tmp_path / "t.png", image, transparency=1))
    assert got.tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_16_bit_greyscale_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    path = _save(tmp_path / "a.png", Image.fromarray(values))
    assert Image.open(path).mode.startswith("I")
    assert read_image(path)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Pillow's Transpose
    upright = Image.fromarray(_ramp(8, 16))
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[274] = orientation
    got = read_image(_save(tmp_path / "a.png", stored, exif=exif))
    assert np.array_equal(got, _ramp(8, 16))


def test_cmyk(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 16), (200, 100, 50)).convert("CMYK")
    got = read_image(_save(tmp_path / "a.jpg", image, quality=95))
    assert np.abs(got.astype(int) - [200, 100, 50]).max() <= 6


@pytest.mark.parametrize("mode", ["F", "I"])
def test_unknown_range_is_an_error(tmp_path: Path, mode: str) -> None:
    path = _save(tmp_path / "a.tif", Image.new(mode, (4, 4)))
    with pytest.raises(ImageReadError, match="range unknown"):
        read_image(path)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    ("suffix", "options"), [("jpg", {}), ("jpg", {"progressive": True}), ("png", {}), ("bmp", {})]
)
def test_truncated_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    options: dict[str, bool],
    share: float,
    lenient: bool,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = _save(tmp_path / f"cut.{suffix}", Image.fromarray(noise), **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageReadError, match=re.escape(str(path))):
        read_image(path)
    assert lenient is ImageFile.LOAD_TRUNCATED_IMAGES


def test_broken_checksum(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", Image.fromarray(_ramp()))
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 20] ^= 255
    path.write_bytes(data)
    with pytest.raises(ImageReadError, match=r"a\.png"):
        read_image(path)


def test_not_an_image(tmp_path: Path) -> None:
    text = tmp_path / "text.png"
    text.write_text("class,label\n")
    with pytest.raises(ImageReadError, match=r"text\.png: wanted an image.*12 bytes.*class,label"):
        read_image(text)
    empty = tmp_path / "empty.jpg"
    empty.touch()
    with pytest.raises(ImageReadError, match="an empty file"):
        read_image(empty)


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_missing_file_and_directory(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(ImageReadError, match=r"nowhere\.png.*No such file.*check the path"):
        read(tmp_path / "nowhere.png")
    with pytest.raises(ImageReadError, match="got a directory"):
        read(tmp_path)


def test_read_error_is_no_os_error() -> None:
    """Loops that skip a sample on OSError, as timm's, must not swallow it."""
    assert issubclass(ImageReadError, ValueError)
    assert not issubclass(ImageReadError, OSError)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_gives_an_image_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    Image.fromarray(_ramp(12, 9)).save(buffer, kind)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(damaged)
    with contextlib.suppress(ImageReadError):
        got = read_image(path)
        assert got.dtype == np.uint8
        assert got.ndim == 3


def test_masks_keep_their_indices(tmp_path: Path) -> None:
    labels = np.array([[0, 3], [10, 255]], np.uint8)
    assert np.array_equal(read_mask(_save(tmp_path / "l.png", Image.fromarray(labels)), 11), labels)
    coloured = Image.fromarray(labels).convert("P")
    coloured.putpalette(list(range(256)) * 3)
    got = read_mask(_save(tmp_path / "p.png", coloured), 11)
    assert np.array_equal(got, labels)
    assert got.dtype == np.uint8
    wide = np.array([[0, 300, 65535]], np.uint16)
    got = read_mask(_save(tmp_path / "w.png", Image.fromarray(wide)), 301, ignore_index=65535)
    assert got.tolist() == wide.tolist()
    assert got.dtype == np.int32
    bits = read_mask(_save(tmp_path / "1.png", Image.fromarray(labels > 5)), 2)
    assert bits.tolist() == [[0, 0], [1, 1]]


def test_wrong_labels_are_named(tmp_path: Path) -> None:
    labels = np.array([[0, 3, 11], [10, 255, 12]], np.uint8)
    path = _save(tmp_path / "mask.png", Image.fromarray(labels))
    with pytest.raises(
        LabelError, match=r"mask\.png: wanted labels 0\.\.10 \(11 .*got 11, 12 in 2"
    ):
        read_mask(path, num_classes=11)
    with pytest.raises(LabelError, match="got 255 in 1"):
        read_mask(path, num_classes=13, ignore_index=0)
    assert np.array_equal(read_mask(path), labels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colour_mask(tmp_path: Path, mode: str) -> None:
    path = _save(tmp_path / "mask.png", Image.new(mode, (4, 4)))
    with pytest.raises(ImageReadError, match=f"got a {mode} image; map its colours"):
        read_mask(path)


def test_jpeg_mask(tmp_path: Path) -> None:
    path = _save(tmp_path / "mask.jpg", Image.new("L", (4, 4)))
    with pytest.raises(ImageReadError, match="got a JPEG"):
        read_mask(path)


def test_list_images(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("b/z.JPG", "b/a.png", "c.webp", "a.txt", ".hidden.png", "b/._z.JPG"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    names = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)]
    assert names == [os.path.join("b", "a.png"), os.path.join("b", "z.JPG"), "c.webp"]


def test_list_images_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got nothing at .*gone"):
        list_images(tmp_path / "gone")
    with pytest.raises(ValueError, match="found none"):
        list_images(tmp_path)
    file = tmp_path / "a.png"
    file.touch()
    with pytest.raises(ValueError, match="got a file"):
        list_images(file)


def test_camvid(shared: Path) -> None:
    root = shared / "data" / "camvid"
    masks = list_images(root / "ann_dir" / "val")
    images = list_images(root / "img_dir" / "val")
    assert len(masks) == len(images) == 101
    for path in masks[::20]:
        mask = read_mask(path, num_classes=11)
        assert mask.shape == (360, 480)
        assert set(np.unique(mask)) <= {*range(11), 255}
    assert read_image(images[0]).shape == (360, 480, 3)


def test_camvid_with_too_few_classes(shared: Path) -> None:
    path = list_images(shared / "data" / "camvid" / "ann_dir" / "val")[0]
    with pytest.raises(LabelError, match=re.escape(path.name)):
        read_mask(path, num_classes=3)


def test_coco_greyscale_image(shared: Path) -> None:
    paths = list_images(shared / "data" / "coco_mini" / "train")
    grey = [path for path in paths if Image.open(path).mode == "L"]
    assert len(grey) == 1
    image = read_image(grey[0])
    assert image.shape[2] == 3
    assert np.array_equal(image[..., 0], image[..., 2])
