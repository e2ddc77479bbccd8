"""The compiled CPU kernels: instruction sets, threads, extremes, memory, how they are built."""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vision.kernels import BackendUnavailableError, bi_wkv, cpu, gate, shift_mix, wkv6_bi
from vision.kernels.bi_wkv import OPERATOR
from vision.kernels.bi_wkv.reference import bi_wkv_definition
from vision.kernels.gate.reference import gate_definition
from vision.kernels.shift_mix.reference import shift_mix_definition
from vision.kernels.testing import assert_close, nan_filled_empty, oracle, value_and_grads
from vision.kernels.wkv6.reference import wkv6_bi_definition

KINDS = ("avx512", "avx2", "generic")
scan = functools.partial(bi_wkv, backend="cpu")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine has, in use during a test."""
    before = cpu.instruction_set()
    if cpu.library().vision_cpu_use(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    cpu.use_instruction_set(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(
    batch: int, tokens: int, channels: int, decay: float, bonus: float = 1.0, spread: float = 1.0
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs and a gradient; `decay` and `bonus` are those of a whole sequence."""
    rng = torch.Generator().manual_seed(batch * tokens + channels)
    normal = functools.partial(torch.randn, generator=rng)
    inputs = {
        "w": decay * (1 + 0.1 * normal(channels)) / tokens,
        "u": bonus * normal(channels) / tokens,
        "k": spread * normal(batch, tokens, channels),
        "v": normal(batch, tokens, channels),
    }
    return inputs, normal(batch, tokens, channels)


def floors(batch: int, tokens: int) -> dict[str, float]:
    """Say what a gradient is the rest of: terms of about 1, for w times a distance.

    The terms of a sequence cancel where one token outweighs all others; sequences add up at random.
    """
    items = batch**0.5
    return {"gw": items * tokens, "gu": items, "gk": 1.0, "y": 0.0, "gv": 1.0}


@pytest.mark.parametrize("channels", [1, 16, 24, 200])
@pytest.mark.parametrize(("tokens", "decay"), [(1, 3.0), (31, -5.0), (33, 80.0), (197, -80.0)])
def test_every_instruction_set(kind: str, tokens: int, decay: float, channels: int) -> None:
    inputs, grad = make(3, tokens, channels, decay, spread=6)
    with nan_filled_empty():
        actual = value_and_grads(scan, inputs, grad)
    expected = oracle(bi_wkv_definition, inputs, grad)
    tolerance = {"y": 5e-6, "gw": 1e-5, "gu": 1e-5, "gk": 1e-5, "gv": 1e-5}
    assert_close(actual, expected, tolerance, floors(3, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_instruction_set_rounds_alike(kind: str, dtype: torch.dtype) -> None:
    inputs, grad = make(2, 50, 40, 3.0)
    inputs = {n: x if n in "wu" else x.to(dtype) for n, x in inputs.items()}
    actual = value_and_grads(scan, inputs, grad.to(dtype))
    wide = {n: x.float() for n, x in inputs.items()}
    exact = value_and_grads(scan, wide, grad.to(dtype).float())
    for name in ("y", "gk", "gv"):
        one = exact[name].to(dtype)
        gap = (actual[name].float() - one.float()).abs()
        # A value that lies on the border of two roundings may fall to either side.
        assert (gap > 0).float().mean() < 0.01
        assert (gap <= one.abs().float() * torch.finfo(dtype).eps + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_exact(kind: str, dtype: torch.dtype) -> None:
    # All 65,536 numbers pass the gate at r = +inf, where it multiplies by 1.
    y = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = gate(torch.full_like(y, torch.inf), y, backend="cpu")
    nan = y.isnan()
    assert out[nan].isnan().all()
    assert (out[~nan].view(torch.int16) == y[~nan].view(torch.int16)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_nearest(kind: str, dtype: torch.dtype) -> None:
    # With u = 0 and two equal keys, y is the mean of two values: often halfway between numbers.
    rng = torch.Generator().manual_seed(0)
    v = torch.randn(1, 2, 4096, generator=rng) * torch.logspace(-7, 4, 4096)
    v = v.to(dtype)
    zero = torch.zeros(4096)
    y = bi_wkv(zero, zero, torch.zeros_like(v), v, backend="cpu")
    expected = v.float().mean(1, keepdim=True).to(dtype).expand_as(y)
    assert (y == expected).float().mean() > 0.999


@pytest.mark.parametrize("width", [3, 17, 64])
def test_shift_mix_and_gate_of_every_instruction_set(kind: str, width: int) -> None:
    rng = torch.Generator().manual_seed(width)
    x, r = (torch.randn(2, 15, width, generator=rng) for _ in range(2))
    mu = torch.rand(3, width, generator=rng)
    grad = torch.randn(3, 2, 15, width, generator=rng)
    edges = [0, width // 4, width // 2, width // 2, 3 * width // 4]

    def mixed(x: Tensor, mu: Tensor) -> Tensor:
        return torch.stack(shift_mix(x, mu, (3, 5), edges=edges, backend="cpu"))

    def definition(x: Tensor, mu: Tensor) -> Tensor:
        return torch.stack(shift_mix_definition(x, mu, 3, 5, 1, edges))

    inputs = {"x": x, "mu": mu}
    with nan_filled_empty():
        actual = value_and_grads(mixed, inputs, grad)
    assert_close(actual, oracle(definition, inputs, grad), 1e-6)
    inputs = {"r": 4 * r, "y": x}
    with nan_filled_empty():
        actual = value_and_grads(functools.partial(gate, backend="cpu"), inputs, grad[0])
    assert_close(actual, oracle(gate_definition, inputs, grad[0]), 1e-6)


@pytest.mark.parametrize("decay", [-14.0, -1.0, 300.0])
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (7, 64), (66, 33)])
def test_wkv6_of_every_instruction_set(kind: str, tokens: int, size: int, decay: float) -> None:
    inputs = make_wkv6(tokens, size, decay)
    with nan_filled_empty():
        y = wkv6_bi(**inputs, backend="cpu")
    assert_close({"y": y}, {"y": wkv6_bi_definition(**inputs)}, 2e-6)


def make_wkv6(tokens: int, size: int, decay: float) -> dict[str, Tensor]:
    """Make inputs of two items with three heads."""
    rng = torch.Generator().manual_seed(tokens + size)
    inputs = {n: torch.randn(2, tokens, 3 * size, generator=rng) for n in "rkvw"}
    return inputs | {"w": inputs["w"] + decay, "u": torch.randn(3, size, generator=rng)}


@pytest.mark.parametrize("scale", [400.0, 1000.0])
def test_large_decays_per_token_stay_finite_and_exact(kind: str, scale: float) -> None:
    inputs, grad = make(2, 49, 24, 1.0, spread=10)
    signs = torch.where(torch.arange(24) % 3 == 0, -1.0, 1.0)
    inputs["w"] = scale * signs * torch.linspace(0.01, 1, 24)
    inputs["u"] = torch.linspace(-3 * 49, 3 * 49, 24)
    actual = value_and_grads(scan, inputs, grad)
    expected = oracle(bi_wkv_definition, inputs, grad)
    assert_close(actual, expected, 1e-5, floors(2, 49))


def test_long_sequences_keep_their_accuracy() -> None:
    inputs, grad = make(1, 16384, 16, 8.0)
    actual = value_and_grads(scan, inputs, grad)
    wide = {n: x.double() for n, x in inputs.items()}
    expected = value_and_grads(functools.partial(bi_wkv, backend="torch"), wide, grad.double())
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("shape", [(1, 1000, 40), (3, 130, 300), (2, 1, 17)])
def test_threads_do_not_matter(threads: None, shape: tuple[int, int, int]) -> None:
    inputs, grad = make(*shape, 3.0)
    results = []
    for count in (1, 3, 7):
        torch.set_num_threads(count)
        # Enough for cpu.c to wake a second thread.
        assert shape == (2, 1, 17) or inputs["k"].numel() >= 2 << 14
        results.append(value_and_grads(scan, inputs, grad))
    for other in results[1:]:
        for name in ("y", "gk", "gv"):
            assert torch.equal(other[name], results[0][name])
        for name in ("gw", "gu"):
            torch.testing.assert_close(other[name], results[0][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [24, 64])
def test_threads_do_not_matter_to_wkv6(threads: None, size: int) -> None:
    inputs = make_wkv6(50, size, -2.0)
    results = []
    for count in (1, 2, 7):  # heads on one thread each, and heads cut by their columns
        torch.set_num_threads(count)
        results.append(wkv6_bi(**inputs, backend="cpu"))
    assert all(torch.equal(y, results[0]) for y in results)


def test_gradients_of_parameters_are_the_same_every_time(threads: None) -> None:
    torch.set_num_threads(4)
    inputs, grad = make(2, 400, 48, 3.0)
    mu = torch.rand(3, 48)

    def mixed(x: Tensor, mu: Tensor) -> Tensor:
        return torch.stack(shift_mix(x, mu, (20, 20), edges=[0, 12, 24, 36, 48], backend="cpu"))

    first = value_and_grads(scan, inputs, grad)
    first_mu = value_and_grads(mixed, {"x": inputs["k"], "mu": mu}, grad.expand(3, -1, -1, -1))
    for _ in range(20):
        again = value_and_grads(scan, inputs, grad)
        assert all(torch.equal(again[name], first[name]) for name in first)
        again = value_and_grads(mixed, {"x": inputs["k"], "mu": mu}, grad.expand(3, -1, -1, -1))
        assert all(torch.equal(again[name], first_mu[name]) for name in first_mu)


def _keep(inputs: dict[str, Tensor], grad: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the arguments of a backward pass, and what the forward pass kept for it."""
    y, kept = OPERATOR.backends["cpu"].keeping(*inputs.values())
    return [*inputs.values(), y, grad], kept


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 197, 1), (3, 130, 24), (1, 64, 530), (1, 1, 16)])
def test_what_the_forward_pass_keeps_spares_work_only(
    kind: str, threads: None, shape: tuple[int, int, int], dtype: torch.dtype, count: int
) -> None:
    torch.set_num_threads(count)
    inputs, grad = make(*shape, 3.0)
    inputs = {n: x if n in "wu" else x.to(dtype) for n, x in inputs.items()}
    arguments, kept = _keep(inputs, grad.to(dtype))
    backward = OPERATOR.backends["cpu"].backward
    expected = backward(*arguments)
    again = (*backward(*arguments, kept=kept), *backward(*arguments, kept=kept))
    assert all(torch.equal(a, b) for a, b in zip(again, expected * 2, strict=True))
    kept[64:] = 255  # sums that are not a number: it is read
    spoilt = backward(*arguments, kept=kept)
    assert not all(torch.equal(a, b) for a, b in zip(spoilt, expected, strict=True))


@pytest.mark.parametrize("how", ["short", "unaligned", "steep", "of another set"])
def test_what_does_not_fit_is_not_kept(how: str) -> None:
    inputs, grad = make(2, 100, 32, 3.0)
    if how == "steep":
        inputs["w"][3] = 2.0  # needs shorter segments, so more of them
    arguments, kept = _keep(inputs, grad)
    backward = OPERATOR.backends["cpu"].backward
    expected = backward(*arguments)
    if how == "short":
        kept = kept[:-1]
    elif how == "unaligned":
        kept = torch.cat([kept, kept])[8:]
    elif how == "steep":
        kept[64:] = 255
    else:
        used = cpu.instruction_set()
        if used == "generic":
            pytest.skip("this processor has the generic instruction set only")
        cpu.use_instruction_set("generic")
        try:
            _, kept = _keep(inputs, grad)
        finally:
            cpu.use_instruction_set(used)
    found = backward(*arguments, kept=kept)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_training_step_keeps_what_its_backward_pass_takes() -> None:
    inputs, _ = make(1, 70, 16, 3.0)
    leaves = [x.requires_grad_() for x in inputs.values()]
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        scan(*leaves)
    assert [x.numel() for x in saved if x.dtype == torch.uint8] == [64 + 28 * 2 * 16]


def test_float64_is_served_by_torch() -> None:
    inputs, _ = make(1, 9, 16, 3.0)
    wide = [x.double() for x in inputs.values()]
    assert OPERATOR.resolve("auto", torch.device("cpu"), torch.float64).name == "torch"
    torch.testing.assert_close(bi_wkv(*wide), bi_wkv_definition(*wide), rtol=1e-12, atol=1e-12)
    with pytest.raises(BackendUnavailableError, match=r"torch\.float32 only"):
        bi_wkv(*wide, backend="cpu")


# --- how it is built ---------------------------------------------------------------------------


def test_without_a_compiled_library_torch_serves(tmp_path: Path, repo_root: Path) -> None:
    shutil.copytree(
        repo_root / "kernels",
        tmp_path / "vision" / "kernels",
        ignore=shutil.ignore_patterns("_cpu*.so", "_cpu*.pyd", "__pycache__"),
    )
    (tmp_path / "vision" / "__init__.py").touch()
    code = (
        "import torch; from vision.kernels import bi_wkv\n"
        "x = torch.randn(1, 5, 16); y = bi_wkv(x[0, 0], x[0, 0], x, x); print(tuple(y.shape))\n"
        "bi_wkv(x[0, 0], x[0, 0], x, x, backend='cpu')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(1, 5, 16)"
    assert "BackendUnavailableError" in done.stderr
    assert "C code was not compiled" in done.stderr
    assert "setup.py build_ext --inplace" in done.stderr


def test_a_library_of_other_sources_is_refused(tmp_path: Path, repo_root: Path) -> None:
    shutil.copytree(repo_root / "kernels", tmp_path / "vision" / "kernels")
    (tmp_path / "vision" / "__init__.py").touch()
    with (tmp_path / "vision" / "kernels" / "csrc" / "cpu.c").open("a") as file:
        file.write("/* changed */\n")
    done = subprocess.run(
        [sys.executable, "-m", "vision.kernels", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "was compiled from other sources" in done.stdout


def test_a_broken_library_is_named(tmp_path: Path, repo_root: Path) -> None:
    shutil.copytree(repo_root / "kernels", tmp_path / "vision" / "kernels")
    (tmp_path / "vision" / "__init__.py").touch()
    library = tmp_path / "vision" / "kernels" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.write_bytes(b"not a library")
    done = subprocess.run(
        [sys.executable, "-m", "vision.kernels", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"{library.name} cannot be loaded" in done.stdout


def _copy_to_build(repo_root: Path, folder: Path) -> None:
    for name in ("setup.py", "README.md", "pyproject.toml"):
        shutil.copy(repo_root / name, folder)
    ignore = shutil.ignore_patterns("_cpu*.so", "__pycache__")
    shutil.copytree(repo_root / "kernels", folder / "kernels", ignore=ignore)
    (folder / "vision").mkdir()
    (folder / "vision" / "kernels").symlink_to("../kernels")
    for name in ("__init__.py", "version.py"):
        shutil.copy(repo_root / "vision" / name, folder / "vision")


def test_an_installation_without_a_compiler_goes_on(tmp_path: Path, repo_root: Path) -> None:
    _copy_to_build(repo_root, tmp_path)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, "CC": "no-such-compiler", "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "kernels").glob("_cpu*"))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build with")
def test_no_access_out_of_bounds(tmp_path: Path, repo_root: Path) -> None:
    _copy_to_build(repo_root, tmp_path)
    runtime = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("gcc has no address sanitizer here")
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -fopenmp -fwrapv"
    sources = sorted(map(str, (repo_root / "kernels" / "csrc").glob("*.c")))
    library, digest = tmp_path / "checked.so", '-DVISION_SOURCE_DIGEST="checked"'
    command = f"gcc {flags} -fPIC -shared -o {library} {digest} {' '.join(sources)} -lm"
    subprocess.run(command.split(), check=True)
    case = repo_root / "tests" / "kernels" / "sanitized_cases.py"
    done = subprocess.run(
        [sys.executable, str(case), str(library)],
        cwd=repo_root,
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all cases ran" in done.stdout
