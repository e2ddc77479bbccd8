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
from vision.data.promptable import CocoInstances, MaskPairs, PanopticPngs
from vision.data.rle import decode_rle, polygons_to_rle
from vision.data.sa1b import Sa1b


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
    assert sample["dataset"] == pairs.name
    assert MaskPairs(pairs / "images", pairs / "masks", name="DIS")[0]["dataset"] == "DIS"
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


def test_a_mask_without_image_is_counted(pairs: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert MaskPairs(pairs / "images", pairs / "masks").left_out["masks"] == 0
    assert not caplog.records
    write_image(pairs / "masks" / "lone.png", grey=255)
    data = MaskPairs(pairs / "images", pairs / "masks")
    assert len(data) == 2
    assert data.left_out["masks"] == 1
    assert "lone.png" in caplog.text


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


def test_coco_in_every_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = CocoInstances(made(tmp_path, coco()), tmp_path, min_area=10)
    assert len(data) == 1
    assert "coco.json: 2.png" in caplog.text, "an image of crowds alone is named"
    assert data[0]["dataset"] == tmp_path.name
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
    for broken in (None, {"size": [12, 16]}, {"counts": [192]}, 3):
        with pytest.raises(LabelError, match=r"1\.png, annotation 9: wanted polygons or run"):
            first(broken)[0]
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


IDS = (7, 300, 70_000, 256**2 * 200 + 256 * 100 + 50, 9, 10)


def panoptic(folder: Path, **changes: Any) -> Path:
    """An image of 5 columns, one a segment: 3 things, stuff and a crowd; one of a crowd alone."""
    ids = np.repeat(np.array(IDS[:5]), 2)[None].repeat(6, 0)  # (6, 10)
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1).astype(np.uint8)
    for name in ("1", "2"):
        write_image(folder / "images" / f"{name}.jpg", (6, 10))
        (folder / "pngs").mkdir(exist_ok=True)
        Image.fromarray(colours).save(folder / "pngs" / f"{name}.png")
    segments = [
        {"id": i, "category_id": c, "iscrowd": int(i == 9), "area": 12}
        for i, c in zip(IDS[:5], (1, 1, 2, 3, 1), strict=True)
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)],
        "annotations": [
            {"image_id": 1, "file_name": "1.png", "segments_info": segments},
            {"image_id": 2, "file_name": "2.png", "segments_info": segments[4:]},
        ],
        "categories": [{"id": c, "isthing": int(c < 3)} for c in (1, 2, 3)],
        **changes,
    }
    (folder / "panoptic.json").write_text(json.dumps(content))
    return folder / "panoptic.json"


def of_panoptic(folder: Path, **options: Any) -> PanopticPngs:
    return PanopticPngs(folder / "panoptic.json", folder / "images", folder / "pngs", **options)


def test_panoptic_pngs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    panoptic(tmp_path)
    data = of_panoptic(tmp_path, name="COCONut")
    assert len(data) == 1
    assert dict(data.left_out) == {"stuff": 1, "crowd": 2, "images": 1}
    assert "panoptic.json: 2.jpg" in caplog.text
    sample = data[0]
    assert sample["dataset"] == "COCONut"
    assert sample["name"].endswith("1.jpg")
    assert sample["category_ids"].tolist() == [1, 1, 2]
    wanted = np.zeros((3, 6, 10), bool)
    for k in range(3):
        wanted[k, :, 2 * k : 2 * k + 2] = True
    assert np.array_equal(sample["masks"], wanted)
    everything = of_panoptic(tmp_path, things_only=False)
    assert everything[0]["masks"].sum((1, 2)).tolist() == [12] * 4
    assert everything[0]["dataset"] == "images"
    with pytest.raises(IndexError):
        everything[1]
    assert of_panoptic(tmp_path, min_area=13).left_out["small"] == 3


def test_broken_panoptic_files_are_named(tmp_path: Path) -> None:
    def changed(**changes: Any) -> PanopticPngs:
        panoptic(tmp_path, **changes)
        return of_panoptic(tmp_path)

    info = {"id": IDS[5], "category_id": 1}
    entry = {"image_id": 1, "file_name": "1.png", "segments_info": [info]}
    with pytest.raises(LabelError, match=r"1\.png: no pixel .* 1 of 1 segments, ids 10"):
        changed(annotations=[entry])[0]
    with pytest.raises(LabelError, match=r"lost\.png: .*cannot open.* \(segments of 1\.jpg\)"):
        changed(annotations=[{**entry, "file_name": "lost.png"}])[0]
    with pytest.raises(ValueError, match=r"panoptic\.json has annotations without segments_info"):
        changed(annotations=[{"image_id": 1}])
    with pytest.raises(ValueError, match=r"panoptic\.json: no category has isthing"):
        changed(categories=[])
    with pytest.raises(ValueError, match="does not list, ids 5"):
        changed(annotations=[{**entry, "image_id": 5}])
    data = changed()
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(tmp_path / "pngs" / "1.png")
    with pytest.raises(LabelError, match=r"1\.png: wanted a mask of 6 x 10 .* got 6 x 9"):
        data[0]
    (tmp_path / "images" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ImageReadError, match=r"1\.jpg"):
        data[0]


def sa1b(folder: Path, count: int = 6) -> Path:
    """Two images of 12 x 16 pixels, mask k of (k + 1) * 12 pixels, and two files alone."""
    annotations = []
    for k in range(count):
        mask = np.zeros((12, 16), np.uint8, order="F")
        mask[:, : k + 1] = 1
        rle = coco_mask.encode(mask)
        rle["counts"] = rle["counts"].decode()
        annotations.append({"id": k, "segmentation": rle, "area": 12 * (k + 1)})
    for name in ("sa_1", "part/sa_2", "sa_lone"):
        write_image(folder / f"{name}.jpg")
    for name in ("sa_1", "part/sa_2", "sa_stray"):
        content = {"image": {"file_name": f"{name}.jpg"}, "annotations": annotations}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_sa1b(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def areas(data: Sa1b) -> list[int]:
        return data[1]["masks"].sum((1, 2)).tolist()

    data = Sa1b(sa1b(tmp_path))
    assert len(data) == 2
    assert data.left_out == {"images": 1, "annotations": 1}
    assert "sa_lone.jpg" in caplog.text
    assert "sa_stray.json" in caplog.text
    sample = data[1]
    assert sample["name"].endswith("sa_1.jpg")
    assert sample["dataset"] == tmp_path.name
    assert areas(data) == [12, 24, 36, 48, 60, 72]
    assert areas(Sa1b(tmp_path, max_masks=2, largest=True)) == [72, 60]
    assert areas(Sa1b(tmp_path, min_area=48 / 192)) == [48, 60, 72]
    drawn = Sa1b(tmp_path, max_masks=2, seed=3)
    epochs = []
    for epoch in range(8):
        drawn.set_epoch(epoch)
        epochs.append(tuple(areas(drawn)))
        assert len(epochs[-1]) == len(set(epochs[-1])) == 2
    assert len(set(epochs)) > 2
    drawn.set_epoch(0)
    assert tuple(areas(drawn)) == epochs[0]


def test_broken_sa1b_files_are_named(tmp_path: Path) -> None:
    data = Sa1b(sa1b(tmp_path))
    with pytest.raises(LabelError, match=r"sa_1\.json: none of 6 masks covers 0\.9 of"):
        Sa1b(tmp_path, min_area=0.9)[1]
    with pytest.raises(ValueError, match="wanted min_area"):
        Sa1b(tmp_path, min_area=32)
    rle = {"size": [16, 12], "counts": [192]}
    for text, message in (
        ('{"annotations": [', "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"image": {}}', "KeyError"),
        ('{"annotations": [{"id": 1}]}', "KeyError"),
        ('{"annotations": []}', "none of 0 masks"),
        (json.dumps({"annotations": [{"id": 8, "area": 9, "segmentation": rle}]}), "8: wanted run"),
    ):
        (tmp_path / "sa_1.json").write_text(text)
        with pytest.raises(LabelError, match=rf"sa_1\.json.*{message}"):
            data[1]
    (tmp_path / "sa_1.jpg").write_bytes(b"")
    with pytest.raises(ImageReadError, match=r"sa_1\.jpg"):
        data[1]
    alone = tmp_path / "alone"
    write_image(alone / "a.jpg")
    with pytest.raises(ValueError, match="none of 1 images has a JSON file"):
        Sa1b(alone)


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
    areas = {a["id"]: a["area"] for _, objects in things.objects for a in objects}
    for i in (0, len(things) - 1):
        found = things[i]["masks"].sum((1, 2)).tolist()
        assert found == [areas[a["id"]] for a in things.objects[i][1]]
