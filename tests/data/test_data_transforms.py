"""timm's and albumentations' transforms on samples."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vision.data import AlbumentationsTransform, ClassificationTransform, DigitScenes

FLIPS = [{"type": "HorizontalFlip"}, {"type": "VerticalFlip"}]


def _scene(size: int | tuple[int, int] = (48, 64)) -> dict[str, Any]:
    return DigitScenes("promptable", size=size)[0]


def test_validation_transform_is_resize_crop_normalise() -> None:
    sample = {"image": np.full((40, 60, 3), 51, np.uint8), "label": 3}
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 0.2)
    got = ClassificationTransform(False, (24, 32), mean, std)(sample)
    assert got["label"] == 3
    assert got["image"].shape == (3, 24, 32)
    want = (0.2 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(got["image"].amax((1, 2)), want)
    torch.testing.assert_close(got["image"].amin((1, 2)), want)
    assert sample["image"].shape == (40, 60, 3)


def test_train_transform_varies_and_follows_the_seed() -> None:
    transform = ClassificationTransform(
        True, 24, auto_augment="rand-m9-mstd0.5", re_prob=0.5, interpolation="bicubic"
    )
    sample = DigitScenes("classification", size=32)[0]

    def run() -> list[torch.Tensor]:
        import random

        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return [transform(sample)["image"] for _ in range(3)]

    first, second = run(), run()
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])
    assert first[0].shape == (3, 24, 24)


@pytest.mark.parametrize("option", ["repob", "is_training", "separate", "use_prefetcher"])
def test_unknown_option(option: str) -> None:
    with pytest.raises(TypeError, match=f"is called '{option}'"):
        ClassificationTransform(True, 32, **{option: True})


def test_close_option_is_offered() -> None:
    with pytest.raises(TypeError, match="did you mean re_prob"):
        ClassificationTransform(True, 32, repob=0.1)


@pytest.mark.parametrize(
    ("configs", "error", "message"),
    [
        ([{"type": "HorizontalFlop"}], ValueError, "'HorizontalFlop'; did you mean HorizontalFlip"),
        ([{"type": "cv2"}], ValueError, "transform of albumentations"),
        ([{"type": "OneOf", "transforms": [{"type": "Blurr"}]}], ValueError, "did you mean Blur"),
        (
            [{"type": "Blur", "blur_limt": 3}],
            TypeError,
            "argument of Blur .*did you mean blur_limit",
        ),
        (
            [{"type": "Sequential", "transforms": [{"type": "Rotate", "angle": 3}]}],
            TypeError,
            "argument of Rotate is called 'angle'",
        ),
        ([{"type": "OneOf", "transform": []}], TypeError, "did you mean transforms"),
        ([{"type": "ToTensorV2", "dtype": 1}], TypeError, "argument of ToTensorV2"),
        ([{"type": "Blur", "blur_limit": "x"}], ValueError, "blur_limit"),
        ([{"p": 1}], ValueError, "a dict with 'type'"),
        (["Blur"], ValueError, "a dict with 'type', got 'Blur'"),
    ],
)
def test_wrong_config(configs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AlbumentationsTransform(configs)


def test_flip_moves_everything_together() -> None:
    sample = {**_scene(), "mask": np.arange(48 * 64).reshape(48, 64) % 7, "name": "a"}
    got = AlbumentationsTransform([{"type": "HorizontalFlip", "p": 1}])(sample)
    assert got["name"] == "a"
    assert np.array_equal(got["image"], sample["image"][:, ::-1])
    assert np.array_equal(got["mask"], sample["mask"][:, ::-1])
    assert np.array_equal(got["masks"], sample["masks"][:, :, ::-1])
    x0, y0, x1, y1 = sample["boxes"].T
    assert np.array_equal(got["boxes"], np.stack([64 - x1, y0, 64 - x0, y1], 1))
    assert np.array_equal(got["labels"], sample["labels"])
    for key in sample.keys() - {"name"}:
        assert got[key].dtype == sample[key].dtype


def test_lost_instances_leave_every_key() -> None:
    sample = _scene(96)
    transform = AlbumentationsTransform(
        [{"type": "Crop", "x_min": 0, "y_min": 0, "x_max": 40, "y_max": 48}]
    )
    got = transform(sample)
    left = sample["masks"][:, :48, :40]
    keep = left.any(axis=(1, 2))
    assert 0 < keep.sum() < len(keep)
    assert np.array_equal(got["masks"], left[keep])
    assert np.array_equal(got["labels"], sample["labels"][keep])
    for mask, box, (x, y) in zip(
        got["masks"], got["boxes"], got["points"].astype(int), strict=True
    ):
        ys, xs = np.nonzero(mask)
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert mask[y, x]


def test_no_instance_left_and_again() -> None:
    sample = _scene(96)
    sample["masks"][:, :8, :8] = False
    transform = AlbumentationsTransform(
        [{"type": "Crop", "x_min": 0, "y_min": 0, "x_max": 8, "y_max": 8}]
    )
    for _ in range(2):
        sample = transform(sample)
        assert sample["masks"].shape == (0, 8, 8)
        assert sample["boxes"].shape == (0, 4)
        assert sample["points"].shape == (0, 2)
        assert sample["labels"].shape == (0,)


@pytest.mark.parametrize("key", ["boxes", "bboxes"])
def test_boxes_without_masks(key: str) -> None:
    sample = {
        "image": np.zeros((20, 30, 3), np.uint8),
        key: np.array([[1, 2, 5, 9], [20, 10, 29, 19], [8, 8, 12, 12]], np.float32),
        "labels": np.array([7, 8, 9]),
    }
    crop = {"type": "Crop", "x_min": 0, "y_min": 0, "x_max": 10, "y_max": 10}
    got = AlbumentationsTransform([crop])(sample)
    assert got[key].dtype == np.float32
    np.testing.assert_allclose(got[key], [[1, 2, 5, 9], [8, 8, 10, 10]], atol=1e-4)
    assert got["labels"].tolist() == [7, 9]
    flipped = AlbumentationsTransform([{"type": "HorizontalFlip", "p": 1}])(sample)
    np.testing.assert_allclose(flipped[key][0], [25, 2, 29, 9], atol=1e-4)


@pytest.mark.filterwarnings("error")
def test_boxes_stay_under_colour_transforms() -> None:
    sample = {"image": np.zeros((20, 30, 3), np.uint8), "boxes": np.array([[1.0, 2, 5, 9]])}
    got = AlbumentationsTransform([{"type": "Blur", "p": 1}])(sample)
    np.testing.assert_allclose(got["boxes"], sample["boxes"], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bboxes": np.zeros((1, 4))}, "under one name"),
        ({"labels": np.zeros(99)}, "same number of instances .*'labels': 99"),
        ({"masks": None}, "points want the masks"),
    ],
)
def test_inconsistent_samples(change: dict[str, Any], message: str) -> None:
    sample = {k: v for k, v in {**_scene(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        AlbumentationsTransform(FLIPS)(sample)


def test_nested_compositions() -> None:
    transform = AlbumentationsTransform(
        [
            {"type": "RandomCrop", "height": 32, "width": 40},
            {
                "type": "OneOf",
                "p": 1,
                "transforms": [
                    {"type": "Sequential", "transforms": FLIPS, "p": 1},
                    {"type": "SomeOf", "n": 1, "transforms": [{"type": "Blur"}, {"type": "CLAHE"}]},
                ],
            },
            {"type": "ToTensorV2"},
        ]
    )
    got = transform(_scene())
    assert got["image"].shape == (3, 32, 40)
    assert isinstance(got["image"], torch.Tensor)
    assert got["masks"].shape[1:] == (32, 40)


def test_random_choices_follow_torch_and_are_independent() -> None:
    transform = AlbumentationsTransform(FLIPS)
    mask = np.arange(4, dtype=np.uint8).reshape(2, 2)
    sample = {"image": np.zeros((2, 2, 3), np.uint8), "mask": mask}

    def run(seed: int) -> list[tuple[int, ...]]:
        torch.manual_seed(seed)
        return [tuple(transform(sample)["mask"].ravel().tolist()) for _ in range(200)]

    first = run(0)
    assert first == run(0)
    assert first != run(1)
    # Two flips with chances of a half: four outcomes, each about 50 times.
    counts = {outcome: first.count(outcome) for outcome in set(first)}
    assert len(counts) == 4
    assert min(counts.values()) > 25


class _Flipped(Dataset):
    """Which way each of 40 images was flipped."""

    def __init__(self) -> None:
        self.transform = AlbumentationsTransform(FLIPS)
        # Both workers inherit whatever state a first call left.
        self[0]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        image = np.zeros((2, 2, 3), np.uint8)
        mask = np.arange(4, dtype=np.uint8).reshape(2, 2)
        return int(self.transform({"image": image, "mask": mask})["mask"][0, 0])


def test_workers_differ_and_runs_repeat() -> None:
    dataset = _Flipped()

    def run() -> list[int]:
        torch.manual_seed(3)
        loader = DataLoader(dataset, batch_size=1, num_workers=2)
        return [int(value) for value in loader]

    first = run()
    assert first == run()
    assert first[0::2] != first[1::2]  # the two workers take turns


def test_import_is_light(repo_root: Path) -> None:
    """`vision.data` pulls in no heavy package of its own, and a transform asks no network."""
    code = (
        "import sys, vision, os; before = set(sys.modules); import vision.data as d\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "assert not new & {'timm', 'albumentations', 'sklearn', 'cv2', 'torchvision'}, new\n"
        "d.AlbumentationsTransform([{'type': 'Blur'}])\n"
        "assert os.environ['NO_ALBUMENTATIONS_UPDATE'] == '1'\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NO_ALBUMENTATIONS_UPDATE"}
    environment["PYTHONPATH"] = str(repo_root)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
