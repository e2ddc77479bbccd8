"""Values and gradients of wkv6_bi against the recurrence in float64, and its place in graphs."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from vision.kernels import use_backend, wkv6_bi
from vision.kernels.testing import (
    assert_close,
    assert_no_worse_than_plain,
    nan_filled_empty,
    oracle,
    value_and_grads,
)
from vision.kernels.wkv6 import OPERATOR, _backward_op, _forward_op, chunked
from vision.kernels.wkv6.export import wkv6_bi_dense
from vision.kernels.wkv6.reference import wkv6_bi_definition

SHARED = Path(os.environ.get("VISION_SHARED", Path(__file__).resolve().parents[3] / "shared"))
INPUTS = ("r", "k", "v", "w", "u")
RESULTS = ("y", *(f"g{name}" for name in INPUTS))
CPU = torch.device("cpu")
SERVED, SERVED32 = (  # of the others: triton_interpreter_cases, test_gpu
    [n for n, b in OPERATOR.backends.items() if OPERATOR.why_not(b, CPU, dtype) is None]
    for dtype in (torch.float64, torch.float32)
)
FAST = [name for name in ("cpu", "torch") if name in SERVED32]
# Raw w: a decay per token of about 1 - 1e-6, 0.87, 1e-9 and 0, and all of them in turn.
DECAYS = (-14.0, -2.0, 3.0, 300.0, "mixed")


def make(
    tokens: int,
    decay: float | str = "mixed",
    batch: int = 2,
    heads: int = 2,
    size: int = 8,
    dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs and a gradient."""
    rng = torch.Generator().manual_seed(tokens * 1000 + size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    shape = (batch, tokens, heads * size)
    r, k, v, w = (normal(*shape) for _ in range(4))
    w = 4 * w - 2 if decay == "mixed" else w + decay
    inputs = {"r": r, "k": k, "v": v, "w": w, "u": normal(heads, size)}
    return {n: x.to(dtype) for n, x in inputs.items()}, normal(*shape).to(dtype)


def of(backend: str) -> Callable[..., Tensor]:
    """Return wkv6_bi by one backend."""
    return functools.partial(wkv6_bi, backend=backend)


def recurrence(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """The two scans in the dtype of the inputs."""
    rh, kh, vh, wh = (x.unflatten(2, u.shape) for x in (r, k, v, w))
    outer, decay = kh[..., None] * vh[..., None, :], torch.exp(-torch.exp(wh))[..., None]
    parts = []
    for order in (range(r.shape[1]), range(r.shape[1] - 1, -1, -1)):
        state, rows = torch.zeros_like(outer[:, 0]), {}
        for t in order:
            bonus = u[..., None] * outer[:, t] if order.step == 1 else 0
            rows[t] = ((state + bonus) * rh[:, t, ..., None]).sum(-2)
            state = decay[:, t] * state + outer[:, t]
        parts.append(torch.stack([rows[t] for t in range(r.shape[1])], 1))
    return (parts[0] + parts[1]).flatten(2)


def floors(grad: Tensor, least: float) -> dict[str, float]:
    """Say what a gradient is the rest of where all decays are 0 or 1."""
    return {"gw": least * float(grad.abs().amax())}


def test_the_definition_is_the_sum_over_pairs() -> None:
    inputs, _ = make(5, batch=1, heads=1, size=3)
    r, k, v, w, u = (x.squeeze(0) for x in inputs.values())
    expected = torch.zeros_like(v)
    for t in range(5):
        for i in range(5):
            between = range(min(i, t) + 1, max(i, t))
            factor = u if i == t else torch.ones(3).double()
            for j in between:
                factor = factor * torch.exp(-torch.exp(w[j]))
            expected[t] += (r[t] * factor * k[i]).sum() * v[i]
    actual = wkv6_bi_definition(**inputs)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(recurrence(**inputs)[0], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 65])
@pytest.mark.parametrize(("size", "batch"), [(1, 3), (8, 1), (64, 1)])
def test_float64(tokens: int, size: int, batch: int, decay: float | str) -> None:
    inputs, grad = make(tokens, decay, batch, 1 if size == 64 else 3, size)
    with nan_filled_empty():
        actual = value_and_grads(of("torch"), inputs, grad)
    truth = oracle(wkv6_bi_definition, inputs, grad)
    assert_close(actual, truth, 1e-11, floors(grad, 1e-3))


@pytest.mark.parametrize("tokens", [196, 1024, 4096])
def test_long_sequences(tokens: int) -> None:
    inputs, grad = make(tokens, batch=1, heads=1, size=4)
    actual = value_and_grads(of("torch"), inputs, grad)
    assert_close(actual, value_and_grads(of("reference"), inputs, grad), 1e-10)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("tokens", "size"), [(1, 1), (3, 9), (33, 8), (66, 64), (196, 17)])
@pytest.mark.parametrize("name", FAST)
def test_float32(name: str, tokens: int, size: int, decay: float | str) -> None:
    inputs, grad = make(tokens, decay, size=size, dtype=torch.float32)
    with nan_filled_empty():
        actual = value_and_grads(of(name), inputs, grad)
    assert_close(actual, oracle(wkv6_bi_definition, inputs, grad), 3e-6, floors(grad, 1.0))


@pytest.mark.parametrize("decay", [-14.0, -9.0, -4.0])
@pytest.mark.parametrize("name", FAST)
def test_roundings_of_the_decay_do_not_add_up(name: str, decay: float) -> None:
    inputs, _ = make(4096, batch=1, heads=1, size=4, dtype=torch.float32)
    inputs["w"] = torch.full_like(inputs["w"], decay)  # rounded alike everywhere
    inputs["r"], inputs["k"], inputs["v"] = (inputs[n].abs() for n in "rkv")
    y = wkv6_bi(**inputs, backend=name)
    assert_close({"y": y}, {"y": wkv6_bi_definition(**inputs)}, 3e-6)


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 40),
    size=st.integers(1, 70),
    heads=st.integers(1, 3),
    batch=st.integers(1, 3),
    decay=st.floats(-20, 20),
)
def test_any_shape_in_float32(tokens: int, size: int, heads: int, batch: int, decay: float) -> None:
    inputs, _ = make(tokens, decay, batch, heads, size, torch.float32)
    assert_close({"y": wkv6_bi(**inputs)}, {"y": wkv6_bi_definition(**inputs)}, 3e-6)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("tokens", [1, 2, 17, 49])
def test_every_backend(name: str, tokens: int) -> None:
    inputs, grad = make(tokens)
    with nan_filled_empty():
        actual = value_and_grads(of(name), inputs, grad)
    assert_close(actual, oracle(wkv6_bi_definition, inputs, grad), 1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 49])
@pytest.mark.parametrize("name", FAST)
def test_low_precision(name: str, tokens: int, dtype: torch.dtype) -> None:
    inputs, grad = make(tokens, -2.0, dtype=dtype)
    assert_no_worse_than_plain(of(name), recurrence, inputs, grad)


def test_dtypes_of_autocast() -> None:
    inputs, grad = make(49, -2.0)
    inputs = {n: x.float() if n in "wu" else x.bfloat16() for n, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        actual = value_and_grads(wkv6_bi, inputs, grad.bfloat16())
    assert actual["y"].dtype == torch.bfloat16
    assert {n: actual[f"g{n}"].dtype for n in inputs} == {n: x.dtype for n, x in inputs.items()}
    truth = oracle(wkv6_bi_definition, inputs, grad.bfloat16())
    # Rounded once at the end; w and u are float32 all the way.
    tolerance = dict.fromkeys(RESULTS, 2**-8) | {"gw": 1e-5, "gu": 1e-5}
    assert_close(actual, truth, tolerance)


def test_gradcheck() -> None:
    inputs, _ = make(5, -0.5, batch=1, heads=2, size=2)
    leaves = [x.requires_grad_() for x in inputs.values()]
    for length in (1, 2, 4):
        assert torch.autograd.gradcheck(_by_chunks(length), leaves)


def _by_chunks(length: int) -> Callable[..., Tensor]:
    """Return the operator with chunks of one length, forward and backward."""

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs: Tensor) -> Tensor:
            ctx.save_for_backward(*inputs)
            return chunked.forward(*inputs, length=length)

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
            return chunked.backward(*ctx.saved_tensors, grad, length=length)

    return Chunked.apply


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 70),
    size=st.integers(1, 9),
    heads=st.integers(1, 3),
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 4, 8, 16, 64]),
    decay=st.floats(-20, 20),
)
def test_properties(
    tokens: int, size: int, heads: int, batch: int, length: int, decay: float
) -> None:
    inputs, grad = make(tokens, decay, batch, heads, size)
    close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    expected = value_and_grads(wkv6_bi, inputs, grad)
    # The order of the tokens turns round with the result: the bonus has no direction.
    turned = {n: x if n == "u" else x.flip(1) for n, x in inputs.items()}
    for name, x in value_and_grads(wkv6_bi, turned, grad.flip(1)).items():
        close(x if name == "gu" else x.flip(1), expected[name])
    # Where the chunks end does not matter.
    for name, x in value_and_grads(_by_chunks(length), inputs, grad).items():
        close(x, expected[name])
    # Linear in r, k, v.
    close(wkv6_bi(**(inputs | {"v": 2 * inputs["v"]})), 2 * expected["y"])
    # The decay of the first and of the last token meets no pair.
    assert (expected["gw"][:, [0, -1]] == 0).all()


@pytest.mark.parametrize("scratch", [1, 60_000, 150_000])
def test_slices_do_not_matter(scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, grad = make(33, batch=3, heads=3)
    expected = value_and_grads(wkv6_bi, inputs, grad)
    monkeypatch.setattr(chunked, "_SCRATCH", scratch)
    slices = list(chunked._slices(inputs["k"], inputs["u"], chunked.LENGTH, torch.float64))
    assert len(slices) > 1
    with nan_filled_empty():
        actual = value_and_grads(wkv6_bi, inputs, grad)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    inputs, grad = make(33, dtype=dtype)
    turned = {n: x.mT.contiguous().mT for n, x in inputs.items()}
    assert not any(x.is_contiguous() for x in turned.values())
    # Side by side in the last dimension alone, as parts of a wider tensor are.
    parts = {n: torch.cat([x, x], -1)[..., : x.shape[-1]] for n, x in inputs.items()}
    expected = value_and_grads(wkv6_bi, inputs, grad)
    for strided in (turned, parts):
        actual = value_and_grads(wkv6_bi, strided, grad.mT.contiguous().mT)
        close = 1e-12 if dtype == torch.float64 else 1e-5
        for name, x in expected.items():
            torch.testing.assert_close(actual[name], x, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", INPUTS)
def test_nan_in_nan_out(name: str, dtype: torch.dtype) -> None:
    inputs, _ = make(40, dtype=dtype)
    inputs[name].view(-1, 16)[0, 3] = float("nan")
    if name == "w":
        inputs["w"][0, 0, 3], inputs["w"][0, 20, 3] = 0.0, float("nan")
    y = wkv6_bi(**inputs)
    assert y[0, :, :8].isnan().any()
    assert y[:, :, 8:].isfinite().all()


def test_a_second_derivative_is_refused() -> None:
    inputs, _ = make(5)
    leaves = [x.requires_grad_() for x in inputs.values()]
    (gk,) = torch.autograd.grad(wkv6_bi(*leaves).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*wkv6_bi_dense"):
        gk.square().sum().backward()


def test_the_dense_form_has_a_second_derivative() -> None:
    inputs, _ = make(3, -0.5, batch=1, heads=1, size=2)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradgradcheck(wkv6_bi_dense, leaves)


class _Elements(TorchDispatchMode):
    """Count the elements of all tensors that torch operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.count += out.numel()
        return out


def test_work_grows_with_the_number_of_tokens() -> None:
    counts = []
    for tokens in (256, 4096):
        inputs, grad = make(tokens, batch=1)
        with _Elements() as elements:
            chunked.forward(**inputs)
            chunked.backward(**inputs, gy=grad)
        counts.append(elements.count)
    assert counts[1] < 1.1 * 16 * counts[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", SERVED32)
def test_opcheck(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend not in SERVED:
        pytest.skip(f"{backend} does not compute in float64")
    inputs, grad = make(19, dtype=dtype)
    for turn in (False, True):
        tensors = [x.mT.contiguous().mT if turn else x for x in inputs.values()]
        leaves = [x.detach().requires_grad_() for x in tensors]
        torch.library.opcheck(_forward_op, (*leaves, backend))
        torch.library.opcheck(_backward_op, (*tensors, grad, backend))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        inputs, grad = make(9, dtype=torch.float32)
        results = value_and_grads(wkv6_bi, inputs, grad)
        assert {n: x.shape for n, x in results.items()} == {
            "y": grad.shape,
            **{f"g{n}": x.shape for n, x in inputs.items()},
        }


def test_compile_with_full_graph() -> None:
    compiled = torch.compile(lambda *x: wkv6_bi(*x) * 2, fullgraph=True, backend="aot_eager")
    for tokens in (9, 40):
        inputs, grad = make(tokens)
        expected = value_and_grads(wkv6_bi, inputs, 2 * grad)
        actual = value_and_grads(compiled, inputs, grad)
        torch.testing.assert_close(actual.pop("y"), 2 * expected.pop("y"))
        for name, x in expected.items():
            torch.testing.assert_close(actual[name], x)


class _Layer(torch.nn.Module):
    def forward(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return wkv6_bi(r, k, v, w, u)


def test_export_holds_one_node_and_free_sizes() -> None:
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    inputs, _ = make(9)
    program = torch.export.export(
        _Layer(), tuple(inputs.values()), dynamic_shapes=(free, free, free, free, None)
    )
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.vision.wkv6_bi.default]
    inputs, _ = make(50, batch=3)
    torch.testing.assert_close(program.module()(*inputs.values()), wkv6_bi(**inputs))


def test_export_in_ordinary_operators() -> None:
    inputs, _ = make(9)
    with use_backend("export"):
        program = torch.export.export(_Layer(), tuple(inputs.values()))
    assert "vision" not in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs.values()), wkv6_bi(**inputs))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"u": 3.0}, TypeError, "needs a tensor for u"),
        ({"k": torch.zeros(2, 4, 6, dtype=torch.int64)}, TypeError, r"k in float32.*k\.float"),
        ({"w": torch.zeros(2, 4, 6, device="meta")}, ValueError, "one device"),
        ({"v": torch.zeros(2, 5, 6)}, ValueError, r"\(B, T, C\), got .*\(2, 5, 6\)"),
        ({"w": torch.zeros(6)}, ValueError, r"\(B, T, C\), got .*\(6,\)"),
        ({n: torch.zeros(4, 6) for n in "rkvw"}, ValueError, "flatten a map"),
        ({"u": torch.zeros(6)}, ValueError, r"\(H, N\) with H·N = 6.*u\.view"),
        ({"u": torch.zeros(2, 4)}, ValueError, r"got \(2, 4\)"),
        ({n: torch.zeros(2, 0, 6) for n in "rkvw"}, ValueError, "at least one"),
        ({"backend": "cudda"}, ValueError, "'cudda'.*cpu, triton, torch, reference, export"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    good = {n: torch.zeros(2, 4, 6) for n in "rkvw"} | {"u": torch.zeros(2, 3)}
    with pytest.raises(error, match=words):
        wkv6_bi(**(good | change))


def _golden_cases() -> list:
    cases = []
    for path in sorted((SHARED / "golden").glob("ops*.pt")):
        content = torch.load(path, weights_only=True)
        for i, case in enumerate(content.get("wkv6", ())):
            name = f"{path.stem}-{i}-{case['name']}-{case['r'].shape[1]}"
            cases.append(pytest.param(case, id=name))
    return cases


GOLDEN = _golden_cases()


@pytest.mark.golden
def test_there_are_golden_cases(shared: Path) -> None:
    assert GOLDEN, f"no wkv6 case in {shared / 'golden'}"


@pytest.mark.golden
@pytest.mark.parametrize("backend", ["torch", "export"])
@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case: dict, backend: str) -> None:
    inputs = {name: case[name].double() for name in INPUTS}
    actual = value_and_grads(of(backend), inputs, case["gy"].double())
    truth = {name: case[name].double() for name in RESULTS}
    # The long cases are stored in float32.
    assert_close(actual, truth, 1e-7 if case["y"].dtype == torch.float32 else 1e-9)
