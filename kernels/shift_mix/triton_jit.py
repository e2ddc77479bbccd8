"""Triton code of shift and mix; import it only where Triton is (`triton_kernel` does)."""

import triton
import triton.language as tl


@triton.jit
def _tile(tokens, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return batch item, token (BLOCK_T, 1) and channel (1, BLOCK_C)."""
    blocks = tl.cdiv(tokens, BLOCK_T)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    return batch, token, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]


@triton.jit
def _neighbour(token, channel, height, width, pixels, edges):
    """Return the token that lies `pixels` patches away in a channel's direction, -1 if none does.

    With `pixels` negated this is the token that takes the given one as its neighbour.
    """
    left, right = channel < edges[0], (channel >= edges[0]) & (channel < edges[1])
    upper = (channel >= edges[1]) & (channel < edges[2])
    lower = (channel >= edges[2]) & (channel < edges[3])
    across = tl.where(left, -pixels, tl.where(right, pixels, 0))
    down = tl.where(upper, -pixels, tl.where(lower, pixels, 0))
    row, column = token // width + down, token % width + across
    exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return tl.where(exists, row * width + column, -1)


@triton.jit
def _load(pointer, batch, token, channel, tokens, channels):
    """Read tokens as float32, zero where there is none."""
    inside = (token >= 0) & (token < tokens) & (channel < channels)
    item = pointer + batch * (tokens * channels)
    return tl.load(item + (token * channels + channel), inside, 0.0).to(tl.float32)


@triton.jit
def _store(pointer, batch, token, channel, tokens, channels, x):
    inside = (token < tokens) & (channel < channels)
    tl.store(pointer + batch * (tokens * channels) + (token * channels + channel), x, inside)


@triton.jit
def _load_mu(mu_ptr, n, channel, channels):
    return tl.load(mu_ptr + n * channels + channel, channel < channels, 0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x_ptr, mu_ptr, y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr, y6_ptr, y7_ptr,
    height, width, channels, pixels, edge1, edge2, edge3, edge4,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the N mixed copies."""
    ys = (y0_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr, y6_ptr, y7_ptr)
    tokens = height * width
    batch, token, channel = _tile(tokens, BLOCK_T, BLOCK_C)
    edges = (edge1, edge2, edge3, edge4)
    source = _neighbour(token, channel, height, width, pixels, edges)
    x = _load(x_ptr, batch, token, channel, tokens, channels)
    shifted = _load(x_ptr, batch, source, channel, tokens, channels)
    for n in tl.static_range(N):
        mixed = shifted + (x - shifted) * _load_mu(mu_ptr, n, channel, channels)
        _store(ys[n], batch, token, channel, tokens, channels, mixed)


@triton.jit
def backward_kernel(
    x_ptr, mu_ptr, g0_ptr, g1_ptr, g2_ptr, g3_ptr, g4_ptr, g5_ptr, g6_ptr, g7_ptr, gx_ptr, gmu_ptr,
    height, width, channels, pixels, edge1, edge2, edge3, edge4,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x and each program's share in that of mu, (programs, N, C)."""
    gs = (g0_ptr, g1_ptr, g2_ptr, g3_ptr, g4_ptr, g5_ptr, g6_ptr, g7_ptr)
    tokens = height * width
    batch, token, channel = _tile(tokens, BLOCK_T, BLOCK_C)
    edges = (edge1, edge2, edge3, edge4)
    source = _neighbour(token, channel, height, width, pixels, edges)
    x = _load(x_ptr, batch, token, channel, tokens, channels)
    difference = x - _load(x_ptr, batch, source, channel, tokens, channels)
    taker = _neighbour(token, channel, height, width, -pixels, edges)
    gx = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    share = gmu_ptr + tl.program_id(0).to(tl.int64) * (N * channels) + channel
    for n in tl.static_range(N):
        mu = _load_mu(mu_ptr, n, channel, channels)
        g = _load(gs[n], batch, token, channel, tokens, channels)
        gx += g * mu + _load(gs[n], batch, taker, channel, tokens, channels) * (1 - mu)
        gmu = tl.sum(g * difference, axis=0)[None, :]
        tl.store(share + n * channels, gmu, channel < channels)
    _store(gx_ptr, batch, token, channel, tokens, channels, gx)
