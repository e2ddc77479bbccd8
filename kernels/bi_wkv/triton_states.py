"""What the Triton kernels of Bi-WKV compute with: sums as states, groups of tokens.

A sum is a state, a tuple (numerator, denominator, scale) that stands for e^{scale} times the two
others. The scale is float64: so it stays exact however far the decay has carried it, and only
differences of scales enter a float32 exponential.

The tokens of a group are unrolled and stay in registers. With PLAIN one scale holds for the whole
group and a step is a multiplication by e^{-w}; else every token's state has its own scale.

The arguments `at`, `size`, `decay`, `bonus` are those of `triton_jit`.
"""

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1e30)


# --- states ------------------------------------------------------------------------------------


@triton.jit
def empty(ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    zero = tl.zeros([ROWS, BLOCK_C], tl.float32)
    return zero, zero, tl.full([ROWS, BLOCK_C], EMPTY, tl.float64)


@triton.jit
def decayed(state, amount):
    return state[0], state[1], state[2] - amount


@triton.jit
def rescaled(state, scale):
    factor = tl.exp((state[2] - scale).to(tl.float32))
    return state[0] * factor, state[1] * factor, scale


@triton.jit
def merged(a, b):
    """Add two states; a NaN in either stays one."""
    gap = (a[2] - b[2]).to(tl.float32)
    less = tl.exp(-tl.abs(gap))
    factor_a = tl.where(gap >= 0, 1.0, less)
    factor_b = tl.where(gap >= 0, less, 1.0)
    numerator = a[0] * factor_a + b[0] * factor_b
    return numerator, a[1] * factor_a + b[1] * factor_b, tl.maximum(a[2], b[2])


@triton.jit
def step(state, token, decay, PLAIN: tl.constexpr):
    """Move on by one token, that is, let the sum decay and add the token."""
    if PLAIN:
        numerator = state[0] * decay[1] + token[0]
        after = (numerator, state[1] * decay[1] + token[1], token[2])
    else:
        after = merged(decayed(state, decay[0]), token)
    return after


@triton.jit
def add_up(left, right, own, bonus, PLAIN: tl.constexpr):
    """Add the sums from both sides and the token's own part."""
    if PLAIN:
        numerator = left[0] + right[0] + own[0] * bonus[1]
        total = (numerator, left[1] + right[1] + own[1] * bonus[1], own[2])
    else:
        scale = tl.maximum(tl.maximum(left[2], right[2]), own[2] + bonus[0])
        a, b = rescaled(left, scale), rescaled(right, scale)
        c = rescaled((own[0], own[1], own[2] + bonus[0]), scale)
        total = (a[0] + b[0] + c[0], a[1] + b[1] + c[1], scale)
    return total


@triton.jit
def product(x, g, shift, factor, PLAIN: tl.constexpr):
    """Multiply a state of x, one of g and e^{shift} = factor."""
    product = x[0] * g[0] + x[1] * g[1]
    if PLAIN:  # the scales of x and g cancel
        product *= factor
    else:
        product *= tl.exp((x[2] + g[2] + shift).to(tl.float32))
    return product


@triton.jit
def state_row(pointer, at, size, slots, slot, BLOCK_C: tl.constexpr):
    """Return where the first of the 4 rows of a state begins.

    Rows are as long as the tile, so that all four have one address and fixed distances.
    """
    slots_of_tile = (at[0] * tl.num_programs(1) + tl.program_id(1)) * (size[2] * slots)
    column = tl.arange(0, BLOCK_C)[None, :]
    return pointer + slots_of_tile * (4 * BLOCK_C) + (slot * (4 * BLOCK_C) + column)


@triton.jit
def load_state(row, BLOCK_C: tl.constexpr):
    """Read numerator, denominator, and the scale from its high and low half."""
    scale = tl.load(row + 2 * BLOCK_C).to(tl.float64) + tl.load(row + 3 * BLOCK_C).to(tl.float64)
    return tl.load(row), tl.load(row + BLOCK_C), scale


@triton.jit
def store_state(row, state, BLOCK_C: tl.constexpr):
    high = state[2].to(tl.float32)
    tl.store(row, state[0])
    tl.store(row + BLOCK_C, state[1])
    tl.store(row + 2 * BLOCK_C, high)
    tl.store(row + 3 * BLOCK_C, (state[2] - high.to(tl.float64)).to(tl.float32))


# --- groups of tokens --------------------------------------------------------------------------


@triton.jit
def first_token(at, size, group, GROUP: tl.constexpr):
    return at[1] * size[3] + group * GROUP


@triton.jit
def token_row(pointer, at, size, token):
    return pointer + at[0] * (size[0] * size[1]) + (token * size[1] + at[2])


@triton.jit
def load_token(pointer, at, size, token, other):
    inside = (token < size[0]) & (at[2] < size[1])
    return tl.load(token_row(pointer, at, size, token), inside, other).to(tl.float32)


@triton.jit
def store_token(pointer, at, size, token, x):
    inside = (token < size[0]) & (at[2] < size[1])
    tl.store(token_row(pointer, at, size, token), x, inside)


@triton.jit
def load_group(pointer, at, size, token, other, GROUP: tl.constexpr):
    rows = (load_token(pointer, at, size, token, other),)
    for j in tl.static_range(1, GROUP):
        rows = rows + (load_token(pointer, at, size, token + j, other),)  # noqa: RUF005 -- Triton
    return rows


@triton.jit
def largest(k, GROUP: tl.constexpr):
    """Return the largest key of a group as a scale."""
    largest = tl.maximum(k[0], EMPTY)
    for j in tl.static_range(1, GROUP):
        largest = tl.maximum(largest, k[j])
    return largest.to(tl.float64)


@triton.jit
def key_state(k, v, scale, PLAIN: tl.constexpr):
    if PLAIN:
        weight = tl.exp(k - scale.to(tl.float32))
        x = (weight * v, weight, scale)
    else:  # a token masked by -inf keeps a scale that can be subtracted
        scale = tl.where(k < EMPTY, EMPTY, k).to(tl.float64)
        x = (v, tl.full(v.shape, 1.0, tl.float32), scale)
    return x


@triton.jit
def key_states(k, v, scale, PLAIN: tl.constexpr, GROUP: tl.constexpr):
    x = (key_state(k[0], v[0], scale, PLAIN),)
    for j in tl.static_range(1, GROUP):
        x = x + (key_state(k[j], v[j], scale, PLAIN),)  # noqa: RUF005 -- Triton knows no *x
    return x


@triton.jit
def sum_from_left(x, decay, PLAIN: tl.constexpr, GROUP: tl.constexpr):
    """Sum up a group as the token after it sees it."""
    state = x[0]
    for j in tl.static_range(1, GROUP):
        state = step(state, x[j], decay, PLAIN)
    return state


@triton.jit
def sum_from_right(x, decay, PLAIN: tl.constexpr, GROUP: tl.constexpr):
    """Sum up a group as the token before it sees it."""
    state = x[GROUP - 1]
    for j in tl.static_range(1, GROUP):
        state = step(state, x[GROUP - 1 - j], decay, PLAIN)
    return state


@triton.jit
def sides(x, left, right, decay, PLAIN: tl.constexpr, GROUP: tl.constexpr):
    """Return for every token of a group the sums over what lies on its left and on its right.

    `left` is that of the first token, `right` that of the last.
    """
    if PLAIN:
        left, right = rescaled(left, x[0][2]), rescaled(right, x[0][2])
    lefts, rights = (left,), (right,)
    for j in tl.static_range(1, GROUP):
        lefts = lefts + (step(lefts[j - 1], x[j - 1], decay, PLAIN),)  # noqa: RUF005 -- Triton
        rights = (step(rights[0], x[GROUP - j], decay, PLAIN),) + rights  # noqa: RUF005 -- Triton
    return lefts, rights


@triton.jit
def gradient_states(x, lefts, rights, gy, bonus, PLAIN: tl.constexpr, GROUP: tl.constexpr):
    """Return g of every token of a group; its scale is minus that of the denominator.

    Past the end g is zero and its scale harmless: added to that of any key, it is not positive.
    """
    g = (gradient_state(x[0], lefts[0], rights[0], gy[0], bonus, PLAIN),)
    for j in tl.static_range(1, GROUP):
        one = gradient_state(x[j], lefts[j], rights[j], gy[j], bonus, PLAIN)
        g = g + (one,)  # noqa: RUF005 -- Triton knows no *g
    return g


@triton.jit
def gradient_state(x, left, right, gy, bonus, PLAIN: tl.constexpr):
    total = add_up(left, right, x, bonus, PLAIN)
    numerator = gy / total[1]
    return numerator, -numerator * (total[0] / total[1]), -total[2]
