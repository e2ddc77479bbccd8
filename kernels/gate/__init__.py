"""The receptance gate of the RWKV models, sigmoid(r) * y, in one pass."""

from typing import Any

import torch
from torch import Tensor

from .. import cpu as kernels_cpu
from .. import triton_support
from ..dispatch import Backend, Operator
from ..seam import Seam, check_tensors, compute_dtype
from . import cpu, plain, reference, triton_kernel

__all__ = ["OPERATOR", "gate"]

OPERATOR = Operator(
    "gate",
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
_SEAM = Seam(OPERATOR, "vision.kernels.gate.plain.gate_plain")


def gate(r: Tensor, y: Tensor, *, backend: str | None = None) -> Tensor:
    """Compute sigmoid(r) * y.

    Computed in float32, in float64 if an input is float64. Differentiable once, in r and y.

    Args:
        r: receptance, any shape and strides.
        y: what passes the gate, of the same shape.
        backend: as for `bi_wkv`.

    Returns:
        A contiguous tensor of the same shape, in the wider dtype of the two.

    Raises:
        TypeError: an argument is not a floating point tensor of 16, 32 or 64 bits.
        ValueError: shapes or devices differ, or an unknown backend.
        BackendUnavailableError: the backend that was asked for cannot run here.
    """
    gated = _SEAM.call(_check, backend, (r, y))
    if gated is not None:
        return gated
    name = OPERATOR.requested(backend)
    if name == "export" or torch.onnx.is_in_onnx_export():
        return plain.gate_plain(r, y).contiguous()
    return _forward_op(r, y, name)


def _check(r: Tensor, y: Tensor) -> None:
    check_tensors("gate", {"r": r, "y": y})
    if r.shape != y.shape:
        raise ValueError(f"gate needs r and y of one shape, got {tuple(r.shape)}, {tuple(y.shape)}")


@torch.library.custom_op("vision::gate", mutates_args=())
def _forward_op(r: Tensor, y: Tensor, backend: str) -> Tensor:
    # The fake tensors say contiguous, whatever a backend makes of the strides of its inputs.
    return _serving(backend, r, y).forward(r, y).contiguous()


@torch.library.custom_op("vision::gate_backward", mutates_args=())
def _backward_op(r: Tensor, y: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    gr, gy = _serving(backend, r, y).backward(r, y, grad)
    return gr.contiguous(), gy.contiguous()


def _serving(name: str, r: Tensor, y: Tensor) -> Backend:
    return OPERATOR.resolve(OPERATOR.requested(name), y.device, compute_dtype(r, y))


@_forward_op.register_fake
def _(r: Tensor, y: Tensor, backend: str) -> Tensor:
    return y.new_empty(y.shape, dtype=torch.promote_types(r.dtype, y.dtype))


@_backward_op.register_fake
def _(r: Tensor, y: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return r.new_empty(r.shape), y.new_empty(y.shape)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    r, y, ctx.backend = inputs
    ctx.save_for_backward(r, y)


def _differentiate_forward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_op(*ctx.saved_tensors, grad, ctx.backend), None


_forward_op.register_autograd(_differentiate_forward, setup_context=_setup_forward)
_backward_op.register_autograd(_SEAM.refuse)
