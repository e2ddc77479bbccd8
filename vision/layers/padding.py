"""Images filled up to whole patches."""

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Fill images (B, C, H, W) up with zeros at the bottom and the right.

    Args:
        x: images.
        multiple: what height and width of the result are multiples of, in pixels.

    Raises:
        ValueError: no batch of images, or an empty one.
    """
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(
            f"wanted a batch of images (B, in_chans, H, W) with no empty side, got {tuple(x.shape)}"
        )
    bottom, right = ((s + multiple - 1) // multiple * multiple - s for s in x.shape[-2:])
    # A comparison would fix a size that an exported graph leaves open.
    if isinstance(bottom, int) and isinstance(right, int) and bottom == right == 0:
        return x
    return F.pad(x, (0, right, 0, bottom))
