"""Bi-WKV, WKV6, deform_attn in Triton's interpreter; run by test_triton in a process of its own.

By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/triton_interpreter_cases.py
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vision.kernels import bi_wkv, wkv6_bi
from vision.kernels.bi_wkv import triton_kernel
from vision.kernels.bi_wkv.reference import bi_wkv_definition
from vision.kernels.bi_wkv.triton_kernel import BACKWARD, FORWARD, Tiles
from vision.kernels.deform_attn import triton_kernel as deform
from vision.kernels.deform_attn.reference import deform_attn_definition
from vision.kernels.testing import (
    assert_close,
    assert_no_worse_than_plain,
    max_error,
    nan_filled_empty,
    oracle,
    value_and_grads,
)
from vision.kernels.wkv6 import triton_kernel as wkv6
from vision.kernels.wkv6.reference import wkv6_bi_definition

Make = Callable[..., tuple[dict[str, Tensor], Tensor]]
TOLERANCE = {"y": 5e-6, "gw": 1e-5, "gu": 1e-5, "gk": 1e-5, "gv": 1e-5}


def floors(tokens: int) -> dict[str, float]:
    """Say what a gradient is the rest of: terms of about 1, for w times a distance."""
    return {"gw": float(tokens), "gu": 1.0, "gk": 1.0, "gv": 1.0}


def in_triton(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return bi_wkv(w, u, k, v, backend="triton")


def plain(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bi-WKV as a softmax in the dtype of the inputs."""
    position = torch.arange(k.shape[1])
    gap = ((position[:, None] - position).abs() - 1)[:, :, None]
    logits = torch.where(gap < 0, u, -gap * w) + k[:, None]
    return torch.einsum("btic,bic->btc", logits.softmax(2), v)


def with_tiles(inputs: dict[str, Tensor], grad: Tensor, **changes: int | None) -> dict[str, Tensor]:
    """Evaluate and differentiate with other tile shapes, in unwritten memory full of NaN."""
    forward, backward = (replace(tiles, **changes) for tiles in (FORWARD, BACKWARD))
    with nan_filled_empty():
        y = triton_kernel.forward(**inputs, tiles=forward)
        gw, gu, gk, gv = triton_kernel.backward(**inputs, y=y, gy=grad, tiles=backward)
    return {"y": y, "gw": gw, "gu": gu, "gk": gk, "gv": gv}


@pytest.mark.parametrize(
    ("tokens", "batch", "channels"),
    [(1, 1, 5), (2, 3, 5), (31, 1, 5), (33, 3, 5), (49, 1, 24), (196, 1, 5)],
)
def test_through_the_operator(bi_wkv_inputs: Make, tokens: int, batch: int, channels: int) -> None:
    inputs, grad = bi_wkv_inputs(tokens, "-5 /T", batch=batch, channels=channels)
    with nan_filled_empty():
        actual = value_and_grads(in_triton, inputs, grad)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), TOLERANCE, floors(tokens))


def test_many_tokens_are_split_by_default(bi_wkv_inputs: Make) -> None:
    inputs, grad = bi_wkv_inputs(520, "3 /T", batch=1)
    chosen = triton_kernel._candidates(FORWARD, 520)[0]
    assert chosen.length is not None
    actual = with_tiles(inputs, grad, length=chosen.length)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), TOLERANCE, floors(520))


@pytest.mark.parametrize(("segments", "length", "block_c"), [(2, 8, 32), (4, 8, 4), (16, None, 8)])
@pytest.mark.parametrize("decay", ["3 /T", -7.0])
def test_tile_shapes(
    bi_wkv_inputs: Make, decay: float | str, segments: int, length: int | None, block_c: int
) -> None:
    inputs, grad = bi_wkv_inputs(41, decay, channels=7, batch=1)
    actual = with_tiles(inputs, grad, segments=segments, length=length, block_c=block_c)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), TOLERANCE, floors(41))


@pytest.mark.parametrize(
    ("tokens", "decay", "keys", "bonus"),
    [
        (33, 80.0, "wide", 0.0),
        (33, -80.0, "wide", 5.0),
        (33, 400.0, "wide", "3 T"),
        (33, -400.0, "spike", "-3 T"),
        (33, "mixed", "wide", 0.0),
        (33, "80 /T", "wide", 0.0),
        (33, "-80 /T", "spike", 0.0),
        (33, "-20 /T", "wide", -5.0),
        (196, -80.0, "wide", 0.0),
    ],
)
def test_big_decays_keys_and_bonuses(
    bi_wkv_inputs: Make, tokens: int, decay: float | str, keys: str, bonus: float | str
) -> None:
    inputs, grad = bi_wkv_inputs(tokens, decay, keys, bonus)
    actual = with_tiles(inputs, grad)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), TOLERANCE, floors(tokens))


@pytest.mark.parametrize("decay", [1000.0, -1000.0])
def test_the_biggest_decay_stays_finite(bi_wkv_inputs: Make, decay: float) -> None:
    inputs, grad = bi_wkv_inputs(33, decay, "wide", "3 T", batch=1)
    actual = with_tiles(inputs, grad)
    assert {n for n, x in actual.items() if not x.isfinite().all()} == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(bi_wkv_inputs: Make, dtype: torch.dtype) -> None:
    inputs, grad = bi_wkv_inputs(49, "-5 /T", batch=3, channels=24, dtype=dtype)
    assert_no_worse_than_plain(in_triton, plain, inputs, grad)


def test_dtypes_of_autocast(bi_wkv_inputs: Make) -> None:
    inputs, grad = bi_wkv_inputs(9, "3 /T")
    inputs = {n: x if n in "wu" else x.bfloat16() for n, x in inputs.items()}
    actual = value_and_grads(in_triton, inputs, grad.bfloat16())
    assert {n: actual[f"g{n}"].dtype for n in inputs} == {n: x.dtype for n, x in inputs.items()}
    tolerance = {"y": 2**-8, "gk": 2**-7, "gv": 2**-8, "gw": 1e-5, "gu": 1e-5}
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad.bfloat16()), tolerance)


def test_several_programs_across_channels(bi_wkv_inputs: Make) -> None:
    inputs, grad = bi_wkv_inputs(17, "3 /T", channels=200, batch=1)
    actual = with_tiles(inputs, grad, block_c=64)
    assert_close(actual, oracle(bi_wkv_definition, inputs, grad), TOLERANCE, floors(17))


def test_strides_do_not_matter(bi_wkv_inputs: Make) -> None:
    inputs, grad = bi_wkv_inputs(9, "3 /T")
    strided = {n: x.transpose(-1, 0).contiguous().transpose(-1, 0) for n, x in inputs.items()}
    strided["w"] = inputs["w"].repeat_interleave(2)[::2]
    assert not any(strided[n].is_contiguous() for n in "wkv")
    expected = with_tiles(inputs, grad, segments=2)
    grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    actual = with_tiles(strided, grad, segments=2)
    assert {n for n, x in expected.items() if not actual[n].equal(x)} == set()


def test_a_key_of_minus_infinity_masks_its_token(bi_wkv_inputs: Make) -> None:
    for decay in ("3 /T", 90.0):
        inputs, grad = bi_wkv_inputs(12, decay)
        kept = {n: x[:, 2:-1] if n in "kv" else x for n, x in inputs.items()}
        inputs["k"][:, :2] = inputs["k"][:, -1:] = -torch.inf
        grad[:, :2] = grad[:, -1:] = 0
        actual = with_tiles(inputs, grad, segments=2)
        expected = oracle(bi_wkv_definition, kept, grad[:, 2:-1])
        for name in ("y", "gk", "gv"):
            assert max_error(actual[name][:, 2:-1], expected[name]) < 1e-5
        assert (actual["gk"][:, :2] == 0).all()


def test_nan_in_nan_out(bi_wkv_inputs: Make) -> None:
    for name in "wukv":
        inputs, _ = bi_wkv_inputs(9, "3 /T")
        inputs[name].view(-1, 5)[0, 2] = float("nan")
        y = triton_kernel.forward(**inputs, tiles=replace(FORWARD, segments=2))
        batch = slice(None) if name in "wu" else 0
        assert y[batch, :, 2].isnan().all()
        assert y[:, :, :2].isfinite().all()


def test_gradients_of_parameters_are_the_same_in_every_run(bi_wkv_inputs: Make) -> None:
    inputs, grad = bi_wkv_inputs(9, "3 /T")
    first, *others = (with_tiles(inputs, grad, length=8, segments=2) for _ in range(3))
    assert all(first[n].equal(other[n]) for other in others for n in first)


def test_too_large_an_item_is_refused() -> None:
    w, k = torch.zeros(1 << 15), torch.zeros(1, 1, 1).expand(1, 1 << 15, 1 << 15)
    with pytest.raises(ValueError, match=r"less than 2\^30 elements"):
        triton_kernel.forward(w, w, k, k, tiles=Tiles(4, 2, 8, 32, 8))


def wkv6_inputs(
    tokens: int, decay: float | str = "mixed", batch: int = 1, heads: int = 1, size: int = 5
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs of wkv6_bi and a gradient; decays per token of about 1 (-14) to 0 (300)."""
    rng = torch.Generator().manual_seed(tokens * 1000 + size)
    shape = (batch, tokens, heads * size)
    r, k, v, w, grad = (torch.randn(shape, generator=rng) for _ in range(5))
    w = 4 * w - 2 if decay == "mixed" else w + decay
    return {"r": r, "k": k, "v": v, "w": w, "u": torch.randn(heads, size, generator=rng)}, grad


def wkv6_with_tiles(inputs: dict[str, Tensor], grad: Tensor, **changes: int) -> dict[str, Tensor]:
    """Evaluate and differentiate wkv6_bi with short chunks, in unwritten memory full of NaN."""
    shapes = {"length": 4, "block": 16, "rows": 16, **changes}
    tiles = replace(wkv6.FORWARD, **shapes)
    with nan_filled_empty():
        y = wkv6.forward(**inputs, tiles=tiles)
        grads = wkv6.backward(**inputs, gy=grad, tiles=tiles)
    return {"y": y, **{f"g{n}": g for n, g in zip(inputs, grads, strict=True)}}


def wkv6_in_triton(*x: Tensor) -> Tensor:
    return wkv6_bi(*x, backend="triton")


def assert_wkv6(inputs: dict[str, Tensor], grad: Tensor, actual: dict[str, Tensor]) -> None:
    """Compare with the definition; gw is what is left of such terms where decays are 0 or 1."""
    floor = {"gw": float(grad.abs().amax())}
    assert_close(actual, oracle(wkv6_bi_definition, inputs, grad), 3e-6, floor)


def test_wkv6_through_the_operator() -> None:
    inputs, grad = wkv6_inputs(17)
    assert_wkv6(inputs, grad, value_and_grads(wkv6_in_triton, inputs, grad))


@pytest.mark.parametrize("tokens", [1, 3, 4, 9, 21])
def test_wkv6_of_several_chunks(tokens: int) -> None:
    inputs, grad = wkv6_inputs(tokens)
    assert_wkv6(inputs, grad, wkv6_with_tiles(inputs, grad))


@pytest.mark.parametrize("decay", [-14.0, -2.0, 3.0, 300.0])
def test_wkv6_of_weak_and_strong_decays(decay: float) -> None:
    inputs, grad = wkv6_inputs(10, decay)
    assert_wkv6(inputs, grad, wkv6_with_tiles(inputs, grad))


@pytest.mark.parametrize(
    ("size", "changes"),
    [(32, {"block": 32}), (64, {"block": 64}), (20, {"length": 8, "group": 4}), (24, {"rows": 8})],
)
def test_wkv6_of_other_heads_and_tiles(size: int, changes: dict[str, int]) -> None:
    inputs, grad = wkv6_inputs(6, size=size)
    assert_wkv6(inputs, grad, wkv6_with_tiles(inputs, grad, **changes))


def test_wkv6_of_several_heads_and_items_with_any_strides() -> None:
    inputs, grad = wkv6_inputs(5, batch=2, heads=3)
    strided = {n: x.mT.contiguous().mT for n, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    assert_wkv6(inputs, grad, wkv6_with_tiles(strided, grad.mT.contiguous().mT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wkv6_in_low_precision(dtype: torch.dtype) -> None:
    inputs, grad = wkv6_inputs(9, -2.0)
    inputs = {n: x if n in "wu" else x.to(dtype) for n, x in inputs.items()}
    actual = wkv6_with_tiles(inputs, grad.to(dtype))
    assert {n: actual[f"g{n}"].dtype for n in inputs} == {n: x.dtype for n, x in inputs.items()}
    # Rounded once at the end; w and u are float32 all the way.
    tolerance = dict.fromkeys(("y", "gr", "gk", "gv"), 2**-8) | {"gw": 1e-5, "gu": 1e-5}
    assert_close(actual, oracle(wkv6_bi_definition, inputs, grad.to(dtype)), tolerance)


def test_wkv6_keeps_nan_and_gives_the_same_in_every_run() -> None:
    inputs, grad = wkv6_inputs(5, heads=2)
    first, second = (wkv6_with_tiles(inputs, grad) for _ in range(2))
    assert all(x.equal(second[n]) for n, x in first.items())
    for name in ("k", "w"):
        spoilt = {n: x.clone() for n, x in inputs.items()}
        spoilt[name][0, 2, 3] = float("nan")
        y = wkv6.forward(**spoilt, tiles=replace(wkv6.FORWARD, length=4, block=16, rows=16))
        assert y[0, :, :5].isnan().any()
        assert y[0, :, 5:].isfinite().all()


LEVELS = ((3, 5), (1, 1), (2, 7))
DEFORM = deform.Tiles(256, 4, block=8)


def deform_inputs(
    shapes: Sequence[tuple[int, int]] = LEVELS,
    sizes: tuple[int, int, int, int, int] = (2, 9, 2, 5, 2),
    beyond: float = 0.5,
) -> tuple[dict[str, Tensor], Tensor]:
    """Make inputs of deform_attn and a gradient.

    Args:
        shapes: of the levels.
        sizes: batch, queries, heads, channels of a head, points.
        beyond: how far samples lie outside of the map, in its sides.
    """
    batch, queries, heads, channels, points = sizes
    rng = torch.Generator().manual_seed(sum(sizes) + len(shapes))
    spread = (batch, queries, heads, len(shapes), points)
    pixels = sum(map(math.prod, shapes))
    uniform = torch.rand((*spread, 2), generator=rng)
    inputs = {
        "value": torch.randn((batch, pixels, heads, channels), generator=rng),
        "locations": uniform * (1 + 2 * beyond) - beyond,
        "weights": torch.randn(spread, generator=rng),
    }
    return inputs, torch.randn((batch, queries, heads * channels), generator=rng)


def deform_with_tiles(
    inputs: dict[str, Tensor],
    grad: Tensor,
    shapes: Sequence[tuple[int, int]] = LEVELS,
    tiles: deform.Tiles = DEFORM,
    integers: bool = True,
) -> dict[str, Tensor]:
    """Evaluate and differentiate deform_attn.

    With `integers` gradients of value are sums of integers, and unwritten memory is full of NaN.
    """
    tensors = inputs.values()
    with nan_filled_empty() if integers else nullcontext():
        y = deform.forward(*tensors, shapes, tiles)
        grads = deform.backward(*tensors, grad, shapes, tiles)
    return {"y": y, **{f"g{n}": g for n, g in zip(inputs, grads, strict=True)}}


def assert_deform(
    inputs: dict[str, Tensor],
    grad: Tensor,
    actual: dict[str, Tensor],
    shapes: Sequence[tuple[int, int]] = LEVELS,
    tolerance: float | dict[str, float] = 1e-6,
) -> None:
    """Compare with the definition; terms of about 1 may cancel."""
    expected = oracle(lambda *x: deform_attn_definition(*x, shapes), inputs, grad)
    assert_close(actual, expected, tolerance, floor=1.0)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(
    ("tiles", "sizes"),
    [
        (deform.Tiles(256, 4, block=8), (1, 9, 2, 20, 2)),
        (deform.Tiles(64, 4, block=4), (1, 11, 3, 3, 1)),
        (deform.Tiles(16, 4), (3, 1, 1, 1, 2)),
    ],
)
def test_deform_attn_of_several_tiles(
    tiles: deform.Tiles, sizes: tuple[int, int, int, int, int], integers: bool
) -> None:
    inputs, grad = deform_inputs(sizes=sizes)
    assert_deform(inputs, grad, deform_with_tiles(inputs, grad, LEVELS, tiles, integers))


def test_deform_attn_of_many_levels() -> None:
    shapes = [(1, 1), (16, 16), (1, 9), (33, 1), (4, 32)]
    inputs, grad = deform_inputs(shapes, (1, 5, 3, 6, 2))
    tiles = deform.Tiles(128, 4)
    assert_deform(inputs, grad, deform_with_tiles(inputs, grad, shapes, tiles), shapes)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deform_attn_in_low_precision(dtype: torch.dtype, integers: bool) -> None:
    inputs, grad = deform_inputs()
    inputs = {n: x if n == "locations" else x.to(dtype) for n, x in inputs.items()}
    actual = deform_with_tiles(inputs, grad.to(dtype), integers=integers)
    assert actual["y"].dtype == dtype
    assert {n: actual[f"g{n}"].dtype for n in inputs} == {n: x.dtype for n, x in inputs.items()}
    # Rounded once at the end; locations are float32 all the way.
    tolerance = dict.fromkeys(("y", "gvalue", "gweights"), 2**-8) | {"glocations": 1e-6}
    assert_deform(inputs, grad.to(dtype), actual, tolerance=tolerance)


def test_deform_attn_of_samples_that_are_nowhere_near() -> None:
    inputs, grad = deform_inputs()
    inputs["locations"][:, ::3] = torch.tensor([1e30, -torch.inf])
    inputs["locations"][:, 1::3, ..., 0] = torch.nan
    inputs["locations"][:, 2::3, ..., 1] = 2.6
    inputs["value"].fill_(torch.inf)
    actual = deform_with_tiles(inputs, grad)
    assert {n for n, x in actual.items() if x.count_nonzero()} == set()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_deform_attn_adds_integers_of_any_scale(size: float) -> None:
    inputs, grad = deform_inputs(sizes=(1, 9, 2, 4, 1))
    actual = deform_with_tiles(inputs, grad * size)["gvalue"]
    expected = oracle(lambda *x: deform_attn_definition(*x, LEVELS), inputs, grad * size)
    assert max_error(actual, expected["gvalue"]) < 1e-6


def test_deform_attn_adds_integers_in_any_order() -> None:
    inputs, grad = deform_inputs()
    first = deform_with_tiles(inputs, grad)["gvalue"]
    turned = {n: x if n == "value" else x.flip(1) for n, x in inputs.items()}
    other = deform_with_tiles(turned, grad.flip(1), tiles=deform.Tiles(64, 4))["gvalue"]
    assert other.equal(first)


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
def test_deform_attn_does_not_hide_what_is_not_finite(wrong: float) -> None:
    inputs, grad = deform_inputs(sizes=(1, 3, 1, 4, 1), beyond=0.0)
    grad[0, 1, 2] = wrong
    assert deform_with_tiles(inputs, grad)["gvalue"].isnan().all()
    gv = deform_with_tiles(inputs, grad, integers=False)["gvalue"]
    assert not gv[..., 2].isfinite().all()
    assert gv[..., [0, 1, 3]].isfinite().all()


def test_deform_attn_refuses_too_large_an_item() -> None:
    value = torch.zeros(1).expand(1, 1 << 15, 1, 1 << 15)
    locations, weights = torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"less than 2\^30 numbers an item"):
        deform.forward(value, locations, weights, [(1 << 15, 1)])
