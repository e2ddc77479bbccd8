"""Which backend serves a call, and what is said when it cannot."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vision.kernels import (
    BackendUnavailableError,
    bi_wkv,
    dispatch,
    gate,
    list_backends,
    use_backend,
)
from vision.kernels.dispatch import AUTO, ENVIRONMENT_VARIABLE, Backend, Operator
from vision.kernels.gate import OPERATOR

CPU, F32 = torch.device("cpu"), torch.float32


def _forward(x: Tensor) -> Tensor:
    return x


def _backward(x: Tensor, y: Tensor, gy: Tensor) -> tuple[Tensor]:
    return (gy,)


class _Probe:
    """A probe that counts its calls."""

    def __init__(self, reason: str | None) -> None:
        self.reason, self.calls = reason, 0

    def __call__(self, device: torch.device) -> str | None:
        self.calls += 1
        return self.reason


@pytest.fixture
def probe() -> _Probe:
    return _Probe("no compiler was found; install g++")


@pytest.fixture
def op(
    monkeypatch: pytest.MonkeyPatch, backends_named: Callable[[str | None], None], probe: _Probe
) -> Iterator[Operator]:
    """An operator "twice": "fast" cannot run, "half" computes in bfloat16 only, "slow" serves."""
    monkeypatch.setattr(dispatch, "_operators", dict(dispatch._operators))
    backends_named(None)
    backends = [
        Backend("fast", _forward, _backward, probe),
        Backend("half", _forward, _backward, dtypes=frozenset([torch.bfloat16])),
        Backend("slow", _forward, _backward),
    ]
    return Operator("twice", backends, {"cpu": ("fast", "half", "slow"), "*": ("fast",)})


def test_argument_before_context_before_environment(
    op: Operator, backends_named: Callable[[str | None], None]
) -> None:
    assert op.requested() == AUTO
    backends_named("slow")
    assert op.requested() == "slow"
    with use_backend("half"):
        assert op.requested() == "half"
        assert op.requested("fast") == "fast"
        assert op.requested(AUTO) == "half"
        with use_backend("fast"):
            assert op.requested() == "fast"
        with use_backend(AUTO):
            assert op.requested() == "slow"
        assert op.requested() == "half"
    assert op.requested() == "slow"


def test_context_ends_with_an_error(op: Operator) -> None:
    with pytest.raises(KeyError), use_backend("half"):
        raise KeyError
    assert op.requested() == AUTO


def test_context_for_one_operator(op: Operator) -> None:
    with use_backend("slow", op="twice"), use_backend("reference", op="bi_wkv"):
        assert op.requested() == "slow"
        assert dispatch.operators()["bi_wkv"].requested() == "reference"


def test_a_name_for_all_binds_those_that_have_it(
    op: Operator, backends_named: Callable[[str | None], None]
) -> None:
    with use_backend("reference"):
        assert op.requested() == AUTO
        assert dispatch.operators()["bi_wkv"].requested() == "reference"
    backends_named("reference")
    assert op.requested() == AUTO
    assert dispatch.operators()["bi_wkv"].requested() == "reference"


def test_environment_for_one_operator(
    op: Operator, backends_named: Callable[[str | None], None]
) -> None:
    backends_named(" bi_wkv=reference, slow ")
    assert op.requested() == "slow"
    assert dispatch.operators()["bi_wkv"].requested() == "reference"


def test_order_takes_the_first_available(op: Operator) -> None:
    assert op.resolve(AUTO, CPU, F32).name == "slow"
    assert op.resolve(AUTO, CPU, torch.bfloat16).name == "half"


def test_unknown_name_lists_the_names(
    op: Operator, backends_named: Callable[[str | None], None]
) -> None:
    with pytest.raises(ValueError, match=r"'quick', which the argument.*fast, half, slow"):
        op.requested("quick")
    with pytest.raises(ValueError, match=r"'quick', which use_backend asks for.*slow"):
        use_backend("quick")
    with pytest.raises(ValueError, match=r"'reference', which use_backend asks for.*fast, half"):
        use_backend("reference", op="twice")
    with pytest.raises(ValueError, match=r"no operator 'thrice'; there are bi_wkv"):
        use_backend("slow", op="thrice")
    backends_named("quick")
    with pytest.raises(ValueError, match=f"'quick', which {ENVIRONMENT_VARIABLE}.*half, slow"):
        op.requested()


def test_a_named_backend_serves_or_raises(op: Operator) -> None:
    with pytest.raises(BackendUnavailableError, match=r"no compiler.*install g\+\+.*\(slow\)"):
        op.resolve("fast", CPU, F32)
    with pytest.raises(BackendUnavailableError, match=r"torch\.bfloat16 only; cast"):
        op.resolve("half", CPU, F32)
    assert op.resolve("half", CPU, torch.bfloat16).name == "half"


def test_no_default_backend_says_why_for_each(op: Operator) -> None:
    with pytest.raises(BackendUnavailableError, match=r"no default backend.*fast: no compiler"):
        op.resolve(AUTO, torch.device("meta"), F32)


def test_probes_are_lazy_and_remembered(op: Operator, probe: _Probe) -> None:
    assert probe.calls == 0
    for _ in range(3):
        op.resolve(AUTO, CPU, F32)
    assert probe.calls == 1
    op.resolve("slow", CPU, F32)
    assert probe.calls == 1


def test_an_order_names_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_operators", {})
    backends = [Backend("slow", _forward, _backward)]
    with pytest.raises(ValueError, match=r"unknown names \['quick'\]"):
        Operator("twice", backends, {"*": ("quick",)})
    with pytest.raises(ValueError, match="needs the key"):
        Operator("twice", backends, {"cpu": ("slow",)})


def test_bi_wkv_asks_the_environment(backends_named: Callable[[str | None], None]) -> None:
    x = torch.zeros(1, 2, 3)
    backends_named("nothing")
    with pytest.raises(ValueError, match="'nothing', which VISION_KERNELS_BACKEND"):
        bi_wkv(x[0, 0], x[0, 0], x, x)


def test_list_says_why_not(op: Operator) -> None:
    rows = {(r.op, r.backend): r for r in list_backends(["cpu"])}
    assert rows["twice", "fast"].reason == "no compiler was found; install g++"
    assert rows["twice", "slow"].reason is None
    assert not rows["twice", "fast"].default
    assert rows["bi_wkv", "cpu"].default


def _python(root: Path, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, check=True, capture_output=True, text=True
    ).stdout


def test_table_on_the_command_line(repo_root: Path) -> None:
    lines = _python(repo_root, "-m", "vision.kernels", "cpu").splitlines()
    assert lines[0].split() == ["op", "backend", "device", "available"]
    assert ["bi_wkv", "cpu", "cpu", "yes", "(default)"] in [line.split() for line in lines]


def test_import_is_quiet_and_light(repo_root: Path) -> None:
    code = """
import os, subprocess, sys
import torch
read, started = [], []
real = type(os.environ).__getitem__
type(os.environ).__getitem__ = lambda self, key: (read.append(key), real(self, key))[1]
subprocess.Popen = lambda *a, **k: started.append(a)
import vision.kernels
from vision.kernels import bi_wkv
assert bi_wkv.__module__ == "vision.kernels.bi_wkv"
assert "timm" not in sys.modules and "mmengine" not in sys.modules, "imported timm or mm"
assert not started, started
assert not [key for key in read if "VISION" in key], read
"""
    assert _python(repo_root, "-c", code) == ""


def test_a_remembered_choice_follows_scope_environment_and_registry(
    monkeypatch: pytest.MonkeyPatch,
    backends_named: Callable[[str | None], None],
) -> None:
    x = torch.ones(2)
    real = OPERATOR.backends["torch"]
    seen = []

    def forward(r: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append("torch")
        return real.forward(r, y)

    gate(x, x)
    monkeypatch.setitem(OPERATOR.backends, "torch", dataclasses.replace(real, forward=forward))
    with use_backend("torch"):
        gate(x, x)
        assert len(seen) == 1
        with use_backend("reference"):
            gate(x, x)
        gate(x, x, backend="reference")
        assert len(seen) == 1
    backends_named("torch")
    gate(x, x)
    assert len(seen) == 2
    backends_named(None)
    gate(x, x, backend="torch")
    assert len(seen) == 3


def test_a_call_like_an_earlier_one_is_still_traced_and_another_one_checked() -> None:
    x = torch.ones(2, 3)
    gate(x, x)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    with Watch():
        gate(x, x)
    assert seen == ["vision::gate"]
    traced = torch.jit.trace(lambda r: gate(r, r), x)
    assert "vision::gate" in str(traced.graph)
    for wrong, error in ((x[:1], ValueError), (x.int(), TypeError), (x.to("meta"), ValueError)):
        with pytest.raises(error):
            gate(x, wrong)
    assert gate(x, x.double()).dtype is torch.float64
    with pytest.raises(BackendUnavailableError):
        gate(x, x, backend="triton")


def test_images_of_every_size_do_not_fill_the_memory() -> None:
    for size in range(1, 600):
        gate(torch.ones(size), torch.ones(size))
    assert 0 < len(OPERATOR.served) <= 256
