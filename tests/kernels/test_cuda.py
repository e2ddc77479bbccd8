"""CUDA code of bi_wkv without a GPU: run on the CPU by csrc/emulate.h, and compiled by nvcc."""

import ctypes
import itertools
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vision.kernels import BackendUnavailableError, bi_wkv, nvcc
from vision.kernels.bi_wkv import OPERATOR, cuda
from vision.kernels.bi_wkv.cuda import Launcher, Plan
from vision.kernels.bi_wkv.reference import bi_wkv_definition
from vision.kernels.testing import assert_close, nan_filled_empty, oracle, value_and_grads

Make = Callable[..., tuple[dict[str, Tensor], Tensor]]

TOKENS = (1, 2, 31, 33, 49, 196, 197, 600)
DECAYS = (
    *("0 /T", "5 /T", "-5 /T", "80 /T", "-80 /T", "400 /T", "-400 /T"),
    *(5.0, -5.0, 80.0, -80.0, 400.0, -400.0, 1000.0, -1000.0, "mixed"),
)
CHANNELS = (5, 24, 64, 200)
KEYS = ("normal", "wide", "spike")
BONUSES = (0.0, "3 T", -5.0, "-3 T", 5.0)

needs_nvcc = pytest.mark.skipif(nvcc.find() is None, reason="there is no nvcc on this machine")


def emulation(folder: Path, *flags: str) -> Path:
    """Compile the CUDA source with g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ on this machine")
    path = folder / "emulated.so"
    command = [compiler, "-x", "c++", "-std=c++20", "-shared", "-fPIC", *flags]
    subprocess.run([*command, "-o", str(path), str(cuda.SOURCE)], check=True)
    return path


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """The kernels on the CPU."""
    flags = ("-O2", "-march=native", "-Wall", "-Werror", "-Wno-unknown-pragmas")
    path = emulation(tmp_path_factory.mktemp("emulated"), *flags)
    return Launcher(cuda.declare(ctypes.CDLL(str(path))), None)


def on(launcher: Launcher, plan: Plan) -> Callable[..., Tensor]:
    """Make a function of w, u, k, v that autograd can differentiate."""

    class Emulated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            return launcher.outputs(plan, *inputs)

        @staticmethod
        def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, ...]:
            return launcher.gradients(plan, *ctx.saved_tensors, gy)

    return Emulated.apply


def plans(tokens: int) -> list[Plan]:
    """Both designs; chunks of 16 and of 128 tokens."""
    return [Plan.resident(tokens, 320), Plan.split(tokens, 8, 2), Plan.split(tokens)]


def floors(inputs: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Say of what terms a gradient is the rest, where one token outweighs all others.

    The gradient of a key is v gv less a part of about this size; those of u and w are sums of such
    differences, of w times a distance.
    """
    size = (inputs["v"].abs().amax() * truth["gv"].abs().amax()).item()
    return {"gk": size, "gu": size, "gw": size * inputs["k"].shape[1]}


def matrix() -> list[tuple[Any, ...]]:
    """Every decay meets every number of tokens; the others take turns."""
    cases = []
    for i, (tokens, decay) in enumerate(itertools.product(TOKENS, DECAYS)):
        # The oracle needs tokens² channels.
        channels = CHANNELS[i % 4] if tokens < 100 or i % 8 == 1 else CHANNELS[i % 2]
        batch = (1, 3)[i % 7 == 0]
        if tokens == 600:
            batch, channels = 1, CHANNELS[i % 2]
        cases.append((tokens, decay, KEYS[i % 3], BONUSES[i % 5], batch, channels))
    return cases


@pytest.mark.parametrize(("tokens", "decay", "keys", "bonus", "batch", "channels"), matrix())
def test_emulated_float32(
    emulated: Launcher,
    bi_wkv_inputs: Make,
    tokens: int,
    decay: float | str,
    keys: str,
    bonus: float | str,
    batch: int,
    channels: int,
) -> None:
    inputs, grad = bi_wkv_inputs(tokens, decay, keys, bonus, batch, channels)
    truth = oracle(bi_wkv_definition, inputs, grad)
    for plan in plans(tokens)[:: 1 if channels < 64 else 2]:
        with nan_filled_empty():
            actual = value_and_grads(on(emulated, plan), inputs, grad)
        assert_close(actual, truth, 5e-6, floors(inputs, truth))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 33, 197])
@pytest.mark.parametrize("decay", ["3 /T", "-80 /T", "mixed"])
def test_emulated_low_precision(
    emulated: Launcher, bi_wkv_inputs: Make, tokens: int, decay: str, dtype: torch.dtype
) -> None:
    inputs, grad = bi_wkv_inputs(tokens, decay, batch=3, channels=24)
    low = {n: x if n in "wu" else x.to(dtype) for n, x in inputs.items()}
    grad = grad.to(dtype)
    truth = oracle(bi_wkv_definition, low, grad)
    # One rounding, of the result; the gradients of w and u are not rounded.
    eps = torch.finfo(dtype).eps
    tolerance = {"y": eps, "gk": eps, "gv": eps, "gw": 5e-6, "gu": 5e-6}
    for plan in plans(tokens):
        with nan_filled_empty():
            actual = value_and_grads(on(emulated, plan), low, grad)
        assert {n: x.dtype for n, x in actual.items()} == {
            n: torch.float32 if n in ("gw", "gu") else dtype for n in actual
        }
        assert_close(actual, truth, tolerance, floors(inputs, truth))


def test_emulated_dtypes_and_strides_may_differ(emulated: Launcher, bi_wkv_inputs: Make) -> None:
    inputs, grad = bi_wkv_inputs(33, "3 /T", batch=2, channels=6)
    inputs["k"] = inputs["k"].bfloat16()
    inputs["v"] = inputs["v"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["w"] = inputs["w"].repeat_interleave(2)[::2]
    truth = oracle(bi_wkv_definition, inputs, grad)
    for plan in plans(33):
        actual = value_and_grads(on(emulated, plan), inputs, grad.expand(2, 33, 6))
        assert actual["gk"].dtype == torch.bfloat16
        tolerance = {"y": 5e-6, "gk": 2**-7, "gv": 5e-6, "gw": 5e-6, "gu": 5e-6}
        assert_close(actual, truth, tolerance, floors(inputs, truth))


def test_emulated_long_sequence_keeps_its_accuracy(emulated: Launcher) -> None:
    tokens = 16384
    rng = torch.Generator().manual_seed(0)
    w = torch.tensor([3.0, -5.0, 80.0, -80.0, 0.0, -400.0, 16384.0]) / tokens
    k, v, gy = torch.randn(3, 1, tokens, 7, generator=rng)
    inputs = {"w": w, "u": torch.zeros(7), "k": k, "v": v}

    def scan(*inputs: Tensor) -> Tensor:
        return bi_wkv(*inputs, backend="torch")

    truth = oracle(scan, inputs, gy)
    actual = value_and_grads(on(emulated, Plan.of(tokens, 320)), inputs, gy)
    assert_close(actual, truth, 3e-6, floors(inputs, truth))


def test_emulated_strides_are_exact(emulated: Launcher) -> None:
    """The factor from chunk to chunk, rounded to a float, would be wrong by 2^-25 each time."""
    tokens = 16384
    w = torch.linspace(-41, -40, 1000) / tokens
    stride = torch.exp(-w.double() * 16)
    w = w[(stride - stride.float()).abs().topk(8).indices]
    # The first and the last token weigh the same where one is near and the other is far.
    k, v = torch.zeros(2, 1, tokens, 8)
    k[:, 0], k[:, -1], v[:, 0], v[:, -1] = 72.0, 36.0, 1.0, -1.0
    u = torch.zeros(8)
    truth = bi_wkv(w.double(), u.double(), k.double(), v.double(), backend="torch")
    y = emulated.outputs(Plan.split(tokens, 8, 2), w, u, k, v)
    assert_close({"y": y}, {"y": truth}, 1e-6)


def test_emulated_nan_reaches_only_its_channel(emulated: Launcher, bi_wkv_inputs: Make) -> None:
    for name in ("w", "u", "k", "v"):
        inputs, grad = bi_wkv_inputs(49, "3 /T", batch=1, channels=24)
        inputs[name].view(-1)[-7] = torch.nan
        for plan in plans(49):
            y = emulated.outputs(plan, *inputs.values())
            where = y.isnan().any(dim=1)[0]
            assert where.nonzero().flatten().tolist() == [17], (name, plan)
            gw, gu, gk, gv = emulated.gradients(plan, *inputs.values(), grad)
            for x in (gw, gu, *gk[0], *gv[0]):
                assert x.isfinite().sum() >= 23, (name, plan)


def test_emulated_masked_keys_weigh_nothing(emulated: Launcher, bi_wkv_inputs: Make) -> None:
    inputs, _ = bi_wkv_inputs(49, 5.0, batch=1, channels=8)
    inputs["k"][:, 8:40] = -torch.inf
    far = dict(inputs, k=inputs["k"].clamp(min=-1e4))
    expected = bi_wkv_definition(*far.values())
    for plan in plans(49):
        y = emulated.outputs(plan, *inputs.values())
        assert_close({"y": y}, {"y": expected}, 5e-6)


@pytest.mark.parametrize("decay", ["3 /T", "mixed"])
def test_emulated_result_depends_on_no_order(
    emulated: Launcher, bi_wkv_inputs: Make, decay: str
) -> None:
    """Threads that run the other way round between barriers find the same, bit by bit."""
    inputs, grad = bi_wkv_inputs(197, decay, batch=2, channels=40)
    for plan in plans(197):
        runs = []
        for reversed_order in (0, 1, 0):
            emulated.library.vision_emulate_reversed(reversed_order)
            runs.append(value_and_grads(on(emulated, plan), inputs, grad))
        for name, first in runs[0].items():
            assert all((run[name] == first).all() for run in runs[1:]), (name, plan)


def test_emulated_under_the_address_sanitizer(tmp_path: Path, repo_root: Path) -> None:
    path = emulation(tmp_path, "-O1", "-march=native", "-fsanitize=address")
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    code = """
import ctypes, sys, torch
from vision.kernels.bi_wkv.cuda import Launcher, Plan, declare
launcher = Launcher(declare(ctypes.CDLL(sys.argv[1])), None)
for tokens, channels in ((1, 5), (33, 24), (145, 9)):
    for dtype in (torch.float32, torch.bfloat16):
        k, v, gy = torch.randn(3, 2, tokens, channels, dtype=dtype).unbind()
        for w in (0.1, 9.0):
            w, u = torch.full((2, channels), w).unbind()
            for plan in (Plan.resident(tokens), Plan.split(tokens, 8, 2), Plan.split(tokens)):
                launcher.outputs(plan, w, u, k.clone(), v.clone())
                launcher.gradients(plan, w, u, k.clone(), v.clone(), gy.clone())
sys.stdout.write("all cases ran")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=repo_root,
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all cases ran"


# --- nvcc --------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_registers(tmp_path: Path, architecture: str) -> None:
    words = subprocess.run(
        [
            *(str(nvcc.find()), "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin"),
            *("-gencode", f"arch=compute_{architecture},code=sm_{architecture}"),
            *("-o", str(tmp_path / "kernels.cubin"), str(cuda.SOURCE)),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", words)
    assert len(kernels) == 13  # 4 for each dtype, and the carry
    assert max(int(n) for n in re.findall(r"Used (\d+) registers", words)) <= 96
    assert set(re.findall(r"(\d+) bytes stack frame", words)) == {"0"}
    assert set(re.findall(r"(\d+) bytes spill", words)) == {"0"}


KERNEL = '#include "one.h"\nextern "C" int answer(void) { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that compiles quickly, and an empty cache."""
    monkeypatch.setenv(nvcc.CACHE_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "one.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "src" / "kernel.cu"
    path.write_text(KERNEL)
    return path


def _answer(source: Path) -> int:
    return nvcc.load(source, "80").answer()


@needs_nvcc
def test_a_library_is_built_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nvcc.build(source, "80")
    assert _answer(source) == 42
    monkeypatch.setattr(nvcc, "_compile", None)
    assert nvcc.build(source, "80") == path


@needs_nvcc
def test_processes_may_build_at_once(source: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_answer, [source, source], chunksize=1) == [42, 42]
    assert [path.suffix for path in sorted(nvcc.cache_folder().iterdir())] == [".lock", ".so"]


@needs_nvcc
def test_a_change_gives_a_new_library(source: Path) -> None:
    built = {nvcc.build(source, "80"), nvcc.build(source, "90")}
    (source.parent / "one.h").write_text("#define ANSWER 43\n")
    built.add(nvcc.build(source, "80"))
    assert _answer(source) == 43
    source.write_text(KERNEL + "\n")
    built.add(nvcc.build(source, "80"))
    assert len(built) == 4


@needs_nvcc
def test_a_broken_source_gives_the_words_of_the_compiler(source: Path) -> None:
    source.write_text(KERNEL + "int f() { return undeclared_name; }\n")
    with pytest.raises(nvcc.CompileError, match=r'(?s)-gencode.*identifier "undeclared_name"'):
        nvcc.build(source, "80")
    assert not [path for path in nvcc.cache_folder().iterdir() if path.suffix != ".lock"]


@needs_nvcc
def test_a_cache_that_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nvcc.CACHE_VARIABLE, str(source / "below_a_file"))
    with pytest.raises(
        nvcc.CompileError, match=f"below_a_file cannot be.*set {nvcc.CACHE_VARIABLE}"
    ):
        nvcc.build(source, "80")


def test_no_nvcc(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc, "find", lambda: None)
    with pytest.raises(nvcc.CompileError, match="install the CUDA toolkit or set CUDA_HOME"):
        nvcc.build(source, "80")


def test_where_nvcc_and_the_cache_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert nvcc.find() == tmp_path / "bin" / "nvcc"
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert nvcc.find() == tmp_path / "bin" / "nvcc"
    monkeypatch.delenv(nvcc.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvcc.cache_folder() == tmp_path / "rwkv-vision"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nvcc.cache_folder() == tmp_path / ".cache" / "rwkv-vision"


# --- as a backend ------------------------------------------------------------------------------


class _NoGpu:
    """Stands for a GPU whose code cannot be compiled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
        def refuse(*_: Any) -> None:
            raise nvcc.CompileError(words)

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(nvcc, "load", refuse)
        monkeypatch.setattr(OPERATOR, "_reasons", {})
        cuda._library.cache_clear()


def test_a_failed_compilation_is_reported_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    _NoGpu(monkeypatch, "error: no kernel today")
    device = torch.device("cuda", 0)
    assert OPERATOR.resolve("auto", device, torch.float32).name != "cuda"
    with pytest.raises(BackendUnavailableError, match="no kernel today"):
        OPERATOR.resolve("cuda", device, torch.float32)


def test_the_cpu_is_refused() -> None:
    x = torch.zeros(1, 2, 3)
    with pytest.raises(BackendUnavailableError, match="NVIDIA GPUs only"):
        bi_wkv(x[0, 0], x[0, 0], x, x, backend="cuda")


def test_a_refused_launch_raises(emulated: Launcher) -> None:
    # The grid has one dimension of at most 2^31 - 1 blocks.
    call = cuda._Call(width=8, segments=2, batch=1 << 32, tokens=1, channels=1, chunks=1)
    with pytest.raises(cuda.CudaKernelError, match="invalid configuration argument"):
        emulated._launch("vision_bi_wkv", call, [])
