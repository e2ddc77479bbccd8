"""Bidirectional WKV6 in Triton: launchers of the kernels in `triton_jit`.

Three launches forward: what the chunks add to the states, what they find, the output. The two
sides run side by side. In the backward pass the states of (r, gy) stand beside those of (k, v), and
the gradient of v is the operator itself with r and k exchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..triton_support import LAUNCH, ceil_div, check_item, choose

# A head of fewer channels is filled up to these.
_SMALLEST = 16


@dataclass(frozen=True)
class Tiles:
    """Tile shapes of a launch, all powers of two.

    Attributes:
        length: tokens of a chunk.
        block: channels of a head, at most 16, that a program takes where it need not take all.
        num_warps: warps of a program.
        rows: the same as `block` where states are carried from chunk to chunk.
        ahead: chunks that are read there before they are needed.
        group: tokens, at most `length`, whose states a program of the gradients keeps.
    """

    length: int = 32
    block: int = 16
    num_warps: int = 4
    rows: int = 4
    ahead: int = 4
    group: int = 2

    def constants(self, kernel: Any, channels: int) -> dict[str, int]:
        """Return the compile-time arguments of a kernel, for heads of so many channels."""
        values = {
            "LENGTH": self.length,
            "CHANNELS": max(_SMALLEST, 1 << (channels - 1).bit_length()),
            "BLOCK": self.rows if "AHEAD" in kernel.arg_names else self.block,
            "AHEAD": self.ahead,
            "GROUP": self.group,
        }
        return {name: x for name, x in values.items() if name in kernel.arg_names}


FORWARD, BACKWARD = Tiles(), Tiles(length=16, block=8)


def _candidates(default: Tiles) -> list[Tiles]:
    return [default, replace(default, length=64), replace(default, block=4, num_warps=2)]


def _choose(
    default: Tiles, name: str, run: Callable[[Tiles], object], k: Tensor, u: Tensor
) -> Tiles:
    sequences = k.shape[0] * u.shape[0]
    sizes = (sequences.bit_length(), k.shape[1].bit_length(), u.shape[1])
    return choose((f"wkv6_bi {name}", *sizes, k.dtype, k.device), _candidates(default), run)


@dataclass(frozen=True)
class _Plan:
    """Sizes of a launch that follow from the tiles, the keys (B, T, C) and the bonus (H, N)."""

    tiles: Tiles
    k: Tensor
    u: Tensor

    @cached_property
    def chunks(self) -> int:
        """Chunks of an item."""
        return ceil_div(self.k.shape[1], self.tiles.length)

    @cached_property
    def sequences(self) -> int:
        """Heads of all items."""
        return self.k.shape[0] * self.u.shape[0]

    def room(self, stacks: int) -> tuple[Tensor, Tensor]:
        """Return room for some stacks of states of the chunks, and for the chunks' decays."""
        from .triton_jit import states_kernel

        n = self.tiles.constants(states_kernel, self.u.shape[1])["CHANNELS"]
        chunks = self.sequences * self.chunks
        states = self.k.new_empty(stacks, chunks, 2, n, n, dtype=torch.float32)
        return states, self.k.new_empty(chunks, n, dtype=torch.float32)

    def sides(self, count: int) -> Tensor:
        """Return room for what the sides contribute to some results, (count, 2, B, T, C)."""
        return self.k.new_empty(count, 2, *self.k.shape, dtype=torch.float32)

    def launch(self, kernel: Any, *tensors: Tensor) -> None:
        """Run a kernel for all chunks, blocks of channels and sides."""
        constants = self.tiles.constants(kernel, self.u.shape[1])
        blocks = constants["CHANNELS"] // constants["BLOCK"]
        sizes = (self.k.shape[1], self.u.shape[0], self.chunks, self.u.shape[1])
        kernel[self.sequences * self.chunks, blocks, 2](
            *tensors, *sizes, **constants, num_warps=self.tiles.num_warps, **LAUNCH
        )

    def carry(self, states: Tensor, decays: Tensor) -> None:
        """Let every chunk find what the others add."""
        from .triton_jit import carry_kernel

        constants = self.tiles.constants(carry_kernel, self.u.shape[1])
        blocks = constants["CHANNELS"] // constants["BLOCK"]
        carry_kernel[states.shape[0] * self.sequences, blocks, 2](
            states, decays, self.sequences, self.chunks, **constants, num_warps=1, **LAUNCH
        )


def forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, tiles: Tiles | None = None
) -> Tensor:
    """Serve the backend "triton"; see `wkv6_bi`.

    Args:
        r: receptance, (B, T, C).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        w: decay, (B, T, C).
        u: bonus, (H, N).
        tiles: tile shapes (default: the fastest, measured at the first call).

    Returns:
        (B, T, C) in v's dtype, contiguous.

    Raises:
        ValueError: an item has 2^30 elements or more.
    """
    check_item("wkv6_bi", k)
    r, k, v, w, u = (x.contiguous() for x in (r, k, v, w, u))
    run = partial(_forward, r, k, v, w, u)
    with torch.cuda.device_of(k):
        return run(tiles or _choose(FORWARD, "forward", run, k, u))


def _forward(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, tiles: Tiles) -> Tensor:
    from .triton_jit import output_kernel, states_kernel

    plan = _Plan(tiles, k, u)
    states, decays = plan.room(1)
    plan.launch(states_kernel, k, v, w, states, decays)
    plan.carry(states, decays)
    (y,) = plan.sides(1)
    plan.launch(output_kernel, r, k, v, w, u, y, states)
    return y.sum(0).to(v.dtype)


def backward(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    gy: Tensor,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward`, the same in every run.

    Args:
        r: receptance, (B, T, C).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        w: decay, (B, T, C).
        u: bonus, (H, N).
        gy: gradient of the output, (B, T, C).
        tiles: tile shapes (default: the fastest, measured at the first call).

    Returns:
        Gradients of r, k, v, w, u, contiguous, each in its input's dtype.

    Raises:
        ValueError: an item has 2^30 elements or more.
    """
    check_item("wkv6_bi", k)
    r, k, v, w, u, gy = (x.contiguous() for x in (r, k, v, w, u, gy))
    run = partial(_backward, r, k, v, w, u, gy)
    with torch.cuda.device_of(k):
        return run(tiles or _choose(BACKWARD, "backward", run, k, u))


def _backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, gy: Tensor, tiles: Tiles
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton_jit import gradient_kernel, output_kernel, states_kernel

    plan = _Plan(tiles, k, u)
    both, decays = plan.room(2)
    states, g_states = both
    plan.launch(states_kernel, k, v, w, states, decays)
    plan.launch(states_kernel, r, gy, w, g_states, decays)
    plan.carry(both, decays)
    sides = plan.sides(4)
    gr, gk, gw, gv = sides
    shares = k.new_empty(k.shape[0], u.shape[0], plan.chunks, u.shape[1], dtype=torch.float32)
    plan.launch(gradient_kernel, r, k, v, w, u, gy, gr, gk, gw, shares, states, g_states)
    # The decay between two tokens is the same seen from either.
    plan.launch(output_kernel, k, r, gy, w, u, gv, g_states)
    gr, gk, gw, gv = sides.sum(1)
    gu = shares.sum((0, 2)).to(u.dtype)
    return gr.to(r.dtype), gk.to(k.dtype), gv.to(v.dtype), gw.to(w.dtype), gu
