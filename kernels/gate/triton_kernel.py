"""The gate in Triton: launchers of the kernels in `triton_jit`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..triton_support import LAUNCH, ceil_div, choose


@dataclass(frozen=True)
class Tiles:
    """Elements of a program, a power of two, and its warps."""

    block: int
    num_warps: int


DEFAULT = Tiles(1024, 4)
_CANDIDATES = (DEFAULT, Tiles(512, 4), Tiles(2048, 8), Tiles(4096, 8))


def _choose(name: str, run: Callable[[Tiles], object], r: Tensor, y: Tensor) -> Tiles:
    key = (f"gate {name}", r.numel().bit_length(), r.dtype, y.dtype, y.device)
    return choose(key, _CANDIDATES, run)


def forward(r: Tensor, y: Tensor, tiles: Tiles | None = None) -> Tensor:
    """Serve the backend "triton"; see `gate`.

    Args:
        r: receptance.
        y: what passes the gate, of the same shape.
        tiles: tile shapes (default: the fastest, measured at the first call).
    """
    run = partial(_forward, r.contiguous(), y.contiguous())
    with torch.cuda.device_of(y):
        return run(tiles or _choose("forward", run, r, y))


def _forward(r: Tensor, y: Tensor, tiles: Tiles) -> Tensor:
    from .triton_jit import forward_kernel

    out = torch.empty_like(y, dtype=torch.promote_types(r.dtype, y.dtype))
    if out.numel():
        forward_kernel[(ceil_div(out.numel(), tiles.block),)](
            r, y, out, out.numel(), tiles.block, num_warps=tiles.num_warps, **LAUNCH
        )
    return out


def backward(
    r: Tensor, y: Tensor, grad: Tensor, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `gate`.

    Args:
        r: receptance.
        y: what passes the gate.
        grad: gradient of the output; all of one shape.
        tiles: tile shapes (default: the fastest, measured at the first call).

    Returns:
        Gradients of r and y, each in its input's dtype.
    """
    run = partial(_backward, r.contiguous(), y.contiguous(), grad.contiguous())
    with torch.cuda.device_of(y):
        return run(tiles or _choose("backward", run, r, y))


def _backward(r: Tensor, y: Tensor, grad: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    from .triton_jit import backward_kernel

    gr, gy = torch.empty_like(r), torch.empty_like(y)
    if r.numel():
        backward_kernel[(ceil_div(r.numel(), tiles.block),)](
            r, y, grad, gr, gy, r.numel(), tiles.block, num_warps=tiles.num_warps, **LAUNCH
        )
    return gr, gy
