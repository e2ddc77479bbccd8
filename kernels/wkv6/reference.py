"""The definition of bidirectional WKV6 as a recurrence, token by token, in float64."""

import torch
from torch import Tensor


def wkv6_bi_definition(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Compute `wkv6_bi` (see there) by one state a direction; plain autograd gives the gradients.

    Returns:
        (B, T, C) in float64.
    """
    r, k, v, w = (_heads(x, u) for x in (r, k, v, w))
    decay, outer = torch.exp(-torch.exp(w)), k[..., :, None] * v[..., None, :]
    states = _before(decay, outer) + _after(decay, outer) + u.double()[..., None] * outer
    return torch.einsum("bthn,bthnm->bthm", r, states).flatten(2)


def _heads(x: Tensor, u: Tensor) -> Tensor:
    """Return (B, T, C) as (B, T, H, N) in float64."""
    return x.double().unflatten(2, u.shape)


def _before(decay: Tensor, x: Tensor) -> Tensor:
    """Sum x over the tokens before each one, faded by the tokens in between.

    Args:
        decay: factor of every token, (B, T, H, N).
        x: (B, T, H, N, N).
    """
    states = [torch.zeros_like(x[:, 0])]
    for t in range(x.shape[1]):
        states.append(decay[:, t, ..., None] * states[-1] + x[:, t])
    # Taken along although nobody reads it: autograd then knows the decay of a single token too.
    return torch.stack(states, 1)[:, :-1]


def _after(decay: Tensor, x: Tensor) -> Tensor:
    """Do as `_before` for the tokens after each one."""
    return _before(decay.flip(1), x.flip(1)).flip(1)


def forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Serve the backend "reference"; result in v's dtype."""
    return wkv6_bi_definition(r, k, v, w, u).to(v.dtype)


def backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, gy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of the definition by the recurrences of the states' gradients.

    Autograd does not run inside a custom operator.

    Args:
        r: receptance, (B, T, C).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        w: decay, (B, T, C).
        u: bonus, (H, N).
        gy: gradient of the output, (B, T, C).

    Returns:
        Gradients of r, k, v, w, u, each in its input's dtype.
    """
    rh, kh, vh, wh, gh = (_heads(x, u) for x in (r, k, v, w, gy))
    bonus = u.double()[..., None]
    decay = torch.exp(-torch.exp(wh))
    outer, grads = kh[..., :, None] * vh[..., None, :], rh[..., :, None] * gh[..., None, :]
    before, after = _before(decay, outer), _after(decay, outer)
    grads_before, grads_after = _before(decay, grads), _after(decay, grads)
    seen = before + after + bonus * outer  # by r
    used = grads_before + grads_after + bonus * grads  # of k and v
    gr = (seen * gh[..., None, :]).sum(-1)
    gk = (used * vh[..., None, :]).sum(-1)
    gv = (used * kh[..., :, None]).sum(-2)
    g_decay = (before * grads_after + after * grads_before).sum(-1)
    gw = -torch.exp(wh) * decay * g_decay
    gu = (outer * grads).sum(-1).sum((0, 1))
    whole = [x.flatten(2) for x in (gr, gk, gv, gw)]
    gr, gk, gv, gw = (g.to(x.dtype) for g, x in zip(whole, (r, k, v, w), strict=True))
    return gr, gk, gv, gw, gu.to(u.dtype)
