"""Distillation: student, teacher and cache in mmengine, and what a student leaves for RWKV-SAM."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from PIL import Image
from torch.utils.data import default_collate

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.mm.distillation import EmbeddingDistiller, EmbeddingError, ImagesForDistillation
from vision.models.checkpoint import read_checkpoint
from vision.sam import create_sam
from vision.sam.checkpoint import load_weights
from vision.sam.embedding_cache import CacheError, CacheWriter, EmbeddingCache
from vision.sam.teachers import create_teacher, normalize_padded, unpadded_cells

SIDE = 64
TEACHER: dict[str, Any] = {"name": "efficientvit_b0", "image_size": SIDE}
NANO = {"sam": "rwkv_sam_nano"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with five images of several shapes in "images", and their embeddings in "cache"."""
    root = tmp_path_factory.mktemp("data")
    (root / "images" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["a.png", "b.png", "c.png", "sub/a.png", "sub/b.png"]
    for name, shape in zip(names, [(50, 70), (80, 30), (64, 64), (20, 60), (90, 50)], strict=True):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(shape[::-1]).save(root / "images" / name)
    teacher = create_teacher(**TEACHER)
    writer = CacheWriter(root / "cache", teacher.identity, teacher.shape, names, shard_size=2)
    samples = ImagesForDistillation(str(root), {"img_path": "images"}, SIDE)
    assert samples.names == names
    for shard in writer.todo:
        rows = [samples[i] for i in range(2 * shard, min(2 * shard + 2, 5))]
        writer.write(
            shard,
            [teacher(row["inputs"][None], row["sizes"][None])[0] for row in rows],
            [tuple(row["sizes"].tolist()) for row in rows],
        )
    return root


def _dataset(root: Path, **options: Any) -> ImagesForDistillation:
    return ImagesForDistillation(str(root), {"img_path": "images"}, SIDE, **options)


def _batch(root: Path, cached: bool, count: int = 5) -> dict[str, torch.Tensor]:
    samples = _dataset(root, cache=str(root / "cache") if cached else None)
    return default_collate([samples[i] for i in range(count)])


def _distiller(**options: Any) -> EmbeddingDistiller:
    torch.manual_seed(0)
    return EmbeddingDistiller(**{"student": NANO, **options})


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
def test_cached_and_online_losses_are_the_same(
    data: Path, padding: bool, standardize: bool
) -> None:
    options = {
        "padding": padding,
        "standardize": str(data / "cache") if standardize else None,
    }
    cached = _distiller(**options)(**_batch(data, True), mode="loss")
    online = _distiller(**options, teacher=TEACHER)(**_batch(data, False), mode="loss")
    assert list(cached) == ["loss_embedding"]
    assert torch.equal(cached["loss_embedding"], online["loss_embedding"])
    exact = _distiller(**options, teacher=TEACHER, round_teacher=False)
    loss = exact(**_batch(data, False), mode="loss")["loss_embedding"]
    assert not torch.equal(loss, online["loss_embedding"])
    torch.testing.assert_close(loss, online["loss_embedding"], rtol=1e-3, atol=1e-3)


def test_the_loss_is_the_mean_over_the_unpadded_part(data: Path) -> None:
    model = _distiller(standardize=str(data / "cache")).eval()
    batch = _batch(data, True)
    y = model(**batch).double()
    cache = EmbeddingCache(data / "cache")
    mean, std = (v.double().view(-1, 1, 1) for v in cache.statistics())
    target = (batch["embedding"].double() - mean) / std
    values = torch.cat(
        [
            (y - target)[i, :, : -(-height // 16), : -(-width // 16)].flatten()
            for i, (height, width) in enumerate(batch["sizes"].tolist())
        ]
    )
    loss = model(**batch, mode="loss")["loss_embedding"]
    torch.testing.assert_close(loss.double(), values.square().mean(), rtol=1e-5, atol=1e-6)
    whole = _distiller(standardize=str(data / "cache"), padding=True).eval()
    loss = whole(**batch, mode="loss")["loss_embedding"]
    torch.testing.assert_close(loss.double(), (y - target).square().mean(), rtol=1e-5, atol=1e-6)


def test_the_student_sees_what_the_trained_model_sees(data: Path) -> None:
    """Padding is zero after normalisation, so the model itself gives the same embedding."""
    model = _distiller().eval()
    sam = create_sam("rwkv_sam_nano", image_size=SIDE, pad_to_square=True)
    load_weights(sam, model.state_dict(), parts=("encoder", "neck"))
    batch = _batch(data, True)
    with torch.no_grad():
        found = model(**batch)
        for i, (height, width) in enumerate(batch["sizes"].tolist()):
            image = batch["inputs"][i : i + 1, :, :height, :width]
            wanted = sam.encode_image(image).embedding
            torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-4, atol=1e-4)


def test_levels_are_compared_too(data: Path) -> None:
    batch = _batch(data, False)
    model = _distiller(teacher=TEACHER, levels=[(0, 0), (1, 1)], level_weight=0.5)
    losses = model(**batch, mode="loss")
    assert list(losses) == ["loss_embedding", "loss_level0", "loss_level1"]
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    teacher = create_teacher(**TEACHER, levels=(1,))
    target = teacher.maps(batch["inputs"], batch["sizes"])[1]
    x = normalize_padded(batch["inputs"], batch["sizes"], model.mean, model.std)
    maps = model.encoder(x)
    error = (model.level_projs[1](maps[1]) - target).square().mean(1)
    wanted = 0.5 * error[unpadded_cells(batch["sizes"], SIDE, 8)].mean()
    torch.testing.assert_close(losses["loss_level1"], wanted)


def test_a_timm_encoder_with_a_projection(data: Path) -> None:
    model = _distiller(student={"encoder": "resnet10t", "dim": 64})
    assert model(**_batch(data, True)).shape == (5, 64, 4, 4)
    model(**_batch(data, True), mode="loss")["loss_embedding"].backward()
    assert model.neck.proj.weight.grad is not None


def test_the_teacher_is_frozen_and_not_in_the_checkpoint(data: Path) -> None:
    model = _distiller(teacher=TEACHER, standardize=str(data / "cache")).train()
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "neck"}
    (teacher,) = model._teacher
    assert not teacher.training
    assert not {id(p) for p in model.parameters()} & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize("sam", ["rwkv_sam_nano", "rwkv_sam_tiny"])
def test_parameters_of_the_student_all_learn(data: Path, sam: str) -> None:
    """An unused one would stop a run on several GPUs."""
    dim = {"dim": 64} if sam != "rwkv_sam_nano" else {}
    model = _distiller(student={"sam": sam, **dim})
    model(**_batch(data, True, 2), mode="loss")["loss_embedding"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"student": {}}, "either 'sam' or 'encoder'"),
        ({"student": {"sam": "rwkv_sam_nano", "encoder": "resnet10t"}}, "either 'sam' or"),
        ({"student": {"sam": "rwkv_sam_nona"}}, "no promptable model 'rwkv_sam_nona'"),
        ({"student": {"encoder": "resnet10"}}, "no model 'resnet10'; close names: resnet10t"),
        ({"levels": [(0, 0)]}, "levels want a teacher"),
        ({"teacher": TEACHER, "levels": [(0, 1)]}, r"pairs 0 .* with 1 of the teacher.*stride 8"),
        ({"teacher": TEACHER, "levels": [(9, 1)]}, "pairs 9"),
    ],
)
def test_impossible_settings(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _distiller(**options)


def test_student_and_teacher_that_do_not_fit(data: Path) -> None:
    batch = _batch(data, True)
    with pytest.raises(ValueError, match=r"student gives embeddings \(32, 4, 4\), the teacher \(6"):
        _distiller(student={**NANO, "dim": 32})(**batch, mode="loss")
    grid = {**batch, "embedding": batch["embedding"][..., :2, :2]}
    with pytest.raises(ValueError, match=r"\(64, 4, 4\), the teacher \(64, 2, 2\)"):
        _distiller()(**grid, mode="loss")
    with pytest.raises(ValueError, match="neither: set teacher or cache"):
        _distiller()(**_batch(data, False), mode="loss")
    with pytest.raises(ValueError, match="both: leave one out"):
        _distiller(teacher=TEACHER)(**batch, mode="loss")
    with pytest.raises(ValueError, match="'loss', 'predict' and 'tensor'"):
        _distiller()(**batch, mode="train")
    with pytest.raises(CacheError, match="but the teacher"):
        _distiller(teacher={**TEACHER, "seed": 1}, standardize=str(data / "cache"))
    narrow = {**batch, "embedding": batch["embedding"][:, :32]}
    with pytest.raises(ValueError, match="statistics of 64 channels, the teacher 32"):
        _distiller(standardize=str(data / "cache"))(**narrow, mode="loss")


def test_samples(data: Path) -> None:
    sample = _dataset(data, cache=str(data / "cache"))[3]
    assert sample["inputs"].dtype == torch.uint8
    assert sample["inputs"].shape == (3, SIDE, SIDE)
    assert sample["sizes"].tolist() == [21, 64]
    assert (sample["inputs"][:, 21:] == 0).all()
    assert torch.equal(sample["embedding"], EmbeddingCache(data / "cache")[3])
    plain = _dataset(data)[3]
    assert set(plain) == {"inputs", "sizes"}
    flipped = _dataset(data, flip=1.0)[2]["inputs"]
    assert torch.equal(flipped, _dataset(data)[2]["inputs"].flip(2))
    assert torch.equal(_dataset(data, flip=1.0, test_mode=True)[3]["inputs"], plain["inputs"])


def test_data_that_do_not_fit_the_cache(data: Path, tmp_path: Path) -> None:
    cache = str(data / "cache")
    with pytest.raises(ValueError, match="no embeddings of flipped images"):
        _dataset(data, cache=cache, flip=0.5)
    with pytest.raises(CacheError, match=r"'image_size': 32.*'image_size': 64"):
        ImagesForDistillation(str(data), {"img_path": "images"}, 32, cache=cache)
    with pytest.raises(CacheError, match=r"wanted .*'samvit_huge_patch16'"):
        _dataset(data, cache=cache, cached_by={"name": "samvit_huge_patch16"})
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 30)).save(tmp_path / "images" / "a.png")
    with pytest.raises(CacheError, match=r"a\.png has 64 x 64 .* \(46, 64\) when"):
        _dataset(tmp_path, cache=cache)[0]


def test_metric_against_its_definition(data: Path) -> None:
    model = _distiller().eval()
    batch = _batch(data, True)
    with torch.no_grad():
        outputs = model(**batch, mode="predict")
    metric = METRICS.build({"type": "EmbeddingError"})
    assert isinstance(metric, EmbeddingError)
    for output in outputs:
        metric.process(None, [output])
    found = metric.evaluate(5)
    pairs = [(o["embedding"][:, o["cells"]], o["target"][:, o["cells"]]) for o in outputs]
    y, target = (torch.cat(column, 1).double() for column in zip(*pairs, strict=True))
    error = (y - target).square().sum()
    spread = (target - target.mean(1, keepdim=True)).square().sum()
    assert found["distill/mse"] == pytest.approx(float(error) / target.numel())
    assert found["distill/explained"] == pytest.approx(100 * (1 - float(error / spread)), rel=1e-5)


def test_run_and_what_it_leaves_for_rwkv_sam(data: Path, tmp_path: Path) -> None:
    """A few steps lower the loss, and the checkpoint's encoder and neck go into the model."""
    dataset = {
        "type": "ImagesForDistillation",
        "data_root": str(data),
        "data_prefix": {"img_path": "images"},
        "image_size": SIDE,
        "cache": str(data / "cache"),
    }
    assert len(DATASETS.build(dataset)) == 5
    model = {"type": "EmbeddingDistiller", "student": NANO, "standardize": str(data / "cache")}
    assert isinstance(MODELS.build(model), EmbeddingDistiller)
    loader = {
        "batch_size": 5,
        "num_workers": 0,
        "collate_fn": {"type": "default_collate"},
        "dataset": dataset,
    }
    cfg = Config(
        {
            "model": model,
            "train_dataloader": {**loader, "sampler": {"type": "DefaultSampler", "shuffle": True}},
            "val_dataloader": {**loader, "sampler": {"type": "DefaultSampler", "shuffle": False}},
            "val_evaluator": {"type": "EmbeddingError"},
            "train_cfg": {"type": "EpochBasedTrainLoop", "max_epochs": 25, "val_interval": 25},
            "val_cfg": {"type": "ValLoop"},
            "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 5e-3}},
            "default_hooks": {
                "checkpoint": {"type": "AtomicCheckpointHook", "interval": 25},
                "logger": {"type": "LoggerHook", "interval": 1},
            },
            "randomness": {"seed": 0},
            "work_dir": str(tmp_path),
            "default_scope": "mmengine",
            "experiment_name": f"distillation_{tmp_path.name}",
        }
    )
    runner = Runner.from_cfg(cfg)
    runner.train()
    losses = runner.message_hub.get_scalar("train/loss").data[0]
    assert losses[-1] < losses[0] / 2
    explained = runner.message_hub.get_scalar("val/distill/explained").current()
    assert explained > 20
    sam = create_sam("rwkv_sam_nano")
    before = {k: v.clone() for k, v in sam.state_dict().items()}
    checkpoint = read_checkpoint(tmp_path / "epoch_25.pth")
    assert load_weights(sam, checkpoint, parts=("encoder", "neck")) == ("encoder", "neck")
    for key, value in sam.state_dict().items():
        part = key.split(".")[0]
        wanted = runner.model.state_dict() if part in ("encoder", "neck") else before
        assert torch.equal(value, wanted[key]), key
