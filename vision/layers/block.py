"""The one residual block: a token mixer, then a channel mixer."""

from collections.abc import Mapping
from typing import Any

from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from .channel_mix import build_channel_mixer
from .mixers import build_mixer


class Block(nn.Module):
    """Two residual branches, `x + drop_path(scale(branch(x)))`: token mixer and channel mixer.

    A branch is `f(norm(x))`, or `norm(f(x))` with `post_norm` (arXiv:2403.02308, stability of the
    larger models).

    Args:
        dim: channels C.
        layer: index of the block in the network, from 0.
        depth: number of blocks in the network.
        mixer: token mixer, a name in `MIXERS`.
        channel_mixer: feed-forward half, a name in `CHANNEL_MIXERS`.
        mlp_ratio: hidden width of the channel mixer over `dim`.
        post_norm: normalise after the branch instead of before.
        init_values: first value of the layer scale; None for no layer scale.
        drop_path: probability of dropping a branch for a sample, in [0, 1).
        norm_eps: epsilon of the two norms.
        mixer_options: passed to the token mixer alone (num_heads of attention).
        **mix_options: passed to both mixers alike (of the RWKV ones: shift, shift_pixels,
            channel_gamma, init_mode, key_norm).
    """

    def __init__(
        self,
        dim: int,
        layer: int,
        depth: int,
        *,
        mixer: str = "bi_wkv",
        channel_mixer: str = "channel_mix",
        mlp_ratio: float = 4.0,
        post_norm: bool = False,
        init_values: float | None = None,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        mixer_options: Mapping[str, Any] | None = None,
        **mix_options: Any,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.mixer = build_mixer(mixer, dim, layer, depth, **(mixer_options or {}), **mix_options)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.channel_mix = build_channel_mixer(
            channel_mixer, dim, layer, depth, mlp_ratio=mlp_ratio, **mix_options
        )
        scaled = init_values is not None
        # None and no Identity where there is nothing to do: four Python functions a call, which at
        # 224 px are a percent of the time.
        self.ls1 = LayerScale(dim, init_values=init_values) if scaled else None
        self.ls2 = LayerScale(dim, init_values=init_values) if scaled else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else None

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Tokens (B, H*W, C) on the grid hw = (H, W) to tokens of the same shape."""
        if self.post_norm:
            x = x + self._scaled(self.norm1(self.mixer(x, hw)), self.ls1)
            return x + self._scaled(self.norm2(self.channel_mix(x, hw)), self.ls2)
        x = x + self._scaled(self.mixer(self.norm1(x), hw), self.ls1)
        return x + self._scaled(self.channel_mix(self.norm2(x), hw), self.ls2)

    def _scaled(self, branch: Tensor, scale: nn.Module | None) -> Tensor:
        if scale is not None:
            branch = scale(branch)
        return branch if self.drop_path is None else self.drop_path(branch)
