"""The losses of promptable training: what they reach, what they teach, and their rounds."""

import pytest
import torch
import torch.nn.functional as F

from vision.data.prompt_sampling import PromptSampler
from vision.metrics import mask_iou
from vision.sam import RwkvSam, create_sam
from vision.sam import training as module
from vision.sam.training import PromptableLoss


def scene(height: int = 48, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A bright and a dark square, and their masks."""
    x = torch.full((1, 3, height, width), 120.0)
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, 6:26, 8:30] = True
    masks[1, 24:44, 36:60] = True
    x[0, :, masks[0]] = 250.0
    x[0, :, masks[1]] = 10.0
    return x, masks


def model(**options: object) -> RwkvSam:
    torch.manual_seed(0)
    return create_sam("rwkv_sam_nano", dim=32, mlp_dim=64, **options).train()


@pytest.mark.parametrize("kind", ["box", "points", "corrected_points", "noisy_mask"])
def test_every_parameter_learns(kind: str) -> None:
    sam, (x, masks) = model(), scene()
    loss = PromptableLoss(PromptSampler({kind: 1.0}), corrections=1, num_points=200)
    found = loss(sam, sam.encode_image(x), [masks])
    assert set(found) == {"loss_ce", "loss_dice", "loss_iou"}
    sum(found.values()).backward()
    without = {n for n, p in sam.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # The mean over the labels that one kind does not use is no concern here.
    assert without <= {"prompt_encoder.no_mask_embed"}
    assert all(p.grad.isfinite().all() for p in sam.parameters() if p.grad is not None)


def test_it_learns_two_squares() -> None:
    sam, (x, masks) = model(), scene()
    loss = PromptableLoss(PromptSampler({"box": 1.0}), num_points=400)
    optimizer = torch.optim.AdamW(sam.parameters(), lr=3e-3)
    for _ in range(80):
        values = loss(sam, sam.encode_image(x), [masks])
        optimizer.zero_grad()
        sum(values.values()).backward()
        optimizer.step()
    sam.eval()
    with torch.no_grad():
        image = sam.encode_image(x)
        boxes = torch.tensor([[8.0, 6, 29, 25], [36.0, 24, 59, 43]])
        logits, iou = sam.predict_masks(image, boxes=boxes, multimask_output=False)
        pred = sam.upscale_masks(logits, (48, 64), (48, 64))[:, 0] > 0
    true = (pred & masks).sum((1, 2)) / (pred | masks).sum((1, 2))
    assert (true > 0.8).all(), true
    assert (iou[:, 0] - true).abs().max() < 0.45


def test_rounds_give_clicks_and_the_last_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    sam, (x, masks) = model(), scene()
    seen = []
    decode = PromptableLoss._decode

    def spy(sam, image, prompts):
        seen.append(prompts)
        return decode(sam, image, prompts)

    monkeypatch.setattr(module.PromptableLoss, "_decode", staticmethod(spy))
    PromptableLoss(PromptSampler({"box": 1.0}), corrections=2, num_points=50)(
        sam, sam.encode_image(x), [masks]
    )
    assert [p.labels.shape[1] for p in seen] == [2, 3, 4]
    assert [p.with_mask.all().item() for p in seen] == [False, True, True]
    for p in seen[1:]:
        assert p.masks.shape == (2, 1, 12, 16)
        for (px, py), label, mask in zip(p.coords[:, 2], p.labels[:, 2], masks, strict=True):
            assert label == int(mask[int(py), int(px)])


def test_padding_and_the_single_mask() -> None:
    x, masks = scene(40, 50)
    sam = model(single_mask=True)
    found = PromptableLoss(PromptSampler(), num_points=50)(sam, sam.encode_image(x), [masks])
    assert all(value.isfinite() for value in found.values())


def test_wrong_calls_are_named() -> None:
    sam, (x, masks) = model(), scene()
    with pytest.raises(ValueError, match=r"images of \(48, 64\) pixels"):
        PromptableLoss(PromptSampler())(sam, sam.encode_image(x), [masks[:, :40]])
    with pytest.raises(ValueError, match="masks of 1 images"):
        PromptableLoss(PromptSampler())(sam, sam.encode_image(x), [masks, masks])
    with pytest.raises(ValueError, match="without any object"):
        PromptableLoss(PromptSampler())(sam, sam.encode_image(x), [masks[:0]])
    with pytest.raises(ValueError, match="corrections >= 0"):
        PromptableLoss(PromptSampler(), corrections=-1)


def test_images_share_a_batch() -> None:
    # The mean over all objects, as if each image were decoded alone with the same prompts.
    sam, (x, masks) = model(), scene()
    both = torch.cat([x, x.flip(-1)])
    every = [masks, masks[:1].flip(-1)]
    loss = PromptableLoss(PromptSampler({"box": 1.0}), corrections=0, num_points=20_000)
    together = loss(sam, sam.encode_image(both), every)
    alone = [loss(sam, sam.encode_image(both[i : i + 1]), every[i : i + 1]) for i in range(2)]
    for name, value in together.items():
        expected = (2 * alone[0][name] + alone[1][name]) / 3
        torch.testing.assert_close(value, expected, rtol=0.05, atol=0)


def test_the_iou_is_that_at_the_size_of_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 4, 12, 16), torch.rand(3, 40, 50) > 0.5  # padded to 48 x 64
    expected = torch.rand(3, 4)
    whole = F.interpolate(logits, (48, 64), mode="bilinear", align_corners=False)[..., :40, :50] > 0
    true = mask_iou(whole, masks[:, None].expand(-1, 4, -1, -1)).float()
    wanted = (expected - true).square().flatten()
    torch.testing.assert_close(module._iou_loss(expected, logits, masks), wanted)
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 1)
    torch.testing.assert_close(module._iou_loss(expected, logits, masks), wanted)
