"""The filled box and GrabCut as baselines of prompted masks."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vision.data import boxes_of_masks
from vision.metrics import mask_iou
from vision.metrics.prompt_baselines import fill_boxes, grab_cut


def disc_on_noise(height: int = 60, width: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc before dark noise, and its mask."""
    y, x = np.ogrid[:height, :width]
    mask = (y - 30) ** 2 + (x - 40) ** 2 < 18**2
    image = np.random.default_rng(0).integers(0, 60, (height, width, 3), dtype=np.uint8)
    image[mask] += 180
    return image, mask


@settings(max_examples=40, deadline=None)
@given(data=st.data(), height=st.integers(1, 12), width=st.integers(1, 12))
def test_a_filled_box_is_its_tight_box(data: st.DataObject, height: int, width: int) -> None:
    x0, x1 = sorted(data.draw(st.tuples(*2 * [st.integers(0, width - 1)])))
    y0, y1 = sorted(data.draw(st.tuples(*2 * [st.integers(0, height - 1)])))
    box = torch.tensor([[x0, y0, x1, y1]])
    filled = fill_boxes(box, (height, width))
    assert filled.shape == (1, height, width)
    assert torch.equal(boxes_of_masks(filled), box)
    assert filled.sum() == (x1 - x0 + 1) * (y1 - y0 + 1)


def test_grab_cut_finds_the_disc_again_and_again() -> None:
    image, mask = disc_on_noise()
    boxes = boxes_of_masks(torch.from_numpy(mask[None])).repeat(2, 1)
    found, fallbacks = grab_cut(image, boxes)
    assert not fallbacks.any()
    assert (mask_iou(found, torch.from_numpy(mask).expand(2, -1, -1)) > 0.97).all()
    assert mask_iou(fill_boxes(boxes, mask.shape)[0], torch.from_numpy(mask)) < 0.85
    cv2.setRNGSeed(123)
    again, _ = grab_cut(image, boxes)
    assert torch.equal(found, again)
    assert torch.equal(found[0], found[1])


def test_grab_cut_is_opencvs() -> None:
    image, mask = disc_on_noise()
    labels = np.zeros(mask.shape, np.uint8)
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(image, labels, (15, 10, 50, 45), *models, 5, cv2.GC_INIT_WITH_RECT)
    found, _ = grab_cut(image, torch.tensor([[15, 10, 64, 54]]))
    assert np.array_equal(found[0].numpy(), np.isin(labels, (1, 3)))


def test_the_box_reaches_to_its_last_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 60, (40, 50, 3), dtype=np.uint8)
    image[8:31, 12:37] += 180
    box = torch.tensor([[12, 8, 36, 30]])
    assert torch.equal(grab_cut(image, box)[0], fill_boxes(box, (40, 50)))


def test_without_pixels_to_learn_from_it_is_the_box() -> None:
    image, _ = disc_on_noise(60, 90)
    whole, dot, all_but_four = [0, 0, 89, 59], [5, 5, 6, 6], [0, 0, 89, 59]
    boxes = torch.tensor([whole, dot, [10, 10, 60, 50]])
    found, fallbacks = grab_cut(image, boxes)
    assert fallbacks.tolist() == [True, True, False]
    assert found[0].all()
    assert found[1].sum() == 4
    assert not torch.equal(found[2], fill_boxes(boxes, (60, 90))[2])
    found, fallbacks = grab_cut(image[:1, :94], torch.tensor([[0, 0, 85, 0], all_but_four]))
    assert fallbacks.tolist() == [True, True]


def test_a_large_image_is_cut_at_a_smaller_size() -> None:
    image, mask = disc_on_noise()
    boxes = boxes_of_masks(torch.from_numpy(mask[None]))
    found, _ = grab_cut(image, boxes, max_side=45)
    assert found.shape == (1, 60, 90)
    assert mask_iou(found[0], torch.from_numpy(mask)) > 0.9
    assert not (found & ~fill_boxes(boxes, (60, 90))).any()
    same, _ = grab_cut(image, boxes, max_side=90)
    assert torch.equal(same, grab_cut(image, boxes)[0])


@settings(max_examples=30, deadline=None)
@given(data=st.data(), height=st.integers(1, 9), width=st.integers(1, 9), flat=st.booleans())
def test_any_small_image(data: st.DataObject, height: int, width: int, flat: bool) -> None:
    x0, x1 = sorted(data.draw(st.tuples(*2 * [st.integers(0, width - 1)])))
    y0, y1 = sorted(data.draw(st.tuples(*2 * [st.integers(0, height - 1)])))
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = np.full_like(image, 7) if flat else image
    boxes = torch.tensor([[x0, y0, x1, y1]])
    for max_side in (None, 3):
        found, _ = grab_cut(image, boxes, max_side=max_side)
        assert not (found & ~fill_boxes(boxes, (height, width))).any()


def test_no_boxes_give_no_masks() -> None:
    image, _ = disc_on_noise()
    found, fallbacks = grab_cut(image, torch.zeros(0, 4, dtype=torch.int64))
    assert found.shape == (0, 60, 90)
    assert fallbacks.shape == (0,)


def test_wrong_calls_are_named() -> None:
    image, _ = disc_on_noise()
    with pytest.raises(ValueError, match=r"\(N, 4\), got \(4,\)"):
        fill_boxes(torch.zeros(4), (3, 3))
    with pytest.raises(ValueError, match="uint8"):
        grab_cut(image.astype(float), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="1 iteration or more"):
        grab_cut(image, torch.zeros(1, 4), 0)
