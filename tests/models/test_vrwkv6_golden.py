"""VRWKV6: parity with upstream on every golden case; class token, shift in heads, key map."""

import os
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from vision.kernels.testing import max_error
from vision.layers import build_mixer
from vision.layers.vrwkv6_mix import HeadShiftMix, head_shift
from vision.models.complexity import count_complexity
from vision.models.vrwkv import VisionRWKV
from vision.models.vrwkv6 import checkpoint_filter_fn

RENAMED = {
    "embed_dims": "embed_dim",
    "shift_pixel": "shift_pixels",
    "hidden_rate": "mlp_ratio",
    "in_channels": "in_chans",
    "with_cls_token": "class_token",
}


def golden_cases() -> list:
    """Every case of a plain VRWKV6 in every file of the golden folder: its weights tell."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("VISION_SHARED", root.parent / "shared")) / "golden"
    cases = []
    for path in sorted(folder.glob("*vrwkv6*.pt")):
        content = torch.load(path, weights_only=True)
        for name, case in content.items():
            if isinstance(case, dict) and "results" in case:
                state = case["state_dict"] or content[case["state_from"]]["state_dict"]
                cases.append(pytest.param(case, state, id=f"{path.stem}-{name}"))
    return cases


CASES = golden_cases()


def build(case: dict, state: dict[str, Tensor]) -> tuple[VisionRWKV, list[int], bool]:
    """Make the model of a case; return the blocks it puts out, and whether with class tokens."""
    kwargs = {RENAMED.get(k, k): v for k, v in case["kwargs"].items()}
    out = kwargs.pop("out_indices", -1)
    with_class = kwargs.pop("output_cls_token", False)
    kwargs["head_size"] = kwargs["embed_dim"] // kwargs.pop("num_heads")
    model = VisionRWKV(num_classes=0, mixer="wkv6_bi", channel_mixer="head_channel_mix", **kwargs)
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    model.train(case["train"])
    indices = [out] if isinstance(out, int) else list(out)
    return model, [i % len(model.blocks) for i in indices], with_class


def run(model: VisionRWKV, indices: list[int], with_class: bool, x: Tensor) -> list[Tensor]:
    """Upstream's outputs: maps of some blocks, the final norm on the last block only."""
    final, found = model.forward_intermediates(x, indices, return_prefix_tokens=True)
    if indices[-1] == len(model.blocks) - 1:
        grid, (h, w) = found[-1][0], found[-1][0].shape[-2:]
        grid = final[:, : h * w].transpose(1, 2).reshape(grid.shape)
        found[-1] = (grid, final[:, h * w :])
    outputs = []
    for grid, token in found:
        outputs += [grid, token[:, 0]] if with_class else [grid]
    return outputs


@pytest.mark.golden
def test_there_are_golden_cases(shared: Path) -> None:
    assert CASES, f"no VRWKV6 case in {shared / 'golden'}"


@pytest.mark.golden
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize(("case", "state"), CASES)
def test_outputs_and_gradients(case: dict, state: dict, dtype: torch.dtype, tolerance: float):
    model, indices, with_class = build(case, state)
    model.to(dtype)
    x = case["input"].to(dtype).requires_grad_()
    want = case["results"]["paper"]
    outputs = run(model, indices, with_class, x)
    assert len(outputs) == len(want["outputs"])
    for got, target in zip(outputs, want["outputs"], strict=True):
        assert max_error(got.detach(), target) <= tolerance

    weight = [torch.arange(o.numel(), dtype=torch.float64).sin().view_as(o) for o in outputs]
    loss = sum((o * w.to(dtype)).sum() for o, w in zip(outputs, weight, strict=True))
    loss.backward()
    # Gradients stored in float32 carry its rounding: 6e-8 of each element.
    assert max_error(x.grad, want["grad_input"]) <= max(tolerance, 1e-7)
    # Each of our gradients under upstream's name: map an index through the key map.
    ours = dict(model.named_parameters())
    for key, target in want["grad_params"].items():
        probe = {k: torch.zeros_like(v) for k, v in state.items()}
        probe[key] = torch.ones_like(state[key])
        hit = [k for k, v in checkpoint_filter_fn(probe, model).items() if v.any()]
        assert len(hit) == 1, key
        grad = ours[hit[0]].grad.view(target.shape)
        assert max_error(grad, target) <= max(tolerance, 1e-7), key


def small(**kwargs: object) -> VisionRWKV:
    """Two heads, two blocks, with weights that let everything matter."""
    torch.manual_seed(0)
    args = {"embed_dim": 128, "depth": 2, "img_size": 48, **kwargs}
    model = timm.create_model("vrwkv6_tiny_patch16_224", num_classes=5, **args).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".up", ".down", "_up", "_down", "cls_token")):
                p.normal_(std=0.2)
    return model


@pytest.mark.parametrize("extra", [0, 1])
def test_every_head_is_shifted_for_itself(extra: int) -> None:
    h, w, size = 3, 4, 8
    x = torch.randn(2, h * w + extra, 2 * size)
    want = x.clone()
    want[:, : h * w] = 0
    steps = [(0, -1), (0, 1), (-1, 0), (1, 0)]  # where each quarter of a head comes from
    for row in range(h):
        for column in range(w):
            for c in range(2 * size):
                down, across = steps[c % size // 2]
                i, j = row + down, column + across
                if 0 <= i < h and 0 <= j < w:
                    want[:, row * w + column, c] = x[:, i * w + j, c]
    assert torch.equal(head_shift(x, (h, w), size), want)


def test_too_few_tokens_are_named() -> None:
    with pytest.raises(ValueError, match="11 tokens for a grid of 3 x 4"):
        head_shift(torch.zeros(1, 11, 8), (3, 4), 8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_size": 48}, "multiple of head_size, got 64 and 48"),
        ({"shift_pixels": 0}, "shift_pixels of at least 1"),
        ({"shift": "roll"}, "no token shift 'roll'"),
        ({"init_mode": "local"}, "'fancy' alone, got 'local'"),
    ],
)
def test_wrong_options_are_named(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_mixer("wkv6_bi", 64, 0, 2, **change)


def test_the_channel_mix_of_a_token_past_the_grid_is_its_own() -> None:
    mix = HeadShiftMix({"k": torch.rand(8)}, 8)
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(mix(x, (2, 2))[0][:, 4], x[:, 4])


def test_class_token_comes_last_and_is_seen_by_all() -> None:
    model = small(class_token=True)
    x = torch.randn(2, 3, 48, 32)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 7, 128)
    (pair,) = model.forward_intermediates(
        x, [-1], norm=True, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    torch.testing.assert_close(torch.cat(pair, 1), tokens)
    maps = model.forward_intermediates(x, [0], intermediates_only=True)
    assert maps[0].shape == (2, 128, 3, 2)
    torch.testing.assert_close(model(x), model.head(tokens[:, :6].mean(1)))
    model.reset_classifier(5, "token")
    torch.testing.assert_close(model(x), model.head(tokens[:, 6]))
    # Its value changes that of the others, and an image changes it: both scans meet it.
    with torch.no_grad():
        model.cls_token.normal_()
    assert (model.forward_features(x) - tokens)[:, :6].abs().max() > 1e-4
    assert (tokens[0, 6] - tokens[1, 6]).abs().max() > 1e-4
    assert "cls_token" in model.no_weight_decay()


def test_class_token_has_a_gradient_and_features_have_none_of_it() -> None:
    model = small(class_token=True, global_pool="token").train()
    model.set_grad_checkpointing()
    model(torch.randn(1, 3, 48, 48)).sum().backward()
    assert model.cls_token.grad.abs().sum() > 0
    assert model.pos_embed.grad.abs().sum() > 0
    features = small(class_token=True, features_only=True, out_indices=(0, 1))
    assert [f.shape for f in features(torch.randn(1, 3, 48, 32))] == [(1, 128, 3, 2)] * 2


def test_published_names_fit_the_model() -> None:
    model = timm.create_model("vrwkv6_small_patch16_224", depth=2)
    upstream = {}
    att = {f"time_maa_{n}": (1, 1, 384) for n in "xwkvrg"}
    att |= {"time_maa_w1": (384, 160), "time_maa_w2": (5, 32, 384), "time_decay": (1, 1, 384)}
    att |= {"time_decay_w1": (384, 64), "time_decay_w2": (64, 384), "time_faaaa": (6, 64)}
    att |= {f"{n}.weight": (384, 384) for n in ("key", "value", "receptance", "gate", "output")}
    att |= {"ln_x.weight": (384,), "ln_x.bias": (384,)}
    ffn = {"spatial_mix_k": (1, 1, 384), "spatial_mix_r": (1, 1, 384)}
    ffn |= {"key.weight": (1536, 384), "value.weight": (384, 1536), "receptance.weight": (384, 384)}
    for i in range(2):
        parts = {f"att.{n}": s for n, s in att.items()} | {f"ffn.{n}": s for n, s in ffn.items()}
        parts |= {"gamma1": (384,), "gamma2": (384,)}
        for norm in ("ln1", "ln2", "ln0")[: 3 - i]:
            parts |= {f"{norm}.weight": (384,), f"{norm}.bias": (384,)}
        upstream |= {f"backbone.layers.{i}.{n}": s for n, s in parts.items()}
    upstream |= {"backbone.pos_embed": (1, 196, 384), "backbone.ln1.weight": (384,)}
    upstream |= {"backbone.ln1.bias": (384,), "head.fc.weight": (1000, 384)}
    upstream |= {"head.fc.bias": (1000,), "backbone.patch_embed.projection.bias": (384,)}
    upstream |= {"backbone.patch_embed.projection.weight": (384, 3, 16, 16)}
    weights = {name: torch.randn(shape) for name, shape in upstream.items()}
    mapped = checkpoint_filter_fn({"state_dict": weights}, model)
    model.load_state_dict(mapped, strict=True)
    bonus = model.blocks[1].mixer.bonus.view(6, 64)
    torch.testing.assert_close(bonus.data, weights["backbone.layers.1.att.time_faaaa"])
    # Our own files load as they are.
    again = checkpoint_filter_fn(model.state_dict(), model)
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_multiply_adds_are_upstreams() -> None:
    found = count_complexity(timm.create_model("vrwkv6_tiny_patch16_224"), (3, 224, 224))
    assert round(found.macs / 1e9, 3) == 1.659
