"""Segmenting in tiles: as the whole image where context does not matter, in bounded memory."""

from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModule
from mmengine.registry import MODELS, init_default_scope
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.mm.launch import ConfigError
from vision.mm.tiling import TiledEncoderDecoder, use_tiles


@MODELS.register_module()
class PointwiseBackbone(BaseModule):
    """One convolution of 1 x 1; remembers the largest image it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.sizes: set[tuple[int, ...]] = set()

    def forward(self, x: Tensor) -> tuple[Tensor]:
        self.sizes.add(tuple(x.shape[-2:]))
        return (self.conv(x),)


def config(classes: int = 5, **test: Any) -> Any:
    head = {
        "type": "FCNHead", "in_channels": 8, "in_index": 0, "channels": 8, "num_convs": 0,
        "concat_input": False, "num_classes": classes, "align_corners": False,
    }  # fmt: skip
    if classes == 1:
        head.update(out_channels=1, threshold=0.4, loss_decode={
            "type": "CrossEntropyLoss", "use_sigmoid": True,
        })  # fmt: skip
    preprocessor = {
        "type": "SegDataPreProcessor", "mean": [120.0] * 3, "std": [60.0] * 3,
        "test_cfg": {"size_divisor": 16},
    }  # fmt: skip
    return Config({"model": {
        "type": "EncoderDecoder", "data_preprocessor": preprocessor, "decode_head": head,
        "backbone": {"type": "PointwiseBackbone"}, "test_cfg": {"mode": "whole"},
    }}).model  # fmt: skip


def pair(**options: Any) -> tuple[Any, Any]:
    """A segmentor of whole images and one of tiles of 48 px with the same weights."""
    init_default_scope("mmseg")
    torch.manual_seed(0)
    whole = MODELS.build(config(**options)).eval()
    nn.init.normal_(whole.decode_head.conv_seg.weight)
    cfg = config(**options)
    use_tiles(cfg, 48, 20)
    tiled = MODELS.build(cfg).eval()
    tiled.load_state_dict(whole.state_dict())
    return whole, tiled


def batch(*hw: int, shape: tuple[int, int] | None = None) -> dict[str, list]:
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(0, 256, (3, *hw), np.uint8))
    meta = {"img_shape": hw, "ori_shape": shape or hw}
    return {"inputs": [image], "data_samples": [SegDataSample(metainfo=meta)]}


@pytest.mark.parametrize("classes", [5, 1])
@pytest.mark.parametrize("hw", [(131, 77), (48, 48), (33, 200), (20, 31)])
@torch.inference_mode()
def test_tiles_make_the_whole(hw: tuple[int, int], classes: int) -> None:
    whole, tiled = pair(classes=classes)
    (want,), (found,) = whole.test_step(batch(*hw)), tiled.val_step(batch(*hw))
    assert torch.equal(found.pred_sem_seg.data, want.pred_sem_seg.data.to(found.pred_sem_seg.data))
    assert found.pred_sem_seg.data.shape == (1, *hw)
    assert found.pred_sem_seg.data.dtype == want.pred_sem_seg.data.dtype
    assert len(found.pred_sem_seg.data.unique()) > 1
    assert "seg_logits" not in found
    assert len(tiled.backbone.sizes) == 1
    assert all(side <= 48 for size in tiled.backbone.sizes for side in size)


@torch.inference_mode()
def test_a_resized_image_gets_its_size_back() -> None:
    whole, tiled = pair()
    (want,) = whole.test_step(batch(96, 80, shape=(131, 109)))
    (found,) = tiled.test_step(batch(96, 80, shape=(131, 109)))
    assert found.pred_sem_seg.data.shape == (1, 131, 109)
    same = (found.pred_sem_seg.data == want.pred_sem_seg.data).double().mean()
    assert same > 0.999  # what the last bit decides
    assert "seg_logits" not in found


@torch.inference_mode()
def test_whole_mode_is_the_segmentors_own() -> None:
    whole, _ = pair()
    cfg = config()
    cfg.type = "TiledEncoderDecoder"
    same = MODELS.build(cfg).eval()
    same.load_state_dict(whole.state_dict())
    (want,), (found,) = whole.test_step(batch(50, 60)), same.test_step(batch(50, 60))
    assert torch.equal(found.seg_logits.data, want.seg_logits.data)


@torch.inference_mode()
def test_no_band_is_higher_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tiled = pair()
    shapes = []
    labels = TiledEncoderDecoder._labels
    monkeypatch.setattr(
        TiledEncoderDecoder,
        "_labels",
        lambda self, band: shapes.append(tuple(band.shape)) or labels(self, band),
    )
    tiled.test_step(batch(300, 70))
    assert sum(rows for _, rows, _ in shapes) == 300
    assert max(rows for _, rows, _ in shapes) <= 48


def test_what_cannot_be_tiled() -> None:
    with pytest.raises(ConfigError, match="at least 32 px, got 8"):
        use_tiles(config(), 8)
    with pytest.raises(ConfigError, match="overlap by 0 to 63 px, got 64"):
        use_tiles(config(), 64, 64)
    with pytest.raises(
        ConfigError, match="for a segmentor, an EncoderDecoder, got ImageClassifier"
    ):
        use_tiles({"type": "ImageClassifier"}, 64)
    cfg = config()
    use_tiles(cfg, 64)
    assert cfg.test_cfg == {"mode": "tiled", "tile": 64, "overlap": 16}
    cfg.test_cfg.overlap = 64
    init_default_scope("mmseg")
    with pytest.raises(ValueError, match="overlap"):
        MODELS.build(cfg)
