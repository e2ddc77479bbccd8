"""Mask losses against the original's values and plain formulas."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from vision.losses import (
    dice_loss,
    focal_loss,
    iou_regression_loss,
    point_sample,
    sample_uncertain_points,
    sigmoid_cross_entropy,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.golden
def test_golden_loss(shared: Path) -> None:
    case = torch.load(shared / "golden" / "rwkv_sam_decoder.pt", weights_only=True)["loss"]
    logits = point_sample(case["pred_logits"].double(), case["points"].double())
    targets = point_sample(case["gt"].double(), case["points"].double())
    torch.testing.assert_close(logits.float(), case["point_logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(targets.float(), case["point_targets"], rtol=0, atol=1e-5)
    entropy = sigmoid_cross_entropy(logits[:, 0], targets[:, 0])
    dice = dice_loss(logits[:, 0], targets[:, 0])
    assert float(entropy.mean()) == pytest.approx(case["bce"], abs=1e-5)
    assert float(dice.mean()) == pytest.approx(case["dice_naive_eps1"], abs=1e-5)


def test_points_at_pixel_centres_are_the_pixels() -> None:
    maps = draw(2, 3, 4, 5)
    y, x = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    centres = (
        torch.stack([(x.double() + 0.5) / 5, (y.double() + 0.5) / 4], -1)
        .flatten(0, 1)
        .expand(2, -1, 2)
    )
    torch.testing.assert_close(point_sample(maps, centres), maps.flatten(2))


def test_uncertain_points_lie_at_the_boundary() -> None:
    ramp = torch.linspace(-8, 8, 64).expand(2, 1, 64, 64).contiguous()  # zero in the middle column
    generator = torch.Generator().manual_seed(0)
    points = sample_uncertain_points(ramp, count=400, generator=generator)
    assert points.shape == (2, 400, 2)
    assert 0 <= points.min() <= points.max() <= 1
    near = (points[:, :300, 0] - 0.5).abs()
    # The nearest quarter of uniform candidates (300 of 1200) lies within an eighth of the middle.
    assert near.max() < 0.2
    assert (points[:, 300:, 0] - 0.5).abs().mean() == pytest.approx(0.25, abs=0.04)
    again = sample_uncertain_points(ramp, count=400, generator=generator.manual_seed(0))
    assert torch.equal(points, again)
    assert sample_uncertain_points(ramp, count=10, share=0.0).shape == (2, 10, 2)


def test_dice_and_focal_are_their_definitions() -> None:
    logits, targets = draw(3, 50), (draw(3, 50, seed=1) > 0).double()
    p = torch.sigmoid(logits)
    for i in range(3):
        both = sum(float(a * b) for a, b in zip(p[i], targets[i], strict=True))
        wanted = 1 - (2 * both + 1) / (float(p[i].sum()) + float(targets[i].sum()) + 1)
        assert float(dice_loss(logits, targets)[i]) == pytest.approx(wanted, abs=1e-12)
    for alpha in (0.25, -1):
        wanted = sigmoid_focal_loss(logits, targets, alpha, 2.0, "none").mean(1)
        torch.testing.assert_close(focal_loss(logits, targets, alpha), wanted)
    empty = torch.full((1, 20), -60.0)
    assert float(dice_loss(empty, torch.zeros(1, 20))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", [sigmoid_cross_entropy, dice_loss, focal_loss])
def test_gradients(loss) -> None:
    logits, targets = draw(2, 7).requires_grad_(), (draw(2, 7, seed=1) > 0).double()
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), (logits,))


def test_iou_regression_teaches_the_score_alone() -> None:
    logits = torch.full((2, 4, 4), -1.0)
    logits[0, :2] = 1.0
    logits.requires_grad_()
    targets = torch.zeros(2, 4, 4)
    targets[0, :, :2] = 1
    predicted = torch.tensor([0.5, 0.25], requires_grad=True)
    found = iou_regression_loss(predicted, logits, targets)
    # 4 of 12 pixels agree; two empty masks agree wholly.
    torch.testing.assert_close(found, torch.tensor([(0.5 - 1 / 3) ** 2, 0.75**2]))
    found.sum().backward()
    assert logits.grad is None
    torch.testing.assert_close(predicted.grad, torch.tensor([2 * (0.5 - 1 / 3), -1.5]))


def test_entropy_is_torchs_mean() -> None:
    logits, targets = draw(2, 9), draw(2, 9, seed=1).sigmoid()
    wanted = F.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(sigmoid_cross_entropy(logits, targets).mean(), wanted)


def test_wrong_calls_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\)"):
        sample_uncertain_points(draw(2, 3, 4, 4))
    with pytest.raises(ValueError, match="oversample >= 1"):
        sample_uncertain_points(draw(2, 1, 4, 4), oversample=0.5)
