"""Data sets of single objects: real files, made-up ones, and broken ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.path import Path as Polygon
from PIL import Image
from pycocotools import mask as coco_mask

from vision.data.image_io import ImageReadError, LabelError
from vision.data.promptable import CocoInstances, MaskPairs, RepeatedSets
from vision.data.rle import decode_rle, polygons_to_rle


def write_image(path: Path, size: tuple[int, int] = (12, 16), grey: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    if grey is not None:
        pixels = np.zeros(size, np.uint8)
        pixels[2:6, 3:9] = grey
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for name in ("a", "sub/b"):
        write_image(tmp_path / "images" / f"{name}.jpg")
        write_image(tmp_path / "masks" / f"{name}.png", grey=255)
    return tmp_path


def test_mask_pairs(pairs: Path) -> None:
    data = MaskPairs(pairs / "images", pairs / "masks")
    assert len(data) == 2
    sample = data[1]
    assert sample["name"].endswith("b.jpg")
    assert sample["image"].shape == (12, 16, 3)
    assert sample["masks"].shape == (1, 12, 16)
    assert sample["masks"].sum() == 24
    assert sample["masks"][0, 2:6, 3:9].all()
    write_image(pairs / "masks" / "a.png", grey=128)
    with pytest.raises(LabelError, match=r"a\.png: no pixel is above 128"):
        data[0]
    assert MaskPairs(pairs / "images", pairs / "masks", threshold=127)[0]["masks"].any()


def test_broken_pairs_are_named(pairs: Path) -> None:
    write_image(pairs / "masks" / "a.png", size=(12, 15), grey=255)
    data = MaskPairs(pairs / "images", pairs / "masks")
    with pytest.raises(LabelError, match=r"a\.png: wanted a mask of 12 x 16"):
        data[0]
    (pairs / "images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ImageReadError, match=r"a\.jpg"):
        data[0]
    (pairs / "masks" / "sub" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images .* have no mask .*: sub/b"):
        MaskPairs(pairs / "images", pairs / "masks")


def coco(**changes: Any) -> dict[str, Any]:
    """Two images, an object in each of the three forms, a crowd, and a small one."""
    mask = np.zeros((12, 16), np.uint8)
    mask[2:6, 3:9] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    compressed = {"size": [12, 16], "counts": rle["counts"].decode()}
    counts = [38, *([4, 8] * 5), 4, 192 - 38 - 44 - 20]
    base = {"image_id": 1, "category_id": 7, "area": 24, "iscrowd": 0}
    annotations = [
        {**base, "id": 1, "segmentation": compressed},
        {**base, "id": 2, "segmentation": {"size": [12, 16], "counts": counts}, "area": 23},
        {**base, "id": 3, "segmentation": [[3, 2, 9, 2, 9, 6, 3, 6]], "area": 22},
        {**base, "id": 4, "segmentation": compressed, "iscrowd": 1},
        {**base, "id": 5, "segmentation": [[0, 0, 2, 0, 2, 2]], "area": 2},
        {**base, "id": 6, "image_id": 2, "segmentation": compressed, "iscrowd": 1},
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": 12, "width": 16} for i in (1, 2)]
    return {"images": images, "annotations": annotations, **changes}


def made(folder: Path, content: Any) -> Path:
    for name in ("1.png", "2.png"):
        write_image(folder / name)
    (folder / "coco.json").write_text(json.dumps(content))
    return folder / "coco.json"


def test_coco_in_every_form(tmp_path: Path) -> None:
    data = CocoInstances(made(tmp_path, coco()), tmp_path, min_area=10)
    assert len(data) == 1
    assert dict(data.left_out) == {"crowd": 2, "small": 1, "images": 1}
    sample = data[0]
    assert sample["name"].endswith("1.png")
    assert sample["category_ids"].tolist() == [7, 7, 7]
    wanted = np.zeros((12, 16), bool)
    wanted[2:6, 3:9] = True
    for mask in sample["masks"]:
        assert np.array_equal(mask, wanted)
    fewer = CocoInstances(tmp_path / "coco.json", tmp_path, max_masks=2)
    assert len(fewer[0]["masks"]) == 2
    assert len(CocoInstances(tmp_path / "coco.json", tmp_path)[0]["masks"]) == 4


def test_broken_annotations_are_named(tmp_path: Path) -> None:
    def first(segmentation: Any) -> CocoInstances:
        annotation = {"id": 9, "image_id": 1, "segmentation": segmentation, "area": 5}
        return CocoInstances(made(tmp_path, coco(annotations=[annotation])), tmp_path)

    with pytest.raises(LabelError, match=r"1\.png, annotation 9: wanted run lengths of 12 x 16"):
        first({"size": [16, 12], "counts": [192]})[0]
    with pytest.raises(LabelError, match=r"annotation 9: the mask is empty"):
        first({"size": [12, 16], "counts": [192]})[0]
    with pytest.raises(ValueError, match="counts >= 0 that add up to 192"):
        first({"size": [12, 16], "counts": [100]})[0]
    with pytest.raises(ValueError, match="at least three points"):
        first([[1, 2, 3, 4]])[0]
    stray = coco(annotations=[{"id": 1, "image_id": 5, "segmentation": []}])
    with pytest.raises(ValueError, match="does not list, ids 5"):
        CocoInstances(made(tmp_path, stray), tmp_path)
    with pytest.raises(ValueError, match="lacks annotations"):
        CocoInstances(made(tmp_path, {"images": []}), tmp_path)
    with pytest.raises(ValueError, match="wanted a COCO annotation file"):
        CocoInstances(tmp_path / "lost.json", tmp_path)
    (tmp_path / "cut.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"cut\.json"):
        CocoInstances(tmp_path / "cut.json", tmp_path)
    data = CocoInstances(made(tmp_path, coco()), tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ImageReadError, match=r"1\.png"):
        data[0]


def test_polygons_hold_the_pixels_inside() -> None:
    points = [(3.0, 2.0), (30.0, 5.0), (22.0, 28.0), (6.0, 20.0)]
    y, x = np.mgrid[:32, :40]
    centres = np.stack([x + 0.5, y + 0.5], -1).reshape(-1, 2)
    inside = Polygon(points).contains_points(centres).reshape(32, 40)
    found = decode_rle(polygons_to_rle([[v for p in points for v in p]], (32, 40)))
    assert (found & inside).sum() / (found | inside).sum() > 0.95  # the edge pixels may differ
    twice = polygons_to_rle([[0, 0, 4, 0, 4, 4, 0, 4], [2, 0, 6, 0, 6, 4, 2, 4]], (8, 8))
    assert decode_rle(twice).sum() == 24


def test_real_sets(shared: Path) -> None:
    root = shared / "data"
    person = root / "mask_pairs" / "ccp_person" / "val"
    pairs = MaskPairs(person / "images", person / "masks")
    things = CocoInstances(
        root / "coco_mini" / "annotations" / "instances_val.json", root / "coco_mini" / "val"
    )
    assert len(pairs) == 30
    assert things.left_out["crowd"] == 2
    joined = RepeatedSets([pairs, things], repeats=[2, 1])
    assert len(joined) == 60 + len(things)
    assert joined[0]["name"] == joined[30]["name"] == pairs[0]["name"]
    assert joined[60]["name"] == things[0]["name"]
    areas = {a["id"]: a["area"] for _, objects in things.objects for a in objects}
    for i in (0, len(things) - 1):
        found = things[i]["masks"].sum((1, 2)).tolist()
        assert found == [areas[a["id"]] for a in things.objects[i][1]]
    with pytest.raises(IndexError):
        joined[len(joined)]
    with pytest.raises(ValueError, match="2 numbers of repeats"):
        RepeatedSets([pairs, things], repeats=[0, 1])
