"""Mask IoU and boundary IoU against the definition, OpenCV, and the original's outputs."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vision.metrics import boundary_dilation, boundary_iou, mask_boundary, mask_iou, overlap


def eroded(mask: np.ndarray, d: int) -> np.ndarray:
    """By OpenCV: d times a 3 x 3 erosion, nothing outside of the image."""
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=d)[1:-1, 1:-1]


@pytest.mark.golden
def test_golden_cases(shared: Path) -> None:
    cases = torch.load(shared / "golden" / "boundary_iou.pt", weights_only=True)
    assert cases
    for case in cases:
        gt, pred = case["gt"], case["pred"]
        assert boundary_dilation(*gt.shape) == case["dilation"]
        assert torch.equal(mask_boundary(gt), case["gt_boundary"].bool())
        assert float(mask_iou(pred, gt)) == pytest.approx(case["iou"], abs=1e-12)
        assert float(boundary_iou(pred, gt)) == pytest.approx(case["biou"], abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    d=st.integers(1, 12),
    share=st.floats(0.3, 1.0),
    seed=st.integers(0, 2**16),
)
def test_boundary_is_opencvs(height: int, width: int, d: int, share: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < share
    found = mask_boundary(torch.from_numpy(mask), d).numpy()
    assert np.array_equal(found, mask & (eroded(mask, d) == 0))


def test_real_masks(shared: Path) -> None:
    files = sorted(p for p in (shared / "data" / "mask_pairs").rglob("*.png"))
    masks = [np.asarray(Image.open(path).convert("L")) > 128 for path in files[:30]]
    assert len(masks) == 30
    for mask in masks:
        pred = np.roll(mask, (3, -5), (0, 1))
        h, w = mask.shape
        d = max(1, round(0.02 * (h**2 + w**2) ** 0.5))
        bands = [m & (eroded(m, d) == 0) for m in (pred, mask)]
        area = (pred & mask).sum() / max((pred | mask).sum(), 1)
        band = (bands[0] & bands[1]).sum() / max((bands[0] | bands[1]).sum(), 1)
        a, b = torch.from_numpy(pred), torch.from_numpy(mask)
        assert float(mask_iou(a, b)) == pytest.approx(area, abs=1e-7)
        assert float(boundary_iou(a, b)) == pytest.approx(band, abs=1e-7)


def test_batches_and_empty_masks() -> None:
    masks = torch.rand(2, 3, 9, 11) < 0.6
    masks[0, 0] = False
    other = torch.rand(2, 3, 9, 11) < 0.6
    other[0, 0] = False
    for measure in (mask_iou, boundary_iou):
        found = measure(masks, other)
        assert found.shape == (2, 3)
        assert found[0, 0] == 0
        torch.testing.assert_close(found[1, 2], measure(masks[1, 2], other[1, 2]))
        torch.testing.assert_close(found, measure(other, masks))
    whole = torch.ones(1, 5, 5, dtype=torch.bool)
    assert float(mask_iou(whole, whole)) == pytest.approx(1, abs=1e-8)
    inside, either = overlap(masks[1], other[1])
    assert (inside <= either).all()


def test_wrong_masks_are_named() -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="threshold logits"):
        mask_iou(mask.float(), mask)
    with pytest.raises(ValueError, match="one shape"):
        boundary_iou(mask, mask[:3])
    with pytest.raises(ValueError, match="1 pixel or more"):
        mask_boundary(mask, 0)
    with pytest.raises(ValueError, match=r"\(\.\.\., H, W\)"):
        mask_boundary(mask[0])
