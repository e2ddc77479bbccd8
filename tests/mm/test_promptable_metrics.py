"""Promptable segmentation in mmengine's evaluator: metric, its files, and the worst cases."""

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import HOOKS, METRICS
from mmengine.runner import Runner
from PIL import Image

import vision.mm
from vision.data import boxes_of_masks
from vision.metrics import boundary_iou, mask_iou
from vision.mm.pictures import PredictionSheetHook, WorstPromptsHook, draw_errors, draw_prediction
from vision.mm.promptable import DigitPrompts, PromptableSegmentor
from vision.mm.promptable_metrics import PromptedMaskIoU
from vision.models.checkpoint import CheckpointError, write_weights
from vision.sam import create_sam
from vision.sam.evaluation import PromptAnswers

Sample = tuple[dict[str, Any], dict[str, Any]]  # of the data set, of the model


def sample(
    true: np.ndarray, found: np.ndarray, expected: float = 0.5, image: np.ndarray | None = None
) -> Sample:
    """One image whose boxes and clicks were answered by the same masks."""
    true, found = (torch.from_numpy(np.asarray(m)) for m in (true, found))
    pixels = np.zeros((*true.shape[1:], 3), np.uint8) if image is None else image
    iou = torch.full((len(true),), expected)
    answers = PromptAnswers(
        "keep_ratio",
        {"box": found, "click": found},
        {"box": iou, "click": iou},
        {0.85: torch.ones(len(true), dtype=torch.int64)},
    )
    inputs = torch.from_numpy(pixels).permute(2, 0, 1)
    return {"inputs": inputs, "masks": true}, {"true": true, "answers": answers}


def judge(metric: PromptedMaskIoU, samples: list[Sample], **columns: list[str]) -> dict[str, float]:
    """Give the samples in batches of two, as a loader with pseudo_collate does."""
    for i in range(0, len(samples), 2):
        data, outputs = zip(*samples[i : i + 2], strict=True)
        batch = {key: [d[key] for d in data] for key in ("inputs", "masks")}
        batch |= {key: values[i : i + 2] for key, values in columns.items()}
        metric.process(batch, outputs)
    return metric.evaluate(len(samples))


def shifted(count: int = 5, objects: int = 1) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        true = np.zeros((objects, 50, 70), bool)
        for mask in true:
            y, x = rng.integers(2, 20, 2)
            mask[y : y + 20, x : x + 30] = True
        samples.append(sample(true, np.roll(true, (i, 2), (1, 2)), 0.3 + 0.1 * i))
    return samples


def test_real_masks_against_opencv(shared: Path) -> None:
    files = sorted(p for p in (shared / "data/mask_pairs").rglob("masks/*.png"))[::6][:30]
    assert len(files) == 30
    samples, areas, bands = [], [], []
    for i, path in enumerate(files):
        true = np.asarray(Image.open(path).convert("L")) > 128
        pred = np.roll(true, (i % 7 - 3, 2 * (i % 5)), (0, 1))
        samples.append(sample(true[None], pred[None], 0.1))
        d = max(1, round(0.02 * math.hypot(*true.shape)))
        edges = []
        for mask in (pred, true):
            padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
            inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=d)[1:-1, 1:-1]
            edges.append(mask & (inner == 0))
        areas.append((pred & true).sum() / (pred | true).sum())
        bands.append((edges[0] & edges[1]).sum() / (edges[0] | edges[1]).sum())
    found = judge(PromptedMaskIoU(), samples)
    assert found["sam/box_mIoU"] == pytest.approx(100 * np.mean(areas), abs=1e-5)
    assert found["sam/box_mBIoU"] == pytest.approx(100 * np.mean(bands), abs=1e-5)
    assert found["sam/click_mIoU"] == found["sam/box_mIoU"] < 95


def test_names_and_a_perfect_model() -> None:
    samples = [sample(d["masks"].numpy(), d["masks"].numpy()) for d, _ in shifted()]
    found = judge(PromptedMaskIoU(), samples)
    assert found == {
        **{f"sam/{kind}_{m}": pytest.approx(100) for kind in ("box", "click") for m in MEASURES},
        **{f"sam/{kind}_rank": 0 for kind in ("box", "click")},
        "sam/NoC85": 1,
    }


MEASURES = ("mIoU", "mBIoU")


def test_rank_is_spearmans() -> None:
    samples = shifted()  # further off, and more expected of it
    assert judge(PromptedMaskIoU(), samples)["sam/box_rank"] == pytest.approx(-100)


def test_nothing_is_left_of_an_evaluation_before() -> None:
    metric = PromptedMaskIoU(baselines=True)
    samples = shifted(objects=2)
    first = judge(metric, samples)
    judge(metric, [sample(d["masks"].numpy(), ~d["masks"].numpy()) for d, _ in samples[:2]])
    assert judge(metric, samples) == first
    assert judge(PromptedMaskIoU(baselines=True), samples) == first


def test_sets_count_alike_whatever_their_size(tmp_path: Path) -> None:
    samples = shifted(5)
    sets = ["COIFT", "DIS", "DIS", "DIS", "DIS"]
    names = [f"/data/{i}.png" for i in range(5)]
    metric = PromptedMaskIoU(out_dir=str(tmp_path / "out"))
    found = judge(metric, samples, dataset=sets, name=names)
    alone = [judge(PromptedMaskIoU(), part) for part in (samples[:1], samples[1:])]
    for kind in ("box_mIoU", "box_mBIoU", "click_mIoU", "NoC85"):
        values = [one[f"sam/{kind}"] for one in alone]
        assert [found[f"sam/{name}/{kind}"] for name in ("COIFT", "DIS")] == values
        assert found[f"sam/{kind}"] == pytest.approx(np.mean(values))
    content = json.loads((tmp_path / "out/prompted_masks.json").read_text())
    assert [image["name"] for image in content["images"]] == names
    assert [image["dataset"] for image in content["images"]] == sets
    for image, (data, output) in zip(content["images"], samples, strict=True):
        true, masks = data["masks"], output["answers"].masks["box"]
        assert image["kinds"]["box"]["IoU"] == mask_iou(masks, true).tolist()
        assert image["kinds"]["box"]["BIoU"] == boundary_iou(masks, true).tolist()
    table = (tmp_path / "out/prompted_masks.md").read_text().splitlines()
    assert "keep_ratio" in table[0]
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "data set (images)",
        "---",
        "COIFT (1)",
        "DIS (4)",
        "average of the sets",
    ]
    assert {line.count("|") for line in table[2:]} == {2 + len(alone[0])}
    assert table[4].split("|")[2].strip() == f"{found['sam/COIFT/box_mIoU']:.2f}"
    assert table[6].split("|")[2].strip() == f"{found['sam/box_mIoU']:.2f}"


def test_one_set_is_one_row(tmp_path: Path) -> None:
    metric = PromptedMaskIoU(out_dir=str(tmp_path))
    found = judge(metric, shifted(3), dataset=["DIS"] * 3)
    assert not any("DIS" in name for name in found)
    assert len((tmp_path / "prompted_masks.md").read_text().splitlines()) == 5
    judge(metric, shifted(2))
    assert "| all (2) |" in (tmp_path / "prompted_masks.md").read_text()


def test_baselines_are_judged_by_the_tight_box() -> None:
    y, x = np.ogrid[:60, :80]
    disc = (y - 30) ** 2 + (x - 40) ** 2 < 20**2
    image = np.random.default_rng(0).integers(0, 60, (60, 80, 3), dtype=np.uint8)
    image[disc] += 180
    whole = np.ones((60, 80), bool)
    masks = np.stack([disc, whole])
    found = judge(PromptedMaskIoU(baselines=True), [sample(masks, masks, image=image)])
    x0, y0, x1, y1 = boxes_of_masks(torch.from_numpy(masks))[0].tolist()
    share = disc.sum() / ((x1 - x0 + 1) * (y1 - y0 + 1))
    assert found["sam/filled_box_mIoU"] == pytest.approx(50 * (share + 1))
    assert found["sam/grabcut_mIoU"] > 98
    assert found["sam/filled_box_mBIoU"] < found["sam/grabcut_mBIoU"]
    assert found["sam/grabcut_fallbacks"] == 1
    assert "sam/grabcut_rank" not in found


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one evaluated image"):
        PromptedMaskIoU().compute_metrics([])


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Any]]:
    data = DigitPrompts("val", size=64, length=3)
    return {key: [data[i][key] for i in range(3)] for key in ("inputs", "masks")}


def nano(**options: Any) -> PromptableSegmentor:
    torch.manual_seed(0)
    return PromptableSegmentor("rwkv_sam_nano", image_size=64, **options).eval()


def test_the_model_answers_as_the_metric_wants(scenes: dict[str, list[Any]]) -> None:
    evaluator = Evaluator(METRICS.build({"type": "PromptedMaskIoU"}))
    found = []
    for evaluation, kinds in (
        (None, ["box", "click"]),
        ({"clicks": (1, 3), "resize": "squash"}, ["box", "click", "click3"]),
        ({"clicks": ()}, ["box"]),
    ):
        model = nano(evaluation=evaluation)
        outputs = model(**scenes, mode="predict")
        assert list(outputs[0]["answers"].masks) == kinds
        evaluator.process(outputs, scenes)
        found.append(evaluator.evaluate(3))
        wanted = {f"sam/{k}_{m}" for k in kinds for m in (*MEASURES, "rank")}
        assert set(found[-1]) - wanted == (
            {"sam/NoC85", "sam/NoC90"} if "click3" in kinds else set()
        )
        assert wanted <= set(found[-1])
        picture, caption = draw_prediction(scenes["inputs"][0], outputs[0], {})
        assert picture.shape == (64, 64 * (2 + len(kinds)), 3)
        assert caption.endswith(kinds[-1])
    # At the model's own size the resizes do not differ.
    for name in found[0]:
        assert found[0][name] == found[1][name]
    assert found[0]["sam/box_mIoU"] == found[2]["sam/box_mIoU"]


def test_it_learns_after_an_evaluation(scenes: dict[str, list[Any]]) -> None:
    model = nano()
    with torch.no_grad():
        model(**scenes, mode="predict")
    losses = model.train()(**scenes, mode="loss")
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_images_of_several_sizes() -> None:
    inputs = [torch.zeros(3, *size, dtype=torch.uint8) for size in ((20, 30), (5, 90))]
    masks = [torch.ones(n, *x.shape[1:], dtype=torch.bool) for n, x in enumerate(inputs, start=1)]
    outputs = nano()(inputs, masks, mode="predict")
    assert [o["answers"].masks["box"].shape for o in outputs] == [(1, 20, 30), (2, 5, 90)]


def test_errors_are_red_and_blue() -> None:
    true, found = np.zeros((2, 20, 30), bool)
    true[5:15, 5:15] = True
    found[5:15, 10:20] = True
    picture = draw_errors(np.zeros((20, 30, 3), np.uint8), *map(torch.from_numpy, (found, true)))
    assert picture.shape == (20, 120, 3)
    errors = picture[:, 90:].astype(int)
    assert np.array_equal(errors[..., 0] > 100, found & ~true)
    assert np.array_equal(errors[..., 2] > 100, true & ~found)
    for panel, mask in ((picture[:, 30:60], true), (picture[:, 60:90], found)):
        assert np.array_equal(panel.any(2), mask)
    box = picture[:, :30].any(2)
    assert box[5, 5:15].all()
    assert box[14, 5:15].all()
    assert box.sum() == 36


class _Loop:
    """What hooks see of a runner."""

    def __init__(self, folder: Path) -> None:
        self.work_dir = str(folder)
        self.val_dataloader = self.test_dataloader = None


def test_the_worst_are_shown_and_the_sheet_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        vision.mm.pictures,
        "contact_sheet",
        lambda tiles, captions, columns: seen.append(list(captions)) or Image.new("RGB", (9, 9)),
    )
    hook = HOOKS.build({"type": "WorstPromptsHook", "objects": 3})
    assert isinstance(hook, WorstPromptsHook)
    runner = _Loop(tmp_path)
    samples = shifted(5, objects=2)
    for phase in ("val", "test"):
        getattr(hook, f"before_{phase}_epoch")(runner)
        for i, (data, output) in enumerate(samples):
            batch = {"inputs": [data["inputs"]], "name": [f"/data/{i}.png"]}
            getattr(hook, f"after_{phase}_iter")(runner, i, batch, [output])
        getattr(hook, f"after_{phase}_epoch")(runner)
        assert (tmp_path / f"worst_{phase}.png").exists()
    iou = [
        (float(mask_iou(o["answers"].masks["box"][k], o["true"][k])), f"{i}.png, object {k}")
        for i, (_, o) in enumerate(samples)
        for k in range(2)
    ]
    wanted = [f"{100 * v:.1f} {name}" for v, name in sorted(iou, key=lambda e: e[0])[:3]]
    assert seen == [wanted, wanted]


def test_the_sheet_of_a_run(tmp_path: Path) -> None:
    loader = {
        "batch_size": 2,
        "num_workers": 0,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "collate_fn": {"type": "pseudo_collate"},
        "dataset": DigitPrompts("val", size=64, length=3),
    }
    runner = Runner(
        model=nano(evaluation={"clicks": (1, 2)}),
        work_dir=str(tmp_path),
        test_dataloader=loader,
        test_cfg={"type": "TestLoop"},
        test_evaluator={"type": "PromptedMaskIoU", "out_dir": str(tmp_path), "baselines": True},
        custom_hooks=[WorstPromptsHook(objects=4), PredictionSheetHook(images=3)],
        log_level="ERROR",
    )
    found = runner.test()
    assert {"sam/click2_mIoU", "sam/NoC90", "sam/grabcut_mBIoU"} <= set(found)
    assert Image.open(tmp_path / "worst_test.png").size == (2 * (4 * 64 + 2) + 2, 2 * (64 + 16) + 2)
    assert (tmp_path / "predictions_test.png").exists()
    assert len(json.loads((tmp_path / "prompted_masks.json").read_text())["images"]) == 3
    assert runner.test() == found


def test_wrong_hooks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="objects wants 1 or more"):
        WorstPromptsHook(objects=0)
    (data, output) = shifted(1)[0]
    del output["answers"].masks["box"]
    with pytest.raises(ValueError, match="box=True"):
        WorstPromptsHook().after_val_iter(
            _Loop(tmp_path), 0, {"inputs": [data["inputs"]]}, [output]
        )


def test_stage_two_starts_from_the_parts_that_stage_one_gave(tmp_path: Path) -> None:
    torch.manual_seed(1)
    student = create_sam("rwkv_sam_nano")
    parts = ("encoder.", "neck.")
    state = {k: v for k, v in student.state_dict().items() if k.startswith(parts)}
    write_weights(state, tmp_path / "stage1.pth")
    path = str(tmp_path / "stage1.pth")
    with pytest.raises(CheckpointError, match="prompt_encoder"):
        nano(checkpoint=path)
    model = nano(checkpoint=path, parts=("encoder", "neck"), frozen=("encoder",))
    for key, value in state.items():
        assert torch.equal(model.sam.state_dict()[key], value), key
    x, masks = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.ones(1, 64, 64, dtype=torch.bool)
    sum(model.train()([x], [masks], mode="loss").values()).backward()
    assert all(p.grad is None for p in model.sam.encoder.parameters())
    assert any(p.grad is not None for p in model.sam.neck.parameters())
    trained = {f"sam.{key}": value for key, value in model.sam.state_dict().items()}
    write_weights(trained, tmp_path / "epoch_1.pth")  # as tools/train.py names them
    again = create_sam("rwkv_sam_nano", tmp_path / "epoch_1.pth", image_size=64)
    for key, value in model.sam.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    with pytest.raises(ValueError, match="frozen parts are among encoder, neck"):
        nano(frozen=("backbone",))
