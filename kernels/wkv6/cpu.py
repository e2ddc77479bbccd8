"""Bidirectional WKV6 by the compiled CPU kernel (csrc/wkv6_cpu.h says how it works)."""

import torch
from torch import Tensor

from .. import cpu


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Serve the backend "cpu"; see `wkv6_bi`.

    Args:
        r: receptance, (B, T, C).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        w: decay, (B, T, C).
        u: bonus, (H, N).

    Returns:
        (B, T, C) in v's dtype, contiguous.
    """
    bonus, *tensors = *cpu.wide(u), *cpu.side_by_side(torch.float32, r, k, v, w)
    y = torch.empty(v.shape, dtype=torch.float32)
    if cpu.library().vision_wkv6(cpu.wkv6_call(bonus, *tensors, y), torch.get_num_threads()):
        raise cpu.failed("wkv6_bi")
    return y.to(v.dtype)
