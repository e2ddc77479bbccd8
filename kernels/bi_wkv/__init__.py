"""Bi-WKV, the bidirectional linear attention of Vision-RWKV (arXiv:2403.02308)."""

from typing import Any

import torch
from torch import Tensor

from .. import cpu as kernels_cpu
from .. import triton_support
from ..dispatch import Backend, Operator
from ..seam import Seam, check_tensors, compute_dtype
from . import cpu, cuda, export, reference, scan, triton_kernel

__all__ = ["OPERATOR", "bi_wkv"]

OPERATOR = Operator(
    "bi_wkv",
    [
        Backend(
            "cpu",
            cpu.forward,
            cpu.backward,
            kernels_cpu.probe,
            kernels_cpu.DTYPES,
            keeping=cpu.keeping,
        ),
        Backend("cuda", cuda.forward, cuda.backward, cuda.probe, cuda.DTYPES),
        Backend(
            "triton",
            triton_kernel.forward,
            triton_kernel.backward,
            triton_support.probe,
            triton_support.DTYPES,
        ),
        Backend("torch", scan.forward, scan.backward),
        Backend("reference", reference.forward, reference.backward),
        Backend("export", export.forward, scan.backward),
    ],
    order={"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch"), "*": ("torch",)},
)
_SEAM = Seam(OPERATOR, "vision.kernels.bi_wkv.export.bi_wkv_cumsum", saves_output=True)


def bi_wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> Tensor:
    """Mix the tokens of each channel, in time linear in their number (arXiv:2403.02308, eq. 2).

    y_t = (Σ_{i≠t} e^{-(|t-i|-1)·w + k_i} v_i + e^{u+k_t} v_t)
          / (Σ_{i≠t} e^{-(|t-i|-1)·w + k_i} + e^{u+k_t})

    Sums are accumulated in float32, in float64 if an input is float64. Differentiable once, with
    exact gradients for all four tensors.

    Args:
        w: decay per token, (C,). The caller has divided the paper's w by the number of tokens.
            Positive fades with the distance, negative grows with it.
        u: bonus of the token itself, (C,), divided likewise.
        k: keys, (B, T, C), any strides.
        v: values, (B, T, C), any strides.
        backend: name of the implementation (see `python -m vision.kernels`); None leaves the
            choice to `use_backend`, the environment variable `VISION_KERNELS_BACKEND` and the
            device, in this order. A compiled graph keeps the name that held when it was traced.
            "export" puts ordinary operators into the graph, as torch.onnx.export needs, which
            takes it by itself.

    Returns:
        (B, T, C) in v's dtype.

    Raises:
        TypeError: an argument is not a floating point tensor of 16, 32 or 64 bits.
        ValueError: shapes or devices do not match, a dimension is empty, unknown backend.
        BackendUnavailableError: the backend that was asked for cannot run here.
    """
    y = _SEAM.call(_check, backend, (w, u, k, v))
    if y is not None:
        return y
    name = OPERATOR.requested(backend)
    if name == "export" or torch.onnx.is_in_onnx_export():
        return export.bi_wkv_cumsum(w, u, k, v)
    return _forward_op(w, u, k, v, name)


def _check(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensors("bi_wkv", {"w": w, "u": u, "v": v, "k": k})
    if k.dim() != 3 or k.shape != v.shape:
        raise ValueError(
            f"bi_wkv needs k and v of one shape (B, T, C), got {tuple(k.shape)} and "
            f"{tuple(v.shape)}; flatten a map (B, C, H, W) with x.flatten(2).transpose(1, 2)"
        )
    if w.dim() != 1 or w.shape != u.shape or w.shape[0] != k.shape[2]:
        raise ValueError(
            f"bi_wkv needs w and u of shape (C,) = ({k.shape[2]},), like the last dimension of k; "
            f"got {tuple(w.shape)} and {tuple(u.shape)}"
        )
    if 0 in k.shape:
        raise ValueError(
            f"bi_wkv needs at least one batch item, token and channel, got k of shape "
            f"{tuple(k.shape)}; skip the call for an empty input"
        )


@torch.library.custom_op("vision::bi_wkv", mutates_args=())
def _forward_op(w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    # The fake tensors say contiguous, whatever a backend makes of the strides of its inputs.
    return _serving(backend, w, u, k, v).forward(w, u, k, v).contiguous()


@torch.library.custom_op("vision::bi_wkv_backward", mutates_args=())
def _backward_op(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, gy: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gw, gu, gk, gv = _serving(backend, w, u, k, v).backward(w, u, k, v, y, gy)
    return gw, gu, gk.contiguous(), gv.contiguous()


def _serving(name: str, *tensors: Tensor) -> Backend:
    return OPERATOR.resolve(OPERATOR.requested(name), tensors[2].device, compute_dtype(*tensors))


@_forward_op.register_fake
def _(w: Tensor, u: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    return v.new_empty(v.shape)


@_backward_op.register_fake
def _(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, gy: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return w.new_empty(w.shape), u.new_empty(u.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    w, u, k, v, ctx.backend = inputs
    ctx.save_for_backward(w, u, k, v, output)


def _differentiate_forward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(*ctx.saved_tensors, gy, ctx.backend), None


_forward_op.register_autograd(_differentiate_forward, setup_context=_setup_forward)
_backward_op.register_autograd(_SEAM.refuse)
