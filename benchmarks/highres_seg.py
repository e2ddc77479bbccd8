"""Cost of segmentation backbones over resolution: time, memory, multiply-adds, where time goes.

    python benchmarks/highres_seg.py                                # four tiny backbones, a CPU
    python benchmarks/highres_seg.py --quick                        # two, small, some minutes
    python benchmarks/highres_seg.py --sizes 512 1024 2048x1024 --head upernet --train
    python benchmarks/highres_seg.py --device cuda --precision bf16 --sizes 512 1024 2048 4096
    python benchmarks/highres_seg.py --read benchmarks/results/highres_seg-cpu.json

Random weights, models of timm and of the zoo by timm's names, adapted to each size. The backbones
of one size are timed side by side in one process, on a CPU by the thread's own time (by the wall's
with several threads); memory is taken of each alone, in a process of its own. A row that fails is
a row with its reason. Rows that the file has, with the same settings on the same machine, are not
measured again: an interrupted run goes on where it was.

Without a head the pass ends in pooled features; with one, in logits at the head's stride. A
training step is a forward and a backward pass, the norms of a head held fixed (one image has no
statistics at 1 x 1). bf16 is bf16 weights in the forward pass, autocast in the training step.
"""

import argparse
import dataclasses
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import vision  # noqa: F401 -- registers the models
from benchmarks.highres_models import DTYPES, FORWARD, TRAINING, Setting, build, pass_of
from benchmarks.highres_report import BENCHMARK, draw, load, summary
from benchmarks.measure import (
    Call,
    Case,
    CudaTimer,
    HostTimer,
    Report,
    Row,
    calls_to_profile,
    environment,
    extra_bytes,
    keep_freed_memory,
    return_freed_memory,
    side_by_side,
    threads,
)
from benchmarks.models import PRODUCTS
from vision.kernels.dispatch import operators
from vision.models.complexity import count_complexity
from vision.models.factory import check_model_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODELS = (
    *("vrwkv_tiny_patch16_224", "vit_tiny_patch16_224"),
    *("swin_tiny_patch4_window7_224", "convnext_tiny"),
)
SIZES = ("512", "1024", "2048x1024", "2048")
QUICK = {"models": list(MODELS[:2]), "sizes": ["128", "256", "512"], "seconds": 2.0}


# --- one row alone -------------------------------------------------------------------------------


class _Stopwatch:
    """Adds up the milliseconds that blocks take, between events on a GPU."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._spans: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that does the same and is timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            result = function(*args, **kwargs)
            self._spans.append((begin, self._now()))
            return result

        return run

    def total(self) -> float:
        """Milliseconds of all that ran."""
        if not self._cuda:
            return sum(end - begin for begin, end in self._spans) * 1e3
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in self._spans)


@contextmanager
def _operators_timed(watch: _Stopwatch) -> Iterator[None]:
    """Time every call of the zoo's own operators; torch's profiler does not see C and Triton."""
    before = {name: dict(op.backends) for name, op in operators().items()}
    for op in operators().values():
        for name, backend in op.backends.items():
            functions = {key: getattr(backend, key) for key in ("forward", "keeping", "backward")}
            timed = {key: f and watch.timed(f) for key, f in functions.items()}
            op.backends[name] = dataclasses.replace(backend, **timed)
    try:
        yield
    finally:
        for name, op in operators().items():
            op.backends.update(before[name])


def time_shares(call: Call, device: torch.device) -> Row:
    """Shares of the time of some calls, 0 to 1.

    Returns:
        `product_share` (matrix products, convolutions, attention), `operator_share` (the zoo's own
        operators) and `other_share` (norms, activations, moves, Python); of the wall's time on a
        CPU, so that other processes blur them.
    """
    cuda = device.type == "cuda"
    whole, own = _Stopwatch(cuda), _Stopwatch(cuda)
    begin = time.perf_counter()
    call()
    count = calls_to_profile((time.perf_counter() - begin) * 1e3)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with _operators_timed(own), profile(activities=activities) as profiler:
        for _ in range(count):
            whole.timed(call)()
        total, operator = whole.total(), own.total()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    product = 1e-3 * sum(  # microseconds
        getattr(event, key)
        for event in profiler.key_averages()
        # A kernel stands there a second time, under its own name.
        if event.device_type == torch.autograd.DeviceType.CPU
        and any(name in event.key for name in PRODUCTS)
    )
    shares = {"product_share": product / total, "operator_share": operator / total}
    return {**shares, "other_share": max(0.0, 1 - sum(shares.values()))}


def examine(setting: Setting, limit_gib: float | None) -> Row:
    """What a row says beside its time; to be called in a process of its own.

    Args:
        setting: the row.
        limit_gib: memory that a pass may take beyond the model, GiB.
    """
    device = torch.device(setting.device)
    return_freed_memory()
    with threads(setting.threads):
        model = build(setting)
        if limit_gib is not None:
            _limit_memory(limit_gib, device)
        call = pass_of(setting, model)
        call()
        found: Row = {"memory_bytes": extra_bytes(call, device)}
        keep_freed_memory()  # as where the row is timed: fresh pages are no cost of an operator
        found |= time_shares(call, device)
        weights = [*model.parameters(), *model.buffers()]
        found["weight_bytes"] = sum(x.numel() * x.element_size() for x in weights)
        count = count_complexity(model.to("meta"), (3, *setting.hw))
        macs = {"macs": count.macs, "product_macs": count.matmul, "operator_macs": count.operator}
        return {**found, "params": count.params, **macs}


def _limit_memory(gib: float, device: torch.device) -> None:
    if device.type == "cuda":
        share = gib * 2**30 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(gib * 2**30)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def time_together(settings: list[Setting], seconds: float) -> list[Row]:
    """Times of rows of one size side by side; to be called in a process of its own.

    Args:
        settings: the rows.
        seconds: for each.
    """
    device = torch.device(settings[0].device)
    clock = "thread" if settings[0].threads == 1 else "wall"
    timer = CudaTimer() if device.type == "cuda" else HostTimer(clock)
    keep_freed_memory()
    with threads(settings[0].threads):
        cases = [Case({}, lambda s=s: pass_of(s, build(s))) for s in settings]
        rows = side_by_side(cases, timer, device, seconds)
    for row in rows:  # examine() has the memory, in a process that gives back what it frees
        del row["extra_bytes"], row["traffic_bytes"]
    return rows


# --- processes -----------------------------------------------------------------------------------


# How a process ends without memory: killed by the system, or by C code that did not look whether it
# got what it asked for.
_OUT_OF_MEMORY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("1000")  # when memory ends, this process goes and not the one that asked
    try:
        sender.send((function(*arguments), None))
    except Exception as error:  # noqa: BLE001 -- a failed row is written with its error
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # to answer takes memory, too
        words = str(error).strip().splitlines() or [""]
        full = isinstance(error, MemoryError | torch.OutOfMemoryError)
        # torch's allocator on the CPU says so in words only.
        full = full or any("allocate memory" in word for word in words)
        reason = f"{type(error).__name__}: {words[0]}"
        sender.send((None, f"out of memory: {reason}" if full else reason))


def apart(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """Call a function in a process of its own.

    Returns:
        What it returned and None, or None and why it failed, be it killed.
    """
    context = multiprocessing.get_context("forkserver")
    # Imported once, not for every row.
    context.set_forkserver_preload(["__main__", "torch", "timm", "vision"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result, reason = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        likely = ", most likely out of memory" if -code in _OUT_OF_MEMORY else ""
        return None, f"its process ended by {name}{likely}"
    process.join()
    return result, reason


# --- all rows ------------------------------------------------------------------------------------


def measure_group(settings: list[Setting], seconds: float, limit_gib: float | None) -> list[Row]:
    """Rows of one size, in the order of the settings."""
    together = {"group": datetime.now(UTC).isoformat(timespec="seconds"), "limit_gib": limit_gib}
    rows: list[Row] = []
    for setting in settings:
        found, reason = apart(examine, setting, limit_gib)
        rows.append({**dataclasses.asdict(setting), **together, **(found or {}), "error": reason})
    whole = [i for i, row in enumerate(rows) if row["error"] is None]
    if whole:
        times, reason = apart(time_together, [settings[i] for i in whole], seconds)
        for i, found in zip(whole, times or [{"error": reason}] * len(whole), strict=True):
            rows[i].update(found)
    for row in rows:
        if row["error"] is None:
            per_s = 1e3 / row["median_ms"]
            passes = 3 if row["task"] == TRAINING else 1
            row["images_per_s"] = row["batch"] * per_s
            row["flops_per_s"] = 2 * row["macs"] * passes * row["batch"] * per_s
    return rows


def is_done(setting: Setting, rows: list[Row], machine: Row, limit_gib: float | None) -> bool:
    """Whether rows have this one, of this machine; a failure counts under the same limit only."""
    return any(
        setting.matches(row)
        and row["machine"] == machine
        and (row["error"] is None or row["limit_gib"] == limit_gib)
        for row in rows
    )


def size(text: str) -> tuple[int, int]:
    """Height and width of "1024" or "2048x1024" in pixels.

    Raises:
        ValueError: it is something else, or not in multiples of 32, the coarsest stride.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f"a size is SIDE or HEIGHTxWIDTH, as 1024 or 2048x1024, got {text!r}")
    found = int(parts[0]), int(parts[-1])
    if min(found) < 32 or any(side % 32 for side in found):
        raise ValueError(f"a size is in multiples of 32 px, the coarsest stride, got {text!r}")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a caller's mistake ends the program with words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", help=f"timm names (default: {' '.join(MODELS)})")
    parser.add_argument("--sizes", nargs="+", help=f"px, SIDE or HxW (default: {' '.join(SIZES)})")
    parser.add_argument("--head", choices=["none", "upernet", "fcn"], default="none")
    parser.add_argument("--train", action="store_true", help="also a training step")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--seconds", type=float, help="to time each row for (default: 10)")
    parser.add_argument("--memory-limit", type=float, metavar="GiB", help="of a pass, else failed")
    parser.add_argument("--quick", action="store_true", help="two models, three small sizes")
    parser.add_argument("--again", action="store_true", help="measure also what the file has")
    parser.add_argument("--out", type=Path, help="JSON of rows; plots lie beside it")
    parser.add_argument("--read", type=Path, help="measure nothing: print and draw this file")
    parser.add_argument("--report", type=Path, help="Markdown file for the tables")
    args = parser.parse_args(argv)
    defaults = QUICK if args.quick else {"models": MODELS, "sizes": SIZES, "seconds": 10.0}
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    kind = torch.device(args.device).type
    args.out = args.read or args.out or RESULTS / f"highres_seg-{kind}.json"
    try:
        args.sizes = list(dict.fromkeys(map(size, args.sizes)))
        args.models = list(dict.fromkeys(args.models))
        if kind == "cuda" and args.read is None and not torch.cuda.is_available():
            raise ValueError("torch finds no GPU; measure with --device cpu")
        if args.read is None:
            for name in args.models:
                check_model_name(name)
        elif not args.read.exists():
            raise ValueError(f"there is no {args.read} to read")
        args.rows = load(args.out) if args.out.exists() else []
    except ValueError as error:
        parser.error(str(error))
    return args


def measure_all(args: argparse.Namespace) -> list[Row]:
    """Measure what the file has not, writing it after each size; return all its rows."""
    common = {"benchmark": BENCHMARK, **environment(torch.device(args.device))}
    groups = []
    for task in [FORWARD, *[TRAINING] * args.train]:
        for height, width in args.sizes:
            options = {"head": args.head, "precision": args.precision, "compiled": args.compile}
            where = {"device": args.device, "threads": args.threads, "batch": args.batch}
            settings = [Setting(m, height, width, task, **options, **where) for m in args.models]
            limit = args.memory_limit
            if not args.again:
                machine = common["machine"]
                settings = [s for s in settings if not is_done(s, args.rows, machine, limit)]
            groups.append(settings)
    report = Report(args.out, common)
    report.rows = args.rows
    count = sum(map(len, groups))
    print(f"{count} row(s) to measure, {len(args.rows)} in {args.out}", flush=True)
    # Time goes about with the pixels, so what is left is told by theirs.
    pixels = sum(s.height * s.width for group in groups for s in group)
    with tqdm(total=pixels, unit="px", unit_scale=True, disable=not count) as bar:
        for settings in filter(None, groups):
            rows = measure_group(settings, args.seconds, args.memory_limit)
            report.rows = [  # without what is measured anew
                row
                for row in report.rows
                if row["machine"] != common["machine"] or not any(s.matches(row) for s in settings)
            ]
            report.add(rows)
            bar.update(sum(s.height * s.width for s in settings))
            for row in rows:
                said = row["error"] or f"{row['median_ms']:.4g} ms"
                bar.write(f"{row['height']}x{row['width']} {row['task']} {row['model']}: {said}")
    return report.rows


def main(argv: list[str] | None = None) -> None:
    """Measure or read, print tables, draw."""
    args = parse(argv)
    rows = args.rows if args.read else measure_all(args)
    text = summary(rows)
    print(f"\n{text}\n")
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(f"# Cost over resolution\n\n{text}\n")
    files = [args.out, *draw(rows, args.out), *[args.report] * (args.report is not None)]
    print("files: " + ", ".join(map(str, files)))


if __name__ == "__main__":
    main()
