"""Every backend that serves a GPU, against the definitions in float64 on that GPU."""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from vision.kernels import bi_wkv, deform_attn, dispatch, gate, shift_mix, use_backend, wkv6_bi
from vision.kernels.bi_wkv.reference import bi_wkv_definition
from vision.kernels.deform_attn import triton_kernel as deform_attn_triton
from vision.kernels.deform_attn.plain import deform_attn_plain
from vision.kernels.deform_attn.reference import deform_attn_definition
from vision.kernels.gate.plain import gate_plain
from vision.kernels.gate.reference import gate_definition
from vision.kernels.shift_mix.plain import shift_mix_plain
from vision.kernels.shift_mix.reference import shift_mix_definition
from vision.kernels.testing import (
    assert_close,
    assert_no_worse_than_plain,
    nan_filled_empty,
    oracle,
    value_and_grads,
)
from vision.kernels.wkv6 import triton_kernel as wkv6_triton
from vision.kernels.wkv6.reference import wkv6_bi_definition

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")

Make = Callable[..., tuple[dict[str, Tensor], Tensor]]
BACKENDS = ("cuda", "triton", "torch")
TOKENS = (1, 2, 31, 33, 49, 196, 197, 513, 1024)
DECAYS = (-400.0, -80.0, "-5 /T", 0.0, "3 /T", 80.0, "80 /T", "-80 /T", 400.0, "mixed")
KEYS, BONUSES = ("normal", "wide", "spike"), (0.0, 5.0, -5.0, "3 T", "-3 T")
# Every decay meets every number of tokens; keys and bonuses take turns.
MATRIX = [
    (tokens, decay, KEYS[i % 3], BONUSES[i % 5])
    for i, (tokens, decay) in enumerate(itertools.product(TOKENS, DECAYS))
]
TOLERANCE = {"y": 5e-6, "gw": 1e-5, "gu": 1e-5, "gk": 1e-5, "gv": 1e-5}
SIZES = [(1, 1, 5), (3, 5, 24), (7, 3, 200), (14, 14, 192), (1, 50, 6), (40, 25, 130)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend by name; skips where it cannot run."""
    name: str = request.param
    ops = [op for op in dispatch.operators().values() if name in op.backends]
    if not ops:
        pytest.skip(f"no operator has a backend {name!r}")
    reason = ops[0].why_not(ops[0].backends[name], torch.device("cuda"), torch.float32)
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    return name


def floors(tokens: int) -> dict[str, float]:
    """Say what a gradient is the rest of: terms of about 1, for w times a distance."""
    return {"gw": float(tokens), "gu": 1.0, "gk": 1.0, "gv": 1.0}


def named(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """Bind a backend to an operator."""
    return lambda *x: function(*x, backend=backend)


def softmax_form(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV as a softmax in the dtype of the inputs."""
    position = torch.arange(k.shape[1], device=k.device)
    gap = ((position[:, None] - position).abs() - 1)[:, :, None]
    logits = torch.where(gap < 0, u, -gap * w) + k[:, None]
    return torch.einsum("btic,bic->btc", logits.softmax(2), v)


@pytest.mark.parametrize(("tokens", "decay", "keys", "bonus"), MATRIX)
def test_bi_wkv_over_the_whole_range(
    bi_wkv_inputs: Make,
    backend: str,
    tokens: int,
    decay: float | str,
    keys: str,
    bonus: float | str,
) -> None:
    inputs, grad = bi_wkv_inputs(tokens, decay, keys, bonus, device="cuda")
    with nan_filled_empty():
        actual = value_and_grads(named(bi_wkv, backend), inputs, grad)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), TOLERANCE, floors(tokens))


@pytest.mark.parametrize(("batch", "channels"), [(1, 24), (3, 200), (128, 192)])
def test_bi_wkv_of_other_sizes(
    bi_wkv_inputs: Make, backend: str, batch: int, channels: int
) -> None:
    size = {"batch": batch, "channels": channels, "device": "cuda"}
    inputs, grad = bi_wkv_inputs(196, "-5 /T", **size)
    actual = value_and_grads(named(bi_wkv, backend), inputs, grad)
    expected = oracle(bi_wkv_definition, inputs, grad)
    assert_close(actual, expected, TOLERANCE, floors(196))


@pytest.mark.parametrize("decay", ["-5 /T", 0.0, "20 /T", -2.0, 80.0])
def test_bi_wkv_of_many_tokens(bi_wkv_inputs: Make, backend: str, decay: float | str) -> None:
    inputs, grad = bi_wkv_inputs(16384, decay, "wide", batch=1, channels=40, device="cuda")
    actual = value_and_grads(named(bi_wkv, backend), inputs, grad)
    expected = oracle(named(bi_wkv, "torch"), inputs, grad)
    assert_close(actual, expected, TOLERANCE, floors(16384))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 49, 196, 600])
def test_bi_wkv_in_low_precision(
    bi_wkv_inputs: Make, backend: str, tokens: int, dtype: torch.dtype
) -> None:
    size = {"batch": 4, "channels": 20, "device": "cuda"}
    inputs, grad = bi_wkv_inputs(tokens, "-5 /T", dtype=dtype, **size)
    assert_no_worse_than_plain(named(bi_wkv, backend), softmax_form, inputs, grad)


def test_bi_wkv_of_any_strides(bi_wkv_inputs: Make, backend: str) -> None:
    inputs, grad = bi_wkv_inputs(49, "3 /T", channels=33, device="cuda")
    strided = {n: x.transpose(-1, 0).contiguous().transpose(-1, 0) for n, x in inputs.items()}
    strided["w"] = inputs["w"].repeat_interleave(2)[::2]
    actual = value_and_grads(named(bi_wkv, backend), strided, grad.mT.contiguous().mT)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), TOLERANCE, floors(49))


@pytest.mark.parametrize(("batch", "tokens"), [(64, 196), (1, 16384)])
def test_gradients_of_parameters_are_the_same_in_every_run(
    bi_wkv_inputs: Make, backend: str, batch: int, tokens: int
) -> None:
    inputs, grad = bi_wkv_inputs(tokens, "3 /T", batch=batch, channels=192, device="cuda")
    runs = [value_and_grads(named(bi_wkv, backend), inputs, grad) for _ in range(20)]
    assert all(runs[0][n].equal(run[n]) for run in runs for n in runs[0])


@pytest.mark.parametrize("tokens", [196, 1000])
def test_every_tile_shape_of_triton(bi_wkv_inputs: Make, tokens: int) -> None:
    triton_kernel = pytest.importorskip("vision.kernels.bi_wkv.triton_kernel")
    inputs, grad = bi_wkv_inputs(tokens, "3 /T", channels=40, device="cuda")
    expected = oracle(bi_wkv_definition, inputs, grad)
    candidates = [
        triton_kernel._candidates(default, tokens)
        for default in (triton_kernel.FORWARD, triton_kernel.BACKWARD)
    ]
    for forward, backward in zip(*candidates, strict=True):
        with nan_filled_empty():
            y = triton_kernel.forward(**inputs, tiles=forward)
            gw, gu, gk, gv = triton_kernel.backward(**inputs, y=y, gy=grad, tiles=backward)
        actual = {"y": y, "gw": gw, "gu": gu, "gk": gk, "gv": gv}
        assert_close(actual, expected, TOLERANCE, floors(tokens))


def test_bi_wkv_of_more_elements_than_32_bits_count(backend: str) -> None:
    batch, tokens, channels = 700, 4096, 768
    need = 40 * batch * tokens * channels
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of free memory on the GPU")
    k = torch.zeros(batch, tokens, channels, dtype=torch.bfloat16, device="cuda")
    v = torch.zeros_like(k)
    rng = torch.Generator("cuda").manual_seed(0)
    k[-1].normal_(generator=rng)
    v[-1].normal_(generator=rng)
    w = torch.full((channels,), 1e-3, device="cuda")
    y = bi_wkv(w, w, k, v, backend=backend)
    torch.testing.assert_close(y[-1:], bi_wkv(w, w, k[-1:], v[-1:], backend="torch"))
    assert y[:-1].count_nonzero() == 0


def wkv6_inputs(
    tokens: int,
    decay: float | str = "mixed",
    batch: int = 2,
    heads: int = 2,
    size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs of wkv6_bi and a gradient; decays per token of about 1 (-14) to 0 (300)."""
    rng = torch.Generator("cuda").manual_seed(tokens * 1000 + size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device="cuda")

    r, k, v, w, grad = (normal(batch, tokens, heads * size) for _ in range(5))
    w = 4 * w - 2 if decay == "mixed" else w + decay
    inputs = {"r": r, "k": k, "v": v, "w": w, "u": normal(heads, size)}
    return {n: x.to(dtype) for n, x in inputs.items()}, grad.to(dtype)


def wkv6_backend(backend: str) -> Callable[..., Tensor]:
    """Return wkv6_bi by one backend; skips one it does not have."""
    if backend not in dispatch.operators()["wkv6_bi"].backends:
        pytest.skip(f"wkv6_bi has no backend {backend!r}")
    return named(wkv6_bi, backend)


@pytest.mark.parametrize("decay", [-14.0, -2.0, 3.0, 300.0, "mixed"])
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 196])
@pytest.mark.parametrize("size", [20, 32, 64])
def test_wkv6(backend: str, size: int, tokens: int, decay: float | str) -> None:
    inputs, grad = wkv6_inputs(tokens, decay, size=size)
    with nan_filled_empty():
        actual = value_and_grads(wkv6_backend(backend), inputs, grad)
    floor = {"gw": float(grad.abs().amax())}
    assert_close(actual, oracle(wkv6_bi_definition, inputs, grad), 1e-5, floor)


def test_wkv6_of_many_tokens(backend: str) -> None:
    inputs, grad = wkv6_inputs(16384, batch=1)
    actual = value_and_grads(wkv6_backend(backend), inputs, grad)
    assert_close(actual, oracle(named(wkv6_bi, "torch"), inputs, grad), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wkv6_in_low_precision(backend: str, dtype: torch.dtype) -> None:
    inputs, grad = wkv6_inputs(196, -2.0)
    inputs = {n: x if n in "wu" else x.to(dtype) for n, x in inputs.items()}
    actual = value_and_grads(wkv6_backend(backend), inputs, grad.to(dtype))
    tolerance = dict.fromkeys(("y", "gr", "gk", "gv"), 2**-8) | {"gw": 1e-5, "gu": 1e-5}
    assert_close(actual, oracle(wkv6_bi_definition, inputs, grad.to(dtype)), tolerance)


def test_wkv6_is_the_same_in_every_run(backend: str) -> None:
    inputs, grad = wkv6_inputs(600, batch=4)
    runs = [value_and_grads(wkv6_backend(backend), inputs, grad) for _ in range(20)]
    assert all(runs[0][n].equal(run[n]) for run in runs for n in runs[0])


def test_every_tile_shape_of_triton_for_wkv6() -> None:
    pytest.importorskip("triton")
    inputs, grad = wkv6_inputs(100)
    expected = oracle(wkv6_bi_definition, inputs, grad)
    candidates = [
        wkv6_triton._candidates(default) for default in (wkv6_triton.FORWARD, wkv6_triton.BACKWARD)
    ]
    for forward, backward in zip(*candidates, strict=True):
        with nan_filled_empty():
            y = wkv6_triton.forward(**inputs, tiles=forward)
            grads = wkv6_triton.backward(**inputs, gy=grad, tiles=backward)
        actual = {"y": y, **{f"g{n}": g for n, g in zip(inputs, grads, strict=True)}}
        assert_close(actual, expected, 1e-5)


# Maps of an image of 512 pixels, and awkward ones.
PYRAMID, AWKWARD = [(64, 64), (32, 32), (16, 16)], [(1, 1), (7, 3), (1, 33), (40, 1)]


def deform_attn_inputs(
    shapes: list[tuple[int, int]], sizes: tuple[int, int, int, int, int], beyond: float = 0.3
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs of deform_attn and a gradient.

    Args:
        shapes: of the levels.
        sizes: batch, queries, heads, channels of a head, points.
        beyond: how far samples lie outside of the map, in its sides.
    """
    batch, queries, heads, channels, points = sizes
    rng = torch.Generator("cuda").manual_seed(sum(sizes))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device="cuda")

    spread = (batch, queries, heads, len(shapes), points)
    uniform = torch.rand((*spread, 2), generator=rng, device="cuda", dtype=torch.float64)
    # A hundredth of a pixel away from centres, where gradients jump.
    sides = torch.tensor([(w, h) for h, w in shapes], device="cuda").double()[:, None]
    pixels = (uniform * (1 + 2 * beyond) - beyond) * sides - 0.5
    pixels += 0.02 * ((pixels - pixels.round()).abs() < 0.01)
    inputs = {
        "value": normal(batch, sum(map(math.prod, shapes)), heads, channels),
        "locations": ((pixels + 0.5) / sides).float(),
        "weights": normal(*spread),
    }
    return inputs, normal(batch, queries, heads * channels)


def of_maps(
    function: Callable[..., Tensor], shapes: list[tuple[int, int]], **settings: object
) -> Callable[..., Tensor]:
    """Bind the shapes of the levels to a form of deform_attn."""
    return lambda *x: function(*x, shapes, **settings)


def deform_attn_by(backend: str, shapes: list[tuple[int, int]]) -> Callable[..., Tensor]:
    """Return deform_attn by one backend; skips one it does not have."""
    if backend not in dispatch.operators()["deform_attn"].backends:
        pytest.skip(f"deform_attn has no backend {backend!r}")
    return of_maps(deform_attn, shapes, backend=backend)


@contextmanager
def deterministic() -> Iterator[None]:
    """Ask torch for deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("shapes", "sizes"),
    [
        (PYRAMID, (2, 1024, 6, 64, 4)),
        (PYRAMID[1:2], (2, 5376, 6, 32, 4)),
        (AWKWARD, (1, 1, 1, 1, 1)),
        (AWKWARD, (3, 50, 5, 20, 3)),
        (AWKWARD[:1], (1, 33, 2, 300, 2)),
    ],
)
def test_deform_attn(
    backend: str, shapes: list[tuple[int, int]], sizes: tuple[int, int, int, int, int]
) -> None:
    ours = deform_attn_by(backend, shapes)
    for beyond in (0.0, 0.3, 3.0):
        inputs, grad = deform_attn_inputs(shapes, sizes, beyond)
        expected = oracle(of_maps(deform_attn_definition, shapes), inputs, grad)
        assert_close(value_and_grads(ours, inputs, grad), expected, 2e-5, floor=1.0)
        with nan_filled_empty():
            actual = value_and_grads(ours, inputs, grad)
        assert_close(actual, expected, 2e-5, floor=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deform_attn_in_low_precision(backend: str, dtype: torch.dtype) -> None:
    inputs, grad = deform_attn_inputs(PYRAMID, (2, 300, 6, 32, 4))
    locations = inputs.pop("locations")  # half precision has too few digits for them
    by_backend = deform_attn_by(backend, PYRAMID)

    def plain(value: Tensor, weights: Tensor) -> Tensor:
        wide = locations if value.dtype != torch.float64 else locations.double()
        return deform_attn_plain(value, wide, weights, PYRAMID)

    def ours(value: Tensor, weights: Tensor) -> Tensor:
        return by_backend(value, locations, weights)

    inputs = {n: x.to(dtype) for n, x in inputs.items()}
    assert_no_worse_than_plain(ours, plain, inputs, grad.to(dtype))


def test_deform_attn_of_any_strides(backend: str) -> None:
    inputs, grad = deform_attn_inputs(AWKWARD, (2, 30, 3, 20, 2))
    strided = {n: x.transpose(0, 2).contiguous().transpose(0, 2) for n, x in inputs.items()}
    ours = deform_attn_by(backend, AWKWARD)
    actual = value_and_grads(ours, strided, grad.mT.contiguous().mT)
    expected = oracle(of_maps(deform_attn_definition, AWKWARD), inputs, grad)
    assert_close(actual, expected, 2e-5, floor=1.0)


def test_deform_attn_is_the_same_in_every_run_where_it_says_so() -> None:
    ours = deform_attn_by("triton", PYRAMID)
    inputs, grad = deform_attn_inputs(PYRAMID, (2, 5000, 6, 32, 4))
    first, *others = (value_and_grads(ours, inputs, grad) for _ in range(20))
    assert all(x.equal(run[n]) for run in others for n, x in first.items() if n != "gvalue")
    with deterministic():
        first, *others = (value_and_grads(ours, inputs, grad) for _ in range(20))
    assert all(x.equal(run[n]) for run in others for n, x in first.items())


@pytest.mark.parametrize("size", [20, 64, 200])
def test_every_tile_shape_of_triton_for_deform_attn(size: int) -> None:
    pytest.importorskip("triton")
    inputs, grad = deform_attn_inputs(AWKWARD, (2, 100, 3, size, 2))
    expected = oracle(of_maps(deform_attn_definition, AWKWARD), inputs, grad)
    for tiles in deform_attn_triton._CANDIDATES:
        with nan_filled_empty():
            y = deform_attn_triton.forward(*inputs.values(), AWKWARD, tiles)
            grads = deform_attn_triton.backward(*inputs.values(), grad, AWKWARD, tiles)
        actual = {"y": y, **{f"g{n}": g for n, g in zip(inputs, grads, strict=True)}}
        assert_close(actual, expected, 2e-5, floor=1.0)


@pytest.mark.parametrize(("height", "width", "channels"), SIZES)
@pytest.mark.parametrize(("copies", "pixels"), [(1, 1), (3, 1), (8, 2), (2, 99)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shift_mix(
    backend: str,
    height: int,
    width: int,
    channels: int,
    copies: int,
    pixels: int,
    dtype: torch.dtype,
) -> None:
    edges = [0, *(channels * i // 5 for i in range(1, 5))]
    rng = torch.Generator("cuda").manual_seed(channels)
    shape = (2, height * width, channels)
    x = torch.randn(shape, generator=rng, device="cuda").to(dtype)
    mu = torch.rand(copies, channels, generator=rng, device="cuda").to(dtype)
    grad = torch.randn(copies, *shape, generator=rng, device="cuda").to(dtype)

    def stacked(form: Callable[..., list[Tensor]], *more: object, **named: object) -> Callable:
        return lambda x, mu: torch.stack(form(x, mu, *more, **named))

    ours = stacked(shift_mix, (height, width), pixels=pixels, edges=edges, backend=backend)
    settings = (height, width, pixels, edges)
    inputs = {"x": x, "mu": mu}
    if dtype == torch.float32:
        with nan_filled_empty():
            actual = value_and_grads(ours, inputs, grad)
        assert_close(actual, oracle(stacked(shift_mix_definition, *settings), inputs, grad), 1e-6)
    else:
        assert_no_worse_than_plain(ours, stacked(shift_mix_plain, *settings), inputs, grad)


@pytest.mark.parametrize("shape", [(), (5,), (3, 196, 24), (2, 1025, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gate(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rng = torch.Generator("cuda").manual_seed(len(shape))
    r, y, grad = (torch.randn(shape, generator=rng, device="cuda").to(dtype) for _ in range(3))
    inputs, ours = {"r": r * 20, "y": y}, named(gate, backend)
    if dtype == torch.float32:
        with nan_filled_empty():
            actual = value_and_grads(ours, inputs, grad)
        assert_close(actual, oracle(gate_definition, inputs, grad), 1e-6)
    else:
        assert_no_worse_than_plain(ours, gate_plain, inputs, grad)


@pytest.mark.parametrize("tokens", [196, 1024])
def test_a_cuda_graph_replays_the_kernels(bi_wkv_inputs: Make, backend: str, tokens: int) -> None:
    if backend == "torch":
        pytest.skip("the torch form asks the GPU for the range of w")
    inputs, grad = bi_wkv_inputs(tokens, "3 /T", channels=64, device="cuda")
    with use_backend(backend):
        value_and_grads(bi_wkv, inputs, grad)  # compiles, and chooses the tiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = value_and_grads(bi_wkv, inputs, grad)
        inputs["k"].neg_()
        graph.replay()
        expected = value_and_grads(bi_wkv, inputs, grad)
    assert {n for n, x in expected.items() if not captured[n].equal(x)} == set()


def test_the_device_of_the_tensors_is_used(bi_wkv_inputs: Make, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs, grad = bi_wkv_inputs(49, "3 /T", device="cuda:1")
    assert torch.cuda.current_device() == 0
    actual = value_and_grads(named(bi_wkv, backend), inputs, grad)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), TOLERANCE, floors(49))
