"""How the numbers of an operator are checked: oracle, gradients, errors, unwritten memory.

An operator under test is any function of tensors. Its oracle is the same formula written plainly
and differentiated by autograd in float64, on inputs rounded to the precision under test.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = [
    "assert_close",
    "assert_no_worse_than_plain",
    "max_error",
    "nan_filled_empty",
    "oracle",
    "value_and_grads",
]

Function = Callable[..., Tensor]


def value_and_grads(
    function: Function, inputs: Mapping[str, Tensor], grad: Tensor
) -> dict[str, Tensor]:
    """Evaluate a function and differentiate it in every input.

    Args:
        function: takes the inputs in their order.
        inputs: floating point tensors by name; they are not changed.
        grad: gradient of the output.

    Returns:
        "y", the output, and "g" + name, the gradient of each input; all detached.
    """
    leaves = [_leaf(x) for x in inputs.values()]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    return {"y": y.detach(), **{f"g{name}": g for name, g in zip(inputs, grads, strict=True)}}


def _leaf(x: Tensor) -> Tensor:
    """Return a leaf with x's values and strides."""
    leaf = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return leaf.copy_(x.detach()).requires_grad_()


def oracle(function: Function, inputs: Mapping[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """Do as `value_and_grads`, in float64: the truth for inputs of any precision."""
    wide = {name: x.double() for name, x in inputs.items()}
    return value_and_grads(function, wide, grad.double())


def max_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return the largest absolute error over the largest absolute value.

    Args:
        actual: what is measured; one NaN or infinity makes the error infinite.
        expected: the truth, finite, of the same shape.
        floor: least value to divide by, for a tensor that is the small rest of larger terms.

    Raises:
        ValueError: the shapes differ, or the truth is not finite.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)} was to be {tuple(expected.shape)}")
    if not expected.isfinite().all():
        raise ValueError("the expected values are not finite; choose inputs the oracle can do")
    if not actual.isfinite().all():
        return float("inf")
    expected = expected.double()
    error = (actual.double() - expected).abs().amax().item()
    scale = max(expected.abs().amax().item(), floor)
    return error / scale if error else 0.0


def assert_close(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float | Mapping[str, float],
    floor: float | Mapping[str, float] = 0.0,
) -> None:
    """Assert that `max_error` is within the tolerance for every tensor.

    Args:
        actual: results by name, as from `value_and_grads`.
        expected: results by the same names, as from `oracle`.
        tolerance: largest error, for all or by name.
        floor: see `max_error`; for all or by name (0 for a name that is missing).

    Raises:
        AssertionError: an error is too large; the message lists all errors.
    """
    errors = {}
    for name, truth in expected.items():
        least = floor.get(name, 0.0) if isinstance(floor, Mapping) else floor
        errors[name] = max_error(actual[name], truth, least)
    limits = {n: tolerance[n] if isinstance(tolerance, Mapping) else tolerance for n in errors}
    wrong = [name for name, error in errors.items() if not error <= limits[name]]
    if wrong:
        rows = ", ".join(
            f"{name} {error:.2e} (<= {limits[name]:.1e})" for name, error in errors.items()
        )
        raise AssertionError(f"too far from the truth: {', '.join(wrong)}; all: {rows}")


def assert_no_worse_than_plain(
    function: Function,
    plain: Function,
    inputs: Mapping[str, Tensor],
    grad: Tensor,
    factor: float = 2.0,
    names: Sequence[str] | None = None,
) -> None:
    """Assert the rule for low precision: at most `factor` times the error of plain torch.

    Both are measured against `plain` in float64 on the same rounded inputs.

    Args:
        function: the operator under test.
        plain: its formula in ordinary torch operators, in the dtype of its inputs.
        inputs: tensors of the precision under test by name.
        grad: gradient of the output.
        factor: how much worse it may be.
        names: results to check (default: all).

    Raises:
        AssertionError: an error is larger.
    """
    truth = oracle(plain, inputs, grad)
    names = list(truth) if names is None else list(names)
    ours, theirs = (value_and_grads(f, inputs, grad) for f in (function, plain))
    limits = {name: factor * max_error(theirs[name], truth[name]) for name in names}
    assert_close(ours, {name: truth[name] for name in names}, limits)


@contextmanager
def nan_filled_empty() -> Iterator[None]:
    """Fill new uninitialised tensors with NaN, so that an output nobody wrote is seen.

    Holds for `torch.empty`, `empty_like`, `empty_strided`, `new_empty` and `resize_` in all
    threads, by torch's own deterministic mode; integers get their largest value.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
