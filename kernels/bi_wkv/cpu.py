"""Bi-WKV by the compiled CPU kernels (csrc/bi_wkv_cpu.h says how they work)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cpu
from . import scan

_GROWS = 1  # what the library returns for weights whose gradient float32 cannot hold
# What the library keeps: bytes in front, and for each segment of a channel; tokens of a segment.
_HEAD, _KEPT, _SEGMENT = 64, 28, 64


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, kept: Tensor | None = None) -> Tensor:
    """Compute Bi-WKV.

    Args:
        w: decay per token, (C,).
        u: bonus of the token itself, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        kept: memory to fill for `backward`, see `keeping`.

    Returns:
        (B, T, C), contiguous, in v's dtype.
    """
    channels = k.shape[2]
    if channels < cpu.LANES:
        return forward(*(_widen(x) for x in (w, u, k, v)), kept=kept)[..., :channels]
    wide_w, wide_u = cpu.wide(w, u)
    dtype = cpu.common_dtype(k, v)
    keys, values = cpu.side_by_side(dtype, k, v)
    y = torch.empty_like(values, memory_format=torch.contiguous_format)
    status = cpu.library().vision_bi_wkv(
        cpu.bi_wkv_call(keys, values, y),
        wide_w.data_ptr(),
        wide_u.data_ptr(),
        *_memory(kept),
        torch.get_num_threads(),
    )
    if status:
        raise cpu.failed("bi_wkv")
    return y if dtype is v.dtype else y.to(v.dtype)


def keeping(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `forward`, and keep what enters each segment for `backward`.

    Returns:
        What `forward` returns, and 28 bytes for 64 tokens of a channel.
    """
    batch, tokens, channels = k.shape
    vectors = -(-channels // cpu.LANES)
    size = _HEAD + _KEPT * batch * -(-tokens // _SEGMENT) * vectors * cpu.LANES
    kept = torch.empty(size, dtype=torch.uint8)
    return forward(w, u, k, v, kept=kept), kept


def backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    gy: Tensor,
    *,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of Bi-WKV.

    Args:
        w: decay per token, (C,).
        u: bonus of the token itself, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        y: the output, (B, T, C); computed again where it was rounded to 16 bits.
        gy: gradient of the output, (B, T, C).
        kept: what `keeping` gave with y; computed again without it.

    Returns:
        Gradients of w, u, k, v, each in its input's dtype. Where the weights grow with the
        distance by more than e^20 over the sequence (no trained model does), they are those of
        `scan.backward` in float64.
    """
    channels = k.shape[2]
    if channels < cpu.LANES:
        padded = backward(*(_widen(x) for x in (w, u, k, v, y, gy)), kept=kept)
        gw, gu, gk, gv = (grad[..., :channels] for grad in padded)
        return gw, gu, gk, gv
    wide_w, wide_u = cpu.wide(w, u)
    dtype = cpu.common_dtype(k, v, gy)
    keys, values, grads = cpu.side_by_side(dtype, k, v, gy)
    gk, gv = torch.empty(k.shape, dtype=dtype), torch.empty(v.shape, dtype=dtype)
    gw, gu = torch.empty_like(wide_w), torch.empty_like(wide_u)
    result = y if y.dtype is dtype else forward(w, u, keys, values)
    status = cpu.library().vision_bi_wkv_grads(
        cpu.bi_wkv_call(keys, values, result, grads, gk, gv),
        wide_w.data_ptr(),
        wide_u.data_ptr(),
        gw.data_ptr(),
        gu.data_ptr(),
        *_memory(kept),
        torch.get_num_threads(),
    )
    if status == _GROWS:
        wide = scan.backward(w.double(), u.double(), k.double(), v.double(), y, gy.double())
        gw, gu, gk, gv = (g.to(x.dtype) for g, x in zip(wide, (w, u, k, v), strict=True))
        return gw, gu, gk, gv
    if status:
        raise cpu.failed("bi_wkv")
    return gw.to(w.dtype), gu.to(u.dtype), gk.to(k.dtype), gv.to(v.dtype)


def _memory(kept: Tensor | None) -> tuple[int, int]:
    """Return where what is kept lies, and its bytes."""
    return (0, 0) if kept is None else (kept.data_ptr(), kept.numel())


def _widen(x: Tensor) -> Tensor:
    """Append channels of zeros, so that there is one whole vector."""
    return F.pad(x, (0, cpu.LANES - x.shape[-1]))
