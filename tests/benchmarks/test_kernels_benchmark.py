"""The benchmark of the operators on tiny shapes: its rows, its limits, its errors."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vision.kernels import cpu
from vision.kernels.dispatch import operators

TINY = ["--seconds", "0.001", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def kernels(repo_root: Path) -> ModuleType:
    """benchmarks/kernels.py as a module."""
    sys.path.insert(0, str(repo_root))
    return importlib.import_module("benchmarks.kernels")


@pytest.fixture(scope="module")
def measure(kernels: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks.measure")


@pytest.fixture(scope="module")
def report(kernels: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks.kernels_report")


def test_rows_tables_and_plot(
    kernels: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "rows.json"
    kernels.main([*TINY, "--shapes", "2x16x64", "--out", str(out)])
    rows = json.loads(out.read_text())
    assert {row["op"] for row in rows} == set(kernels.OPS)
    assert {(row["clock"], row["threads"]) for row in rows} == {("thread", 1), ("wall", 1)}
    keys = [(r["op"], r["backend"], r["direction"], *r["shape"], r["clock"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert ("bi_wkv", "torch", "forward + backward", 2, 16, 64, "thread") in keys
    for row in rows:
        assert {"cpu", "cores"} <= set(row["machine"])
        assert row["versions"]["torch"] == torch.__version__
        assert row["dtype"] == "float32"
        if row["error"] is None:
            assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["samples"] >= 1
    served = operators()["bi_wkv"].resolve("auto", torch.device("cpu"), torch.float32).name
    defaults = {row["backend"] for row in rows if row["op"] == "bi_wkv" and row["default"]}
    assert defaults == {served}
    printed = capsys.readouterr().out
    assert "| bi_wkv " in printed
    assert "| 2x16x64 " in printed
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_failing_backend_leaves_rows_with_its_error(
    kernels: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("nothing to divide by")

    backends = operators()["gate"].backends
    broken = dataclasses.replace(backends["torch"], forward=fail)
    monkeypatch.setitem(backends, "torch", broken)
    out = tmp_path / "rows.json"
    kernels.main([*TINY, "--ops", "gate,copy", "--shapes", "1x12x64", "--out", str(out)])
    rows = json.loads(out.read_text())
    failed = [row for row in rows if row["backend"] == "torch" and row["op"] == "gate"]
    assert {row["direction"] for row in failed} == {"forward", "forward + backward"}
    assert {row["error"] for row in failed} == {"ZeroDivisionError: nothing to divide by"}
    assert {row["median_ms"] for row in failed} == {None}
    assert all(row["error"] is None for row in rows if row["op"] == "copy")
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_rows_say_which_compiled_kernels_served(
    measure: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = torch.device("cpu")
    if cpu.probe(device) is None:
        assert measure.environment(device)["cpu_kernels"] == cpu.instruction_set()
        assert capsys.readouterr().err == ""
    monkeypatch.setattr(cpu, "_load", lambda: "compile it again")
    assert measure.environment(device)["cpu_kernels"] == "compile it again"
    assert capsys.readouterr().err == "without compiled CPU kernels: compile it again\n"


def test_an_error_after_the_first_call_is_a_row_too(measure: ModuleType) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        if len(calls) > 20:
            raise MemoryError("full")

    cases = [measure.Case({"op": "bad"}, lambda: call), measure.Case({"op": "good"}, lambda: dict)]
    timer = measure.HostTimer("thread")
    bad, good = measure.side_by_side(cases, timer, torch.device("cpu"), 0.001)
    assert bad["error"] == "MemoryError: full"
    assert good["error"] is None
    assert good["op"] == "good"


def test_competitors_take_turns(measure: ModuleType) -> None:
    class Steady:
        """A clock that notes who was asked, with two samples for "b" where "a" has four."""

        name = "steady"
        order: list[str] = []

        def prepare(self, case, call):
            def sample() -> float:
                self.order.append(case.labels["op"])
                return float(len(self.order))

            return sample

    cases = [measure.Case({"op": name}, lambda: list) for name in "ab"]
    runs = [measure._Run(case) for case in cases]
    for run, wanted in zip(runs, (4, 2), strict=True):
        run.sample, run.wanted = Steady().prepare(run.case, list), wanted
    measure._take_turns(runs)
    assert "".join(Steady.order) == "aabaab"
    row = runs[0].row()
    assert (row["median_ms"], row["p20_ms"], row["p80_ms"]) == pytest.approx((3.0, 1.6, 4.4))


# In a process of its own: what else a test worker takes or gives back meanwhile would count.
_EXTRA_BYTES = """
import torch
from benchmarks import measure

x = torch.ones(4 << 20)
calls = [lambda: (x + 1) * 2, lambda: x + 1]
for call in calls:
    call()  # what a first call alone takes is no part of it
found = [measure.extra_bytes(call, torch.device("cpu")) for call in calls]
print(*(-1 if one is None else one / x.nbytes for one in found))
"""


def test_extra_bytes_are_what_is_neither_input_nor_result(repo_root: Path) -> None:
    command = [sys.executable, "-c", _EXTRA_BYTES]
    ended = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=True)
    between, nothing = map(float, ended.stdout.split())
    if between < 0:
        pytest.skip("this system does not tell the peak of resident memory")
    assert between == pytest.approx(1, rel=0.1)
    assert nothing < 0.1


def test_limits_compare_the_rows_they_name(report: ModuleType) -> None:
    def row(op: str, backend: str, ms: float, shape: tuple[int, int, int]) -> dict:
        labels = {"op": op, "backend": backend, "shape": list(shape), "default": backend != "torch"}
        return {**labels, "direction": "forward", "median_ms": ms, "error": None}

    small, _, long, longest = report.SHAPES
    rows = [
        row("bi_wkv", "torch", 5.0, small),
        row("bi_wkv", "cpu", 1.0, small),
        row("exp", "-", 0.4, small),
        row("sdpa", "-", 8.5, small),
        row("bi_wkv", "torch", 10.0, long),
        row("bi_wkv", "torch", 50.0, longest),
    ]
    lines = report.ratio_table(rows).splitlines()[2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(line[0], line[1], line[3], line[5]) for line in found] == [
        ("bi_wkv / exp(k)", "cpu / -", "2.5", "MISSED"),
        ("sdpa / bi_wkv", "- / cpu", "8.5", "met"),
        ("torch bi_wkv, T=16384 / T=4096", "torch / torch", "5", "met"),
    ]
    assert report.ratio_table([{**rows[1], "error": "lost"}, rows[2]]).count("\n") == 1


@pytest.mark.parametrize(("tokens", "expected"), [(196, (14, 14)), (12, (3, 4)), (13, (1, 13))])
def test_grid(kernels: ModuleType, tokens: int, expected: tuple[int, int]) -> None:
    assert kernels.grid(tokens) == expected
    assert math.prod(expected) == tokens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--ops", "bi_wkv,nothing"], "no 'nothing'; there are bi_wkv"), (["--shapes", "3x4"], "3x4")],
)
def test_bad_arguments(
    kernels: ModuleType, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        kernels.main(arguments)
    assert words in capsys.readouterr().err
