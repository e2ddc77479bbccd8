"""The Triton backends without a GPU: values in the interpreter, resources of what is compiled."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vision.kernels import aot, triton_support

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

CPU = torch.device("cpu")


def python(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), **environment}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


# Triton reads once, when it is imported, whether it is to interpret.
@pytest.mark.parametrize(
    "name", ["triton_interpreter_cases", "test_shift_mix", "test_gate", "test_deform_attn"]
)
def test_values_and_gradients_in_the_interpreter(repo_root: Path, name: str) -> None:
    file = f"tests/kernels/{name}.py"
    options = ("-q", "-p", "no:cacheprovider", "-k", "triton", "-W", "ignore::RuntimeWarning")
    run = python(repo_root, "-m", "pytest", file, *options, TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.splitlines()[-1]
    assert re.search(r"\b\d\d+ passed", summary), summary
    assert "skipped" not in summary, run.stdout


@pytest.mark.parametrize("target", [(80, "fp32"), (90, "bf16")])
def test_no_kernel_spills_registers(target: tuple[int, str]) -> None:
    rows = aot.compile_all([target])
    assert len({row.name for row in rows}) == 21
    assert [row for row in rows if row.registers > 128 or row.stack > 0] == []


def test_triton_is_imported_at_the_first_call_only(repo_root: Path) -> None:
    code = """
import sys
import vision.kernels
rows = [row for row in vision.kernels.list_backends(["cpu"]) if row.backend == "triton"]
assert {row.op for row in rows} >= {"bi_wkv", "shift_mix", "gate", "wkv6_bi", "deform_attn"}
assert all("interpreter" in row.reason for row in rows), rows
assert "triton" not in sys.modules
"""
    run = python(repo_root, "-c", code, TRITON_INTERPRET="0")
    assert run.returncode == 0, run.stderr


def test_the_probe_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs a CUDA or ROCm device" in (triton_support.probe(CPU) or "")
    assert "needs a CUDA or ROCm device" in (triton_support.probe(torch.device("mps")) or "")
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CC", "cc")
    assert triton_support.probe(cuda) is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "install gcc" in (triton_support.probe(cuda) or "")
    monkeypatch.setattr(triton_support, "is_interpreted", lambda: True)
    assert triton_support.probe(CPU) is None
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    assert "pip install triton" in (triton_support.probe(CPU) or "")


def test_the_fastest_tiles_are_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(run, warmup: int, rep: int) -> float:
        measured.append(run())
        return abs(measured[-1] - 20)

    import triton.testing

    monkeypatch.setattr(triton_support, "_chosen", {})
    monkeypatch.setattr(triton.testing, "do_bench", measure)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    candidates = [10, 21, 30]
    assert triton_support.choose("key", candidates, lambda x: x) == 21
    assert triton_support.choose("key", candidates, lambda x: x) == 21
    assert measured == candidates
    monkeypatch.setattr(triton_support, "is_interpreted", lambda: True)
    assert triton_support.choose("other", candidates, lambda x: x) == 10
