"""Triton code of deformable attention; import it only where Triton is (`triton_kernel` does).

A row is a head of a query; a program has ROWS of one item, so what belongs to rows is (ROWS, 1).
Arguments that functions share: `size`, (queries, heads, channels of a head); `sides`, height and
width of one level after the other, 2 n + 1 for a side of n: Triton would compile anew for numbers
in a tuple that are 1 or divide by 16.
"""

import triton
import triton.language as tl


@triton.jit
def _place(size, ROWS: tl.constexpr):
    """Return batch item, rows (ROWS, 1), and which of them there are."""
    rows = size[0] * size[1]
    blocks = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    return (tl.program_id(0) // blocks).to(tl.int64), row, row < rows


@triton.jit
def _shape(sides, level: tl.constexpr):
    """Return height and width of a level."""
    return sides[2 * level] >> 1, sides[2 * level + 1] >> 1


@triton.jit
def _sample(locations, index, exists, height, width):
    """Return the pixel to the upper left of samples, the way from there, and whether all counts.

    A sample that lies a whole pixel or more beyond the outermost centres counts nothing.
    """
    x = tl.load(locations + 2 * index, exists, 0.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * index + 1, exists, 0.0).to(tl.float32) * height - 0.5
    near = exists & (x > -1) & (x < width) & (y > -1) & (y < height)
    x, y = tl.where(near, x, 0.0), tl.where(near, y, 0.0)
    left, top = tl.floor(x), tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, near


@triton.jit
def _corner(sample, height, width, right, below):
    """Return one of the four pixels around samples, if it counts, and its shares by x and y."""
    column, line = sample[0] + right, sample[1] + below
    counts = sample[4] & (column >= 0) & (column < width) & (line >= 0) & (line < height)
    share_x = (1 - right) + (2 * right - 1) * sample[2]
    share_y = (1 - below) + (2 * below - 1) * sample[3]
    return line * width + column, counts, share_x, share_y


@triton.jit
def _offset(pixel, row, channel, size):
    """Return where channels of a pixel lie among the values of an item, for every row's head."""
    return pixel * (size[1] * size[2]) + (row % size[1] * size[2] + channel)


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["pixels", "queries"])
def forward_kernel(
    value_ptr,
    locations_ptr,
    weights_ptr,
    y_ptr,
    sides,
    pixels,
    queries,
    heads,
    channels,
    points,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sums of the samples."""
    size = (queries, heads, channels)
    batch, row, exists = _place(size, ROWS)
    value = value_ptr + batch * (pixels * heads * channels)
    locations = locations_ptr + batch * (queries * heads * LEVELS * points * 2)
    weights = weights_ptr + batch * (queries * heads * LEVELS * points)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    y = tl.zeros([ROWS, BLOCK], tl.float32)
    start = 0
    for level in tl.static_range(LEVELS):
        height, width = _shape(sides, level)
        for point in range(points):
            index = (row * LEVELS + level) * points + point
            sample = _sample(locations, index, exists, height, width)
            weight = tl.load(weights + index, exists, 0.0).to(tl.float32)
            for below in tl.static_range(2):
                for right in tl.static_range(2):
                    pixel, counts, by_x, by_y = _corner(sample, height, width, right, below)
                    at = _offset(start + pixel, row, channel, size)
                    inside = counts & (channel < channels)
                    one = tl.load(value + at, inside, 0.0).to(tl.float32)
                    y += tl.where(counts, weight * by_x * by_y, 0.0) * one
        start += height * width
    out = y_ptr + batch * (queries * heads * channels)
    tl.store(out + (row * channels + channel), y, exists & (channel < channels))


@triton.jit(do_not_specialize=["pixels", "queries"])
def backward_kernel(
    value_ptr,
    locations_ptr,
    weights_ptr,
    grad_ptr,
    sums_ptr,
    scale_ptr,
    g_locations_ptr,
    g_weights_ptr,
    sides,
    pixels,
    queries,
    heads,
    channels,
    points,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of locations and weights, and add that of the values to `sums`.

    Where there is a `scale`, the sums are of integers, the terms times it, and their order is free.
    """
    size = (queries, heads, channels)
    batch, row, exists = _place(size, ROWS)
    value = value_ptr + batch * (pixels * heads * channels)
    sums = sums_ptr + batch * (pixels * heads * channels)
    out = grad_ptr + batch * (queries * heads * channels)
    locations = locations_ptr + batch * (queries * heads * LEVELS * points * 2)
    g_locations = g_locations_ptr + batch * (queries * heads * LEVELS * points * 2)
    weights = weights_ptr + batch * (queries * heads * LEVELS * points)
    g_weights = g_weights_ptr + batch * (queries * heads * LEVELS * points)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    start = 0
    for level in tl.static_range(LEVELS):
        height, width = _shape(sides, level)
        for point in range(points):
            index = (row * LEVELS + level) * points + point
            sample = _sample(locations, index, exists, height, width)
            weight = tl.load(weights + index, exists, 0.0).to(tl.float32)
            gx = tl.zeros([ROWS, BLOCK], tl.float32)
            gy = tl.zeros([ROWS, BLOCK], tl.float32)
            gw = tl.zeros([ROWS, BLOCK], tl.float32)
            for first in range(0, channels, BLOCK):
                channel = first + tl.arange(0, BLOCK)[None, :]
                there = exists & (channel < channels)
                grad = tl.load(out + (row * channels + channel), there, 0.0).to(tl.float32)
                for corner in range(4):  # one at a time: unrolled they overflow the registers
                    right, below = corner % 2, corner // 2
                    pixel, counts, by_x, by_y = _corner(sample, height, width, right, below)
                    at = _offset(start + pixel, row, channel, size)
                    inside = counts & (channel < channels)
                    one = tl.load(value + at, inside, 0.0).to(tl.float32)
                    product = tl.where(inside, grad * one, 0.0)
                    gx += (2 * right - 1) * by_y * product
                    gy += (2 * below - 1) * by_x * product
                    gw += by_x * by_y * product
                    term = weight * by_x * by_y * grad
                    if scale_ptr is not None:
                        term = (term * scale).to(tl.int64)
                    tl.atomic_add(sums + at, term, inside, sem="relaxed")
            gx = tl.sum(gx, 1)[:, None] * weight * width
            gy = tl.sum(gy, 1)[:, None] * weight * height
            gw = tl.sum(gw, 1)[:, None]
            tl.store(g_locations + 2 * index, gx, exists)
            tl.store(g_locations + 2 * index + 1, gy, exists)
            tl.store(g_weights + index, gw, exists)
        start += height * width
