"""RWKV-SAM's encoder: sizes, parity with upstream, every kind of block, weights, options.

What it shares with every other model of token blocks is in `test_registered.py`.
"""

import os
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from vision.layers import Attention, BiWKVMixer, Block, ChannelMix, GeGLU, MBConvBlock
from vision.models.checkpoint import CheckpointError, write_weights
from vision.models.complexity import count_complexity
from vision.models.rwkv_sam import ATTN_TYPES, RwkvSamEncoder, checkpoint_filter_fn
from vision.sam import create_sam

TINY = {"embed_dims": (8, 16, 32), "conv_depths": (1, 2), "num_heads": 4, "img_size": 64}
UPSTREAM_NAME = {"rwkv_transformer": "rwkv_trans"}  # the other kinds are called as upstream does

# Of the encoder without a head, in the order of COLUMNS; counted from the original.
COLUMNS = (
    {},
    {"use_pos_embed": True, "img_size": 224},
    {"use_pos_embed": True, "img_size": 1024},
    {"mlp_ratio": 4},
    {"mlp_ratio": 4, "use_pos_embed": True, "img_size": 1024},
    {"attn_type": "transformer"},
)
PARAMS = {
    "tiny": (4_957_664, 4_995_296, 5_744_096, 7_022_048, 7_808_480, 5_473_760),
    "small": (19_727_296, 19_802_560, 21_300_160, 27_984_832, 29_557_696, 21_791_680),
    "base": (78_702_464, 78_852_992, 81_848_192, 111_732_608, 114_878_336, 86_960_000),
    "large": (139_103_136, 139_303_840, 143_297_440, 197_823_392, 202_017_696, 153_783_200),
}


def images(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def tiny(**kwargs: object) -> RwkvSamEncoder:
    torch.manual_seed(0)
    return RwkvSamEncoder(**{"num_classes": 0, "depth": 4, **TINY, **kwargs}).eval()


def outputs(model: RwkvSamEncoder, x: Tensor, **kwargs: object) -> list[Tensor]:
    with torch.no_grad():
        return model.forward_intermediates(x, intermediates_only=True, **kwargs)


@pytest.mark.parametrize(
    ("size", "column", "want"),
    [
        pytest.param(size, column, want, id=f"{size}-{i}")
        for size, row in PARAMS.items()
        for i, (column, want) in enumerate(zip(COLUMNS, row, strict=True))
    ],
)
def test_parameter_counts(size: str, column: dict, want: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"rwkv_sam_{size}", num_classes=0, **column)
    assert sum(p.numel() for p in model.parameters()) == want


@pytest.mark.parametrize(
    ("size", "giga"), [("tiny", 1.28), ("small", 5.07), ("base", 20.18), ("large", 34.67)]
)
def test_multiply_adds(size: str, giga: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"rwkv_sam_{size}", num_classes=0)
    found = count_complexity(model, (3, 224, 224))
    assert found.matmul / 1e9 == pytest.approx(giga, abs=0.005)
    assert found.operator > 0


# ---- Parity with upstream, and with the definition.


def golden_cases() -> list:
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("VISION_SHARED", root.parent / "shared")) / "golden"
    return [
        pytest.param(case, id=f"{path.stem}-{name}")
        for path in sorted(folder.glob("rwkv_sam_encoder*.pt"))
        for name, case in torch.load(path, weights_only=True).items()
        if isinstance(case, dict)
    ]


def of_golden(case: dict) -> RwkvSamEncoder:
    kwargs, config = dict(case["kwargs"]), case["config"]
    del kwargs["model_variant"]  # its widths are in config
    attn_type = kwargs.pop("attn_type")
    options = {"mlp_ratio": 2 if attn_type == "transformer" else 4, **kwargs.pop("attn_cfg")}
    ours = {upstream: name for name, upstream in UPSTREAM_NAME.items()}
    assert config["stem_width"] == config["embed_dim"][0]
    model = RwkvSamEncoder(
        img_size=kwargs.pop("img_size"),
        num_classes=0,
        embed_dims=tuple(config["embed_dim"]),
        conv_depths=tuple(config["depths"][:2]),
        attn_type=ours.get(attn_type, attn_type),
        use_pos_embed=kwargs.pop("with_pos_embd"),
        final_stage=kwargs.pop("additional_final_layers", False),
        **options,
    )
    assert not kwargs, f"options that this test does not know: {kwargs}"
    model.load_state_dict(checkpoint_filter_fn(case["state_dict"], model))
    return model.eval()


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.golden
def test_there_are_golden_cases(shared: Path) -> None:
    assert len(golden_cases()) >= 4, f"too few RWKV-SAM encoders in {shared / 'golden'}"


@pytest.mark.golden
@pytest.mark.parametrize("case", golden_cases())
@pytest.mark.parametrize(
    # In float64 what is left is that upstream resamples the positions, and stores, in float32.
    ("dtype", "tolerance"),
    [(torch.float64, 5e-7), (torch.float32, 2e-5)],
    ids=["f64", "f32"],
)
def test_outputs_are_upstreams(case: dict, dtype: torch.dtype, tolerance: float) -> None:
    model = of_golden(case).to(dtype)
    for run in case["cases"]:
        got = outputs(model, run["input"].to(dtype))
        want = run["outputs"]["common_levels_0_1"] + run["outputs"]["paper"]
        assert [y.shape for y in got] == [y.shape for y in want]
        assert max(map(relative_error, got, want)) <= tolerance


def mbconv_shapes(at: str, into: int, out: int, ratio: int) -> dict[str, tuple[int, ...]]:
    hidden = out * ratio
    shapes = {f"{at}pre_norm.{n}": (into,) for n in ("weight", "bias")}
    shapes |= {f"{at}conv1_1x1.weight": (hidden, into, 1, 1), f"{at}conv1_1x1.bias": (hidden,)}
    shapes |= {f"{at}conv2_kxk.weight": (hidden, 1, 3, 3), f"{at}conv2_kxk.bias": (hidden,)}
    shapes |= {f"{at}conv3_1x1.weight": (out, hidden, 1, 1), f"{at}conv3_1x1.bias": (out,)}
    if into != out:
        shapes |= {f"{at}shortcut.expand.weight": (out, into, 1, 1)}
        shapes |= {f"{at}shortcut.expand.bias": (out,)}
    return shapes


def layer_shapes(at: str, kind: str, dim: int, ratio: int) -> dict[str, tuple[int, ...]]:
    if kind == "mbconv":
        return mbconv_shapes(at, dim, dim, ratio)
    hidden, pair = dim * ratio, ("weight", "bias")
    if kind == "transformer":
        shapes = {f"{at}ln{i}.{n}": (dim,) for i in (1, 2) for n in pair}
        shapes |= {f"{at}attn.qkv.weight": (3 * dim, dim), f"{at}attn.qkv.bias": (3 * dim,)}
        shapes |= {f"{at}attn.proj.weight": (dim, dim), f"{at}attn.proj.bias": (dim,)}
        shapes |= {f"{at}ffn.w{i}.weight": (hidden, dim) for i in (0, 1)}
        shapes |= {f"{at}ffn.w{i}.bias": (hidden,) for i in (0, 1)}
        return shapes | {f"{at}ffn.w2.weight": (dim, hidden), f"{at}ffn.w2.bias": (dim,)}
    shapes = {f"{at}norm{i}.{n}": (dim,) for i in (1, 2) for n in pair}
    shapes |= {f"{at}layer_scale_{i}": (dim,) for i in (1, 2)}
    shapes |= {f"{at}attn.spatial_{n}": (dim,) for n in ("decay", "first")}
    shapes |= {f"{at}attn.spatial_mix_{n}": (1, 1, dim) for n in "kvr"}
    shapes |= {f"{at}mlp.spatial_mix_{n}": (1, 1, dim) for n in "kr"}
    names = ("key", "value", "receptance", "output")
    shapes |= {f"{at}attn.{n}.weight": (dim, dim) for n in names}
    shapes |= {f"{at}mlp.key.weight": (hidden, dim), f"{at}mlp.value.weight": (dim, hidden)}
    return shapes | {f"{at}mlp.receptance.weight": (dim, dim)}


def upstream_state(
    attn_type: str = "rwkv",
    final: bool = False,
    pos: bool = False,
    dims: tuple[int, int, int] = (8, 16, 32),
    conv_depths: tuple[int, int] = (1, 2),
    depth: int = 4,
    ratio: int = 2,
) -> dict[str, Tensor]:
    """A state dict under upstream's names, written from its description; random values."""
    a, b, c = dims
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, 16, c)} if pos else {}
    shapes |= {"stem.conv1.weight": (a, 3, 3, 3), "stem.conv2.weight": (a, a, 3, 3)}
    shapes |= {f"stem.{n}": (a,) for n in ("conv1.bias", "conv2.bias")}
    shapes |= {f"stem.norm1.{n}": (a,) for n in ("weight", "bias")}
    for stage, (into, out) in enumerate(((a, a), (a, b))):
        for i in range(conv_depths[stage]):
            shapes |= mbconv_shapes(f"conv_stages.{stage}.{i}.", out if i else into, out, 4)
    shapes |= {"conv_final_pool.norm.weight": (b,), "conv_final_pool.norm.bias": (b,)}
    shapes |= {"conv_final_pool.proj.weight": (c, b, 3, 3), "conv_final_pool.proj.bias": (c,)}
    for i in range(depth):
        shapes |= layer_shapes(f"layers.{i}.", ATTN_TYPES[attn_type](i), c, ratio)
    shapes |= {"final_norm.weight": (c,), "final_norm.bias": (c,)}
    if final:
        shapes |= mbconv_shapes("final_layer.", c, 2 * c, 4)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        is_weight = len(shape) > 1 and shape[0] > 1
        state[key] = value / value[0].numel() ** 0.5 if is_weight else 0.5 + 0.3 * value
    return state


class Oracle:
    """The encoder by its definition, on upstream's parameters; slow, and of nothing of ours."""

    def __init__(self, state: dict[str, Tensor], heads: int) -> None:
        self.state, self.heads = state, heads

    def norm(self, at: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.state[f"{at}.weight"] + self.state[f"{at}.bias"]

    def norm2d(self, at: str, x: Tensor) -> Tensor:
        return self.norm(at, x.movedim(1, -1)).movedim(-1, 1)

    def linear(self, at: str, x: Tensor) -> Tensor:
        y = x @ self.state[f"{at}.weight"].T
        return y + self.state[f"{at}.bias"] if f"{at}.bias" in self.state else y

    def conv(self, at: str, x: Tensor, stride: int = 1) -> Tensor:
        w = self.state[f"{at}.weight"]
        groups = x.shape[1] // w.shape[1]
        return F.conv2d(x, w, self.state[f"{at}.bias"], stride, w.shape[-1] // 2, 1, groups)

    def mbconv(self, at: str, x: Tensor, stride: int) -> Tensor:
        short = x
        if stride == 2:
            pooled = [F.avg_pool2d(y, 3, 2, 1) for y in (x, torch.ones_like(x))]
            short = pooled[0] / pooled[1]
        if f"{at}shortcut.expand.weight" in self.state:
            short = self.conv(f"{at}shortcut.expand", short)
        y = self.conv(f"{at}conv1_1x1", self.norm2d(f"{at}pre_norm", x))
        y = self.conv(f"{at}conv2_kxk", F.gelu(y), stride)
        return short + self.conv(f"{at}conv3_1x1", F.gelu(y))

    def mixes(self, at: str, names: str, x: Tensor, hw: tuple[int, int]) -> list[Tensor]:
        grid = x.unflatten(1, hw)
        q = grid.shape[-1] // 4
        shifted = grid.clone()
        for j, (dim, step) in enumerate(((2, 1), (2, -1), (1, 1), (1, -1))):
            part = grid[..., j * q : (j + 1) * q].roll(step, dim)
            part.select(dim, 0 if step == 1 else -1).zero_()
            shifted[..., j * q : (j + 1) * q] = part
        shifted = shifted.flatten(1, 2)
        mus = [self.state[f"{at}.spatial_mix_{n}"] for n in names]
        return [x * mu + shifted * (1 - mu) for mu in mus]

    def rwkv(self, at: str, x: Tensor, hw: tuple[int, int]) -> Tensor:
        count = x.shape[1]
        xk, xv, xr = self.mixes(f"{at}attn", "kvr", self.norm(f"{at}norm1", x), hw)
        k, v = self.linear(f"{at}attn.key", xk), self.linear(f"{at}attn.value", xv)
        w = self.state[f"{at}attn.spatial_decay"] / count
        u = self.state[f"{at}attn.spatial_first"] / count
        place = torch.arange(count)
        gap = (place[:, None] - place).abs()[..., None]  # (T, T, 1)
        power = torch.where(gap == 0, u, -(gap - 1) * w) + k[:, None]  # (B, T, T, C)
        y = (power.softmax(2) * v[:, None]).sum(2)
        y = self.linear(f"{at}attn.receptance", xr).sigmoid() * y
        x = x + self.state[f"{at}layer_scale_1"] * self.linear(f"{at}attn.output", y)
        xk, xr = self.mixes(f"{at}mlp", "kr", self.norm(f"{at}norm2", x), hw)
        y = self.linear(f"{at}mlp.value", self.linear(f"{at}mlp.key", xk).relu() ** 2)
        y = self.linear(f"{at}mlp.receptance", xr).sigmoid() * y
        return x + self.state[f"{at}layer_scale_2"] * y

    def transformer(self, at: str, x: Tensor, hw: tuple[int, int]) -> Tensor:
        qkv = self.linear(f"{at}attn.qkv", self.norm(f"{at}ln1", x)).chunk(3, -1)
        width = x.shape[-1] // self.heads
        q, k, v = (part.unflatten(2, (self.heads, width)).movedim(2, 1) for part in qkv)
        y = (q @ k.mT / width**0.5).softmax(-1) @ v
        x = x + self.linear(f"{at}attn.proj", y.movedim(1, 2).flatten(2))
        y = self.norm(f"{at}ln2", x)
        y = F.gelu(self.linear(f"{at}ffn.w0", y)) * self.linear(f"{at}ffn.w1", y)
        return x + self.linear(f"{at}ffn.w2", y)

    def layer(self, at: str, x: Tensor, hw: tuple[int, int]) -> Tensor:
        if f"{at}pre_norm.weight" in self.state:
            return self.as_tokens(self.mbconv(at, self.as_map(x, hw), 1))
        kind = self.transformer if f"{at}ln1.weight" in self.state else self.rwkv
        return kind(at, x, hw)

    @staticmethod
    def as_map(x: Tensor, hw: tuple[int, int]) -> Tensor:
        return x.unflatten(1, hw).movedim(-1, 1)

    @staticmethod
    def as_tokens(x: Tensor) -> Tensor:
        return x.movedim(1, -1).flatten(1, 2)

    def __call__(self, x: Tensor) -> list[Tensor]:
        found = []
        x = F.gelu(self.norm2d("stem.norm1", self.conv("stem.conv1", x, 2)))
        x = self.conv("stem.conv2", x)
        for stage in (0, 1):
            convs = {k.split(".")[2] for k in self.state if k.startswith(f"conv_stages.{stage}.")}
            for i in range(len(convs)):
                x = self.mbconv(f"conv_stages.{stage}.{i}.", x, 1 if i else 2)
            found.append(x)
        x = self.conv("conv_final_pool.proj", self.norm2d("conv_final_pool.norm", x), 2)
        hw = tuple(x.shape[2:])
        if "pos_embed" in self.state:
            pos = self.state["pos_embed"]
            square = self.as_map(pos, (int(pos.shape[1] ** 0.5),) * 2)
            x = x + F.interpolate(square, hw, mode="bicubic", align_corners=False)
        x = self.as_tokens(x)
        depth = len({k.split(".")[1] for k in self.state if k.startswith("layers.")})
        middle = x
        for i in range(depth):
            x = self.layer(f"layers.{i}.", x, hw)
            middle = x if i == depth // 2 else middle
        last = self.as_map(self.norm("final_norm", x), hw)
        if "final_layer.pre_norm.weight" in self.state:
            return [*found, last, self.mbconv("final_layer.", last, 2)]
        return [*found, self.as_map(middle, hw), last]


@pytest.mark.parametrize("final", [False, True], ids=["s16", "s32"])
@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_outputs_are_the_definitions(attn_type: str, final: bool) -> None:
    state = upstream_state(attn_type, final)
    model = tiny(attn_type=attn_type, final_stage=final).double()
    model.load_state_dict(checkpoint_filter_fn(state, model))
    x = images(48, 80, torch.float64)
    got, want = outputs(model, x), Oracle(state, heads=4)(x)
    assert len(got) == len(want) == 4
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= 1e-12


@pytest.mark.golden
@pytest.mark.parametrize("case", golden_cases())
def test_the_definition_is_upstreams(case: dict) -> None:
    state = {key: value.double() for key, value in case["state_dict"].items()}
    oracle = Oracle(state, case["kwargs"]["attn_cfg"].get("num_heads", 6))
    for run in case["cases"]:
        want = run["outputs"]["common_levels_0_1"] + run["outputs"]["paper"]
        got = oracle(run["input"].double())
        assert max(map(relative_error, got, want)) <= 5e-7


# ---- Kinds of blocks and their options.


def kind_of(block: nn.Module) -> str:
    if isinstance(block, MBConvBlock):
        return "mbconv"
    assert isinstance(block, Block)
    parts = {
        "rwkv": (BiWKVMixer, ChannelMix, True),
        "transformer": (Attention, GeGLU, False),
    }
    scaled = block.ls1 is not None
    found = (type(block.mixer), type(block.channel_mix), scaled)
    return next(kind for kind, wanted in parts.items() if wanted == found)


@pytest.mark.parametrize(
    ("attn_type", "single", "other"),
    [
        ("rwkv", "rwkv", "rwkv"),
        ("transformer", "transformer", "transformer"),
        ("rwkv_transformer", "transformer", "rwkv"),
        ("mbconv_rwkv", "rwkv", "mbconv"),
        ("rwkv_mbconv", "mbconv", "rwkv"),
    ],
)
@pytest.mark.parametrize("depth", [1, 4, 14])
def test_places_of_the_kinds(attn_type: str, single: str, other: str, depth: int) -> None:
    model = tiny(attn_type=attn_type, depth=depth)
    want = [single if i in (2, 5, 8, 11) else other for i in range(depth)]
    assert [kind_of(block) for block in model.blocks] == want


@pytest.mark.parametrize("final", [False, True], ids=["s16", "s32"])
@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_every_parameter_learns_to_classify(attn_type: str, final: bool) -> None:
    model = tiny(
        attn_type=attn_type, final_stage=final, num_classes=5, use_pos_embed=True, depth=3
    ).train()
    runs = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images(48, 64)).square().sum().backward()
        runs.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in runs[0].items():
        assert grad.isfinite().all(), name
        assert grad.abs().sum() > 0, name
        torch.testing.assert_close(runs[1][name], grad, rtol=1e-5, atol=1e-7)


def test_another_token_mixer() -> None:
    model = tiny(mixer="attention", mixer_options={"num_heads": 2}, attn_type="mbconv_rwkv")
    block = model.blocks[2]
    assert block.mixer.num_heads == 2
    assert isinstance(block.channel_mix, ChannelMix)
    assert all(y.isfinite().all() for y in outputs(model, images(32, 48)))


def test_options_of_the_blocks() -> None:
    model = tiny(attn_type="rwkv_transformer", depth=3, mlp_ratio=3, drop_path_rate=0.4)
    rwkv, transformer = model.blocks[1:]
    assert rwkv.channel_mix.key.out_features == transformer.channel_mix.gate.out_features == 96
    assert rwkv.ls1.gamma.tolist() == rwkv.ls2.gamma.tolist() == pytest.approx([0.01] * 32)
    assert rwkv.drop_path.drop_prob == pytest.approx(0.2)
    assert transformer.drop_path.drop_prob == pytest.approx(0.4)
    assert transformer.mixer.num_heads == 4
    assert tiny(attn_type="mbconv_rwkv", mlp_ratio=3).blocks[0].conv.expand.out_channels == 96
    assert tiny(init_values=None).blocks[0].ls1 is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attn_type": "rwkv_trans"}, ValueError, "there are rwkv, transformer, rwkv_transformer"),
        ({"mixer": "mean"}, ValueError, "there are bi_wkv"),
        ({"mixer_options": {"num_heads": 2}}, TypeError, "num_heads"),
        ({"attn_type": "transformer", "num_heads": 5}, ValueError, "32 channels for num_heads=5"),
    ],
)
def test_wrong_options_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny(**options)


# ---- The four outputs.


@pytest.mark.parametrize("final", [False, True], ids=["s16", "s32"])
def test_features_by_default(final: bool) -> None:
    model = timm.create_model("rwkv_sam_nano", features_only=True, final_stage=final, depth=2)
    last = (32, 128) if final else (16, 64)
    assert model.feature_info.reduction() == [4, 8, 16, last[0]]
    assert model.feature_info.channels() == [16, 32, 64, last[1]]
    for height, width in ((64, 96), (40, 33)):
        rows, columns = -(-height // 16), -(-width // 16)
        for y, channels, stride in zip(
            model(images(height, width)), (16, 32, 64, last[1]), (4, 8, 16, last[0]), strict=True
        ):
            want = (2, channels, -(-rows * 16 // stride), -(-columns * 16 // stride))
            assert y.shape == want


@pytest.mark.parametrize("final", [False, True], ids=["s16", "s32"])
def test_outputs_of_an_image_and_its_padded_version(final: bool) -> None:
    model = tiny(final_stage=final, use_pos_embed=True)
    x = images(33, 50)
    padded = F.pad(x, (0, 14, 0, 15))
    for y, z in zip(outputs(model, x), outputs(model, padded), strict=True):
        torch.testing.assert_close(y, z)


def test_norm_reaches_the_middle_output_alone() -> None:
    model, x = tiny(), images(32, 48)
    nn.init.normal_(model.norm.weight)
    raw, normed = outputs(model, x), outputs(model, x, norm=True)
    for i in (0, 1, 3):
        assert torch.equal(raw[i], normed[i])
    want = model.norm(raw[2].movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(normed[2], want)
    assert not torch.equal(raw[2], normed[2])
    features = FeatureGetterNet(model, out_indices=(2,), norm=True)
    assert torch.equal(features(x)[0], normed[2])


@pytest.mark.parametrize("final", [False, True], ids=["s16", "s32"])
@pytest.mark.parametrize("indices", [(0,), (1,), (2,), (0, 2), (0, 1, 3)])
def test_features_need_all_that_is_kept(indices: tuple[int, ...], final: bool) -> None:
    model = tiny(final_stage=final, use_pos_embed=True)
    x = images(32, 48)
    want = outputs(model, x, indices=list(indices))
    whole = sum(p.numel() for p in model.parameters())
    features = FeatureGetterNet(model, out_indices=indices)
    got = features(x)
    for y, z in zip(got, want, strict=True):
        assert torch.equal(y, z)
    sum(y.square().mean() for y in got).backward()
    unused = [name for name, p in features.named_parameters() if p.grad is None]
    assert not unused
    left = sum(p.numel() for p in features.parameters())
    assert left == whole if indices[-1] == 3 else left < whole


def test_input_size_without_positions_is_free() -> None:
    model, x = tiny(), images(32, 48)
    before = outputs(model, x)
    model.set_input_size((32, 48))
    assert all(torch.equal(y, z) for y, z in zip(outputs(model, x), before, strict=True))
    assert "pos_embed" not in model.state_dict()
    assert model.no_weight_decay() == set()


@pytest.mark.parametrize("attn_type", ["rwkv_transformer", "rwkv_mbconv"])
def test_compile_has_no_graph_break_in_any_kind(attn_type: str) -> None:
    model = tiny(attn_type=attn_type, depth=3, final_stage=True)
    compiled = torch.compile(model.forward_intermediates, backend="eager", fullgraph=True)
    x = images(32, 33)
    for y, z in zip(compiled(x)[1], model.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(y, z)


# ---- Weights.


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def head(out: int, width: int) -> dict[str, Tensor]:
    return {"head.fc.weight": torch.randn(out, width), "head.fc.bias": torch.randn(out)}


def test_small_has_as_many_keys_as_upstream() -> None:
    dims = (64, 128, 384)
    state = upstream_state(final=True, pos=True, dims=dims, conv_depths=(2, 4), depth=14)
    assert len(state) == 353
    with torch.device("meta"):
        model = timm.create_model(
            "rwkv_sam_small", num_classes=0, use_pos_embed=True, img_size=64, final_stage=True
        )
    mapped = checkpoint_filter_fn(state, model)
    assert {k: v.shape for k, v in mapped.items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_every_key_has_one_place(attn_type: str) -> None:
    state = upstream_state(attn_type, final=True, pos=True)
    model = tiny(attn_type=attn_type, final_stage=True, use_pos_embed=True)
    mapped = checkpoint_filter_fn(state, model)
    assert len(mapped) == len(state)
    values = {value.data_ptr() for value in mapped.values()}
    assert values == {value.data_ptr() for value in state.values()}


def test_layouts_of_checkpoints() -> None:
    state = upstream_state()
    model = tiny(num_classes=7)
    others = ("neck.out_proj.0.weight", "pe.no_mask_embed.weight", "mask_decoder.iou_token.weight")
    body = under("backbone.", state)
    plain = checkpoint_filter_fn(state, model)
    for layout in (
        body,
        {"state_dict": {**body, **dict.fromkeys(others, torch.zeros(2))}},
        under("module.", body),
        plain,  # our own
        under("encoder.", plain) | {"mask_decoder.mask_tokens.weight": torch.zeros(2)},
    ):
        mapped = checkpoint_filter_fn(layout, model)
        assert set(mapped) == set(plain)
        assert all(torch.equal(mapped[key], plain[key]) for key in plain)
        assert set(model.state_dict()) - set(mapped) == {"head.weight", "head.bias"}
    whole = checkpoint_filter_fn({"state_dict": {**body, **head(7, 32)}}, model)
    model.load_state_dict(whole)


@pytest.mark.parametrize("prefix", ["", "sam.", "module.sam."])  # plain, of tools/train.py, of DDP
def test_encoder_of_a_promptable_model(prefix: str) -> None:
    sam = create_sam("rwkv_sam_nano")
    mapped = checkpoint_filter_fn(
        {"state_dict": under(prefix, sam.state_dict())}, sam.encoder.model
    )
    sam.encoder.model.load_state_dict(mapped)


def test_positions_are_resampled() -> None:
    model = tiny(use_pos_embed=True, img_size=(48, 96))
    state = upstream_state(pos=True)
    state["pos_embed"] = torch.ones_like(state["pos_embed"])
    model.load_state_dict(checkpoint_filter_fn(state, model))
    torch.testing.assert_close(model.pos_embed, torch.ones(1, 18, 32))
    state["pos_embed"] = torch.ones(1, 15, 32)
    with pytest.raises(CheckpointError, match="15 tokens, no square grid"):
        checkpoint_filter_fn(state, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s | {"layers.0.extra": torch.zeros(1)},
            r"not in the model \(1\): blocks.0.extra",
        ),
        (lambda s: s | {"pos_embed": torch.zeros(1)}, r"not in the model \(1\): pos_embed"),
        (
            lambda s: under("backbone.", s) | {"who.knows": torch.zeros(1)},
            r"not in the model \(1\): who.knows",
        ),
        (
            lambda s: {k: v for k, v in s.items() if "final_norm" not in k},
            r"not in the checkpoint \(2\): norm.bias, norm.weight",
        ),
        (lambda s: under("a.", s) | under("b.", s), "found 2 among"),
        (lambda s: {"x": torch.zeros(1)}, "found 0 among 1 keys: x"),
    ],
    ids=["unknown", "positions", "outside", "missing", "two", "none"],
)
def test_what_does_not_fit_is_listed(change: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint_filter_fn(change(upstream_state()), tiny())


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_file_through_timm(name: str, tmp_path: Path) -> None:
    kwargs = {**TINY, "depth": 4, "attn_type": "rwkv_mbconv"}
    state = {k: v.float() for k, v in upstream_state("rwkv_mbconv").items()}
    write_weights(under("backbone.", state) | head(9, 32), tmp_path / name)
    model = timm.create_model(
        "rwkv_sam_nano",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / name)},
        num_classes=9,
        **kwargs,
    )
    want = checkpoint_filter_fn(state, model)
    got = model.state_dict()
    assert all(torch.equal(got[key], value) for key, value in want.items())
    features = timm.create_model(
        "rwkv_sam_nano",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / name)},
        features_only=True,
        **kwargs,
    )
    x = images(32, 48)
    for y, z in zip(features(x), model.forward_intermediates(x)[1], strict=True):
        assert torch.equal(y, z)
