"""The definition of Bi-WKV, O(T²), in float64: what every other form is measured against."""

import torch
from torch import Tensor

# Elements of one (batch, token, token, channel) table: 32 MiB in float64.
_TABLE = 1 << 22


def bi_wkv_definition(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute Bi-WKV as written in arXiv:2403.02308, eq. 2, as a softmax over all tokens.

    Plain autograd gives the gradients. Finite for all finite inputs.

    Args:
        w: decay per token, (C,).
        u: bonus of the token itself, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).

    Returns:
        (B, T, C) in float64.
    """
    w, u, k, v = (x.double() for x in (w, u, k, v))
    batch, tokens, channels = k.shape
    step = max(1, _TABLE // (batch * tokens * tokens))
    parts = [
        _definition(w[c : c + step], u[c : c + step], k[..., c : c + step], v[..., c : c + step])
        for c in range(0, channels, step)
    ]
    return torch.cat(parts, dim=-1)


def _definition(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("btic,bic->btc", _logits(w, u, k).softmax(dim=2), v)


def _logits(w: Tensor, u: Tensor, k: Tensor) -> Tensor:
    gap = _gap(k)
    return torch.where(gap < 0, u, -gap * w) + k[:, None]  # (B, T, T, C)


def _gap(k: Tensor) -> Tensor:
    """Return |t-i| - 1, the number of tokens between two tokens, (T, T, 1)."""
    position = torch.arange(k.shape[1], device=k.device)
    return (position[:, None] - position).abs()[:, :, None] - 1


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Serve the backend "reference"; shapes as in `bi_wkv_definition`, result in v's dtype."""
    return bi_wkv_definition(w, u, k, v).to(v.dtype)


def backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, gy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of the definition, that of the softmax written out.

    Autograd does not run inside a custom operator, and this bounds the memory.

    Args:
        w: decay per token, (C,).
        u: bonus, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        y: the output, unused: it is computed again in float64.
        gy: gradient of the output, (B, T, C).

    Returns:
        Gradients of w, u, k, v, each in its input's dtype.
    """
    batch, tokens, channels = k.shape
    step = max(1, _TABLE // (batch * tokens * tokens))
    parts = []
    for c in range(0, channels, step):
        part = [x[..., c : c + step].double() for x in (w, u, k, v, gy)]
        parts.append(_gradients(*part))
    gw, gu, gk, gv = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return gw.to(w.dtype), gu.to(u.dtype), gk.to(k.dtype), gv.to(v.dtype)


def _gradients(w: Tensor, u: Tensor, k: Tensor, v: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    weight = _logits(w, u, k).softmax(dim=2)  # (B, T, T, C)
    y = torch.einsum("btic,bic->btc", weight, v)
    g_value = weight * gy[:, :, None]
    g_logit = g_value * (v[:, None] - y[:, :, None])
    gap = _gap(k)
    gw = -(g_logit * gap.clamp(min=0)).sum((0, 1, 2))
    gu = (g_logit * (gap < 0)).sum((0, 1, 2))
    return gw, gu, g_logit.sum(1), g_value.sum(1)
