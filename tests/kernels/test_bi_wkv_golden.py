"""bi_wkv against the values and gradients in $VISION_SHARED/golden, whatever cases are there."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vision.kernels import bi_wkv
from vision.kernels.testing import assert_close, value_and_grads

SHARED = Path(os.environ.get("VISION_SHARED", Path(__file__).resolve().parents[3] / "shared"))
INPUTS = ("w", "u", "k", "v")
RESULTS = ("y", "gw", "gu", "gk", "gv")

pytestmark = pytest.mark.golden


def _read(path: Path) -> object:
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return torch.load(path, weights_only=True, map_location="cpu")


def _cases() -> list:
    """One parameter for each case of each file that has the top-level key "bi_wkv"."""
    cases = []
    for path in sorted((SHARED / "golden").glob("*")):
        content = _read(path) if path.suffix in (".pt", ".json") else None
        if isinstance(content, dict) and "bi_wkv" in content:
            for i, case in enumerate(content["bi_wkv"]):
                tensors = {
                    n: torch.as_tensor(case[n], dtype=torch.float64)
                    for n in (*INPUTS, "gy", *RESULTS)
                }
                cases.append(pytest.param(tensors, id=f"{path.stem}-{i}-{case['name']}"))
    return cases


CASES = _cases()


def test_there_are_cases(shared: Path) -> None:
    assert CASES, f"no file in {shared / 'golden'} has the key bi_wkv"


def _floors(case: dict[str, Tensor], epsilon: float) -> dict[str, float]:
    """Scale of rounding: a gradient is a difference of terms of the size gy·v (times T for w)."""
    term = (case["gy"].abs().amax() * case["v"].abs().amax()).item() * epsilon
    return {"gu": term, "gk": term, "gw": term * case["k"].shape[1]}


def _run(case: dict[str, Tensor], backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {n: case[n].to(dtype) for n in INPUTS}
    return value_and_grads(lambda *x: bi_wkv(*x, backend=backend), inputs, case["gy"].to(dtype))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_float64(case: dict[str, Tensor], backend: str) -> None:
    expected = {n: case[n] for n in RESULTS}
    assert_close(_run(case, backend, torch.float64), expected, 1e-9, _floors(case, 1e-5))


def _in_range_of_export(case: dict[str, Tensor]) -> bool:
    reach = case["w"].abs().amax() * case["k"].shape[1]
    return bool(reach + case["k"].amax() - case["k"].amin() <= 1300)


@pytest.mark.parametrize("case", [c for c in CASES if _in_range_of_export(c.values[0])])
def test_float64_of_the_export_form(case: dict[str, Tensor]) -> None:
    expected = {n: case[n] for n in RESULTS}
    assert_close(_run(case, "export", torch.float64), expected, 1e-9, _floors(case, 1e-5))


@pytest.mark.parametrize("case", CASES)
def test_float32(case: dict[str, Tensor]) -> None:
    # The inputs are rounded too: a key of 30 to 2e-6, so a weight by that factor.
    expected = {n: case[n] for n in RESULTS}
    assert_close(_run(case, "torch", torch.float32), expected, 1e-5, _floors(case, 1.0))
