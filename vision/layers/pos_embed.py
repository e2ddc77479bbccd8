"""Learnt position embedding at any grid size."""

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
