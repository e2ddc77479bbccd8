"""segment-anything as the judge: one embedding and one set of weights give the same masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.data import read_image
from vision.sam.checkpoint import load_sam_state_dict
from vision.sam.model import build_sam_compatible
from vision.sam.predictor import Predictor
from vision.sam.transforms import resize_longest_side, scale_boxes, scale_coords

segment_anything = pytest.importorskip(
    "segment_anything", reason="the judge is not installed (pip install segment-anything)"
)

IMAGES = [
    "camvid/img_dir/val/0016E5_07959.jpg",  # 480 x 360
    "cifar10_small/val/dog/0000.jpg",  # 32 x 32
    "mask_pairs/ccp_person/val/images/0661.jpg",  # portrait, 550 wide
    "mask_pairs/cwfid_plants/val/images/021.jpg",  # 1296 x 966
    "coco_mini/train/000000000086.jpg",  # 512 x 640, greyscale
    "coco_mini/train/000000000049.jpg",  # 381 x 500
    "coco_mini/val/000000001503.jpg",  # 320 x 240
    "coco_mini/val/000000000872.jpg",  # 621 x 640
    "coco_mini/val/000000002431.jpg",  # 457 x 640
    "hires/dog.jpg",  # 2048 x 1365
    "hires/truck.jpg",  # 1800 x 1200
    "hires/plants_2592x1932.jpg",
]
KINDS = (
    "one point",
    "points of both kinds",
    "box",
    "mask",
    "box and points",
    "mask and point",
    "mask, box and points",
)


class PooledColours(nn.Module):
    """Stands for an image encoder: the mean colour of every cell of 16 x 16 pixels, projected."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.proj = nn.Conv2d(3, 256, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.avg_pool2d(x, 16))


def _pair(image_size: int) -> tuple[Any, Predictor]:
    """The judge's predictor and ours, of one encoder and of equal random weights."""
    from segment_anything import modeling

    torch.manual_seed(0)
    encoder = PooledColours(image_size)
    grid = (image_size // 16, image_size // 16)
    judge = modeling.Sam(
        encoder,
        modeling.PromptEncoder(256, grid, (image_size, image_size), 16),
        modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(2, 256, 8, 2048),
            transformer_dim=256,
        ),
    ).eval()
    with torch.no_grad():
        # Biases that are not 0, norms that are not 1, and logits as large as a trained model's.
        for parameter in judge.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for head in judge.mask_decoder.output_hypernetworks_mlps:
            head.layers[-1].weight.mul_(20)
    ours = build_sam_compatible(encoder, image_size)
    load_sam_state_dict(ours, judge.state_dict())
    return segment_anything.SamPredictor(judge), Predictor(ours)


@pytest.fixture(scope="module")
def small() -> tuple[Any, Predictor]:
    return _pair(256)


@pytest.fixture(scope="module")
def large() -> tuple[Any, Predictor]:
    return _pair(1024)


def _prompts(kind: str, size: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random points and a random box in an image of this height and width."""
    height, width = size
    found = {}
    if "point" in kind:
        labels = np.array([1]) if kind.endswith("point") else np.array([1, 0, 1, 0])
        found["point_coords"] = rng.uniform(0, (width - 1, height - 1), (len(labels), 2))
        found["point_labels"] = labels
    if "box" in kind:
        x0, y0 = rng.uniform(0, (width / 2, height / 2))
        found["box"] = np.array([x0, y0, x0 + width / 3, y0 + height / 2])
    return found


def _assert_agree(judge: Any, ours: Predictor, prompts: dict[str, Any], multimask: bool) -> None:
    wanted, wanted_iou, wanted_low = judge.predict(
        **prompts, multimask_output=multimask, return_logits=True
    )
    masks, iou, low = ours.predict(**prompts, multimask_output=multimask)
    assert wanted_low.std() > 0.5  # else the tolerance would say nothing
    np.testing.assert_allclose(low, wanted_low, rtol=0, atol=1e-4)
    np.testing.assert_allclose(iou, wanted_iou, rtol=0, atol=1e-4)
    assert masks.shape == wanted.shape
    assert masks.dtype == bool
    # A pixel may differ only where the judge's own logit is nought within the tolerance.
    assert np.abs(wanted[masks != (wanted > 0)]).max(initial=0) < 1e-4


def _run(pair: tuple[Any, Predictor], image: np.ndarray, kinds: list[str], seed: int) -> None:
    judge, ours = pair
    judge.set_image(image)
    ours.set_image(image)
    assert torch.equal(ours.get_image_embedding(), judge.get_image_embedding())
    rng = np.random.default_rng(seed)
    first = _prompts("one point", image.shape[:2], rng)
    drawn = judge.predict(**first)[2][1:2] if any("mask" in kind for kind in kinds) else None
    for turn, kind in enumerate(kinds, start=seed):
        prompts = _prompts(kind, image.shape[:2], rng)
        if "mask" in kind:
            prompts["mask_input"] = drawn
        _assert_agree(judge, ours, prompts, multimask=turn % 2 == 0)


@pytest.mark.parametrize("name", IMAGES)
def test_all_prompts(small: tuple[Any, Predictor], shared: Path, name: str) -> None:
    # Seven kinds in turn with one and with three masks; the next image has them the other way.
    _run(small, read_image(shared / "data" / name), list(KINDS), seed=IMAGES.index(name))


@pytest.mark.parametrize("name", IMAGES)
def test_at_1024_pixels(large: tuple[Any, Predictor], shared: Path, name: str) -> None:
    index = IMAGES.index(name)
    kind = KINDS[index % len(KINDS)]
    _run(large, read_image(shared / "data" / name), [kind], seed=index)


def test_several_objects(small: tuple[Any, Predictor], shared: Path) -> None:
    judge, ours = small
    image = read_image(shared / "data" / IMAGES[5])
    judge.set_image(image)
    ours.set_image(image)
    rng = np.random.default_rng(0)
    boxes = np.stack([_prompts("box", image.shape[:2], rng)["box"] for _ in range(20)])
    points = np.stack([_prompts("points", image.shape[:2], rng)["point_coords"] for _ in range(20)])
    labels = np.tile([1, 0, 1, -1], (20, 1))
    moved = {
        "point_coords": judge.transform.apply_coords_torch(torch.tensor(points), image.shape[:2]),
        "point_labels": torch.tensor(labels),
        "boxes": judge.transform.apply_boxes_torch(torch.tensor(boxes), image.shape[:2]),
    }
    wanted = judge.predict_torch(**moved, return_logits=True)
    found = ours.predict_torch(**moved, return_logits=True)
    for ours_, judges in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours_, judges, rtol=0, atol=1e-4)
    arrays = ours.predict(points, labels, boxes, return_logits=True)
    for ours_, judges in zip(arrays, wanted, strict=True):
        np.testing.assert_allclose(ours_, judges.numpy(), rtol=0, atol=1e-4)


def test_image_forms(small: tuple[Any, Predictor], shared: Path) -> None:
    judge, ours = small
    image = read_image(shared / "data" / IMAGES[0])
    judge.set_image(image, image_format="BGR")
    ours.set_image(image, image_format="BGR")
    assert torch.equal(ours.get_image_embedding(), judge.get_image_embedding())

    resized = torch.from_numpy(resize_longest_side(image, 256)).permute(2, 0, 1)[None]
    judge.set_torch_image(resized, image.shape[:2])
    ours.set_torch_image(resized, image.shape[:2])
    assert torch.equal(ours.get_image_embedding(), judge.get_image_embedding())
    _assert_agree(judge, ours, {"box": np.array([100, 50, 300, 250])}, multimask=True)


@pytest.mark.parametrize("size", [(360, 480), (640, 427), (33, 32), (1, 300), (2047, 1365)])
def test_resizing(size: tuple[int, int]) -> None:
    judge = segment_anything.utils.transforms.ResizeLongestSide(256)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    resized = resize_longest_side(image, 256)
    np.testing.assert_array_equal(resized, judge.apply_image(image))
    coords = rng.integers(0, min(size), (4, 5, 2))
    boxes = rng.uniform(0, min(size), (7, 4)).astype(np.float32)
    input_size = resized.shape[:2]
    np.testing.assert_allclose(
        scale_coords(coords, size, input_size), judge.apply_coords(coords, size), rtol=1e-12
    )
    np.testing.assert_allclose(
        scale_boxes(boxes, size, input_size), judge.apply_boxes(boxes, size), rtol=1e-6
    )
    torch.testing.assert_close(
        scale_boxes(torch.tensor(boxes), size, input_size),
        judge.apply_boxes_torch(torch.tensor(boxes), size),
    )
