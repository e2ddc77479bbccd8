"""The adapter: any backbone, any size, gradients, weights, and timm's contract without classes."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

import vision  # noqa: F401 -- registers the models
from vision.models.checkpoint import CheckpointError
from vision.models.complexity import count_complexity
from vision.models.vrwkv_adapter import FLAVOURS, BackboneAdapter, checkpoint_filter_fn

PARAMS = {"tiny": 8_404_592, "small": 29_264_528, "base": 106_555_616, "large": 351_894_720}
VIT = {"class_token": False, "global_pool": "avg", "dynamic_img_size": True, "img_size": 32}
BACKBONES = {
    "vrwkv_nano_patch8_224": {},
    "vrwkv6_nano_patch8_224": {},
    "vit_tiny_patch16_224": {"depth": 3, "embed_dim": 48, "num_heads": 3, **VIT},
}
SIZES = [(67, 93), (1, 1), (64, 32)]


def nano(**kwargs: Any) -> Any:
    """The registered nano with two blocks, stirred so that nothing is zero, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("vrwkv_adapter_nano", **{"depth": 2, **kwargs}).eval()
    return stir(model)


def stir(model: nn.Module) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
        for name, p in model.named_parameters():
            if name.endswith("injector.gamma"):
                p += 0.5
    return model


def images(size: tuple[int, int], batch: int = 2, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator)


def loss_of(maps: list[Tensor]) -> Tensor:
    """A sum in which every pixel counts differently."""
    return sum((y * torch.arange(y[0].numel()).sin().view(y.shape[1:])).sum() for y in maps)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", PARAMS)
def test_parameters(size: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"vrwkv_adapter_{size}")
    assert sum(p.numel() for p in model.parameters()) == PARAMS[size]


def test_multiply_adds() -> None:
    """Upstream's count, which takes ReLU and pooling for work, but no batch norm."""
    with torch.device("meta"):
        model = timm.create_model("vrwkv_adapter_tiny")
    assert count_complexity(model, (3, 512, 512)).macs == pytest.approx(16.43e9, rel=2e-3)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("size", SIZES)
def test_maps_of_any_size(flavour: str, size: tuple[int, int]) -> None:
    model = nano(flavour=flavour)
    with torch.no_grad():
        maps = model(images(size))
    for y, info in zip(maps, model.feature_info, strict=True):
        want = tuple(-(-side // 32) * 32 // info["reduction"] for side in size)
        assert y.shape == (2, info["num_chs"], *want)
        assert y.isfinite().all()


def test_padding_is_zeros_at_bottom_and_right() -> None:
    model, x = nano(), images((35, 63))
    padded = torch.zeros(2, 3, 64, 64)
    padded[..., :35, :63] = x
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(padded))


@pytest.mark.parametrize("name", BACKBONES)
def test_without_injection_the_backbone_is_untouched(name: str) -> None:
    torch.manual_seed(0)
    plain = stir(timm.create_model(name, num_classes=0, **BACKBONES[name])).eval()
    x = images((64, 96))
    with torch.no_grad():
        want = plain.forward_intermediates(x, [len(plain.blocks) - 1], intermediates_only=True)[0]
    seen = []
    model = BackboneAdapter(plain, num_heads=3 if "vit" in name else 4, conv_width=8).eval()
    model.backbone.blocks[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        model(x)
        torch.testing.assert_close(seen[0].transpose(1, 2).reshape(want.shape), want)
        for part in model.interactions:
            part.injector.gamma.fill_(1.0)
        model(x)
    assert (seen[1] - seen[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_has_a_gradient(name: str) -> None:
    body = timm.create_model(name, num_classes=0, **BACKBONES[name])
    model = stir(BackboneAdapter(body, num_heads=3 if "vit" in name else 4, conv_width=8)).train()
    found = gradients(model, images((67, 93)))
    for key, _ in model.named_parameters():
        assert key in found, key
        assert found[key].isfinite().all(), key
        # A bias in front of batch norm, or of attention's keys, changes nothing in theory.
        nothing = key in ("up.bias", "spm.projs.0.bias") or key.endswith("attn.qkv.bias")
        assert nothing or found[key].abs().sum() > 0, key


def test_one_image_has_the_gradients_it_has_among_others() -> None:
    model, x = nano().double(), images((64, 96)).double()
    both = gradients(model, x)
    ones = [gradients(model, x[i : i + 1]) for i in range(2)]
    for key, value in both.items():
        torch.testing.assert_close(ones[0][key] + ones[1][key], value, rtol=1e-9, atol=1e-9)


def test_directions_of_the_gradient() -> None:
    """The change of the loss along the gradients together, by differences, in float64."""
    model, x = nano(depth=1).double(), images((32, 64), batch=1).double()
    found = gradients(model, x)
    parts = ("level_embed", "spm.", "interactions.", "norms.", "norm_pre.", "backbone.blocks.")
    step = 1e-6
    for part in parts:
        chosen = {key: p for key, p in model.named_parameters() if key.startswith(part)}
        size = torch.stack([found[key].norm() for key in chosen]).norm()
        with torch.no_grad():
            ends = []
            for way in (step, -2 * step):
                for key, p in chosen.items():
                    p += way * found[key] / size
                ends.append(loss_of(model(x)))
            for key, p in chosen.items():
                p += step * found[key] / size
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope - size) < 1e-3 * size, part


def test_grad_checkpointing_changes_nothing() -> None:
    model, x = nano(drop_path_rate=0.2).train(), images((48, 64))
    runs = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        runs.append(gradients(model, x))
    for key, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][key], rtol=1e-5, atol=1e-5)


def test_intermediates_and_pruning() -> None:
    model, x = nano(), images((67, 93))
    with torch.no_grad():
        maps = model(x)
        final, found = model.forward_intermediates(x, [-1, 1])
        torch.testing.assert_close(found, [maps[1], maps[3]])
        torch.testing.assert_close(final, maps[3])
        torch.testing.assert_close(model.forward_features(x), maps[3])
        final, found = model.forward_intermediates(x, [0], output_fmt="NLC")
        torch.testing.assert_close(found[0], maps[0].flatten(2).transpose(1, 2))
        torch.testing.assert_close(final, maps[3])
        some = nano(features_only=True, out_indices=(1, 3))
        missing = some.model.load_state_dict(model.state_dict(), strict=False)
        assert missing.missing_keys == []
        dropped = {key.split(".")[0] for key in missing.unexpected_keys}
        assert dropped == {"up", "norms", "spm"}
        torch.testing.assert_close(some(x), [maps[1], maps[3]])
    assert some.feature_info.reduction() == [8, 32]
    with pytest.raises(ValueError, match="'NCHW' or 'NLC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_flavours_share_parameters_and_differ() -> None:
    one, other = nano(depth=4), nano(depth=4, flavour="detection")
    other.load_state_dict(one.state_dict(), strict=True)
    with torch.no_grad():
        a, b = one(images((64, 64))), other(images((64, 64)))
    torch.testing.assert_close(a[3], b[3])  # both take the last tokens
    assert all((p - q).abs().max() > 1e-3 for p, q in zip(a[:3], b[:3], strict=True))
    assert one.sources == [0, 1, 2, 3]
    assert [FLAVOURS["segmentation"](n) for n in (1, 2)] == [[0, 0, 0, 0], [0, 0, 1, 1]]


def test_options() -> None:
    model = nano(in_chans=1, img_size=64, depth=4, interaction_indexes=[(0, 0), (1, 3)])
    assert [len(part.extractors) for part in model.interactions] == [1, 3]
    with torch.no_grad():
        assert len(model(images((40, 40), channels=1))) == 4
    model.set_input_size((96, 32))
    assert model.backbone.pos_embed.shape[1] == 12 * 4
    thin = nano(extra_extractors=0, deform_ratio=0.5, ffn_ratio=0.5, points=2)
    assert thin.interactions[-1].extractors[0].attn.value.out_features == 32


def test_layer_decay_groups() -> None:
    model = nano(depth=3)
    names = {key for key, _ in model.named_parameters()}
    assert model.no_weight_decay() <= names
    depths = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    of_block = [
        {d for key, d in depths.items() if key.startswith(f"backbone.blocks.{i}.")}
        for i in range(3)
    ]
    assert of_block == [{1}, {2}, {3}]
    stem = ("backbone.pos_embed", "backbone.patch_embed.proj.weight", "norm_pre.weight")
    assert {depths[key] for key in stem} == {0}
    assert {key for key in names if depths[key] > 3} == model.beside_layers()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flavour": "seg"}, "no flavour 'seg'; there are segmentation, detection"),
        ({"num_classes": 10}, "no classifier, num_classes=10"),
        ({"deform_heads": 5}, "5 heads for int"),
        ({"interaction_indexes": [(0, 0), (0, 1)]}, "all 2 blocks in order"),
        ({"interaction_indexes": [(0, 0)]}, "all 2 blocks in order"),
        ({"backbone": "vrwkv6_nano_patch8_224", "class_token": True}, "class_token=False"),
        ({"backbone": "resnet18", "depth": None}, "takes VisionRWKV or VisionTransformer"),
        ({"backbone": "vit_tiny_patch16_224", **VIT, "dynamic_img_size": False}, "=True"),
    ],
)
def test_wrong_options_are_named(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        nano(**change)
    with pytest.raises(TypeError, match="depht"):
        nano(depht=3)


@pytest.mark.parametrize("bad", [(3, 32, 32), (1, 3, 0, 32)])
def test_wrong_input_shape_is_named(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="wanted a batch of images"):
        nano()(torch.zeros(bad))


def test_bfloat16() -> None:
    model, x = nano(), images((64, 64))
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x)
        half = model.bfloat16()(x.bfloat16())
    assert {y.dtype for y in half} == {torch.bfloat16}
    for found in (mixed, half):
        for y, truth in zip(found, want, strict=True):
            assert (y.float() - truth).abs().max() < 0.05 * truth.abs().max()


def test_compile_has_no_graph_break() -> None:
    model, x = nano(depth=1, extra_extractors=0), images((32, 64))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


class TestWeights:
    def test_own_file(self, tmp_path: Path) -> None:
        model = nano()
        torch.save({"state_dict": model.state_dict()}, tmp_path / "m.pth")
        overlay = {"file": str(tmp_path / "m.pth")}
        loaded = nano(pretrained=True, pretrained_cfg_overlay=overlay)
        again = timm.create_model(
            "vrwkv_adapter_nano", depth=2, pretrained=True, pretrained_cfg_overlay=overlay
        )
        assert all(v.equal(again.state_dict()[k]) for k, v in model.state_dict().items())
        assert not loaded.level_embed.equal(model.level_embed)  # stirred after loading

    def test_backbone_alone_leaves_the_adapter(self, tmp_path: Path) -> None:
        torch.manual_seed(5)
        plain = stir(timm.create_model("vrwkv_nano_patch8_224", depth=2, img_size=64))
        model = nano(init_values=1.0)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        named = {f"backbone.{k}": v for k, v in plain.state_dict().items() if "head" not in k}
        named["head.fc.weight"] = plain.head.weight
        model.load_state_dict(checkpoint_filter_fn(named, model), strict=True)
        after = model.state_dict()
        assert after["norm_pre.weight"].equal(plain.norm_pre.weight)
        assert after["backbone.blocks.1.mixer.key.weight"].equal(plain.blocks[1].mixer.key.weight)
        assert after["backbone.pos_embed"].shape == before["backbone.pos_embed"].shape
        kept = [k for k in after if not k.startswith("backbone.") or ".ls" in k]
        kept = [k for k in kept if not k.startswith("norm_pre.")]
        assert all(after[k].equal(before[k]) for k in kept)

    @pytest.mark.parametrize("name", ["vrwkv6_nano_patch8_224", "vit_tiny_patch16_224"])
    def test_other_backbones(self, name: str) -> None:
        plain = stir(timm.create_model(name, **BACKBONES[name]))
        heads = 3 if "vit" in name else 4
        model = BackboneAdapter(timm.create_model(name, **BACKBONES[name]), num_heads=heads)
        model.load_state_dict(checkpoint_filter_fn(plain.state_dict(), model), strict=True)
        got = dict(model.named_parameters())["backbone.blocks.1.norm2.weight"]
        assert got.equal(plain.blocks[1].norm2.weight)
        model.load_state_dict(checkpoint_filter_fn(model.state_dict(), model), strict=True)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda s: s.pop("spm.projs.2.bias"), "not in the checkpoint.*spm.projs.2.bias"),
            (lambda s: s.pop("backbone.blocks.1.norm1.bias"), "not in the checkpoint.*norm1.bias"),
            (lambda s: s.pop("norm_pre.bias"), "not in the checkpoint.*norm_pre.bias"),
            (lambda s: s.update(strange=torch.zeros(1)), "not in the model.*strange"),
        ],
    )
    def test_what_does_not_fit_is_named(self, change: Any, words: str) -> None:
        model = nano()
        state = {f"x.{k}": v for k, v in model.state_dict().items()} | {
            "decode_head.conv_seg.weight": torch.zeros(2)
        }
        checkpoint_filter_fn(state, model)
        inside = {k.removeprefix("x."): v for k, v in state.items()}
        change(inside)
        with pytest.raises(CheckpointError, match=f"(?s){words}"):
            checkpoint_filter_fn(inside, model)

    def test_published_names(self) -> None:
        for size in PARAMS:
            name = f"vrwkv_adapter_{size}"
            files = {
                tag: timm.models.get_pretrained_cfg(f"{name}.{tag}").hf_hub_filename
                for tag in ("ade20k", "coco")
            }
            assert files == {
                "ade20k": f"upernet_{name}_512_160k_ade20k.pth",
                "coco": f"mask_rcnn_{name}_fpn_1x_coco.pth",
            }


def test_onnx_with_free_sizes_runs_elsewhere(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
    model = nano(depth=1, interaction_indexes=[[0, 0]])
    torch.onnx.export(
        model,
        (torch.randn(2, 3, 64, 96),),
        str(tmp_path / "m.onnx"),
        dynamo=True,
        dynamic_shapes=(dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for shape in ((1, 3, 128, 96), (3, 3, 72, 101)):
        x = torch.randn(shape)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            wanted = model(x)
        for ours, theirs in zip(wanted, got, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(theirs), ours.detach(), rtol=1e-4, atol=1e-4
            )
