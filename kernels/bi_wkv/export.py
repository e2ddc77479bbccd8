"""Bi-WKV made of ordinary operators (cumulative sums), for exporters that know no custom ones."""

import torch
from torch import Tensor


def bi_wkv_cumsum(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute Bi-WKV by one cumulative sum a direction; plain autograd gives the gradients.

    A prefix sum is e^{-(t-1)·w} Σ_{i<t} e^{k_i + i·w} v_i. The terms span e^{|w|·T + max k - min k}
    and lose their small ones where that leaves the range of the dtype: right while
    |w|·T + (max k - min k) is up to 150 in float32 and 1300 in float64; u is free.

    Args:
        w: decay per token, (C,).
        u: bonus of the token itself, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).

    Returns:
        (B, T, C) in v's dtype.
    """
    dtype = torch.promote_types(torch.promote_types(k.dtype, v.dtype), w.dtype)
    dtype = torch.promote_types(torch.promote_types(dtype, u.dtype), torch.float32)
    w, u, k, values = w.to(dtype), u.to(dtype), k.to(dtype), v.to(dtype)
    position = torch.arange(k.shape[1], device=k.device).to(dtype)
    slope = position[:, None] * w  # (T, C)
    mean_before, log_before = _exclusive_mean(k + slope, values)
    mean_after, log_after = _exclusive_mean((k - slope).flip(1), values.flip(1))
    log_before = log_before - (slope - w)
    log_after = log_after.flip(1) + (slope + w)
    largest = torch.maximum(torch.maximum(log_before, log_after), k + u).detach()
    before = torch.exp(log_before - largest)
    after = torch.exp(log_after - largest)
    own = torch.exp(k + u - largest)
    total = before * mean_before + after * mean_after.flip(1) + own * values
    return (total / (before + after + own)).to(v.dtype)


def _exclusive_mean(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of v_i with weights e^{l_i} over i < t, and the log of their sum."""
    limits = torch.finfo(logits.dtype)
    room = 70.0 if logits.dtype == torch.float32 else 650.0
    fixed = logits.detach()
    top = fixed.amax(1, keepdim=True)  # (B, 1, C)
    # Terms spread evenly about 1, the largest up to the top of the range: small ones stay above 0.
    scale = top - ((top - fixed.amin(1, keepdim=True)) / 2).clamp(max=room)
    weights = torch.exp(logits - scale)
    numerator, denominator = _shifted_cumsum(weights * values), _shifted_cumsum(weights)
    positive = denominator.clamp(min=limits.tiny)
    nothing = torch.full_like(denominator, -1e30)
    logarithm = torch.where(denominator > 0, torch.log(positive) + scale, nothing)
    return numerator / positive, logarithm


def _shifted_cumsum(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1].cumsum(1)], dim=1)


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Serve the backend "export" where the custom operator is called; see `bi_wkv_cumsum`."""
    return bi_wkv_cumsum(w, u, k, v)
