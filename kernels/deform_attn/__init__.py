"""Multi-scale deformable attention: a weighted sum of a few points of several maps.

Deformable DETR: arXiv:2010.04159. Values and gradients are those of mmcv's compiled operator.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import triton_support
from ..dispatch import Backend, Operator
from ..seam import Seam, check_tensors, compute_dtype
from . import plain, reference, triton_kernel

__all__ = ["OPERATOR", "deform_attn"]

OPERATOR = Operator(
    "deform_attn",
    [
        Backend(
            "triton",
            triton_kernel.forward,
            triton_kernel.backward,
            triton_support.probe,
            triton_support.DTYPES,
        ),
        Backend("torch", plain.forward, plain.backward),
        Backend("reference", reference.forward, reference.backward),
        Backend("export", plain.forward, plain.backward),
    ],
    order={"cuda": ("triton", "torch"), "*": ("torch",)},
)
_SEAM = Seam(OPERATOR, "vision.kernels.deform_attn.plain.deform_attn_plain")


def deform_attn(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Sequence[tuple[int, int]],
    *,
    backend: str | None = None,
) -> Tensor:
    """Sum up bilinear samples of several maps, for every query and head.

    y[b, q, m] = Σ_l Σ_p weights[b, q, m, l, p] · V_l[b, m](locations[b, q, m, l, p])

    V_l(x, y) interpolates the map of level l between the centres of its pixels, which lie at
    ((i + 1/2) / W_l, (j + 1/2) / H_l); beyond the border there are zeros. Where a location hits a
    centre exactly, its gradient is the one to the right and below.

    Computed in float32, in float64 if an input is float64. Differentiable once, in the three
    tensors. The weights are used as they are: the softmax is the caller's.

    Args:
        value: the maps of all levels one after the other, row-major, (B, S, M, D) with M heads
            of D channels and S the pixels of all levels.
        locations: x and y of the samples, 0 to 1 over each map, (B, Q, M, L, P, 2).
        weights: of the samples, (B, Q, M, L, P).
        shapes: height and width of each of the L levels.
        backend: as for `bi_wkv`.

    Returns:
        (B, Q, M·D) in value's dtype, contiguous.

    Raises:
        TypeError: an argument is not a floating point tensor of 16, 32 or 64 bits.
        ValueError: shapes or devices do not match, a dimension is empty, or an unknown backend.
        BackendUnavailableError: the backend that was asked for cannot run here.
    """
    shapes = tuple((h, w) for h, w in shapes)
    tensors = value, locations, weights
    y = _SEAM.call(_check, backend, tensors, shapes)
    if y is not None:
        return y
    name = OPERATOR.requested(backend)
    if name == "export" or torch.onnx.is_in_onnx_export():
        return plain.deform_attn_plain(*tensors, shapes).contiguous()
    return _forward_op(*tensors, [side for shape in shapes for side in shape], name)


def _check(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[tuple[int, int]]
) -> None:
    check_tensors("deform_attn", {"locations": locations, "weights": weights, "value": value})
    if value.dim() != 4 or locations.dim() != 6:
        raise ValueError(
            "deform_attn needs value (B, S, M, D) and locations (B, Q, M, L, P, 2), got "
            f"{tuple(value.shape)} and {tuple(locations.shape)}"
        )
    (batch, pixels, heads, channels), (_, queries, _, _, points, _) = value.shape, locations.shape
    wanted = (batch, queries, heads, len(shapes), points)
    if tuple(weights.shape) != wanted or tuple(locations.shape) != (*wanted, 2):
        raise ValueError(
            "deform_attn needs weights (B, Q, M, L, P) and locations (B, Q, M, L, P, 2) with "
            f"B = {batch} and M = {heads} of value and L = {len(shapes)} shapes, got "
            f"{tuple(weights.shape)} and {tuple(locations.shape)}"
        )
    if 0 in (*wanted, channels) or min(map(min, shapes)) < 1:
        raise ValueError(
            "deform_attn needs at least one of everything, got value "
            f"{tuple(value.shape)}, locations {tuple(locations.shape)}, shapes {list(shapes)}; "
            "skip the call for an empty input"
        )
    if sum(map(math.prod, shapes)) != pixels:
        raise ValueError(
            f"deform_attn needs value with the pixels of all maps, {list(shapes)} are "
            f"{sum(map(math.prod, shapes))}, got {pixels}"
        )


@torch.library.custom_op("vision::deform_attn", mutates_args=())
def _forward_op(
    value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int], backend: str
) -> Tensor:
    serving = _serving(backend, value, locations, weights)
    # The fake tensors say contiguous, whatever a backend makes of the strides of its inputs.
    return serving.forward(value, locations, weights, _pairs(sides)).contiguous()


@torch.library.custom_op("vision::deform_attn_backward", mutates_args=())
def _backward_op(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad: Tensor,
    sides: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    serving = _serving(backend, value, locations, weights)
    gv, gl, gw = serving.backward(value, locations, weights, grad, _pairs(sides))
    return gv.contiguous(), gl.contiguous(), gw.contiguous()


def _pairs(sides: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sides[::2], sides[1::2], strict=True))


def _serving(name: str, *tensors: Tensor) -> Backend:
    return OPERATOR.resolve(OPERATOR.requested(name), tensors[0].device, compute_dtype(*tensors))


@_forward_op.register_fake
def _(
    value: Tensor, locations: Tensor, weights: Tensor, sides: Sequence[int], backend: str
) -> Tensor:
    batch, _, heads, channels = value.shape
    return value.new_empty((batch, locations.shape[1], heads * channels))


@_backward_op.register_fake
def _(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad: Tensor,
    sides: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gv, gl, gw = (x.new_empty(x.shape) for x in (value, locations, weights))
    return gv, gl, gw


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sides, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_forward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(*ctx.saved_tensors, grad, ctx.sides, ctx.backend), None, None


_forward_op.register_autograd(_differentiate_forward, setup_context=_setup_forward)
_backward_op.register_autograd(_SEAM.refuse)
