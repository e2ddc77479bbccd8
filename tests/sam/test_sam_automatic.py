"""The automatic mask generator: its helpers, known masks, and segment-anything as the judge."""

import weakref
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from vision.data import boxes_of_masks, read_image
from vision.data.rle import (
    area_of_rle,
    box_of_rle,
    compressed_rle,
    decode_rle,
    encode_masks,
    uncompressed_rle,
)
from vision.sam import automatic
from vision.sam.amg_crops import (
    build_point_grid,
    build_point_grids,
    crop_boxes,
    is_box_near_crop_edge,
)
from vision.sam.amg_masks import (
    fill_small_holes,
    paste_masks,
    remove_small_islands,
    stability_score,
)
from vision.sam.automatic import OUTPUT_MODES, AutomaticMaskGenerator
from vision.sam.checkpoint import load_sam_state_dict
from vision.sam.model import RwkvSam, build_sam_compatible, create_sam

Record = dict[str, Any]
SIDES = st.integers(1, 24)
MASKS = hnp.arrays(bool, st.tuples(st.integers(1, 3), SIDES, SIDES))
quick = settings(deadline=None, max_examples=50)


@pytest.fixture(scope="module")
def judge() -> Any:
    """The package segment_anything."""
    return pytest.importorskip(
        "segment_anything", reason="the judge is not installed (pip install segment-anything)"
    )


# Run lengths


@quick
@given(masks=MASKS)
def test_rle_is_that_of_pycocotools(masks: np.ndarray) -> None:
    for mask, rle in zip(masks, encode_masks(torch.from_numpy(masks)), strict=True):
        wanted = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        assert rle == {"size": list(mask.shape), "counts": wanted["counts"].decode()}
        np.testing.assert_array_equal(decode_rle(rle), mask)
        assert area_of_rle(rle) == mask.sum()
        assert box_of_rle(rle) == coco_mask.toBbox(wanted).tolist()


@quick
@given(masks=MASKS)
def test_uncompressed_rle_counts_runs_down_the_columns(masks: np.ndarray) -> None:
    (rle,) = encode_masks(torch.from_numpy(masks[:1]))
    runs = [(value, len(list(run))) for value, run in groupby(masks[0].ravel(order="F").tolist())]
    counts = [0] * runs[0][0] + [length for _, length in runs]
    plain = uncompressed_rle(rle)
    assert plain == {"size": list(masks[0].shape), "counts": counts}
    assert uncompressed_rle(plain) == plain
    assert compressed_rle(plain) == rle
    np.testing.assert_array_equal(decode_rle(plain), masks[0])


def test_rle_of_no_masks() -> None:
    assert encode_masks(torch.zeros(0, 4, 5, dtype=torch.bool)) == []


def test_rle_of_masks_that_are_not_contiguous() -> None:
    masks = torch.rand(4, 6, 5).permute(2, 0, 1) > 0.5
    assert (decode_rle(encode_masks(masks)[3]) == masks[3].numpy()).all()


@pytest.mark.parametrize("masks", [torch.zeros(2, 3, dtype=torch.bool), torch.zeros(1, 2, 3)])
def test_encode_refuses(masks: Tensor) -> None:
    with pytest.raises(ValueError, match=r"bool masks \(N, H, W\)"):
        encode_masks(masks)


@pytest.mark.parametrize("counts", [[3, 2], [-1, 7], []])
def test_run_lengths_that_do_not_fill_the_mask(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="add up to 6"):
        compressed_rle({"size": [2, 3], "counts": counts})


# Masks


@quick
@given(masks=MASKS)
def test_boxes_are_those_of_the_outermost_pixels(masks: np.ndarray) -> None:
    found = boxes_of_masks(torch.from_numpy(masks))
    assert found.dtype == torch.int64
    for mask, box in zip(masks, found.tolist(), strict=True):
        y, x = np.nonzero(mask)
        assert box == ([x.min(), y.min(), x.max(), y.max()] if x.size else [0, 0, 0, 0])


@quick
@given(
    logits=hnp.arrays(
        np.float32, st.tuples(st.integers(0, 3), SIDES, SIDES), elements=st.floats(-4, 4, width=32)
    ),
    threshold=st.sampled_from([-1.0, 0.0, 0.5]),
    offset=st.sampled_from([0.0, 0.25, 1.0]),
)
def test_stability_is_the_iou_of_two_thresholds(
    logits: np.ndarray, threshold: float, offset: float
) -> None:
    found = stability_score(torch.from_numpy(logits), threshold, offset)
    high, low = logits > threshold + offset, logits > threshold - offset
    union = (high | low).sum((1, 2))
    wanted = (high & low).sum((1, 2)) / np.maximum(union, 1)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)


def test_stability_of_a_mask_wider_than_16_bit_integers_count() -> None:
    logits = torch.ones(1, 1, 80_000)
    logits[..., 40_000:] = 0
    assert stability_score(logits, 0.0, 0.5).tolist() == [0.5]


def test_paste() -> None:
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    whole = paste_masks(mask, (4, 1, 7, 3), (5, 9))
    assert whole.shape == (1, 5, 9)
    assert whole[0, 1:3, 4:7].all()
    assert whole.sum() == 6
    assert paste_masks(mask, (0, 0, 3, 2), (2, 3)) is mask


@quick
@given(mask=hnp.arrays(bool, st.tuples(SIDES, SIDES)), min_area=st.integers(0, 12))
def test_small_regions_as_segment_anything(judge: Any, mask: np.ndarray, min_area: int) -> None:
    theirs = judge.utils.amg.remove_small_regions
    for ours, mode in ((fill_small_holes, "holes"), (remove_small_islands, "islands")):
        cleaned, changed = ours(mask, min_area)
        wanted, wanted_changed = theirs(mask, min_area, mode)
        assert changed == wanted_changed
        assert cleaned.dtype == bool
        np.testing.assert_array_equal(cleaned, wanted)


def test_holes_and_islands_by_hand() -> None:
    mask = np.zeros((12, 12), bool)
    mask[1:9, 1:9] = True
    mask[3, 3] = mask[5:7, 5:7] = False
    mask[11, 11] = True
    filled, changed = fill_small_holes(mask, 3)
    assert changed
    assert filled[3, 3]
    assert not filled[5, 5]
    alone, changed = remove_small_islands(mask, 3)
    assert changed
    assert not alone[11, 11]
    assert not alone[3, 3]
    assert remove_small_islands(alone, 3)[1] is False
    kept, _ = remove_small_islands(mask, 1000)
    assert kept[1, 1]
    assert not kept[11, 11]


# Crops and points


@quick
@given(
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    layers=st.integers(0, 3),
    overlap=st.floats(0, 0.9),
)
def test_crops_as_segment_anything(
    judge: Any, size: tuple[int, int], layers: int, overlap: float
) -> None:
    boxes, layer_of = judge.utils.amg.generate_crop_boxes(size, layers, overlap)
    wanted = [
        ((x0, y0, x1, y1), layer)
        for (x0, y0, x1, y1), layer in zip(boxes, layer_of, strict=True)
        if x0 < x1 and y0 < y1  # ours leaves out crops without a pixel
    ]
    assert crop_boxes(size, layers, overlap) == wanted


@quick
@given(height=st.integers(1, 99), width=st.integers(1, 99), layers=st.integers(1, 3))
def test_crops_of_a_layer_cover_the_image(height: int, width: int, layers: int) -> None:
    crops = crop_boxes((height, width), layers, 512 / 1500)
    assert crops[0] == ((0, 0, width, height), 0)
    for layer in range(1, layers + 1):
        boxes = [crop.box for crop in crops if crop.layer == layer]
        assert len(boxes) == 4**layer or min(height, width) < 64
        seen = np.zeros((height, width), bool)
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
            seen[y0:y1, x0:x1] = True
        assert seen.all()


def test_point_grid() -> None:
    wanted = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    assert build_point_grid(2).tolist() == wanted
    assert [len(grid) for grid in build_point_grids(9, 2, 2)] == [81, 16, 4]
    with pytest.raises(ValueError, match="crop_n_points_downscale_factor"):
        build_point_grids(4, 2, 4)


def test_point_grid_as_segment_anything(judge: Any) -> None:
    for n in (1, 5, 32):
        wanted = judge.utils.amg.build_point_grid(n)
        np.testing.assert_allclose(build_point_grid(n), wanted, rtol=1e-14)


@quick
@given(
    boxes=hnp.arrays(
        np.int64, st.tuples(st.integers(0, 5), st.just(4)), elements=st.integers(0, 99)
    ),
    crop=st.sampled_from([(0, 0, 200, 100), (0, 0, 99, 90), (50, 10, 150, 100), (101, 5, 200, 60)]),
)
def test_edges_as_segment_anything(
    judge: Any, boxes: np.ndarray, crop: tuple[int, int, int, int]
) -> None:
    found = is_box_near_crop_edge(torch.from_numpy(boxes), crop, (100, 200))
    wanted = judge.utils.amg.is_box_near_crop_edge(
        torch.from_numpy(boxes), list(crop), [0, 0, 200, 100]
    )
    assert found.tolist() == wanted.tolist()


# Known masks


class Scripted(nn.Module):
    """Gives the same masks for every point, at the image's own size."""

    image_size = 64
    mask_threshold = 0.0
    device = torch.device("cpu")
    mask_decoder = SimpleNamespace(single_mask=False)

    def __init__(self, logits: Tensor, iou: list[float]) -> None:
        super().__init__()
        self.logits, self.iou = logits, torch.tensor(iou)

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size

    def encode_image(self, x: Tensor) -> Any:
        return SimpleNamespace(input_size=tuple(x.shape[-2:]))

    def predict_masks(
        self, image: Any, points: tuple[Tensor, Tensor], multimask_output: bool
    ) -> tuple[Tensor, Tensor]:
        assert not torch.is_grad_enabled()
        n = len(points[0])
        return self.logits.expand(n, -1, -1, -1), self.iou.expand(n, -1)

    def upscale_masks(self, low_res: Tensor, input_size: Any, original_size: Any) -> Tensor:
        assert tuple(low_res.shape[-2:]) == tuple(original_size)
        return low_res


IMAGE = np.zeros((64, 64, 3), np.uint8)
ONE_POINT = {"points_per_side": None, "point_grids": [np.array([[0.5, 0.25]])]}


def _square(x0: int, y0: int, side: int, height: float = 8.0) -> Tensor:
    """Logits (64, 64) of a square: `height` within, -8 outside."""
    logits = torch.full((64, 64), -8.0)
    logits[y0 : y0 + side, x0 : x0 + side] = height
    return logits


def _scripted(logits: list[Tensor], iou: list[float], **options: Any) -> list[Record]:
    model: Any = Scripted(torch.stack(logits), iou)
    return AutomaticMaskGenerator(model, **{**ONE_POINT, **options}).generate(IMAGE)


def _ious(records: list[Record]) -> list[float]:
    return [round(record["predicted_iou"], 6) for record in records]


def test_record() -> None:
    (record,) = _scripted([_square(10, 20, 5)], [0.9], output_mode="binary_mask")
    mask = record.pop("segmentation")
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, _square(10, 20, 5).numpy() > 0)
    assert record == {
        "area": 25,
        "bbox": [10, 20, 4, 4],
        "predicted_iou": pytest.approx(0.9),
        "point_coords": [[32.0, 16.0]],
        "stability_score": 1.0,
        "crop_box": [0, 0, 64, 64],
    }


def test_output_modes_hold_the_same_mask() -> None:
    logits = [_square(0, 3, 9)]
    binary, plain, coco = (
        _scripted(logits, [0.9], output_mode=mode)[0]["segmentation"]
        for mode in ("binary_mask", "uncompressed_rle", "coco_rle")
    )
    assert list(OUTPUT_MODES) == ["binary_mask", "uncompressed_rle", "coco_rle"]
    assert isinstance(coco["counts"], str)
    assert plain["counts"][:3] == [3, 9, 55]
    np.testing.assert_array_equal(coco_mask.decode(coco), binary)
    np.testing.assert_array_equal(decode_rle(plain), binary)


def test_predicted_iou_threshold() -> None:
    squares = [_square(0, 0, 9), _square(20, 0, 9), _square(40, 0, 9)]
    iou = [0.5, 0.75, -0.25]
    assert _ious(_scripted(squares, iou, pred_iou_thresh=0.5)) == [0.75]
    assert _ious(_scripted(squares, iou, pred_iou_thresh=0)) == [0.75, 0.5, -0.25]
    assert _scripted(squares, iou, pred_iou_thresh=0.8) == []


def test_stability_threshold() -> None:
    half = _square(0, 0, 10)
    half[:5, :10] = 0.5
    squares, iou = [half, _square(30, 0, 9)], [0.9, 0.95]
    found = _scripted(squares, iou, stability_score_thresh=0.5)
    assert [record["stability_score"] for record in found] == [1.0, 0.5]
    assert _ious(_scripted(squares, iou, stability_score_thresh=0.51)) == [0.95]
    calm = _scripted(squares, iou, stability_score_thresh=0.51, stability_score_offset=0.25)
    assert len(calm) == 2


def test_mask_threshold_of_the_model_counts() -> None:
    low = _square(0, 0, 20, 2.0)
    low[5:9, 5:9] = 8
    model: Any = Scripted(low[None], [0.9])
    model.mask_threshold = 4.0
    assert AutomaticMaskGenerator(model, **ONE_POINT).generate(IMAGE)[0]["area"] == 16


def test_of_repeats_the_one_with_the_highest_predicted_iou_stays() -> None:
    squares = [_square(0, 0, 20), _square(1, 0, 20), _square(40, 40, 20)]
    iou = [0.9, 0.95, 0.92]
    assert _ious(_scripted(squares, iou)) == [0.95, 0.92]
    assert _ious(_scripted(squares, iou, box_nms_thresh=0.95)) == [0.95, 0.92, 0.9]


def test_many_prompts_with_one_answer_are_one_mask() -> None:
    found = _scripted(
        [_square(0, 0, 20)], [0.9], points_per_side=5, point_grids=None, points_per_batch=4
    )
    assert [record["point_coords"] for record in found] == [[[6.4, 6.4]]]


def test_clean_up_removes_small_regions_and_then_repeats() -> None:
    dirty = _square(0, 0, 20)
    dirty[3, 3] = -8
    dirty[60, 60] = 8
    clean = _square(0, 0, 20)
    options = {"min_mask_region_area": 5, "box_nms_thresh": 0.5}
    # Apart before, because of the island; alike after it. The one that was clean stays.
    (record,) = _scripted([dirty, clean], [0.95, 0.9], **options)
    assert _ious([record]) == [0.9]
    (record,) = _scripted([dirty], [0.95], **options)
    np.testing.assert_array_equal(record["segmentation"], clean.numpy() > 0)
    assert record["area"] == 400
    assert record["bbox"] == [0, 0, 19, 19]
    assert len(_scripted([dirty, clean], [0.95, 0.9], box_nms_thresh=0.5)) == 2


def test_clean_up_takes_the_larger_of_both_nms_thresholds() -> None:
    dirty = _square(0, 0, 20)
    dirty[60, 60] = 8
    squares, iou = [dirty, _square(3, 0, 20)], [0.95, 0.9]  # 0.73 of each other when clean
    for box, crop, left in ((0.8, 0.15, 2), (0.15, 0.8, 2), (0.5, 0.15, 1)):
        options = {"box_nms_thresh": box, "crop_nms_thresh": crop, "min_mask_region_area": 5}
        assert len(_scripted(squares, iou, **options)) == left


class Painted(Scripted):
    """Knows an object by its red: the mask of a point is where the red is as at the point."""

    image_size = 128

    def __init__(self) -> None:
        super().__init__(torch.zeros(0), [])

    def encode_image(self, x: Tensor) -> Any:
        return SimpleNamespace(red=x[0, 0].float(), input_size=tuple(x.shape[-2:]))

    def predict_masks(
        self, image: Any, points: tuple[Tensor, Tensor], multimask_output: bool
    ) -> tuple[Tensor, Tensor]:
        x, y = points[0][:, 0].long().unbind(1)
        own = image.red[y, x]
        same = (image.red - own[:, None, None]).abs() < 25
        iou = torch.where(own > 0, 0.9 + own / 10_000, 0.1)
        return torch.where(same, 8.0, -8.0)[:, None], iou[:, None]

    def upscale_masks(self, low_res: Tensor, input_size: Any, original_size: Any) -> Tensor:
        return F.interpolate(low_res, original_size, mode="nearest")


def _painting() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """An image of 128 x 128 pixels, and its disks by name."""
    y, x = np.mgrid[:128, :128]
    disks = {
        "middle": (x - 64) ** 2 + (y - 64) ** 2 < 20**2,
        "corner": (x - 10) ** 2 + (y - 10) ** 2 < 9**2,
        "small": (x - 93) ** 2 + (y - 21) ** 2 < 4**2,
    }
    image = np.zeros((128, 128, 3), np.uint8)
    for red, disk in zip((100, 160, 240), disks.values(), strict=True):
        image[disk] = red
    return image, disks


def _names(records: list[Record], disks: dict[str, np.ndarray]) -> list[tuple[str, list[int]]]:
    """Which disk each record is, and its crop."""
    names = []
    for record in records:
        mask = record["segmentation"]
        iou = {name: (mask & disk).sum() / (mask | disk).sum() for name, disk in disks.items()}
        name = max(iou, key=lambda key: iou[key])
        assert iou[name] > 0.7, record
        names.append((name, record["crop_box"]))
    return sorted(names)


def test_crops_find_what_the_grid_of_the_image_misses() -> None:
    image, disks = _painting()
    model: Any = Painted()
    whole = [0, 0, 128, 128]
    plain = AutomaticMaskGenerator(model, 6).generate(image)
    assert _names(plain, disks) == [("corner", whole), ("middle", whole)]
    crops = AutomaticMaskGenerator(model, 6, crop_n_layers=1).generate(image)
    # The middle lies across all crops and is never whole in one; the corner is seen larger.
    assert _names(crops, disks) == [
        ("corner", [0, 0, 86, 86]),
        ("middle", whole),
        ("small", [43, 0, 85, 86]),
    ]


def test_grid_of_each_layer() -> None:
    image, disks = _painting()
    model: Any = Painted()
    grids = [np.empty((0, 2)), np.array([[(93 - 43) / 85, 21 / 86]])]
    found = AutomaticMaskGenerator(model, None, crop_n_layers=1, point_grids=grids).generate(image)
    assert _names(found, disks) == [("small", [43, 0, 85, 86])]
    np.testing.assert_allclose(found[0]["point_coords"], [[93, 21]])


# The small model


@pytest.fixture(scope="module")
def nano() -> RwkvSam:
    torch.manual_seed(0)
    return create_sam("rwkv_sam_nano")


ALL = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}


def _noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_model_that_comes_training_is_put_into_eval_mode(nano: RwkvSam) -> None:
    assert not AutomaticMaskGenerator(nano.train(), 2).model.training


def test_image_forms(nano: RwkvSam) -> None:
    generator = AutomaticMaskGenerator(nano, 2, output_mode="coco_rle", **ALL)
    image = _noise(40, 60)
    found = generator.generate(image)
    assert len(found) == 12
    assert generator.generate(Image.fromarray(image)) == found
    assert generator.generate(image / 255) == found
    with pytest.raises(ValueError, match="greyscale"):
        generator.generate(image[..., 0])


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (50, 33)])
def test_sizes(nano: RwkvSam, size: tuple[int, int]) -> None:
    found = AutomaticMaskGenerator(nano, 2, crop_n_layers=1, **ALL).generate(_noise(*size))
    assert found
    assert all(record["segmentation"].shape == size for record in found)


def test_batches_do_not_change_the_masks(nano: RwkvSam) -> None:
    one, all_ = (
        AutomaticMaskGenerator(nano, 3, n, output_mode="uncompressed_rle", **ALL).generate(
            _noise(40, 60)
        )
        for n in (2, 64)
    )
    key = lambda record: (record["point_coords"], record["predicted_iou"])  # noqa: E731
    for a, b in zip(sorted(one, key=key), sorted(all_, key=key), strict=True):
        assert a["point_coords"] == b["point_coords"]
        assert abs(a["area"] - b["area"]) <= 2


def test_single_mask_model() -> None:
    model = create_sam("rwkv_sam_nano", single_mask=True)
    found = AutomaticMaskGenerator(model, 2, **ALL).generate(_noise(40, 60))
    assert len(found) == 4


def test_progress(nano: RwkvSam, capfd: pytest.CaptureFixture[str]) -> None:
    AutomaticMaskGenerator(nano, 2).generate(_noise(20, 20))
    assert capfd.readouterr() == ("", "")
    AutomaticMaskGenerator(nano, 2, crop_n_layers=1, progress=True).generate(_noise(20, 20))
    assert "20/20" in capfd.readouterr().err


@pytest.mark.parametrize("prompts_per_side", [4, 12])
def test_memory_does_not_grow_with_the_prompts(
    nano: RwkvSam, monkeypatch: pytest.MonkeyPatch, prompts_per_side: int
) -> None:
    masks_at_once, pixels = 5, 256 * 256  # what the model sees is larger than the image
    monkeypatch.setattr(automatic, "_PIXELS_AT_ONCE", masks_at_once * pixels)
    sizes, alive = _watch_upscaling(nano, monkeypatch)
    found = AutomaticMaskGenerator(nano, prompts_per_side, output_mode="coco_rle", **ALL).generate(
        _noise(128, 128)
    )
    masks = 3 * prompts_per_side**2
    assert len(found) == masks
    assert max(sizes) == masks_at_once * 128 * 128
    assert sum(sizes) == masks * 128 * 128
    assert max(alive) == 0  # every chunk is gone before the next one comes


def test_an_image_larger_than_a_chunk_is_done_mask_by_mask(
    nano: RwkvSam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "_PIXELS_AT_ONCE", 300 * 400 - 1)
    sizes, _ = _watch_upscaling(nano, monkeypatch)
    AutomaticMaskGenerator(nano, 1, **ALL).generate(_noise(300, 400))
    assert sizes == [300 * 400] * 3


def test_masks_with_a_low_predicted_iou_are_not_upscaled(
    nano: RwkvSam, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, _ = _watch_upscaling(nano, monkeypatch)
    generator = AutomaticMaskGenerator(nano, 3, **{**ALL, "pred_iou_thresh": 1e9})
    assert generator.generate(_noise(64, 64)) == []
    assert sizes == []


def _watch_upscaling(
    model: RwkvSam, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[int], list[int]]:
    """Elements of each result of `upscale_masks`, and how many earlier ones lived at each call."""
    sizes: list[int] = []
    alive: list[int] = []
    earlier: list[Callable[[], Tensor | None]] = []
    upscale = model.upscale_masks

    def watched(*args: Any) -> Tensor:
        alive.append(sum(ref() is not None for ref in earlier))
        # A view keeps its base alive, so the base is what is watched.
        found = upscale(*args).clone()
        sizes.append(found.numel())
        earlier.append(weakref.ref(found.untyped_storage()))
        return found

    monkeypatch.setattr(model, "upscale_masks", watched)
    return sizes, alive


# Arguments


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"output_mode": "png"}, "binary_mask, uncompressed_rle, coco_rle"),
        ({"points_per_side": None}, "got none"),
        ({"point_grids": [np.zeros((1, 2))]}, "points_per_side=None"),
        ({**ONE_POINT, "crop_n_layers": 1}, r"each layer 0 \.\. 1, got 1"),
        ({**ONE_POINT, "point_grids": [np.zeros((1, 3))]}, r"point_grids\[0\]"),
        ({**ONE_POINT, "point_grids": [np.full((1, 2), 7.0)]}, r"values 0\.\.7"),
        ({"points_per_side": 0}, "1 or more points a side"),
        ({"points_per_batch": 0}, "points_per_batch wants 1"),
        ({"crop_n_layers": -1}, "crop_n_layers wants 0"),
        ({"crop_n_points_downscale_factor": 0}, "downscale_factor wants 1"),
        ({"min_mask_region_area": -1}, "min_mask_region_area wants 0"),
        ({"stability_score_offset": -0.5}, "stability_score_offset wants 0"),
        ({"crop_overlap_ratio": 1.0}, "0 <= ratio < 1"),
    ],
)
def test_arguments_are_checked(nano: RwkvSam, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AutomaticMaskGenerator(nano, **options)


# segment-anything as the judge


class Waves(nn.Module):
    """Stands for an image encoder: waves of place and colour, so that masks are compact."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.img_size = img_size
        scale = torch.tensor([3.0, 3.0, 0.3, 0.3, 0.3])
        self.register_buffer("frequencies", (torch.randn(256, 5) * scale)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        colours = F.avg_pool2d(x, 16)
        line = torch.linspace(-1, 1, colours.shape[-1])
        place = torch.stack(torch.meshgrid(line, line, indexing="xy"))[None]
        return 3 * F.conv2d(torch.cat([place, colours], 1), self.frequencies).sin()


def _pair(image_size: int) -> tuple[Any, RwkvSam]:
    """Segment Anything and our model of one encoder and equal weights, random but lively.

    Plain random weights give three masks that hardly depend on the point and cover the image in
    specks. Here tokens attend to their own place, and the upscaling does not speckle.
    """
    from segment_anything import modeling

    torch.manual_seed(0)
    grid = (image_size // 16, image_size // 16)
    judge = modeling.Sam(
        Waves(image_size),
        modeling.PromptEncoder(256, grid, (image_size, image_size), 16),
        modeling.MaskDecoder(
            num_multimask_outputs=3,
            transformer=modeling.TwoWayTransformer(2, 256, 8, 2048),
            transformer_dim=256,
        ),
    ).eval()
    decoder = judge.mask_decoder
    attentions = [layer.cross_attn_token_to_image for layer in decoder.transformer.layers]
    with torch.no_grad():
        for attention in (*attentions, decoder.transformer.final_attn_token_to_image):
            attention.q_proj.weight.mul_(4)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.out_proj.weight.mul_(4)
        for conv in (decoder.output_upscaling[0], decoder.output_upscaling[3]):
            conv.weight.copy_(2 * conv.weight.mean((2, 3), keepdim=True).expand_as(conv.weight))
        for head in decoder.output_hypernetworks_mlps:
            for layer in head.layers:
                layer.weight.mul_(5)
        decoder.iou_prediction_head.layers[-1].bias.add_(0.5)
    ours = build_sam_compatible(judge.image_encoder, image_size)
    load_sam_state_dict(ours, judge.state_dict())
    judge.mask_threshold = ours.mask_threshold = 8.0
    return judge, ours


def _key(record: Record) -> tuple[Any, ...]:
    return (*map(int, record["crop_box"]), *record["point_coords"][0], record["predicted_iou"])


@pytest.mark.parametrize(
    ("image", "image_size", "options", "least"),
    [
        ("camvid/img_dir/val/0016E5_07959.jpg", 256, {"points_per_side": 8}, 20),
        (
            "mask_pairs/ccp_person/val/images/0661.jpg",  # portrait
            256,
            {
                "points_per_side": 6,
                "crop_n_layers": 1,
                "crop_n_points_downscale_factor": 2,
                "points_per_batch": 10,
                "min_mask_region_area": 200,
            },
            30,
        ),
        ("coco_mini/val/000000001503.jpg", 1024, {"points_per_side": 3}, 10),
    ],
)
def test_same_masks_as_segment_anything(
    judge: Any, shared: Path, image: str, image_size: int, options: dict[str, Any], least: int
) -> None:
    pixels = read_image(shared / "data" / image)
    model, ours = _pair(image_size)
    options = {
        "pred_iou_thresh": 0.3,
        "stability_score_thresh": 0.5,
        "stability_score_offset": 0.3,
        "box_nms_thresh": 0.9,
        "crop_nms_thresh": 0.9,
        **options,
    }
    wanted = sorted(judge.SamAutomaticMaskGenerator(model, **options).generate(pixels), key=_key)
    found = sorted(AutomaticMaskGenerator(ours, **options).generate(pixels), key=_key)
    assert len(wanted) >= least
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert set(a) == set(b)
        assert a["crop_box"] == b["crop_box"]
        np.testing.assert_allclose(a["point_coords"], b["point_coords"], rtol=1e-12)
        assert a["predicted_iou"] == pytest.approx(b["predicted_iou"], abs=1e-5)
        assert a["stability_score"] == pytest.approx(b["stability_score"], abs=1e-3)
        # Logits differ in the last digits, so that a pixel on the edge may fall to either side.
        assert (a["segmentation"] != b["segmentation"]).sum() <= 1e-4 * b["area"] + 1
        assert a["area"] == pytest.approx(b["area"], rel=1e-4, abs=1)
        np.testing.assert_allclose(a["bbox"], b["bbox"], atol=1)
