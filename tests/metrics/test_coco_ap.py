"""COCO's AP against pycocotools, and boundary AP against its definition."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vision.data.coco_file import read_coco
from vision.data.rle import decode_rle, encode_masks
from vision.metrics import mask_boundary
from vision.metrics.coco_ap import _boundary_rle, mask_ap

SUMMARY = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


@pytest.fixture(scope="module")
def coco(shared: Path) -> dict[str, Any]:
    return read_coco(shared / "data/coco_mini/annotations/instances_val.json")


@pytest.fixture(scope="module")
def perturbed(coco: dict[str, Any]) -> list[dict[str, Any]]:
    """Masks moved by a few pixels, some twice, some of another category, some left out."""
    rng = np.random.default_rng(0)
    results = []
    for annotation in coco["annotations"]:
        mask = decode_rle(annotation["segmentation"])
        for _ in range(rng.integers(0, 3)):
            moved = np.roll(mask, rng.integers(-4, 5, 2), (0, 1))
            kind = annotation["category_id"] if rng.random() < 0.9 else 1
            results.append(detection(annotation["image_id"], kind, rng.random(), moved))
    return results


def detection(image: int, category: int, score: float, mask: np.ndarray) -> dict[str, Any]:
    rle = encode_masks(torch.from_numpy(mask[None]))[0]
    return {"image_id": image, "category_id": category, "score": score, "segmentation": rle}


def official(coco: dict[str, Any], results: list[dict[str, Any]], judge: type) -> np.ndarray:
    """The twelve numbers that pycocotools prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(coco)
        truth.createIndex()
        found = judge(truth, truth.loadRes(copy.deepcopy(results)), "segm")
        found.evaluate()
        found.accumulate()
        found.summarize()
    return found.stats


class BoundaryByDefinition(COCOeval):
    """One pair of masks at a time."""

    def computeIoU(self, imgId: int, catId: int) -> Any:
        truth = self._gts[imgId, catId]
        found = sorted(self._dts[imgId, catId], key=lambda d: -d["score"])[:100]
        iou = np.zeros((len(found), len(truth)))
        for i, d in enumerate(found):
            for j, g in enumerate(truth):
                a, b = (coco_mask.decode(x["segmentation"]).astype(bool) for x in (d, g))
                both = (a & b).sum()
                if g["iscrowd"]:
                    iou[i, j] = both / a.sum()
                else:
                    c, e = (mask_boundary(torch.from_numpy(x)).numpy() for x in (a, b))
                    iou[i, j] = min(both / (a | b).sum(), (c & e).sum() / (c | e).sum())
        return iou if len(found) and len(truth) else []


def test_without_the_boundary_it_is_pycocotools(
    coco: dict[str, Any], perturbed: list[dict[str, Any]]
) -> None:
    before = copy.deepcopy(coco)
    wanted = official(coco, perturbed, COCOeval)
    found = mask_ap(coco, perturbed)
    assert 20 < found["AP"] < 90
    assert [found[name] for name in SUMMARY] == [100 * value for value in wanted[:6]]
    assert found["AR"] == 100 * wanted[8]
    assert coco == before
    assert mask_ap(coco, perturbed) == found


def test_boundary_is_the_definition(coco: dict[str, Any], perturbed: list[dict[str, Any]]) -> None:
    known = {image["id"] for image in coco["images"][:20]}
    coco = {
        **coco,
        "images": [i for i in coco["images"] if i["id"] in known],
        "annotations": [a for a in coco["annotations"] if a["image_id"] in known],
    }
    perturbed = [one for one in perturbed if one["image_id"] in known]
    assert any(a["iscrowd"] for a in coco["annotations"])
    wanted = official(coco, perturbed, BoundaryByDefinition)
    found = mask_ap(coco, perturbed, boundary_ratio=0.02)
    assert [found[name] for name in SUMMARY] == pytest.approx(100 * wanted[:6], abs=1e-9)
    assert found["AP"] < mask_ap(coco, perturbed)["AP"] - 2
    # A band as wide as the image is the mask itself.
    assert mask_ap(coco, perturbed, boundary_ratio=1.0) == mask_ap(coco, perturbed)


def test_a_crowd_keeps_the_mask_iou() -> None:
    crowd, single = np.zeros((2, 60, 60), bool)
    crowd[:, 10:] = True
    single[20:40, 20:40] = True  # in the crowd: IoU 1, and no boundary in common
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "area": 3000, "iscrowd": 1}
    other = {"id": 2, "image_id": 1, "category_id": 1, "area": 100, "iscrowd": 0}
    corner = np.zeros((60, 60), bool)
    corner[:10, :10] = True
    masks = encode_masks(torch.from_numpy(np.stack([crowd, corner])))
    coco = {
        "images": [{"id": 1, "height": 60, "width": 60}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {**annotation, "segmentation": masks[0]},
            {**other, "segmentation": masks[1]},
        ],
    }
    results = [detection(1, 1, 0.9, single), detection(1, 1, 0.5, corner)]
    # What lies in the crowd is ignored, and no false positive before the other one.
    assert mask_ap(coco, results, boundary_ratio=0.02)["AP"] == pytest.approx(100)
    coco["annotations"][0]["iscrowd"] = 0
    assert mask_ap(coco, results, boundary_ratio=0.02)["AP"] < 50


def test_boundaries_of_parts_are_those_of_the_image() -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 40), (33, 21)):
        for share in (0.0, 0.3, 0.97, 1.0):
            mask = torch.from_numpy(rng.random((height, width)) < share)
            rle = encode_masks(mask[None])[0]
            band = coco_mask.decode(_boundary_rle(rle, 0.05)).astype(bool)
            d = max(1, round(0.05 * (height**2 + width**2) ** 0.5))
            padded = np.pad(mask.numpy(), d)
            inner = np.lib.stride_tricks.sliding_window_view(padded, (2 * d + 1, 2 * d + 1))
            assert np.array_equal(band, mask.numpy() & ~inner.all((2, 3)))


def test_true_masks_get_everything_and_none_nothing(coco: dict[str, Any]) -> None:
    perfect = [
        {**{k: a[k] for k in ("image_id", "category_id", "segmentation")}, "score": 1.0}
        for a in coco["annotations"]
        if not a["iscrowd"]
    ]
    for ratio in (None, 0.02):
        assert mask_ap(coco, perfect, ratio)["AP"] == pytest.approx(100)
        assert mask_ap(coco, [], ratio)["AP"] == 0


def test_max_dets_cuts_the_worst_scores(coco: dict[str, Any]) -> None:
    image = coco["annotations"][0]["image_id"]
    true = [a for a in coco["annotations"] if a["image_id"] == image and not a["iscrowd"]]
    target = decode_rle(true[0]["segmentation"])
    one = {**coco, "annotations": true[:1]}
    wrong = [detection(image, true[0]["category_id"], 0.9, ~target) for _ in range(150)]
    results = [*wrong, detection(image, true[0]["category_id"], 0.1, target)]
    assert mask_ap(one, results)["AR"] == 0
    assert mask_ap(one, results, max_dets=300)["AR"] == 100
    # LVIS writes no iscrowd.
    bare = {k: v for k, v in true[0].items() if k != "iscrowd"}
    found = mask_ap({**one, "annotations": [bare]}, results, max_dets=300)
    assert found == pytest.approx(mask_ap(one, results, max_dets=300), nan_ok=True)


def test_wrong_calls_are_named(coco: dict[str, Any], tmp_path: Path) -> None:
    good = detection(coco["images"][0]["id"], 1, 0.5, np.ones((5, 5), bool))
    with pytest.raises(ValueError, match="1 values of image_id that the annotations lack: -3"):
        mask_ap(coco, [{**good, "image_id": -3}])
    with pytest.raises(ValueError, match="category_id that the annotations lack: 12345"):
        mask_ap(coco, [{**good, "category_id": 12345}])
    with pytest.raises(ValueError, match="detection 1 of 2 lacks score and segmentation"):
        mask_ap(coco, [good, {"image_id": 1, "category_id": 1}])
    with pytest.raises(ValueError, match="a list of detections, got dict"):
        mask_ap(coco, {"annotations": []})
    with pytest.raises(ValueError, match="max_dets >= 1"):
        mask_ap(coco, [], max_dets=0)
    with pytest.raises(ValueError, match="boundary_ratio above 0"):
        mask_ap(coco, [], 0.0)
    with pytest.raises(ValueError, match=r"none\.json"):
        read_coco(tmp_path / "none.json")
    (tmp_path / "part.json").write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="lacks annotations and categories"):
        read_coco(tmp_path / "part.json", ("images", "annotations", "categories"))
