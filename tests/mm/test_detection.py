"""Detection through mmdet: a subset is judged by itself, and mmdet is asked for by name."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from PIL import Image

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.mm import launch
from vision.mm.pictures import draw_prediction

ROOT = Path(__file__).resolve().parents[2]
MINI = "configs/vrwkv_adapter/vrwkv-adapter-nano_mask-rcnn_1xb2-24e_coco-mini-320.py"


def arguments(**options: object) -> Namespace:
    return Namespace(
        config=str(ROOT / MINI), cfg_options=options, work_dir=None, launcher="none", local_rank=0
    )


def write_scene(root: Path, count: int) -> None:
    """COCO files of `count` images with a tall and a wide box each, polygons and no crowd."""
    coco = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "person"}]}
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
    (root / "annotations").mkdir()
    for i in range(count):
        for split in ("train", "val"):
            Image.new("RGB", (120, 90), (40 * i, 90, 200)).save(root / split / f"{i}.jpg")
        coco["images"].append({"id": 100 + i, "file_name": f"{i}.jpg", "height": 90, "width": 120})
        for k, (x, y, w, h) in enumerate(((10, 10, 20, 60), (50, 30, 60, 25))):
            corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            known = {"image_id": 100 + i, "category_id": 1, "iscrowd": 0, "area": w * h}
            box = {"bbox": [x, y, w, h], "segmentation": corners, "id": 10 * i + k}
            coco["annotations"].append({**known, **box})
    for split in ("train", "val"):
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))


def answer(sample: Any, shift: int) -> None:
    """Answer with the truth, moved by some pixels."""
    height, width = sample.ori_shape
    boxes = torch.tensor([[10.0, 10, 30, 70], [50, 30, 110, 55]])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    for mask, box in zip(masks, boxes.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] + shift : box[2] + shift] = True
    boxes[:, [0, 2]] += shift
    sample.pred_instances = InstanceData(
        bboxes=boxes, masks=masks, labels=torch.tensor([0, 0]), scores=torch.tensor([0.9, 0.8])
    )


def judged(cfg: Config, shift: int) -> dict[str, float]:
    """What the config's evaluator says of answers that are the truth, moved by some pixels."""
    from mmdet.registry import DATASETS, METRICS

    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    metric = METRICS.build(cfg.val_evaluator)
    metric.dataset_meta = dataset.metainfo
    for i in range(len(dataset)):
        sample = dataset[i]["data_samples"]
        answer(sample, shift)
        metric.process({}, [sample.to_dict()])
    return metric.evaluate(len(dataset))


def test_some_images_are_judged_by_themselves(tmp_path: Path) -> None:
    """The truth of images that were left out does not count as missed."""
    write_scene(tmp_path, 5)
    cfg = launch.load_config(arguments(data_root=f"{tmp_path}/"))
    cfg.val_dataloader.dataset.indices = 2
    init_default_scope("mmdet")
    found = judged(cfg, shift=0)
    assert found["coco/bbox_mAP_50"] == 1
    assert found["coco/segm_mAP"] == pytest.approx(1, abs=0.02)
    moved = judged(cfg, shift=9)
    assert moved["coco/bbox_mAP_50"] < 1
    assert moved["coco/segm_mAP"] < 0.5


def test_what_was_found_is_drawn_beside_what_is_there(tmp_path: Path) -> None:
    from mmdet.models.utils import samplelist_boxtype2tensor
    from mmdet.registry import DATASETS

    write_scene(tmp_path, 3)
    cfg = launch.load_config(arguments(data_root=f"{tmp_path}/"))
    init_default_scope("mmdet")
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    item = dataset[2]
    sample = item["data_samples"]
    samplelist_boxtype2tensor([sample])  # as a model's preprocessor does
    answer(sample, shift=5)
    sample.pred_instances.scores[1] = 0.1
    tile, caption = draw_prediction(item["inputs"], sample, dataset.metainfo)
    assert caption == "2.jpg: annotation, 1 found"
    assert tile.shape == (90, 240, 3)
    background = tile[5, 60].astype(int) - (80, 90, 200)
    assert abs(background).max() < 8  # the colours of the file, not mirrored
    painted = abs(tile.astype(int) - tile[5, 60]).sum(2) > 60
    there, found = painted[:, :120], painted[:, 120:]
    assert there[40, 20]
    assert there[45, 90]
    assert found[40, 25]
    assert not found[45, 90]  # its score is low


def test_mmdet_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_installed", lambda name: name != "mmdet")
    with pytest.raises(launch.ConfigError, match=r"pip install -e '\.\[detection\]'"):
        launch.load_config(arguments())


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    cfg = launch.load_config(arguments(data_root=f"{tmp_path}/nowhere/"))
    with pytest.raises(launch.ConfigError, match="nowhere"):
        launch.check_data(cfg, "train", "val")


def test_published_recipes() -> None:
    for size, lr, decay, drop in (
        ("tiny", 2e-4, 0.01, 0.1),
        ("small", 1e-4, 0.05, 0.2),
        ("base", 1e-4, 0.05, 0.3),
        ("large", 1e-4, 0.05, 0.4),
    ):
        name = f"vrwkv-adapter-{size}_mask-rcnn_8xb2-1x_coco-800x1333.py"
        cfg = Config.fromfile(ROOT / "configs" / "vrwkv_adapter" / name)
        assert cfg.optim_wrapper.optimizer.lr == lr
        assert cfg.optim_wrapper.optimizer.weight_decay == decay
        assert cfg.optim_wrapper.paramwise_cfg.decay_rate == 0.85
        assert cfg.model.backbone.drop_path_rate == drop
        assert cfg.train_dataloader.batch_size == 2
        assert cfg.param_scheduler[0].end == 500
        assert cfg.param_scheduler[1].milestones == [8, 11]
