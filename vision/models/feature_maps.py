"""Feature maps of timm's models in one layout."""

from typing import Any

from timm.layers import Format
from torch import Tensor


def feature_maps(body: Any, images: Tensor) -> list[Tensor]:
    """Return what a timm model made with `features_only=True` gives, channels first.

    Args:
        body: the model; some, as Swin, give their maps with the channels last. It may also be a
            module that gives a single map (B, C, H, W).
        images: (B, 3, H, W).

    Returns:
        Maps (B, C_i, H_i, W_i), one for each of the model's `out_indices`.
    """
    maps = body(images)
    if isinstance(maps, Tensor):
        return [maps]
    if getattr(body, "output_fmt", Format.NCHW) == Format.NHWC:
        maps = [x.permute(0, 3, 1, 2) for x in maps]
    return list(maps)
