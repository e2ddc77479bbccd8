"""The ONNX files against torch, through the tool and the example that people run."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision.models.checkpoint import write_weights
from vision.sam import RwkvSam, create_sam
from vision.sam.onnx import export_onnx
from vision.sam.predictor import Predictor

pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
ROOT = Path(__file__).resolve().parents[2]
SIZES = [(96, 160), (70, 50), (61, 131)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images, and what the tool made of them."""
    root = tmp_path_factory.mktemp("onnx")
    torch.manual_seed(0)
    model = create_sam("rwkv_sam_nano", encoder_kwargs={"depth": 2})
    model.save_pretrained(root)
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate(SIZES):
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).resize((2 * width, 2 * height)).save(root / f"{index}.png")
    export_onnx(model, root)
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> RwkvSam:
    return RwkvSam.from_pretrained(folder)


@pytest.mark.parametrize("index", range(len(SIZES)))
def test_the_example_gives_the_predictors_masks(folder: Path, model: RwkvSam, index: int) -> None:
    sam = runpy.run_path(str(ROOT / "examples" / "sam_onnx.py"))["OnnxSam"](folder, 256)
    image = Image.open(folder / f"{index}.png")
    sam.set_image(image)
    predictor = Predictor(model)
    predictor.set_image(image)
    width, height = image.size
    for points, box in (
        ([(0.3 * width, 0.4 * height, 1)], None),
        ([(0.3 * width, 0.4 * height, 1), (5.0, 6.0, 0)], (4.0, 8.0, 0.7 * width, 0.8 * height)),
    ):
        masks, iou = sam.predict(points, box)
        coords, labels = [p[:2] for p in points], [p[2] for p in points]
        wanted, wanted_iou, _ = predictor.predict(coords, labels, box, return_logits=True)
        assert masks.shape == (3, height, width)
        assert np.abs(masks - wanted).max() <= 1e-3
        assert np.abs(iou - wanted_iou).max() <= 1e-4


def test_mask_prompts_and_many_prompts(folder: Path, model: RwkvSam) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "decoder.onnx"))
    x = torch.rand(1, 3, 64, 96) * 255
    masks = torch.randn(5, 1, 16, 24)
    used = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    coords = torch.rand(5, 2, 2) * 60
    with torch.no_grad():
        found = model.encode_image(x)
        labels = torch.ones(5, 2, dtype=torch.int64)
        prompts = model.prompt_encoder((coords, labels), None, masks, (64, 96), used > 0)
        place = model.prompt_encoder.position.grid((4, 6))
        wanted, _ = model.mask_decoder(found.embedding, place, *prompts, found.share)
    padded = torch.cat([coords, torch.zeros(5, 1, 2)], 1), torch.tensor([1.0, 1, -1]).expand(5, 3)
    inputs = {
        "embedding": found.embedding,
        "point_coords": padded[0],
        "point_labels": padded[1].contiguous(),
        "mask_input": masks,
        "has_mask_input": used,
        "input_size": torch.tensor([64, 96]),
        "orig_im_size": torch.tensor([30, 40]),
        "share": found.share,
    }
    full, _, low_res = session.run(None, {k: v.numpy() for k, v in inputs.items()})
    assert full.shape == (5, 3, 30, 40)
    assert np.abs(low_res - wanted.numpy()).max() <= 1e-3


def test_only_operators_that_every_runtime_has(folder: Path) -> None:
    import onnx

    for name in ("encoder.onnx", "decoder.onnx"):
        program = onnx.load(folder / name)
        assert {entry.domain for entry in program.opset_import} == {""}
        assert "OneHot" not in {node.op_type for node in program.graph.node}


def test_files_are_not_overwritten(folder: Path, model: RwkvSam, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export_onnx(model, folder)
    write_weights(model.state_dict(), tmp_path / "weights.pth")
    command = [sys.executable, str(ROOT / "tools" / "export_onnx.py"), "rwkv_sam_huge", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no promptable model 'rwkv_sam_huge'" in done.stderr
