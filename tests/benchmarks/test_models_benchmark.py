"""The benchmark of two whole models side by side: rows, table, what a failed row says."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

TINY = ["test_vit", "vrwkv_nano_patch8_224"]


@pytest.fixture(scope="module")
def models(repo_root: Path) -> ModuleType:
    """benchmarks/models.py as a module."""
    sys.path.insert(0, str(repo_root))
    return importlib.import_module("benchmarks.models")


def test_command_writes_a_row_of_every_model_and_prints_the_ratio(
    repo_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "rows.json"
    program = str(repo_root / "benchmarks" / "models.py")
    options = ["--models", *TINY, "--sizes", "32", "--seconds", "0.01", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, program, *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [(row["model"], row["size"]) for row in rows] == [(name, 32) for name in TINY]
    assert all(row["error"] is None and row["median_ms"] > 0 for row in rows)
    assert all(0 < row["outside_products"] < 1 for row in rows)
    ratio = rows[0]["median_ms"] / rows[1]["median_ms"]
    assert re.search(rf"\| 32 +\| {ratio:.2f} +\|", done.stdout)


def test_a_model_that_fails_is_a_row_with_its_reason(models: ModuleType) -> None:
    timer, device = models.HostTimer("thread"), torch.device("cpu")
    names = ["vrwkv_nano_patch8_224", "swin_tiny_patch4_window7_224"]
    rows = models.measure(names, -1, timer, device, 0.01)
    assert all(row["error"] and row["outside_products"] is None for row in rows)
    assert rows[0]["error"] in models.table(rows, names)


def test_all_that_is_a_product_is_inside(models: ModuleType) -> None:
    x = torch.randn(256, 256)
    cpu = torch.device("cpu")
    assert models.share_outside_products(lambda: x @ x @ x, 3, cpu) < 0.5
    assert models.share_outside_products(lambda: x.exp().sin(), 3, cpu) == 1


@pytest.mark.parametrize(("once_ms", "calls"), [(1e-3, 20), (50, 20), (300, 4), (48_000, 1)])
def test_a_profile_takes_about_a_second_in_twenty_calls_at_most(once_ms: float, calls: int) -> None:
    measure = importlib.import_module("benchmarks.measure")
    assert measure.calls_to_profile(once_ms) == calls
