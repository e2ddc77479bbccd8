"""Models by the name a user typed: what is said of a wrong name, option or file."""

from pathlib import Path

import pytest
import timm
import torch

from vision.models.checkpoint import CheckpointError, read_checkpoint, write_weights
from vision.models.factory import check_model_name, make_model


def test_makes_what_timm_makes() -> None:
    torch.manual_seed(0)
    made = make_model("vrwkv_nano_patch8_224", num_classes=3)
    torch.manual_seed(0)
    expected = timm.create_model("vrwkv_nano_patch8_224", num_classes=3)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(made.eval()(x), expected.eval()(x))


def test_a_wrong_name_brings_close_ones() -> None:
    check_model_name("vit_tiny_patch16_224.augreg_in21k")  # a tag of weights is no part of it
    with pytest.raises(
        ValueError, match=r"no model 'vrwkv_tny'; close names: .*vrwkv_tiny_patch16"
    ):
        make_model("vrwkv_tny")


def test_a_wrong_option_names_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not make vrwkv_nano_patch8_224 .*'patch'"):
        make_model("vrwkv_nano_patch8_224", patch=8)
    path = tmp_path / "w.safetensors"
    write_weights({"head.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="wanted the weights of one Vision-RWKV"):
        make_model(
            "vrwkv_nano_patch8_224", pretrained=True, pretrained_cfg_overlay={"file": str(path)}
        )


def test_a_page_instead_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_text("<html>404</html>")
    with pytest.raises(CheckpointError, match="error page") as error:
        read_checkpoint(path)
    assert "weights_only" not in str(error.value)  # torch's advice to run what it holds
    with pytest.raises(FileNotFoundError, match=r"is a folder; in .* there are: w\.pth"):
        read_checkpoint(tmp_path)
