"""The timm contract, for every model of token blocks that the package registers."""

import itertools

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.models._registry import _model_entrypoints
from torch import Tensor, nn

import vision  # noqa: F401 -- registers the models

# The families, with keywords that switch on what is off by default and cut what is not a block.
FAMILIES = {
    "vision.models.vrwkv": {},
    "vision.models.vrwkv6": {},
    "vision.models.rwkv_sam": {"use_pos_embed": True, "conv_depths": (1, 2)},
}
MODELS = sorted(name for name, fn in _model_entrypoints.items() if fn.__module__ in FAMILIES)
NANOS = [name for name in MODELS if "nano" in name]
PARAMS = {
    "vrwkv_tiny_patch16_224": 6_155_176,
    "vrwkv_small_patch16_224": 23_820_136,
    "vrwkv_base_patch16_224": 93_645_544,
    "vrwkv_large_patch16_192": 334_881_768,
    "vrwkv6_tiny_patch16_224": 7_641_256,
    "vrwkv6_small_patch16_224": 27_677_032,
    "vrwkv6_base_patch16_224": 104_898_280,
}
SIZES = [(64, 96), (40, 33)]  # neither square, the second no multiple of a patch


def small(name: str, **kwargs: object) -> nn.Module:
    """The registered model, cut to two blocks so that the large ones are quick."""
    torch.manual_seed(0)
    family = FAMILIES[_model_entrypoints[name].__module__]
    return timm.create_model(name, depth=2, **family, **kwargs).eval()


def images(size: tuple[int, int], channels: int = 3, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator)


def padded_to(model: nn.Module) -> int:
    """The multiple of pixels that the model fills its input up to."""
    return max(info["reduction"] for info in model.feature_info)


def as_tokens(features: Tensor) -> Tensor:
    """Tokens (B, T, C) of what `forward_features` gives, tokens or a map (B, C, h, w)."""
    return features if features.ndim == 3 else features.flatten(2).transpose(1, 2)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_models_are_registered() -> None:
    assert set(PARAMS) <= set(MODELS)
    assert set(MODELS) <= set(timm.list_models("*rwkv*"))


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_count(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMS[name]


@pytest.mark.parametrize("name", MODELS)
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
        patch = padded_to(model)
        tokens = -(-size[0] // patch) * -(-size[1] // patch)
        assert as_tokens(features).shape == (2, tokens, model.num_features)
        assert before.shape == (2, model.head_hidden_size)
        torch.testing.assert_close(model.get_classifier()(before), logits)

    def test_padding_is_zeros_at_bottom_and_right(self, name: str) -> None:
        model = small(name, num_classes=0)
        patch = padded_to(model)
        x = images((patch + 3, 2 * patch - 1))
        padded = torch.zeros(2, 3, 2 * patch, 2 * patch)
        padded[..., : patch + 3, : 2 * patch - 1] = x
        with torch.no_grad():
            torch.testing.assert_close(model(x), model(padded))

    def test_one_pixel(self, name: str) -> None:
        with torch.no_grad():
            assert small(name, num_classes=3)(images((1, 1))).isfinite().all()

    def test_features_match_feature_info(self, name: str) -> None:
        model = small(name, features_only=True, out_indices=(0, -1))
        assert len(model.feature_info.channels()) == 2
        for size in SIZES:
            maps = model(images(size))
            whole = padded_to(model)
            for i, found in enumerate(maps):
                stride = model.feature_info.reduction()[i]
                want = tuple(-(-s // whole) * whole // stride for s in size)
                assert found.shape == (2, model.feature_info.channels()[i], *want)

    def test_intermediates(self, name: str) -> None:
        model = small(name, num_classes=0)
        x = images(SIZES[0])
        with torch.no_grad():
            final, maps = model.forward_intermediates(x)
            torch.testing.assert_close(final, model.forward_features(x))
            tokens = model.forward_intermediates(
                x, [-1], norm=True, output_fmt="NLC", intermediates_only=True
            )[0]
            first = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)[0]
        modules = [info["module"] for info in model.feature_info]
        assert len(maps) == len(modules)
        torch.testing.assert_close(tokens, as_tokens(final))
        torch.testing.assert_close(first, maps[0])
        normed = model.norm(as_tokens(maps[modules.index("blocks.1")]))
        torch.testing.assert_close(normed, as_tokens(final))
        with pytest.raises(ValueError, match="'NCHW' or 'NLC'"):
            model.forward_intermediates(x, output_fmt="NHWC")

    def test_every_parameter_has_a_gradient(self, name: str) -> None:
        model = small(name, num_classes=5)
        found = gradients(model, images((48, 64)))
        for key, p in model.named_parameters():
            assert key in found, key
            assert found[key].isfinite().all(), key
            assert found[key].shape == p.shape
            assert found[key].abs().sum() > 0, key

    def test_grad_checkpointing_changes_nothing(self, name: str) -> None:
        model = small(name, num_classes=5, drop_path_rate=0.2).train()
        x = images((48, 64))
        runs = []
        for enable in (False, True):
            model.set_grad_checkpointing(enable)
            torch.manual_seed(3)
            out = model(x)
            torch.manual_seed(3)
            runs.append((out, gradients(model, x)))
        torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-6, atol=1e-6)
        for key, value in runs[0][1].items():
            torch.testing.assert_close(value, runs[1][1][key], rtol=1e-5, atol=1e-6)

    def test_classifier(self, name: str) -> None:
        model = small(name, num_classes=4)
        assert model.get_classifier().out_features == 4
        model.reset_classifier(9, "max")
        assert model.num_classes == 9
        assert model.global_pool == "max"
        with torch.no_grad():
            assert model(images(SIZES[0])).shape == (2, 9)
            model.reset_classifier(0, "")
            assert model(images((64, 64))).ndim == 3  # tokens stay
        with pytest.raises(ValueError, match="no global_pool 'token'"):
            model.reset_classifier(3, "token")

    @pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
    def test_pooling(self, name: str, pool: str) -> None:
        model = small(name, num_classes=0, global_pool=pool)
        model.pre_logits = nn.Identity()
        features = torch.randn_like(model.forward_features(images((64, 96))))
        tokens = as_tokens(features)
        want = {
            "avg": tokens.mean(1),
            "max": tokens.amax(1),
            "avgmax": (tokens.mean(1) + tokens.amax(1)) / 2,
        }
        torch.testing.assert_close(model.forward_head(features), want[pool])

    def test_input_options(self, name: str) -> None:
        model = small(name, in_chans=1, img_size=(50, 70), num_classes=2)
        patch = padded_to(model)
        assert model.pos_embed.shape[1] == -(-50 // patch) * -(-70 // patch)
        x = images((50, 70), channels=1)
        with torch.no_grad():
            before = model(x)
            model.set_input_size((96, 32))
            assert model.pos_embed.shape[1] == (96 // patch) * (32 // patch)
            assert model(images((96, 32), channels=1)).shape == before.shape

    def test_channels_last(self, name: str) -> None:
        model = small(name, num_classes=5)
        x = images(SIZES[0])
        with torch.no_grad():
            plain = model(x)
            last = model.to(memory_format=torch.channels_last)(
                x.to(memory_format=torch.channels_last)
            )
        torch.testing.assert_close(plain, last, rtol=1e-5, atol=1e-5)

    def test_bfloat16(self, name: str) -> None:
        model = small(name, num_classes=5)
        x = images((64, 64))
        with torch.no_grad():
            want = model(x)
            got = model.bfloat16()(x.bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                mixed = model.float()(x)
        assert got.dtype == torch.bfloat16
        scale = want.abs().max()
        assert (got.float() - want).abs().max() < 0.05 * scale
        assert (mixed.float() - want).abs().max() < 0.05 * scale

    def test_groups_and_decay(self, name: str) -> None:
        model = small(name, num_classes=5)
        names = [key for key, _ in model.named_parameters()]
        assert model.no_weight_decay() <= set(names)
        depths = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
        assert set(depths) == set(names)
        of_block = [
            {d for k, d in depths.items() if k.startswith(f"blocks.{i}.")} for i in range(2)
        ]
        before = list(itertools.takewhile(lambda key: not key.startswith("blocks."), names))
        first = model.pretrained_cfg["first_conv"]
        head = {d for k, d in depths.items() if k.startswith("head")}
        assert all(len(group) == 1 for group in of_block)
        assert depths[f"{first}.weight"] == depths[f"{first}.bias"] == 0
        assert max(depths[key] for key in before) < max(of_block[0]) < max(of_block[1]) < min(head)

    def test_default_cfg_names_real_modules(self, name: str) -> None:
        model = small(name)
        cfg = model.pretrained_cfg
        keys = set(model.state_dict())
        assert f"{cfg['classifier']}.weight" in keys
        assert f"{cfg['first_conv']}.weight" in keys
        assert model.get_submodule(cfg["classifier"]).out_features == cfg["num_classes"]

    def test_unknown_argument_is_an_error(self, name: str) -> None:
        with pytest.raises(TypeError, match="depht"):
            timm.create_model(name, depht=3)

    def test_drop_rates(self, name: str) -> None:
        model = small(name, drop_rate=0.3, drop_path_rate=0.2)
        assert model.head_drop.p == 0.3
        assert model.blocks[1].drop_path.drop_prob == pytest.approx(0.2)
        assert model.blocks[0].drop_path is None


def test_positions_are_dropped() -> None:
    assert small("vrwkv_nano_patch8_224", pos_drop_rate=0.1).pos_drop.p == 0.1


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize("bad", [(3, 32, 32), (1, 3, 0, 32)])
def test_wrong_input_shape_is_named(name: str, bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="wanted a batch of images"):
        small(name)(torch.zeros(bad))


@pytest.mark.parametrize("name", NANOS)
def test_wrong_options_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="no global_pool 'token'"):
        small(name, global_pool="token")
    with pytest.raises(ValueError, match="depth must be at least 1"):
        timm.create_model(name, depth=0)


@pytest.mark.parametrize("name", NANOS)
def test_compile_has_no_graph_break(name: str) -> None:
    model = small(name, num_classes=5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images((64, 96))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    want, got = gradients(model, x), gradients(compiled, x)
    for key, value in want.items():
        torch.testing.assert_close(got["_orig_mod." + key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NANOS)
def test_export_keeps_one_operator_per_block(name: str) -> None:
    model = small(name, num_classes=5)
    x = images((64, 96))
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    calls = [n for n in program.graph.nodes if "wkv" in str(n.target)]
    operator = "vision.wkv6_bi.default" if "vrwkv6" in name else "vision.bi_wkv.default"
    assert [str(n.target) for n in calls] == [operator] * 2
    torch.testing.assert_close(program.module()(x[:1]), model(x[:1]))


@pytest.mark.parametrize("name", NANOS)
def test_onnx_with_free_sizes_runs_elsewhere(name: str, tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
    model = small(name, num_classes=5)
    free = {"x": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    torch.onnx.export(
        model,
        (images((64, 96), batch=2),),
        str(tmp_path / "m.onnx"),
        dynamo=True,
        dynamic_shapes=free,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for batch, hw in ((1, (64, 96)), (3, (224, 224)), (2, (72, 101))):
        x = images(hw, batch=batch)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)
