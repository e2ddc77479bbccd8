"""Bidirectional WKV6 in torch operators, O(T), with its own backward pass.

The tokens are cut into chunks. What a chunk adds to the state of a head and what a token reads from
the states of the chunks before and after its own are matrix products, and a loop over the chunks
carries the states on. Inside a chunk the pairs of tokens are taken by halves: at each level of a
binary tree the tokens of a left half meet those of the right half beside it. The factor between
two of them splits at the middle into one of the left and one of the right token, so this is a
matrix product as well, each factor is a product of decays in between, and none exceeds 1: no
decay, however strong, leaves the range of the dtype. Exponents are sums of logarithms of one sign
and are never subtracted, in the backward pass neither.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..seam import compute_dtype

# Tokens of a chunk, a power of two.
LENGTH = 32
# Bytes of the tensors of one slice of batch and heads in a backward pass, about.
_SCRATCH = 256 << 20
# exp(-exp(20)) is 0 in float64 too; the clamp keeps exp(w) finite.
_STRONGEST = 20.0


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, length: int = LENGTH) -> Tensor:
    """Serve the backend "torch"; see `wkv6_bi`.

    Args:
        r: receptance, (B, T, C).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        w: decay, (B, T, C).
        u: bonus, (H, N).
        length: tokens of a chunk, a power of two.

    Returns:
        (B, T, C) in v's dtype, contiguous.
    """
    dtype = compute_dtype(r, k, v, w, u)
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with torch.autocast(v.device.type, enabled=False):
        for b, h, c in _slices(k, u, length, dtype):
            rs, ks, vs, ws = (x[b, :, c] for x in (r, k, v, w))
            chunks = Chunks.of(rs, ks, vs, ws, u[h], dtype, length)
            y[b, :, c] = chunks.unfold(_output(chunks))
    return y


def backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, gy: Tensor, length: int = LENGTH
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward`.

    Args:
        r: receptance, (B, T, C).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        w: decay, (B, T, C).
        u: bonus, (H, N).
        gy: gradient of the output, (B, T, C).
        length: tokens of a chunk, a power of two.

    Returns:
        Gradients of r, k, v, w, u, contiguous, each in its input's dtype.
    """
    dtype = compute_dtype(r, k, v, w, u)
    wholes = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (r, k, v, w)]
    gu = torch.zeros(u.shape, dtype=dtype, device=u.device)
    with torch.autocast(v.device.type, enabled=False):
        for b, h, c in _slices(k, u, length, dtype):
            rs, ks, vs, ws = (x[b, :, c] for x in (r, k, v, w))
            chunks = Chunks.of(rs, ks, vs, ws, u[h], dtype, length)
            *grads, gu_part = _gradients(chunks, chunks.fold(gy[b, :, c]))
            gu[h] += gu_part
            for whole, grad in zip(wholes, grads, strict=True):
                whole[b, :, c] = chunks.unfold(grad)
    gr, gk, gv, gw = wholes
    return gr, gk, gv, gw, gu.to(u.dtype)


def _slices(
    k: Tensor, u: Tensor, length: int, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of batch, heads and channels that cover (B, T, C), each within `_SCRATCH`."""
    batch, tokens, _ = k.shape
    heads, size = u.shape
    levels = length.bit_length()
    # Inputs, outputs and their like, the factors of the levels, the states, the scores.
    row = (30 + levels) * size + 4 * length + 10 * size * size // length
    head = max(tokens, length) * row * dtype.itemsize
    items = max(1, _SCRATCH // (head * heads))
    step = heads if head * heads <= _SCRATCH else max(1, _SCRATCH // head)
    for b in range(0, batch, items):
        for h in range(0, heads, step):
            last = min(h + step, heads)
            yield slice(b, b + items), slice(h, last), slice(h * size, last * size)


@dataclass
class Chunks:
    """The inputs of the operator, cut into G = B·H·M chunks of L tokens and filled up with zeros.

    Attributes:
        r: receptance, (G, L, N).
        k: keys, (G, L, N).
        v: values, (G, L, N).
        fade: logarithm of the decay, at most 0, (G, L, N).
        u: bonus, (G, 1, N).
        heads: H.
        tokens: T.
        count: M.
    """

    r: Tensor
    k: Tensor
    v: Tensor
    fade: Tensor
    u: Tensor
    heads: int
    tokens: int
    count: int

    @classmethod
    def of(
        cls, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, dtype: torch.dtype, length: int
    ) -> "Chunks":
        """Cut r, k, v, w (B, T, C) in a dtype; u is (H, N)."""
        heads, size = u.shape
        batch, tokens, _ = k.shape
        count = (tokens + length - 1) // length
        fade = -torch.exp(w.to(dtype).clamp(max=_STRONGEST))
        r, k, v, fade = (_fold(x.to(dtype), heads, length) for x in (r, k, v, fade))
        u = u.to(dtype)[:, None].expand(batch, heads, count, size).reshape(-1, 1, size)
        return cls(r, k, v, fade, u, heads, tokens, count)

    def fold(self, x: Tensor) -> Tensor:
        """Cut (B, T, C) alike, into (G, L, N)."""
        return _fold(x.to(self.r.dtype), self.heads, self.r.shape[1])

    def unfold(self, x: Tensor) -> Tensor:
        """Return (G, L, N) as (B, T, C)."""
        x = x.reshape(-1, self.heads, self.count * x.shape[1], x.shape[2])
        return x[:, :, : self.tokens].transpose(1, 2).flatten(2)

    def by_sequence(self, x: Tensor) -> Tensor:
        """Return (G, ...) as (B·H, M, ...)."""
        return x.unflatten(0, (-1, self.count))


def _fold(x: Tensor, heads: int, length: int) -> Tensor:
    """Cut (B, T, C) into (B·H·M, L, N), filled up with zeros."""
    x = x.unflatten(2, (heads, -1)).transpose(1, 2)  # (B, H, T, N)
    x = F.pad(x, (0, 0, 0, -x.shape[2] % length))
    return x.reshape(-1, length, x.shape[3])


@dataclass
class Tree:
    """What the levels of the tree over the tokens of a chunk give.

    Attributes:
        scores: of every token (row) with every token (column) of its chunk, (G, L, L).
        before: logarithm of the decay over the tokens of the chunk before each one, (G, L, N).
        after: over those after it.
        total: over all, (G, N).
        factors: for each level, from single tokens up, the decay from a token of a left half to
            its end, and from the start of a right half to a token, each (G, pairs, tokens, N).
    """

    scores: Tensor
    before: Tensor
    after: Tensor
    total: Tensor
    factors: list[tuple[Tensor, Tensor]]


def tree(chunks: Chunks) -> Tree:
    """Score the pairs of tokens inside the chunks, in operators that can be differentiated."""
    r, k = chunks.r, chunks.k
    scores = (r * k * chunks.u).sum(-1)[..., None, None]  # (G, L, 1, 1)
    before, after = torch.zeros_like(chunks.fade), torch.zeros_like(chunks.fade)  # (G, L, N)
    total = chunks.fade
    factors = []
    size = 1
    while size < r.shape[1]:
        before_right = before.unflatten(1, (-1, size))[:, 1::2]  # (G, pairs, tokens, N)
        after_left = after.unflatten(1, (-1, size))[:, ::2]
        left, right = torch.exp(after_left), torch.exp(before_right)
        factors.append((left, right))
        (rl, rr), (kl, kr) = (_scaled(x, left, right) for x in (r, k))
        upper = torch.cat([scores[:, ::2], rl @ kr.mT], -1)
        lower = torch.cat([rr @ kl.mT, scores[:, 1::2]], -1)
        scores = torch.cat([upper, lower], -2)
        first, second = total[:, ::2], total[:, 1::2]
        before_right += first[:, :, None]
        after_left += second[:, :, None]
        total = first + second
        size *= 2
    return Tree(scores[:, 0], before, after, total[:, 0], factors)


def _scaled(x: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left and the right halves of x (G, L, N) times their factors."""
    x = x.unflatten(1, (-1, left.shape[2]))
    if left.shape[2] == 1:  # single tokens, with nothing in between: the factors are 1
        return x[:, ::2], x[:, 1::2]
    return x[:, ::2] * left, x[:, 1::2] * right


def _carry(added: Tensor, decay: Tensor) -> Tensor:
    """Sum what the chunks add over those before each one, and over those after it.

    Args:
        added: values by keys, for both directions, (B·H, M, N, 2, N).
        decay: over a whole chunk, (B·H, M, N).

    Returns:
        The state that each chunk finds in each direction, of the shape of `added`.
    """
    states = torch.empty_like(added)
    kept = decay[:, :, None].unbind(1)  # keys last: a factor that is one number a row is slow
    for direction in (0, 1):
        of, add = (x[:, :, :, direction].unbind(1) for x in (states, added))
        order = range(len(of)) if direction == 0 else range(len(of) - 1, -1, -1)
        of[order[0]].zero_()
        for c, after in pairwise(order):
            torch.addcmul(add[c], of[c], kept[c], out=of[after])
    return states


def both_directions(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors from the states to a token and from a token to them, each (G, L, 2N)."""
    before, after = torch.exp(before), torch.exp(after)
    return torch.cat([before, after], -1), torch.cat([after, before], -1)


def added_states(chunks: Chunks, out: Tensor) -> Tensor:
    """Return what each chunk adds to the states, values by keys, (B·H, M, N, 2, N)."""
    states = chunks.v.mT @ (chunks.k.repeat(1, 1, 2) * out)
    return chunks.by_sequence(states.unflatten(2, (2, -1)))


def _output(chunks: Chunks) -> Tensor:
    parts = tree(chunks)
    y = parts.scores @ chunks.v
    if chunks.count > 1:
        into, out = both_directions(parts.before, parts.after)
        decay = chunks.by_sequence(torch.exp(parts.total))
        states = _carry(added_states(chunks, out), decay).flatten(0, 1).flatten(2)
        y.baddbmm_(chunks.r.repeat(1, 1, 2) * into, states.mT)
    return y


def _gradients(chunks: Chunks, gy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of r, k, v, w, each (G, L, N), and of u (H, N)."""
    r, k, v = chunks.r, chunks.k, chunks.v
    parts = tree(chunks)
    gv = parts.scores.mT @ gy
    if chunks.count > 1:
        into, out = both_directions(parts.before, parts.after)
        read, written = r.repeat(1, 1, 2) * into, k.repeat(1, 1, 2) * out
        decay = chunks.by_sequence(torch.exp(parts.total))
        states = _carry(added_states(chunks, out), decay)
        g_states = chunks.by_sequence((gy.mT @ read).unflatten(2, (2, -1)))
        # The gradients run through the chunks against their states.
        g_added = _carry(g_states.flip(3), decay).flip(3)
        g_total = (decay * (states * g_added).sum((2, 3))).flatten(0, 1)  # (G, N)
        states, g_added = (x.flatten(0, 1).flatten(2) for x in (states, g_added))
        g_read, g_written = gy @ states, v @ g_added
        gv.baddbmm_(written, g_added.mT)
        gr, gk = _fold_directions(g_read * into), _fold_directions(g_written * out)
        reads, writes = g_read.mul_(read), g_written.mul_(written)
        n = r.shape[2]
        g_before = reads[..., :n] + writes[..., n:]
        g_after = reads[..., n:] + writes[..., :n]
    else:
        g_total = torch.zeros_like(parts.total)
        gr, gk, g_before, g_after = (torch.zeros_like(r) for _ in range(4))
    g_fade, g_own = _differentiate_tree(
        chunks, parts.factors, gy @ v.mT, g_before, g_after, g_total, gr, gk
    )
    gr.addcmul_(g_own * chunks.u, k)
    gk.addcmul_(g_own * chunks.u, r)
    gu = (g_own * r * k).sum(1).unflatten(0, (-1, chunks.heads, chunks.count)).sum((0, 2))
    return gr, gk, gv, g_fade * chunks.fade, gu


def _fold_directions(x: Tensor) -> Tensor:
    n = x.shape[-1] // 2
    return x[..., :n] + x[..., n:]


def _differentiate_tree(
    chunks: Chunks,
    factors: list[tuple[Tensor, Tensor]],
    g_scores: Tensor,
    g_before: Tensor,
    g_after: Tensor,
    g_total: Tensor,
    gr: Tensor,
    gk: Tensor,
) -> tuple[Tensor, Tensor]:
    """Go down the levels of `tree` with the gradients of what it gave.

    Args:
        chunks: its inputs.
        factors: its factors.
        g_scores: gradient of the scores, (G, L, L).
        g_before: of the decay before each token, (G, L, N); overwritten.
        g_after: of the decay after each token, (G, L, N); overwritten.
        g_total: of the decay over the chunk, (G, N).
        gr: gradient of r so far, (G, L, N); added to.
        gk: gradient of k so far, (G, L, N); added to.

    Returns:
        Gradients of the logarithm of the decay, (G, L, N), and of the score of each token with
        itself, (G, L, 1).
    """
    scores, total = g_scores[:, None], g_total[:, None]
    for left, right in reversed(factors):
        size = left.shape[2]
        pairs = [x.unflatten(1, (-1, 2, size)).unbind(2) for x in (g_before, g_after, gr, gk)]
        (_, gbr), (gal, _), (grl, grr), (gkl, gkr) = pairs
        total = torch.stack([total + gbr.sum(2), total + gal.sum(2)], 2).flatten(1, 2)
        (rl, rr), (kl, kr) = (_scaled(x, left, right) for x in (chunks.r, chunks.k))
        high, low = scores[..., :size, size:], scores[..., size:, :size]
        scores = torch.stack([scores[..., :size, :size], scores[..., size:, size:]], 2)
        scores = scores.flatten(1, 2)
        # Gradients of the scaled halves; times these they are those of the exponents.
        d_rl, d_rr, d_kl, d_kr = high @ kr, low @ kl, low.mT @ rr, high.mT @ rl
        gal += d_rl * rl + d_kl * kl
        gbr += d_rr * rr + d_kr * kr
        grl.addcmul_(d_rl, left)
        gkl.addcmul_(d_kl, left)
        grr.addcmul_(d_rr, right)
        gkr.addcmul_(d_kr, right)
    return total, scores[..., 0]
