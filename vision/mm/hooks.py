"""What a run leaves to look at: curves and a summary."""

import contextlib
import io
import json
import math
import platform
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.dist import get_world_size, master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from vision.files import write_whole
from vision.version import git_commit

HISTORY = "history.jsonl"
CURVES = "curves.png"
SUMMARY = "summary.json"


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Records of a run, oldest first; a last line that a kill cut off is left out."""
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines[:-1]]
    if lines:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(lines[-1]))
    return records


def _finite(x: Any) -> Any:
    """Numbers that JSON has: NaN and infinity become None."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _number(x: Any) -> float | None:
    """A metric or loss as a float; None for what is no single number."""
    if isinstance(x, torch.Tensor):
        return float(x.detach()) if x.numel() == 1 else None
    return float(x) if isinstance(x, int | float) or hasattr(x, "__float__") else None


@HOOKS.register_module()
class TrainingCurveHook(Hook):
    """Write curves.png, summary.json and history.jsonl into the work folder.

    The picture and the summary are renewed after every validation and at the end. A resumed run
    continues the history from the iteration that it resumes at.

    Args:
        interval: iterations of which one record keeps the mean.
    """

    priority = "BELOW_NORMAL"  # before the schedules step: the rate on record is the one used

    def __init__(self, interval: int = 10) -> None:
        if interval < 1:
            raise ValueError(f"TrainingCurveHook needs interval >= 1, got {interval}")
        self.interval = interval
        self.records: list[dict[str, Any]] = []
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._earlier_s = 0.0  # wall time of the sessions before
        self._start = self._last = 0.0

    @master_only
    def before_train(self, runner: Any) -> None:
        """Take up the history, up to the iteration that training resumes at."""
        self._start = time.perf_counter()
        path = Path(runner.work_dir) / HISTORY
        self.records = [r for r in read_history(path) if r["iter"] <= runner.iter]
        self._earlier_s = self.records[-1]["wall_s"] if self.records else 0.0
        write_whole(path, "".join(json.dumps(r) + "\n" for r in self.records))

    def before_train_epoch(self, runner: Any) -> None:
        """Start the clock of an iteration."""
        self._last = time.perf_counter()

    def after_val(self, runner: Any) -> None:
        """Start the clock anew: validation is not training time."""
        self._last = time.perf_counter()

    @master_only
    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Collect losses, and record them every `interval` iterations."""
        now = time.perf_counter()
        self._sums["time_s"].append(now - self._last)
        self._last = now
        for name, value in (outputs or {}).items():
            number = _number(value)
            if number is not None:
                self._sums[name].append(number)
        step = runner.iter + 1
        if step % self.interval == 0 or self.is_last_train_iter(runner):
            means = {name: sum(values) / len(values) for name, values in self._sums.items()}
            self._sums.clear()
            self._add(runner, "train", step, {"lr": self._lr(runner), **means})

    @staticmethod
    def _lr(runner: Any) -> float:
        rates = runner.optim_wrapper.get_lr()
        # mmengine keeps the rate before layer-wise scaling under base_lr
        return float((rates.get("base_lr") or next(iter(rates.values())))[0])

    @master_only
    def after_val_epoch(self, runner: Any, metrics: dict[str, Any] | None = None) -> None:
        """Record the metrics and renew picture and summary."""
        if not self._start:  # a validation of its own
            return
        numbers = {name: _number(value) for name, value in (metrics or {}).items()}
        self._add(runner, "val", runner.iter, {k: v for k, v in numbers.items() if v is not None})
        self._write(runner, finished=False)

    @master_only
    def after_train(self, runner: Any) -> None:
        """Write the final picture and summary."""
        self._write(runner, finished=True)

    def _add(self, runner: Any, kind: str, step: int, values: dict[str, float]) -> None:
        record = {
            "kind": kind,
            "iter": step,
            "epoch": runner.epoch,
            "wall_s": round(self._wall_s(), 3),
            **values,
        }
        record = _finite(record)
        self.records.append(record)
        with (Path(runner.work_dir) / HISTORY).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _wall_s(self) -> float:
        return self._earlier_s + time.perf_counter() - self._start

    def _write(self, runner: Any, finished: bool) -> None:
        folder = Path(runner.work_dir)
        summary = self.summary(runner, finished)
        write_whole(folder / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
        write_whole(folder / CURVES, draw_curves(self.records))

    def summary(self, runner: Any, finished: bool) -> dict[str, Any]:
        """What the run did, as plain JSON."""
        train = [r for r in self.records if r["kind"] == "train"]
        val = [r for r in self.records if r["kind"] == "val"]
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
        # the first record holds the warm-up, when there are others
        times = sorted(r["time_s"] for r in (train[1:] or train))
        per_iter = times[len(times) // 2] if times else None
        loader = runner.train_dataloader
        images = getattr(loader.batch_sampler, "batch_size", None)
        images = images and images * get_world_size()
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        on_gpu = device.type == "cuda"
        config = getattr(runner.cfg, "filename", None)
        return _finite(
            {
                "config": config and Path(config).name,
                "finished": finished,
                "epochs": runner.epoch,
                "iterations": runner.iter,
                "best": best_metrics(val),
                "last": val[-1] if val else None,
                "last_train": train[-1] if train else None,
                "wall_time_s": round(self._wall_s(), 3),
                "time_per_iteration_s": per_iter,
                "images_per_iteration": images,
                "images_per_second": images / per_iter if images and per_iter else None,
                "parameters": sum(n for n, _ in sizes),
                "trainable_parameters": sum(n for n, trained in sizes if trained),
                "seed": runner.seed,
                "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor(),
                "device_type": device.type,
                "processes": get_world_size(),
                "torch": torch.__version__,
                "mmengine": mmengine.__version__,
                "python": platform.python_version(),
                "git_commit": git_commit(),
            }
        )


_NO_METRIC = ("kind", "iter", "epoch", "wall_s", "time", "data_time")
_LESS_IS_BETTER = ("loss", "err", "mae", "mse")


def best_metrics(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The best value of each metric, and when it was reached."""
    best: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, value in record.items():
            if name in _NO_METRIC or value is None:
                continue
            less = any(part in name.lower() for part in _LESS_IS_BETTER)
            old = best.get(name)
            if old is None or (value < old["value"] if less else value > old["value"]):
                best[name] = {"value": value, "epoch": record["epoch"], "iter": record["iter"]}
    return best


def draw_curves(records: list[dict[str, Any]]) -> bytes:
    """A PNG of losses and learning rate, and of validation metrics, over iterations."""
    # the object interface: pyplot would keep figures and choose a backend for the process
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    train = [r for r in records if r["kind"] == "train"]
    val = [r for r in records if r["kind"] == "val"]
    for name in sorted({key for r in train for key in r if "loss" in key}):
        points = [(r["iter"], r[name]) for r in train if r.get(name) is not None]
        left.plot(*zip(*points, strict=True), label=name, linewidth=1) if points else None
    left.set(xlabel="iteration", ylabel="loss")
    rates = left.twinx()
    rates.plot([r["iter"] for r in train], [r["lr"] for r in train], "k:", linewidth=1, label="lr")
    rates.set_ylabel("learning rate (dotted)")
    for name in sorted({key for r in val for key in r if key not in _NO_METRIC}):
        points = [(r["iter"], r[name]) for r in val if r.get(name) is not None]
        right.plot(*zip(*points, strict=True), "o-", markersize=3, label=name) if points else None
    right.set(xlabel="iteration", title="validation")
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
