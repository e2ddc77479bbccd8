"""Published checkpoints: every layout comes in, strictly, and through timm's own ways."""

import math
import pickle
import re
import tempfile
from pathlib import Path

import pytest
import timm
import timm.models._hub
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision.models.checkpoint import CheckpointError, read_checkpoint, write_weights
from vision.models.vrwkv import VisionRWKV, checkpoint_filter_fn, default_cfgs

TINY = {"embed_dim": 16, "depth": 2, "img_size": 64}


def upstream_keys(
    dim: int = 16,
    depth: int = 2,
    tokens: int = 16,
    blocks: str = "layers",
    scale: bool = False,
    key_norm: bool = False,
    final_norm: bool = True,
) -> dict[str, Tensor]:
    """The backbone's state dict under upstream's names, from specs of its files; random values."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, tokens, dim),
        "patch_embed.projection.weight": (dim, 3, 16, 16),
        "patch_embed.projection.bias": (dim,),
    }
    for i in range(depth):
        p = f"{blocks}.{i}."
        for norm in ["ln0", "ln1", "ln2"] if i == 0 else ["ln1", "ln2"]:
            shapes |= {f"{p}{norm}.weight": (dim,), f"{p}{norm}.bias": (dim,)}
        shapes |= {f"{p}att.spatial_decay": (dim,), f"{p}att.spatial_first": (dim,)}
        shapes |= {f"{p}att.spatial_mix_{n}": (1, 1, dim) for n in "kvr"}
        shapes |= {f"{p}ffn.spatial_mix_{n}": (1, 1, dim) for n in "kr"}
        names = ("key", "value", "receptance", "output")
        shapes |= {f"{p}att.{n}.weight": (dim, dim) for n in names}
        shapes |= {f"{p}ffn.key.weight": (4 * dim, dim), f"{p}ffn.value.weight": (dim, 4 * dim)}
        shapes |= {f"{p}ffn.receptance.weight": (dim, dim)}
        if scale:
            shapes |= {f"{p}gamma1": (dim,), f"{p}gamma2": (dim,)}
        if key_norm:
            for part, width in (("att", dim), ("ffn", 4 * dim)):
                shapes |= {f"{p}{part}.key_norm.{n}": (width,) for n in ("weight", "bias")}
    if final_norm:
        shapes |= {"ln1.weight": (dim,), "ln1.bias": (dim,)}
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=generator) for k, s in shapes.items()}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def linear(prefix: str, out: int, width: int) -> dict[str, Tensor]:
    return {f"{prefix}.weight": torch.randn(out, width), f"{prefix}.bias": torch.randn(out)}


def layouts() -> list:
    """(id, checkpoint, model keywords, whether it carries the classifier)."""
    classes = {"num_classes": 7}
    scaled = {"post_norm": True, "init_values": 1e-5}
    large = {**scaled, "key_norm": True, "head_hidden_size": 24}
    body = under("backbone.", upstream_keys())
    mae = upstream_keys(blocks="blocks", scale=True, key_norm=True)
    decoder = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_pos_embed": torch.zeros(1, 16, 8),
        **linear("decoder_embed", 8, 16),
        **under("decoder_", upstream_keys(8, 1, blocks="blocks")),
        "ln2.weight": torch.ones(8),
        "ln2.bias": torch.ones(8),
        **linear("decoder_pred", 768, 8),
    }
    # Only blocks have a decoder_ twin; the rest of that state dict is another module's.
    decoder = {k: v for k, v in decoder.items() if "patch_embed" not in k and "_ln1" not in k}
    adapter = {
        "level_embed": torch.zeros(3, 16),
        "spm.stem.0.weight": torch.zeros(4, 3, 3, 3),
        "interactions.0.injector.gamma": torch.zeros(16),
        "up.weight": torch.zeros(16, 16, 2, 2),
        "norm1.weight": torch.zeros(16),
        "norm4.running_mean": torch.zeros(16),
    }
    seg_body = upstream_keys(scale=True, final_norm=False)
    return [
        ("classification", {"state_dict": {**body, **linear("head.fc", 7, 16)}}, classes, True),
        (
            "ddp-classification",
            under("module.", {**body, **linear("head.fc", 7, 16)}),
            classes,
            True,
        ),
        (
            "large-two-layer-head",
            {
                "model": {
                    **under("backbone.", upstream_keys(scale=True, key_norm=True)),
                    **linear("head.0", 24, 16),
                    **linear("head.2", 7, 24),
                }
            },
            {**classes, **large},
            True,
        ),
        (
            "mae",
            {"model": {**mae, **decoder}},
            {"num_classes": 0, **scaled, "key_norm": True, "shift": "single_shift"},
            False,
        ),
        (
            "segmentation",
            {
                "state_dict": {
                    **under("backbone.", {**seg_body, **adapter}),
                    **linear("decode_head.conv_seg", 150, 512),
                    **linear("auxiliary_head.conv_seg", 150, 256),
                }
            },
            {"num_classes": 0, **scaled, "final_norm": False},
            False,
        ),
        (
            "detection",
            {
                "state_dict": {
                    **under("backbone.", {**seg_body, **adapter}),
                    **linear("neck.lateral_convs.0.conv", 256, 16),
                    **linear("rpn_head.rpn_conv", 256, 256),
                    **linear("roi_head.bbox_head.fc_cls", 81, 1024),
                }
            },
            {"num_classes": 0, **scaled, "final_norm": False},
            False,
        ),
    ]


def as_param(case: tuple) -> object:
    return pytest.param(*case[1:], id=case[0])


@pytest.mark.parametrize(("checkpoint", "kwargs", "classifies"), [as_param(c) for c in layouts()])
def test_every_layout_fills_the_model(checkpoint: dict, kwargs: dict, classifies: bool) -> None:
    model = VisionRWKV(**TINY, **kwargs)
    mapped = checkpoint_filter_fn(checkpoint, model)
    assert set(mapped) == set(model.state_dict())
    model.load_state_dict(mapped, strict=True)
    # Each value went to one place: the multisets of elements agree.
    flat = next((v for v in checkpoint.values() if isinstance(v, dict)), checkpoint)
    flat = {k.removeprefix("module."): v for k, v in flat.items()}
    inside = [v for k, v in flat.items() if k.startswith(("backbone.", "head."))] or [
        v for k, v in flat.items() if not k.startswith(("decoder", "mask_token", "ln2"))
    ]
    drop = ("level_embed", "spm.", "interactions.", "up.", "norm1.", "norm4.")
    inside = [
        v
        for k, v in flat.items()
        if any(v is w for w in inside) and not k.removeprefix("backbone.").startswith(drop)
    ]
    want = torch.cat([v.flatten() for v in inside]).sort().values
    got = torch.cat([v.flatten() for v in mapped.values()]).sort().values
    torch.testing.assert_close(got, want)


def test_values_go_to_the_right_parameters() -> None:
    source = upstream_keys(scale=True, key_norm=True)
    model = VisionRWKV(**TINY, num_classes=0, post_norm=True, key_norm=True, init_values=1.0)
    mapped = checkpoint_filter_fn(source, model)
    pairs = {
        "layers.0.ln0.weight": "norm_pre.weight",
        "layers.1.ln1.bias": "blocks.1.norm1.bias",
        "layers.1.ln2.weight": "blocks.1.norm2.weight",
        "layers.1.gamma1": "blocks.1.ls1.gamma",
        "layers.0.gamma2": "blocks.0.ls2.gamma",
        "layers.1.att.spatial_decay": "blocks.1.mixer.decay",
        "layers.1.att.spatial_first": "blocks.1.mixer.bonus",
        "layers.0.att.spatial_mix_v": "blocks.0.mixer.shift_mix.v",
        "layers.0.ffn.spatial_mix_r": "blocks.0.channel_mix.shift_mix.r",
        "layers.0.att.receptance.weight": "blocks.0.mixer.receptance.weight",
        "layers.0.ffn.receptance.weight": "blocks.0.channel_mix.receptance.weight",
        "layers.0.att.key_norm.weight": "blocks.0.mixer.norm.weight",
        "layers.0.ffn.key_norm.bias": "blocks.0.channel_mix.norm.bias",
        "ln1.weight": "norm.weight",
    }
    for theirs, ours in pairs.items():
        assert torch.equal(source[theirs].flatten(), mapped[ours].flatten()), theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.0.att.time_decay": torch.zeros(16)}, r"not in the model \(1\): .*time_decay"),
        ({"layers.0.ln0.weight": None}, r"not in the checkpoint \(1\): norm_pre.weight"),
        ({"layers.0.gamma1": torch.zeros(16)}, r"not in the model \(1\): blocks.0.ls1.gamma"),
        ({"pos_embed": torch.zeros(1, 12, 16)}, "12 tokens, no square grid"),
        ({"other.patch_embed.proj.weight": torch.zeros(1)}, "found 2 among"),
        ({"epoch": 3}, "entries that are no tensors: epoch"),
    ],
)
def test_what_does_not_fit_is_listed(change: dict, message: str) -> None:
    state = upstream_keys() | change
    state = {k: v for k, v in state.items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        checkpoint_filter_fn(state, VisionRWKV(**TINY, num_classes=0))


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="one Vision-RWKV"):
        checkpoint_filter_fn({"conv1.weight": torch.zeros(1)}, VisionRWKV(**TINY))


def test_own_weights_pass_through() -> None:
    model = VisionRWKV(**TINY, num_classes=3)
    for prefix in ("", "backbone.", "backbone.body.model."):
        state = under(prefix, model.state_dict())
        mapped = checkpoint_filter_fn(state, model)
        assert all(torch.equal(mapped[k], v) for k, v in model.state_dict().items())


def test_position_embedding_is_resampled_to_the_model() -> None:
    model = VisionRWKV(**TINY | {"img_size": (96, 32)}, num_classes=0)
    mapped = checkpoint_filter_fn(upstream_keys(), model)
    assert mapped["pos_embed"].shape == (1, 12, 16)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file of the published layout for the tiny model, cut to two blocks."""
    state = under("backbone.", upstream_keys(192, 2, 196))
    path = tmp_path / "vrwkv_t_in1k_224.pth"
    content = {"meta": {"epoch": 300}, "state_dict": {**state, **linear("head.fc", 1000, 192)}}
    torch.save(content, path)
    return path


def test_pretrained_takes_a_local_file(published: Path) -> None:
    weights = torch.load(published, weights_only=True)["state_dict"]
    create = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(published)}, "depth": 2}
    model = timm.create_model("vrwkv_tiny_patch16_224", **create)
    assert torch.equal(model.head.weight, weights["head.fc.weight"])
    decay = weights["backbone.layers.1.att.spatial_decay"]
    assert torch.equal(model.blocks[1].mixer.decay, decay)
    # Another number of classes: a fresh classifier, the rest as published.
    other = timm.create_model("vrwkv_tiny_patch16_224", num_classes=5, **create)
    assert other.head.weight.shape == (5, 192)
    assert torch.equal(other.blocks[1].mixer.decay, decay)
    # One input channel: the first convolution is summed over the colours.
    grey = timm.create_model("vrwkv_tiny_patch16_224", in_chans=1, **create)
    colour = weights["backbone.patch_embed.projection.weight"]
    torch.testing.assert_close(grey.patch_embed.proj.weight, colour.sum(1, keepdim=True))
    # As a backbone.
    features = timm.create_model(
        "vrwkv_tiny_patch16_224", features_only=True, out_indices=(0, 1), **create
    )
    assert torch.equal(features.model.blocks[1].mixer.decay, decay)


def test_pretrained_fetches_the_published_file(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(repo_id: str, filename: str, **_: object) -> str:
        asked.append((repo_id, filename))
        if filename != "vrwkv_t_in1k_224.pth":  # timm asks for a safetensors twin first
            raise timm.models._hub.EntryNotFoundError("none")
        return str(published)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    model = timm.create_model("vrwkv_tiny_patch16_224", pretrained=True, depth=2)
    assert asked[-1] == ("OpenGVLab/Vision-RWKV", "vrwkv_t_in1k_224.pth")
    weights = torch.load(published, weights_only=True)["state_dict"]
    assert torch.equal(model.head.bias, weights["head.fc.bias"])


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network and no cached file")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", offline)
    with pytest.raises(RuntimeError, match=r"pretrained_cfg_overlay=dict\(file="):
        timm.create_model("vrwkv_tiny_patch16_224", pretrained=True, depth=2)


def test_every_published_file_is_named() -> None:
    named = {
        cfg.hf_hub_filename
        for default in default_cfgs.values()
        for cfg in default.cfgs.values()
        if cfg.hf_hub_id
    }
    assert named == {
        "vrwkv_t_in1k_224.pth",
        "vrwkv_s_in1k_224.pth",
        "vrwkv_b_in1k_224.pth",
        "vrwkv_l_22kto1k_384.pth",
        "vrwkv_l_in22k_192.pth",
    }


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_hostile_checkpoint_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    torch.save({"state_dict": {"x": _Hostile(marker)}}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="code"):
        read_checkpoint(tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="code"):
        timm.create_model(
            "vrwkv_nano_patch8_224",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(tmp_path / "bad.pth")},
        )
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_checkpoint_says_so(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    write_weights({"x": torch.randn(1000)}, whole)
    assert torch.equal(read_checkpoint(whole)["x"], read_checkpoint(whole)["x"])
    for share in (0.0, 0.1, 0.4, 0.95):
        cut.write_bytes(whole.read_bytes()[: math.floor(whole.stat().st_size * share)])
        with pytest.raises(CheckpointError, match=r"truncated|not a checkpoint|damaged"):
            read_checkpoint(cut)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=40) | st.integers().map(pickle.dumps) | st.text(max_size=9).map(repr))
@example(b"junk\n")
def test_any_other_file_is_no_checkpoint(content: bytes | str) -> None:
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        file.write(content if isinstance(content, bytes) else content.encode())
        file.flush()
        with pytest.raises(CheckpointError, match=re.escape(file.name)):
            read_checkpoint(file.name)


def test_missing_checkpoint_lists_what_is_there(tmp_path: Path) -> None:
    write_weights({"x": torch.zeros(1)}, tmp_path / "epoch_3.pth")
    with pytest.raises(FileNotFoundError, match=r"epoch_3\.pth"):
        read_checkpoint(tmp_path / "epoch_4.pth")


def test_written_weights_hold_tensors_only_and_appear_whole(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "w.pth"
    write_weights({"x": torch.arange(3.0)[::2]}, path)
    assert torch.load(path, weights_only=True)["x"].tolist() == [0.0, 2.0]
    assert [p.name for p in path.parent.iterdir()] == ["w.pth"]
    with pytest.raises(ValueError, match=r"safetensors, \.pth or \.pt"):
        write_weights({}, tmp_path / "w.npz")
