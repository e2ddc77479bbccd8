"""The numerics helper finds what it is there to find."""

import pytest
import torch
from torch import Tensor

from vision.kernels.testing import (
    assert_close,
    assert_no_worse_than_plain,
    max_error,
    nan_filled_empty,
    oracle,
    value_and_grads,
)


def product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


INPUTS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 5.0])}
GRAD = torch.tensor([1.0, -1.0])


def test_value_and_grads_of_every_input() -> None:
    results = value_and_grads(product, INPUTS, GRAD)
    assert {n: x.tolist() for n, x in results.items()} == {
        "y": [3.0, 10.0],
        "ga": [3.0, -5.0],
        "gb": [1.0, -2.0],
    }
    assert not INPUTS["a"].requires_grad


def test_oracle_is_float64() -> None:
    assert {x.dtype for x in oracle(product, INPUTS, GRAD).values()} == {torch.float64}


def test_max_error() -> None:
    truth = torch.tensor([4.0, -8.0])
    assert max_error(torch.tensor([4.0, -6.0]), truth) == 0.25
    assert max_error(torch.tensor([4.0, -6.0]), truth, floor=16.0) == 0.125
    assert max_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert max_error(torch.tensor([4.0, torch.nan]), truth) == float("inf")
    with pytest.raises(ValueError, match="shape"):
        max_error(torch.zeros(3), truth)
    with pytest.raises(ValueError, match="not finite"):
        max_error(truth, truth / 0)


def test_assert_close_names_what_is_wrong() -> None:
    results = value_and_grads(product, INPUTS, GRAD)
    wrong = {**results, "gb": results["gb"] * 1.01}
    assert_close(results, results, 0.0)
    assert_close(wrong, results, {"y": 0.0, "ga": 0.0, "gb": 0.02})
    with pytest.raises(AssertionError, match=r"truth: gb; all: .*gb 1\.00e-02"):
        assert_close(wrong, results, 1e-3)


def test_rule_for_low_precision() -> None:
    inputs = {n: torch.linspace(0.1, 3, 50).add(i).bfloat16() for i, n in enumerate("ab")}
    grad = torch.ones(50)
    assert_no_worse_than_plain(product, product, inputs, grad)
    with pytest.raises(AssertionError, match="too far"):
        assert_no_worse_than_plain(lambda a, b: a * b * 1.03, product, inputs, grad)


def test_empty_tensors_are_nan_inside_only() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    x = torch.zeros(3)
    with nan_filled_empty():
        made = [
            torch.empty(3),
            torch.empty_like(x),
            x.new_empty(3),
            torch.empty_strided((3,), (1,), dtype=torch.bfloat16),
        ]
    assert all(tensor.isnan().all() for tensor in made)
    assert torch.are_deterministic_algorithms_enabled() == before
