"""Token mixers: modules that carry information between the tokens of a grid.

Every mixer is called `mixer(x, hw)` with tokens x (B, H*W, C) and hw = (H, W), and returns
(B, H*W, C). It is built as `Mixer(dim, layer, depth, **options)` and refuses what it cannot use.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.kernels import bi_wkv, gate, wkv6_bi

from .attention import Attention
from .chunks import by_chunks
from .init import depth_ratio, spatial_init
from .shift_mix import ShiftMix
from .vrwkv6_mix import DECAY_RANK, DataShiftMix, lora_init


class BiWKVMixer(nn.Module):
    """Spatial mix of Vision-RWKV: shift, receptance/key/value, bidirectional WKV, gate.

    Source: arXiv:2403.02308. Decay and bonus are raw parameters, divided by the number of tokens
    of the call, so that one model serves every image size.

    Args:
        dim: channels C.
        layer: index of the block in the network, from 0.
        depth: number of blocks in the network.
        shift: token shift, a name in `SHIFTS`.
        shift_pixels: distance of the shift in patches, 0 for none.
        channel_gamma: share of the channels that shifts in one direction.
        init_mode: first values, fancy, local or global.
        key_norm: LayerNorm on the operator's output (the published name; used by the large model).
    """

    def __init__(
        self,
        dim: int,
        layer: int,
        depth: int,
        *,
        shift: str = "q_shift",
        shift_pixels: int = 1,
        channel_gamma: float = 0.25,
        init_mode: str = "fancy",
        key_norm: bool = False,
    ) -> None:
        super().__init__()
        first = spatial_init(init_mode, dim, layer, depth)
        self.decay = nn.Parameter(first.pop("decay"))
        self.bonus = nn.Parameter(first.pop("bonus"))
        self.shift_mix = ShiftMix(first, shift, shift_pixels, channel_gamma)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim) if key_norm else None
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Mix tokens (B, T, C) over the grid hw."""
        xk, xv, xr = self.shift_mix(x, hw)
        tokens = x.shape[1]
        k, v = self.key(xk), self.value(xv)
        del xk, xv  # they would be held beside the operator's output
        y = bi_wkv(self.decay / tokens, self.bonus / tokens, k, v)
        del k, v
        return by_chunks(self._gated, x.shape[2], [xr, y])

    def _gated(self, tokens: list[Tensor]) -> Tensor:
        xr, y = tokens
        if self.norm is not None:
            y = self.norm(y)
        return self.output(gate(self.receptance(xr), y))


class WKV6Mixer(nn.Module):
    """Spatial mix of VRWKV6: data-dependent shift and decay, WKV6 in both directions, SiLU gate.

    Source: arXiv:2404.05892 (RWKV-6), in two directions by OpenGVLab/Vision-RWKV. Tokens past the
    grid (a class token, last) are not shifted, and scanned with the others.

    Args:
        dim: channels C.
        layer: index of the block in the network, from 0.
        depth: number of blocks in the network.
        head_size: channels of a head, a divisor of C.
        shift: token shift, a name in `SHIFTS`, in each head for itself.
        shift_pixels: distance of the shift in patches, at least 1.
        channel_gamma: share of a head's channels that shifts in one direction.
        init_mode: first values; there is one, fancy.
        key_norm: LayerNorm on the operator's output, before that of the heads.

    Raises:
        ValueError: another init mode, an unknown shift, or a number out of range.
    """

    def __init__(
        self,
        dim: int,
        layer: int,
        depth: int,
        *,
        head_size: int = 64,
        shift: str = "q_shift",
        shift_pixels: int = 1,
        channel_gamma: float = 0.25,
        init_mode: str = "fancy",
        key_norm: bool = False,
    ) -> None:
        super().__init__()
        if init_mode != "fancy":
            raise ValueError(f"wkv6_bi has the init mode 'fancy' alone, got {init_mode!r}")
        first = spatial_init(init_mode, dim, layer, depth)
        # VRWKV6 learns the share of the neighbour, and starts w as k and g as r.
        other = {n: 1 - first[kind] for n, kind in zip("wkvrg", "kkvrr", strict=True)}
        self.shift_mix = DataShiftMix(
            other, 1 - first["k"], head_size, shift, shift_pixels, channel_gamma
        )
        self.head_size = head_size
        up = depth_ratio(layer, depth)
        place = torch.arange(dim, dtype=torch.float32) / max(dim - 1, 1)
        zigzag = ((torch.arange(dim) + 1) % 3 - 1) * 0.1
        self.decay = nn.Parameter(-6 + 5 * place ** (0.7 + 1.3 * up))
        self.decay_down = nn.Parameter(lora_init(dim, DECAY_RANK))
        self.decay_up = nn.Parameter(lora_init(DECAY_RANK, dim))
        self.bonus = nn.Parameter(up * (1 - place) + zigzag)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim) if key_norm else None
        self.head_norm = nn.GroupNorm(dim // head_size, dim)
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Mix tokens (B, T, C) over the grid hw; T is at least H*W."""
        xw, xk, xv, xr, xg = self.shift_mix(x, hw)
        decay = self.decay + torch.tanh(xw @ self.decay_down) @ self.decay_up
        bonus = self.bonus.view(-1, self.head_size)
        y = wkv6_bi(self.receptance(xr), self.key(xk), self.value(xv), decay, bonus)
        if self.norm is not None:
            y = self.norm(y)
        y = self.head_norm(y.flatten(0, 1)).view_as(y)
        return self.output(y * F.silu(self.gate(xg)))


MIXERS: dict[str, type[nn.Module]] = {
    "bi_wkv": BiWKVMixer,
    "wkv6_bi": WKV6Mixer,
    "attention": Attention,
}


def build_mixer(name: str, dim: int, layer: int, depth: int, **options: Any) -> nn.Module:
    """Make the token mixer `name` for block `layer` of `depth`.

    Raises:
        ValueError: no mixer of that name.
        TypeError: an option that this mixer does not have.
    """
    if name not in MIXERS:
        raise ValueError(f"no token mixer {name!r}; there are {', '.join(MIXERS)}")
    return MIXERS[name](dim, layer, depth, **options)
