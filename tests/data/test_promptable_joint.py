"""Joined sets: repeats, reproducible transforms, broken samples."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from vision.data.epoch import SharedEpoch
from vision.data.image_io import ImageReadError, LabelError
from vision.data.promptable import CocoInstances, MaskPairs
from vision.data.promptable_joint import RepeatedSets, SkipBroken, TransformedSets
from vision.data.promptable_transforms import LargeScaleJitter

SIZE = (12, 16)


class Numbers:
    """Samples that hold their number, with so many masks."""

    def __init__(self, start: int, length: int, masks: int = 3) -> None:
        self.start, self.length, self.masks = start, length, masks
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        masks = np.zeros((self.masks, *SIZE), bool)
        for k in range(self.masks):
            masks[k, : k + 1] = True
        return {
            "image": np.full((*SIZE, 3), self.start + index, np.uint8),
            "masks": masks,
            "category_ids": np.arange(self.masks),
            "name": f"{self.start + index}.png",
        }


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4))
def test_repeats_follow_one_another(shape: list[tuple[int, int]]) -> None:
    sets = [Numbers(10 * k, length) for k, (length, _) in enumerate(shape)]
    joined = RepeatedSets(sets, [n for _, n in shape])
    wanted = [
        10 * k + i for k, (length, n) in enumerate(shape) for _ in range(n) for i in range(length)
    ]
    assert [int(joined[i]["image"][0, 0, 0]) for i in range(len(joined))] == wanted
    for outside in (-1, len(joined)):
        with pytest.raises(IndexError):
            joined[outside]


def test_wrong_numbers() -> None:
    sets = [Numbers(0, 2), Numbers(10, 2)]
    for repeats in ([1], [0, 1]):
        with pytest.raises(ValueError, match="2 numbers of repeats"):
            RepeatedSets(sets, repeats)
    with pytest.raises(ValueError, match="a transform for each of 2 sets"):
        TransformedSets(RepeatedSets(sets), [None])
    with pytest.raises(ValueError, match="max_masks wants 1"):
        TransformedSets(RepeatedSets(sets), [None, None], max_masks=0)
    with pytest.raises(ValueError, match="most wants 1"):
        SkipBroken(sets[0], most=0)
    with pytest.raises(ValueError, match="epoch wants 0 or more"):
        SharedEpoch().set(-1)


def test_transforms_of_sets_depend_on_epoch_and_index_alone() -> None:
    def transform(sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return {**sample, "drawn": float(rng.random())}

    inner = Numbers(10, 2)
    data = TransformedSets(RepeatedSets([Numbers(0, 3), inner], [3, 1]), [transform, None], seed=1)
    first = [data[i].get("drawn") for i in range(len(data))]
    assert len(set(first[:9])) == 9, "a repeated image wants other random numbers"
    assert first[9:] == [None, None]
    assert data[4]["drawn"] == first[4]
    data.set_epoch(1)
    assert inner.epoch == 1
    assert not set(first[:9]) & {data[i]["drawn"] for i in range(9)}
    data.set_epoch(0)
    assert [data[i].get("drawn") for i in range(len(data))] == first
    other = TransformedSets(data.joined, [transform, None], seed=2)
    assert other[0]["drawn"] != first[0]


def test_most_masks_are_drawn_anew() -> None:
    joined = RepeatedSets([Numbers(0, 1, masks=8), Numbers(1, 1, masks=3)])
    data = TransformedSets(joined, [None, None], max_masks=3)
    seen = set()
    for epoch in range(10):
        data.set_epoch(epoch)
        sample = data[0]
        rows = sample["category_ids"].tolist()
        assert rows == sorted(set(rows))
        assert sample["masks"][:, :, 0].sum(1).tolist() == [k + 1 for k in rows]
        seen.add(tuple(rows))
    assert len(seen) > 3
    assert data[1]["category_ids"].tolist() == [0, 1, 2]


def test_persistent_workers_hear_of_the_epoch() -> None:
    data = TransformedSets(RepeatedSets([Numbers(0, 4, masks=9)]), [None], max_masks=1)
    loader = DataLoader(
        data, num_workers=1, persistent_workers=True, collate_fn=lambda batch: batch[0]
    )
    for epoch in (0, 1, 2):
        data.set_epoch(epoch)
        alone = [data[i]["category_ids"].tolist() for i in range(4)]
        assert [sample["category_ids"].tolist() for sample in loader] == alone
    twin = copy.deepcopy(data)
    assert twin[0]["category_ids"].tolist() == alone[0]
    twin.set_epoch(5)
    assert int(data._epoch) == 2
    assert twin._epoch._value.is_shared()


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def pairs(folder: Path) -> MaskPairs:
    """Three pairs, each mask 4 x 6 pixels; b is to be broken."""
    mask = np.zeros(SIZE, np.uint8)
    mask[2:6, 3:9] = 255
    for name in "abc":
        write(folder / "images" / f"{name}.png", np.full((*SIZE, 3), ord(name), np.uint8))
        write(folder / "masks" / f"{name}.png", mask)
    return MaskPairs(folder / "images", folder / "masks")


def coco(folder: Path, **second: Any) -> CocoInstances:
    """Three images with an annotation each, the second as asked for."""
    objects = []
    for i in (1, 2, 3):
        write(folder / f"{i}.png", np.full((*SIZE, 3), i, np.uint8))
        whole = {"size": list(SIZE), "counts": [0, 192]}
        objects.append(
            {"id": i, "image_id": i, "segmentation": whole, **(second if i == 2 else {})}
        )
    images = [{"id": i, "file_name": f"{i}.png"} for i in (1, 2, 3)]
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": objects}))
    return CocoInstances(folder / "coco.json", folder)


def size_mismatch(folder: Path) -> Any:
    data = pairs(folder)
    write(folder / "masks" / "b.png", np.full((12, 15), 255, np.uint8))
    return data


def empty_mask(folder: Path) -> Any:
    data = pairs(folder)
    write(folder / "masks" / "b.png", np.zeros(SIZE, np.uint8))
    return data


def unreadable_image(folder: Path) -> Any:
    data = pairs(folder)
    (folder / "images" / "b.png").write_bytes(b"\x89PNG cut")
    return data


def annotation_without_image(folder: Path) -> Any:
    data = coco(folder)
    (folder / "2.png").unlink()
    return data


def run_lengths_of_another_size(folder: Path) -> Any:
    return coco(folder, segmentation={"size": [16, 12], "counts": [0, 192]})


BROKEN = [
    (size_mismatch, "LabelError", "b.png"),
    (empty_mask, "LabelError", "b.png"),
    (unreadable_image, "ImageReadError", "b.png"),
    (annotation_without_image, "ImageReadError", "2.png"),
    (run_lengths_of_another_size, "LabelError", "2.png"),
]


@pytest.mark.parametrize(("made", "kind", "name"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_sample_does_not_end_the_epoch(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    made: Callable[[Path], Any],
    kind: str,
    name: str,
) -> None:
    data = SkipBroken(made(tmp_path))
    for _ in range(2):
        samples = list(data)
        assert [s["name"] for s in samples] == [data[i]["name"] for i in (0, 2, 2)]
    assert dict(data.broken) == {kind: 1}
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert name in warnings[0]
    strict = SkipBroken(made(tmp_path), strict=True)
    assert strict[0]["name"] == samples[0]["name"]
    with pytest.raises((ImageReadError, LabelError), match=name):
        strict[1]


def test_an_image_of_crowds_alone_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = SkipBroken(coco(tmp_path, iscrowd=1))
    assert [Path(s["name"]).name for s in data] == ["1.png", "3.png"]
    assert data.dataset.left_out == {"crowd": 1, "images": 1}
    assert "2.png" in caplog.text
    assert not data.broken


def test_too_many_broken_samples_in_a_row(tmp_path: Path) -> None:
    data = pairs(tmp_path)
    for name in "bc":
        (tmp_path / "images" / f"{name}.png").unlink()
    with pytest.raises(ValueError, match=r"2 samples in a row from number 1 of 3.*c\.png") as info:
        SkipBroken(data, most=1)[1]
    assert not isinstance(info.value, ImageReadError | LabelError), "nobody may skip this one"
    assert SkipBroken(data, most=2)[1]["name"].endswith("a.png")
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(ValueError, match="3 samples in a row from number 2 of 3"):
        SkipBroken(data)[2]


def test_a_sample_that_no_transform_can_use_is_skipped(tmp_path: Path) -> None:
    data = pairs(tmp_path)
    one = np.zeros(SIZE, np.uint8)
    one[3, 3] = 255
    write(tmp_path / "masks" / "b.png", one)
    jitter = LargeScaleJitter(16, (1.0, 1.0), min_area=4)
    skipping = SkipBroken(TransformedSets(RepeatedSets([data]), [jitter]))
    assert [Path(s["name"]).stem for s in skipping] == ["a", "c", "c"]
    assert skipping.broken == {"LabelError": 1}


def test_real_sets(shared: Path) -> None:
    root = shared / "data"
    person = root / "mask_pairs" / "ccp_person" / "val"
    data = MaskPairs(person / "images", person / "masks")
    things = CocoInstances(
        root / "coco_mini" / "annotations" / "instances_val.json", root / "coco_mini" / "val"
    )
    joined = RepeatedSets([data, things], repeats=[2, 1])
    assert len(joined) == 60 + len(things)
    assert joined[0]["name"] == joined[30]["name"] == data[0]["name"]
    assert joined[60]["name"] == things[0]["name"]
    skipping = SkipBroken(joined)
    for i in range(0, len(joined), 9):
        assert skipping[i]["masks"].any((1, 2)).all()
    assert not skipping.broken
