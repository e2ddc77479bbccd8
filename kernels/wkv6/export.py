"""Bidirectional WKV6 of ordinary operators, without a loop over the tokens, for exporters."""

import torch
from torch import Tensor

from ..seam import compute_dtype
from .chunked import Chunks, added_states, both_directions, tree

_LENGTH = 16


def wkv6_bi_dense(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Compute `wkv6_bi` (see there); plain autograd gives the gradients.

    As the chunked form, but every chunk takes its states from all others at once, by a table of
    the decays between them: (T/16)² entries for a channel. As safe, and for any number of tokens,
    known or not.
    """
    chunks = Chunks.of(r, k, v, w, u, compute_dtype(r, k, v, w, u), _LENGTH)
    parts = tree(chunks)
    into, out = both_directions(parts.before, parts.after)
    states = _gather(added_states(chunks, out), chunks.by_sequence(parts.total))
    y = parts.scores @ chunks.v + (chunks.r.repeat(1, 1, 2) * into) @ states.mT
    return chunks.unfold(y).to(v.dtype)


def _gather(added: Tensor, total: Tensor) -> Tensor:
    """Return the states that the chunks find, values by keys of both directions, (G, N, 2N).

    Args:
        added: what the chunks add, values by keys, in each direction, (B·H, M, N, 2, N).
        total: logarithm of the decay over a chunk, (B·H, M, N).
    """
    position = torch.arange(added.shape[1], device=added.device)
    later = (position[:, None] > position)[..., None]  # (M, M, 1)
    apart = (position[:, None] > position + 1)[..., None]
    step = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], 1)[:, :, None]
    fade = torch.where(apart, step, torch.zeros_like(step)).cumsum(1)  # (B·H, M, M, N)
    decay = torch.where(later, torch.exp(fade), torch.zeros_like(fade))
    before = torch.einsum("zcdn,zdmn->zcmn", decay, added[:, :, :, 0])
    after = torch.einsum("zcdn,zcmn->zdmn", decay, added[:, :, :, 1])
    return torch.cat([before, after], 3).flatten(0, 1)


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Serve the backend "export" where the custom operator is called; see `wkv6_bi_dense`."""
    return wkv6_bi_dense(r, k, v, w, u)
