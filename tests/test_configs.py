"""Every config is built and trains a step on stand-in data."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import DATASETS
from PIL import Image

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.mm.compat import cpu_safe_config
from vision.mm.datasets import ClassifierInputs
from vision.mm.launch import check_keys
from vision.sam.model import SAM_MODELS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if "_base_" not in p.parts)
SIDE = 64  # of the stand-in images after every resize and crop, in pixels


def shrink(node: Any) -> None:
    """Make every size in a pipeline or preprocessor small, in place."""
    sizes = {"scale": (SIDE, SIDE), "crop_size": (SIDE, SIDE), "size": (SIDE, SIDE)}
    sizes["stride"] = (SIDE // 2, SIDE // 2)
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        if key in sizes and isinstance(value, tuple | list):
            node[key] = sizes[key]
        elif isinstance(value, dict | list):
            shrink(value)


def write_segmentation_data(dataset: Any, root: Path) -> None:
    """Two images and masks where a mmseg data set looks for them."""
    cls = DATASETS.get(dataset.type)
    empty = cls(lazy_init=True)
    classes = len(cls.METAINFO["classes"])
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        image = root / dataset.data_prefix.img_path / f"{name}{empty.img_suffix}"
        mask = root / dataset.data_prefix.seg_map_path / f"{name}{empty.seg_map_suffix}"
        for path, array in (
            (image, rng.integers(0, 256, (SIDE, SIDE + 16, 3), dtype=np.uint8)),
            (mask, rng.integers(0, classes, (SIDE, SIDE + 16), dtype=np.uint8)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)


def write_coco(annotations: Path, images: Path) -> None:
    """A COCO file of two images with two objects each."""
    from mmdet.datasets import CocoDataset

    write_images(images)
    names = CocoDataset.METAINFO["classes"]
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    coco = {"images": [], "annotations": [], "categories": categories}
    for image, name in enumerate(("a.jpg", "b.jpg")):
        size = {"height": SIDE, "width": SIDE + 16}
        coco["images"].append({"id": image, "file_name": name, **size})
        for x in (4, 40):
            box = [x, 8, 24, 32]
            corners = [[x, 8, x + 24, 8, x + 24, 40, x, 40]]
            extra = {"category_id": 1, "iscrowd": 0, "area": 768, "id": 10 * image + x}
            coco["annotations"].append(
                {"image_id": image, "bbox": box, "segmentation": corners, **extra}
            )
    annotations.parent.mkdir(parents=True, exist_ok=True)
    annotations.write_text(json.dumps(coco))


def write_images(folder: Path) -> None:
    """Two images without annotations."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.jpg"):
        pixels = rng.integers(0, 256, (SIDE, SIDE + 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def stand_in(cfg: Config, root: Path) -> None:
    """Replace the data by a few small samples; leave everything else as the config says."""
    for phase in ("train", "val", "test"):
        loader = cfg[f"{phase}_dataloader"]
        loader.num_workers = 0
        loader.batch_size = min(loader.batch_size, 2)
        holder = loader
        while "dataset" in holder.dataset:  # a wrapper stays
            holder = holder.dataset
        dataset = holder.dataset
        if dataset.type in ("LabelledImages", "DigitClassification"):
            split = "train" if phase == "train" else "val"
            holder.dataset = Config(
                {"type": "DigitClassification", "split": split, "size": SIDE // 2, "length": 2}
            )._cfg_dict
        elif dataset.type == "PromptableDataset":  # tests/mm/test_promptable_data.py has its sets
            split = "train" if phase == "train" else "val"
            holder.dataset = Config(
                {"type": "DigitPrompts", "split": split, "size": SIDE, "length": 2}
            )._cfg_dict
        elif dataset.type in ("DigitSceneSegmentation", "DigitPrompts"):
            dataset.update(size=SIDE, length=2)
        elif dataset.type == "ImagesForDistillation":
            dataset.update(data_root=str(root), image_size=SIDE, cache=None)
            write_images(root / dataset.data_prefix.img_path)
        elif dataset.type == "UnlabelledImages":
            dataset.data_root = str(root)
            dataset.transform.input_size = SIDE
            for folder in dataset.data_prefix.values():
                write_images(root / folder)
        elif dataset.type == "CocoDataset":
            dataset.data_root = str(root)
            shrink(dataset.pipeline)
            loader.persistent_workers = False
            write_coco(root / dataset.ann_file, root / dataset.data_prefix.img)
            evaluator = cfg.get(f"{phase}_evaluator") or {}
            if evaluator.get("ann_file"):
                evaluator.ann_file = str(root / dataset.ann_file)
        else:
            dataset.data_root = str(root)
            shrink(dataset.pipeline)
            write_segmentation_data(dataset, root)
    shrink(cfg.model)
    if cfg.model.type == "EmbeddingDistiller":  # instead of cached embeddings
        dim = SAM_MODELS[cfg.model.student["sam"]].get("dim", 256)
        teacher = {"name": "samvit_base_patch16", "image_size": SIDE, "neck_chans": dim}
        tiny = {"depth": 1, "embed_dim": 32, "num_heads": 2, "global_attn_indexes": [0]}
        cfg.model.update(teacher={**teacher, **tiny}, standardize=None)
    if cfg.model.type == "PromptableSegmentor":
        cfg.model.image_size = SIDE
    if cfg.model.type == "MaskRCNN":
        cfg.model.test_cfg.rcnn.score_thr = 0.0  # or an untrained model finds nothing to judge
        cfg.param_scheduler[0].start_factor = 0.1  # or a step is lost in rounding
    if "checkpoint" in cfg.model:
        cfg.model.checkpoint = None
    if "checkpoint" in cfg.model.get("backbone", {}):
        cfg.model.backbone.checkpoint = None


def test_there_are_configs() -> None:
    assert len(CONFIGS) >= 12


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_trains_a_step(path: Path, tmp_path: Path) -> None:
    cfg = Config.fromfile(path)
    check_keys(cfg)
    cpu_safe_config(cfg)
    init_default_scope(cfg.default_scope)
    for phase in ("train", "val", "test"):
        dataset = cfg[f"{phase}_dataloader"].dataset
        transform = dataset.get("dataset", dataset).get("transform")
        if transform and "input_size" in transform:  # the images themselves are replaced below
            image = np.zeros((50, 70, 3), np.uint8)
            inputs = ClassifierInputs(transform, phase == "train")
            shape = inputs({"image": image, "label": 0})["inputs"].shape
            assert shape == (3, transform.input_size, transform.input_size)
    stand_in(cfg, tmp_path / "data")
    cfg.work_dir = str(tmp_path / "work")
    by_epoch = cfg.train_cfg.type == "EpochBasedTrainLoop"
    cfg.train_cfg.update({"max_epochs" if by_epoch else "max_iters": 1, "val_interval": 1})
    cfg.default_hooks.checkpoint.interval = 10**9  # no file: VRWKV-L would write 4 GB
    cfg.default_hooks.checkpoint.save_last = False
    cfg.default_hooks.checkpoint.save_best = None
    cfg.default_hooks.checkpoint.rule = None
    cfg.visualizer = None
    runner = Runner.from_cfg(cfg)
    before = {k: v.clone() for k, v in runner.model.state_dict().items() if v.numel() < 10_000}
    runner.train()
    losses = runner.message_hub.get_scalar("train/loss")
    assert np.isfinite(losses.current())
    after = runner.model.state_dict()
    moved = [k for k, v in before.items() if not v.equal(after[k])]
    assert len(moved) > len(before) // 2, "one step must move the parameters"
    metrics = {k for k in runner.message_hub.log_scalars if k.startswith("val/")}
    wanted = "seg/mIoU" if "decode_head" in cfg.model else "accuracy/top1"
    wanted = "sam/box_mIoU" if cfg.model.type == "PromptableSegmentor" else wanted
    wanted = "distill/mse" if cfg.model.type == "EmbeddingDistiller" else wanted
    wanted = "coco/segm_mAP" if cfg.model.type == "MaskRCNN" else wanted
    wanted = "mae/mse" if cfg.model.type == "MAEPretrainer" else wanted
    assert any(wanted in k for k in metrics)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_says_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"tools/train.py {path.relative_to(ROOT)}" in " ".join(text.replace("\\", "").split())
    assert str(Path.home()) not in text


def test_folder_of_configs_has_no_stray_base() -> None:
    """Every _base_ file is inherited by some config, itself or through another base."""
    used: set[Path] = set()

    def follow(path: Path) -> None:
        for name in Config._get_base_files(str(path)):
            base = (path.parent / name).resolve()
            used.add(base)
            follow(base)

    for path in CONFIGS:
        follow(path)
    bases = {p.resolve() for p in (ROOT / "configs" / "_base_").rglob("*.py")}
    assert bases <= used, f"nobody inherits {bases - used}"


def test_recipes_are_the_published_ones() -> None:
    def load(name: str) -> Config:
        return Config.fromfile(ROOT / "configs" / "vrwkv" / name)

    tiny = load("vrwkv-tiny_8xb128-300e_in1k-224.py")
    small = load("vrwkv-small_8xb128-300e_in1k-224.py")
    base = load("vrwkv-base_16xb64-300e_in1k-224.py")
    for cfg, rate, mixed in ((tiny, 0.0, False), (small, 0.3, True), (base, 0.5, True)):
        assert cfg.optim_wrapper.optimizer.lr == 1e-3
        assert cfg.optim_wrapper.optimizer.weight_decay == 0.05
        assert cfg.optim_wrapper.clip_grad.max_norm == 5.0
        assert cfg.train_cfg.max_epochs == 300
        assert cfg.model.get("drop_path_rate", 0.0) == rate
        assert bool(cfg.model.get("mixup")) == mixed
        assert cfg.model.label_smoothing == 0.1
    assert 8 * tiny.train_dataloader.batch_size == 16 * base.train_dataloader.batch_size == 1024
    large = load("vrwkv-large_8xb128-20e_in1k-384.py")
    assert large.optim_wrapper.optimizer.lr == 1e-5
    assert large.train_dataloader.dataset.transform.input_size == 384
    assert "auto_augment" not in large.train_dataloader.dataset.transform
    assert large.test_dataloader.dataset.transform.crop_pct == 1.0
    hooks = [h.type for h in large.custom_hooks]
    assert "EMAHook" in hooks
    assert set(hooks) > {h.type for h in tiny.custom_hooks}
    for size, lr, decay in (
        ("tiny", 1.2e-4, 0.95),
        ("small", 6e-5, 0.85),
        ("base", 6e-5, 0.8),
        ("large", 6e-5, 0.9),
    ):
        cfg = load(f"vrwkv-{size}_upernet_8xb2-160k_ade20k-512x512.py")
        assert cfg.optim_wrapper.optimizer.lr == lr
        assert cfg.optim_wrapper.paramwise_cfg.decay_rate == decay
        assert cfg.train_cfg.max_iters == 160_000


def test_masked_pretraining_is_the_published_one() -> None:
    def load(name: str) -> Config:
        return Config.fromfile(ROOT / "configs" / "mae" / name)

    base = load("vrwkv-base_8xb128-800e_mae_in1k-224.py")
    tiny = load("vrwkv-tiny_8xb128-800e_mae_in1k-224.py")
    for cfg in (base, tiny):
        wrapper = cfg.optim_wrapper
        batch = 8 * cfg.train_dataloader.batch_size * wrapper.accumulative_counts
        assert batch == 4096
        assert wrapper.optimizer.lr == pytest.approx(1.5e-4 * batch / 256)
        assert tuple(wrapper.optimizer.betas) == (0.9, 0.95)
        assert wrapper.optimizer.weight_decay == 0.05
        assert "paramwise_cfg" not in wrapper  # all parameters decay
        assert cfg.train_cfg.max_epochs == 800
        assert cfg.param_scheduler[0].end == 10
        assert tuple(cfg.train_dataloader.dataset.transform.scale) == (0.2, 1.0)
    model = base.model
    assert (model.shift, model.key_norm, model.drop_path_rate) == ("single_shift", True, 0.1)
    assert (model.decoder.dim, model.decoder.depth) == (512, 8)


def test_vit_differs_from_vrwkv_in_the_backbone_alone() -> None:
    name = "nano_fcn_1xb2-44e_camvid-180x240.py"
    ours = Config.fromfile(ROOT / "configs" / "vrwkv" / f"vrwkv-{name}")
    vit = Config.fromfile(ROOT / "configs" / "vit" / f"vit-{name}")
    ours, vit = (copy.deepcopy(c._cfg_dict) for c in (ours, vit))
    a, b = ours["model"].pop("backbone"), vit["model"].pop("backbone")
    assert ours == vit
    assert a["model_name"] != b["model_name"]
    for key in ("embed_dim", "depth"):
        assert a[key] == b[key]
