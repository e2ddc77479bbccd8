"""Token mixers: modules that carry information between the tokens of a grid.

Every mixer is called `mixer(x, hw)` with tokens x (B, H*W, C) and hw = (H, W), and returns
(B, H*W, C). It is built as `Mixer(dim, layer, depth, **options)` and refuses what it cannot use.
"""

from typing import Any

from torch import Tensor, nn

from vision.kernels import bi_wkv, gate

from .attention import Attention
from .init import spatial_init
from .shift_mix import ShiftMix


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
        self.norm = nn.LayerNorm(dim) if key_norm else nn.Identity()
        self.output = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Mix tokens (B, T, C) over the grid hw."""
        xk, xv, xr = self.shift_mix(x, hw)
        tokens = x.shape[1]
        y = bi_wkv(self.decay / tokens, self.bonus / tokens, self.key(xk), self.value(xv))
        return self.output(gate(self.receptance(xr), self.norm(y)))


MIXERS: dict[str, type[nn.Module]] = {"bi_wkv": BiWKVMixer, "attention": Attention}


def build_mixer(name: str, dim: int, layer: int, depth: int, **options: Any) -> nn.Module:
    """Make the token mixer `name` for block `layer` of `depth`.

    Raises:
        ValueError: no mixer of that name.
        TypeError: an option that this mixer does not have.
    """
    if name not in MIXERS:
        raise ValueError(f"no token mixer {name!r}; there are {', '.join(MIXERS)}")
    return MIXERS[name](dim, layer, depth, **options)
