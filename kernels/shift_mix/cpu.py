"""Shift and mix by the compiled CPU kernels (csrc/shift_mix_cpu.h)."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cpu


def forward(
    x: Tensor, mu: Tensor, h: int, w: int, pixels: int, edges: Sequence[int]
) -> list[Tensor]:
    """Compute `shift_mix` (see there)."""
    tokens = cpu.side_by_side(x, x.dtype)
    mixed = [x.new_empty(x.shape) for _ in range(mu.shape[0])]
    wide = mu.float().contiguous()
    call = _call(tokens, wide, h, w, pixels, edges, mixed)
    status = cpu.library().vision_shift_mix(call, cpu.threads_for(x.numel()))
    cpu.check(status, "shift_mix")
    return mixed


def backward(
    x: Tensor,
    mu: Tensor,
    grads: Sequence[Tensor],
    h: int,
    w: int,
    pixels: int,
    edges: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Compute the gradients; arguments and result as `plain.backward`."""
    tokens, grads = cpu.side_by_side(x, x.dtype), [g.contiguous() for g in grads]
    wide = mu.float().contiguous()
    gx = torch.empty(x.shape, dtype=x.dtype)
    call = _call(tokens, wide, h, w, pixels, edges, grads)
    call.gx = cpu.Rows.of(gx)
    library = cpu.library()
    gmu = torch.zeros(library.vision_shift_mix_parts(call), *mu.shape, dtype=torch.float64)
    status = library.vision_shift_mix_grads(call, gmu.data_ptr(), cpu.threads_for(x.numel()))
    cpu.check(status, "shift_mix")
    return gx, cpu.sum_of_parts(gmu, mu)


def _call(
    x: Tensor,
    mu: Tensor,
    h: int,
    w: int,
    pixels: int,
    edges: Sequence[int],
    mixed: Sequence[Tensor],
) -> cpu.ShiftMixCall:
    pointers = (ctypes.c_void_p * len(mixed))(*[one.data_ptr() for one in mixed])
    return cpu.ShiftMixCall(
        dtype=cpu.dtype_code(x.dtype),
        count=mu.shape[0],
        batch=x.shape[0],
        height=h,
        width=w,
        channels=x.shape[2],
        pixels=pixels,
        edges=(ctypes.c_int64 * 5)(*edges),
        mu=mu.data_ptr(),
        x=cpu.Rows.of(x),
        mixed=pointers,
    )
