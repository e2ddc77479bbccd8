"""Channel mixers: the feed-forward half of a block.

Every channel mixer is called and built as a token mixer is (see `mixers`), with the hidden width
`mlp_ratio` besides, and refuses what it cannot use.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vision.kernels import gate

from .activation import gelu
from .chunks import by_chunks
from .init import channel_init
from .shift_mix import ShiftMix
from .vrwkv6_mix import HeadShiftMix


class ChannelMix(nn.Module):
    """Shift, squared-ReLU feed-forward and a sigmoid gate (arXiv:2403.02308).

    `sigmoid(W_r x_r) * W_v norm(relu(W_k x_k)^2)`.

    Args:
        dim: channels C.
        layer: index of the block in the network, from 0.
        depth: number of blocks in the network.
        mlp_ratio: width of the hidden layer over `dim`.
        shift: token shift, a name in `SHIFTS`.
        shift_pixels: distance of the shift in patches, 0 for none.
        channel_gamma: share of the channels that shifts in one direction.
        init_mode: first values, fancy, local or global.
        key_norm: LayerNorm on the hidden layer.
    """

    def __init__(
        self,
        dim: int,
        layer: int,
        depth: int,
        *,
        mlp_ratio: float = 4.0,
        shift: str = "q_shift",
        shift_pixels: int = 1,
        channel_gamma: float = 0.25,
        init_mode: str = "fancy",
        key_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        first = channel_init(init_mode, dim, layer, depth)
        self.shift_mix = ShiftMix(first, shift, shift_pixels, channel_gamma)
        self.key = nn.Linear(dim, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden) if key_norm else None
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Mix the channels of tokens (B, T, C); the shift runs over the grid hw."""
        mixed = list(self.shift_mix(x, hw))
        return by_chunks(self._feed_forward, self.key.out_features, mixed)

    def _feed_forward(self, mixed: list[Tensor]) -> Tensor:
        # What was used is gone: the hidden layer is wide enough alone.
        xr, xk = mixed.pop(), mixed.pop()
        hidden = _relu_squared(self.key(xk))
        del xk
        if self.norm is not None:
            hidden = self.norm(hidden)
        y = self.value(hidden)
        del hidden
        return gate(self.receptance(xr), y)


class HeadChannelMix(ChannelMix):
    """Channel mix of VRWKV6: that of Vision-RWKV with `head_shift`.

    Args:
        dim: channels C.
        layer: index of the block in the network, from 0.
        depth: number of blocks in the network.
        head_size: channels of a head, a divisor of C.
        mlp_ratio: width of the hidden layer over `dim`.
        shift: token shift, a name in `SHIFTS`.
        shift_pixels: distance of the shift in patches, at least 1.
        channel_gamma: share of a head's channels that shifts in one direction.
        init_mode: first values, fancy, local or global.
        key_norm: LayerNorm on the hidden layer.
    """

    def __init__(
        self,
        dim: int,
        layer: int,
        depth: int,
        *,
        head_size: int = 64,
        mlp_ratio: float = 4.0,
        shift: str = "q_shift",
        shift_pixels: int = 1,
        channel_gamma: float = 0.25,
        init_mode: str = "fancy",
        key_norm: bool = False,
    ) -> None:
        super().__init__(
            dim, layer, depth, mlp_ratio=mlp_ratio, init_mode=init_mode, key_norm=key_norm
        )
        first = channel_init(init_mode, dim, layer, depth)
        self.shift_mix = HeadShiftMix(first, head_size, shift, shift_pixels, channel_gamma)


class GeGLU(nn.Module):
    """Feed-forward with a GELU gate, `W_2 (gelu(W_0 x) * W_1 x)` with biases (arXiv:2002.05202).

    Args:
        dim: channels C.
        layer: index of the block in the network; this mixer is the same in every block.
        depth: number of blocks in the network; unused as well.
        mlp_ratio: width of the hidden layer over `dim`.
    """

    def __init__(self, dim: int, layer: int, depth: int, *, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.gate = nn.Linear(dim, hidden)
        self.value = nn.Linear(dim, hidden)
        self.output = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Mix the channels of tokens (B, T, C); the grid hw does not matter."""
        return by_chunks(self._feed_forward, 2 * self.gate.out_features, [x])

    def _feed_forward(self, tokens: list[Tensor]) -> Tensor:
        (x,) = tokens
        return self.output(gelu(self.gate(x)) * self.value(x))


CHANNEL_MIXERS: dict[str, type[nn.Module]] = {
    "channel_mix": ChannelMix,
    "head_channel_mix": HeadChannelMix,
    "geglu": GeGLU,
}


def build_channel_mixer(name: str, dim: int, layer: int, depth: int, **options: Any) -> nn.Module:
    """Make the channel mixer `name` for block `layer` of `depth`.

    Raises:
        ValueError: no channel mixer of that name.
        TypeError: an option that this channel mixer does not have.
    """
    if name not in CHANNEL_MIXERS:
        raise ValueError(f"no channel mixer {name!r}; there are {', '.join(CHANNEL_MIXERS)}")
    return CHANNEL_MIXERS[name](dim, layer, depth, **options)


def _relu_squared(x: Tensor) -> Tensor:
    """Compute relu(x)^2 in the memory of x as far as autograd allows.

    Fresh memory for the widest tensor of the block costs more than the arithmetic on a CPU.
    """
    x = torch.relu_(x)
    return x.square() if torch.is_grad_enabled() else x.square_()
