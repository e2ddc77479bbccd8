"""Token shift and the learnt interpolation between a token and its shifted neighbour, in one pass.

The shift is that of Vision-RWKV (arXiv:2403.02308), the interpolation that of all RWKV models.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import cpu as kernels_cpu
from .. import triton_support
from ..dispatch import Backend, Operator
from ..seam import Seam, check_tensors, compute_dtype
from . import cpu, plain, reference, triton_kernel

__all__ = ["OPERATOR", "shift_mix"]

OPERATOR = Operator(
    "shift_mix",
    [
        Backend("cpu", cpu.forward, cpu.backward, kernels_cpu.probe, kernels_cpu.DTYPES),
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
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch"), "*": ("torch",)},
)
_SEAM = Seam(OPERATOR, "vision.kernels.shift_mix.plain.shift_mix_plain", several=True)


def shift_mix(
    x: Tensor,
    mu: Tensor,
    hw: tuple[int, int],
    *,
    pixels: int = 1,
    edges: Sequence[int],
    backend: str | None = None,
) -> list[Tensor]:
    """Mix every token with a neighbour on the grid, in several proportions at once.

    `mixed_n = s + (x - s) * mu_n` where s is x moved by `pixels` patches: channels from `edges[0]`
    to `edges[1]` take the left neighbour, up to `edges[2]` the right one, up to `edges[3]` the
    upper one, up to `edges[4]` the lower one; zeros enter at the border. Channels from `edges[4]`
    on have no neighbour (s = x) and stay what they are.

    Computed in float32, in float64 if an input is float64. Differentiable once, in x and mu.

    Args:
        x: tokens, row-major over the grid, (B, H*W, C), any strides.
        mu: proportions, (N, C), N at most 8; 1 keeps the token, 0 takes the neighbour.
        hw: grid height and width; (1, T) for a sequence without a grid.
        pixels: how far to move, in patches, at least 1.
        edges: five rising channel numbers from 0 to at most C.
        backend: as for `bi_wkv`.

    Returns:
        N tensors (B, H*W, C) in x's dtype.

    Raises:
        TypeError: x or mu is not a floating point tensor of 16, 32 or 64 bits.
        ValueError: shapes, grid, edges or devices do not match, or an unknown backend.
        BackendUnavailableError: the backend that was asked for cannot run here.
    """
    h, w, starts = *hw, tuple(edges)
    mixed = _SEAM.call(_check, backend, (x, mu), h, w, pixels, starts)
    if mixed is not None:
        return mixed
    name = OPERATOR.requested(backend)
    if name == "export" or torch.onnx.is_in_onnx_export():
        return plain.shift_mix_plain(x, mu, h, w, pixels, starts)
    return _forward_op(x, mu, h, w, pixels, list(starts), name)


def _check(x: Tensor, mu: Tensor, h: int, w: int, pixels: int, edges: Sequence[int]) -> None:
    check_tensors("shift_mix", {"mu": mu, "x": x})
    if x.dim() != 3 or mu.dim() != 2 or mu.shape[1] != x.shape[2] or 0 in mu.shape or 0 in x.shape:
        raise ValueError(
            "shift_mix needs tokens (B, T, C) and proportions (N, C) of one C, none of them "
            f"empty, got {tuple(x.shape)} and {tuple(mu.shape)}"
        )
    _, tokens, c = x.shape
    if mu.shape[0] > kernels_cpu.MOST_MIXED:
        raise ValueError(
            f"shift_mix mixes in at most {kernels_cpu.MOST_MIXED} proportions at once, got "
            f"{mu.shape[0]}"
        )
    if h < 1 or w < 1 or h * w != tokens:
        raise ValueError(f"shift_mix got {tokens} tokens for a grid of {h} x {w} = {h * w}")
    if pixels < 1:
        raise ValueError(f"shift_mix moves by at least 1 patch, got pixels={pixels}")
    if len(edges) != 5 or not 0 == edges[0] <= edges[1] <= edges[2] <= edges[3] <= edges[4] <= c:
        raise ValueError(
            f"shift_mix needs five rising channel numbers from 0 to at most {c} as edges, "
            f"got {list(edges)}"
        )


@torch.library.custom_op("vision::shift_mix", mutates_args=())
def _forward_op(
    x: Tensor, mu: Tensor, h: int, w: int, pixels: int, edges: list[int], backend: str
) -> list[Tensor]:
    serving = _serving(backend, x, mu)
    # The fake tensors say contiguous, whatever a backend makes of the strides of its inputs.
    return [y.contiguous() for y in serving.forward(x, mu, h, w, pixels, edges)]


@torch.library.custom_op("vision::shift_mix_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    mu: Tensor,
    grads: list[Tensor],
    h: int,
    w: int,
    pixels: int,
    edges: list[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    gx, gmu = _serving(backend, x, mu).backward(x, mu, grads, h, w, pixels, edges)
    return gx.contiguous(), gmu.contiguous()


def _serving(name: str, x: Tensor, mu: Tensor) -> Backend:
    return OPERATOR.resolve(OPERATOR.requested(name), x.device, compute_dtype(x, mu))


@_forward_op.register_fake
def _(
    x: Tensor, mu: Tensor, h: int, w: int, pixels: int, edges: list[int], backend: str
) -> list[Tensor]:
    return [x.new_empty(x.shape) for _ in range(mu.shape[0])]


@_backward_op.register_fake
def _(
    x: Tensor,
    mu: Tensor,
    grads: list[Tensor],
    h: int,
    w: int,
    pixels: int,
    edges: list[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), mu.new_empty(mu.shape)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, mu, *ctx.settings = inputs
    ctx.save_for_backward(x, mu)


def _differentiate_forward(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    # An output that nobody used has a gradient of zeros, which autograd fills in.
    return *_backward_op(*ctx.saved_tensors, grads, *ctx.settings), None, None, None, None, None


_forward_op.register_autograd(_differentiate_forward, setup_context=_setup_forward)
_backward_op.register_autograd(_SEAM.refuse)
