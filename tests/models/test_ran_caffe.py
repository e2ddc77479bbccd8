"""Weights of the authors' Caffe definitions: the file format, and what is refused."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import vision  # noqa: F401 -- registers the models
from vision.models.checkpoint import CheckpointError
from vision.models.ran import checkpoint_filter_fn
from vision.models.ran_caffe import caffe_layers, read_caffemodel

NARROW = {"stem_width": 8, "widths": (16, 32, 64, 128), "num_classes": 5}


def varint(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def field(number: int, content: bytes) -> bytes:
    """A field of bytes of a protocol buffer message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def blob(values: Tensor, legacy: bool = False) -> bytes:
    """A BlobProto: packed floats, and the shape in the new or in the old way."""
    data = field(5, struct.pack(f"<{values.numel()}f", *values.flatten().tolist()))
    if not legacy:
        return field(7, field(1, b"".join(varint(n) for n in values.shape))) + data
    shape = [1] * (4 - values.ndim) + list(values.shape)
    return b"".join(varint(n << 3) + varint(side) for n, side in enumerate(shape, 1)) + data


def write(path: Path, layers: dict[str, list[Tensor]], legacy: bool = False) -> Path:
    """A .caffemodel with the fields that real ones have beside name and blobs."""
    content = field(1, b"a net")
    for name, blobs in layers.items():
        layer = field(1, name.encode()) + field(2, b"Convolution") + field(3, b"bottom")
        content += field(100, layer + b"".join(field(7, blob(b, legacy)) for b in blobs))
    path.write_bytes(content)
    return path


def blobs_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """What Caffe would save: norms keep the inverse standard deviation."""
    found = {}
    for layer, path in caffe_layers(model).items():
        module = model.get_submodule(path)
        found[layer] = [p.detach() for p in module.parameters()]
        if isinstance(module, nn.BatchNorm2d):
            found[layer] += [module.running_mean, (module.running_var + 1e-5).rsqrt()]
            found[layer] = [b.view(1, -1, 1, 1) for b in found[layer]]
    return found


def trained(name: str, **kwargs: object) -> nn.Module:
    """A model whose statistics and scales are those of no fresh one."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**NARROW, **kwargs})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
        for key, buffer in model.named_buffers():
            if key.endswith(("mean", "var")):
                buffer.add_(torch.rand_like(buffer))
    return model.eval()


@pytest.mark.parametrize(("name", "legacy"), [("ran56", False), ("ranext56", True)])
def test_a_caffemodel_becomes_the_model(name: str, legacy: bool, tmp_path: Path) -> None:
    model = trained(name)
    path = write(tmp_path / "w.caffemodel", blobs_of(model), legacy)
    read = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 5},
        **NARROW,
    )
    for key, value in model.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(read.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_the_tool_makes_plain_weights_of_it(tmp_path: Path, repo_root: Path) -> None:
    model = trained("ran56")
    path, out = write(tmp_path / "w.caffemodel", blobs_of(model)), tmp_path / "w.safetensors"
    tool = [sys.executable, str(repo_root / "tools" / "convert_checkpoint.py")]
    options = [f"{key}={value}".replace(" ", "") for key, value in NARROW.items()]
    command = [*tool, str(path), "ran56", str(out), "--model-args", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = timm.create_model("ran56", checkpoint_path=str(out), **NARROW)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(read.eval()(x), model(x), rtol=1e-4, atol=1e-5)


def test_floats_one_by_one(tmp_path: Path) -> None:
    """Writers may leave repeated floats unpacked."""
    values = b"".join(varint(5 << 3 | 5) + struct.pack("<f", v) for v in (1.5, -2.0))
    shape = field(7, varint(1 << 3) + varint(2))
    path = tmp_path / "w.caffemodel"
    path.write_bytes(field(100, field(1, b"fc") + field(7, values + shape)))
    assert read_caffemodel(path)["fc/0"].tolist() == [1.5, -2.0]


def test_files_that_are_no_caffemodel(tmp_path: Path) -> None:
    path = write(tmp_path / "w.caffemodel", {"conv1": [torch.rand(4, 3, 7, 7)]})
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="truncated or no"):
        read_caffemodel(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError):
        read_caffemodel(path)
    path.write_bytes(field(1, b"a net"))
    with pytest.raises(CheckpointError, match="no layer with parameters"):
        read_caffemodel(path)
    path.write_bytes(field(2, field(4, b"conv1")))
    with pytest.raises(CheckpointError, match="first format"):
        read_caffemodel(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_caffemodel(tmp_path / "none.caffemodel")


def as_state(layers: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {f"{name}/{i}": b for name, blobs in layers.items() for i, b in enumerate(blobs)}


def test_weights_of_another_network_are_refused() -> None:
    blobs = blobs_of(trained("ran56"))
    with pytest.raises(CheckpointError, match=r"not in the file.*AttentionB_2"):
        checkpoint_filter_fn(as_state(blobs), trained("ran92"))
    with pytest.raises(CheckpointError, match=r"not in the model.*AttentionA_1/mask/down_sample"):
        checkpoint_filter_fn(as_state(blobs), trained("ranext56"))
    with pytest.raises(CheckpointError, match=r"layer classifier: wanted blobs of \[\(7, 128\)"):
        checkpoint_filter_fn(as_state(blobs), trained("ran56", num_classes=7))
    del blobs["conv1/bn"][3]
    with pytest.raises(CheckpointError, match="layer conv1/bn: wanted blobs"):
        checkpoint_filter_fn(as_state(blobs), trained("ran56"))


def test_own_checkpoints() -> None:
    model = trained("ran56")
    state = model.state_dict()
    plain = checkpoint_filter_fn(state, model)
    assert set(plain) == set(state)
    trained_by_mm = {f"backbone.{k}": v for k, v in state.items()} | {
        "decode_head.w": torch.ones(1)
    }
    found = checkpoint_filter_fn({"state_dict": trained_by_mm}, model)
    assert all(torch.equal(found[k], v) for k, v in state.items())
    with pytest.raises(CheckpointError, match="not in the checkpoint"):
        checkpoint_filter_fn(state, trained("ran92"))
    with pytest.raises(CheckpointError, match=r"one stem\.conv\.weight"):
        checkpoint_filter_fn({"patch_embed.weight": torch.ones(1)}, model)
