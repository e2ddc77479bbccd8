"""Prompt encoder, neck and mask decoder against outputs of the original implementation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vision.sam.checkpoint import (
    load_weights,
    ovsam_decoder_keys,
    ovsam_neck_keys,
    prompt_encoder_keys,
)
from vision.sam.mask_decoder import MaskDecoder
from vision.sam.model import RwkvSam, build_sam
from vision.sam.neck import Neck
from vision.sam.prompt_encoder import PromptEncoder

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Any]:
    return torch.load(shared / "golden" / "rwkv_sam_decoder.pt", weights_only=True)


def _models(golden: dict[str, Any]) -> tuple[PromptEncoder, MaskDecoder, Neck, dict[str, int]]:
    small = golden["small"]
    hyper, state = small["hyper"], small["state_dict"]
    prompts = PromptEncoder(hyper["dim"])
    prompts.load_state_dict(prompt_encoder_keys(state["prompt_encoder"]))
    decoder = MaskDecoder(
        hyper["dim"],
        high_res_channels=(hyper["hr_channels"], hyper["mr_channels"]),
        single_mask=True,
    )
    decoder.load_state_dict(ovsam_decoder_keys(state["mask_decoder"]))
    neck = Neck([small["feats"][2].shape[1]], hyper["dim"])
    neck.load_state_dict(ovsam_neck_keys(state["neck"]))
    return prompts.eval(), decoder.eval(), neck.eval(), hyper


def test_neck_and_dense_position(golden: dict[str, Any]) -> None:
    small = golden["small"]
    prompts, _, neck, hyper = _models(golden)
    with torch.no_grad():
        torch.testing.assert_close(neck([small["feats"][2]]), small["neck_out"], rtol=0, atol=2e-5)
        pe = prompts.position.grid((hyper["emb"], hyper["emb"]))
    torch.testing.assert_close(pe, small["dense_pe"], rtol=0, atol=1e-5)


def test_mask_prompt(golden: dict[str, Any]) -> None:
    prompts = _models(golden)[0]
    with torch.no_grad():
        dense = prompts.dense(golden["small"]["mask_prompt"]["input"])
    torch.testing.assert_close(dense, golden["small"]["mask_prompt"]["dense"], rtol=0, atol=1e-5)


def test_every_prompt(golden: dict[str, Any]) -> None:
    small = golden["small"]
    prompts, decoder, _, hyper = _models(golden)
    size = (hyper["img"], hyper["img"])
    post = RwkvSam(torch.nn.Identity(), prompts, MaskDecoder(hyper["dim"]), image_size=1024)
    assert small["cases"]
    for name, case in small["cases"].items():
        prompt = case["prompt"]
        points = None
        if "point_coords" in prompt:
            coords = prompt["point_coords"]
            points = (coords, torch.ones(coords.shape[:2]))
        with torch.no_grad():
            sparse, dense = prompts(points, prompt.get("bboxes"), None, size)
            torch.testing.assert_close(sparse, case["sparse"], rtol=0, atol=1e-4, msg=name)
            assert dense.shape == (1, hyper["dim"], 1, 1)
            share = decoder.high_res.image_share(*small["feats"][:2])
            masks, iou = decoder(
                small["neck_out"],
                prompts.position.grid((hyper["emb"], hyper["emb"])),
                sparse,
                dense,
                share,
                multimask_output=False,
            )
            wanted = case["post"]
            logits = post.upscale_masks(masks, wanted["input_size"], wanted["original_size"])
        _close(masks, case["single"]["masks"], 5e-3, name)
        _close(iou, case["single"]["iou"], 1e-4, name)
        _close(logits, wanted["logits"], 5e-3, name)


def _close(found: Tensor, wanted: Tensor, atol: float, name: str) -> None:
    assert found.shape == wanted.shape, name
    assert (found - wanted).abs().max() <= atol, name


def test_key_lists_of_the_published_size_fit(golden: dict[str, Any]) -> None:
    shapes = golden["key_shapes"]

    def empty(part: str) -> dict[str, Tensor]:
        return {k: torch.empty(shape, device="meta") for k, shape in shapes[part].items()}

    with torch.device("meta"):
        decoder = MaskDecoder(high_res_channels=(64, 128), single_mask=True)
        prompts, neck = PromptEncoder(), Neck([384], 256)
    decoder.load_state_dict(ovsam_decoder_keys(empty("mask_decoder")), assign=True)
    prompts.load_state_dict(prompt_encoder_keys(empty("pe")), assign=True)
    neck.load_state_dict(ovsam_neck_keys(empty("neck")), assign=True)
    assert sum(p.numel() for p in decoder.parameters()) == 3_819_812
    assert sum(p.numel() for p in prompts.parameters()) == 6_220
    assert sum(p.numel() for p in neck.parameters()) == 689_152


def test_whole_checkpoint_under_the_original_names(golden: dict[str, Any], shared: Path) -> None:
    backbone = torch.load(shared / "golden" / "rwkv_sam_encoder.pt", weights_only=True)[
        "rwkv_nopos"
    ]
    state = golden["small"]["state_dict"]
    prefixes = {"pe.": "prompt_encoder", "mask_decoder.": "mask_decoder", "neck.": "neck"}
    whole = {f"backbone.{k}": v for k, v in backbone["state_dict"].items()}
    for prefix, part in prefixes.items():
        whole |= {f"{prefix}{k}": v for k, v in state[part].items()}
    options = {"depth": backbone["kwargs"]["attn_cfg"]["depth"]}
    model = build_sam("rwkv_sam_nano", encoder_kwargs=options, dim=64, single_mask=True).eval()
    load_weights(model, whole)
    case = backbone["cases"][0]
    with torch.no_grad():
        maps = model.encoder(case["input"])
        found = model.embed(case["input"], (64, 64))
        wanted = model.neck([case["outputs"]["paper"][-1]])
    for x, y in zip(maps[:2], case["outputs"]["common_levels_0_1"], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found.embedding, wanted, rtol=1e-4, atol=1e-4)
