"""The gate in ordinary torch operators, and the explicit backward of the backend "torch"."""

import torch
from torch import Tensor

from ..seam import compute_dtype


def gate_plain(r: Tensor, y: Tensor) -> Tensor:
    """Compute `gate` (see there) so that plain autograd gives the gradients."""
    dtype = compute_dtype(r, y)
    product = torch.sigmoid(r.to(dtype)) * y.to(dtype)
    return product.to(torch.promote_types(r.dtype, y.dtype))


def forward(r: Tensor, y: Tensor) -> Tensor:
    """Serve the backend "torch"; see `gate`."""
    return gate_plain(r, y)


def backward(r: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `gate`.

    Args:
        r: receptance.
        y: what passes the gate.
        grad: gradient of the output; all of one shape.

    Returns:
        Gradients of r and y, each in its input's dtype.
    """
    dtype = compute_dtype(r, y)
    open_ = torch.sigmoid(r.to(dtype))
    gy = open_ * grad.to(dtype)
    gr = gy * y.to(dtype) * (1 - open_)
    return gr.to(r.dtype), gy.to(y.dtype)
