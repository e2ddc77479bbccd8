"""Image embeddings on disk, and models of half precision that read them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vision.models.checkpoint import CheckpointError, read_checkpoint, write_weights
from vision.sam.model import create_sam
from vision.sam.predictor import Predictor

POINT: dict[str, Any] = {"point_coords": [[10, 20]], "point_labels": [1], "return_logits": True}


def _predictor(seed: int = 0, **overrides: Any) -> Predictor:
    torch.manual_seed(seed)
    predictor = Predictor(create_sam("rwkv_sam_nano", **overrides))
    predictor.set_image(_picture())
    return predictor


def _picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model of seed 0 saved."""
    path = tmp_path_factory.mktemp("embedding") / "image.safetensors"
    _predictor().save_embedding(path)
    return path


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("high_res", [True, False])
def test_saved_and_restored(tmp_path: Path, ending: str, high_res: bool) -> None:
    predictor = _predictor(high_res=high_res)
    wanted = predictor.predict(**POINT)
    path = tmp_path / f"image{ending}"
    predictor.save_embedding(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    predictor.set_image(_picture(1))
    assert not np.array_equal(predictor.predict(**POINT)[0], wanted[0])
    predictor.load_embedding(path)
    assert (predictor.original_size, predictor.input_size) == ((60, 90), (171, 256))
    for found, one in zip(predictor.predict(**POINT), wanted, strict=True):
        np.testing.assert_array_equal(found, one)


@pytest.mark.parametrize(
    ("seed", "overrides", "said"),
    [
        (0, {"dim": 32}, r"embedding \(1, 64, 11, 16\), wanted \(1, 32, 11, 16\)"),
        (0, {"high_res": False}, "not in the model.*share"),
        (0, {"pad_to_square": True}, r"wanted \(1, 64, 16, 16\)"),
        (0, {"pad_to_square": True, "image_size": 128}, "171 x 256"),
        (1, {}, "other weights"),
    ],
)
def test_another_model(saved: Path, seed: int, overrides: dict[str, Any], said: str) -> None:
    other = _predictor(seed, **overrides)
    with pytest.raises(CheckpointError, match=f"(?s){said}.*set_image"):
        other.load_embedding(saved)
    assert not other.is_image_set


def test_wrong_files(saved: Path, tmp_path: Path) -> None:
    predictor = _predictor()
    with pytest.raises(ValueError, match="ending in"):
        predictor.save_embedding(tmp_path / "image.npy")
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        predictor.load_embedding(tmp_path / "missing.pth")
    write_weights({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="save_embedding"):
        predictor.load_embedding(tmp_path / "weights.pth")
    whole = saved.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        predictor.load_embedding(tmp_path / "cut.safetensors")
    state = read_checkpoint(saved)
    write_weights({**state, "share": state["share"][..., :-1]}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"share \(1, 16, 44, 63\), wanted"):
        predictor.load_embedding(tmp_path / "other.pth")


def test_embedding_can_be_trained_on() -> None:
    weight = torch.ones(1, requires_grad=True)
    (_predictor().get_image_embedding() * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    full = _predictor()
    low = full.predict(**POINT)[2][:1]
    wanted = full.predict(**POINT, box=[5, 5, 60, 50], mask_input=low)
    half = Predictor(_predictor().model.to(dtype))
    half.set_image(_picture())
    assert half.get_image_embedding().dtype == dtype
    for x, y in zip(half.predict(**POINT, box=[5, 5, 60, 50], mask_input=low), wanted, strict=True):
        assert x.dtype == np.float32
        assert 0 < np.abs(x - y).max() < 0.05 * np.abs(y).max()


def test_bfloat16_model_reads_what_the_float32_model_saved(saved: Path) -> None:
    half = Predictor(_predictor().model.to(torch.bfloat16))
    half.load_embedding(saved)
    assert half.get_image_embedding().dtype == torch.bfloat16
    assert half.predict(**POINT)[0].shape == (3, 60, 90)
