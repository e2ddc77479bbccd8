"""Values and gradients of shift_mix against the definition in float64, for every backend."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision.kernels import BackendUnavailableError, shift_mix
from vision.kernels.shift_mix import OPERATOR
from vision.kernels.shift_mix.plain import shift_mix_plain
from vision.kernels.shift_mix.reference import shift_mix_definition
from vision.kernels.testing import (
    assert_close,
    assert_no_worse_than_plain,
    nan_filled_empty,
    oracle,
    value_and_grads,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
HW, EDGES = (3, 4), [0, 2, 5, 6, 9]
SERVED = [
    (backend.name, dtype)
    for backend in OPERATOR.backends.values()
    for dtype in TOLERANCE
    if backend.dtypes is None or dtype in backend.dtypes
]
every_backend = pytest.mark.parametrize("backend", list(OPERATOR.backends))
every_backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), SERVED)
float64_backends = [name for name, dtype in SERVED if dtype == torch.float64]


def require(backend: str) -> None:
    """Skip where a backend does not run on the CPU of this machine."""
    reason = OPERATOR.why_not(OPERATOR.backends[backend], torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")


def widest(backend: str) -> torch.dtype:
    """Return float64 if a backend computes in it, else float32; skip where it does not run."""
    require(backend)
    return torch.float64 if backend in float64_backends else torch.float32


def make(
    hw: tuple[int, int] = HW,
    channels: int = 11,
    copies: int = 3,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs and the gradient of the stacked outputs, (N, B, T, C)."""
    rng = torch.Generator().manual_seed(channels * 100 + copies)
    shape = (batch, hw[0] * hw[1], channels)
    x = torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)
    mu = torch.rand(copies, channels, generator=rng, dtype=torch.float64).to(dtype)
    grad = torch.randn(copies, *shape, generator=rng, dtype=torch.float64).to(dtype)
    return {"x": x, "mu": mu}, grad


def stacked(
    backend: str, hw: tuple[int, int] = HW, pixels: int = 1, edges: list[int] = EDGES
) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, mu: torch.stack(
        shift_mix(x, mu, hw, pixels=pixels, edges=edges, backend=backend)
    )


def definition(
    hw: tuple[int, int] = HW, pixels: int = 1, edges: list[int] = EDGES
) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, mu: torch.stack(shift_mix_definition(x, mu, *hw, pixels, edges))


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare with terms of about 1 in mind: a sum of few of them may cancel."""
    assert_close(actual, expected, tolerance, floor=1.0)


def test_the_definition_is_the_formula() -> None:
    (h, w), pixels, channels, edges = (3, 4), 2, 6, [0, 1, 2, 3, 5]
    inputs, _ = make((h, w), channels)
    x, mu = inputs.values()
    steps = [(0, -1), (0, 1), (-1, 0), (1, 0), (1, 0), (0, 0)]  # of each channel
    expected = torch.zeros(3, *x.shape, dtype=torch.float64)
    for row in range(h):
        for column in range(w):
            for c, (down, across) in enumerate(steps):
                i, j = row + pixels * down, column + pixels * across
                inside = 0 <= i < h and 0 <= j < w
                own = x[:, row * w + column, c]
                other = x[:, i * w + j, c] if inside else torch.zeros_like(own)
                for n in range(3):
                    mixed = other + (own - other) * mu[n, c]
                    expected[n, :, row * w + column, c] = mixed
    actual = definition((h, w), pixels, edges)(x, mu)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


@st.composite
def channels_and_edges(draw: st.DrawFn) -> tuple[int, list[int]]:
    channels = draw(st.integers(1, 70))
    inner = draw(st.lists(st.integers(0, channels), min_size=4, max_size=4))
    return channels, [0, *sorted(inner)]


@every_backend_and_dtype
@settings(max_examples=40, deadline=None)
@given(
    hw=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    batch=st.integers(1, 3),
    copies=st.integers(1, 4),
    pixels=st.integers(1, 5),
    split=channels_and_edges(),
)
def test_any_shape(
    backend: str,
    dtype: torch.dtype,
    hw: tuple[int, int],
    batch: int,
    copies: int,
    pixels: int,
    split: tuple[int, list[int]],
) -> None:
    require(backend)
    channels, edges = split
    inputs, grad = make(hw, channels, copies, batch, dtype)
    with nan_filled_empty():
        actual = value_and_grads(stacked(backend, hw, pixels, edges), inputs, grad)
    assert {x.dtype for x in actual.values()} == {dtype}
    # The gradient of mu sums over all tokens.
    floor = {"y": 1.0, "gx": 1.0, "gmu": math.sqrt(batch * hw[0] * hw[1])}
    expected = oracle(definition(hw, pixels, edges), inputs, grad)
    assert_close(actual, expected, TOLERANCE[dtype], floor)


@every_backend_and_dtype
@pytest.mark.parametrize(
    ("hw", "channels", "pixels", "edges"),
    [
        ((1, 1), 7, 1, [0, 1, 3, 4, 6]),
        ((1, 9), 8, 1, [0, 8, 8, 8, 8]),
        ((9, 1), 8, 2, [0, 0, 0, 4, 8]),
        ((3, 4), 8, 5, [0, 2, 4, 6, 8]),
        ((3, 4), 5, 1, [0, 0, 0, 0, 0]),
        ((14, 14), 192, 1, [0, 48, 96, 144, 192]),
    ],
    ids=["one token", "sequence", "column", "all out of the grid", "no shift", "vrwkv tiny"],
)
def test_particular_shapes(
    backend: str,
    dtype: torch.dtype,
    hw: tuple[int, int],
    channels: int,
    pixels: int,
    edges: list[int],
) -> None:
    require(backend)
    inputs, grad = make(hw, channels, dtype=dtype)
    with nan_filled_empty():
        actual = value_and_grads(stacked(backend, hw, pixels, edges), inputs, grad)
    same(actual, oracle(definition(hw, pixels, edges), inputs, grad), TOLERANCE[dtype])


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pixels", [1, 4])
def test_low_precision(backend: str, dtype: torch.dtype, pixels: int) -> None:
    require(backend)
    inputs, grad = make((5, 6), 21, dtype=dtype)
    ours = stacked(backend, (5, 6), pixels)

    def plain(x: Tensor, mu: Tensor) -> Tensor:
        return torch.stack(shift_mix_plain(x, mu, 5, 6, pixels, EDGES))

    assert_no_worse_than_plain(ours, plain, inputs, grad)


@every_backend
def test_dtypes_of_autocast(backend: str) -> None:
    require(backend)
    inputs, grad = make()
    inputs = {"x": inputs["x"].bfloat16(), "mu": inputs["mu"].float()}
    actual = value_and_grads(stacked(backend), inputs, grad.bfloat16())
    assert {n: x.dtype for n, x in actual.items()} == {
        "y": torch.bfloat16,
        "gx": torch.bfloat16,
        "gmu": torch.float32,
    }
    expected = oracle(definition(), inputs, grad.bfloat16())
    assert_close(actual, expected, {"y": 2**-8, "gx": 2**-7, "gmu": 1e-5})


@every_backend
@pytest.mark.parametrize(
    "layout", ["channels first", "every other token", "some channels", "one item for all"]
)
def test_strides_do_not_matter(backend: str, layout: str) -> None:
    dtype = widest(backend)
    inputs, grad = make(dtype=dtype)
    x, mu = inputs.values()
    if layout == "channels first":
        base, view = x.transpose(1, 2).contiguous(), lambda b: b.transpose(1, 2)
    elif layout == "every other token":
        base, view = x.repeat_interleave(2, 1), lambda b: b[:, ::2]
    elif layout == "some channels":
        base, view = torch.cat([x, x, x], 2), lambda b: b[..., 11:22]
    else:
        base, view = x[:1].clone(), lambda b: b.expand(2, -1, -1)
    wide = torch.cat([mu, mu], 1)
    assert not view(base).is_contiguous()

    def viewed(function: Callable[[Tensor, Tensor], Tensor]) -> Callable:
        return lambda base, wide: function(view(base), wide[:, 11:])

    grad = grad.transpose(1, 3).contiguous().transpose(1, 3)
    strided = {"base": base, "wide": wide}
    actual = value_and_grads(viewed(stacked(backend)), strided, grad)
    same(actual, oracle(viewed(definition()), strided, grad), TOLERANCE[dtype])


@every_backend
def test_expanded_gradients_and_proportions(backend: str) -> None:
    dtype = widest(backend)
    inputs, _ = make(dtype=dtype)
    inputs["mu"] = inputs["mu"][:1].clone()

    def total(function: Callable[[Tensor, Tensor], Tensor]) -> Callable:
        # Autograd hands a gradient with strides of 0 to what is summed.
        return lambda x, mu: sum(y.sum() for y in function(x, mu.expand(3, -1)))

    actual = value_and_grads(total(stacked(backend)), inputs, torch.tensor(1.0))
    expected = oracle(total(definition()), inputs, torch.tensor(1.0))
    del expected["y"]  # The sum of all is torch's own.
    same(actual, expected, TOLERANCE[dtype])


@every_backend
@pytest.mark.parametrize("used", [0, 1, 2])
def test_an_output_that_nobody_uses(backend: str, used: int) -> None:
    dtype = widest(backend)
    inputs, grad = make(dtype=dtype)

    def one(x: Tensor, mu: Tensor) -> Tensor:
        return shift_mix(x, mu, HW, edges=EDGES, backend=backend)[used]

    def one_by_definition(x: Tensor, mu: Tensor) -> Tensor:
        return definition()(x, mu)[used]

    actual = value_and_grads(one, inputs, grad[used])
    same(actual, oracle(one_by_definition, inputs, grad[used]), TOLERANCE[dtype])
    assert (actual["gmu"][[n for n in range(3) if n != used]] == 0).all()


@every_backend
@pytest.mark.parametrize("needs", ["x", "mu"])
def test_a_gradient_that_nobody_asks_for(backend: str, needs: str) -> None:
    dtype = widest(backend)
    inputs, grad = make(dtype=dtype)
    expected = oracle(definition(), inputs, grad)[f"g{needs}"]
    inputs[needs].requires_grad_()
    (actual,) = torch.autograd.grad(stacked(backend)(**inputs), inputs[needs], grad)
    same({needs: actual}, {needs: expected}, TOLERANCE[dtype])


@every_backend
@pytest.mark.parametrize("token", [0, 5, 11], ids=["first", "inner", "last"])
def test_nan_stays_where_it_belongs(backend: str, token: int) -> None:
    dtype = widest(backend)
    function = stacked(backend, (3, 4), 1, [0, 2, 4, 6, 8])
    x, mu = make(channels=8, dtype=dtype)[0].values()
    touched = torch.zeros(12, 8, dtype=torch.bool)
    for c, (down, across) in enumerate(d for d in ((0, 1), (0, -1), (1, 0), (-1, 0)) for _ in "ab"):
        # The token itself, and the one that has it as neighbour.
        i, j = token // 4 + down, token % 4 + across
        touched[token, c] = True
        if 0 <= i < 3 and 0 <= j < 4:
            touched[i * 4 + j, c] = True
    poisoned = x.clone()
    poisoned[0, token] = float("nan")
    y = function(poisoned, mu)
    assert (y[:, 0].isnan() == touched).all()
    assert y[:, 1].isfinite().all()


@every_backend
@pytest.mark.parametrize("token", [0, 5, 11], ids=["first", "inner", "last"])
def test_nan_of_a_gradient_stays_where_it_belongs(backend: str, token: int) -> None:
    dtype = widest(backend)
    inputs, grad = make(channels=8, dtype=dtype)
    grad[1, 0, token, 3] = float("nan")
    results = value_and_grads(stacked(backend, (3, 4), 1, [0, 2, 4, 6, 8]), inputs, grad)
    # Channel 3 takes the right neighbour, so its gradient goes to that one, too.
    touched = {token, token + 1} if token % 4 < 3 else {token}
    assert set(results["gx"][0, :, 3].isnan().nonzero().flatten().tolist()) == touched
    results["gx"][0, :, 3] = 0
    assert results["gx"].isfinite().all()
    assert results["gmu"].isnan().nonzero().tolist() == [[1, 3]]


@every_backend
def test_nan_of_a_proportion_stays_where_it_belongs(backend: str) -> None:
    dtype = widest(backend)
    inputs, _ = make(channels=8, dtype=dtype)
    inputs["mu"][1, 3] = float("nan")
    y = stacked(backend, edges=[0, 2, 4, 6, 8])(**inputs)
    assert y[1, ..., 3].isnan().all()
    y[1, ..., 3] = 0
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", float64_backends)
def test_gradcheck(backend: str) -> None:
    require(backend)
    inputs, _ = make((2, 3), 7, copies=2)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(stacked(backend, (2, 3), 1, [0, 1, 2, 4, 6]), leaves)


@pytest.mark.parametrize("backend", [name for name in OPERATOR.backends if name != "export"])
def test_a_second_derivative_is_refused(backend: str) -> None:
    dtype = widest(backend)
    inputs, _ = make(dtype=dtype)
    leaves = [x.requires_grad_() for x in inputs.values()]
    y = stacked(backend)(*leaves)
    (gx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*shift_mix_plain"):
        gx.sum().backward()


def test_the_plain_form_has_a_second_derivative() -> None:
    inputs, _ = make((2, 3), 7, copies=2)
    leaves = [x.requires_grad_() for x in inputs.values()]

    def plain(x: Tensor, mu: Tensor) -> Tensor:
        return torch.stack(shift_mix_plain(x, mu, 2, 3, 1, [0, 1, 2, 4, 6])).square()

    assert torch.autograd.gradgradcheck(plain, leaves)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mu": 0.5}, TypeError, "shift_mix needs a tensor for mu, got float"),
        ({"x": torch.zeros(2, 12, 8).int()}, TypeError, r"x in float32.*x\.float\(\)"),
        ({"mu": torch.zeros(3, 8, device="meta")}, ValueError, r"mu is on meta, x on cpu"),
        ({"x": torch.zeros(12, 8)}, ValueError, r"\(B, T, C\).*got \(12, 8\)"),
        ({"mu": torch.zeros(8)}, ValueError, r"proportions \(N, C\).*and \(8,\)"),
        ({"mu": torch.zeros(3, 9)}, ValueError, r"of one C.*\(3, 9\)"),
        ({"mu": torch.zeros(0, 8)}, ValueError, r"none of them empty.*\(0, 8\)"),
        ({"x": torch.zeros(0, 12, 8)}, ValueError, r"none of them empty.*\(0, 12, 8\)"),
        ({"mu": torch.zeros(9, 8)}, ValueError, "at most 8 proportions at once, got 9"),
        ({"hw": (3, 5)}, ValueError, "12 tokens for a grid of 3 x 5 = 15"),
        ({"hw": (-3, -4)}, ValueError, "grid of -3 x -4"),
        ({"pixels": 0}, ValueError, "pixels=0"),
        ({"edges": [0, 2, 4, 6]}, ValueError, r"five rising.*at most 8.*got \[0, 2, 4, 6\]"),
        ({"edges": [1, 2, 4, 6, 8]}, ValueError, "five rising"),
        ({"edges": [0, 4, 2, 6, 8]}, ValueError, "five rising"),
        ({"edges": [0, 2, 4, 6, 9]}, ValueError, "five rising"),
        ({"backend": "cudda"}, ValueError, "'cudda'.*torch, reference"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    good = {"x": torch.zeros(2, 12, 8), "mu": torch.zeros(3, 8), "hw": (3, 4), "edges": [0] * 5}
    with pytest.raises(error, match=words):
        shift_mix(**(good | change))


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OPERATOR.backends["torch"]
    none = type(backend)("torch", backend.forward, backend.backward, dtypes=frozenset())
    monkeypatch.setitem(OPERATOR.backends, "torch", none)
    inputs, _ = make()
    with pytest.raises(BackendUnavailableError, match="'torch' of shift_mix cannot serve"):
        shift_mix(**inputs, hw=HW, edges=EDGES, backend="torch")
