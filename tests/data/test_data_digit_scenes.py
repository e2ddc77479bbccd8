"""DigitScenes: determinism, disjoint splits, and annotations that agree with each other."""

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from vision.data import DigitScenes
from vision.data.digit_scenes import PHOTO_COLUMNS, digits_of_split, photos_of_split

TASKS = ["classification", "segmentation", "promptable"]


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("task", TASKS)
def test_sample_depends_on_its_index_only(task: str, split: str) -> None:
    dataset = DigitScenes(task, split, (40, 56))
    forward = [dataset[i] for i in range(5)]
    other = DigitScenes(task, split, (40, 56))
    backward = [other[i] for i in reversed(range(5))][::-1]
    assert all(map(_equal, forward, backward))
    assert _equal(dataset[2], forward[2])
    assert not _equal(forward[0], forward[1])
    assert not np.array_equal(
        DigitScenes(task, split, (40, 56), seed=1)[0]["image"], forward[0]["image"]
    )


@pytest.mark.parametrize("task", TASKS)
def test_epochs(task: str) -> None:
    train, val = DigitScenes(task, "train", 32), DigitScenes(task, "val", 32)
    first, fixed = train[3], val[3]
    train.set_epoch(1)
    val.set_epoch(1)
    assert not np.array_equal(train[3]["image"], first["image"])
    assert _equal(val[3], fixed)
    train.set_epoch(0)
    assert _equal(train[3], first)
    with pytest.raises(ValueError, match="epoch wants 0 or more"):
        train.set_epoch(-1)


def test_copies_are_equal_and_keep_their_own_epoch() -> None:
    dataset = DigitScenes("promptable", size=32)
    dataset.set_epoch(2)
    for twin in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset))):
        assert _equal(twin[0], dataset[0])
        twin.set_epoch(3)
        assert dataset.epoch == 2


def _first(batch: list[dict[str, Any]]) -> dict[str, Any]:
    return batch[0]


@pytest.mark.parametrize("copied", [False, True])
def test_workers_make_the_same_scenes_and_see_the_epoch(copied: bool) -> None:
    dataset = DigitScenes("classification", size=16, length=6)
    if copied:
        dataset = copy.deepcopy(dataset)
    options: dict[str, Any] = {"batch_size": 1, "collate_fn": _first}
    loader = DataLoader(dataset, num_workers=2, persistent_workers=True, **options)
    for epoch in range(2):  # the workers of the first epoch live on
        dataset.set_epoch(epoch)
        here = DigitScenes("classification", size=16, length=6)
        here.set_epoch(epoch)
        assert all(_equal(a, here[i]) for i, a in enumerate(loader))


def test_splits_share_no_digit() -> None:
    train, _, train_values = digits_of_split("train")
    val, _, val_values = digits_of_split("val")
    assert (len(train), len(val)) == (1437, 360)
    assert sorted([*train, *val]) == list(range(1797))
    share = np.bincount(val_values) / (np.bincount(val_values) + np.bincount(train_values))
    assert np.abs(share - 0.2).max() < 0.01  # stratified


def test_splits_share_no_pixel_of_the_photographs() -> None:
    columns = [set(range(640)[PHOTO_COLUMNS[split]]) for split in ("train", "val")]
    assert not columns[0] & columns[1]
    for split, seen in zip(("train", "val"), columns, strict=True):
        assert [photo.shape for photo in photos_of_split(split)] == [(427, len(seen), 3)] * 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_backgrounds_come_from_their_own_part(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paint the other split's part of the photographs red; nothing red may show."""
    import sklearn.datasets

    photos = [np.zeros((427, 640, 3), np.uint8) for _ in range(2)]
    for photo in photos:
        photo[:, PHOTO_COLUMNS["val" if split == "train" else "train"], 0] = 255
    monkeypatch.setattr(
        sklearn.datasets, "load_sample_images", lambda: type("Bunch", (), {"images": photos})
    )
    photos_of_split.cache_clear()
    dataset = DigitScenes("segmentation", split, (700, 96))  # higher than a photograph
    backgrounds = [dataset._background(np.random.default_rng(i)) for i in range(20)]
    photos_of_split.cache_clear()
    assert not any(background.any() for background in backgrounds)


@pytest.mark.parametrize(("split", "count"), [("train", 1437), ("val", 360)])
def test_classification_shows_every_digit_once(split: str, count: int) -> None:
    dataset = DigitScenes("classification", split, 8)
    assert len(dataset) == count
    labels = [sample["label"] for sample in dataset]
    assert labels == digits_of_split(split)[2].tolist()
    assert dataset.classes == tuple("0123456789")


def test_digit_is_upright_and_in_place() -> None:
    """At 8 px, without rotation, the coverage is the digit itself."""
    dataset = DigitScenes(
        "segmentation", size=8, num_digits=(1, 1), scale=(1, 1), rotation=0, background="plain"
    )
    _, digits, values = digits_of_split("train")
    for i in range(50):
        want = np.where(digits[i] >= 0.5, values[i] + 1, 0)
        assert np.array_equal(dataset[i]["mask"], want)


def test_mask_follows_what_is_seen() -> None:
    """On a plain background, pixels far from the background's colour are those of the mask."""
    dataset = DigitScenes("segmentation", size=128, background="plain", num_digits=(1, 1))
    for i in range(10):
        sample = dataset[i]
        difference = np.abs(sample["image"].astype(int) - sample["image"][0, 0]).max(axis=2)
        seen = difference > difference.max() / 2
        assert (seen != (sample["mask"] > 0)).mean() < 0.003


def test_contrast_holds() -> None:
    dataset = DigitScenes(
        "segmentation", size=64, num_digits=(1, 1), background="plain", contrast=(0.25, 0.5)
    )
    for i in range(50):
        sample = dataset[i]
        inside = sample["image"][sample["mask"] > 0].mean()
        outside = sample["image"][0, 0].mean()
        assert abs(inside - outside) > 0.15 * 255  # edges are half covered


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(8, 120),
    width=st.integers(8, 120),
    seed=st.integers(0, 2**63),
    index=st.integers(0, 359),
    split=st.sampled_from(["train", "val"]),
    most=st.integers(1, 20),
    rotation=st.floats(0, 180),
)
def test_annotations_agree(
    height: int, width: int, seed: int, index: int, split: str, most: int, rotation: float
) -> None:
    options: dict[str, Any] = {
        "split": split,
        "size": (height, width),
        "seed": seed,
        "num_digits": (1, most),
        "rotation": rotation,
    }
    sample = DigitScenes("promptable", **options)[index]
    scene = DigitScenes("segmentation", **options)[index]
    masks, labels = sample["masks"], sample["labels"]
    assert np.array_equal(sample["image"], scene["image"])
    assert sample["image"].shape == (height, width, 3)
    assert sample["image"].dtype == np.uint8
    assert masks.dtype == np.bool_
    assert scene["mask"].dtype == np.uint8
    assert 1 <= len(masks) <= most
    assert len(masks) == len(sample["boxes"]) == len(sample["points"]) == len(labels)
    assert masks.sum(axis=0).max() <= 1  # later digits cover earlier ones
    assert np.array_equal((masks * labels[:, None, None]).sum(axis=0), scene["mask"])
    assert labels[0] == digits_of_split(split)[2][index] + 1
    for mask, (x0, y0, x1, y1), (x, y) in zip(
        masks, sample["boxes"].astype(int), sample["points"].astype(int), strict=True
    ):
        ys, xs = np.nonzero(mask)
        assert (x0, y0, x1, y1) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert mask[y, x]


def test_overlapped_instances_stay_visible() -> None:
    """Painting one digit more leaves the required share of every earlier one."""
    options: dict[str, Any] = {"size": 64, "scale": (0.5, 0.9), "length": 20}
    alone = DigitScenes("promptable", num_digits=(1, 1), min_visible=0.6, **options)
    crowded = DigitScenes("promptable", num_digits=(9, 9), min_visible=0.6, **options)
    overlaps = 0
    for i in range(20):
        whole, visible = alone[i]["masks"][0], crowded[i]["masks"][0]
        assert not (visible & ~whole).any()
        assert visible.sum() >= 0.6 * whole.sum()
        overlaps += int(visible.sum() < whole.sum())
    assert overlaps > 5


def test_points_of_val_are_most_interior() -> None:
    sample = DigitScenes("promptable", "val", 96)[0]
    for mask, (x, y) in zip(sample["masks"], sample["points"].astype(int), strict=True):
        padded = np.pad(mask, 1)
        depth = np.zeros(mask.shape, int)
        while padded[1:-1, 1:-1].any():  # peel the 4-connected border
            depth += padded[1:-1, 1:-1]
            inner = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1]
            padded = np.pad(inner & padded[1:-1, :-2] & padded[1:-1, 2:], 1)
        assert depth[y, x] >= depth.max() - 1


def test_transform_gets_the_sample() -> None:
    dataset = DigitScenes("classification", size=8, transform=lambda s: (s["image"].shape, "x"))
    assert dataset[0] == ((8, 8, 3), "x")


def test_length_beyond_the_digits() -> None:
    dataset = DigitScenes("classification", "val", 16, length=400)
    assert dataset[0]["label"] == dataset[360]["label"]
    assert not np.array_equal(dataset[0]["image"], dataset[360]["image"])
    assert _equal(dataset[-1], dataset[399])
    with pytest.raises(IndexError):
        dataset[400]


def test_4096_px() -> None:
    sample = DigitScenes("segmentation", size=4096, num_digits=(2, 3))[0]
    assert sample["image"].shape == (4096, 4096, 3)
    assert sample["mask"].shape == (4096, 4096)
    assert 1 <= len(np.unique(sample["mask"])) - 1 <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "detection"}, "no task 'detection'; there are classification"),
        ({"split": "test"}, "no split 'test'; there are train, val"),
        ({"background": "sea"}, "no background 'sea'"),
        ({"size": 7}, "at least 8 px, got 7"),
        ({"size": (1, 100)}, r"at least 8 px, got \(1, 100\)"),
        ({"size": -8}, "at least 8 px"),
        ({"length": 0}, "at least 1 sample, got 0"),
        ({"length": -5}, "at least 1 sample, got -5"),
        ({"seed": -1}, "seed wants 0 or more"),
        ({"num_digits": (-1, 3)}, "num_digits wants 1"),
        ({"num_digits": (4, 3)}, "num_digits wants 1"),
        ({"num_digits": (1, 256)}, "num_digits wants 1"),
        ({"scale": (0.2, 1.5)}, "scale wants 0"),
        ({"contrast": (0.2, 0.8)}, "contrast wants 0"),
        ({"rotation": -3}, "rotation wants 0"),
        ({"min_visible": 2}, "min_visible wants 0"),
        ({"task": "classification", "num_digits": (1, 2)}, "classification shows one digit"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitScenes(**{"task": "segmentation", **options})
