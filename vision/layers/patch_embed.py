"""Patch embedding at any image size."""

from timm.layers import PatchEmbed
from torch import Tensor


class PaddedPatchEmbed(PatchEmbed):
    """timm's patch embedding with `dynamic_img_pad`, which copies no image that needs no padding.

    Args:
        *args: as for timm's `PatchEmbed`.
        **kwargs: likewise, without `strict_img_size`, `dynamic_img_pad`, `flatten`, `output_fmt`.
    """

    def __init__(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]  # timm's own
        super().__init__(*args, strict_img_size=False, dynamic_img_pad=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to tokens (B, T, C), zeros added at the bottom and the right."""
        sides = zip(x.shape[-2:], self.patch_size, strict=True)
        # A remainder would fix a size that an exported graph leaves open.
        if all(isinstance(side, int) and side % patch == 0 for side, patch in sides):
            return self.norm(self.proj(x).flatten(2).transpose(1, 2))
        return super().forward(x)
