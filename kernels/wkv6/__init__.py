"""WKV6 in both directions, the linear attention with data-dependent decay of VRWKV6.

RWKV-6: arXiv:2404.05892; the two directions: OpenGVLab/Vision-RWKV.
"""

from typing import Any

import torch
from torch import Tensor

from .. import cpu as kernels_cpu
from .. import triton_support
from ..dispatch import Backend, Operator
from ..seam import Seam, check_tensors, compute_dtype
from . import chunked, cpu, export, reference, triton_kernel

__all__ = ["OPERATOR", "wkv6_bi"]

OPERATOR = Operator(
    "wkv6_bi",
    [
        Backend("cpu", cpu.forward, chunked.backward, kernels_cpu.probe, kernels_cpu.DTYPES),
        Backend(
            "triton",
            triton_kernel.forward,
            triton_kernel.backward,
            triton_support.probe,
            triton_support.DTYPES,
        ),
        Backend("torch", chunked.forward, chunked.backward),
        Backend("reference", reference.forward, reference.backward),
        Backend("export", export.forward, chunked.backward),
    ],
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch"), "*": ("torch",)},
)
_SEAM = Seam(OPERATOR, "vision.kernels.wkv6.export.wkv6_bi_dense")


def wkv6_bi(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, *, backend: str | None = None
) -> Tensor:
    """Mix the tokens of each head, in time linear in their number.

    With d_t = exp(-exp(w_t)), for a head of N channels,

    y_t = (Σ_{i<t} k_i v_iᵀ ⊙ Π_{i<j<t} d_j + u ⊙ k_t v_tᵀ + Σ_{i>t} k_i v_iᵀ ⊙ Π_{t<j<i} d_j)ᵀ r_t

    where d and u scale the rows, the channels of k. The bonus u belongs to the forward direction
    alone, so the token itself counts once.

    Sums are accumulated in float32, in float64 if an input is float64. Differentiable once, with
    exact gradients for all five tensors.

    Args:
        r: receptance, (B, T, C), any strides.
        k: keys, (B, T, C), any strides.
        v: values, (B, T, C), any strides.
        w: decay of every token, (B, T, C), any strides; large forgets at once, small keeps.
        u: bonus of the token itself, (H, N) with H heads of N channels, H·N = C.
        backend: as for `bi_wkv`.

    Returns:
        (B, T, C) in v's dtype.

    Raises:
        TypeError: an argument is not a floating point tensor of 16, 32 or 64 bits.
        ValueError: shapes or devices do not match, a dimension is empty, unknown backend.
        BackendUnavailableError: the backend that was asked for cannot run here.
    """
    y = _SEAM.call(_check, backend, (r, k, v, w, u))
    if y is not None:
        return y
    name = OPERATOR.requested(backend)
    if name == "export" or torch.onnx.is_in_onnx_export():
        return export.wkv6_bi_dense(r, k, v, w, u)
    return _forward_op(r, k, v, w, u, name)


def _check(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> None:
    check_tensors("wkv6_bi", {"r": r, "v": v, "w": w, "u": u, "k": k})
    if k.dim() != 3 or not k.shape == r.shape == v.shape == w.shape:
        raise ValueError(
            "wkv6_bi needs r, k, v and w of one shape (B, T, C), got "
            f"{', '.join(str(tuple(x.shape)) for x in (r, k, v, w))}; flatten a map (B, C, H, W) "
            "with x.flatten(2).transpose(1, 2)"
        )
    if u.dim() != 2 or u.shape[0] * u.shape[1] != k.shape[2]:
        raise ValueError(
            f"wkv6_bi needs u of shape (H, N) with H·N = {k.shape[2]}, the last dimension of k; "
            f"got {tuple(u.shape)}: reshape it with u.view(heads, -1)"
        )
    if 0 in k.shape:
        raise ValueError(
            f"wkv6_bi needs at least one batch item, token and channel, got k of shape "
            f"{tuple(k.shape)}; skip the call for an empty input"
        )


@torch.library.custom_op("vision::wkv6_bi", mutates_args=())
def _forward_op(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, backend: str) -> Tensor:
    # The fake tensors say contiguous, whatever a backend makes of the strides of its inputs.
    return _serving(backend, r, k, v, w, u).forward(r, k, v, w, u).contiguous()


@torch.library.custom_op("vision::wkv6_bi_backward", mutates_args=())
def _backward_op(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, gy: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _serving(backend, r, k, v, w, u).backward(r, k, v, w, u, gy)
    gr, gk, gv, gw, gu = (grad.contiguous() for grad in grads)
    return gr, gk, gv, gw, gu


def _serving(name: str, *tensors: Tensor) -> Backend:
    return OPERATOR.resolve(OPERATOR.requested(name), tensors[1].device, compute_dtype(*tensors))


@_forward_op.register_fake
def _(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, backend: str) -> Tensor:
    return v.new_empty(v.shape)


@_backward_op.register_fake
def _(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, gy: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gr, gk, gv, gw, gu = (x.new_empty(x.shape) for x in (r, k, v, w, u))
    return gr, gk, gv, gw, gu


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_forward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(*ctx.saved_tensors, gy, ctx.backend), None


_forward_op.register_autograd(_differentiate_forward, setup_context=_setup_forward)
_backward_op.register_autograd(_SEAM.refuse)
