"""The adapters around timm models: backbone, classifier, loss, metric."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS

import vision.mm
from vision.mm.backbone import ZooBackbone
from vision.mm.classifier import ClassificationPreprocessor, FlipTTA, ImageClassifier
from vision.mm.losses import PixelCrossEntropy
from vision.mm.metrics import TopKAccuracy
from vision.models.checkpoint import CheckpointError, write_weights

NANO = "vrwkv_nano_patch8_224"


def test_backbone_gives_the_models_own_features() -> None:
    torch.manual_seed(0)
    backbone = ZooBackbone(NANO, out_indices=(1, 3), img_size=64).eval()
    x = torch.randn(2, 3, 64, 40)
    maps = backbone(x)
    assert backbone.channels == [64, 64]
    assert backbone.strides == [8, 8]
    want = backbone.body.model.forward_intermediates(x, [1, 3], intermediates_only=True)
    for got, target in zip(maps, want, strict=True):
        torch.testing.assert_close(got, target)
        assert got.shape == (2, 64, 8, 5)


def test_backbone_serves_hierarchical_and_foreign_models() -> None:
    maps = ZooBackbone("resnet10t", out_indices=(1, 2))(torch.randn(1, 3, 64, 64))
    assert [m.shape[2] for m in maps] == [16, 8]
    vit = ZooBackbone(
        "vit_tiny_patch16_224", out_indices=(0, 1), norm=True, depth=2, dynamic_img_size=True
    )
    assert vit(torch.randn(1, 3, 32, 64))[1].shape == (1, 192, 2, 4)


def test_backbone_puts_the_channels_first() -> None:
    small = {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (1, 1)}
    swin = ZooBackbone(
        "swin_tiny_patch4_window7_224", out_indices=(0, 1), num_heads=(1, 2), **small
    ).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = swin(x)
    assert [m.shape for m in maps] == [(2, 16, 16, 16), (2, 32, 8, 8)]
    assert [m.shape[1] for m in maps] == swin.channels
    for found, last in zip(maps, swin.body(x), strict=True):  # timm's have them last
        assert torch.equal(found, last.permute(0, 3, 1, 2))


def test_backbone_can_be_frozen() -> None:
    backbone = ZooBackbone(NANO, out_indices=(3,), frozen=True).train()
    assert not backbone.body.training
    assert not any(p.requires_grad for p in backbone.parameters())


def test_backbone_takes_a_weights_file(tmp_path) -> None:
    model = timm.create_model(NANO)
    write_weights(model.state_dict(), tmp_path / "w.safetensors")
    path = str(tmp_path / "w.safetensors")
    backbone = ZooBackbone(NANO, out_indices=(3,), checkpoint=path)
    assert torch.equal(backbone.body.model.pos_embed, model.pos_embed)
    classifier = ImageClassifier(NANO, num_classes=1000, checkpoint=path)
    assert torch.equal(classifier.backbone.head.weight, model.head.weight)
    with pytest.raises(CheckpointError, match=r"not in the checkpoint"):
        ZooBackbone(NANO, out_indices=(3,), checkpoint=path, key_norm=True)


def test_misspelt_model_name_lists_close_ones() -> None:
    for build in (
        lambda: ZooBackbone("vrwkv_tinny_patch16_224", out_indices=(0,)),
        lambda: ImageClassifier("vrwkv_tinny_patch16_224", num_classes=2),
    ):
        with pytest.raises(ValueError, match="close names: vrwkv_tiny_patch16_224"):
            build()


def test_layer_ids_rise_through_the_network() -> None:
    for module, prefix in (
        (ZooBackbone(NANO, out_indices=(3,)), "body.model."),
        (ImageClassifier(NANO, num_classes=5), "backbone."),
    ):
        ids = module.layer_ids()
        assert set(ids) == {name for name, _ in module.named_parameters()}
        assert ids[prefix + "pos_embed"] == 0
        blocks = [ids[f"{prefix}blocks.{i}.mixer.key.weight"] for i in range(4)]
        assert blocks == [1, 2, 3, 4]
        assert module.no_weight_decay() == {prefix + "pos_embed"}
    with pytest.raises(ValueError, match="group_matcher"):
        vision.mm.backbone.parameter_depths(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))


def classifier(**kwargs: object) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(NANO, num_classes=4, img_size=32, **kwargs)


def batch(count: int = 6) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "inputs": torch.randint(0, 256, (count, 3, 32, 32), generator=generator).byte(),
        "labels": torch.arange(count) % 4,
    }


def test_preprocessor_normalises_by_the_models_own_statistics() -> None:
    model = classifier()
    data = model.data_preprocessor(batch())
    mean, std = (torch.tensor(model.backbone.pretrained_cfg[k]) for k in ("mean", "std"))
    want = (batch()["inputs"].float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(data["inputs"], want)


def test_mixing_and_erasing_happen_in_training_only() -> None:
    model = classifier(
        label_smoothing=0.1,
        mixup={"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0},
        erase={"probability": 1.0, "mode": "pixel"},
    )
    plain = model.data_preprocessor(batch(), training=False)
    mixed = model.data_preprocessor(batch(), training=True)
    assert plain["labels"].shape == (6,)
    assert mixed["labels"].shape == (6, 4)
    torch.testing.assert_close(mixed["labels"].sum(1), torch.ones(6))
    assert not torch.equal(plain["inputs"], mixed["inputs"])
    with pytest.raises(ValueError, match="drop_last=True"):
        model.data_preprocessor(batch(5), training=True)


def test_classifier_modes() -> None:
    model = classifier(label_smoothing=0.1).eval()
    data = model.data_preprocessor(batch())
    logits = model(**data)
    loss = model(**data, mode="loss")["loss"]
    want = F.cross_entropy(logits, data["labels"], label_smoothing=0.1)
    torch.testing.assert_close(loss, want)
    found = model(**data, mode="predict")
    torch.testing.assert_close(torch.stack([f["scores"] for f in found]), logits.softmax(1))
    assert [f["label"] for f in found] == data["labels"].tolist()
    assert set(model(data["inputs"], mode="predict")[0]) == {"scores"}
    soft = torch.full((6, 4), 0.25)
    torch.testing.assert_close(
        model(data["inputs"], soft, mode="loss")["loss"], F.cross_entropy(logits, soft)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "train"}, "'loss', 'predict' and 'tensor'"),
        ({"mode": "loss"}, "needs labels"),
        ({"mode": "loss", "labels": torch.tensor([0, 4])}, r"\[0, 4\] .* num_classes=4"),
        ({"mode": "predict", "labels": torch.tensor([-1, 1])}, r"\[-1, 1\]"),
    ],
)
def test_classifier_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier()(torch.zeros(2, 3, 32, 32), **arguments)


def test_flip_tta_is_the_mean_of_both_sides() -> None:
    tta = MODELS.build(
        {
            "type": "FlipTTA",
            "module": {
                "type": "ImageClassifier",
                "model_name": NANO,
                "num_classes": 4,
                "img_size": 32,
            },
        }
    ).eval()
    assert isinstance(tta, FlipTTA)
    tta.module.load_state_dict(classifier().state_dict())
    data = batch()
    mirrored = {**data, "inputs": data["inputs"].flip(-1)}
    model = classifier().eval()
    sides = [model.test_step(d) for d in (data, mirrored)]
    for got, a, b in zip(tta.test_step(data), *sides, strict=True):
        torch.testing.assert_close(got["scores"], (a["scores"] + b["scores"]) / 2)


def test_erasing_runs_on_the_batch_it_is_given() -> None:
    erase = {"probability": 1.0, "mode": "const"}
    prepare = ClassificationPreprocessor((0.5,) * 3, (0.5,) * 3, erase=erase)
    white = {"inputs": torch.full((4, 3, 32, 32), 255).byte(), "labels": torch.zeros(4).long()}
    assert (prepare(white, training=True)["inputs"] == 0).flatten(1).any(1).all()


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pixel_loss_is_the_mean_over_known_pixels(weights: list | None, smoothing: float) -> None:
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float32, requires_grad=True)
    label = torch.randint(0, 3, (2, 4, 5))
    label[0, :2] = 255
    loss = PixelCrossEntropy(weights, smoothing, loss_weight=0.4)(logits, label)
    weight = None if weights is None else torch.tensor(weights)
    want = F.cross_entropy(
        logits, label, weight=weight, ignore_index=255, label_smoothing=smoothing
    )
    torch.testing.assert_close(loss, 0.4 * want)
    loss.backward()
    assert logits.grad[0, :, :2].abs().max() == 0


def test_pixel_loss_of_nothing_is_zero() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = PixelCrossEntropy()(logits, torch.full((1, 2, 2), 255))
    loss.backward()
    assert float(loss) == 0
    assert logits.grad.isfinite().all()


def test_pixel_loss_takes_pixel_weights() -> None:
    logits, label = torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2).long()
    weight = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    got = PixelCrossEntropy()(logits, label, weight=weight)
    torch.testing.assert_close(got, F.cross_entropy(logits[..., 0, 0], label[..., 0, 0]))


def test_topk_counts_every_image_once() -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(50, 7)))
    labels = rng.integers(0, 7, 50)
    metric = TopKAccuracy(topk=(1, 3))
    for first in (0, 20, 40):
        samples = [
            {"scores": s, "label": int(t)}
            for s, t in zip(scores[first : first + 20], labels[first : first + 20], strict=True)
        ]
        metric.process(None, samples)
    found = metric.evaluate(50)
    order = scores.numpy().argsort(1)[:, ::-1]
    for k in (1, 3):
        want = 100 * np.mean([labels[i] in order[i, :k] for i in range(50)])
        assert found[f"accuracy/top{k}"] == pytest.approx(want)
