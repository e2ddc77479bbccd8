"""Values and gradients of bi_wkv against the definition in float64."""

import functools
import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vision.kernels import bi_wkv, use_backend
from vision.kernels.bi_wkv import OPERATOR, scan
from vision.kernels.bi_wkv.export import bi_wkv_cumsum
from vision.kernels.bi_wkv.reference import bi_wkv_definition
from vision.kernels.testing import (
    assert_close,
    assert_no_worse_than_plain,
    nan_filled_empty,
    oracle,
    value_and_grads,
)

TOKENS = (1, 2, 7, 31, 32, 33, 49, 196, 197, 1024)
DECAYS = (-400.0, -80.0, -5.0, 0.0, 3.0, 80.0, 400.0, "mixed")
KEYS = ("normal", "wide", "constant", "spike")
BONUSES = (0.0, 5.0, -5.0, 80.0, -80.0, "3T", "-3T")


def make(
    tokens: int,
    decay: float | str,
    keys: str = "normal",
    bonus: float | str = 0.0,
    batch: int = 2,
    channels: int = 5,
    dtype: torch.dtype = torch.float64,
    per: float = 1.0,
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs and a gradient; `decay` and `bonus` are divided by `per`."""
    rng = torch.Generator().manual_seed(tokens * 1000 + channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    k = normal(batch, tokens, channels)
    if keys == "wide":
        k = torch.rand(k.shape, generator=rng, dtype=torch.float64) * 60 - 30
    elif keys == "constant":
        k = torch.full_like(k, 1.5)
    elif keys == "spike":
        k[0, tokens // 3] = 80
    w = normal(channels) * 40 if decay == "mixed" else torch.full((channels,), decay).double()
    times_3 = {"3T": 3.0 * tokens, "-3T": -3.0 * tokens}
    u = torch.full((channels,), times_3.get(bonus, bonus)).double() + 0.1 * normal(channels)
    inputs = {"w": w / per, "u": u / per, "k": k, "v": normal(batch, tokens, channels)}
    return {n: x.to(dtype) for n, x in inputs.items()}, normal(batch, tokens, channels).to(dtype)


def floors(tokens: int, least: float) -> dict[str, float]:
    """Say what a gradient is the rest of: terms of about 1, for w times a distance."""
    return {"gw": least * tokens, "gu": least, "gk": least, "y": 0.0, "gv": least}


# Those that compute in float32 on any machine; compiled ones for other devices: test_gpu.py.
IN_FLOAT32 = ("torch", "cpu")


def of(backend: str) -> Callable[..., Tensor]:
    """Return bi_wkv by one backend."""
    return functools.partial(bi_wkv, backend=backend)


def torch_backend(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return bi_wkv(w, u, k, v, backend="torch")


def plain(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV as a softmax in the dtype of the inputs."""
    position = torch.arange(k.shape[1])
    gap = ((position[:, None] - position).abs() - 1)[:, :, None]
    logits = torch.where(gap < 0, u, -gap * w) + k[:, None]
    return torch.einsum("btic,bic->btc", logits.softmax(2), v)


# Every decay meets every number of tokens; keys and bonuses take turns (4 and 7: all pairs occur).
MATRIX = [
    (tokens, decay, KEYS[i % 4], BONUSES[i % 7])
    for i, (tokens, decay) in enumerate(itertools.product(TOKENS, DECAYS))
]


def test_the_definition_is_the_formula() -> None:
    inputs, _ = make(4, 0.7, batch=1, channels=2)
    w, u, k, v = inputs.values()
    expected = torch.zeros_like(v)
    for t in range(4):
        above, below = (u + k[0, t]).exp() * v[0, t], (u + k[0, t]).exp()
        for i in range(4):
            if i != t:
                weight = (-(abs(t - i) - 1) * w + k[0, i]).exp()
                above, below = above + weight * v[0, i], below + weight
        expected[0, t] = above / below
    torch.testing.assert_close(bi_wkv_definition(w, u, k, v), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("tokens", "decay", "keys", "bonus"), MATRIX)
def test_float64_over_the_whole_range(
    tokens: int, decay: float | str, keys: str, bonus: float | str
) -> None:
    size = {"batch": 1, "channels": 1} if tokens > 1000 else {}
    inputs, grad = make(tokens, decay, keys, bonus, **size)
    with nan_filled_empty():
        actual = value_and_grads(torch_backend, inputs, grad)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), 1e-9, floors(tokens, 1e-3))


@pytest.mark.parametrize("backend", IN_FLOAT32)
@pytest.mark.parametrize(("tokens", "decay", "keys", "bonus"), MATRIX[::3])
def test_float32_over_the_whole_range(
    tokens: int, decay: float | str, keys: str, bonus: float | str, backend: str
) -> None:
    size = {"batch": 1, "channels": 1} if tokens > 1000 else {}
    inputs, grad = make(tokens, decay, keys, bonus, dtype=torch.float32, **size)
    with nan_filled_empty():
        actual = value_and_grads(of(backend), inputs, grad)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), 1e-5, floors(tokens, 1.0))


@pytest.mark.parametrize("backend", IN_FLOAT32)
@pytest.mark.parametrize("tokens", [2, 33, 197])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("decay", [-50.0, -5.0, 0.0, 3.0, 50.0])
def test_float32_with_one_factor_per_channel(
    tokens: int, keys: str, decay: float, backend: str
) -> None:
    inputs, grad = make(tokens, decay, keys, dtype=torch.float32, per=tokens)
    assert scan._is_plain(inputs["w"], inputs["u"], tokens, torch.float32)
    actual = value_and_grads(of(backend), inputs, grad)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), 1e-5, floors(tokens, 1.0))


@pytest.mark.parametrize("decay", [-499.0, -5.0, 499.0])
def test_float64_with_one_factor_per_channel(decay: float) -> None:
    inputs, grad = make(196, decay, "wide", per=196)
    assert scan._is_plain(inputs["w"], inputs["u"], 196, torch.float64)
    actual = value_and_grads(torch_backend, inputs, grad)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), 1e-9, floors(196, 1e-3))


@pytest.mark.parametrize("name", list(OPERATOR.backends))
@pytest.mark.parametrize("tokens", [1, 2, 7, 49])
def test_every_backend_in_its_common_range(name: str, tokens: int) -> None:
    if OPERATOR.why_not(OPERATOR.backends[name], torch.device("cpu"), torch.float64) is not None:
        pytest.skip(f"backend {name} does not run in float64 on the CPU")
    inputs, grad = make(tokens, -5.0, per=tokens)
    with nan_filled_empty():
        actual = value_and_grads(lambda *x: bi_wkv(*x, backend=name), inputs, grad)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), 1e-9, floors(tokens, 1e-3))


@pytest.mark.parametrize("decay", [-100.0, -5.0, 0.0, 100.0])
def test_export_form_over_its_range(decay: float) -> None:
    inputs, grad = make(49, decay, bonus="3T", dtype=torch.float32, per=49)
    actual = value_and_grads(bi_wkv_cumsum, inputs, grad)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), 1e-5, floors(49, 1.0))


@pytest.mark.parametrize("backend", IN_FLOAT32)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 49, 196])
def test_low_precision(dtype: torch.dtype, tokens: int, backend: str) -> None:
    inputs, grad = make(tokens, -5.0, batch=4, channels=20, dtype=dtype, per=tokens)
    assert_no_worse_than_plain(of(backend), plain, inputs, grad)


@pytest.mark.parametrize("backend", IN_FLOAT32)
def test_dtypes_of_autocast(backend: str) -> None:
    inputs, grad = make(49, 3.0, per=49)
    inputs = {n: x.float() if n in "wu" else x.bfloat16() for n, x in inputs.items()}
    actual = value_and_grads(of(backend), inputs, grad)
    assert actual["y"].dtype == torch.bfloat16
    assert {n: actual[f"g{n}"].dtype for n in inputs} == {n: x.dtype for n, x in inputs.items()}
    tolerance = {"y": 2**-8, "gk": 2**-7, "gv": 2**-8, "gw": 2**-7, "gu": 2**-7}
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad.bfloat16()), tolerance)


@pytest.mark.parametrize("decay", [-0.3, 90.0])
def test_gradcheck(decay: float) -> None:
    inputs, _ = make(5, decay, batch=2, channels=3)
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(torch_backend, leaves)


@pytest.mark.parametrize("decay", [-0.3, 90.0])
def test_reversing_the_tokens_reverses_the_result(decay: float) -> None:
    inputs, _ = make(33, decay)
    w, u, k, v = inputs.values()
    torch.testing.assert_close(
        bi_wkv(w, u, k.flip(1), v.flip(1)), bi_wkv(w, u, k, v).flip(1), rtol=1e-12, atol=1e-12
    )


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    channels=st.integers(1, 9),
    batch=st.integers(1, 3),
    decay=st.floats(-500, 500),
    bonus=st.floats(-500, 500),
    shift=st.floats(-100, 100),
)
def test_properties(
    tokens: int, channels: int, batch: int, decay: float, bonus: float, shift: float
) -> None:
    inputs, grad = make(tokens, decay, "wide", bonus, batch, channels)
    w, u, k, v = inputs.values()
    y = bi_wkv(w, u, k, v)
    # A weighted mean lies among its values.
    assert (y <= v.amax(1, keepdim=True) + 1e-9).all()
    assert (y >= v.amin(1, keepdim=True) - 1e-9).all()
    # It does not see a constant added to all keys, and commutes with affine maps of the values.
    torch.testing.assert_close(bi_wkv(w, u, k + shift, v), y, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(bi_wkv(w, u, k, 2 * v + 3), 2 * y + 3, rtol=1e-9, atol=1e-9)
    # Channels know nothing of each other.
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(tokens))
    torch.testing.assert_close(
        bi_wkv(w[order], u[order], k[..., order], v[..., order]), y[..., order], rtol=0, atol=1e-12
    )
    # So the gradients of the keys sum to nothing, and those of the values to those of the result.
    grads = value_and_grads(bi_wkv, inputs, grad)
    torch.testing.assert_close(grads["gk"].sum(1), torch.zeros_like(y[:, 0]), rtol=0, atol=1e-7)
    torch.testing.assert_close(grads["gv"].sum(1), grad.sum(1), rtol=1e-8, atol=1e-8)


def test_strides_do_not_matter() -> None:
    inputs, grad = make(30, 3.0, per=30)
    maps = {n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "kv"}
    wide = inputs["w"].repeat_interleave(2)[::2]
    strided = {"w": wide, "u": inputs["u"], **maps}
    assert not strided["k"].is_contiguous()
    assert not strided["w"].is_contiguous()
    grad_strided = grad.transpose(0, 1).contiguous().transpose(0, 1)
    actual = value_and_grads(torch_backend, strided, grad_strided)
    expected = value_and_grads(torch_backend, inputs, grad)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", IN_FLOAT32)
def test_a_rounded_result_does_not_spoil_the_gradients(backend: str) -> None:
    # All gradients but that of v, which alone is returned in half precision here.
    inputs, grad = make(49, 3.0, per=49)
    inputs = {n: x.bfloat16() if n == "v" else x.float() for n, x in inputs.items()}
    actual = value_and_grads(of(backend), inputs, grad.bfloat16())
    assert actual["y"].dtype == torch.bfloat16
    expected = oracle(bi_wkv_definition, inputs, grad.bfloat16())
    tolerance = {"y": 2**-8, "gk": 1e-5, "gv": 2**-8, "gw": 1e-5, "gu": 1e-5}
    assert_close(actual, expected, tolerance, floors(49, 1.0))


@pytest.mark.parametrize("decay", [0.1, 90.0], ids=["one factor", "scale per token"])
@pytest.mark.parametrize(
    ("batch", "tokens", "scratch", "chunks"),
    [
        (5, 33, 2 * 33 * 40 * 80, (3, 3)),
        (2, 33, 1000, (6, 6)),
        (1, 64, 1000, (3, 3)),
        (1, 64, 100_000, (1, 3)),  # a forward pass needs less
    ],
)
def test_chunks_do_not_matter(
    batch: int,
    tokens: int,
    scratch: int,
    chunks: tuple[int, int],
    decay: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, grad = make(tokens, decay, batch=batch, channels=40)

    def counted() -> tuple[int, ...]:
        k = inputs["k"]
        sizes = (scan._chunk_size(k, torch.float64, pairs) for pairs in (2, 5))
        return tuple(len(list(scan._chunks(k, size))) for size in sizes)

    assert counted() == (1, 1)
    expected = value_and_grads(torch_backend, inputs, grad)
    monkeypatch.setattr(scan, "_SCRATCH", scratch)
    assert counted() == chunks
    with nan_filled_empty():
        actual = value_and_grads(torch_backend, inputs, grad)
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("decay", [0.1, 90.0])
@pytest.mark.parametrize("name", ["w", "u", "k", "v"])
def test_nan_in_nan_out(name: str, decay: float) -> None:
    inputs, _ = make(9, decay)
    inputs[name].view(-1, 5)[0, 2] = float("nan")
    y = bi_wkv(**inputs)
    batch = slice(None) if name in "wu" else 0
    assert y[batch, :, 2].isnan().all()
    assert y[:, :, :2].isfinite().all()


@pytest.mark.parametrize("name", ["w", "u", "k", "v"])
def test_nan_in_nan_out_of_one_token(name: str) -> None:
    inputs, _ = make(1, 0.1)
    inputs[name].view(-1, 5)[0, 2] = float("nan")
    assert bi_wkv(**inputs)[0, :, 2].isnan().all()


@pytest.mark.parametrize(
    ("decay", "backend"), [(0.1, "torch"), (90.0, "torch"), (0.1, "reference"), (0.1, "export")]
)
def test_a_key_of_minus_infinity_masks_its_token(decay: float, backend: str) -> None:
    inputs, grad = make(12, decay)
    kept = {n: x[:, 2:-1] if n in "kv" else x for n, x in inputs.items()}
    inputs["k"][:, :2] = inputs["k"][:, -1:] = -torch.inf
    grad[:, :2] = grad[:, -1:] = 0
    actual = value_and_grads(lambda *x: bi_wkv(*x, backend=backend), inputs, grad)
    expected = value_and_grads(torch_backend, kept, grad[:, 2:-1])
    for name in ("y", "gk", "gv"):
        torch.testing.assert_close(actual[name][:, 2:-1], expected[name], rtol=1e-9, atol=1e-9)
    assert (actual["gk"][:, :2] == 0).all()


@pytest.mark.parametrize("backend", IN_FLOAT32)
def test_a_second_derivative_is_refused(backend: str) -> None:
    inputs, _ = make(5, 0.3, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in inputs.values()]
    (gk,) = torch.autograd.grad(of(backend)(*leaves).sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gk.square().sum().backward()


class _Elements(TorchDispatchMode):
    """Count the elements of all tensors that torch operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = out if isinstance(out, tuple | list) else (out,)
            self.count += sum(x.numel() for x in tensors if isinstance(x, Tensor))
        return out


@pytest.mark.parametrize("per_token", [False, True], ids=["one factor", "scale per token"])
def test_work_grows_with_the_number_of_tokens(per_token: bool) -> None:
    counts = []
    for tokens in (256, 4096):
        inputs, grad = make(tokens, 90.0, channels=3, per=1 if per_token else tokens)
        y = scan.forward(**inputs)
        with _Elements() as elements:
            scan.forward(**inputs)
            scan.backward(**inputs, y=y, gy=grad)
        counts.append(elements.count)
    assert counts[1] < 1.1 * 16 * counts[0]


def test_backward_keeps_the_backend_of_forward(
    monkeypatch: pytest.MonkeyPatch, backends_named: Callable[[str | None], None]
) -> None:
    served = []
    for name in ("torch", "reference"):
        backend = OPERATOR.backends[name]

        def note(*args: Tensor, _name: str = name, _of=backend.backward) -> tuple[Tensor, ...]:
            served.append((_name, threading.current_thread() is threading.main_thread()))
            return _of(*args)

        replaced = type(backend)(name, backend.forward, note)
        monkeypatch.setitem(OPERATOR.backends, name, replaced)
    inputs, grad = make(5, 0.3)
    leaves = [x.requires_grad_() for x in inputs.values()]
    with use_backend("reference"):
        y = bi_wkv(*leaves)
    backends_named("torch")
    thread = threading.Thread(target=y.backward, args=(grad,))
    with use_backend("torch"):
        thread.start()
        thread.join()
    assert served == [("reference", False)]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"w": 3.0}, TypeError, "needs a tensor for w"),
        ({"k": torch.zeros(2, 4, 3, dtype=torch.int64)}, TypeError, r"k in float32.*k\.float"),
        ({"v": torch.zeros(2, 4, 3, device="meta")}, ValueError, "one device"),
        ({"v": torch.zeros(2, 5, 3)}, ValueError, r"\(B, T, C\), got \(2, 4, 3\) and \(2, 5, 3\)"),
        ({"k": torch.zeros(4, 3), "v": torch.zeros(4, 3)}, ValueError, "flatten a map"),
        ({"u": torch.zeros(4)}, ValueError, r"\(C,\) = \(3,\)"),
        ({"w": torch.zeros(1, 3), "u": torch.zeros(1, 3)}, ValueError, r"\(C,\) = \(3,\)"),
        ({"k": torch.zeros(2, 0, 3), "v": torch.zeros(2, 0, 3)}, ValueError, "at least one"),
        ({"k": torch.zeros(0, 4, 3), "v": torch.zeros(0, 4, 3)}, ValueError, "at least one"),
        ({"backend": "cudda"}, ValueError, "'cudda'.*torch, reference, export"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type[Exception], words: str) -> None:
    good = {"w": torch.zeros(3), "u": torch.zeros(3)}
    good |= {"k": torch.zeros(2, 4, 3), "v": torch.zeros(2, 4, 3)}
    with pytest.raises(error, match=words):
        bi_wkv(**(good | change))
