"""Data sets, transforms and pictures in OpenMMLab form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.data import ImageReadError, LabelError
from vision.mm.datasets import (
    CamVidDataset,
    DigitClassification,
    DigitSceneSegmentation,
    LabelledImages,
)
from vision.mm.pictures import draw_prediction
from vision.mm.transforms import Albumentations, LoadImage, LoadMask


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("mmseg")


def save(path: Path, array: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return str(path)


def test_digit_classification_is_uint8_and_changes_with_the_epoch() -> None:
    data = DigitClassification("train", size=32, length=5)
    first = data[0]
    assert first["inputs"].dtype == torch.uint8
    assert first["inputs"].shape == (3, 32, 32)
    assert data.metainfo["classes"] == tuple("0123456789")
    data.set_epoch(1)
    assert not torch.equal(data[0]["inputs"], first["inputs"])
    assert data[0]["labels"] == first["labels"]


def test_labelled_images_from_folders(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        image = np.full((40, 50, 3), 100 if name == "cat" else 200, np.uint8)
        save(tmp_path / "train" / name / "a.png", image)
    data = LabelledImages(
        str(tmp_path), "train", transform={"input_size": 32}, test_mode=True, num_classes=2
    )
    assert len(data) == 2
    assert data.metainfo["classes"] == ("cat", "dog")
    assert data[1]["inputs"].shape == (3, 32, 32)
    assert data[1]["inputs"].unique().tolist() == [200]
    assert data[1]["labels"] == 1
    with pytest.raises(ValueError, match="wanted 3 classes, got 2"):
        LabelledImages(str(tmp_path), "train", transform={"input_size": 32}, num_classes=3)


def test_digit_scenes_feed_mmseg() -> None:
    data = DigitSceneSegmentation("val", (48, 64), 3, pipeline=[{"type": "PackSegInputs"}])
    sample = data[1]
    assert sample["inputs"].shape == (3, 48, 64)
    assert sample["data_samples"].gt_sem_seg.data.shape == (1, 48, 64)
    assert len(data.metainfo["classes"]) == len(data.metainfo["palette"]) == 11
    assert torch.equal(data[1]["inputs"], sample["inputs"])


def test_camvid_of_the_shared_data(shared: Path) -> None:
    data = CamVidDataset(
        data_root=str(shared / "data" / "camvid"),
        data_prefix={"img_path": "img_dir/val", "seg_map_path": "ann_dir/val"},
        pipeline=[
            {"type": "LoadImage"},
            {"type": "LoadMask", "num_classes": 11},
            {"type": "PackSegInputs"},
        ],
    )
    assert len(data) == 101
    names = (shared / "data" / "camvid" / "classes.txt").read_text().split()
    assert list(data.metainfo["classes"]) == names
    sample = data[0]
    assert sample["inputs"].shape == (3, 360, 480)
    assert set(sample["data_samples"].gt_sem_seg.data.unique().tolist()) <= {*range(11), 255}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_any_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else (
        Image.fromarray(grey).convert(mode)
    )  # fmt: skip
    image.save(tmp_path / "x.png")
    found = LoadImage().transform({"img_path": str(tmp_path / "x.png")})
    assert found["img"].shape == (4, 6, 3)
    assert found["img"].dtype == np.uint8
    assert found["ori_shape"] == (4, 6)
    assert np.abs(found["img"][..., 0].astype(int) - grey).max() <= 1


def test_one_pixel_and_damaged_images(tmp_path: Path) -> None:
    path = save(tmp_path / "one.png", np.zeros((1, 1, 3), np.uint8))
    assert LoadImage().transform({"img_path": path})["img"].shape == (1, 1, 3)
    whole = Path(save(tmp_path / "w.jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)))  # noqa: E501 # fmt: skip
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(ImageReadError, match=r"cut\.jpg"):
        LoadImage().transform({"img_path": str(tmp_path / "cut.jpg")})


def mask_results(path: str, **extra: object) -> dict:
    return {"seg_map_path": path, "reduce_zero_label": False, "seg_fields": [], **extra}


def test_mask_labels_are_checked(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 2], [10, 255, 3]], np.uint8)
    path = save(tmp_path / "m.png", mask)
    found = LoadMask(num_classes=11).transform(mask_results(path))
    assert np.array_equal(found["gt_seg_map"], mask)
    assert found["seg_fields"] == ["gt_seg_map"]
    with pytest.raises(LabelError, match=r"m\.png.*10"):
        LoadMask(num_classes=5).transform(mask_results(path))


def test_mask_maps_as_mmseg_does(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.array([[0, 1, 150, 255]], np.uint8))
    reduced = LoadMask(150).transform(mask_results(path, reduce_zero_label=True))
    assert reduced["gt_seg_map"].tolist() == [[255, 0, 149, 255]]
    mapped = LoadMask().transform(mask_results(path, label_map={0: 7, 1: 255, 150: 0}))
    assert mapped["gt_seg_map"].tolist() == [[7, 255, 0, 255]]


def test_albumentations_moves_image_and_mask_together() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, :15] = 255
    mask = (image[..., 0] > 0).astype(np.uint8)
    step = Albumentations([{"type": "HorizontalFlip", "p": 1.0}])
    found = Compose([step])({"img": image, "gt_seg_map": mask})
    assert np.array_equal(found["img"][..., 0] > 0, found["gt_seg_map"] > 0)
    assert found["gt_seg_map"][0, 0] == 0
    assert found["gt_seg_map"][0, -1] == 1
    with pytest.raises(ValueError, match="HorizontalFlip"):
        Albumentations([{"type": "HorizontalFlp"}])


def test_pictures_of_predictions() -> None:
    image = torch.full((3, 32, 32), 80, dtype=torch.uint8)
    output = {"scores": torch.tensor([0.1, 0.9]), "label": 0}
    tile, caption = draw_prediction(image, output, {"classes": ("cat", "dog")})
    assert caption == "dog (is cat)"
    assert tile.shape == (96, 96, 3)

    sample = SegDataSample(
        pred_sem_seg=PixelData(data=torch.ones(1, 64, 48, dtype=torch.long)),
        gt_sem_seg=PixelData(data=torch.zeros(1, 64, 48, dtype=torch.long)),
        metainfo={"img_path": "/x/a.png"},
    )
    meta = {"classes": ("a", "b"), "palette": [[255, 0, 0], [0, 0, 255]]}
    tile, caption = draw_prediction(image, sample, meta)
    assert tile.shape == (64, 3 * 48, 3)
    assert caption.startswith("a.png")
    assert tile[0, 48 + 5, 0] > tile[0, 48 + 5, 2]  # annotation red
    assert tile[0, 96 + 5, 2] > tile[0, 96 + 5, 0]  # prediction blue
