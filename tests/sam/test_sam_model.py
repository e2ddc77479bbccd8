"""The assembled model: sizes, padding, batches, saving, and weights from elsewhere."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vision.models.checkpoint import CheckpointError, write_weights
from vision.sam import (
    ImageEmbedding,
    RwkvSam,
    build_sam,
    build_sam_compatible,
    create_sam,
    list_sams,
)
from vision.sam.checkpoint import load_sam_state_dict, load_weights


@pytest.fixture(scope="module")
def model() -> RwkvSam:
    torch.manual_seed(0)
    return create_sam("rwkv_sam_nano")


def image(height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.rand(batch, 3, height, width, generator=generator) * 255


def points(count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    place = torch.rand(count, 2, 2, generator=generator) * torch.tensor(size[::-1])
    return place, torch.tensor([[1, 0]]).expand(count, 2)


@pytest.mark.parametrize("size", [(16, 16), (96, 160), (50, 33), (1, 1), (176, 48)])
def test_any_size(model: RwkvSam, size: tuple[int, int]) -> None:
    with torch.no_grad():
        found = model.encode_image(image(*size))
        masks, iou = model.predict_masks(found, points(2, size))
        full = model.upscale_masks(masks, size, (37, 41))
    h, w = (-(-side // 16) for side in size)
    assert found.embedding.shape == (1, 64, h, w)
    assert found.share.shape == (1, 16, 4 * h, 4 * w)
    assert masks.shape == (2, 3, 4 * h, 4 * w)
    assert full.shape == (2, 3, 37, 41)
    assert iou.shape == (2, 3)
    assert masks.isfinite().all()


def test_an_image_and_its_padded_version_agree(model: RwkvSam) -> None:
    x = image(50, 72)
    grey = torch.tensor(model.pixel_mean).view(1, 3, 1, 1)  # zero once it is normalised
    padded = grey.expand(1, 3, 64, 80).clone()
    padded[..., :50, :72] = x
    with torch.no_grad():
        a, b = model.encode_image(x), model.encode_image(padded)
        first, second = (model.predict_masks(e, points(3, (50, 72))) for e in (a, b))
    torch.testing.assert_close(a.embedding, b.embedding, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    assert (a.input_size, b.input_size) == ((50, 72), (64, 80))


def test_padding_to_a_square() -> None:
    square = create_sam("rwkv_sam_nano", pad_to_square=True, image_size=128)
    with torch.no_grad():
        assert square.encode_image(image(100, 128)).embedding.shape == (1, 64, 8, 8)
        with pytest.raises(ValueError, match="resize it first"):
            square.encode_image(image(100, 129))


def test_upscaling_is_bilinear_with_the_padding_cut_off(model: RwkvSam) -> None:
    logits = torch.randn(2, 1, 8, 12)
    found = model.upscale_masks(logits, (30, 41), (60, 82))
    whole = F.interpolate(logits, (32, 48), mode="bilinear", align_corners=False)
    wanted = F.interpolate(whole[..., :30, :41], (60, 82), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, wanted)


def test_groups_of_prompts_change_nothing(model: RwkvSam, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (64, 96)
    boxes = torch.tensor([[3.0, 4, 30, 40]]).expand(5, 4)
    masks = torch.randn(5, 1, 16, 24)
    with torch.no_grad():
        found = model.encode_image(image(*size))
        whole = model.predict_masks(found, points(5, size), boxes, masks)
        monkeypatch.setattr(model, "prompts_at_once", 2)
        groups = model.predict_masks(found, points(5, size), boxes, masks)
    torch.testing.assert_close(whole, groups, rtol=1e-5, atol=1e-5)


def test_batches_and_embeddings(model: RwkvSam) -> None:
    x = image(48, 64, batch=3)
    with torch.no_grad():
        batch = model.encode_image(x)
        second = model.encode_image(x[1:2])
    assert len(batch) == 3
    torch.testing.assert_close(batch[1].embedding, second.embedding, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(batch[-1].share, batch.share[2:])
    with pytest.raises(IndexError, match="no image 3"):
        batch[3]
    with pytest.raises(ValueError, match="one image, got 3"):
        model.predict_masks(batch, points(1, (48, 64)))
    again = ImageEmbedding.from_state_dict(batch.state_dict())
    assert again.input_size == (48, 64)
    torch.testing.assert_close(again.share, batch.share)
    with pytest.raises(CheckpointError, match="got embedding"):
        ImageEmbedding.from_state_dict({"embedding": x})
    assert batch.to(torch.float64).share.dtype == torch.float64


def test_uint8_and_16_bits(model: RwkvSam) -> None:
    x = image(32, 48).round()
    with torch.no_grad():
        wanted = model.encode_image(x).embedding
        torch.testing.assert_close(model.encode_image(x.to(torch.uint8)).embedding, wanted)
        half = create_sam("rwkv_sam_nano")
        half.load_state_dict(model.state_dict())
        half = half.to(torch.bfloat16)
        found = half.encode_image(x)
        masks, _ = half.predict_masks(found, points(1, (32, 48)))
    assert half.preprocess(x).dtype == found.embedding.dtype == masks.dtype == torch.bfloat16
    torch.testing.assert_close(
        half.preprocess(x).float(), model.preprocess(x), rtol=0.01, atol=0.01
    )
    assert (found.embedding.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_wrong_calls(model: RwkvSam) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        model.encode_image(torch.zeros(1, 1, 32, 32))
    with torch.no_grad():
        found = model.encode_image(image(32, 32))
    with pytest.raises(ValueError, match="8 x 8"):
        model.predict_masks(found, masks=torch.zeros(1, 1, 256, 256))
    with torch.no_grad(), pytest.raises(ValueError, match="at least one prompt"):
        model.predict_masks(found, boxes=torch.zeros(0, 4))
    with pytest.raises(ValueError, match="multiple of 16"):
        create_sam("rwkv_sam_nano", image_size=100)
    with pytest.raises(ValueError, match="no promptable model"):
        create_sam("rwkv_sam_huge")
    with pytest.raises(ValueError, match="high_res=False"):
        build_sam("vrwkv_nano_patch8_224", encoder_kwargs={"patch_size": 16})
    with pytest.raises(ValueError, match="take another"):
        build_sam("vrwkv_nano_patch8_224", high_res=False)


def test_other_backbones() -> None:
    sam = build_sam(
        "vrwkv_nano_patch8_224", encoder_kwargs={"patch_size": 16}, dim=32, mlp_dim=64,
        high_res=False,
    ).eval()  # fmt: skip
    with torch.no_grad():
        masks, _ = sam(image(40, 64), points(1, (40, 64)))
    assert masks.shape == (1, 3, 12, 16)


def test_an_encoder_may_have_its_channels_last() -> None:
    small = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1, 1)}
    sam = build_sam(
        "swin_tiny_patch4_window7_224",
        dim=32,
        mlp_dim=32,
        encoder_kwargs={**small, "num_heads": (1, 2, 4)},
    ).eval()
    with torch.no_grad():
        masks, _ = sam(image(64, 64), points(1, (64, 64)))
    assert masks.shape == (1, 3, 16, 16)


def test_stride_32_goes_into_the_neck() -> None:
    sam = create_sam("rwkv_sam_nano", encoder_kwargs={"final_stage": True})
    assert len(sam.neck.projs) == 2
    sam(image(48, 64), points(1, (48, 64)))[0].square().mean().backward()
    assert sam.neck.projs[1][0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", list_sams())
def test_every_named_model(name: str) -> None:
    with torch.device("meta"):
        sam = create_sam(name)
    decoder = sum(p.numel() for p in sam.mask_decoder.parameters())
    assert sam.config["encoder"] == name
    if name == "rwkv_sam_small":
        # Of the published decoder, three more heads for masks.
        assert decoder == 3_819_812 + 3 * (2 * (256 * 256 + 256) + 256 * 32 + 32)


def test_save_and_load_pretrained(model: RwkvSam, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dim"] == 64
    again = RwkvSam.from_pretrained(tmp_path / "kept")
    with torch.no_grad():
        x, prompt = image(32, 48), points(1, (32, 48))
        torch.testing.assert_close(model(x, prompt), again(x, prompt))
    (tmp_path / "kept" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        RwkvSam.from_pretrained(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match="no folder"):
        RwkvSam.from_pretrained(tmp_path / "lost")
    with pytest.raises(ValueError, match="create_sam"):
        build_sam_compatible(torch.nn.Identity()).save_pretrained(tmp_path)


def test_own_checkpoint(model: RwkvSam, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    write_weights(model.state_dict(), file)
    again = create_sam("rwkv_sam_nano", file)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value)
    with pytest.raises(CheckpointError, match="mask_decoder does not fit"):
        create_sam("rwkv_sam_nano", file, mlp_dim=128)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("mask_decoder")}
    with pytest.raises(CheckpointError, match="wanted mask_decoder too"):
        load_weights(again, state)
    student = create_sam("rwkv_sam_nano")
    assert load_weights(student, state, ("encoder", "neck")) == ("encoder", "neck")
    with pytest.raises(ValueError, match="parts are among"):
        load_weights(again, state, ("decoder",))
    with pytest.raises(CheckpointError, match="is called extra"):
        load_weights(again, {**model.state_dict(), "extra.weight": torch.zeros(1)})


def ovsam_names(model: RwkvSam) -> dict[str, Tensor]:
    """The weights of a model under the names of ovsam (specs/rwkv_sam.md)."""
    renamed = {}
    table = ["point_embeddings.0", "point_embeddings.1", "point_embeddings.2", "point_embeddings.3"]
    for key, value in model.state_dict().items():
        part, _, rest = key.partition(".")
        if part == "prompt_encoder" and rest == "label_embed.weight":
            for row, name in zip(value, [*table, "not_a_point_embed"], strict=True):
                renamed[f"pe.{name}.weight"] = row[None]
        elif part == "prompt_encoder" and rest == "no_mask_embed":
            renamed["pe.no_mask_embed.weight"] = value[None]
        elif part == "prompt_encoder":
            old = rest.replace(
                "position.frequencies", "pe_layer.positional_encoding_gaussian_matrix"
            )
            renamed[f"pe.{old}"] = value
        elif part == "neck":
            renamed[key.replace("projs.0", "out_proj")] = value
        elif part == "mask_decoder" and rest.startswith("high_res."):
            old = rest.removeprefix("high_res.").replace("_proj.", "_feat_proj.")
            renamed[f"mask_decoder.{old.replace('mix.', 'mix_feat_proj.')}"] = value
        elif part == "mask_decoder":
            renamed[f"mask_decoder.mask_decoder.{rest}"] = value
    return renamed


def test_ovsam_checkpoint() -> None:
    torch.manual_seed(1)
    theirs = create_sam("rwkv_sam_nano", single_mask=True)
    torch.manual_seed(2)
    ours = create_sam("rwkv_sam_nano", single_mask=True)
    parts = ("neck", "prompt_encoder", "mask_decoder")
    assert load_weights(ours, ovsam_names(theirs), parts) == parts
    for part in parts:
        wanted = getattr(theirs, part).state_dict()
        for key, value in getattr(ours, part).state_dict().items():
            torch.testing.assert_close(value, wanted[key], rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="mask_decoder does not fit"):
        load_weights(create_sam("rwkv_sam_nano"), ovsam_names(theirs), parts)
    broken = ovsam_names(theirs)
    del broken["pe.not_a_point_embed.weight"]
    with pytest.raises(CheckpointError, match=r"lacks not_a_point_embed\.weight"):
        load_weights(ours, broken, parts)


def sam_names(model: RwkvSam) -> dict[str, Tensor]:
    """Prompt encoder and decoder under Segment Anything's names, and a bit of its encoder."""
    renamed = {"image_encoder.pos_embed": torch.zeros(1)}
    for key, value in ovsam_names(model).items():
        if key.startswith("pe."):
            renamed["prompt_encoder." + key.removeprefix("pe.")] = value
        elif key.startswith("mask_decoder.mask_decoder."):
            renamed[key.removeprefix("mask_decoder.")] = value
    return renamed


def test_segment_anything_checkpoint() -> None:
    torch.manual_seed(1)
    theirs = create_sam("rwkv_sam_nano")
    state = sam_names(theirs)
    for single in (False, True):
        ours = create_sam("rwkv_sam_nano", single_mask=single)
        branch = ours.mask_decoder.high_res.mix[0].weight.clone()
        load_sam_state_dict(ours, state)
        weight = ours.mask_decoder.output_hypernetworks_mlps[0].layers[2].weight
        wanted = theirs.mask_decoder.output_hypernetworks_mlps[0].layers[2].weight
        torch.testing.assert_close(weight, wanted, rtol=0, atol=0)
        table = ours.prompt_encoder.label_embed.weight
        torch.testing.assert_close(table, theirs.prompt_encoder.label_embed.weight)
        torch.testing.assert_close(ours.mask_decoder.high_res.mix[0].weight, branch)
    with pytest.raises(CheckpointError, match="load_sam_state_dict"):
        load_weights(ours, state)
    del state["mask_decoder.iou_token.weight"]
    with pytest.raises(CheckpointError, match="iou_token"):
        load_sam_state_dict(ours, state)
    with pytest.raises(CheckpointError, match="wanted a Segment Anything checkpoint"):
        load_sam_state_dict(ours, {"encoder.x": torch.zeros(1)})


@pytest.mark.parametrize(
    "text", ['{"encoder": "rwkv_', '{"encoder": "rwkv_sam_nano", "size": 3}', "[]"]
)
def test_a_config_that_cannot_be_read_is_named(text: str, tmp_path: Path) -> None:
    create_sam("rwkv_sam_nano").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is no config"):
        RwkvSam.from_pretrained(tmp_path)
