"""Position embeddings: resampled to any grid size, and of sines and cosines."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_pos_embed(
    pos_embed: Tensor, old_hw: tuple[int, int], new_hw: tuple[int, int]
) -> Tensor:
    """Resample a position embedding to another grid, as Vision-RWKV does.

    Bicubic, corners not aligned, no antialiasing (timm's `resample_abs_pos_embed` smooths when it
    shrinks and computes in float32 always, which is another function).

    Args:
        pos_embed: (1, H*W, C), row-major over `old_hw`.
        old_hw: grid of `pos_embed`.
        new_hw: grid wanted.

    Returns:
        (1, H'*W', C) in the dtype of `pos_embed`; computed in float32 at least.
    """
    # A comparison would fix a size that an exported graph leaves open.
    if all(isinstance(side, int) for side in new_hw) and old_hw == new_hw:
        return pos_embed
    channels = pos_embed.shape[-1]
    dtype = torch.promote_types(pos_embed.dtype, torch.float32)
    grid = pos_embed.to(dtype).reshape(1, *old_hw, channels).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new_hw, mode="bicubic", align_corners=False)  # (1, C, H', W')
    return grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)


def sincos_pos_embed(channels: int, hw: tuple[int, int]) -> Tensor:
    """Sines and cosines of column and row, a quarter of the channels each (arXiv:2104.02057).

    Returns:
        (1, H*W, C) in float32, row-major; sin and cos of the column, then of the row, times
        10000^(-i / (C/4)).

    Raises:
        ValueError: the channels are no multiple of 4.
    """
    if channels % 4 or channels < 4:
        raise ValueError(f"wanted channels in fours, got {channels}")
    rates = 10000.0 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    row, column = (side.flatten() for side in torch.meshgrid(*map(torch.arange, hw), indexing="ij"))
    angles = [place[:, None] * rates for place in (column, row)]
    parts = [function(a) for a in angles for function in (torch.sin, torch.cos)]
    return torch.cat(parts, 1)[None].float()
