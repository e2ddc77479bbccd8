"""Prompts made from true masks: answers at the original size, clicks where the errors are."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from vision.data import boxes_of_masks, interior_point
from vision.metrics import boundary_iou, mask_iou
from vision.metrics.prompt_baselines import fill_boxes
from vision.sam import ImageEmbedding, Predictor, RwkvSam, create_sam
from vision.sam.evaluation import (
    PromptEvaluator,
    click_name,
    correcting_click,
    resize_to_square,
)


@dataclass
class Call:
    """What the stand-in was asked."""

    points: tuple[Tensor, Tensor] | None
    boxes: Tensor | None
    masks: Tensor | None
    several: bool


class Painter(nn.Module):
    """Stands in for a model: paints the box, or a disc about the last point.

    Positive points add the disc to the mask prompt, negative ones take it away; the more points,
    the smaller the disc.
    """

    mask_threshold = 0.0
    image_size = 64
    pad_to_square = False
    device = torch.device("cpu")

    def __init__(self, radius: float = 6.0) -> None:
        super().__init__()
        self.mask_decoder = nn.Module()
        self.mask_decoder.single_mask = False
        self.radius = radius
        self.calls: list[Call] = []
        self.encoded = 0

    upscale_masks = RwkvSam.upscale_masks

    def encode_image(self, x: Tensor) -> ImageEmbedding:
        self.encoded += 1
        h, w = (-(-side // 16) for side in x.shape[-2:])
        return ImageEmbedding(torch.zeros(1, 1, h, w), None, (x.shape[-2], x.shape[-1]))

    def predict_masks(self, image, points=None, boxes=None, masks=None, multimask_output=True):
        self.calls.append(Call(points, boxes, masks, multimask_output))
        h, w = (4 * side for side in image.embedding.shape[-2:])
        # A low-resolution pixel is 4 x 4 pixels, pixel i of which lies at i + 0.5.
        y, x = 4 * torch.arange(h)[:, None] + 2.0, 4 * torch.arange(w) + 2.0
        if boxes is not None:
            x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
            inside = torch.minimum(torch.minimum(x - x0, x1 + 1 - x), y - y0)
            logits = torch.minimum(inside, y1 + 1 - y)[:, None]
        else:
            coords, labels = points
            px, py = (coords[:, -1, None, None] + 0.5).unbind(-1)
            radius = 2 * self.radius / (labels.shape[1] + 1)
            disc = radius - ((x - px) ** 2 + (y - py) ** 2).sqrt()
            before = torch.full_like(disc, -9.0) if masks is None else masks[:, 0]
            add = torch.maximum(before, disc)
            take = torch.minimum(before, -disc)
            logits = torch.where(labels[:, -1, None, None] == 1, add, take)[:, None]
        count = 3 if multimask_output else 1
        iou = torch.tensor([0.2, 0.5, 0.8])[-count:].expand(len(logits), -1)
        worse = -9.0 - torch.zeros_like(logits)
        return torch.cat([*[worse] * (count - 1), logits], 1), iou


class Knowing(Painter):
    """Paints the objects that it was told, exactly: the masks of a square image of 64 pixels."""

    def __init__(self, masks: np.ndarray) -> None:
        super().__init__()
        self.truth = torch.from_numpy(masks).float()
        self.next = 0

    def predict_masks(self, image, points=None, boxes=None, masks=None, multimask_output=True):
        count = len(boxes if boxes is not None else points[0])
        logits, iou = super().predict_masks(image, points, boxes, masks, multimask_output)
        self.chosen = self.truth[:count]
        return logits, iou

    def upscale_masks(self, logits, input_size, original_size):
        index, self.next = self.next, (self.next + 1) % len(self.chosen)
        return (self.chosen[index] - 0.5).expand(1, logits.shape[1], -1, -1)


def discs(height: int = 48, width: int = 64, count: int = 3, radius: int = 6) -> np.ndarray:
    y, x = np.ogrid[:height, :width]
    centres = [(12 + 12 * i, 14 + 16 * i) for i in range(count)]
    return np.stack([(y - cy) ** 2 + (x - cx) ** 2 <= radius**2 for cy, cx in centres])


def evaluator(model: nn.Module, **options: object) -> PromptEvaluator:
    return PromptEvaluator(model, **{"clicks": (1,), "targets": (), **options})


def image_of(masks: np.ndarray) -> np.ndarray:
    return np.zeros((*masks.shape[1:], 3), np.uint8)


regions = st.builds(
    lambda h, w, share, seed: np.random.default_rng(seed).random((h, w)) < share,
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(0.2, 0.9),
    st.integers(0, 2**16),
)


@settings(max_examples=100, deadline=None)
@given(true=regions, share=st.floats(0.1, 0.9), seed=st.integers(0, 2**16))
def test_clicks_land_in_the_deepest_error(true: np.ndarray, share: float, seed: int) -> None:
    pred = np.random.default_rng(seed).random(true.shape) < share
    if np.array_equal(pred, true):
        return
    point, label = correcting_click(pred, true)
    x, y = point.astype(int)
    assert pred[y, x] != true[y, x]
    assert label == int(true[y, x])
    again, other = correcting_click(pred, true)
    assert (point == again).all()
    assert label == other
    # OpenCV's exact distance in each region, the border of the image being beside it.
    depths = [
        cv2.distanceTransform(np.pad(r, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        for r in (pred & ~true, true & ~pred)
    ]
    # The chamfer distance by which the pixel is chosen is a little off the exact one.
    assert depths[label][y + 1, x + 1] > 0.85 * max(d.max() for d in depths)


def test_the_first_click_is_the_interior_point() -> None:
    true = discs()[0] | discs(radius=2)[2]
    point, label = correcting_click(np.zeros_like(true), true)
    assert label == 1
    assert (point == interior_point(true)).all()
    assert (point == (14, 12)).all()
    with pytest.raises(ValueError, match="no wrong pixel"):
        correcting_click(true, true)


def test_the_larger_error_is_clicked_and_a_tie_is_positive() -> None:
    true, pred = np.zeros((2, 20, 40), bool)
    true[2:8, 2:8] = True
    pred[4:14, 20:30] = True
    assert correcting_click(pred, true)[1] == 0
    true[8:18, 2:18] = True
    assert correcting_click(pred, true)[1] == 1
    assert correcting_click(np.roll(pred, -15), pred)[1] == 1


@pytest.mark.parametrize("resize", ["keep_ratio", "squash"])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (200, 90), (31, 47), (24, 32)])
def test_a_disc_at_the_click_lies_on_the_object(resize: str, size: tuple[int, int]) -> None:
    """The stand-in paints where the prompt is; only right coordinates meet the object."""
    height, width = size
    masks = np.zeros((2, height, width), bool)
    masks[0, height // 8 : height // 3, width // 2 : width - width // 8] = True
    masks[1, height // 2 : height - height // 9, width // 10 : width // 3] = True
    model = Painter()
    found = evaluator(model, resize=resize)(image_of(masks), masks)
    assert model.encoded == 1
    for mask, box, click in zip(masks, found.masks["box"], found.masks["click"], strict=True):
        assert box.shape == click.shape == size
        y, x = np.nonzero(click.numpy())
        wanted = interior_point(mask)
        scale = 64 / np.array([width, height])
        scale = scale if resize == "squash" else scale.min()
        error = (np.array([x.mean(), y.mean()]) - wanted) * scale
        assert (np.abs(error) < 2.5).all(), error  # of the pixels of the encoded image
        iou = float(mask_iou(box, torch.from_numpy(mask)))
        assert iou > 0.65


def test_both_resizes_agree_on_a_square_image() -> None:
    masks = discs(90, 90)
    image = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    sam = small_sam()
    found = [PromptEvaluator(sam, resize=r)(image, masks) for r in ("keep_ratio", "squash")]
    for kind in found[0].masks:
        assert torch.equal(found[0].masks[kind], found[1].masks[kind])
    assert [f.resize for f in found] == ["keep_ratio", "squash"]
    assert resize_to_square(image[:40], 32).shape == (32, 32, 3)


def small_sam(**options: object) -> RwkvSam:
    torch.manual_seed(0)
    return create_sam("rwkv_sam_nano", dim=32, mlp_dim=64, image_size=64, **options)


def test_answers_to_boxes_can_be_cut_off_outside_of_them() -> None:
    sam, masks = small_sam(), discs(60, 100)
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    whole, cut = (evaluator(sam, clip_to_box=c)(image, masks).masks for c in (False, True))
    inside = fill_boxes(boxes_of_masks(torch.from_numpy(masks)), (60, 100))
    assert (whole["box"] & ~inside).any()
    assert (whole["box"] & inside).any()
    assert torch.equal(cut["box"], whole["box"] & inside)
    assert torch.equal(cut["click"], whole["click"])


@pytest.mark.parametrize("options", [{}, {"single_mask": True}, {"pad_to_square": True}])
def test_answers_are_the_predictors(options: dict[str, bool]) -> None:
    sam = small_sam(**options)
    masks = discs(60, 100)
    image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    found = PromptEvaluator(sam, clicks=(1, 2), targets=(), batch_size=2)(image, masks)
    assert set(found.masks) == {"box", "click", "click2"}
    predictor = Predictor(sam)
    predictor.set_image(image)
    for i, mask in enumerate(masks):
        y, x = np.nonzero(mask)
        box = [x.min(), y.min(), x.max(), y.max()]
        answer, iou, _ = predictor.predict(box=box, multimask_output=False)
        assert np.array_equal(found.masks["box"][i].numpy(), answer[0])
        assert float(found.expected_iou["box"][i]) == pytest.approx(iou[0], abs=1e-5)
        point = [interior_point(mask)]
        answer, iou, logits = predictor.predict(
            point, [1], multimask_output="single_mask" not in options
        )
        best = iou.argmax()
        assert np.array_equal(found.masks["click"][i].numpy(), answer[best])
        point2, label = correcting_click(answer[best], mask)
        answer, iou, _ = predictor.predict(
            [*point, point2], [1, label], mask_input=logits[best : best + 1], multimask_output=False
        )
        assert np.array_equal(found.masks["click2"][i].numpy(), answer[0])
        assert float(found.expected_iou["click2"][i]) == pytest.approx(iou[0], abs=1e-5)


def test_clicks_go_on_from_the_last_mask_until_nothing_is_wrong() -> None:
    masks = discs(64, 64, radius=9)
    model = Painter()
    evaluate = PromptEvaluator(model, box=False, clicks=(1, 3, 5), targets=(0.3, 0.5, 0.999))
    found = evaluate(image_of(masks), masks)
    assert list(found.masks) == ["click", "click3", "click5"]
    assert [c.several for c in model.calls] == [True, False, False, False, False]
    assert [c.points[0].shape for c in model.calls] == [(3, k, 2) for k in range(1, 6)]
    assert model.calls[0].masks is None
    assert all(c.masks.shape == (3, 1, 16, 16) for c in model.calls[1:])
    every = PromptEvaluator(model, box=False, clicks=range(1, 6))(image_of(masks), masks)
    true = torch.from_numpy(masks)
    iou = torch.stack([mask_iou(mask, true) for mask in every.masks.values()])  # (5, N)
    assert (iou.diff(dim=0) > 0).all()
    for count in (1, 3, 5):
        assert torch.equal(found.masks[click_name(count)], every.masks[click_name(count)])
    assert found.clicks_needed[0.3].tolist() == [1, 1, 1]
    assert found.clicks_needed[0.5].tolist() == (1 + (iou < 0.5).sum(0)).tolist()
    assert found.clicks_needed[0.999].tolist() == [5, 5, 5]


def test_more_clicks_are_tried_only_where_the_target_is_not_reached() -> None:
    masks = np.concatenate([discs(64, 64, 1, 6), discs(64, 64, 2, 8)[1:]])
    model = Painter()
    evaluate = PromptEvaluator(model, box=False, clicks=(2,), targets=(0.7,), max_clicks=8)
    needed = evaluate(image_of(masks), masks).clicks_needed[0.7]
    assert needed[0] == 1
    assert 2 < needed[1] < 8
    assert [len(c.points[0]) for c in model.calls] == [2, 2] + [1] * (int(needed[1]) - 2)


def test_a_perfect_answer_is_kept_and_gets_no_further_click() -> None:
    masks = discs(64, 64)
    model = Knowing(masks)
    found = PromptEvaluator(model)(image_of(masks), masks)
    true = torch.from_numpy(masks)
    for kind in ("box", "click", "click3", "click5"):
        assert torch.equal(found.masks[kind], true)
        assert found.expected_iou[kind] == pytest.approx(0.8)
    assert len(model.calls) == 2
    assert {t: n.tolist() for t, n in found.clicks_needed.items()} == {0.85: [1] * 3, 0.9: [1] * 3}


def test_batches_do_not_matter_and_two_calls_agree() -> None:
    masks = discs(48, 70)
    image = np.random.default_rng(0).integers(0, 256, (48, 70, 3), dtype=np.uint8)
    sam = small_sam()
    found = [PromptEvaluator(sam, batch_size=n)(image, masks) for n in (1, 2, 16, 16)]
    for other in found[1:]:
        for kind, mask in found[0].masks.items():
            assert (mask_iou(mask, other.masks[kind]) > 0.999).all()
    for kind, mask in found[2].masks.items():
        assert torch.equal(mask, found[3].masks[kind])
        assert torch.equal(found[2].expected_iou[kind], found[3].expected_iou[kind])
    for target, needed in found[2].clicks_needed.items():
        assert torch.equal(needed, found[3].clicks_needed[target])


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 40), (17, 5)])
@pytest.mark.parametrize("resize", ["keep_ratio", "squash"])
def test_tiny_images(size: tuple[int, int], resize: str) -> None:
    masks = np.ones((1, *size), bool)
    found = PromptEvaluator(small_sam(), resize)(np.full((*size, 3), 90, np.uint8), masks)
    for mask in found.masks.values():
        assert mask.shape == (1, *size)
        assert mask.dtype == torch.bool
    assert all(iou.shape == (1,) for iou in found.expected_iou.values())


def test_measures_of_real_masks(shared: Path) -> None:
    """mIoU and mBIoU of box answers against NumPy and OpenCV, at the size of the photographs."""
    files = sorted(p for p in (shared / "data/mask_pairs").rglob("masks/*.png"))[::6][:30]
    assert len(files) == 30
    for path in files:
        true = np.asarray(Image.open(path).convert("L")) > 128
        found = evaluator(Painter(), clicks=())(image_of(true[None]), true[None])
        assert list(found.masks) == ["box"]
        pred = found.masks["box"][0].numpy()
        h, w = true.shape
        d = max(1, round(0.02 * (h**2 + w**2) ** 0.5))
        bands = []
        for mask in (pred, true):
            padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
            inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=d)[1:-1, 1:-1]
            bands.append(mask & (inner == 0))
        area = (pred & true).sum() / (pred | true).sum()
        band = (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()
        assert 0 < area < 1
        a, b = found.masks["box"], torch.from_numpy(true)[None]
        assert float(mask_iou(a, b)) == pytest.approx(area, abs=1e-7)
        assert float(boundary_iou(a, b)) == pytest.approx(band, abs=1e-7)
        box = boxes_of_masks(a)[0] - boxes_of_masks(b)[0]
        assert box.abs().max() <= 3 * max(h, w) / 64


def test_wrong_calls_are_named() -> None:
    masks, model = discs(), Painter()
    with pytest.raises(ValueError, match="mask 1 of 3 is empty"):
        evaluator(model)(image_of(masks), masks & np.array([1, 0, 1], bool)[:, None, None])
    with pytest.raises(ValueError, match="do not resize them"):
        evaluator(model)(image_of(masks[:, :20]), masks)
    with pytest.raises(ValueError, match="threshold them"):
        evaluator(model)(image_of(masks), masks.astype(np.uint8))
    with pytest.raises(ValueError, match="N at least 1"):
        evaluator(model)(image_of(masks), masks[:0])
    with pytest.raises(ValueError, match=r"uint8 \(H, W, 3\)"):
        evaluator(model)(image_of(masks).astype(float), masks)
    for options, said in (
        ({"resize": "crop"}, "there are keep_ratio, squash"),
        ({"clicks": (0,)}, "from 1 to max_clicks"),
        ({"clicks": (1, 5), "max_clicks": 3}, "from 1 to max_clicks"),
        ({"targets": (90,)}, "an IoU in 0..1"),
        ({"batch_size": 0}, "1 or more"),
        ({"box": False, "clicks": ()}, "nothing to ask"),
    ):
        with pytest.raises(ValueError, match=said):
            PromptEvaluator(model, **options)
    assert click_name(1) == "click"
    assert click_name(3) == "click3"
