"""The gate by the compiled CPU kernels (csrc/gate_cpu.h)."""

import torch
from torch import Tensor

from .. import cpu


def forward(r: Tensor, y: Tensor) -> Tensor:
    """Compute `gate` (see there)."""
    if r.dtype != y.dtype:
        result = torch.promote_types(r.dtype, y.dtype)
        r, y = r.to(result), y.to(result)
    r, y = r.contiguous(), y.contiguous()
    out, size = torch.empty_like(y), y.numel()
    call = cpu.gate_call(r, y, out=out.data_ptr())
    if cpu.library().vision_gate(call, size, torch.get_num_threads()):
        raise cpu.failed("gate")
    return out


def backward(r: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients; arguments and result as `plain.backward`."""
    dtype = cpu.common_dtype(r, y, grad)
    open_, value, grad = (x.to(dtype).contiguous() for x in (r, y, grad))
    gr, gy = torch.empty(r.shape, dtype=dtype), torch.empty(y.shape, dtype=dtype)
    call = cpu.gate_call(open_, value, grad=grad.data_ptr(), gr=gr.data_ptr(), gy=gy.data_ptr())
    if cpu.library().vision_gate_grads(call, y.numel(), torch.get_num_threads()):
        raise cpu.failed("gate")
    return gr.to(r.dtype), gy.to(y.dtype)
