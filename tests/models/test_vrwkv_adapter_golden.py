"""Parity with upstream's VRWKV-Adapter run on the paper's operator: outputs and gradients."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vision.models.vrwkv import VisionRWKV
from vision.models.vrwkv_adapter import BackboneAdapter, checkpoint_filter_fn

pytestmark = pytest.mark.golden

OF_BACKBONE = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "embed_dims": "embed_dim",
    "depth": "depth",
    "post_norm": "post_norm",
    "key_norm": "key_norm",
    "init_values": "init_values",
    "drop_path_rate": "drop_path_rate",
}
OF_ADAPTER = {
    "conv_inplane": "conv_width",
    "n_points": "points",
    "deform_num_heads": "num_heads",
    "deform_ratio": "deform_ratio",
    "cffn_ratio": "ffn_ratio",
    "interaction_indexes": "interaction_indexes",
}


def golden_cases() -> list:
    root = Path(__file__).resolve().parents[2]
    path = Path(os.environ.get("VISION_SHARED", root.parent / "shared")) / "golden/vrwkv_adapter.pt"
    content = torch.load(path, weights_only=True) if path.is_file() else {}
    cases = {name: case for name, case in content.items() if isinstance(case, dict)}
    for case in cases.values():
        case["state_dict"] = case["state_dict"] or cases[case["state_from"]]["state_dict"]
    return [pytest.param(name, case, id=name) for name, case in cases.items()]


def build(name: str, case: dict) -> BackboneAdapter:
    kwargs = dict(case["kwargs"])
    extra = 2 * kwargs.pop("use_extra_extractor", True)
    plain = {OF_BACKBONE[k]: kwargs.pop(k) for k in list(kwargs) if k in OF_BACKBONE}
    options = {OF_ADAPTER[k]: v for k, v in kwargs.items()}
    flavour = "detection" if name.startswith("det") else "segmentation"
    body = VisionRWKV(num_classes=0, **plain)
    model = BackboneAdapter(body, flavour, extra_extractors=extra, **options)
    model.load_state_dict(checkpoint_filter_fn(case["state_dict"], model), strict=True)
    return model.train(case["train"])


def relative_error(got: Tensor, want: Tensor) -> float:
    scale = want.abs().max().double().clamp_min(1e-30)
    return float((got.detach().double() - want.double()).abs().max() / scale)


def test_there_are_golden_cases(shared: Path) -> None:
    names = {case.id for case in golden_cases()}
    assert {"seg", "det"} <= names, f"no adapters in {shared / 'golden'}"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize(("name", "case"), golden_cases())
def test_outputs_and_gradients(name: str, case: dict, dtype: torch.dtype, tolerance: float) -> None:
    model = build(name, case).to(dtype)
    x = case["input"].to(dtype).requires_grad_()
    want = case["results"]["paper"]
    outputs = model(x)
    assert len(outputs) == len(want["outputs"]) == 4
    for got, target in zip(outputs, want["outputs"], strict=True):
        assert got.shape == target.shape
        assert relative_error(got, target) <= tolerance

    weight = [torch.arange(o.numel(), dtype=torch.float64).sin().view_as(o) for o in outputs]
    sum((o * w.to(dtype)).sum() for o, w in zip(outputs, weight, strict=True)).backward()
    # Gradients stored in float32 carry its rounding: 6e-8 of each element.
    assert relative_error(x.grad, want["grad_input"]) <= max(tolerance, 1e-7)
    # Each of our gradients under upstream's name: map an index through the key map.
    ours = dict(model.named_parameters())
    for key, target in want["grad_params"].items():
        probe = {k: torch.zeros_like(v) for k, v in case["state_dict"].items()}
        probe[key] = torch.ones_like(case["state_dict"][key])
        hit = [k for k, v in checkpoint_filter_fn(probe, model).items() if v.any()]
        assert len(hit) == 1, key
        grad = ours[hit[0]].grad.reshape(target.shape)
        assert relative_error(grad, target) <= max(tolerance, 1e-7), key
