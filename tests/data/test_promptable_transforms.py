"""Transforms of an image with object masks: they move together, and no mask is lost silently."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vision.data.image_io import LabelError
from vision.data.instances import box_of_mask
from vision.data.promptable import CocoInstances, MaskPairs
from vision.data.promptable_transforms import LargeScaleJitter, ResizeAndPad
from vision.data.rle import decode_rle, encode_masks

SIDE = 32
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(8, 80)
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def rectangles(height: int, width: int, count: int, seed: int) -> dict[str, Any]:
    """Random rectangles, category k the k-th, on an image that holds y and x in its pixels."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        y, x = rng.integers(0, (height - 2, width - 2))
        mask[y : y + rng.integers(2, height), x : x + rng.integers(2, width)] = True
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, height)[:, None]
    image[..., 1] = np.linspace(0, 255, width)
    return {
        "image": image,
        "masks": masks,
        "category_ids": np.arange(count),
        "name": "made.png",
        "dataset": "made",
    }


@few
@given(sides, sides, st.integers(1, 9), seeds)
def test_no_mask_is_lost_silently(height: int, width: int, count: int, seed: int) -> None:
    sample = rectangles(height, width, count, seed)
    before = {k: np.copy(v) for k, v in sample.items()}
    jitter = LargeScaleJitter(SIDE, (0.3, 3.0), min_area=4)
    try:
        found = jitter(sample, np.random.default_rng(seed))
    except LabelError:
        assert min(SIDE / height, SIDE / width) < 1
        return
    assert found["image"].shape == (SIDE, SIDE, 3)
    assert found["masks"].shape[1:] == (SIDE, SIDE)
    assert found["masks"].dtype == np.bool_
    assert (found["masks"].sum((1, 2)) >= 4).all()
    assert len(found["masks"]) == len(found["category_ids"]) > 0
    together = [*found["category_ids"].tolist(), *found["dropped"].tolist()]
    assert sorted(together) == list(range(count))
    assert found["name"] == "made.png"
    assert found["dataset"] == "made"
    for key, value in before.items():
        assert np.array_equal(sample[key], value), "the input is not to be changed"
    again = jitter(sample, np.random.default_rng(seed))
    for key in ("image", "masks", "dropped"):
        assert np.array_equal(found[key], again[key])


@few
@given(st.integers(8, SIDE), st.integers(1, 5), st.booleans(), seeds)
def test_ratio_one_without_flip_changes_nothing(
    other: int, count: int, upright: bool, seed: int
) -> None:
    height, width = (SIDE, other) if upright else (other, SIDE)
    sample = rectangles(height, width, count, seed)
    rng = np.random.default_rng(seed)
    for transform in (
        LargeScaleJitter(SIDE, (1.0, 1.0), flip=0.0, min_area=1),
        ResizeAndPad(SIDE, min_area=1, fill=(1, 2, 3)),
    ):
        found = transform(sample, rng)
        assert np.array_equal(found["image"][:height, :width], sample["image"])
        assert np.array_equal(found["masks"][:, :height, :width], sample["masks"])
        assert not found["masks"][:, height:].any()
        assert not found["masks"][:, :, width:].any()
        rest = np.concatenate(
            [found["image"][height:].reshape(-1, 3), found["image"][:, width:].reshape(-1, 3)]
        )
        assert (rest == transform.fill).all()
        assert not len(found["dropped"])


@few
@given(st.integers(1, 5), seeds)
def test_two_flips_are_none(count: int, seed: int) -> None:
    sample = rectangles(SIDE, SIDE, count, seed)
    flip = LargeScaleJitter(SIDE, (1.0, 1.0), flip=1.0, min_area=1)
    rng = np.random.default_rng(seed)
    once = flip(sample, rng)
    assert np.array_equal(once["image"], sample["image"][:, ::-1])
    assert np.array_equal(once["masks"], sample["masks"][:, :, ::-1])
    twice = flip(once, rng)
    assert np.array_equal(twice["image"], sample["image"])
    assert np.array_equal(twice["masks"], sample["masks"])


@few
@given(sides, sides, st.floats(0.4, 2.5), seeds)
def test_image_and_masks_move_together(height: int, width: int, ratio: float, seed: int) -> None:
    """A mask that the image shows in its blue channel covers the blue pixels after it all."""
    sample = rectangles(height, width, 1, seed)
    sample["image"][..., 2] = 255 * sample["masks"][0]
    jitter = LargeScaleJitter(SIDE, (ratio, ratio), flip=0.5, min_area=1, fill=(0, 0, 0))
    found = jitter(sample, np.random.default_rng(seed))
    blue, mask = found["image"][..., 2], found["masks"][0]
    # both are cut at one half; rounding may differ in the last grey level
    sure = np.abs(blue.astype(int) - 127.5) > 2
    assert np.array_equal(mask[sure], blue[sure] > 127)


def test_masks_go_where_the_coordinates_say() -> None:
    """The pixels of a mask hold the coordinates that the mask had."""
    height, width = 60, 90
    sample = rectangles(height, width, 1, 0)
    sample["masks"][:] = False
    sample["masks"][0, 20:40, 30:60] = True
    for seed in range(20):
        jitter = LargeScaleJitter(64, (0.5, 2.0), min_area=1)
        found = jitter(sample, np.random.default_rng(seed))
        inner = cv2.erode(found["masks"][0].view(np.uint8), np.ones((3, 3))).astype(bool)
        y, x = (found["image"][..., c][inner] / 255 for c in (0, 1))
        # one grey level and one pixel of the smallest image
        assert (y >= 20 / height - 0.03).all()
        assert (y <= 40 / height + 0.03).all()
        assert (x >= 30 / width - 0.03).all()
        assert (x <= 60 / width + 0.03).all()


@few
@given(sides, sides, seeds)
def test_boxes_stay_tight_and_survive_run_lengths(height: int, width: int, seed: int) -> None:
    """The box of a rectangle is the box that moved, to a pixel; it has all but the corners.

    A pixel's value is the share of its row times the share of its column, so that the row and the
    column that the rectangle covers best reach all along the box.
    """
    sample = rectangles(height, width, 3, seed)
    found = ResizeAndPad(64, min_area=1)(sample)
    scale = 64 / max(height, width)
    for row, mask in zip(found["category_ids"], found["masks"], strict=True):
        box = box_of_mask(mask)
        x0, y0, x1, y1 = box.astype(int)
        inside = mask[y0:y1, x0:x1]
        assert inside.all(0).any()
        assert inside.all(1).any()
        wanted = box_of_mask(sample["masks"][row]) * scale
        # half a pixel, and the shorter side of the image is rounded to whole ones
        assert np.abs(box - wanted).max() <= 1.01
    runs = encode_masks(torch.from_numpy(found["masks"]))
    assert np.array_equal(np.stack([decode_rle(rle) for rle in runs]), found["masks"])


def test_a_smaller_image_is_the_mean_of_its_pixels() -> None:
    """Stripes of one pixel in three are gone at a third of the size, those of two stay."""
    sample = rectangles(96, 96, 2, 0)
    sample["masks"][0] = np.arange(96) % 3 == 0
    sample["masks"][1] = np.arange(96) % 3 != 0
    found = ResizeAndPad(32)(sample)
    assert found["dropped"].tolist() == [0]
    assert found["masks"][0].all()


def test_padding_is_right_and_below_after_a_flip() -> None:
    sample = rectangles(20, 40, 1, 0)
    sample["masks"][:] = True
    found = LargeScaleJitter(40, (0.5, 0.5), flip=1.0)(sample, np.random.default_rng(0))
    assert found["masks"][0, :10, :20].all()
    assert found["masks"].sum() == 200
    assert found["image"][0, 0, 1] > 200
    assert (found["image"][~found["masks"][0]] == (124, 116, 104)).all()


def test_crops_and_ratios_vary() -> None:
    sample = rectangles(64, 64, 1, 0)
    sample["masks"][:] = True
    rng = np.random.default_rng(0)
    jitter = LargeScaleJitter(64, (0.25, 2.0))
    found = [jitter(sample, rng) for _ in range(200)]
    shares = np.sqrt([f["masks"].mean() for f in found])
    assert shares.min() < 0.35
    assert 0.4 < (shares == 1).mean() < 0.75  # ratios of 1 to 2 out of 0.25 to 2: 0.57
    large = [f["image"] for f, share in zip(found, shares, strict=True) if share == 1]
    assert len({int(image[..., 0].min()) for image in large}) > 10, "crops at many heights"
    mirrored = [int(image[0, 0, 1]) > int(image[0, -1, 1]) for image in large]
    assert 0.3 < np.mean(mirrored) < 0.7
    jitter = LargeScaleJitter(64, (1.0, 1.0), flip=0.0, colour=0.4)
    coloured = [jitter(sample, rng) for _ in range(5)]
    assert len({f["image"].tobytes() for f in coloured}) == 5
    assert all(f["masks"].all() for f in coloured)


def test_a_sample_without_a_mask_is_drawn_again() -> None:
    sample = rectangles(64, 64, 1, 0)
    sample["masks"][:] = False
    sample["masks"][0, :8, :8] = True  # few crops at twice the size hold this corner
    rng = np.random.default_rng(0)
    found = [LargeScaleJitter(64, (8.0, 8.0), flip=0.0)(sample, rng) for _ in range(30)]
    enlarged = [f["masks"].sum() > 64 for f in found]
    assert 0 < sum(enlarged) < 30, "drawn again until it is there, or not jittered at all"
    for f, large in zip(found, enlarged, strict=True):
        assert large or np.array_equal(f["masks"], sample["masks"])
    patient = LargeScaleJitter(64, (8.0, 8.0), flip=0.0, tries=1000)
    assert all(patient(sample, rng)["masks"].sum() > 64 for _ in range(3))


def test_a_sample_that_stays_empty_is_named() -> None:
    sample = rectangles(64, 64, 1, 0)
    sample["masks"][:] = False
    sample["masks"][0, 0, :31] = True
    for transform in (LargeScaleJitter(64, (1.0, 1.0)), ResizeAndPad(64)):
        with pytest.raises(LabelError, match=r"made\.png: none of 1 masks has 32 pixels"):
            transform(sample)
        with pytest.raises(LabelError, match=r"made\.png: there is no mask"):
            transform({**sample, "masks": sample["masks"][:0]})
    sample["masks"][0, 0, :32] = True
    assert ResizeAndPad(64)(sample)["masks"].sum() == 32


def test_wrong_arguments() -> None:
    sample = rectangles(16, 16, 1, 0)
    for options in (
        {"ratio": (0, 1)},
        {"ratio": (2, 1)},
        {"flip": 2},
        {"colour": -1},
        {"tries": 0},
    ):
        with pytest.raises(ValueError, match="wanted 0 < ratio"):
            LargeScaleJitter(16, **options)
    for options in ({"size": 0}, {"size": 8, "min_area": 0}):
        with pytest.raises(ValueError, match="wanted size and min_area"):
            ResizeAndPad(**options)
    for masks in (sample["masks"].astype(np.uint8), sample["masks"][0], sample["masks"][:, 1:]):
        with pytest.raises(ValueError, match=r"wanted bool masks \(N, 16, 16\)"):
            ResizeAndPad(16)({**sample, "masks": masks})


def test_real_images(shared: Path) -> None:
    root = shared / "data"
    plants = root / "mask_pairs" / "cwfid_plants" / "train"
    things = CocoInstances(
        root / "coco_mini" / "annotations" / "instances_train.json", root / "coco_mini" / "train"
    )
    for data in (MaskPairs(plants / "images", plants / "masks"), things):
        for index in range(0, len(data), len(data) // 4):
            sample = data[index]
            found = LargeScaleJitter(256)(sample, np.random.default_rng(index))
            assert len(found["masks"]) + len(found["dropped"]) == len(sample["masks"])
    leaves = MaskPairs(plants / "images", plants / "masks")[0]
    small = ResizeAndPad(256)(leaves)["masks"][0]
    share, wanted = small[:191].mean(), leaves["masks"].mean()
    assert abs(share - wanted) < 0.15 * wanted, "thin leaves keep their area"
