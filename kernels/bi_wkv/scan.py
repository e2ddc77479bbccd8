"""Bi-WKV in torch operators, O(T), with its own backward pass.

With x = (e^k v, e^k) and d = e^{-w}, the sums over the other tokens are two linear recurrences,
P[t+1] = d P[t] + x[t] from the left and S[t-1] = d S[t] + x[t] from the right. The operator is
symmetric in its two positions, so the gradient of x is the same pair of recurrences (L, R) over
g = (gy, -gy·y) / denominator, and since P[t]·R[t] meets every pair of tokens once for each
position between them, the gradient of w is -d Σ_t (P[t]·R[t] + S[t]·L[t]): no further recurrence.

A recurrence is cut into blocks of about √T tokens. Steps inside a block are taken for all blocks
at once; a loop over the blocks carries the sums on.

Two forms: `_plain_*` with one factor d and one maximum of k per channel, for |w|·T + |u| up to a
limit (every trained model so far), and `_scaled_*` with a scale of its own for every token in
float64, for everything else.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..seam import compute_dtype

# |w|·T + |u| up to which e^{k - max k} and its sums stay inside the dtype's range, with what is
# lost below it weighing less than e^{-27}: float32 ends at e^{±87}, float64 at e^{±708}.
_PLAIN_LIMIT = {torch.float32: 60.0, torch.float64: 500.0}
# Scratch of a backward pass in bytes, which sets how much is worked on at a time. Up to 32 MiB the
# GNU allocator keeps the memory for the next call; fresh pages cost more than the arithmetic.
_SCRATCH = 30 << 20
_MOST_PAIRS = 5  # numerators and denominators that a backward pass holds
_EMPTY = -1e30


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute Bi-WKV.

    Args:
        w: decay per token, (C,).
        u: bonus of the token itself, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).

    Returns:
        (B, T, C) in v's dtype, contiguous.
    """
    if k.shape[1] == 1:
        return v + 0 * (k + u + w).to(v.dtype)
    dtype = compute_dtype(w, u, k, v)
    size = _chunk_size(k, dtype, 2)
    form: Callable[..., None] = _scaled_forward
    if _is_plain(w, u, k.shape[1], dtype):
        form = functools.partial(_plain_forward, scratch=_room(k, size, 2, dtype))
    y = v.new_empty(v.shape)
    for b, c in _chunks(k, size):
        form(w[c], u[c], k[b, :, c], v[b, :, c], y[b, :, c])
    return y


def backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, gy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of Bi-WKV.

    Args:
        w: decay per token, (C,).
        u: bonus of the token itself, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        y: the output of `forward`, (B, T, C).
        gy: gradient of the output, (B, T, C).

    Returns:
        Gradients of w, u, k, v, contiguous, each in its input's dtype.
    """
    dtype = compute_dtype(w, u, k, v)
    gw, gu = torch.zeros_like(w, dtype=dtype), torch.zeros_like(u, dtype=dtype)
    gk, gv = k.new_empty(k.shape), v.new_empty(v.shape)
    if k.shape[1] == 1:
        return gw.to(w.dtype), gu.to(u.dtype), gk.zero_(), gv.copy_(gy)
    size = _chunk_size(k, dtype, _MOST_PAIRS)
    form: Callable[..., tuple[Tensor, Tensor]] = _scaled_backward
    if _is_plain(w, u, k.shape[1], dtype):
        form = functools.partial(_plain_backward, scratch=_room(k, size, _MOST_PAIRS, dtype))
    for b, c in _chunks(k, size):
        parts = [x[b, :, c] for x in (k, v, y, gy, gk, gv)]
        gw_part, gu_part = form(w[c], u[c], *parts)
        gw[c] += gw_part
        gu[c] += gu_part
    return gw.to(w.dtype), gu.to(u.dtype), gk, gv


def _is_plain(w: Tensor, u: Tensor, tokens: int, dtype: torch.dtype) -> bool:
    return bool((w.to(dtype).abs() * tokens + u.to(dtype).abs()).amax() <= _PLAIN_LIMIT[dtype])


def _chunk_size(k: Tensor, dtype: torch.dtype, count: int) -> tuple[int, int]:
    """Return how many batch items, or channels of a single item, to take at a time.

    Args:
        k: keys, (B, T, C).
        dtype: of the computation.
        count: pairs of tensors of scratch that each of them needs.
    """
    batch, tokens, channels = k.shape
    items = _SCRATCH // (2 * _MOST_PAIRS * dtype.itemsize * tokens * channels)
    if items:
        return min(batch, items), channels
    # Few channels at a time are slow, so a single item takes all the scratch there is.
    parts = -(-2 * count * dtype.itemsize * tokens * channels // _SCRATCH)
    return 1, max(min(16, channels), -(-channels // parts))


def _chunks(k: Tensor, size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Yield slices of batch and channels that cover (B, T, C)."""
    step_b, step_c = size
    for b in range(0, k.shape[0], step_b):
        for c in range(0, k.shape[2], step_c):
            yield slice(b, b + step_b), slice(c, c + step_c)


def _room(k: Tensor, size: tuple[int, int], count: int, dtype: torch.dtype) -> Tensor:
    """Return scratch for `count` pairs of tensors of one chunk, (count, elements).

    One piece of memory for all, since an allocator returns several small ones to the system.
    """
    length = _block_length(k.shape[1])
    items, channels = size
    tokens = -(-k.shape[1] // length) * length
    return k.new_empty(count, 2 * items * tokens * channels, dtype=dtype)


# --- one factor per channel --------------------------------------------------------------------


@functools.lru_cache
def _block_length(tokens: int) -> int:
    """Return a number near √T, a divisor of T if there is one within a factor of 2."""
    root = math.isqrt(tokens - 1) + 1
    divisors = [n for n in range((root + 1) // 2, 2 * root + 1) if tokens % n == 0]
    return min(divisors, key=lambda n: max(n / root, root / n), default=root)


def _pad(x: Tensor, value: float = 0.0) -> Tensor:
    """Fill (B, T, C) up to whole blocks."""
    tokens = x.shape[1]
    missing = -tokens % _block_length(tokens)
    return torch.nn.functional.pad(x, (0, 0, 0, missing), value=value) if missing else x


def _blocked(x: Tensor, length: int) -> Tensor:
    """View (B, T, C) as (tokens in a block, B, blocks, C): one step of all blocks is x[j]."""
    return x.unflatten(1, (-1, length)).permute(2, 0, 1, 3)


class _Recurrence:
    """The two recurrences with a constant factor per channel, over (L, 2, B, blocks, C).

    The dimension of 2 holds numerator and denominator, which share the factors.

    Args:
        w: decay per token, (C,), in the dtype of the computation.
        length: L, tokens in a block.
    """

    def __init__(self, w: Tensor, length: int) -> None:
        self.step = torch.exp(-w)
        self.stride = torch.exp(-w * length)

    def left(self, x: Tensor, out: Tensor) -> None:
        """Fill `out` with the sums over the tokens before each one."""
        self._scan(x.unbind(), out.unbind(), 1)

    def right(self, x: Tensor, out: Tensor) -> None:
        """Fill `out` with the sums over the tokens after each one."""
        self._scan(x.unbind()[::-1], out.unbind()[::-1], -1)

    def right_steps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield what `right` fills in, from the last position on; overwritten by the next step."""
        steps = x.unbind()[::-1]
        state = torch.empty_like(steps[0])
        self._enter(steps, state, -1)
        for step in steps:
            yield state
            torch.addcmul(step, state, self.step, out=state)

    def _scan(self, x: Sequence[Tensor], out: Sequence[Tensor], direction: int) -> None:
        self._enter(x, out[0], direction)
        for step, (before, after) in zip(x, pairwise(out), strict=False):
            torch.addcmul(step, before, self.step, out=after)

    def _enter(self, x: Sequence[Tensor], out: Tensor, direction: int) -> None:
        """Fill `out` with what enters each block, the sums over the blocks before it.

        Args:
            x: the steps inside a block in scan order, each (2, B, blocks, C).
            out: (2, B, blocks, C).
            direction: 1 if the blocks are in scan order, -1 if reversed.
        """
        block = x[0].clone()
        for step in x[1:]:
            torch.addcmul(step, block, self.step, out=block)
        sums = out.unbind(2)[::direction]
        sums[0].zero_()
        for own, (before, after) in zip(block.unbind(2)[::direction], pairwise(sums), strict=False):
            torch.addcmul(own, before, self.stride, out=after)


def _scratch(scratch: Tensor, k: Tensor) -> list[Tensor]:
    """Cut (n, room) into n tensors for numerator and denominator, shaped after blocked k."""
    length, batch, count, channels = k.shape
    shape = (length, 2, batch, count, channels)
    return [x[: 2 * k.numel()].view(shape) for x in scratch]


def _weigh(k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Fill `x` with (e^{k - max k} v, e^{k - max k}) from blocked k and v."""
    torch.sub(k, k.amax((0, 2), keepdim=True), out=x[:, 1]).exp_()
    torch.mul(x[:, 1], v, out=x[:, 0])
    return x


def _plain_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, scratch: Tensor) -> None:
    length = _block_length(k.shape[1])
    recurrence, bonus = _Recurrence(w.to(scratch.dtype), length), torch.exp(u.to(scratch.dtype))
    k, v = _blocked(_pad(k, -math.inf), length), _blocked(_pad(v), length)
    x, total = _scratch(scratch, k)
    _weigh(k, v, x)
    recurrence.left(x, total)
    steps = zip(x.unbind()[::-1], total.unbind()[::-1], recurrence.right_steps(x), strict=True)
    for own, both, after in steps:
        both.add_(after).addcmul_(own, bonus)
    out = y if y.shape[1] % length == 0 else _pad(y)
    torch.div(total[:, 0], total[:, 1], out=_blocked(out, length))
    if out is not y:
        y.copy_(out[:, : y.shape[1]])


def _plain_backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    gy: Tensor,
    gk: Tensor,
    gv: Tensor,
    scratch: Tensor,
) -> tuple[Tensor, Tensor]:
    tokens = k.shape[1]
    length = _block_length(tokens)
    recurrence, bonus = _Recurrence(w.to(scratch.dtype), length), torch.exp(u.to(scratch.dtype))
    k, v = _blocked(_pad(k, -math.inf), length), _blocked(_pad(v), length)
    x, before, after, g, total = _scratch(scratch, k)
    _weigh(k, v, x)
    recurrence.left(x, before)
    recurrence.right(x, after)

    denominator = torch.add(before[:, 1], after[:, 1], out=g[:, 1]).addcmul_(x[:, 1], bonus)
    if y.dtype == scratch.dtype:
        y_wide = _blocked(_pad(y), length)
    else:  # The gradient of k is a difference that the rounding of y would spoil.
        y_wide = torch.add(before[:, 0], after[:, 0], out=total[:, 0])
        y_wide.addcmul_(x[:, 0], bonus).div_(denominator)
    torch.div(_blocked(_pad(gy), length), denominator, out=g[:, 0])
    torch.mul(g[:, 0], y_wide, out=g[:, 1]).neg_()

    recurrence.left(g, total)
    grad_w, grad_u = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    reverse = (t.unbind()[::-1] for t in (x, before, after, g, total))
    for own, left, right, g_own, both, g_right in zip(
        *reverse, recurrence.right_steps(g), strict=True
    ):
        grad_w.addcmul_(left, g_right).addcmul_(right, both)
        grad_u.addcmul_(own, g_own)
        both.add_(g_right).addcmul_(g_own, bonus)

    total[:, 1].addcmul_(total[:, 0], v)
    for grad, part in ((gv, 0), (gk, 1)):
        out = grad if tokens % length == 0 else _pad(grad)
        torch.mul(total[:, part], x[:, 1], out=_blocked(out, length))
        if out is not grad:
            grad.copy_(out[:, :tokens])
    gw = grad_w.sum((0, 1, 2)).mul_(recurrence.step).neg_()
    return gw, grad_u.sum((0, 1, 2)).mul_(bonus)


# --- one scale per token -----------------------------------------------------------------------


class _ScaledScan:
    """Σ_{i<t} e^{-(t-1-i)·w + l_i} x_i = e^{scale[t]} (mantissa of x)[t] for any w and l.

    The scale is the largest exponent of the sum at hand: the token that has it is its anchor.
    While the anchor stays, the mantissas are only added to; they never leave [-T·max|x|, T·max|x|].

    Args:
        w: decay per token, (C,), float64.
        logits: l, (B, T, C), float64.
    """

    def __init__(self, w: Tensor, logits: Tensor) -> None:
        tokens = logits.shape[1]
        position = torch.arange(tokens, dtype=logits.dtype, device=logits.device)[:, None]
        anchor = torch.cummax(logits + position * w, dim=1).indices  # (B, T, C)
        # Not from the maximum itself: that has lost the digits of l to position * w.
        scale = logits.gather(1, anchor) - (position - anchor) * w
        self.scale = torch.cat([torch.full_like(logits[:, :1], _EMPTY), scale[:, :-1]], dim=1)
        self.weight = torch.exp(logits - scale)
        # Exactly 1 while the anchor stays, whatever w: rounding does not add up over tokens.
        self.factor = torch.exp(
            torch.where(anchor == position, self.scale - w - logits, torch.zeros_like(logits))
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return the mantissas of the sums of x, (B, T, C)."""
        tokens = x.shape[1]
        length = math.isqrt(tokens - 1) + 1
        padding = (0, 0, 0, -tokens % length)
        x = torch.nn.functional.pad(x * self.weight, padding).unflatten(1, (-1, length))
        factor = torch.nn.functional.pad(self.factor, padding).unflatten(1, (-1, length))
        local, product = torch.zeros_like(x), torch.ones_like(x)
        for j in range(1, length):
            torch.addcmul(
                x[:, :, j - 1], local[:, :, j - 1], factor[:, :, j - 1], out=local[:, :, j]
            )
            torch.mul(product[:, :, j - 1], factor[:, :, j - 1], out=product[:, :, j])
        state = torch.zeros_like(x[:, 0, 0])
        for block in range(x.shape[1]):
            local[:, block].addcmul_(product[:, block], state[:, None])
            state = torch.addcmul(x[:, block, -1], local[:, block, -1], factor[:, block, -1])
        return local.flatten(1, 2)[:, :tokens]


class _ScaledSums:
    """Both directions of `_ScaledScan` over the same logits."""

    def __init__(self, w: Tensor, logits: Tensor) -> None:
        self._left = _ScaledScan(w, logits)
        self._right = _ScaledScan(w, logits.flip(1))
        self.scale_left = self._left.scale
        self.scale_right = self._right.scale.flip(1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._left(x), self._right(x.flip(1)).flip(1)


class _ScaledState:
    """What forward and backward share: sums over k and the weights they enter a token with."""

    def __init__(self, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> None:
        self.w, self.u, self.v = w.double(), u.double(), v.double()
        # A token masked by k = -inf keeps a scale that can be subtracted.
        self.k = k.double().clamp(min=_EMPTY)
        self.sums = _ScaledSums(self.w, self.k)
        own = self.k + self.u
        left, right = self.sums.scale_left, self.sums.scale_right
        self.scale = torch.maximum(torch.maximum(left, right), own)
        left, right = torch.exp(left - self.scale), torch.exp(right - self.scale)
        self.own = torch.exp(own - self.scale)
        self.numerator = self.sums(self.v)
        self.denominator = self.sums(torch.ones_like(self.v))
        self.total = left * self.denominator[0] + right * self.denominator[1] + self.own
        total = left * self.numerator[0] + right * self.numerator[1] + self.own * self.v
        self.y = total / self.total


def _scaled_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
    y.copy_(_ScaledState(w, u, k, v).y)


def _scaled_backward(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    gy: Tensor,
    gk: Tensor,
    gv: Tensor,
) -> tuple[Tensor, Tensor]:
    state = _ScaledState(w, u, k, v)
    g_numerator = gy.double() / state.total
    g_denominator = -g_numerator * state.y
    # In the gradient -log(denominator) takes the place of k.
    sums = _ScaledSums(state.w, -state.scale)
    numerator, denominator = sums(g_numerator), sums(g_denominator)
    left = torch.exp(state.k + sums.scale_left)
    right = torch.exp(state.k + sums.scale_right)
    grad_v = left * numerator[0] + right * numerator[1] + state.own * g_numerator
    grad_k = left * denominator[0] + right * denominator[1] + state.own * g_denominator
    gv.copy_(grad_v)
    gk.copy_(grad_k.addcmul_(grad_v, state.v))
    gu = (state.own * (state.v * g_numerator + g_denominator)).sum((0, 1))
    gw = torch.zeros_like(state.w)
    for (x, one), scale, (n, d), other in (
        (
            (state.numerator[0], state.denominator[0]),
            state.sums.scale_left,
            (numerator[1], denominator[1]),
            sums.scale_right,
        ),
        (
            (state.numerator[1], state.denominator[1]),
            state.sums.scale_right,
            (numerator[0], denominator[0]),
            sums.scale_left,
        ),
    ):
        gw -= (torch.exp(scale + other - state.w) * (x * n + one * d)).sum((0, 1))
    return gw, gu
