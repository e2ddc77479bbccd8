"""Sampled prompts say what is true of their masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision.data.prompt_sampling import (
    PromptSampler,
    jittered_box,
    next_click,
    noisy_mask,
    random_points,
    tight_box,
)

KINDS = ["box", "jittered_box", "points", "corrected_points", "noisy_mask"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    masks = torch.rand(count, height, width, generator=seeded(seed)) < 0.2
    masks[:, height // 2, width // 2] = True
    return masks


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 6),
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(KINDS),
)
def test_every_label_is_true(count: int, height: int, width: int, seed: int, kind: str) -> None:
    masks = blobs(count, height, width, seed)
    found = PromptSampler({kind: 1.0}, max_points=4)(masks, (8, 12), seeded(seed))
    assert found.kinds == (kind,) * count
    assert found.coords.shape == (*found.labels.shape, 2)
    assert found.masks.shape == (count, 1, 8, 12)
    assert (found.labels[:, -1] == -1).all() == (kind not in ("box", "jittered_box"))
    for mask, coords, labels in zip(masks, found.coords, found.labels, strict=True):
        for (x, y), label in zip(coords.tolist(), labels.tolist(), strict=True):
            assert 0 <= x <= width - 1
            assert 0 <= y <= height - 1
            if label in (0, 1):
                assert mask[int(y), int(x)] == bool(label)
        if kind in ("box", "jittered_box"):
            assert labels[:2].tolist() == [2, 3]
            assert (coords[0] <= coords[1]).all()
        if kind in ("points", "corrected_points"):
            assert 1 <= (labels == 1).sum() <= 4
    assert found.with_mask.tolist() == [kind == "noisy_mask"] * count
    assert bool(found.masks.any()) == (kind == "noisy_mask")


def test_boxes() -> None:
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[5:11, 20:31] = True
    assert tight_box(mask).tolist() == [20, 5, 30, 10]
    boxes = torch.stack([jittered_box(mask, seeded(i)) for i in range(300)])
    off = boxes - tight_box(mask)
    assert off.std(0).tolist() == pytest.approx([1.1, 0.6, 1.1, 0.6], rel=0.2)
    large = torch.ones(4000, 4000, dtype=torch.bool)
    large[:1000] = large[-1000:] = False
    wide = torch.stack([jittered_box(large, seeded(i)) for i in range(20)])
    assert (wide[:, 1] - 1000).abs().max() == 20


def test_all_kinds_come_and_a_seed_repeats_them() -> None:
    masks = blobs(64, 20, 30)
    sampler = PromptSampler()
    a, b = sampler(masks, (16, 16), seeded(3)), sampler(masks, (16, 16), seeded(3))
    assert set(a.kinds) == set(KINDS)
    assert a.kinds == b.kinds
    for name in ("coords", "labels", "masks", "with_mask"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert not torch.equal(a.coords, sampler(masks, (16, 16), seeded(4)).coords[:, :21])
    only = PromptSampler({"box": 1.0, "points": 0.0})(masks, (4, 4), seeded())
    assert set(only.kinds) == {"box"}
    assert sampler(masks[:0], (4, 4)).labels.shape == (0, 0)


def test_a_noisy_mask_is_the_mask_away_from_its_boundary() -> None:
    mask = torch.zeros(128, 128, dtype=torch.bool)
    mask[32:96, 32:96] = True
    logits = noisy_mask(mask, (64, 64), seeded())[0]
    assert logits.shape == (64, 64)
    assert (logits[20:44, 20:44] > 0).all()
    assert (logits[:12] < 0).all()
    assert ((logits > 0) != mask[::2, ::2]).any()


def test_the_next_click_is_where_the_prediction_is_wrong() -> None:
    target = blobs(3, 16, 16)
    pred = target.clone()
    pred[1] = False
    pred[2] = True
    coords, labels = next_click(pred, target, seeded())
    assert labels.tolist() == [-1, 1, 0]
    for i in (1, 2):
        x, y = coords[i].long().tolist()
        assert pred[i, y, x] != target[i, y, x]
    prompts = PromptSampler({"points": 1.0}, max_points=1)(target, (4, 4), seeded())
    longer = prompts.add(coords, labels)
    assert longer.labels.tolist() == [[1, -1, -1], [1, -1, 1], [1, -1, 0]]
    assert torch.equal(longer.coords[:, -1], coords)


def test_wrong_calls_are_named() -> None:
    masks = blobs(2, 8, 8)
    with pytest.raises(ValueError, match="empty mask"):
        PromptSampler({"box": 1.0})(torch.zeros_like(masks), (4, 4))
    with pytest.raises(ValueError, match=r"bool masks \(N, H, W\)"):
        PromptSampler()(masks.float(), (4, 4))
    with pytest.raises(ValueError, match="kinds out of box"):
        PromptSampler({"scribble": 1.0})
    with pytest.raises(ValueError, match="not all 0"):
        PromptSampler({"box": 0.0})
    with pytest.raises(ValueError, match="max_points"):
        PromptSampler(max_points=0)
    assert random_points(torch.zeros(3, 3, dtype=torch.bool), 2).shape == (0, 2)
