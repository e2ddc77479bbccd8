"""Curves and summary of a run."""

import json
import math

import pytest
from PIL import Image

from vision.mm.hooks import (
    CURVES,
    HISTORY,
    SUMMARY,
    TrainingCurveHook,
    best_metrics,
    draw_curves,
    read_history,
)


def test_a_run_leaves_history_summary_and_picture(toy, tmp_path):
    hook = TrainingCurveHook(interval=2)
    runner = toy.make_runner(tmp_path, 2, hooks=(hook,))
    runner.train()
    records = read_history(tmp_path / HISTORY)
    train = [r for r in records if r["kind"] == "train"]
    assert [r["iter"] for r in train] == [2, 4, 6, 8, 10]
    losses = runner.message_hub.get_scalar("train/loss").data[0]
    assert [r["loss"] for r in train] == pytest.approx(losses.reshape(5, 2).mean(1).tolist())
    assert train[-1]["lr"] == pytest.approx(runner.message_hub.get_scalar("train/lr").data[0][-1])
    val = [r for r in records if r["kind"] == "val"]
    assert [(r["iter"], r["epoch"], r["calls"]) for r in val] == [(5, 1, 1.0), (10, 2, 2.0)]

    summary = json.loads((tmp_path / SUMMARY).read_text())
    assert summary["finished"] is True
    assert (summary["epochs"], summary["iterations"]) == (2, 10)
    assert summary["best"]["calls"] == {"value": 2.0, "epoch": 2, "iter": 10}
    assert summary["last"] == val[-1]
    assert summary["parameters"] == sum(p.numel() for p in runner.model.parameters())
    assert summary["seed"] == 0
    assert summary["images_per_second"] == pytest.approx(8 / summary["time_per_iteration_s"])
    assert summary["wall_time_s"] >= val[-1]["wall_s"] > 0
    picture = Image.open(tmp_path / CURVES)
    assert picture.size == (1200, 400)
    assert len(set(picture.convert("RGB").get_flattened_data())) > 10


def test_a_resumed_run_continues_its_history(toy, tmp_path):
    runner = toy.make_runner(tmp_path, 3, hooks=(TrainingCurveHook(2), toy.StopAt(13)))
    with pytest.raises(toy.Stopped):
        runner.train()
    path = tmp_path / HISTORY
    before = read_history(path)
    assert before[-1]["iter"] == 12
    with path.open("a") as file:
        file.write('{"kind": "train", "it')  # a kill in the middle of a line
    assert json.loads((tmp_path / SUMMARY).read_text())["finished"] is False
    toy.make_runner(tmp_path, 3, hooks=(TrainingCurveHook(2),), resume=True).train()
    records = read_history(path)
    steps = [r["iter"] for r in records if r["kind"] == "train"]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 15]  # iteration 11 and 12 were done anew
    assert [r["iter"] for r in records if r["kind"] == "val"] == [5, 10, 15]
    assert records[: len(before) - 1] == before[:-1]
    times = [r["wall_s"] for r in records]
    assert times == sorted(times)
    # a run that starts afresh in the folder has a history of its own
    toy.make_runner(tmp_path, 1, hooks=(TrainingCurveHook(5),)).train()
    assert [r["iter"] for r in read_history(path)] == [5, 5]


def test_iterations_too(toy, tmp_path):
    toy.make_runner(tmp_path, 4, by_epoch=False, hooks=(TrainingCurveHook(2),)).train()
    summary = json.loads((tmp_path / SUMMARY).read_text())
    assert summary["iterations"] == 4
    assert summary["last"]["iter"] == 4


def test_best_is_by_the_metrics_sense_and_passes_over_nothing():
    records = [
        {"kind": "val", "iter": i, "epoch": i, "wall_s": 0, "acc": a, "val_loss": b}
        for i, (a, b) in enumerate([(0.5, 3.0), (0.9, 2.0), (None, 2.5)])
    ]
    assert best_metrics(records) == {
        "acc": {"value": 0.9, "epoch": 1, "iter": 1},
        "val_loss": {"value": 2.0, "epoch": 1, "iter": 1},
    }


def test_not_a_number_becomes_null(toy, tmp_path):
    class Nan(toy.ToyMetric):
        def compute_metrics(self, results):
            return {"acc": math.nan, "note": "text"}

    runner = toy.make_runner(tmp_path, 1, hooks=(TrainingCurveHook(5),))
    runner._val_evaluator = [Nan()]
    runner.train()
    assert json.loads((tmp_path / SUMMARY).read_text())["last"]["acc"] is None
    assert "NaN" not in (tmp_path / HISTORY).read_text()


def test_pictures_of_nothing_are_drawn():
    assert draw_curves([])[:4] == b"\x89PNG"


def test_an_interval_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="interval >= 1, got 0"):
        TrainingCurveHook(0)
