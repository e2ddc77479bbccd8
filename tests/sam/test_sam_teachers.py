"""Teachers: Segment Anything's encoder and timm's feature extractors, their frame and identity."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from vision.models.checkpoint import CheckpointError, write_weights
from vision.sam.teachers import (
    create_teacher,
    normalize_padded,
    pad_to_square,
    unpadded_cells,
)

SAM = "samvit_base_patch16"
TINY: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "global_attn_indexes": [1]}
SIDE = 64


def _images(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    shapes = [(60, 90), (90, 41)][:count]
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    squares, sizes = zip(*(pad_to_square(image, SIDE) for image in images), strict=True)
    return torch.stack(squares), torch.tensor(sizes)


def _meta_checkpoint(seed: int) -> dict[str, torch.Tensor]:
    """Random weights under the names of Meta's file, other parts beside the encoder."""
    torch.manual_seed(seed)
    state = timm.create_model(SAM, num_classes=0, img_size=SIDE, **TINY).state_dict()
    named = {f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v for k, v in state.items()}
    others = ("prompt_encoder.no_mask_embed.weight", "mask_decoder.iou_token.weight")
    return {**named, **{name: torch.zeros(1, 256) for name in others}}


def test_the_frame() -> None:
    x, sizes = _images()
    assert sizes.tolist() == [[43, 64], [64, 29]]
    assert (x[0, :, 43:] == 0).all()
    assert (x[1, :, :, 29:] == 0).all()
    mean, std = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
    y = normalize_padded(x, sizes, mean, std)
    for i, (height, width) in enumerate(sizes.tolist()):
        image = x[i, :, :height, :width].float()
        wanted = (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        padded = F.pad(wanted, (0, SIDE - width, 0, SIDE - height))
        torch.testing.assert_close(y[i], padded)


@pytest.mark.parametrize("sizes", [[[0, 5]], [[5, 65]], [[5, 5], [5, 5]], [[5]]])
def test_impossible_sizes(sizes: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"a height and a width in 1 \.\. 64"):
        normalize_padded(torch.zeros(1, 3, 64, 64), torch.tensor(sizes), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match="squares"):
        normalize_padded(torch.zeros(1, 3, 64, 48), torch.tensor([[5, 5]]), (0.0,) * 3, (1.0,) * 3)


def test_cells_that_see_the_image() -> None:
    sizes = torch.tensor([[64, 64], [17, 16], [1, 33]])
    cells = unpadded_cells(sizes, 64, 4)
    assert cells.sum((1, 2)).tolist() == [16, 2, 3]
    assert cells[1].nonzero().tolist() == [[0, 0], [1, 0]]
    assert cells[2].nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]


def test_metas_weights_give_timms_embedding(tmp_path: Path) -> None:
    checkpoint = _meta_checkpoint(3)
    torch.save(checkpoint, tmp_path / "sam_vit.pth")
    teacher = create_teacher(SAM, SIDE, tmp_path / "sam_vit.pth", levels=(1, 0), **TINY)
    torch.manual_seed(3)
    plain = timm.create_model(SAM, num_classes=0, img_size=SIDE, **TINY).eval()
    x, sizes = _images()
    normal = normalize_padded(x, sizes, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    with torch.no_grad():
        wanted, blocks = plain.forward_intermediates(normal, [0, 1])
    found = teacher.maps(x, sizes)
    for one, other in zip(found, [wanted, blocks[1], blocks[0]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert teacher.shape == (256, 4, 4) == tuple(teacher(x, sizes).shape[1:])
    assert teacher.channels == (256, 32, 32)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().body.training


def test_wrong_weights(tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    whole = _meta_checkpoint(0)

    def refused(state: Any, said: str) -> None:
        torch.save(state, path)
        with pytest.raises(CheckpointError, match=said):
            create_teacher(SAM, SIDE, path, **TINY)

    refused({k: v for k, v in whole.items() if "neck.3.bias" not in k}, r"neck\.3\.bias")
    refused({**whole, "image_encoder.more": torch.zeros(1)}, "more")
    refused({**whole, "image_encoder.pos_embed": torch.zeros(1, 64, 64, 32)}, "another shape")
    refused({"model": Path("/")}, "names code")
    torch.save(whole, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="truncated"):
        create_teacher(SAM, SIDE, path, **TINY)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        create_teacher(SAM, SIDE, tmp_path / "nowhere.pth", **TINY)


def test_feature_extractor(tmp_path: Path) -> None:
    x, sizes = _images()
    torch.manual_seed(5)
    plain = timm.create_model("resnet10t")
    write_weights(plain.state_dict(), tmp_path / "w.safetensors")
    teacher = create_teacher("resnet10t", SIDE, tmp_path / "w.safetensors", level=3, levels=(4, 1))
    stats = timm.get_pretrained_cfg("resnet10t")
    mean, std = ([255 * v for v in values] for values in (stats.mean, stats.std))
    with torch.no_grad():
        maps = plain.eval().forward_intermediates(
            normalize_padded(x, sizes, mean, std), intermediates_only=True
        )
    for found, level in zip(teacher.maps(x, sizes), (3, 4, 1), strict=True):
        torch.testing.assert_close(found, maps[level], rtol=1e-4, atol=1e-5)
    assert teacher.strides == (16, 32, 4)
    state = {k: v for k, v in plain.state_dict().items() if k != "layer1.0.conv1.weight"}
    write_weights(state, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"layer1\.0\.conv1\.weight"):
        create_teacher("resnet10t", SIDE, tmp_path / "less.pth")


def test_identity() -> None:
    before = torch.get_rng_state()
    one = create_teacher("efficientvit_b0", SIDE)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.shape == (64, 4, 4)  # the map of stride 16
    more = create_teacher("efficientvit_b0", SIDE, levels=(0, 3))
    assert more.identity == one.identity
    x, sizes = _images()
    assert torch.equal(more(x, sizes), one(x, sizes))
    others = [
        create_teacher("efficientvit_b0", SIDE, seed=1),
        create_teacher("efficientvit_b0", 2 * SIDE),
        create_teacher("efficientvit_b0", SIDE, level=1),
    ]
    assert all(other.identity != one.identity for other in others)
    a, b = (create_teacher("resnet10t", SIDE, act_layer=act).identity for act in ("relu", "gelu"))
    assert a["weights"] == b["weights"]
    assert a != b


def test_an_image_does_not_depend_on_its_batch() -> None:
    teacher = create_teacher("efficientvit_b0", SIDE)
    x, sizes = _images()
    with torch.autocast("cpu", torch.bfloat16):  # nor on the student's precision
        together = teacher(x, sizes)
    for i in range(2):
        assert torch.equal(teacher(x[i : i + 1], sizes[i : i + 1])[0], together[i])
    filled = x.clone()
    filled[0, :, 43:] = 255  # nor on what lies in the padding
    assert torch.equal(teacher(filled, sizes), together)


@pytest.mark.parametrize(
    ("name", "side", "options", "said"),
    [
        ("samvit_hughe", SIDE, {}, "no model 'samvit_hughe'"),
        ("efficientvit_b0", 60, {}, "multiple of 16, got 60"),
        ("efficientvit_b0", SIDE, {"level": 4}, r"levels 0 \.\. 3, got 4"),
        (SAM, SIDE, {"levels": (2,), **TINY}, r"levels 0 \.\. 1, got 2"),
        ("test_vit", 160, {"patch_size": 8}, r"none of 16; give level"),
    ],
)
def test_impossible_teachers(name: str, side: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_teacher(name, side, **options)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="64 x 64"):
        create_teacher("efficientvit_b0", SIDE)(torch.zeros(1, 3, 32, 32), torch.tensor([[9, 9]]))
