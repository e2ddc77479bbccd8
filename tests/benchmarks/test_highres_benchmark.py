"""The benchmark over resolution on tiny models: its rows, resuming, reasons, crossovers, errors."""

import faulthandler
import importlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

CLASSES = 150
TINY = ["--models", "test_vit", "test_convnext", "--sizes", "64", "64x96", "--seconds", "0.01"]
EXPONENTS = st.floats(0.25, 3)
FACTORS = st.floats(0.01, 100)


@pytest.fixture(scope="module")
def highres(repo_root: Path) -> ModuleType:
    """benchmarks/highres_seg.py as a module."""
    sys.path.insert(0, str(repo_root))
    return importlib.import_module("benchmarks.highres_seg")


@pytest.fixture(scope="module")
def report(highres: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks.highres_report")


def row(model: str, side: int, ms: float, memory: float = 1.0, **more: object) -> dict:
    """A row as a file has it, of a square."""
    where = {"machine": {"cpu": "a cpu", "cores": 2}, "device": "cpu", "threads": 1, "batch": 1}
    what = {"task": "forward", "head": "none", "precision": "fp32", "compiled": False}
    cost = {"params": 1, "macs": 1, "flops_per_s": 1.0, "images_per_s": 1e3 / ms, "error": None}
    shares = {f"{name}_share": 0.0 for name in ("product", "operator", "other")}
    times = {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "memory_bytes": memory}
    labels = {"benchmark": "highres_seg", "model": model, "height": side, "width": side}
    group = {"group": side, "limit_gib": None}
    return {**labels, **where, **what, **cost, **shares, **times, **group, **more}


def test_command_writes_rows_tables_and_plots_and_goes_on_where_it_was(
    highres: ModuleType,
    repo_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, words = tmp_path / "new" / "rows.json", tmp_path / "tables.md"
    command = [*TINY, "--out", str(out), "--report", str(words)]
    program = str(repo_root / "benchmarks" / "highres_seg.py")
    done = subprocess.run(
        [sys.executable, program, *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    found = [(r["height"], r["width"], r["model"]) for r in rows]
    models = ("test_vit", "test_convnext")
    assert found == [(64, width, model) for width in (64, 96) for model in models]
    for r in rows:
        assert r["error"] is None
        assert 0 < r["p20_ms"] <= r["median_ms"] <= r["p80_ms"]
        assert r["clock"] == "thread"
        assert r["versions"]["torch"] == torch.__version__
        assert r["images_per_s"] == pytest.approx(1e3 / r["median_ms"])
        assert r["flops_per_s"] == pytest.approx(2e3 * r["macs"] / r["median_ms"])
        assert r["weight_bytes"] >= 4 * r["params"] > 0
        shares = [r[f"{name}_share"] for name in ("product", "operator", "other")]
        assert sum(shares) == pytest.approx(1)
        assert 0 < shares[0] < 1
    assert rows[0]["group"] == rows[1]["group"]
    tables = words.read_text()
    assert tables.count("| test_vit ") == tables.count("| test_convnext ") == 2
    assert "| 64x96 |" in tables
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "<svg" in out.with_suffix(".svg").read_text()

    monkeypatch.setattr(highres, "apart", lambda *_: pytest.fail("measured what the file has"))
    before = out.read_text()
    highres.main(command)
    assert "0 row(s) to measure, 4 in" in capsys.readouterr().out
    assert out.read_text() == before


def test_another_model_is_measured_and_the_rest_kept(
    highres: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def pretend(group: list, seconds: float, limit: float | None) -> list[dict]:
        asked.extend(group)
        return [row(s.model, s.height, 1.0) for s in group]

    def run(*models: str, more: tuple[str, ...] = ()) -> list[dict]:
        asked.clear()
        highres.main(["--models", *models, "--sizes", "64", "--out", str(out), *more])
        return json.loads(out.read_text())

    monkeypatch.setattr(
        highres, "environment", lambda device: {"machine": row("", 1, 1)["machine"]}
    )
    monkeypatch.setattr(highres, "measure_group", pretend)
    out = tmp_path / "rows.json"
    assert len(run("test_vit")) == 1
    assert [r["model"] for r in run("test_vit", "test_resnet")] == ["test_vit", "test_resnet"]
    assert [s.model for s in asked] == ["test_resnet"]
    assert len(run("test_vit", more=("--again",))) == 2
    assert [s.model for s in asked] == ["test_vit"]
    run("test_vit", more=("--precision", "bf16"))
    assert [s.precision for s in asked] == ["bf16"]


def test_a_failure_is_measured_again_under_another_limit_only(highres: ModuleType) -> None:
    setting = highres.Setting("m", 64, 64)
    failed = row("m", 64, 1.0, error="out of memory", limit_gib=1.0)
    assert highres.is_done(setting, [failed], failed["machine"], 1.0)
    assert not highres.is_done(setting, [failed], failed["machine"], 2.0)
    assert not highres.is_done(setting, [failed], {"cpu": "another"}, 1.0)
    assert highres.is_done(setting, [row("m", 64, 1.0)], failed["machine"], 2.0)


def test_what_cannot_run_is_a_row_with_its_reason(
    highres: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The last map of one image of 32 px is one token, of which batch norm has no statistics.
    out = tmp_path / "rows.json"
    models = ["--models", "test_resnet", "--sizes", "32", "--train"]
    highres.main([*models, "--out", str(out)])
    forward, step = json.loads(out.read_text())
    assert forward["error"] is None
    assert "more than 1 value per channel" in step["error"]
    assert step["error"] in capsys.readouterr().out


def test_without_a_row_that_ran_nothing_is_drawn(report: ModuleType, tmp_path: Path) -> None:
    failed = row("vit", 64, 1.0, error="out of memory")
    assert report.draw([failed], tmp_path / "rows.json") == []
    assert list(tmp_path.iterdir()) == []


def _too_much() -> None:
    importlib.import_module("benchmarks.highres_seg")._limit_memory(0.25, torch.device("cpu"))
    torch.zeros(1 << 30)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _segmentation_fault() -> None:
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


def test_memory_is_limited_and_a_killed_process_leaves_words(
    highres: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Functions of a test module have no name that another process could import.
    fork = highres.multiprocessing.get_context("fork")
    monkeypatch.setattr(fork, "set_forkserver_preload", lambda names: None)
    monkeypatch.setattr(highres.multiprocessing, "get_context", lambda method: fork)
    assert highres.apart(math.sqrt, 4) == (2.0, None)
    assert highres.apart(_killed)[1] == "its process ended by SIGKILL, most likely out of memory"
    reason = highres.apart(_segmentation_fault)[1]
    assert reason == "its process ended by SIGSEGV, most likely out of memory"
    result, reason = highres.apart(_too_much)
    assert result is None
    assert reason.startswith("out of memory: RuntimeError: ")


# In a process of its own: the heap of a test worker has holes that no setting takes back.
_MEMORY_OF_A_CALL = """
import torch
from benchmarks import measure

measure.keep_freed_memory()  # as an earlier measurement of time left it
measure.return_freed_memory()
x = torch.ones(16, 1 << 18)  # 16 MiB
pieces = [torch.ones(1 << 18) for _ in range(64)]
del pieces[::2]

def call():
    return x * 2 + x * 3 - x * 4

call()  # what a first call alone takes is no part of it
print(measure.extra_bytes(call, torch.device("cpu")) / x.nbytes)
"""


def test_memory_is_what_a_call_holds_at_once(repo_root: Path) -> None:
    command = [sys.executable, "-c", _MEMORY_OF_A_CALL]
    ended = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=True)
    # Two are held while the third comes; the result is not counted.
    assert float(ended.stdout) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
@pytest.mark.parametrize("head", ["none", "fcn", "upernet"])
def test_heads_and_training_steps(highres: ModuleType, name: str, head: str) -> None:
    setting = highres.Setting(name, 64, 96, head=head)
    model = highres.build(setting)
    out = highres.pass_of(setting, model)()
    if head != "none":
        stride = 4 if head == "upernet" else model.backbone.strides[0]
        assert out.shape == (1, CLASSES, 64 // stride, 96 // stride)
    training = highres.Setting(name, 64, 96, highres.TRAINING, head)
    highres.pass_of(training, model)()
    assert all(p.grad is not None for p in model.parameters())


def test_operators_have_their_share_of_the_time(highres: ModuleType) -> None:
    setting = highres.Setting("vrwkv_tiny_patch16_224", 64, 64, highres.TRAINING)
    before = {name: dict(op.backends) for name, op in highres.operators().items()}
    call = highres.pass_of(setting, highres.build(setting))
    shares = highres.time_shares(call, torch.device("cpu"))
    assert 0.01 < shares["operator_share"] < 1
    assert sum(shares.values()) == pytest.approx(1)
    assert {name: op.backends for name, op in highres.operators().items()} == before


@settings(deadline=None)
@given(FACTORS, EXPONENTS, FACTORS, EXPONENTS)
def test_power_laws_cross_where_algebra_says(
    report: ModuleType, a: float, p: float, b: float, q: float
) -> None:
    assume(abs(p - q) > 0.05)
    xs = [4.0**i for i in range(1, 9)]
    one, two = ([(x, f * x**e) for x in xs] for f, e in ((a, p), (b, q)))
    log_x = math.log(b / a) / (p - q)
    assume(min(abs(log_x - math.log(x)) for x in xs) > 1e-6)
    found = report.crossovers(one, two)
    if not math.log(xs[0]) < log_x < math.log(xs[-1]):
        assert found == []
        return
    ((x, y),) = found
    assert math.log(x) == pytest.approx(log_x, abs=1e-6)
    assert y == pytest.approx(a * x**p, rel=1e-6)
    assert report.crossovers(two, one) == [pytest.approx((x, y), rel=1e-9)]


def test_crossovers_are_of_sizes_that_both_have(report: ModuleType) -> None:
    one = [(1, 4.0), (2, 4.0), (4, 4.0), (16, 4.0)]
    two = [(1, 2.0), (3, 400.0), (4, 4.0), (16, 2.0)]
    assert report.crossovers(one, two) == [(4, 4.0)]
    assert report.crossovers(one, []) == []
    assert report.crossovers([(1, 1.0), (4, 1.0)], [(1, 2.0), (4, 0.5)]) == [
        pytest.approx((2.0, 1.0))
    ]


@settings(deadline=None)
@given(st.floats(0.1, 1e6), st.floats(0, 1e6))
def test_a_line_is_fitted_exactly(report: ModuleType, slope: float, offset: float) -> None:
    points = [(x, slope * x + offset) for x in (256, 1024, 4096, 16384)]
    found, start, worst = report.linear_fit(points)
    assert found == pytest.approx(slope, rel=1e-6)
    assert start == pytest.approx(offset, rel=1e-3, abs=slope)
    assert worst < 1e-6
    with pytest.raises(ValueError, match="measure 3 sizes"):
        report.linear_fit(points[:2])


def test_summary_tells_ratio_crossover_fit_and_reason(report: ModuleType, tmp_path: Path) -> None:
    rows = [row("vrwkv", side, side**2 / 2**14, 2.0**10 * side**2) for side in (256, 512, 1024)]
    rows += [row("vit", side, side**4 / 2**32) for side in (256, 512)]
    rows += [row("vit", 1024, 1.0, error="out of memory", group="later")]
    rows += [row("swin", 1024, 128.0, group="later")]
    text = report.summary(rows)
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    cells = {(line[0], line[1]): line[2:4] for line in lines if len(line) > 3}
    assert cells["512x512", "vit"] == ["16 (16-16)", "1.00"]
    assert cells["256x256", "vit"] == ["1 (1-1)", "0.25"]
    assert cells["1024x1024", "vit"] == ["out of memory", ""]
    assert cells["1024x1024", "swin"] == ["128 (128-128)", "2.00*"]
    assert "- time of a batch, vrwkv and vit: 512 px (16 ms)" in text
    assert "- vrwkv: 256 KiB a token" in text
    files = report.draw(rows, tmp_path / "rows.json")
    assert [file.name for file in files] == ["rows.png", "rows.svg"]
    assert "512 px" in files[1].read_text()  # the mark of the crossover


def test_read_measures_nothing(
    highres: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(highres, "measure_all", lambda args: pytest.fail("measured"))
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row("some_model", 64, 3.5)]))
    highres.main(["--read", str(file)])
    assert "| 64x64 | some_model | 3.5 (3.5-3.5) | 1.00" in capsys.readouterr().out
    assert file.with_suffix(".svg").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--models", "vrwkv_tny_patch16_224"], "vrwkv_tiny_patch16_224"),
        (["--sizes", "64", "axb"], "SIDE or HEIGHTxWIDTH, as 1024 or 2048x1024, got 'axb'"),
        (["--sizes", "1x2x3"], "got '1x2x3'"),
        (["--sizes", "-64"], "got '-64'"),
        (["--sizes", "100"], "multiples of 32 px, the coarsest stride, got '100'"),
        (["--sizes", "0"], "multiples of 32"),
        (["--out", "FILE"], "was not written by benchmarks/highres_seg.py"),
        (["--read", "FILE"], "was not written by benchmarks/highres_seg.py"),
        (["--read", "MISSING"], "there is no"),
        (["--out", "TEXT"], "is no JSON"),
    ],
)
def test_bad_arguments(
    highres: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    files = {"FILE": '[{"op": "exp"}]', "TEXT": "| px |"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    names = {name: str(tmp_path / name) for name in (*files, "MISSING")}
    with pytest.raises(SystemExit):
        highres.main([names.get(argument, argument) for argument in arguments])
    assert words in capsys.readouterr().err
    assert (tmp_path / "FILE").read_text() == files["FILE"]
