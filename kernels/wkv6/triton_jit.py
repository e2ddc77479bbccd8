"""Triton code of bidirectional WKV6; import it only where Triton is (`triton_kernel` does).

The tokens are cut into chunks, which run side by side, and so do the two sides: side 0 goes from
left to right, side 1 back. Inside a chunk the recurrence runs token by token, with the state in
registers, so no decay is ever divided by and no logarithms are added up. What a side contributes is
written for itself and summed by the launcher: the order of the sums is fixed.

In memory a state is values by keys. A program has all channels of a head in one of the two and
BLOCK of them in the other: all keys where it sums over keys (states, output), all values where it
sums over values (gradients).

Arguments that all functions share: `at`, the place of a chunk (batch item, head, chunk, and that
among all); `size`, (tokens, heads, chunks, channels of a head); LENGTH, tokens of a chunk;
CHANNELS, those of a head, rounded up.
"""

import triton
import triton.language as tl

# exp(-exp(20)) is 0; the limit keeps exp(w) finite.
STRONGEST = tl.constexpr(20.0)


@triton.jit
def _place(heads, chunks):
    """Return the place of the chunk of this program."""
    program = tl.program_id(0)
    sequence = program // chunks
    return (sequence // heads).to(tl.int64), sequence % heads, program % chunks, program


@triton.jit
def _token(at, side, step, LENGTH: tl.constexpr):
    """Return the token that a side comes to after some steps in a chunk."""
    return at[2] * LENGTH + tl.where(side == 0, step, LENGTH - 1 - step)


@triton.jit
def _exists(size, token, channel):
    """Say which channels of a token there are; the interpreter asks for masks of one shape."""
    return (token + channel * 0 < size[0]) & (channel < size[3])


@triton.jit
def _load(pointer, at, size, token, channel):
    """Read channels of a token in float32, zeros outside."""
    row = size[1] * size[3]
    place = at[0] * (size[0] * row) + (token * row + at[1] * size[3] + channel)
    return tl.load(pointer + place, _exists(size, token, channel), 0.0).to(tl.float32)


@triton.jit
def _store(pointer, at, size, side, token, channel, x):
    """Write channels of a token to what a side contributes, (2, B, T, C)."""
    row = size[1] * size[3]
    items = tl.num_programs(0) // (size[1] * size[2])
    place = (at[0] + side * items) * (size[0] * row) + (token * row + at[1] * size[3] + channel)
    tl.store(pointer + place, x, _exists(size, token, channel))


@triton.jit
def _load_fade(w_ptr, at, size, token, channel):
    """Read the logarithm of the decay of a token, at most 0; 0 outside."""
    w = _load(w_ptr, at, size, token, channel)
    fade = -tl.exp(tl.where(w > STRONGEST, STRONGEST, w))
    return tl.where(_exists(size, token, channel), fade, 0.0)


@triton.jit
def _state(pointer, chunk, side, value, key, CHANNELS: tl.constexpr):
    """Return where the entries of a state lie."""
    start = (chunk.to(tl.int64) * 2 + side) * (CHANNELS * CHANNELS)
    return pointer + start + (value * CHANNELS + key)


# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def states_kernel(
    k_ptr,
    v_ptr,
    w_ptr,
    states_ptr,
    decays_ptr,
    tokens,
    heads,
    chunks,
    channels,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what each chunk adds to the states of both sides, and its decay."""
    at, size = _place(heads, chunks), (tokens, heads, chunks, channels)
    side = tl.program_id(2)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    key = tl.arange(0, CHANNELS)[None, :]
    state = tl.zeros([BLOCK, CHANNELS], tl.float32)
    total = tl.zeros([1, CHANNELS], tl.float32)
    for step in range(LENGTH):
        token = _token(at, side, step, LENGTH)
        fade = _load_fade(w_ptr, at, size, token, key)
        k, v = _load(k_ptr, at, size, token, key), _load(v_ptr, at, size, token, value)
        state = state * tl.exp(fade) + v * k
        total += fade
    tl.store(_state(states_ptr, at[3], side, value, key, CHANNELS), state)
    once = key * 0 + tl.program_id(1) + side < 1
    tl.store(decays_ptr + at[3].to(tl.int64) * CHANNELS + key, tl.exp(total), once)


@triton.jit
def carry_kernel(
    states_ptr,
    decays_ptr,
    sequences,
    chunks,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Replace what each chunk adds by what it finds: the sum over the chunks on one side.

    AHEAD chunks are read before they are needed. There may be several stacks of the states of
    `sequences`.
    """
    sequence, side = tl.program_id(0), tl.program_id(2)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    key = tl.arange(0, CHANNELS)[None, :]
    sums = tl.zeros([BLOCK, CHANNELS], tl.float32)
    for begin in range(0, chunks, AHEAD):
        added = ()
        decays = ()
        for j in tl.static_range(AHEAD):
            chunk = tl.where(side == 0, begin + j, chunks - 1 - begin - j)
            inside = key * 0 + (begin + j) < chunks
            state = _state(states_ptr, sequence * chunks + chunk, side, value, key, CHANNELS)
            decay = ((sequence % sequences) * chunks + chunk).to(tl.int64) * CHANNELS + key
            added = added + (tl.load(state, inside, 0.0),)  # noqa: RUF005 -- Triton knows no *x
            decays = decays + (tl.load(decays_ptr + decay, inside, 0.0),)  # noqa: RUF005 -- Triton
        for j in tl.static_range(AHEAD):
            chunk = tl.where(side == 0, begin + j, chunks - 1 - begin - j)
            state = _state(states_ptr, sequence * chunks + chunk, side, value, key, CHANNELS)
            tl.store(state, sums, key * 0 + (begin + j) < chunks)
            sums = sums * decays[j] + added[j]


@triton.jit
def output_kernel(
    r_ptr,
    k_ptr,
    v_ptr,
    w_ptr,
    u_ptr,
    y_sides_ptr,
    states_ptr,
    tokens,
    heads,
    chunks,
    channels,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what each side contributes to the output; the token itself goes with side 0."""
    at, size = _place(heads, chunks), (tokens, heads, chunks, channels)
    side = tl.program_id(2)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    key = tl.arange(0, CHANNELS)[None, :]
    u = tl.load(u_ptr + at[1] * channels + key, key < channels, 0.0).to(tl.float32)
    bonus = tl.where(side == 0, u, 0.0)
    state = tl.load(_state(states_ptr, at[3], side, value, key, CHANNELS))
    for step in range(LENGTH):
        token = _token(at, side, step, LENGTH)
        decay = tl.exp(_load_fade(w_ptr, at, size, token, key))
        r, k = _load(r_ptr, at, size, token, key), _load(k_ptr, at, size, token, key)
        added = _load(v_ptr, at, size, token, value) * k
        y = tl.sum((state + added * bonus) * r, 1)[:, None]
        _store(y_sides_ptr, at, size, side, token, value, y)
        state = state * decay + added


@triton.jit
def _step_back(r_ptr, w_ptr, gy_ptr, at, size, token, key, value, g_state):
    """Move the state of the gradients from a token to the one before it."""
    decay = tl.exp(_load_fade(w_ptr, at, size, token, key))
    r, gy = _load(r_ptr, at, size, token, key), _load(gy_ptr, at, size, token, value)
    return g_state * decay + r * gy


@triton.jit
def gradient_kernel(
    r_ptr,
    k_ptr,
    v_ptr,
    w_ptr,
    u_ptr,
    gy_ptr,
    gr_sides_ptr,
    gk_sides_ptr,
    gw_sides_ptr,
    gu_ptr,
    states_ptr,
    g_states_ptr,
    tokens,
    heads,
    chunks,
    channels,
    LENGTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write what each side contributes to the gradients of r, k and w, and a chunk to that of u.

    `g_states` are the states of r and gy in the place of k and v: the state of a token from one
    side meets that of the gradients from the other. The latter are computed anew for every GROUP of
    tokens, from the end of the chunk, and kept for those.
    """
    at, size = _place(heads, chunks), (tokens, heads, chunks, channels)
    side = tl.program_id(2)
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    value = tl.arange(0, CHANNELS)[None, :]
    u = tl.load(u_ptr + at[1] * channels + key, key < channels, 0.0).to(tl.float32)
    bonus = tl.where(side == 0, u, 0.0)
    state = tl.load(_state(states_ptr, at[3], side, value, key, CHANNELS))
    g_found = _state(g_states_ptr, at[3], 1 - side, value, key, CHANNELS)
    gu = tl.zeros([BLOCK, 1], tl.float32)
    for first in range(0, LENGTH, GROUP):
        g_state = tl.load(g_found)
        for back in range(LENGTH - GROUP - first):
            token = _token(at, side, LENGTH - 1 - back, LENGTH)
            g_state = _step_back(r_ptr, w_ptr, gy_ptr, at, size, token, key, value, g_state)
        g_states = (g_state,)
        for j in tl.static_range(GROUP - 1):
            token = _token(at, side, first + GROUP - 1 - j, LENGTH)
            g_state = _step_back(r_ptr, w_ptr, gy_ptr, at, size, token, key, value, g_state)
            g_states = (g_state,) + g_states  # noqa: RUF005 -- Triton knows no *x
        for j in tl.static_range(GROUP):
            token = _token(at, side, first + j, LENGTH)
            fade = _load_fade(w_ptr, at, size, token, key)
            decay = tl.exp(fade)
            r, k = _load(r_ptr, at, size, token, key), _load(k_ptr, at, size, token, key)
            v, gy = _load(v_ptr, at, size, token, value), _load(gy_ptr, at, size, token, value)
            own = tl.sum(gy * v, 1)[:, None]
            gr = tl.sum(state * gy, 1)[:, None] + own * bonus * k
            gk = tl.sum(g_states[j] * v, 1)[:, None] + own * bonus * r
            g_decay = tl.sum(state * g_states[j], 1)[:, None]
            gu += own * r * k
            _store(gr_sides_ptr, at, size, side, token, key, gr)
            _store(gk_sides_ptr, at, size, side, token, key, gk)
            _store(gw_sides_ptr, at, size, side, token, key, g_decay * decay * fade)
            state = state * decay + k * v
    inside = key + side * channels < channels  # once, by side 0
    tl.store(gu_ptr + at[3].to(tl.int64) * channels + key, gu, inside)
