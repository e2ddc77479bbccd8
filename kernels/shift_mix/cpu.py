"""Shift and mix by the compiled CPU kernels (csrc/shift_mix_cpu.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import cpu


def forward(
    x: Tensor, mu: Tensor, h: int, w: int, pixels: int, edges: Sequence[int]
) -> list[Tensor]:
    """Compute `shift_mix` (see there)."""
    (tokens,), (proportions,) = cpu.side_by_side(x.dtype, x), cpu.wide(mu)
    mixed = [torch.empty(x.shape, dtype=x.dtype) for _ in range(mu.shape[0])]
    call = cpu.shift_mix_call(tokens, proportions, (h, w, pixels, edges), mixed)
    if cpu.library().vision_shift_mix(call, torch.get_num_threads()):
        raise cpu.failed("shift_mix")
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
    (tokens,), (proportions,) = cpu.side_by_side(x.dtype, x), cpu.wide(mu)
    grads, gx = [g.contiguous() for g in grads], torch.empty(x.shape, dtype=x.dtype)
    call = cpu.shift_mix_call(tokens, proportions, (h, w, pixels, edges), grads, gx)
    library = cpu.library()
    gmu = torch.zeros(library.vision_shift_mix_parts(call), *mu.shape, dtype=torch.float64)
    if library.vision_shift_mix_grads(call, gmu.data_ptr(), torch.get_num_threads()):
        raise cpu.failed("shift_mix")
    return gx, cpu.sum_of_parts(gmu, mu)
