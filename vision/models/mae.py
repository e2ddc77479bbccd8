"""Masked autoencoder (arXiv:2111.06377) with Vision-RWKV as its encoder: pretraining by pictures.

Most patches of an image are masked, the encoder sees the others alone, and a light decoder paints
the masked ones. How a token shift acts on the kept patches: see `VisionRWKV.forward_kept`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vision.layers.block import Block
from vision.layers.kept_grid import KeptGrid
from vision.layers.pos_embed import resample_pos_embed, sincos_pos_embed

from .classifier import init_linear
from .vrwkv import VisionRWKV

__all__ = [
    "MAEDecoder",
    "MaskedAutoencoder",
    "Reconstruction",
    "masked_mse",
    "mean_of_visible",
    "normalize_patches",
    "patchify",
    "random_kept",
    "unpatchify",
]

_EPS = 1e-6  # added to the variance of a patch


class Reconstruction(NamedTuple):
    """What a masked autoencoder makes of a batch.

    Attributes:
        prediction: of all patches, (B, H*W, P) with P = patch height * width * channels.
        target: what they should be, of the same shape.
        masked: which patches the encoder did not see, bool (B, H*W).
    """

    prediction: Tensor
    target: Tensor
    masked: Tensor


class MAEDecoder(nn.Module):
    """RWKV blocks on the whole grid, where a learnt token stands for each masked patch.

    Args:
        in_dim: channels of the encoder's tokens.
        out_dim: numbers of a patch.
        hw: grid of the position embedding; it is resampled for another.
        dim: channels.
        depth: number of blocks.
        **block_options: of `vision.layers.Block` (mixer, shift, post_norm, key_norm, ...).

    Raises:
        ValueError: `dim` is no multiple of 4, or no block.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hw: tuple[int, int],
        dim: int = 512,
        depth: int = 8,
        **block_options: Any,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"the decoder wants one block or more, got depth={depth}")
        self.hw = hw
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(dim).normal_(std=0.02))
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, hw))
        self.norm_pre = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(dim, i, depth, **block_options) for i in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.pred = nn.Linear(dim, out_dim)
        init_linear(self.modules())

    def forward(self, x: Tensor, grid: KeptGrid) -> Tensor:
        """Tokens of the kept patches (B, K, in_dim) to all patches, (B, H*W, out_dim)."""
        hw = (grid[0], grid[1])
        x = grid.spread(self.embed(x), self.mask_token)  # (B, H*W, dim)
        x = self.norm_pre(x + resample_pos_embed(self.pos_embed, self.hw, hw))
        for block in self.blocks:
            x = block(x, hw)
        return self.pred(self.norm(x))


class MaskedAutoencoder(nn.Module):
    """A Vision-RWKV and a decoder that paints the patches it did not see.

    The encoder's position embedding starts as sines and cosines, and is learnt.

    Args:
        encoder: a `VisionRWKV` (VRWKV, VRWKV6) without class token. Its classifier is taken off.
        decoder: arguments of `MAEDecoder`: dim, depth, and options of its blocks.
        mask_ratio: share of the patches that are masked, in (0, 1).
        norm_pix: predict each patch less its mean, over its standard deviation.

    Raises:
        ValueError: another kind of encoder, or a ratio out of range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: dict[str, Any] | None = None,
        mask_ratio: float = 0.75,
        norm_pix: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, VisionRWKV) or encoder.cls_token is not None:
            raise ValueError(
                "masked autoencoding wants a Vision-RWKV (vrwkv_*, vrwkv6_*) without a class "
                f"token, got {type(encoder).__name__}"
            )
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio wants a share between 0 and 1, got {mask_ratio}")
        encoder.reset_classifier(0)
        encoder.pre_logits = nn.Identity()
        hw = encoder.patch_embed.grid_size
        with torch.no_grad():
            encoder.pos_embed.copy_(sincos_pos_embed(encoder.embed_dim, hw))
        weight = encoder.patch_embed.proj.weight  # (C, channels, height, width)
        self.encoder = encoder
        self.decoder = MAEDecoder(encoder.embed_dim, weight[0].numel(), hw, **(decoder or {}))
        self.patch_size = (weight.shape[2], weight.shape[3])
        self.mask_ratio = mask_ratio
        self.norm_pix = norm_pix

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Mask patches at random, and paint them.

        Args:
            images: (B, channels, H, W), sides multiples of the patch.
            noise: patches with the largest numbers are masked, (B, patches); None for random ones.

        Raises:
            ValueError: other sizes, or so few patches that none would be masked.
        """
        target = patchify(images, self.patch_size)
        if self.norm_pix:
            target = normalize_patches(target)[0]
        if noise is None:
            noise = torch.rand(target.shape[:2], device=images.device)
        kept = random_kept(noise, self.mask_ratio)
        tokens, grid = self.encoder.forward_kept(images, kept)
        return Reconstruction(self.decoder(tokens, grid), target, grid.masked())

    def paint(self, images: Tensor, found: Reconstruction) -> Tensor:
        """Put the predictions into the images: visible patches stay as they are.

        With `norm_pix` a predicted patch gets the mean and the deviation of the true one.

        Args:
            images: what was masked, (B, channels, H, W).
            found: what `forward` gave for them.
        """
        true = patchify(images, self.patch_size)
        painted = found.prediction.to(true.dtype)
        if self.norm_pix:
            _, mean, deviation = normalize_patches(true)
            painted = painted * deviation + mean
        size = (images.shape[2], images.shape[3])
        chosen = torch.where(found.masked[..., None], painted, true)
        return unpatchify(chosen, self.patch_size, size)


def random_kept(noise: Tensor, mask_ratio: float) -> Tensor:
    """Choose the patches that the encoder sees: those with the smallest numbers.

    Args:
        noise: (B, T).
        mask_ratio: share that is masked; rounded to whole patches, at least one is kept.

    Returns:
        Numbers of the kept patches, rising, int64 (B, K).

    Raises:
        ValueError: no patch would be masked.
    """
    tokens = noise.shape[1]
    count = max(1, round(tokens * (1 - mask_ratio)))
    if count == tokens:
        raise ValueError(
            f"mask_ratio={mask_ratio} of {tokens} patches masks none; take larger images or "
            "smaller patches"
        )
    return noise.argsort(1)[:, :count].sort(1).values


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, patches, h*w*C), row-major; channels come last.

    Raises:
        ValueError: sides that are no multiples of the patch.
    """
    height, width = images.shape[2:]
    if height % patch[0] or width % patch[1]:
        raise ValueError(
            f"masked autoencoding wants images of whole patches of {patch[0]} x {patch[1]} px, "
            f"got {height} x {width}"
        )
    x = images.unflatten(2, (-1, patch[0])).unflatten(4, (-1, patch[1]))  # (B, C, H, h, W, w)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Put patches (B, patches, h*w*C) together to images (B, C, *size); undoes `patchify`."""
    x = patches.unflatten(1, (size[0] // patch[0], size[1] // patch[1]))
    x = x.unflatten(3, (*patch, -1))  # (B, H, W, h, w, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def normalize_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take from each patch its mean, and divide it by its standard deviation.

    Args:
        patches: (B, T, P).

    Returns:
        The patches, the means and the deviations (B, T, 1); the variance is the unbiased one, and
        1e-6 is added to it.
    """
    mean = patches.mean(-1, keepdim=True)
    deviation = (patches.var(-1, keepdim=True) + _EPS).sqrt()
    return (patches - mean) / deviation, mean, deviation


def masked_mse(prediction: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Mean squared error over the masked patches of each image, (B,), in float32 at least.

    Args:
        prediction: (B, T, P), or what broadcasts to it.
        target: (B, T, P).
        masked: bool (B, T); as many in each image, at least one.
    """
    dtype = torch.promote_types(target.dtype, torch.float32)
    error = (prediction.to(dtype) - target.to(dtype)).square().mean(-1)
    return torch.where(masked, error, 0).sum(1) / masked.sum(1)


def mean_of_visible(target: Tensor, masked: Tensor) -> Tensor:
    """Predict every patch as the mean of the image's visible patches: the floor of a method.

    Args:
        target: (B, T, P).
        masked: bool (B, T); not all of an image.

    Returns:
        (B, 1, P).
    """
    visible = (~masked)[..., None]
    return torch.where(visible, target, 0).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
