"""RAN and its paper's experiments in OpenMMLab form."""

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, init_default_scope

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.mm.backbone import ZooBackbone
from vision.mm.datasets import ClassifierInputs
from vision.mm.resume import _set_epoch


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("mmseg")


def digits(**wrapper: object) -> object:
    inner = {"type": "DigitClassification", "split": "train", "size": 32, "length": 300}
    return DATASETS.build(
        {"type": "NoisyLabels", "dataset": inner, **wrapper} if wrapper else inner
    )


def test_noisy_labels_wrap_a_data_set() -> None:
    clean, noisy = digits(), digits(level=0.3, seed=1)
    assert len(noisy) == 300
    assert noisy.metainfo["classes"] == clean.metainfo["classes"]
    wrong = sum(noisy[i]["labels"] != clean[i]["labels"] for i in range(300))
    assert 60 < wrong < 120
    assert torch.equal(noisy[5]["inputs"], clean[5]["inputs"])
    before, label = noisy[5]["inputs"], noisy[5]["labels"]
    _set_epoch(noisy, 1)  # what the training loop does
    assert not torch.equal(noisy[5]["inputs"], before)
    assert noisy[5]["labels"] == label


CIFAR = {
    "input_size": 32,
    "no_aug": True,
    "albumentations": [
        {"type": "PadIfNeeded", "min_height": 40, "min_width": 40, "border_mode": 0, "fill": 0},
        {"type": "RandomCrop", "height": 32, "width": 32},
        {"type": "HorizontalFlip", "p": 0.5},
    ],
}


def test_cifar_augmentation_pads_crops_and_flips() -> None:
    image = np.arange(1, 1 + 32 * 32, dtype=np.uint16).reshape(32, 32, 1)
    image = np.concatenate([image % 251 + 1, image // 251 + 1, image // 4 % 251 + 1], 2)
    sample = {"image": image.astype(np.uint8), "label": 3}
    padded = np.pad(sample["image"], [(4, 4), (4, 4), (0, 0)])
    windows = {
        padded[y : y + 32, x : x + 32][:, ::step].tobytes()
        for y in range(9)
        for x in range(9)
        for step in (1, -1)
    }
    torch.manual_seed(0)
    train = ClassifierInputs(CIFAR, train=True)
    seen = {train(sample)["inputs"].permute(1, 2, 0).numpy().tobytes() for _ in range(60)}
    assert seen <= windows
    assert len(seen) > 20
    test = ClassifierInputs({**CIFAR, "crop_pct": 1.0}, train=False)(sample)["inputs"]
    assert np.array_equal(test.permute(1, 2, 0).numpy(), sample["image"])


def test_backbone_gives_a_pyramid() -> None:
    widths = (8, 16, 32, 64)
    backbone = ZooBackbone("ran56", (1, 2, 3, 4), stem_width=8, widths=widths)
    assert backbone.channels == list(widths)
    assert backbone.strides == [4, 8, 16, 32]
    maps = backbone(torch.randn(2, 3, 45, 64))
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, 11, 16), (2, 16, 6, 8), (2, 32, 3, 4), (2, 64, 2, 2),
    ]  # fmt: skip
    sum(m.sum() for m in maps).backward()
    unused = [n for n, p in backbone.named_parameters() if p.grad is None]
    assert unused == []
    assert set(backbone.layer_ids()) == {n for n, _ in backbone.named_parameters()}
