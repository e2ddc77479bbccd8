"""The gate by the compiled CPU kernels (csrc/gate_cpu.h)."""

import torch
from torch import Tensor

from .. import cpu


def forward(r: Tensor, y: Tensor) -> Tensor:
    """Compute `gate` (see there)."""
    result = torch.promote_types(r.dtype, y.dtype)
    r, y = r.to(result).contiguous(), y.to(result).contiguous()
    out = torch.empty_like(y)
    call = cpu.GateCall(cpu.dtype_code(result), r.data_ptr(), y.data_ptr(), None, out.data_ptr())
    status = cpu.library().vision_gate(call, y.numel(), cpu.threads_for(y.numel()))
    cpu.check(status, "gate")
    return out


def backward(r: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients; arguments and result as `plain.backward`."""
    dtype = cpu.common_dtype(r, y, grad)
    open_, value, grad = (x.to(dtype).contiguous() for x in (r, y, grad))
    gr, gy = torch.empty(r.shape, dtype=dtype), torch.empty(y.shape, dtype=dtype)
    call = cpu.GateCall(
        cpu.dtype_code(dtype),
        open_.data_ptr(),
        value.data_ptr(),
        grad.data_ptr(),
        None,
        gr.data_ptr(),
        gy.data_ptr(),
    )
    status = cpu.library().vision_gate_grads(call, y.numel(), cpu.threads_for(y.numel()))
    cpu.check(status, "gate")
    return gr.to(r.dtype), gy.to(y.dtype)
