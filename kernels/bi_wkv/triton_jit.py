"""Triton code of Bi-WKV; import it only where Triton is (`triton_kernel` does).

With x = (e^k v, e^k) the output at a token is a quotient of two sums over the tokens on its left
(P), on its right (S) and itself; in the gradient g = (gy, -gy·y) / denominator takes the place of x
with sums L and R (see `scan`). The sums are the states of `triton_states`.

The tokens are cut into segments, which run side by side, and a segment into groups, which run one
after the other. A sweep over the groups yields the sums of every segment, `_carry` adds them up to
what enters each segment from both ends, and the next sweep uses that. Between two sweeps a state
per group is kept in memory. `_is_plain` decides which form is used inside a group.

Arguments that all functions share: `at`, the place of the tile (batch item, segment (S, 1),
channel (1, BLOCK_C)); `size`, (tokens, channels, segments, tokens in a segment); `decay`, a tuple
(w in float64, e^{-w}); `bonus`, a tuple (u in float64, e^u); all of shape (1, BLOCK_C).
"""

import triton
import triton.language as tl

from .triton_states import (
    EMPTY,
    add_up,
    decayed,
    empty,
    first_token,
    gradient_states,
    key_states,
    largest,
    load_group,
    load_state,
    merged,
    product,
    sides,
    state_row,
    store_state,
    store_token,
    sum_from_left,
    sum_from_right,
)

# |w|·T + |u| up to which all scales lie so close together that float32 holds their quotients.
PLAIN_LIMIT = tl.constexpr(30.0)


# --- sweeps ------------------------------------------------------------------------------------


@triton.jit
def _group_row(pointer, at, size, group, GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the row of a group's state; the segments of all groups lie side by side."""
    groups = size[3] // GROUP
    return state_row(pointer, at, size, groups, at[1] * groups + group, BLOCK_C)


@triton.jit
def _border_row(pointer, at, size, which: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the row of a segment's state: its sum from left (0), right (1), what enters (2, 3)."""
    return state_row(pointer, at, size, 4, at[1] * 4 + which, BLOCK_C)


@triton.jit
def _summarise(
    k_ptr,
    v_ptr,
    rights_ptr,
    borders_ptr,
    at,
    size,
    decay,
    PLAIN: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum up the keys of the segments; keep for each group what lies on its right in there."""
    left, right = empty(SEGMENTS, BLOCK_C), empty(SEGMENTS, BLOCK_C)
    groups = size[3] // GROUP
    for i in range(groups):
        group = groups - 1 - i
        token = first_token(at, size, group, GROUP)
        k = load_group(k_ptr, at, size, token, EMPTY, GROUP)
        v = load_group(v_ptr, at, size, token, 0.0, GROUP)
        store_state(_group_row(rights_ptr, at, size, group, GROUP, BLOCK_C), right, BLOCK_C)
        x = key_states(k, v, largest(k, GROUP), PLAIN, GROUP)
        own_left = sum_from_left(x, decay, PLAIN, GROUP)
        own_right = sum_from_right(x, decay, PLAIN, GROUP)
        left = merged(left, decayed(own_left, decay[0] * (i * GROUP)))
        right = merged(decayed(right, decay[0] * GROUP), own_right)
    store_state(_border_row(borders_ptr, at, size, 0, BLOCK_C), left, BLOCK_C)
    store_state(_border_row(borders_ptr, at, size, 1, BLOCK_C), right, BLOCK_C)


@triton.jit
def _carry(borders_ptr, batch, size, decay, BLOCK_C: tl.constexpr):
    """Add up the sums of the segments to what enters each of them from left and right."""
    left, right = empty(1, BLOCK_C), empty(1, BLOCK_C)
    fade = decay[0] * size[3]
    for n in range(size[2]):
        at = (batch, n)
        own = load_state(_border_row(borders_ptr, at, size, 0, BLOCK_C), BLOCK_C)
        store_state(_border_row(borders_ptr, at, size, 2, BLOCK_C), left, BLOCK_C)
        left = merged(decayed(left, fade), own)
        at = (batch, size[2] - 1 - n)
        own = load_state(_border_row(borders_ptr, at, size, 1, BLOCK_C), BLOCK_C)
        store_state(_border_row(borders_ptr, at, size, 3, BLOCK_C), right, BLOCK_C)
        right = merged(decayed(right, fade), own)


@triton.jit
def _load_keys(
    k_ptr, v_ptr, at, size, token, left, right, PLAIN: tl.constexpr, GROUP: tl.constexpr
):
    """Return the keys, the values and the states of a group between two sums."""
    k = load_group(k_ptr, at, size, token, EMPTY, GROUP)
    v = load_group(v_ptr, at, size, token, 0.0, GROUP)
    scale = tl.maximum(tl.maximum(left[2], right[2]), largest(k, GROUP))
    # Rounded so that float32 has it: k minus the scale is then exact enough.
    return k, v, key_states(k, v, scale.to(tl.float32).to(tl.float64), PLAIN, GROUP)


@triton.jit
def _right_of(
    rights_ptr, borders_ptr, at, size, group, decay, GROUP: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return all that lies on the right of a group."""
    inside = load_state(_group_row(rights_ptr, at, size, group, GROUP, BLOCK_C), BLOCK_C)
    # Read again for every group: registers are scarcer than cached reads.
    entering = load_state(_border_row(borders_ptr, at, size, 3, BLOCK_C), BLOCK_C)
    return merged(inside, decayed(entering, decay[0] * (size[3] - (group + 1) * GROUP)))


@triton.jit
def _gradient_left_of(
    g_lefts_ptr, g_borders_ptr, at, size, group, decay, GROUP: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return the sum of g over all that lies on the left of a group."""
    inside = load_state(_group_row(g_lefts_ptr, at, size, group, GROUP, BLOCK_C), BLOCK_C)
    entering = load_state(_border_row(g_borders_ptr, at, size, 2, BLOCK_C), BLOCK_C)
    return merged(inside, decayed(entering, decay[0] * (group * GROUP)))


@triton.jit
def _emit(
    k_ptr,
    v_ptr,
    y_ptr,
    rights_ptr,
    borders_ptr,
    at,
    size,
    decay,
    bonus,
    PLAIN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the output."""
    left = load_state(_border_row(borders_ptr, at, size, 2, BLOCK_C), BLOCK_C)
    for group in range(size[3] // GROUP):
        token = first_token(at, size, group, GROUP)
        right = _right_of(rights_ptr, borders_ptr, at, size, group, decay, GROUP, BLOCK_C)
        _, _, x = _load_keys(k_ptr, v_ptr, at, size, token, left, right, PLAIN, GROUP)
        lefts, rights = sides(x, left, right, decay, PLAIN, GROUP)
        for j in tl.static_range(GROUP):
            total = add_up(lefts[j], rights[j], x[j], bonus, PLAIN)
            store_token(y_ptr, at, size, token + j, total[0] / total[1])
        left = merged(decayed(left, decay[0] * GROUP), sum_from_left(x, decay, PLAIN, GROUP))


@triton.jit
def _summarise_gradient(
    k_ptr,
    v_ptr,
    gy_ptr,
    lefts_ptr,
    rights_ptr,
    g_lefts_ptr,
    borders_ptr,
    g_borders_ptr,
    at,
    size,
    decay,
    bonus,
    PLAIN: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum up g; keep for each group the sums of x and, in the segment, of g on its left."""
    left = load_state(_border_row(borders_ptr, at, size, 2, BLOCK_C), BLOCK_C)
    g_left, g_right = empty(SEGMENTS, BLOCK_C), empty(SEGMENTS, BLOCK_C)
    for group in range(size[3] // GROUP):
        store_state(_group_row(lefts_ptr, at, size, group, GROUP, BLOCK_C), left, BLOCK_C)
        store_state(_group_row(g_lefts_ptr, at, size, group, GROUP, BLOCK_C), g_left, BLOCK_C)
        token = first_token(at, size, group, GROUP)
        right = _right_of(rights_ptr, borders_ptr, at, size, group, decay, GROUP, BLOCK_C)
        _, _, x = _load_keys(k_ptr, v_ptr, at, size, token, left, right, PLAIN, GROUP)
        gy = load_group(gy_ptr, at, size, token, 0.0, GROUP)
        lefts, rights = sides(x, left, right, decay, PLAIN, GROUP)
        g = gradient_states(x, lefts, rights, gy, bonus, PLAIN, GROUP)
        left = merged(decayed(left, decay[0] * GROUP), sum_from_left(x, decay, PLAIN, GROUP))
        own_left = sum_from_left(g, decay, PLAIN, GROUP)
        own_right = sum_from_right(g, decay, PLAIN, GROUP)
        g_left = merged(decayed(g_left, decay[0] * GROUP), own_left)
        g_right = merged(g_right, decayed(own_right, decay[0] * (group * GROUP)))
    store_state(_border_row(g_borders_ptr, at, size, 0, BLOCK_C), g_left, BLOCK_C)
    store_state(_border_row(g_borders_ptr, at, size, 1, BLOCK_C), g_right, BLOCK_C)


@triton.jit
def _emit_gradients(
    k_ptr,
    v_ptr,
    gy_ptr,
    gk_ptr,
    gv_ptr,
    gw_ptr,
    gu_ptr,
    lefts_ptr,
    rights_ptr,
    g_lefts_ptr,
    borders_ptr,
    g_borders_ptr,
    at,
    size,
    decay,
    bonus,
    PLAIN: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradients of keys and values, and each segment's share in those of w and u."""
    g_right = load_state(_border_row(g_borders_ptr, at, size, 3, BLOCK_C), BLOCK_C)
    gw = tl.zeros([SEGMENTS, BLOCK_C], tl.float32)
    gu = tl.zeros([SEGMENTS, BLOCK_C], tl.float32)
    groups = size[3] // GROUP
    for i in range(groups):
        group = groups - 1 - i
        token = first_token(at, size, group, GROUP)
        left = load_state(_group_row(lefts_ptr, at, size, group, GROUP, BLOCK_C), BLOCK_C)
        right = _right_of(rights_ptr, borders_ptr, at, size, group, decay, GROUP, BLOCK_C)
        k, v, x = _load_keys(k_ptr, v_ptr, at, size, token, left, right, PLAIN, GROUP)
        gy = load_group(gy_ptr, at, size, token, 0.0, GROUP)
        lefts, rights = sides(x, left, right, decay, PLAIN, GROUP)
        g = gradient_states(x, lefts, rights, gy, bonus, PLAIN, GROUP)
        g_left = _gradient_left_of(
            g_lefts_ptr, g_borders_ptr, at, size, group, decay, GROUP, BLOCK_C
        )
        g_lefts, g_rights = sides(g, g_left, g_right, decay, PLAIN, GROUP)
        for j in tl.static_range(GROUP):
            gu += product(x[j], g[j], bonus[0], bonus[1], PLAIN)
            gw -= product(lefts[j], g_rights[j], -decay[0], decay[1], PLAIN)
            gw -= product(rights[j], g_lefts[j], -decay[0], decay[1], PLAIN)
            total = add_up(g_lefts[j], g_rights[j], g[j], bonus, PLAIN)
            weight = x[j][1]
            if not PLAIN:
                weight = tl.exp((k[j].to(tl.float64) + total[2]).to(tl.float32))
            store_token(gv_ptr, at, size, token + j, weight * total[0])
            store_token(gk_ptr, at, size, token + j, weight * (total[0] * v[j] + total[1]))
        own = sum_from_right(g, decay, PLAIN, GROUP)
        g_right = merged(decayed(g_right, decay[0] * GROUP), own)
    place = (at[0] * size[2] + at[1]) * size[1] + at[2]
    tl.store(gw_ptr + place, gw, at[2] < size[1])
    tl.store(gu_ptr + place, gu, at[2] < size[1])


# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def _tile(segments, SEGMENTS: tl.constexpr, BLOCK_C: tl.constexpr):
    programs = segments // SEGMENTS
    batch = (tl.program_id(0) // programs).to(tl.int64)
    segment = tl.program_id(0) % programs * SEGMENTS + tl.arange(0, SEGMENTS)[:, None]
    return batch, segment, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]


@triton.jit
def _load_factors(pointer, channel, channels, SIGN: tl.constexpr):
    """Return a per-channel exponent in float64 and e to the power of it, or of minus it."""
    x = tl.load(pointer + channel, channel < channels, 0.0).to(tl.float32)
    return x.to(tl.float64), tl.exp(SIGN * x)


@triton.jit
def _is_plain(decay, bonus, size):
    """Say whether PLAIN may be used for all channels of the tile; not if there is a NaN."""
    reach = tl.abs(decay[0]) * (size[2] * size[3]) + tl.abs(bonus[0])
    return tl.sum((reach <= PLAIN_LIMIT).to(tl.int32)) == reach.shape[1]


@triton.jit
def summary_kernel(
    k_ptr,
    v_ptr,
    w_ptr,
    u_ptr,
    rights_ptr,
    borders_ptr,
    tokens,
    channels,
    segments,
    length,
    PLAIN_GROUP: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum up the keys."""
    at = _tile(segments, SEGMENTS, BLOCK_C)
    size = (tokens, channels, segments, length)
    decay = _load_factors(w_ptr, at[2], channels, -1)
    bonus = _load_factors(u_ptr, at[2], channels, 1)
    if _is_plain(decay, bonus, size):
        _summarise(
            k_ptr, v_ptr, rights_ptr, borders_ptr, at, size, decay,
            True, PLAIN_GROUP, SEGMENTS, BLOCK_C,
        )  # fmt: skip
    else:
        _summarise(
            k_ptr, v_ptr, rights_ptr, borders_ptr, at, size, decay,
            False, GROUP, SEGMENTS, BLOCK_C,
        )  # fmt: skip


@triton.jit
def carry_kernel(borders_ptr, w_ptr, channels, segments, length, BLOCK_C: tl.constexpr):
    """Add up the sums of the segments, between two sweeps."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    decay = _load_factors(w_ptr, channel, channels, -1)
    batch = tl.program_id(0).to(tl.int64)
    _carry(borders_ptr, batch, (0, channels, segments, length), decay, BLOCK_C)


@triton.jit
def output_kernel(
    k_ptr,
    v_ptr,
    w_ptr,
    u_ptr,
    y_ptr,
    rights_ptr,
    borders_ptr,
    tokens,
    channels,
    segments,
    length,
    PLAIN_GROUP: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Write the output; RESIDENT: with all that comes before it, for all tokens in one program."""
    if RESIDENT:
        summary_kernel(
            k_ptr, v_ptr, w_ptr, u_ptr, rights_ptr, borders_ptr, tokens, channels, segments, length,
            PLAIN_GROUP, GROUP, SEGMENTS, BLOCK_C,
        )  # fmt: skip
        tl.debug_barrier()
        carry_kernel(borders_ptr, w_ptr, channels, segments, length, BLOCK_C)
        tl.debug_barrier()
    at = _tile(segments, SEGMENTS, BLOCK_C)
    size = (tokens, channels, segments, length)
    decay = _load_factors(w_ptr, at[2], channels, -1)
    bonus = _load_factors(u_ptr, at[2], channels, 1)
    if _is_plain(decay, bonus, size):
        _emit(
            k_ptr, v_ptr, y_ptr, rights_ptr, borders_ptr, at, size, decay, bonus,
            True, PLAIN_GROUP, BLOCK_C,
        )  # fmt: skip
    else:
        _emit(
            k_ptr, v_ptr, y_ptr, rights_ptr, borders_ptr, at, size, decay, bonus,
            False, GROUP, BLOCK_C,
        )  # fmt: skip


@triton.jit
def gradient_summary_kernel(
    k_ptr,
    v_ptr,
    gy_ptr,
    w_ptr,
    u_ptr,
    lefts_ptr,
    rights_ptr,
    g_lefts_ptr,
    borders_ptr,
    g_borders_ptr,
    tokens,
    channels,
    segments,
    length,
    PLAIN_GROUP: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Sum up the gradients; RESIDENT: with all that comes before `gradient_kernel`.

    That one stays apart, since both in one take Triton a minute to compile.
    """
    if RESIDENT:
        summary_kernel(
            k_ptr, v_ptr, w_ptr, u_ptr, rights_ptr, borders_ptr, tokens, channels, segments, length,
            PLAIN_GROUP, GROUP, SEGMENTS, BLOCK_C,
        )  # fmt: skip
        tl.debug_barrier()
        carry_kernel(borders_ptr, w_ptr, channels, segments, length, BLOCK_C)
        tl.debug_barrier()
    at = _tile(segments, SEGMENTS, BLOCK_C)
    size = (tokens, channels, segments, length)
    decay = _load_factors(w_ptr, at[2], channels, -1)
    bonus = _load_factors(u_ptr, at[2], channels, 1)
    if _is_plain(decay, bonus, size):
        _summarise_gradient(
            k_ptr, v_ptr, gy_ptr, lefts_ptr, rights_ptr, g_lefts_ptr, borders_ptr, g_borders_ptr,
            at, size, decay, bonus, True, PLAIN_GROUP, SEGMENTS, BLOCK_C,
        )  # fmt: skip
    else:
        _summarise_gradient(
            k_ptr, v_ptr, gy_ptr, lefts_ptr, rights_ptr, g_lefts_ptr, borders_ptr, g_borders_ptr,
            at, size, decay, bonus, False, GROUP, SEGMENTS, BLOCK_C,
        )  # fmt: skip
    if RESIDENT:
        tl.debug_barrier()
        carry_kernel(g_borders_ptr, w_ptr, channels, segments, length, BLOCK_C)


@triton.jit
def gradient_kernel(
    k_ptr,
    v_ptr,
    gy_ptr,
    w_ptr,
    u_ptr,
    gk_ptr,
    gv_ptr,
    gw_ptr,
    gu_ptr,
    lefts_ptr,
    rights_ptr,
    g_lefts_ptr,
    borders_ptr,
    g_borders_ptr,
    tokens,
    channels,
    segments,
    length,
    PLAIN_GROUP: tl.constexpr,
    GROUP: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the gradients."""
    at = _tile(segments, SEGMENTS, BLOCK_C)
    size = (tokens, channels, segments, length)
    decay = _load_factors(w_ptr, at[2], channels, -1)
    bonus = _load_factors(u_ptr, at[2], channels, 1)
    if _is_plain(decay, bonus, size):
        _emit_gradients(
            k_ptr, v_ptr, gy_ptr, gk_ptr, gv_ptr, gw_ptr, gu_ptr, lefts_ptr, rights_ptr,
            g_lefts_ptr, borders_ptr, g_borders_ptr, at, size, decay, bonus,
            True, PLAIN_GROUP, SEGMENTS, BLOCK_C,
        )  # fmt: skip
    else:
        _emit_gradients(
            k_ptr, v_ptr, gy_ptr, gk_ptr, gv_ptr, gw_ptr, gu_ptr, lefts_ptr, rights_ptr,
            g_lefts_ptr, borders_ptr, g_borders_ptr, at, size, decay, bonus,
            False, GROUP, SEGMENTS, BLOCK_C,
        )  # fmt: skip
