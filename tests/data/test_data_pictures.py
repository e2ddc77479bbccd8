"""Overlays and contact sheets."""

import numpy as np
import pytest

from vision.data import DigitScenes, contact_sheet, draw_sample, overlay, palette


def test_palette_is_pascal_vocs_and_distinct() -> None:
    # The first colours as published with PASCAL VOC: background, aeroplane, bicycle, bird, boat.
    assert palette(5).tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert palette(21)[20].tolist() == [0, 64, 128]  # tvmonitor
    assert len(np.unique(palette(5000), axis=0)) == 5000
    with pytest.raises(ValueError, match="got 0"):
        palette(0)


def test_overlay_blends_by_class_and_skips() -> None:
    image = np.full((1, 4, 3), 100, np.uint8)
    mask = np.array([[0, 1, 255, 2]])
    colours = np.array([[0, 0, 0], [200, 0, 0], [0, 0, 101]], np.uint8)
    got = overlay(image, mask, colours, alpha=0.25)
    assert got.tolist() == [[[75, 75, 75], [125, 75, 75], [100] * 3, [75, 75, 100]]]
    assert image.tolist() == [[[100] * 3] * 4]
    assert overlay(image, mask, colours, skip=(0, 255))[0, 0].tolist() == [100] * 3
    assert np.array_equal(overlay(image, mask, colours, alpha=0), image)


@pytest.mark.parametrize(
    ("image", "mask", "alpha", "message"),
    [
        (np.zeros((2, 2)), np.zeros((2, 2), int), 0.5, "image wants uint8"),
        (np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3), int), 0.5, "resize it"),
        (np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 9), 0.5, "got 9..9"),
        (np.zeros((2, 2, 3), np.uint8), np.full((2, 2), -1), 0.5, "got -1..-1"),
        (np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), int), 2.0, "alpha wants"),
    ],
)
def test_overlay_refuses(image: np.ndarray, mask: np.ndarray, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(image, mask, palette(3), alpha)


@pytest.mark.parametrize("task", ["classification", "segmentation", "promptable"])
def test_draw_sample(task: str) -> None:
    sample = DigitScenes(task, size=48)[0]
    before = sample["image"].copy()
    drawn = draw_sample(sample)
    assert drawn.shape == (48, 48, 3)
    assert np.array_equal(sample["image"], before)
    assert np.array_equal(drawn, before) == (task == "classification")
    if task == "segmentation":
        assert np.array_equal(
            (drawn != before).any(axis=2) & (sample["mask"] == 0), drawn[..., 0] < 0
        )
    if task == "promptable":
        x, y = sample["points"][0].astype(int)
        assert drawn[y, x].tolist() == [255, 0, 0] or len(sample["points"]) > 1


def test_contact_sheet_places_tiles() -> None:
    tiles = [np.full((10, 20, 3), (50 * i, 0, 0), np.uint8) for i in range(5)]
    sheet = np.array(contact_sheet(tiles, columns=2))
    assert sheet.shape == (3 * 12 + 2, 2 * 22 + 2, 3)
    for i in range(5):
        row, column = divmod(i, 2)
        assert sheet[2 + 12 * row + 5, 2 + 22 * column + 5].tolist() == [50 * i, 0, 0]
    assert sheet[-3, -3].tolist() == [255, 255, 255]


def test_contact_sheet_captions() -> None:
    tiles = [np.full((10, 40, 3), 255, np.uint8), np.full((20, 40, 3), 255, np.uint8)]
    plain = np.array(contact_sheet(tiles))
    named = np.array(contact_sheet(tiles, ["three", "eight"]))
    assert named.shape[0] > plain.shape[0]
    assert (plain == 255).all()
    assert named.min() < 128


def test_contact_sheet_refuses() -> None:
    tile = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="at least one tile"):
        contact_sheet([])
    with pytest.raises(ValueError, match="a caption for each of 1 tiles, got 2"):
        contact_sheet([tile], ["a", "b"])
    with pytest.raises(ValueError, match="columns wants 1"):
        contact_sheet([tile], columns=0)
