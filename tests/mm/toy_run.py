"""A training run of seconds, for the tests of vision.mm: a module, and a program to be killed."""

import argparse
import itertools
import os
import random
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import vision.mm.checkpoint
import vision.mm.hooks
import vision.mm.resume  # noqa: F401 -- registers
from vision.mm.compat import init_dist

_names = itertools.count()


class ToyDataset(torch.utils.data.Dataset):
    """Points of three classes, with noise from all three random generators."""

    metainfo = {"classes": ("a", "b", "c"), "palette": np.arange(9).reshape(3, 3)}  # an array

    def __init__(self, size: int = 40, noise: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(size, 8, generator=generator)
        self.y = torch.arange(size) % 3
        self.noise = noise
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        noise = np.random.rand() + 2 * random.random() + torch.rand(8) + self.epoch
        return {"x": self.x[i] + self.noise * noise, "y": self.y[i], "i": i}


class ToyModel(BaseModel):
    """Dropout, batch statistics and enough numbers for a file of some size."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 3)
        )
        self.seen: list[list[int]] = []  # indices of each batch

    def forward(self, x: Any, y: Any, i: Any, mode: str = "tensor") -> Any:
        logits = self.layers(x)
        if mode == "loss":
            self.seen.append(i.tolist())
            return {"loss": nn.functional.cross_entropy(logits, y)}
        return [(int(p), int(t)) for p, t in zip(logits.argmax(1), y, strict=True)]


class ToyMetric(BaseMetric):
    """A metric that grows with each validation, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [float(p == t) for p, t in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, Any]:
        self.calls += 1
        np.random.rand()  # a validation that draws random numbers
        return {"calls": float(self.calls), "acc": np.float64(np.mean(results))}


class SignalAt(Hook):
    """Send this process, or its group, a signal at the beginning of an iteration."""

    def __init__(self, iteration: int, number: int, group: bool, rank: int) -> None:
        self.iteration, self.number, self.group, self.rank = iteration, number, group, rank

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter != self.iteration or runner.rank != self.rank:
            return
        if self.group:  # as a scheduler does: from another process
            subprocess.run(["sh", "-c", f"kill -{self.number} -{os.getpgid(0)}"])
        else:
            os.kill(os.getpid(), self.number)


class Stopped(Exception):
    """A run that was ended from within."""


class StopAt(Hook):
    """End the run by an exception at the beginning of an iteration."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.iteration:
            raise Stopped


class DieInWrite(Hook):
    """Let the kernel kill the process in the middle of the n-th checkpoint (of a kind)."""

    priority = "LOWEST"

    def __init__(self, count: int, best: bool) -> None:
        self.count, self.best = count, best

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        self.count -= ("optimizer" not in checkpoint) == self.best
        if self.count == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))


def make_runner(
    work_dir: str | Path,
    length: int,
    by_epoch: bool = True,
    workers: int = 0,
    resume: bool = False,
    load_from: str | None = None,
    seed: int | None = 0,
    launcher: str = "none",
    hooks: tuple[Any, ...] = (),
    ema: bool = True,
    save_best: str | None = None,
    max_keep: int = -1,
    width: int = 512,
    interval: int | None = None,
    loop: str = "ExactIterBasedTrainLoop",
    exact: bool = True,
    sampler: str | None = None,
    checkpoint_hook: str = "AtomicCheckpointHook",
    stop: bool = True,
) -> Runner:
    """A runner of `length` epochs of 5 iterations, or of `length` iterations."""
    every = interval or (1 if by_epoch else 4)
    train_cfg: dict[str, Any] = (
        {"type": "EpochBasedTrainLoop", "max_epochs": length, "val_interval": 1}
        if by_epoch
        else {"type": loop, "max_iters": length, "val_interval": 2}
    )
    custom: list[Any] = list(hooks)
    if exact:
        custom.append({"type": "ExactResumeHook"})
    if stop:
        custom.append({"type": "InterruptHook"})
    if ema:
        custom.append({"type": "EMAHook", "momentum": 0.1, "update_buffers": True})
    loader = {
        "batch_size": 8,
        "num_workers": workers,
        "collate_fn": {"type": "default_collate"},
        "persistent_workers": False,
    }
    torch.manual_seed(0)  # the model is built before the Runner seeds
    return Runner(
        model=ToyModel(width),
        work_dir=str(work_dir),
        experiment_name=f"toy{next(_names)}",
        train_dataloader={
            **loader,
            "dataset": ToyDataset(),
            "sampler": {"type": sampler or ("DefaultSampler" if by_epoch else "InfiniteSampler")},
            "worker_init_fn": {"type": "worker_init_fn"},
        },
        val_dataloader={
            **loader,
            "dataset": ToyDataset(noise=0),
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        },
        train_cfg=train_cfg,
        val_cfg={},
        val_evaluator=[ToyMetric()],
        optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 0.02}},
        param_scheduler=[
            {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 12},
            {"type": "MultiStepLR", "milestones": [2, 3], "gamma": 0.5, "by_epoch": by_epoch},
            {"type": "CosineAnnealingLR", "T_max": 20, "by_epoch": False, "begin": 12, "end": 32},
        ],
        default_hooks={
            "checkpoint": {
                "type": checkpoint_hook,
                "interval": every,
                "by_epoch": by_epoch,
                "max_keep_ckpts": max_keep,
                "save_best": save_best,
                "rule": "greater" if save_best else None,
            },
            "logger": {"type": "LoggerHook", "interval": 2},
        },
        custom_hooks=custom,
        randomness={"seed": seed, "diff_rank_seed": launcher != "none"},
        resume=resume,
        load_from=load_from,
        launcher=launcher,
        log_level="INFO",
        log_processor={"by_epoch": by_epoch},
        cfg={"model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None}},
    )


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work_dir")
    parser.add_argument("--length", type=int, default=3)
    parser.add_argument("--iters", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--launcher", default="none")
    parser.add_argument("--max-keep", type=int, default=-1)
    parser.add_argument("--save-best")
    parser.add_argument("--signal-at", type=int)
    parser.add_argument("--signal", type=int, default=signal.SIGTERM)
    parser.add_argument("--group", action="store_true")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--die-in", choices=["last", "best"])
    parser.add_argument("--die-at", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    init_dist(args.launcher)
    hooks: list[Any] = []
    if args.signal_at is not None:
        hooks.append(SignalAt(args.signal_at, args.signal, args.group, args.rank))
    if args.die_in:
        hooks.append(DieInWrite(args.die_at, args.die_in == "best"))
    make_runner(
        args.work_dir,
        args.length,
        by_epoch=not args.iters,
        workers=args.workers,
        resume=args.resume,
        launcher=args.launcher,
        hooks=tuple(hooks),
        max_keep=args.max_keep,
        save_best=args.save_best,
        interval=1 if not args.iters else 100,
    ).train()


if __name__ == "__main__":
    main()
