"""Time and memory of Residual Attention Networks beside timm's ResNets.

    python benchmarks/ran.py [--device cuda] [--size 224] [--out benchmarks/results/ran_cpu.json]

Forward passes in evaluation mode, then training steps with and without gradient checkpointing, all
with random weights; on a CPU with one thread. The ratio is of the medians, to resnet50.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import timm
import torch

import vision  # noqa: F401 -- registers the models
from benchmarks.measure import (
    Call,
    Case,
    CudaTimer,
    HostTimer,
    Report,
    Row,
    environment,
    keep_freed_memory,
    markdown_table,
    side_by_side,
    threads,
)

FORWARD = (
    *("resnet50", "ran56", "ran56 folded", "ranext56", "ran92", "resnet152"),
    *("resnet50 channels_last", "ran56 channels_last"),
)
TRAINING = ("resnet50", "ran56", "ran56 checkpointed", "ran92", "ran92 checkpointed")
RESULTS = Path(__file__).resolve().parent / "results"


def forward_pass(name: str, size: int, batch: int, device: torch.device) -> Call:
    """A forward pass without gradients of a model in evaluation mode."""
    name, _, option = name.partition(" ")
    model = timm.create_model(name).eval().to(device)
    x = torch.randn(batch, 3, size, size, device=device)
    if option == "folded":
        model.fold_norms()
    elif option == "channels_last":
        model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    return torch.inference_mode()(lambda: model(x))


def training_step(name: str, size: int, batch: int, device: torch.device) -> Call:
    """A forward and a backward pass in training mode."""
    model = timm.create_model(name.removesuffix(" checkpointed")).train().to(device)
    if name.endswith(" checkpointed"):
        model.set_grad_checkpointing()
    x = torch.randn(batch, 3, size, size, device=device)

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(x).square().mean().backward()

    step()  # the gradients are there before memory is measured
    return step


def cases(
    task: str, names: tuple[str, ...], make: Callable[..., Call], *shape: object
) -> list[Case]:
    """A case for each model."""
    size, batch, device = shape
    labels: Row = {"task": task, "size": size, "batch": batch}
    return [
        Case({**labels, "model": name}, lambda name=name: make(name, size, batch, device))
        for name in names
    ]


def report(rows: list[Row]) -> str:
    """The rows of one task as a table."""
    reference = next(row["median_ms"] for row in rows if row["model"] == "resnet50")
    lines = [
        [
            row["model"],
            str(row["batch"]),
            f"{row['median_ms']:.0f}",
            f"{row['median_ms'] / reference:.2f}",
            f"{row['extra_bytes'] / 2**20:.0f}",
        ]
        for row in rows
        if row["error"] is None
    ]
    head = [rows[0]["task"], "batch", "ms", "ratio", "extra MiB"]
    return markdown_table(head, lines)


def main() -> None:
    """Measure, write the rows, print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images of a training step")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each model and task")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    out = args.out or RESULTS / f"ran_{device.type}.json"
    timer = CudaTimer() if device.type == "cuda" else HostTimer("thread")
    rows = Report(out, {**environment(device), "device": device.type})
    with threads(1):
        for task, names, make, batch in (
            ("forward", FORWARD, forward_pass, 1),
            ("training step", TRAINING, training_step, args.batch),
        ):
            found = side_by_side(
                cases(task, names, make, args.size, batch, device), timer, device, args.seconds
            )
            rows.add(found)
            print(report(found), "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
