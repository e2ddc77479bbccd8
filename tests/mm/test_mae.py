"""Masked pretraining in mmengine: loss, masks, pictures, and what it leaves for fine-tuning."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from PIL import Image
from torch.utils.data import default_collate

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.data import ImageReadError
from vision.mm.backbone import ZooBackbone
from vision.mm.classifier import ImageClassifier
from vision.mm.mae import MAEPretrainer, ReconstructionError, UnlabelledImages
from vision.mm.pictures import ReconstructionSheetHook
from vision.models.checkpoint import CheckpointError, read_checkpoint
from vision.models.mae import mean_of_visible

SIDE = 32
NANO = {"model_name": "vrwkv_nano_patch8_224", "img_size": SIDE, "depth": 2}
MODEL: dict[str, Any] = {"type": "MAEPretrainer", **NANO, "decoder": {"dim": 32, "depth": 1}}
TRANSFORM = {"input_size": SIDE, "crop_pct": 1.0, "hflip": 0.0, "scale": (0.9, 1.0)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with six smooth images of several shapes in two folders."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(6):
        folder = root / ("one/sub" if i % 2 else "two")
        folder.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        size = (40 + 9 * i, 70 - 5 * i)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root


def _dataset(root: Path, **options: Any) -> dict[str, Any]:
    folders = {"first": "one", "second": "two"}
    return {
        "type": "UnlabelledImages",
        "data_root": str(root),
        "data_prefix": folders,
        "transform": TRANSFORM,
        **options,
    }


def _model(**options: Any) -> MAEPretrainer:
    torch.manual_seed(0)
    model = MODELS.build({**MODEL, **options})
    assert isinstance(model, MAEPretrainer)
    return model


def _batch(root: Path) -> dict[str, torch.Tensor]:
    samples = DATASETS.build(_dataset(root, test_mode=True))
    return default_collate([samples[i] for i in range(len(samples))])


def test_samples(data: Path, tmp_path: Path) -> None:
    samples = DATASETS.build(_dataset(data))
    assert isinstance(samples, UnlabelledImages)
    assert [p.name for p in samples.paths] == [f"{i}.png" for i in (1, 3, 5, 0, 2, 4)]
    sample = samples[3]
    assert sample["inputs"].dtype == torch.uint8
    assert sample["inputs"].shape == (3, SIDE, SIDE)
    assert sample["index"] == 3
    fixed = DATASETS.build(_dataset(data, test_mode=True))
    assert torch.equal(fixed[0]["inputs"], fixed[0]["inputs"])
    assert len(DATASETS.build(_dataset(data, data_prefix={}))) == 6
    with pytest.raises(ValueError, match="wanted a folder of images, got nothing"):
        DATASETS.build(_dataset(data, data_prefix={"a": "three"}))
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ImageReadError, match=r"broken\.png"):
        DATASETS.build(_dataset(tmp_path, data_prefix={}))[0]


@pytest.mark.parametrize("norm_pix", [False, True])
def test_losses_are_those_of_the_masked_patches(data: Path, norm_pix: bool) -> None:
    model = _model(norm_pix=norm_pix, mask_ratio=0.5)
    batch = model.data_preprocessor(_batch(data), True)
    torch.manual_seed(1)
    losses = model(**batch, mode="loss")
    torch.manual_seed(1)
    found = model.mae(batch["inputs"])
    assert list(losses) == ["loss", "mean_of_visible"]
    wanted = (found.prediction - found.target)[found.masked].square().mean()
    torch.testing.assert_close(losses["loss"], wanted)
    simple = mean_of_visible(found.target, found.masked).expand_as(found.target)
    wanted = (simple - found.target)[found.masked].square().mean()
    torch.testing.assert_close(losses["mean_of_visible"], wanted)
    loss, logged = model.parse_losses(losses)
    assert torch.equal(loss, losses["loss"]), "what is only logged is not trained"
    assert set(logged) == {"loss", "mean_of_visible"}


def test_masks_of_an_evaluation_belong_to_the_images(data: Path) -> None:
    model = _model().eval()
    batch = _batch(data)
    together = model.val_step(batch)
    alone = [model.val_step({k: v[i : i + 1] for k, v in batch.items()})[0] for i in range(6)]
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a["masked"], b["masked"])
        assert a["mse"] == pytest.approx(b["mse"], rel=1e-4)
    assert not torch.equal(together[0]["masked"] == 128, together[1]["masked"] == 128)
    other = _model(seed=9).eval().val_step(batch)
    assert not torch.equal(together[0]["masked"], other[0]["masked"])


def test_pictures_show_what_was_seen(data: Path) -> None:
    model = _model().eval()
    batch = _batch(data)
    noise = model._noise(batch["index"], batch["inputs"])
    masked = model.mae(model.data_preprocessor(batch)["inputs"], noise).masked
    for image, hidden, output in zip(batch["inputs"], masked, model.val_step(batch), strict=True):
        pixels = hidden.view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert (output["masked"][:, pixels] == 128).all()
        for picture in ("masked", "painted"):
            assert torch.equal(output[picture][:, ~pixels], image[:, ~pixels])
        assert not torch.equal(output["painted"][:, pixels], image[:, pixels])


def test_metric_is_the_mean_over_images() -> None:
    metric = METRICS.build({"type": "ReconstructionError"})
    assert isinstance(metric, ReconstructionError)
    metric.process(None, [{"mse": 1.0, "mean_of_visible": 4.0}])
    rows = [{"mse": 2.0, "mean_of_visible": 5.0}, {"mse": 6.0, "mean_of_visible": 9.0}]
    metric.process(None, rows)
    assert metric.evaluate(3) == {"mae/mse": 3.0, "mae/mean_of_visible": 6.0}


def test_bad_settings(data: Path) -> None:
    with pytest.raises(ValueError, match="no model 'vrwkv_nona'"):
        _model(model_name="vrwkv_nona")
    with pytest.raises(ValueError, match="wants a Vision-RWKV"):
        MAEPretrainer("resnet10t")
    with pytest.raises(ValueError, match="mask_ratio wants a share"):
        _model(mask_ratio=75)
    with pytest.raises(ValueError, match="'loss', 'predict' and 'tensor'"):
        _model()(torch.zeros(1, 3, SIDE, SIDE), mode="train")
    with pytest.raises(ValueError, match="images wants 1 or more"):
        ReconstructionSheetHook(images=0)
    assert _model()(torch.zeros(1, 3, SIDE, SIDE)).shape == (1, 16, 192)


def test_run_and_fine_tuning(data: Path, tmp_path: Path) -> None:
    """A run falls below the mean of the visible patches; its encoder goes into the models."""
    loader = {"num_workers": 0, "collate_fn": {"type": "default_collate"}}
    train = {"batch_size": 6, "dataset": _dataset(data), "sampler": {"type": "DefaultSampler"}}
    val = {"batch_size": 4, "dataset": _dataset(data, test_mode=True)}
    cfg = Config(
        {
            "model": {**MODEL, "mask_ratio": 0.5},
            "train_dataloader": {**loader, **train},
            "val_dataloader": {**loader, **val, "sampler": {"type": "DefaultSampler"}},
            "val_evaluator": {"type": "ReconstructionError"},
            "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": 150, "val_interval": 150},
            "val_cfg": {"type": "ValLoop"},
            "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 5e-3}},
            "default_hooks": {
                "checkpoint": {"type": "AtomicCheckpointHook", "interval": 150},
                "logger": {"type": "LoggerHook", "interval": 1},
            },
            "custom_hooks": [{"type": "ReconstructionSheetHook", "images": 3}],
            "randomness": {"seed": 0},
            "work_dir": str(tmp_path),
            "default_scope": "mmengine",
            "experiment_name": f"mae_{tmp_path.name}",
        }
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    hub = runner.message_hub
    error, floor = (
        hub.get_scalar(f"val/mae/{name}").current() for name in ("mse", "mean_of_visible")
    )
    assert error < floor
    assert len(hub.get_scalar("train/mean_of_visible").data[0]) == 150
    with Image.open(tmp_path / "reconstructions_val.png") as sheet:
        assert sheet.width > 2 * 3 * SIDE  # three panels, two columns

    path = tmp_path / "epoch_150.pth"
    trained = {
        key.removeprefix("mae.encoder."): value
        for key, value in read_checkpoint(path)["state_dict"].items()
        if key.startswith("mae.encoder.")
    }
    # Segmentation: every weight but the final norm's, which features do not pass.
    backbone = ZooBackbone(**NANO, out_indices=(1,), checkpoint=str(path)).body.state_dict()
    backbone = {key.removeprefix("model."): value for key, value in backbone.items()}
    assert set(trained) - set(backbone) <= {"norm.weight", "norm.bias"}
    assert set(backbone) <= set(trained)
    assert all(torch.equal(value, trained[key]) for key, value in backbone.items())
    # Classification: every weight; only the classifier is new.
    for classes in (10, 1000):
        model = ImageClassifier(num_classes=classes, **NANO, checkpoint=str(path)).backbone
        state = model.state_dict()
        assert set(state) - set(trained) == {"head.weight", "head.bias"}
        assert set(trained) <= set(state)
        assert all(torch.equal(state[key], value) for key, value in trained.items())
    # Another grid: the position embedding is resampled, the rest is the same.
    larger = ZooBackbone(
        **{**NANO, "img_size": (40, 72)}, out_indices=(1,), checkpoint=str(path)
    ).body.state_dict()
    shapes = {key: value.shape for key, value in larger.items() if "pos_embed" in key}
    assert list(shapes.values()) == [(1, 45, 64)]
    with pytest.raises(CheckpointError, match="does not fit"):
        ZooBackbone(**{**NANO, "depth": 3}, out_indices=(1,), checkpoint=str(path))
    features = timm.create_model(
        NANO["model_name"],
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        num_classes=0,
        img_size=SIDE,
        depth=2,
    )
    assert set(features.state_dict()) == set(trained)
