"""Parity with upstream Vision-RWKV run on the paper's operator: outputs and gradients."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vision.models.vrwkv import VisionRWKV, checkpoint_filter_fn

pytestmark = pytest.mark.golden

RENAMED = {
    "embed_dims": "embed_dim",
    "shift_pixel": "shift_pixels",
    "hidden_rate": "mlp_ratio",
    "shift_mode": "shift",
    "in_channels": "in_chans",
    "drop_rate": "pos_drop_rate",
}


def state_of(content: dict, case: dict) -> dict[str, Tensor]:
    return case["state_dict"] or content[case["state_from"]]["state_dict"]


def is_plain_vrwkv(content: dict, case: object) -> bool:
    """Whether an entry of a file is a case of a plain Vision-RWKV: its weights tell."""
    if not isinstance(case, dict) or not {"kwargs", "results", "state_dict"} <= set(case):
        return False
    state = state_of(content, case)
    plain = {"pos_embed", "patch_embed.projection.weight", "layers.0.att.spatial_decay"}
    return plain <= set(state) and "level_embed" not in state


def golden_cases() -> list:
    """Every case of a plain Vision-RWKV in every file of the golden folder."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("VISION_SHARED", root.parent / "shared")) / "golden"
    cases = []
    for path in sorted(folder.glob("*.pt")):
        content = torch.load(path, weights_only=True)
        for name, case in content.items() if isinstance(content, dict) else ():
            if is_plain_vrwkv(content, case):
                cases.append(pytest.param(case, state_of(content, case), id=f"{path.stem}-{name}"))
    return cases


def build(case: dict, state: dict[str, Tensor]) -> tuple[VisionRWKV, list[int]]:
    kwargs = {RENAMED.get(k, k): v for k, v in case["kwargs"].items()}
    out = kwargs.pop("out_indices", -1)
    model = VisionRWKV(num_classes=0, **kwargs)
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    model.train(case["train"])
    indices = [out] if isinstance(out, int) else list(out)
    return model, [i % len(model.blocks) for i in indices]


def run(model: VisionRWKV, indices: list[int], x: Tensor) -> list[Tensor]:
    """Upstream's outputs: maps of some blocks, the final norm on the last block only."""
    final, maps = model.forward_intermediates(x, indices)
    if indices[-1] == len(model.blocks) - 1:
        maps[-1] = final.transpose(1, 2).reshape(maps[-1].shape)
    return maps


def relative_error(got: Tensor, want: Tensor) -> float:
    scale = want.abs().max().double().clamp_min(1e-30)
    return float((got.detach().double() - want.double()).abs().max() / scale)


def test_there_are_golden_cases(shared: Path) -> None:
    assert golden_cases(), f"no Vision-RWKV case in {shared / 'golden'}"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize(("case", "state"), golden_cases())
def test_outputs_and_gradients(case: dict, state: dict, dtype: torch.dtype, tolerance: float):
    model, indices = build(case, state)
    model.to(dtype)
    x = case["input"].to(dtype).requires_grad_()
    want = case["results"]["paper"]
    outputs = run(model, indices, x)
    assert len(outputs) == len(want["outputs"])
    for got, target in zip(outputs, want["outputs"], strict=True):
        assert got.shape == target.shape
        assert relative_error(got, target) <= tolerance

    weight = [torch.arange(o.numel(), dtype=torch.float64).sin().view_as(o) for o in outputs]
    loss = sum((o * w.to(dtype)).sum() for o, w in zip(outputs, weight, strict=True))
    loss.backward()
    # Gradients stored in float32 carry its rounding: 6e-8 of each element.
    assert relative_error(x.grad, want["grad_input"]) <= max(tolerance, 1e-7)
    # Each of our gradients under upstream's name: map an index through the key map.
    ours = dict(model.named_parameters())
    for key, target in want["grad_params"].items():
        probe = {k: torch.zeros_like(v) for k, v in state.items()}
        probe[key] = torch.ones_like(state[key])
        hit = [k for k, v in checkpoint_filter_fn(probe, model).items() if v.any()]
        assert len(hit) == 1, key
        grad = ours[hit[0]].grad.view(target.shape)
        assert relative_error(grad, target) <= max(tolerance, 1e-7), key
