"""Values and gradients of deform_attn against the definition in float64, for every backend."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision.kernels import deform_attn
from vision.kernels.deform_attn import OPERATOR
from vision.kernels.deform_attn.plain import deform_attn_plain
from vision.kernels.deform_attn.reference import deform_attn_definition
from vision.kernels.testing import (
    assert_close,
    assert_no_worse_than_plain,
    nan_filled_empty,
    oracle,
    value_and_grads,
)

Shapes = Sequence[tuple[int, int]]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
SERVED = [
    (backend.name, dtype)
    for backend in OPERATOR.backends.values()
    for dtype in TOLERANCE
    if backend.dtypes is None or dtype in backend.dtypes
]
every_backend = pytest.mark.parametrize("backend", list(OPERATOR.backends))
every_backend_and_dtype = pytest.mark.parametrize(("backend", "dtype"), SERVED)
float64_backends = [name for name, dtype in SERVED if dtype == torch.float64]
LEVELS = [(3, 5), (1, 1), (2, 7)]


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
    shapes: Shapes = LEVELS,
    sizes: tuple[int, int, int, int, int] = (2, 6, 3, 4, 2),
    dtype: torch.dtype = torch.float64,
    beyond: float = 0.3,
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs and a gradient.

    Args:
        shapes: of the levels.
        sizes: batch, queries, heads, channels of a head, points.
        dtype: of all.
        beyond: how far samples lie outside of the map, in its sides.
    """
    batch, queries, heads, channels, points = sizes
    rng = torch.Generator().manual_seed(sum(map(math.prod, shapes)) + 7 * sum(sizes))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    spread = (batch, queries, heads, len(shapes), points)
    uniform = torch.rand((*spread, 2), generator=rng, dtype=torch.float64)
    inputs = {
        "value": normal(batch, sum(map(math.prod, shapes)), heads, channels),
        "locations": off_kinks(uniform * (1 + 2 * beyond) - beyond, shapes).to(dtype),
        "weights": normal(*spread),
    }
    grad = normal(batch, queries, heads * channels)
    return {n: x.to(dtype) for n, x in inputs.items()}, grad.to(dtype)


def off_kinks(locations: Tensor, shapes: Shapes) -> Tensor:
    """Move samples a hundredth of a pixel away from centres, where gradients jump."""
    sides = torch.tensor([(w, h) for h, w in shapes]).double()[:, None]
    pixels = locations * sides - 0.5
    near = (pixels - pixels.round()).abs() < 0.01
    return (pixels + 0.02 * near + 0.5) / sides


def served_by(backend: str, shapes: Shapes) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda value, locations, weights: deform_attn(
        value, locations, weights, shapes, backend=backend
    )


def defined(shapes: Shapes) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda *tensors: deform_attn_definition(*tensors, shapes)


def test_the_definition_is_the_formula() -> None:
    """Every pixel of a level counts by how near its centre is, in both directions."""
    inputs, _ = make()
    value, locations, weights = inputs.values()
    expected = torch.zeros(2, 6, 3, 4, dtype=torch.float64)
    starts = [0, *itertools.accumulate(map(math.prod, LEVELS))]
    for level, (height, width) in enumerate(LEVELS):
        x = locations[..., level, :, 0] * width - 0.5
        y = locations[..., level, :, 1] * height - 0.5
        for j, i in itertools.product(range(height), range(width)):
            near = (1 - (x - i).abs()).clamp_min(0) * (1 - (y - j).abs()).clamp_min(0)
            pixel = value[:, starts[level] + j * width + i]
            share = (weights[..., level, :] * near).sum(-1)
            expected += share[..., None] * pixel[:, None]
    actual = deform_attn_definition(value, locations, weights, LEVELS)
    torch.testing.assert_close(actual, expected.flatten(2), rtol=1e-13, atol=1e-13)


@every_backend_and_dtype
@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3),
    sizes=st.tuples(*(st.integers(1, most) for most in (2, 9, 3, 5, 3))),
    beyond=st.sampled_from([0.0, 0.3, 3.0]),
)
def test_any_shape(
    backend: str, dtype: torch.dtype, shapes: Shapes, sizes: tuple, beyond: float
) -> None:
    require(backend)
    inputs, grad = make(shapes, sizes, dtype, beyond)
    with nan_filled_empty():
        actual = value_and_grads(served_by(backend, shapes), inputs, grad)
    assert {x.dtype for x in actual.values()} == {dtype}
    # Sums of terms of about 1 may cancel.
    assert_close(actual, oracle(defined(shapes), inputs, grad), TOLERANCE[dtype], floor=1.0)


@every_backend
def test_where_the_border_is(backend: str) -> None:
    """Centres, edges and one pixel beyond the outermost centres of a row of three pixels."""
    dtype = widest(backend)
    value = torch.tensor([1.0, 10.0, 100.0], dtype=dtype).view(1, 3, 1, 1)
    x = torch.tensor(
        [1 / 6, 1 / 2, 5 / 6, 0.0, 1.0, 1 / 3, 1 / 30 - 1 / 6, -1 / 6, 7 / 6, -9.0, 9.0]
    )
    locations = torch.stack([x, torch.full_like(x, 0.5)], -1).to(dtype).view(1, -1, 1, 1, 1, 2)
    weights = torch.ones(locations.shape[:-1], dtype=dtype)
    y = deform_attn(value, locations, weights, [(1, 3)], backend=backend).flatten()
    want = torch.tensor([1, 10, 100, 0.5, 50, 5.5, 0.1, 0, 0, 0, 0], dtype=dtype)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-4)


@every_backend
def test_the_gradient_at_a_centre_is_that_to_the_right_and_below(backend: str) -> None:
    dtype = widest(backend)
    value = torch.tensor([[1.0, 2, 4, 8], [16, 32, 64, 128]], dtype=dtype).view(1, 8, 1, 1)
    location = torch.tensor([3 / 8, 1 / 4], dtype=dtype).view(1, 1, 1, 1, 1, 2).requires_grad_()
    weights = torch.ones(1, 1, 1, 1, 1, dtype=dtype)
    y = deform_attn(value, location, weights, [(2, 4)], backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), location)
    assert y.item() == 2
    assert grad.flatten().tolist() == [(4 - 2) * 4, (32 - 2) * 2]


@every_backend
def test_the_order_of_levels_and_of_x_and_y(backend: str) -> None:
    dtype = widest(backend)
    shapes = [(2, 3), (3, 2)]
    value = torch.arange(12, dtype=dtype).view(1, 12, 1, 1)
    at = [[(2.5 / 3, 0.5 / 2)], [(0.5 / 2, 2.5 / 3)]]  # column 2, row 0; column 0, row 2
    locations = torch.tensor(at, dtype=dtype).view(1, 1, 1, 2, 1, 2)
    weights = torch.tensor([1.0, 100.0], dtype=dtype).view(1, 1, 1, 2, 1)
    y = deform_attn(value, locations, weights, shapes, backend=backend)
    assert y.item() == pytest.approx(2 + 100 * (6 + 4))


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(backend: str, dtype: torch.dtype) -> None:
    """Values and weights in half precision; locations have too few digits in it."""
    require(backend)
    inputs, grad = make(LEVELS, (1, 10, 3, 8, 4), torch.float32)
    locations = inputs.pop("locations")
    inputs = {name: x.to(dtype) for name, x in inputs.items()}

    def plain(value: Tensor, weights: Tensor) -> Tensor:
        wide = locations if value.dtype != torch.float64 else locations.double()
        return deform_attn_plain(value, wide, weights, LEVELS)

    def ours(value: Tensor, weights: Tensor) -> Tensor:
        return deform_attn(value, locations, weights, LEVELS, backend=backend)

    assert ours(**inputs).dtype == dtype
    assert_no_worse_than_plain(ours, plain, inputs, grad.to(dtype))


@every_backend
def test_strides_do_not_matter(backend: str) -> None:
    dtype = widest(backend)
    inputs, grad = make(dtype=dtype)
    strided = {n: x.transpose(0, 2).contiguous().transpose(0, 2) for n, x in inputs.items()}
    strided["value"] = inputs["value"].repeat_interleave(2, 3)[..., ::2]
    grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(x.is_contiguous() for x in (*strided.values(), grad))
    actual = value_and_grads(served_by(backend, LEVELS), strided, grad)
    assert_close(actual, oracle(defined(LEVELS), inputs, grad), TOLERANCE[dtype], floor=1.0)
    assert served_by(backend, LEVELS)(**strided).is_contiguous()


@every_backend
@pytest.mark.parametrize("needs", ["value", "locations", "weights"])
def test_a_gradient_that_nobody_asks_for(backend: str, needs: str) -> None:
    dtype = widest(backend)
    inputs, grad = make(dtype=dtype)
    expected = oracle(defined(LEVELS), inputs, grad)[f"g{needs}"]
    inputs[needs].requires_grad_()
    (actual,) = torch.autograd.grad(served_by(backend, LEVELS)(**inputs), inputs[needs], grad)
    assert_close({needs: actual}, {needs: expected}, TOLERANCE[dtype], floor=1.0)


@pytest.mark.parametrize("backend", float64_backends)
def test_gradcheck(backend: str) -> None:
    require(backend)
    shapes = [(3, 2), (1, 4)]
    leaves = [x.requires_grad_() for x in make(shapes, (1, 3, 2, 2, 2))[0].values()]
    assert torch.autograd.gradcheck(served_by(backend, shapes), leaves)


@pytest.mark.parametrize("backend", [name for name in OPERATOR.backends if name != "export"])
def test_a_second_derivative_is_refused(backend: str) -> None:
    dtype = widest(backend)
    leaves = [x.requires_grad_() for x in make(dtype=dtype)[0].values()]
    y = served_by(backend, LEVELS)(*leaves)
    (gw,) = torch.autograd.grad(y.square().sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*deform_attn_plain"):
        gw.sum().backward()


def test_custom_operator() -> None:
    """Schema, fake tensors and registration; `test_compiled_with_free_sizes` traces the rest."""
    inputs, _ = make(sizes=(2, 3, 2, 2, 2))
    leaves = [x.requires_grad_() for x in inputs.values()]
    sides = [side for shape in LEVELS for side in shape]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.vision.deform_attn.default
    torch.library.opcheck(operator, (*leaves, sides, "torch"), test_utils=checks)


def test_compiled_with_free_sizes() -> None:
    def run(value: Tensor, locations: Tensor, weights: Tensor, map_: Tensor) -> Tensor:
        return deform_attn(value, locations, weights, [(map_.shape[0], map_.shape[1])])

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((3, 5), (4, 6)):
        inputs, grad = make([shape])
        actual = value_and_grads(lambda *x, s=shape: compiled(*x, torch.zeros(s)), inputs, grad)
        assert_close(actual, oracle(defined([shape]), inputs, grad), 1e-11, floor=1.0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"value": torch.zeros(1, 6, 4)}, ValueError, r"value \(B, S, M, D\).*\(1, 6, 4\)"),
        ({"weights": torch.zeros(1, 2, 1, 1, 4)}, ValueError, r"got \(1, 2, 1, 1, 4\)"),
        ({"shapes": [(2, 3), (1, 1)]}, ValueError, "L = 2 shapes"),
        ({"shapes": [(2, 2)]}, ValueError, r"\[\(2, 2\)\] are 4, got 6"),
        ({"shapes": [(-2, -3)]}, ValueError, "at least one of everything"),
        ({"value": torch.zeros(1, 6, 1, 0)}, ValueError, "at least one of everything"),
        ({"value": torch.zeros(1, 6, 1, 2).long()}, TypeError, r"value in float32.*int64"),
        ({"value": torch.zeros(1, 6, 1, 2, device="meta")}, ValueError, "value on meta|on meta"),
        ({"backend": "cudda"}, ValueError, "'cudda'.*torch, reference"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    arguments = {
        "value": torch.zeros(1, 6, 1, 2),
        "locations": torch.zeros(1, 2, 1, 1, 3, 2),
        "weights": torch.zeros(1, 2, 1, 1, 3),
        "shapes": [(2, 3)],
    }
    with pytest.raises(error, match=words):
        deform_attn(**(arguments | change))
