"""What the benchmarks share: clocks, extra memory, rows of JSON, tables and plots.

Competitors are measured side by side: in one process, one sample of each in turn, so that noise of
the machine meets all alike. A competitor that fails leaves a row with its error.
"""

import ctypes
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vision.kernels import cpu
from vision.version import git_commit

Row = dict[str, Any]
Call = Callable[[], Any]

# A sample lasts at least this long, or the clock's own cost shows.
_SAMPLE_MS = 10.0
_MOST_SAMPLES = 101
_SHORT_MS = 50.0
_TRIALS = 5
# Below this the host's launches hide what a GPU kernel takes.
_GRAPH_BELOW_MS = 0.1
# Options of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# A profile takes as many calls as fill so many milliseconds, within limits.
_PROFILED_MS, _MOST_PROFILED = 1000.0, 20
_PACKAGES = ("triton", "timm", "mmengine")


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        labels: what its row says about it.
        make: makes inputs of its own and returns the call to measure.
        traffic: bytes that the call must read and write at least; 0 if that is no measure of it.
    """

    labels: Row
    make: Callable[[], Call]
    traffic: int = 0


# --- where ---------------------------------------------------------------------------------------


def environment(device: torch.device) -> Row:
    """Return what a row says about machine, versions, commit and compiled CPU kernels.

    Says on stderr, too, if there are none: plain torch serves then, which is not what a comparison
    of models is after.
    """
    # The version that torch gives itself names the CUDA it was built for, too.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    missing = cpu.probe(torch.device("cpu"))
    if missing is not None:
        sys.stderr.write(f"without compiled CPU kernels: {missing}\n")
    return {
        "machine": _machine(device),
        "versions": found,
        "commit": git_commit(),
        "cpu_kernels": missing or cpu.instruction_set(),
    }


def _machine(device: torch.device) -> Row:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    machine = {
        "system": platform.system() + " " + platform.machine(),
        "cpu": model.group(1) if model else platform.processor(),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let the GNU allocator keep what is freed, as it does in a process that has run for a while.

    Else a call that frees more than it needs again at once pays for fresh pages every time, which
    on a virtual machine can cost ten times the arithmetic, and competitors pay by chance.
    """
    _set_allocator({_TRIM_THRESHOLD: -1, _MMAP_MAX: 0})


def return_freed_memory() -> None:
    """Let the GNU allocator give back at once what is freed, from 64 KiB on.

    Else what it keeps depends on the order of earlier calls, `keep_freed_memory` among them, and
    adds up to half to the memory that `extra_bytes` finds, by chance.
    """
    _set_allocator({_TRIM_THRESHOLD: 0, _MMAP_MAX: 1 << 16, _MMAP_THRESHOLD: 1 << 16})


def _set_allocator(options: Mapping[int, int]) -> None:
    if platform.libc_ver()[0] == "glibc":
        allocator = ctypes.CDLL(None)
        for option, value in options.items():
            if not allocator.mallopt(option, value):
                raise RuntimeError(f"mallopt({option}, {value}) was refused")


# --- time ----------------------------------------------------------------------------------------


def calls_to_profile(once_ms: float) -> int:
    """Return of how many calls a profile should be, if one takes so long."""
    return min(max(1, math.ceil(_PROFILED_MS / once_ms)), _MOST_PROFILED)


class Timer(Protocol):
    """A way to time calls; `name` is the row's clock."""

    name: str

    def prepare(self, case: Case, call: Call) -> Callable[[], float]:
        """Return a function that takes one sample, milliseconds a call."""
        ...


class HostTimer:
    """Time on the host: of this thread, which other processes cannot lengthen, or of the wall.

    Args:
        name: "thread" for the CPU time of the calling thread (so at one thread), or "wall".
    """

    READ: Mapping[str, Callable[[], float]] = {
        "thread": time.thread_time,
        "wall": time.perf_counter,
    }

    def __init__(self, name: str) -> None:
        self.name = name
        self._read = self.READ[name]

    def prepare(self, case: Case, call: Call) -> Callable[[], float]:
        """Return a function that takes one sample, milliseconds a call."""
        once = self._time(call, 1)
        short = once < _SHORT_MS
        if short:  # the first calls of a short one are no measure of it
            once = min(self._time(call, 1) for _ in range(_TRIALS))
        number = max(1, math.ceil(_SAMPLE_MS / max(once, 1e-4)))

        def sample() -> float:
            if short:  # what the competitor before left in the caches is not its cost
                call()
            return self._time(call, number)

        return sample

    def _time(self, call: Call, number: int) -> float:
        start = self._read()
        for _ in range(number):
            call()
        return (self._read() - start) * 1e3 / number


class CudaTimer:
    """Time between events on the GPU, over inputs that together exceed its cache.

    Calls too short to be launched one by one are replayed as a CUDA graph.
    """

    name = "cuda"

    def prepare(self, case: Case, call: Call) -> Callable[[], float]:
        """Return a function that takes one sample, milliseconds a call."""
        cache = torch.cuda.get_device_properties().L2_cache_size
        copies = min(64, math.ceil(2 * cache / case.traffic)) if case.traffic else 1
        calls = [call, *(case.make() for _ in range(copies - 1))]
        self._time(calls)
        once = self._time(calls)
        calls *= max(1, math.ceil(_SAMPLE_MS / (once * copies)))
        if once >= _GRAPH_BELOW_MS:
            return lambda: self._time(calls)
        replay = self._graph(calls)
        return lambda: self._time([replay]) / len(calls)

    @staticmethod
    def _graph(calls: Sequence[Call]) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    @staticmethod
    def _time(calls: Sequence[Call]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(calls)


@dataclass
class _Run:
    """A case under way: its sampler and samples, or the error that ended it."""

    case: Case
    sample: Callable[[], float] | None = None
    wanted: int = 0
    samples: list[float] = field(default_factory=list)
    measured: Row = field(default_factory=dict)
    error: str | None = None

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step unless an earlier one failed."""
        if self.error is not None:
            return
        try:
            step()
        except Exception as error:  # noqa: BLE001 -- a failed row is written with its error
            self.error = f"{type(error).__name__}: {error}"

    def start(self, timer: Timer, device: torch.device, seconds: float) -> None:
        call = self.case.make()
        call()
        self.measured["extra_bytes"] = extra_bytes(call, device)
        self.sample = timer.prepare(self.case, call)
        begin = time.perf_counter()
        self.sample()
        self.wanted = round(seconds / (time.perf_counter() - begin))
        self.wanted = min(max(self.wanted, 1), _MOST_SAMPLES)

    def take(self) -> None:
        assert self.sample is not None
        self.samples.append(self.sample())

    def row(self) -> Row:
        times: Row = dict.fromkeys(("median_ms", "p20_ms", "p80_ms"))
        if self.error is None:
            found = np.percentile(self.samples, [50, 20, 80]).tolist()
            times = dict(zip(times, found, strict=True))
        samples = {"samples": len(self.samples), "traffic_bytes": self.case.traffic}
        return {**self.case.labels, **times, **samples, **self.measured, "error": self.error}


def side_by_side(
    cases: Sequence[Case], timer: Timer, device: torch.device, seconds: float
) -> list[Row]:
    """Measure cases, one sample of each in turn.

    Args:
        cases: what to compare.
        timer: how to time them.
        device: where they compute.
        seconds: for each case; a longer call is still taken once.

    Returns:
        A row for each case in their order: its labels, `median_ms`, `p20_ms`, `p80_ms` and
        `samples`, `extra_bytes`, `traffic_bytes`, and `error`, None where nothing failed.
    """
    runs = [_Run(case) for case in cases]
    gc.collect()  # nobody's memory is given back during another's measurement
    for run in runs:
        run.attempt(lambda run=run: run.start(timer, device, seconds))  # type: ignore[misc]
    _take_turns(runs)
    return [{**run.row(), "clock": timer.name} for run in runs]


def _take_turns(runs: Sequence[_Run]) -> None:
    rounds = max(run.wanted for run in runs)
    for i in range(rounds):
        for run in runs:
            # A case with fewer samples takes them spread over all rounds.
            if run.wanted * (i + 1) // rounds > run.wanted * i // rounds:
                run.attempt(run.take)


# --- memory --------------------------------------------------------------------------------------


def extra_bytes(call: Call, device: torch.device) -> int | None:
    """Return the most memory a call holds at once beyond its inputs and what it returns.

    On the GPU exact, from torch's allocator. On the CPU from the peak of the process's resident
    memory, which includes what C code takes, to about 0.1 MiB; None where the system does not
    tell (it takes Linux and glibc).
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        returned = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - _bytes_of(returned)
    reset = Path("/proc/self/clear_refs")
    if platform.libc_ver()[0] != "glibc" or not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # sets the peak to what is resident now
    before = _resident("VmRSS")
    returned = call()
    return max(0, _resident("VmHWM") - before - _bytes_of(returned))


def _resident(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) << 10


def _bytes_of(returned: Any) -> int:
    storages = [x.untyped_storage() for x in tree_leaves(returned) if isinstance(x, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


# --- what is left --------------------------------------------------------------------------------


class Report:
    """Rows in a JSON file that is whole after every `add`.

    Args:
        path: the file, a list of rows; it is replaced.
        common: what every row says.
    """

    def __init__(self, path: Path, common: Row) -> None:
        self.path = path
        self.rows: list[Row] = []
        self._common = common
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows and write the file."""
        self.rows += [{**self._common, **row} for row in rows]
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.rows, indent=1) + "\n")
        partial.replace(self.path)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file that `Report` wrote."""
    rows: list[Row] = json.loads(path.read_text())
    return rows


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns."""
    table = [list(head), *map(list, lines)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in table
    )


def draw_lines(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    xlabel: str,
    ylabel: str,
) -> None:
    """Draw named lines of (x, y) on logarithmic axes, two panels in a row, into a PNG."""
    lines = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(15, 4.5 * lines), layout="constrained")
    axes = figure.subplots(lines, 2, squeeze=False, sharey=True).flatten()
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    colors = {name: colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    for ax, (title, panel) in zip(axes, panels.items(), strict=False):
        for name, points in panel.items():
            ax.plot(*zip(*sorted(points), strict=True), "o-", label=name, color=colors[name])
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
        ticks = sorted({x for points in panel.values() for x, _ in points})
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks], minor=False)
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3)
    for ax in axes[len(panels) :]:
        ax.remove()
    handles = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    figure.legend(handles=list(handles.values()), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=100)
