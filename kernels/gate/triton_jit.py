"""Triton code of the gate; import it only where Triton is (`triton_kernel` does)."""

import triton
import triton.language as tl


@triton.jit
def _block(count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return place, place < count


@triton.jit
def _load(pointer, place, inside):
    return tl.load(pointer + place, inside, 0.0).to(tl.float32)


@triton.jit
def forward_kernel(r_ptr, y_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """Write sigmoid(r) * y."""
    place, inside = _block(count, BLOCK)
    out = _load(y_ptr, place, inside) / (1 + tl.exp(-_load(r_ptr, place, inside)))
    tl.store(out_ptr + place, out, inside)


@triton.jit
def backward_kernel(r_ptr, y_ptr, grad_ptr, gr_ptr, gy_ptr, count, BLOCK: tl.constexpr):
    """Write the gradients of r and y."""
    place, inside = _block(count, BLOCK)
    r = _load(r_ptr, place, inside)
    gy = _load(grad_ptr, place, inside) / (1 + tl.exp(-r))
    tl.store(gy_ptr + place, gy, inside)
    # 1 - sigmoid(r) without cancellation.
    gr = gy * _load(y_ptr, place, inside) / (1 + tl.exp(r))
    tl.store(gr_ptr + place, gr, inside)
