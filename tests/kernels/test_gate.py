"""Values and gradients of gate against the definition in float64, for every backend."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision.kernels import BackendUnavailableError, gate
from vision.kernels.gate import OPERATOR
from vision.kernels.gate.plain import gate_plain
from vision.kernels.gate.reference import gate_definition
from vision.kernels.testing import (
    assert_close,
    assert_no_worse_than_plain,
    nan_filled_empty,
    oracle,
    value_and_grads,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
SERVED = [
    (backend.name, dtype)
    for backend in OPERATOR.backends.values()
    for dtype in TOLERANCE
    if backend.dtypes is None or dtype in backend.dtypes
]
# Dtypes of r, of y and of what is returned.
MIXED = [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
    (torch.float64, torch.float16, torch.float64),
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
    shape: tuple[int, ...] = (2, 5, 7), dtype: torch.dtype = torch.float64, width: float = 3.0
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs, r from a normal distribution of this width, and a gradient."""
    rng = torch.Generator().manual_seed(math.prod(shape))
    r, y, grad = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(3))
    return {"r": (r * width).to(dtype), "y": y.to(dtype)}, grad.to(dtype)


def served_by(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda r, y: gate(r, y, backend=backend)


def test_the_definition_is_the_formula() -> None:
    inputs, _ = make((2, 3, 4))
    r, y = inputs.values()
    expected = [v / (1 + math.exp(-x)) for x, v in zip(r.flatten(), y.flatten(), strict=True)]
    actual = gate_definition(r, y).flatten()
    torch.testing.assert_close(actual, torch.tensor(expected).double(), rtol=1e-14, atol=1e-14)


@every_backend_and_dtype
@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 13), max_size=4).map(tuple) | st.tuples(st.integers(1, 5000)),
    width=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_any_shape(backend: str, dtype: torch.dtype, shape: tuple[int, ...], width: float) -> None:
    require(backend)
    inputs, grad = make(shape, dtype, width)
    with nan_filled_empty():
        actual = value_and_grads(served_by(backend), inputs, grad)
    assert {x.dtype for x in actual.values()} == {dtype}
    # A product with a gate that is nearly shut is small beside its factors.
    assert_close(actual, oracle(gate_definition, inputs, grad), TOLERANCE[dtype], floor=1.0)


@every_backend
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_nothing_to_do(backend: str, shape: tuple[int, ...]) -> None:
    dtype = widest(backend)
    inputs, grad = make(shape, dtype)
    results = value_and_grads(served_by(backend), inputs, grad)
    assert {x.shape for x in results.values()} == {torch.Size(shape)}


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(backend: str, dtype: torch.dtype) -> None:
    require(backend)
    inputs, grad = make((3, 40, 21), dtype)
    assert_no_worse_than_plain(served_by(backend), lambda r, y: torch.sigmoid(r) * y, inputs, grad)


@pytest.mark.parametrize(
    ("backend", "r", "y", "out"),
    [(backend, *mixed) for backend, dtype in SERVED for mixed in MIXED if mixed[2] == dtype],
)
def test_the_wider_dtype_is_returned(
    backend: str, r: torch.dtype, y: torch.dtype, out: torch.dtype
) -> None:
    require(backend)
    inputs, grad = make()
    inputs = {"r": inputs["r"].to(r), "y": inputs["y"].to(y)}
    actual = value_and_grads(served_by(backend), inputs, grad.to(out))
    assert {n: x.dtype for n, x in actual.items()} == {"y": out, "gr": r, "gy": y}
    tolerance = {n: 1e-6 if x.dtype.itemsize > 2 else 2**-8 for n, x in actual.items()}
    assert_close(actual, oracle(gate_definition, inputs, grad.to(out)), tolerance)


@every_backend_and_dtype
def test_far_from_zero(backend: str, dtype: torch.dtype) -> None:
    require(backend)
    far = torch.tensor([1000.0, 90.0, -90.0, -1000.0, math.inf, -math.inf], dtype=dtype)
    inputs = {"r": far, "y": torch.full_like(far, 3.0)}
    results = value_and_grads(served_by(backend), inputs, torch.full_like(far, 2.0))
    opened = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], dtype=dtype)
    assert_close(results, {"y": 3 * opened, "gy": 2 * opened, "gr": 0 * opened}, 1e-30, floor=1e9)


@every_backend
@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.transpose(0, 2),
        lambda base: base[:, ::2],
        lambda base: base[..., 1:4],
        lambda base: base[:1].expand(3, -1, -1),
    ],
    ids=["transposed", "every other", "slice", "expanded"],
)
@pytest.mark.parametrize("which", ["r", "y", "both"])
def test_strides_do_not_matter(backend: str, view: Callable[[Tensor], Tensor], which: str) -> None:
    dtype = widest(backend)
    inputs, _ = make((4, 6, 8), dtype)
    _, grad = make(tuple(view(inputs["r"]).shape), dtype)
    if which != "both":
        other = "y" if which == "r" else "r"
        inputs[other] = view(inputs[other]).contiguous()

    def viewed(function: Callable[[Tensor, Tensor], Tensor]) -> Callable:
        shown = {n: view if which in (n, "both") else lambda x: x for n in inputs}
        return lambda r, y: function(shown["r"](r), shown["y"](y))

    grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    actual = value_and_grads(viewed(served_by(backend)), inputs, grad)
    same = oracle(viewed(gate_definition), inputs, grad)
    assert_close(actual, same, TOLERANCE[dtype], floor=1.0)
    assert viewed(served_by(backend))(**inputs).is_contiguous()


@every_backend
def test_an_expanded_gradient(backend: str) -> None:
    dtype = widest(backend)
    inputs, _ = make(dtype=dtype)
    one = torch.tensor(1.0)
    actual = value_and_grads(lambda r, y: served_by(backend)(r, y).sum(), inputs, one)
    expected = oracle(lambda r, y: gate_definition(r, y).sum(), inputs, one)
    del expected["y"]  # The sum of all is torch's own.
    assert_close(actual, expected, TOLERANCE[dtype], floor=1.0)


@every_backend
@pytest.mark.parametrize("needs", ["r", "y"])
def test_a_gradient_that_nobody_asks_for(backend: str, needs: str) -> None:
    dtype = widest(backend)
    inputs, grad = make(dtype=dtype)
    expected = oracle(gate_definition, inputs, grad)[f"g{needs}"]
    inputs[needs].requires_grad_()
    (actual,) = torch.autograd.grad(served_by(backend)(**inputs), inputs[needs], grad)
    assert_close({needs: actual}, {needs: expected}, TOLERANCE[dtype], floor=1.0)


@every_backend
@pytest.mark.parametrize(
    ("name", "gradients"), [("r", {"gr", "gy"}), ("y", {"gr"}), ("grad", {"gr", "gy"})]
)
def test_nan_stays_where_it_belongs(backend: str, name: str, gradients: set[str]) -> None:
    dtype = widest(backend)
    inputs, grad = make(dtype=dtype)
    {**inputs, "grad": grad}[name][1, 2, 3] = float("nan")
    results = value_and_grads(served_by(backend), inputs, grad)
    reached = gradients | ({"y"} if name != "grad" else set())
    for result, x in results.items():
        assert x.isnan().nonzero().tolist() == ([[1, 2, 3]] if result in reached else [])


@pytest.mark.parametrize("backend", float64_backends)
def test_gradcheck(backend: str) -> None:
    require(backend)
    leaves = [x.requires_grad_() for x in make((2, 3, 2))[0].values()]
    assert torch.autograd.gradcheck(served_by(backend), leaves)


@pytest.mark.parametrize("backend", [name for name in OPERATOR.backends if name != "export"])
def test_a_second_derivative_is_refused(backend: str) -> None:
    dtype = widest(backend)
    leaves = [x.requires_grad_() for x in make(dtype=dtype)[0].values()]
    (gr,) = torch.autograd.grad(served_by(backend)(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*gate_plain"):
        gr.sum().backward()


def test_the_plain_form_has_a_second_derivative() -> None:
    leaves = [x.requires_grad_() for x in make((2, 3, 2))[0].values()]
    assert torch.autograd.gradgradcheck(gate_plain, leaves)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"r": [0.0] * 3}, TypeError, "gate needs a tensor for r, got list"),
        ({"y": torch.zeros(2, 3).long()}, TypeError, r"y in float32.*int64.*y\.float\(\)"),
        ({"r": torch.zeros(2, 3, device="meta")}, ValueError, "r is on meta, y on cpu"),
        ({"r": torch.zeros(3)}, ValueError, r"one shape, got \(3,\), \(2, 3\)"),
        ({"backend": "cudda"}, ValueError, "'cudda'.*torch, reference"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        gate(**({"r": torch.zeros(2, 3), "y": torch.zeros(2, 3)} | change))


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OPERATOR.backends["torch"]
    none = type(backend)("torch", backend.forward, backend.backward, dtypes=frozenset())
    monkeypatch.setitem(OPERATOR.backends, "torch", none)
    with pytest.raises(BackendUnavailableError, match="'torch' of gate cannot serve"):
        gate(torch.zeros(3), torch.zeros(3), backend="torch")
