"""Residual Attention Network: sizes, timm's contract, switches."""

import itertools
import math

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

import vision  # noqa: F401 -- registers the models
from vision.models.complexity import count_complexity
from vision.models.ran_blocks import (
    AttentionModule,
    EncoderDecoderMask,
    HalvingPool,
    MaskHead,
    PreActUnit,
    channel_attention,
    spatial_attention,
)

# Parameters and multiply-adds of convolutions and classifier at the native size, from the authors'
# definitions; those for CIFAR are the reconstruction's.
PUBLISHED = {
    "ran56": (31_810_728, 6_270_836_736),
    "ran92": (52_466_344, 10_533_789_696),
    "ranext56": (31_318_824, 6_419_106_816),
    "ranext92": (52_102_952, 10_704_337_920),
}
RECONSTRUCTED = {
    "ran_cifar56": 1_030_362,
    "ran_cifar92": 1_841_242,
    "ran_cifar128": 2_652_122,
    "ran_cifar164": 3_463_002,
    "ran_cifar236": 5_084_762,
    "ran_cifar452": 8_511_962,
}
NARROW = {"stem_width": 8, "widths": (16, 32, 64, 128)}
NARROW_CIFAR = {"stem_width": 8, "widths": (16, 32, 64)}
CASES = {
    "ran56": NARROW,
    "ranext92": NARROW,
    "ran_cifar92": NARROW_CIFAR,
    "resnet164_cifar": {**NARROW_CIFAR, "units_before": (2, 2, 2)},
}
SIZES = [(64, 96), (45, 33)]


def small(name: str, **kwargs: object) -> nn.Module:
    """The registered model, narrow so that it is quick, with the statistics of a batch."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**CASES.get(name, {}), **kwargs}).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(images((64, 64), kwargs.get("in_chans", 3), batch=4))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def images(size: tuple[int, int], channels: int = 3, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def test_all_models_are_registered() -> None:
    wanted = {*PUBLISHED, *RECONSTRUCTED, "ran_nano", "resnet164_cifar"}
    assert set(timm.list_models(module="ran")) == wanted


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        found = count_complexity(timm.create_model(name), (3, 224, 224))
    assert (found.params, found.matmul) == PUBLISHED[name]


@pytest.mark.parametrize("name", RECONSTRUCTED)
def test_reconstructed_sizes(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == RECONSTRUCTED[name]
    masks = {n for n, m in model.named_modules() if isinstance(m, EncoderDecoderMask)}
    trunk = [
        n
        for n, m in model.named_modules()
        if isinstance(m, PreActUnit) and not any(n.startswith(mask) for mask in masks)
    ]
    # Stem and classifier are two layers, each unit on the trunk three.
    assert 2 + 3 * len(trunk) == int(name.removeprefix("ran_cifar"))


def test_reconstructed_cost() -> None:
    with torch.device("meta"):
        found = count_complexity(timm.create_model("ran_cifar56"), (3, 32, 32))
    assert round(found.matmul / 1e6) == 123


def test_resnet164_is_the_papers() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet164_cifar")
    assert sum(p.numel() for p in model.parameters()) == 1_703_258
    assert sum(isinstance(m, PreActUnit) for m in model.modules()) == 54


@pytest.mark.parametrize("name", CASES)
class TestContract:
    @pytest.mark.parametrize("size", SIZES)
    def test_forward(self, name: str, size: tuple[int, int]) -> None:
        model = small(name, num_classes=7)
        with torch.no_grad():
            logits = model(images(size))
            features = model.forward_features(images(size))
            before = model.forward_head(features, pre_logits=True)
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
        assert features.shape[:2] == (2, model.num_features)
        assert before.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(before, features.mean((2, 3)))
        torch.testing.assert_close(model.get_classifier()(before), logits)

    def test_features_match_feature_info(self, name: str) -> None:
        model = small(name, features_only=True)
        info = model.feature_info
        strides = [1, 1, 2, 4] if "cifar" in name else [2, 4, 8, 16, 32]
        assert info.reduction() == strides
        for size in ((64, 128), (61, 40)):
            maps = model(images(size))
            assert len(maps) == len(strides)
            for found, channels, stride in zip(maps, info.channels(), strides, strict=True):
                assert found.shape[:2] == (2, channels)
                for side, whole in zip(found.shape[2:], size, strict=True):
                    assert whole // stride <= side <= math.ceil(whole / stride)
        chosen = small(name, features_only=True, out_indices=(0, 2))
        sub = chosen(images((64, 96)))
        assert [f.shape[1] for f in sub] == chosen.feature_info.channels()
        assert [f.shape[1] for f in sub] == [info.channels()[0], info.channels()[2]]
        for key, p in chosen.named_parameters():
            assert "stages.2" not in key
            assert p.numel()

    def test_intermediates(self, name: str) -> None:
        model = small(name, num_classes=0)
        x = images(SIZES[0])
        with torch.no_grad():
            final, maps = model.forward_intermediates(x)
            torch.testing.assert_close(final, model.forward_features(x))
            torch.testing.assert_close(final, model.norm(maps[-1].clone()))
            first = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
            normed = model.forward_intermediates(x, [-1], norm=True, intermediates_only=True)
        assert len(maps) == len(model.feature_info)
        torch.testing.assert_close(first[0], maps[1])
        torch.testing.assert_close(normed[0], final)
        with pytest.raises(ValueError, match="'NCHW'"):
            model.forward_intermediates(x, output_fmt="NLC")

    def test_taps_are_not_overwritten(self, name: str) -> None:
        """Activations work in place: none may reach into a map that was handed out."""
        model = small(name, num_classes=0)
        x = images(SIZES[0])
        with torch.no_grad():
            _, together = model.forward_intermediates(x)
            for i, found in enumerate(together):
                alone = model.forward_intermediates(x, [i], stop_early=True)[1][0]
                torch.testing.assert_close(found, alone, rtol=0, atol=0)

    # At 16 px the masks of the third stage read one pixel: their levels lose the pooling only.
    @pytest.mark.parametrize("side", [16, 48])
    def test_every_parameter_has_a_gradient(self, name: str, side: int) -> None:
        model = small(name, num_classes=5).train()
        found = gradients(model, images((side, side), batch=4))
        for key, p in model.named_parameters():
            assert key in found, key
            assert found[key].isfinite().all(), key
            assert found[key].shape == p.shape

    def test_grad_checkpointing_changes_nothing(self, name: str) -> None:
        x = images((48, 64))
        runs = []
        for enable in (False, True):
            model = small(name, num_classes=5).train()
            model.set_grad_checkpointing(enable)
            out = model(x)
            statistics = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
            runs.append((out, gradients(model, x), model.state_dict(), statistics))
        plain, kept = runs
        torch.testing.assert_close(plain[0], kept[0], rtol=0, atol=0)
        for key, value in plain[1].items():
            torch.testing.assert_close(value, kept[1][key], rtol=1e-5, atol=1e-6)
        for key, value in plain[2].items():
            assert torch.equal(value, kept[2][key]), f"{key} was updated twice"

    def test_classifier(self, name: str) -> None:
        model = small(name, num_classes=4)
        assert model.get_classifier().out_features == 4
        model.reset_classifier(9, "max")
        assert model.num_classes == 9
        with torch.no_grad():
            assert model(images(SIZES[0])).shape == (2, 9)
            features = model.forward_features(images(SIZES[0]))
            pooled = model.forward_head(features, pre_logits=True)
            torch.testing.assert_close(pooled, features.amax((2, 3)))
            model.reset_classifier(0, "")
            assert model(images((64, 64))).ndim == 4
        with pytest.raises(ValueError, match="no global_pool 'token'"):
            model.reset_classifier(3, "token")
        with pytest.raises(ValueError, match="needs pooled features"):
            model.reset_classifier(3)

    def test_channels_last_and_other_channels(self, name: str) -> None:
        model = small(name, num_classes=5, in_chans=1)
        x = images(SIZES[0], channels=1)
        with torch.no_grad():
            plain = model(x)
            last = model.to(memory_format=torch.channels_last)(
                x.to(memory_format=torch.channels_last)
            )
        assert relative(last, plain) < 1e-4

    def test_bfloat16(self, name: str) -> None:
        model = small(name, num_classes=5)
        x = images((64, 64))
        with torch.no_grad():
            want = model.forward_intermediates(x, [1], intermediates_only=True)[0]
            with torch.autocast("cpu", torch.bfloat16):
                mixed = model.forward_intermediates(x, [1], intermediates_only=True)[0]
            half = model.bfloat16()
            got = half.forward_intermediates(x.bfloat16(), [1], intermediates_only=True)[0]
            assert half(x.bfloat16()).dtype == torch.bfloat16
        # One stage: the rounding of a hundred layers of random weights says nothing.
        assert relative(got.float(), want) < 0.1
        assert relative(mixed.float(), want) < 0.1

    def test_groups_and_decay(self, name: str) -> None:
        model = small(name, num_classes=5)
        names = {key for key, _ in model.named_parameters()}
        assert model.no_weight_decay() == set()
        for coarse in (False, True):
            depths = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
            assert set(depths) == names
            stages = [
                {d for k, d in depths.items() if k.startswith(f"stages.{i}.")}
                for i in range(len(model.stages))
            ]
            stem = {d for k, d in depths.items() if k.startswith("stem.")}
            head = {d for k, d in depths.items() if k.startswith("head.")}
            order = [stem, *stages, head]
            for before, after in itertools.pairwise(order):
                assert max(before) < min(after)
            assert len(stages[0]) == (1 if coarse else len(model.stages[0]))

    def test_default_cfg_names_real_modules(self, name: str) -> None:
        model = small(name)
        cfg = model.pretrained_cfg
        assert model.get_submodule(cfg["classifier"]).out_features == cfg["num_classes"]
        assert model.get_submodule(cfg["first_conv"]).in_channels == 3
        with torch.no_grad():
            final = model.forward_features(images(cfg["input_size"][1:], batch=1))
        assert final.shape[2:] == cfg["pool_size"]

    def test_unknown_argument_is_an_error(self, name: str) -> None:
        with pytest.raises(TypeError, match="depht"):
            timm.create_model(name, depht=3)

    def test_folded_norms_compute_the_same(self, name: str) -> None:
        model = small(name, num_classes=5)
        with pytest.raises(ValueError, match=r"call model\.eval"):
            model.train().fold_norms()
        x = images(SIZES[1])
        with torch.no_grad():
            want = model.eval()(x)
            assert relative(model.fold_norms()(x), want) < 1e-4


@pytest.mark.parametrize("side", [16, 17, 24, 31])
def test_small_images(side: int) -> None:
    """A pooling that would leave nothing is left out; what is larger is pooled as ever."""
    model = small("ran56", num_classes=3)
    with torch.no_grad():
        assert model(images((side, side))).isfinite().all()
        assert model(images((side, 64))).isfinite().all()
    pool = HalvingPool()
    for height, width in ((1, 1), (1, 8), (8, 1)):
        x = torch.randn(1, 2, height, width)
        assert pool(x) is x
    assert pool(torch.randn(1, 2, 2, 7)).shape == (1, 2, 1, 3)


def test_pooling_looks_beyond_no_border() -> None:
    """k3 s2, no padding, rounded up: the last window may be cut, the first is not."""
    x = torch.tensor([5.0, 1, 1, 1, 2, 7]).repeat(6, 1)[None, None]
    assert HalvingPool()(x)[0, 0, 0].tolist() == [5, 2, 7]


class TestMasks:
    def test_names_and_shapes(self) -> None:
        model = small("ran_cifar92")
        x = images((32, 40))
        with torch.no_grad():
            masks = model.attention_masks(x)
        names = [n for n, m in model.named_modules() if isinstance(m, AttentionModule)]
        assert list(masks) == names == [f"stages.{i}.{j}" for i in range(3) for j in (1, 2)]
        for i in range(3):
            mask = masks[f"stages.{i}.1"]
            assert mask.shape == (2, (16, 32, 64)[i], 32 >> i, 40 >> i)
            assert mask.min() > 0
            assert mask.max() < 1
        assert small("resnet164_cifar").attention_masks(x) == {}

    def test_they_are_what_the_network_computes(self) -> None:
        model = small("ranext56", **NARROW)
        x = images((64, 64))
        seen = {}
        for name, module in model.named_modules():
            if isinstance(module, MaskHead):
                module.register_forward_hook(lambda m, a, out, n=name: seen.update({n: out}))
        with torch.no_grad():
            model(x)
            wanted = dict(seen)
            maps = model.attention_maps(x)
        assert len(maps) == 3
        for name, found in maps.items():
            torch.testing.assert_close(found.mask, wanted[f"{name}.mask.head"])
            torch.testing.assert_close(found.attended, (1 + found.mask) * found.trunk)

    def test_naive_attention(self) -> None:
        maps = small("ran_nano", attention="nal").attention_maps(images((32, 32)))
        for found in maps.values():
            torch.testing.assert_close(found.attended, found.mask * found.trunk)

    def test_features_keep_their_size_by_attention_residuals_alone(self) -> None:
        """Paper, section 3.2: repeated masks of 0 to 1 degrade the features' values.

        With attention residuals the features grow from module to module, without they stay.
        """
        x = images((32, 32), batch=8)
        growth = {}
        for kind in ("arl", "nal"):
            model = small("ran_cifar164", **NARROW_CIFAR, attention=kind).train()
            with torch.no_grad():
                maps = [m.attended for n, m in model.attention_maps(x).items() if "stages.1" in n]
            growth[kind] = float(maps[-1].abs().mean() / maps[0].abs().mean())
        assert growth["arl"] > 2
        assert growth["nal"] < 2

    def test_channel_attention(self) -> None:
        x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
        want = x / x.square().sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(channel_attention(x), want)
        maps = small("ran_nano", mask_act="channel").attention_maps(images((32, 32)))
        for found in maps.values():
            lengths = found.mask.square().sum(1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths))

    def test_spatial_attention(self) -> None:
        x = torch.randn(2, 3, 6, 5, dtype=torch.float64) * 4 + 1
        flat = x.flatten(2)
        std = flat.std(2, correction=0, keepdim=True)
        want = torch.sigmoid((flat - flat.mean(2, keepdim=True)) / std).view_as(x)
        torch.testing.assert_close(spatial_attention(x), want, rtol=1e-5, atol=1e-5)
        assert small("ran_nano", mask_act="spatial")(images((16, 16))).isfinite().all()

    def test_structures(self) -> None:
        counts = {}
        for mask in ("encdec", "local", "none"):
            model = small("ran_nano", mask=mask)
            found = gradients(model, images((32, 32)))
            assert set(found) == {n for n, _ in model.named_parameters()}
            counts[mask] = (
                len(model.attention_masks(images((32, 32)))),
                sum(isinstance(m, PreActUnit) for m in model.modules()),
                sum(isinstance(m, HalvingPool) for m in model.modules()),
            )
        # units: 6 of the stages, 4 in each module; masks of 2 + 2 + 2 levels ... and 3 local ones
        assert counts["none"] == (0, 6 + 3 * 4, 0)
        assert counts["local"] == (3, 6 + 3 * (4 + 3), 0)
        assert counts["encdec"] == (3, 6 + 3 * 4 + (8 + 5 + 2), 3)

    def test_counts_of_units(self) -> None:
        module = small("ran_nano", p=2, t=3, r=2, mask_depths=(2, 1, 1)).stages[0][1]
        assert [len(module.pre), len(module.trunk), len(module.post)] == [2, 3, 2]
        assert [len(row) for row in module.mask.down] == [2, 4]
        assert [len(row) for row in module.mask.up] == [2]
        assert len(module.mask.skip) == 1
        bottom = small("ran_nano", r=2, mask_bottom=1).stages[0][1].mask.down[-1]
        assert len(bottom) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "vgg"}, "no unit 'vgg'; there are 'preact', 'resnext'"),
        ({"attention": "no"}, "no attention 'no'"),
        ({"mask": "unet"}, "no mask 'unet'"),
        ({"mask_act": "relu"}, "no mask_act 'relu'"),
        ({"global_pool": "token"}, "no global_pool 'token'"),
        ({"global_pool": "", "num_classes": 3}, "needs pooled features"),
        ({"m": (1, 1)}, "one number for each stage"),
        ({"mask_depths": (1, 0, 1)}, "mask_depth of 1 or more, got 0"),
        ({"units_before": (1, 0, 1)}, "units_before of 1 or more"),
        ({"t": 0}, "t=0"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("ran_nano", **options)


@pytest.mark.parametrize("bad", [(3, 32, 32), (1, 3, 0, 32)])
def test_wrong_input_shape_is_named(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="wanted a batch of images"):
        small("ran_nano")(torch.zeros(bad))


def test_pretrained_without_weights_says_so() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("ran56", pretrained=True)


# Stem, pooling and masks of two depths: all kinds of layers, and quick to trace.
TWO_STAGES = {
    "stem_width": 8,
    "widths": (16, 32),
    "m": (1, 1),
    "mask_depths": (2, 1),
    "units_before": (1, 1),
    "units_after": (0, 0),
}


def test_compile_has_no_graph_break() -> None:
    model = small("ran56", num_classes=5, **TWO_STAGES)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    x = images((64, 96))
    want, got = gradients(model, x), gradients(compiled, x)
    for key, value in want.items():
        torch.testing.assert_close(got["_orig_mod." + key], value, rtol=1e-4, atol=1e-5)


def test_onnx_runs_elsewhere(tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
    model = small("ran56", num_classes=5, **TWO_STAGES)
    x = images((64, 96), batch=1)
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-4)
