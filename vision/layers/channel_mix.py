"""Channel mix: the feed-forward half of an RWKV block."""

import torch
from torch import Tensor, nn

from vision.kernels import gate

from .init import channel_init
from .shift_mix import ShiftMix


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
        self.norm = nn.LayerNorm(hidden) if key_norm else nn.Identity()
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Mix the channels of tokens (B, T, C); the shift runs over the grid hw."""
        xk, xr = self.shift_mix(x, hw)
        hidden = self.norm(_relu_squared(self.key(xk)))
        return gate(self.receptance(xr), self.value(hidden))


def _relu_squared(x: Tensor) -> Tensor:
    """Compute relu(x)^2 in the memory of x as far as autograd allows.

    Fresh memory for the widest tensor of the block costs more than the arithmetic on a CPU.
    """
    x = torch.relu_(x)
    return x.square() if torch.is_grad_enabled() else x.square_()
