"""Parity with the authors' Caffe definitions of RAN: outputs, intermediate maps, every layer."""

import json
import os
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vision  # noqa: F401 -- registers the models
from vision.models import ran_blocks
from vision.models.ran import checkpoint_filter_fn
from vision.models.ran_caffe import caffe_layers

pytestmark = pytest.mark.golden

TOLERANCE = 1e-4  # of the largest value
ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("VISION_SHARED", ROOT.parent / "shared")) / "golden"
FILES = sorted(FOLDER.glob("ran*_w8.pt"))
LISTS = sorted(FOLDER.glob("ran_layers_*.json"))
MODEL_OF = {
    "ran_layers_attention56": "ran56",
    "ran_layers_attention92": "ran92",
    "ran_layers_attentionnext56": "ranext56",
    "ran_layers_attentionnext92": "ranext92",
}


def caffe_blobs(weights: dict[str, dict[str, Tensor]], eps: float) -> dict[str, Tensor]:
    """The file's weights as the blobs of a .caffemodel, with inverse standard deviations."""
    state = {}
    for layer, values in weights.items():
        blobs = [values[k] for k in ("weight", "bias", "running_mean") if k in values]
        if "running_var" in values:
            blobs.append((values["running_var"].double() + eps).rsqrt())
        state |= {f"{layer}/{i}": blob for i, blob in enumerate(blobs)}
    return state


def golden_model(path: Path) -> tuple[nn.Module, list[dict]]:
    """The model of a golden file with its weights, through the Caffe loader; and the cases."""
    content = torch.load(path, weights_only=True)
    div, classes = content["meta"]["div"], content["meta"]["classes"]
    model = timm.create_model(
        path.stem.removesuffix(f"_w{div}"),
        num_classes=classes,
        stem_width=64 // div,
        widths=tuple(c // div for c in (256, 512, 1024, 2048)),
    )
    state = caffe_blobs(content["weights"], content["meta"]["bn_eps"])
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    return model.eval(), content["cases"]


def blobs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The maps that golden files hold, under Caffe's names."""
    final, (stem, *stages) = model.forward_intermediates(x)
    found = {"conv1/bn": stem, "pool1_3x3_s2": model.stem_pool(stem)}
    found["ave_pool"] = model.forward_head(final, pre_logits=True)[..., None, None]
    found["logits"] = model.forward_head(final)
    found["post_res_4_3"] = stages[3]
    if isinstance(model.norm, nn.Sequential):
        found["post_res_4_3/bn"] = final
    attended = iter(model.attention_maps(x).values())
    x = found["pool1_3x3_s2"]
    for i, letter in enumerate("ABC"):
        first, *modules = model.stages[i]
        found[f"pre_res_{i + 1}"] = x = first(x)
        for j, module in enumerate(modules, 1):
            name, maps = f"Attention{letter}_{j}", next(attended)
            found[name] = x = module(x)
            found[f"{name}/mask"] = maps.mask
            found[f"{name}/trunk/res3"] = maps.trunk
            found[f"{name}/fusion"] = maps.attended
    found["post_res_4_1"] = model.stages[3][0](x)
    return found


def errors(model: nn.Module, case: dict) -> dict[str, float]:
    """Largest difference of every map of a case, over the map's largest value."""
    with torch.no_grad():
        found = blobs_of(model, case["input"])
    wanted = {"logits": case["logits"], **case["blobs"]}
    for name, want in wanted.items():
        assert found[name].shape == want.shape, name
    return {n: float((found[n] - w).abs().max() / w.abs().max()) for n, w in wanted.items()}


def test_there_are_golden_files(shared: Path) -> None:
    assert {"ran56_w8", "ranext56_w8"} <= {p.stem for p in FILES}, shared
    assert len(LISTS) == 4


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_outputs_and_maps(path: Path) -> None:
    model, cases = golden_model(path)
    assert cases
    for case in cases:
        found = errors(model, case)
        assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_folded_norms_compute_the_same(path: Path) -> None:
    model, cases = golden_model(path)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    model.fold_norms()
    left = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert left < norms / 2
    for case in cases:
        found = errors(model, case)
        assert max(found.values()) <= TOLERANCE, found


class PaddedPool(nn.MaxPool2d):
    def __init__(self) -> None:
        super().__init__(3, 2, padding=1)


def resize_with(**options: object) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, like: F.interpolate(x, size=like.shape[-2:], **options)


def adding_resize(x: Tensor, like: Tensor) -> Tensor:
    """The misreading that adds the reference map to what is resized."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True) + like


MISTAKES = {
    "padded pools": ("HalvingPool", PaddedPool),
    "no align_corners": ("resize_as", resize_with(mode="bilinear", align_corners=False)),
    "nearest": ("resize_as", resize_with(mode="nearest")),
    "double addition": ("resize_as", adding_resize),
    "naive attention": ("ATTENTION", {"arl": ran_blocks.naive_attention}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_mistakes_of_other_implementations_show(
    path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them keep the parameters' shapes; the outputs must be what tells."""
    name, replacement = MISTAKES[mistake]
    monkeypatch.setattr(ran_blocks, name, replacement)
    model, cases = golden_model(path)
    for case in cases:
        assert errors(model, case)["logits"] > 100 * TOLERANCE


class LayerShapes(TorchDispatchMode):
    """Counts the operators of a forward pass as Caffe's layer types, with output shapes."""

    KINDS = {
        "convolution": "Convolution",
        "native_batch_norm": "BN",
        "_native_batch_norm_legit_no_training": "BN",
        "relu": "ReLU",
        "relu_": "ReLU",
        "clamp_min_": "ReLU",
        "max_pool2d_with_indices": "Pooling",
        "mean": "Pooling",
        "add": "Eltwise",
        "add_": "Eltwise",
        "upsample_bilinear2d": "Interp",
        "sigmoid": "Sigmoid",
        "addmm": "InnerProduct",
    }

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        first = result[0] if isinstance(result, tuple) else result
        if name == "addcmul":  # T * M, and + T: two layers
            self.counts["Eltwise", tuple(first.shape[1:])] += 2
        elif name in self.KINDS:
            self.counts[self.KINDS[name], tuple(first.shape[1:])] += 1
        return result


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(C, 1, 1) of a pooled map, or (C,), are the same."""
    return shape[:1] if all(side == 1 for side in shape[1:]) else shape


@pytest.mark.parametrize("path", LISTS, ids=lambda p: p.stem)
class TestLayers:
    @staticmethod
    def read(path: Path) -> tuple[nn.Module, list[dict], Tensor]:
        content = json.loads(path.read_text())
        with torch.device("meta"):
            model = timm.create_model(MODEL_OF[path.stem]).eval()
            return model, content["layers"], torch.zeros(1, *content["input"])

    def test_layers_with_parameters(self, path: Path) -> None:
        """Each is found under its name, with its shapes, options, parameters and cost."""
        model, layers, x = self.read(path)
        places = caffe_layers(model)
        shapes: dict[nn.Module, tuple] = {}
        for module in model.modules():
            module.register_forward_hook(
                lambda m, args, out: shapes.update({m: (args[0].shape[1:], out.shape[1:])})
            )
        model(x)
        wanted = {e["name"]: e for e in layers if e["params"]}
        assert set(places) == set(wanted)
        assert sorted(places.values()) == sorted(
            name for name, m in model.named_modules() if next(m.parameters(False), None) is not None
        )
        for name, entry in wanted.items():
            module = model.get_submodule(places[name])
            came, went = shapes[module]
            assert without_ones(tuple(came)) == without_ones(tuple(entry["in_shape"][0])), name
            assert without_ones(tuple(went)) == without_ones(tuple(entry["out_shape"])), name
            assert sum(p.numel() for p in module.parameters()) == entry["params"], name
            buffers = sum(b.numel() for b in module.buffers() if b.ndim)
            assert buffers == entry["buffers"], name
            if isinstance(module, nn.Conv2d):
                options = (module.kernel_size, module.stride, module.padding, module.groups)
                pairs = [(entry[k],) * 2 for k in ("kernel", "stride", "pad")]
                assert options == (*pairs, entry["group"]), name
                assert module.weight[0].numel() * prod(went) == entry["macs"], name

    def test_layers_without_parameters(self, path: Path) -> None:
        """As many of every type and output shape as the definition has."""
        model, layers, x = self.read(path)
        with torch.no_grad(), LayerShapes() as found:
            model(x)
        kinds = set(LayerShapes.KINDS.values())
        wanted = Counter(
            (e["type"], without_ones(tuple(e["out_shape"]))) for e in layers if e["type"] in kinds
        )
        assert {e["type"] for e in layers} - kinds <= {"Softmax"}
        assert (
            Counter({(kind, without_ones(shape)): n for (kind, shape), n in found.counts.items()})
            == wanted
        )
