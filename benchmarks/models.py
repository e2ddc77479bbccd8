"""Time and memory of whole models side by side, and how much of it is not matrix products.

    python benchmarks/models.py                                  # vrwkv_tiny beside timm's ViT
    python benchmarks/models.py --models vrwkv_small_patch16_224 deit_small_patch16_224 --sizes 512

Forward passes in evaluation mode, batch 1, random weights; on a CPU by the thread's own time at
one thread. The ratio is the time of the first model over that of the second one.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import timm
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import vision  # noqa: F401 -- registers the models
from benchmarks.measure import (
    Call,
    Case,
    CudaTimer,
    HostTimer,
    Report,
    Row,
    calls_to_profile,
    environment,
    keep_freed_memory,
    markdown_table,
    side_by_side,
    threads,
)

RESULTS = Path(__file__).resolve().parent / "results"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "convolution", "attention")


def forward_pass(name: str, size: int, device: torch.device) -> Call:
    """A forward pass without gradients of a model made for images of this size."""
    model = timm.create_model(name, img_size=size).eval().to(device)
    x = torch.randn(1, 3, size, size, device=device)
    return torch.inference_mode()(lambda: model(x))


def share_outside_products(call: Call, count: int, device: torch.device) -> float:
    """Return the share of the time of some calls outside of products, convolutions, attention."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    # What is in no operator of torch, such as compiled kernels, is the range's own.
    whole = nullcontext() if cuda else record_function("call")
    with profile(activities=activities) as profiler, whole:
        for _ in range(count):
            call()
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    spent = {event.key: getattr(event, time) for event in profiler.key_averages()}
    inside = sum(t for key, t in spent.items() if any(name in key for name in PRODUCTS))
    return 1 - inside / sum(spent.values())


def measure(
    models: list[str], size: int, timer: CudaTimer | HostTimer, device: torch.device, seconds: float
) -> list[Row]:
    """Return a row for each model at one size."""
    cases = [
        Case({"model": name, "size": size}, lambda name=name: forward_pass(name, size, device))
        for name in models
    ]
    rows = side_by_side(cases, timer, device, seconds)
    for row in rows:
        row["outside_products"] = None
        if row["error"] is None:
            call = forward_pass(row["model"], size, device)
            call()
            count = calls_to_profile(row["median_ms"])
            row["outside_products"] = share_outside_products(call, count, device)
    return rows


def table(rows: list[Row], models: list[str]) -> str:
    """The rows as a table with a line for each size."""
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        of = {row["model"]: row for row in rows if row["size"] == size}
        errors = [row["error"] for row in of.values() if row["error"] is not None]
        if errors:
            lines.append([str(size), errors[0], *[""] * (3 * len(models))])
            continue
        times = [of[name]["median_ms"] for name in models]
        ratio = f"{times[0] / times[1]:.2f}" if len(models) > 1 else ""
        lines.append(
            [
                str(size),
                ratio,
                *[f"{time:.0f}" for time in times],
                *[f"{(of[name]['extra_bytes'] or 0) / 2**20:.0f}" for name in models],
                *[f"{100 * of[name]['outside_products']:.0f}" for name in models],
            ]
        )
    heads = [f"{name.split('_patch')[0]} {unit}" for unit in ("ms", "MiB", "% outside products")
             for name in models]  # fmt: skip
    return markdown_table(["px", "ratio", *heads], lines)


def main() -> None:
    """Measure, write the rows, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["vit_tiny_patch16_224", "vrwkv_tiny_patch16_224"]
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512, 1024, 2048])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model and size")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    timer = CudaTimer() if device.type == "cuda" else HostTimer("thread")
    out = args.out or RESULTS / f"models-{device.type}.json"
    report = Report(out, {**environment(device), "device": device.type})
    with threads(1):
        for size in args.sizes:
            report.add(measure(args.models, size, timer, device, args.seconds))
            print(table(report.rows, args.models), "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
