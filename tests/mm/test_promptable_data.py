"""Sets of object masks as an mmengine data set."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from PIL import Image

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.data.image_io import LabelError
from vision.mm.launch import merge_options
from vision.mm.promptable_data import SETS, TRANSFORMS, PromptableDataset

JITTER = {"type": "LargeScaleJitter", "size": 32, "ratio": (1.5, 4.0), "min_area": 4}
PAIRS = {"type": "MaskPairs", "images": "images", "masks": "masks"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for k in range(4):
        mask = np.zeros((40, 60), np.uint8)
        mask[5 : 20 + k, 8:30] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{k}.png")
        pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{k}.png")
    return tmp_path


def test_training_samples(root: Path) -> None:
    other = {**PAIRS, "name": "padded", "transform": {"type": "ResizeAndPad", "size": 32}}
    data = DATASETS.build(
        {
            "type": "PromptableDataset",
            "data_root": str(root),
            "sets": [{**PAIRS, "name": "jittered"}, other],
            "repeats": [2, 1],
            "transform": JITTER,
        }
    )
    assert isinstance(data, PromptableDataset)
    assert len(data) == 12
    for i in range(12):
        sample = data[i]
        assert set(sample) == {"inputs", "masks", "name", "dataset"}
        assert sample["inputs"].shape == (3, 32, 32)
        assert sample["inputs"].dtype == torch.uint8
        assert sample["masks"].shape == (1, 32, 32)
        assert sample["masks"].dtype == torch.bool
        assert sample["dataset"] == ("jittered" if i < 8 else "padded")
        assert Path(sample["name"]) == root / "images" / f"{i % 4}.png"
    before = [data[i]["inputs"] for i in range(12)]
    assert not torch.equal(before[0], before[4]), "a repeat is another crop"
    data.set_epoch(1)
    same = [torch.equal(data[i]["inputs"], x) for i, x in enumerate(before)]
    assert not any(same[:8])
    assert all(same[8:])
    data.set_epoch(0)
    assert all(torch.equal(data[i]["inputs"], x) for i, x in enumerate(before))
    assert data.metainfo == {}


def test_evaluation_samples_keep_their_size(root: Path) -> None:
    data = PromptableDataset([PAIRS], data_root=str(root), max_masks=None, strict=True)
    sample = data[2]
    pixels = np.array(Image.open(root / "images" / "2.png")).transpose(2, 0, 1)
    assert np.array_equal(sample["inputs"].numpy(), pixels)
    assert sample["masks"][0, 5:22, 8:30].all()
    assert sample["masks"].sum() == 17 * 22
    assert sample["dataset"] == root.name


def test_broken_samples(root: Path) -> None:
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(root / "masks" / "1.png")
    data = PromptableDataset([PAIRS], str(root), transform=JITTER)
    assert Path(data[1]["name"]).name == "2.png"
    assert data.samples.broken == {"LabelError": 1}
    with pytest.raises(LabelError, match=r"1\.png"):
        PromptableDataset([PAIRS], str(root), transform=JITTER, strict=True)[1]


def test_wrong_configs(root: Path) -> None:
    with pytest.raises(ValueError, match="one set or more"):
        PromptableDataset([])
    with pytest.raises(ValueError, match="no set 'Pairs' for prompts; there are MaskPairs, Coco"):
        PromptableDataset([{**PAIRS, "type": "Pairs"}], str(root))
    with pytest.raises(ValueError, match="no transform 'Flip' for prompts; there are Large"):
        PromptableDataset([PAIRS], str(root), transform={"type": "Flip"})
    with pytest.raises(TypeError, match="threshhold"):
        PromptableDataset([{**PAIRS, "threshhold": 1}], str(root))
    with pytest.raises(ValueError, match="wanted a folder of images, got nothing"):
        PromptableDataset([PAIRS], str(root / "lost"))


def test_the_runner_tells_the_epoch(root: Path) -> None:
    """As in a run: workers, a batch of one size, another crop in another epoch."""
    loader = {
        "batch_size": 2,
        "num_workers": 1,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "worker_init_fn": {"type": "worker_init_fn"},
        "collate_fn": {"type": "pseudo_collate"},
        "dataset": {
            "type": "PromptableDataset",
            "data_root": str(root),
            "sets": [PAIRS],
            "transform": JITTER,
        },
    }
    built = Runner.build_dataloader(loader, seed=0)
    epochs = []
    for epoch in (0, 1, 0):
        built.dataset.set_epoch(epoch)
        batches = list(built)
        epochs.append(torch.stack([x for batch in batches for x in batch["inputs"]]))
        assert [len(batch["masks"]) for batch in batches] == [2, 2]
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def config(root: Path, name: str) -> Config:
    return Config.fromfile(root / "configs" / "rwkv_sam" / name)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_joint_config_is_the_published_one(repo_root: Path, size: str) -> None:
    cfg = config(repo_root, f"rwkv-sam-{size}_8xb4-12e_joint-1024.py")
    train, val = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
    for dataset in (train, val):
        for options in map(dict, dataset.sets):
            transform = dict(options.pop("transform", {"type": "ResizeAndPad", "size": 1024}))
            inspect.signature(SETS[options.pop("type")]).bind(**options)
            assert TRANSFORMS[transform.pop("type")](**transform).size == 1024
    assert dict(zip([s.name for s in train.sets], train.repeats, strict=True)) == {
        "COCONut-B": 1,
        "EntitySeg": 4,
        "DIS5K-TR": 40,
        "SA-1B": 1,
    }
    ratios = {s.name: s.transform.get("ratio") for s in train.sets}
    assert ratios == {
        "COCONut-B": (0.1, 2.0),
        "EntitySeg": (0.8, 2.0),
        "DIS5K-TR": None,
        "SA-1B": (1.0, 1.5),
    }
    assert train.max_masks == 60
    assert train.sets[3].max_masks == 30
    assert [s.name for s in val.sets] == ["DIS5K-VD", "COIFT", "HRSOD", "ThinObject5K-TE"]
    assert val.strict
    assert val.max_masks is None


def test_mini_sets(repo_root: Path, shared: Path) -> None:
    cfg = config(repo_root, "rwkv-sam-nano_1xb4-36e_mini-prompts-256.py")
    merge_options(cfg, {"data_root": str(shared / "data")})
    train, val = (DATASETS.build(cfg[f"{phase}_dataloader"].dataset) for phase in ("train", "val"))
    assert train.transformed.joined.lengths == [120, 2 * 30, 3 * 69]  # one image has crowds alone
    assert val.transformed.joined.lengths == [30, 8, 40]
    names = ["ccp_person", "cwfid_plants", "coco_mini"]
    starts: list[Any] = [0, 120, 180]
    for name, start in zip(names, starts, strict=True):
        sample = train[start]
        assert sample["dataset"] == name
        assert sample["inputs"].shape == (3, 256, 256)
        assert 1 <= len(sample["masks"]) <= 8
    assert [val[i]["dataset"] for i in (0, 30, 38)] == names
    assert val[30]["inputs"].shape == (3, 966, 1296)
