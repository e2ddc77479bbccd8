"""Masks from an image embedding and prompts, sharpened by features of strides 4 and 8.

The transformer and its heads are Segment Anything's (arXiv:2304.02643); the high-resolution branch
is RWKV-SAM's (arXiv:2406.19369).
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from .transformer import TwoWayTransformer


class HeadMLP(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        sizes = [(dim, hidden), (hidden, hidden), (hidden, out)]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., out)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def likely_iou(logits: Tensor) -> Tensor:
    """IoU of masks with their objects, if the logits are right about every pixel.

    Args:
        logits: (..., h, w); a pixel belongs to the mask above 0.

    Returns:
        (...,), 0 .. 1, float32 at least: the expected intersection over the expected union; 0 for
        an empty mask.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    share, inside = logits.sigmoid(), logits > 0
    shared = (share * inside).sum((-2, -1))
    either = torch.where(inside, 1.0, share).sum((-2, -1))
    return shared / either.clamp(min=torch.finfo(either.dtype).tiny)


class HighResolution(nn.Module):
    """Mix the upscaled embedding of a prompt with the image's maps of strides 4 and 8.

    `mix(cat[up, mr(s8), hr(s4)]) + up`. The first convolution of the mix is linear in its three
    inputs, so the image's share is computed once and added to every prompt's share.

    Args:
        channels: channels of the maps of strides 4 and 8.
        hidden: hidden width.
        dim: channels of the upscaled embedding and of the result.
    """

    def __init__(self, channels: tuple[int, int], hidden: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        hr, mr = channels
        self.hr_proj = _sharpen(nn.Conv2d(hr, hidden, 3, padding=1), hidden, dim)
        self.mr_proj = _sharpen(nn.ConvTranspose2d(mr, hidden, 2, stride=2), hidden, dim)
        self.mix = _sharpen(nn.Conv2d(3 * dim, hidden, 3, padding=1), hidden, dim)

    def image_share(self, s4: Tensor, s8: Tensor) -> Tensor:
        """The image's part of the mix: (B, channels, 4h, 4w) and (B, channels, 2h, 2w) to
        (B, hidden, 4h, 4w).
        """
        x = torch.cat([self.mr_proj(s8), self.hr_proj(s4)], dim=1)
        weight, bias = (self.mix.get_parameter(f"0.{name}") for name in ("weight", "bias"))
        return F.conv2d(x, weight[:, self.dim :], bias, padding=1)

    def forward(self, up: Tensor, share: Tensor) -> Tensor:
        """Sharpen N upscaled embeddings (N, dim, 4h, 4w) with the share of their image
        (N or 1, hidden, 4h, 4w).
        """
        weight = self.mix.get_parameter("0.weight")
        x = F.conv2d(up, weight[:, : self.dim], padding=1) + share
        for layer in self.mix[1:]:
            x = layer(x)
        return x + up


def _sharpen(first: nn.Module, hidden: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        first,
        LayerNorm2d(hidden, eps=1e-6),
        nn.GELU(),
        nn.Conv2d(hidden, dim, 3, padding=1),
    )


class MaskDecoder(nn.Module):
    """Predict one or three masks for each prompt, and how good each of them is.

    Args:
        dim: channels of image embedding and tokens.
        num_multimask_outputs: masks offered for an ambiguous prompt.
        high_res_channels: channels of the encoder's maps of strides 4 and 8; None leaves the
            high-resolution branch out, which is Segment Anything's decoder.
        single_mask: feed only the token of the single mask, as the published RWKV-SAM does; it
            has no masks for ambiguous prompts then.
        num_heads: heads of the transformer's attention.
        mlp_dim: hidden width of the transformer's feed-forward.
        iou_hidden: hidden width of the head that predicts the masks' quality.
        score_masks: add to what that head says the IoU that the logits themselves make likely (see
            `likely_iou`), so that it needs to learn only how far they are right. Segment
            Anything's head does not see the mask, and hardly knows a bad one of a good kind.
    """

    def __init__(
        self,
        dim: int = 256,
        num_multimask_outputs: int = 3,
        high_res_channels: tuple[int, int] | None = None,
        single_mask: bool = False,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        iou_hidden: int = 256,
        score_masks: bool = False,
    ) -> None:
        super().__init__()
        if dim % 8:
            raise ValueError(f"the mask decoder wants dim in eights, got {dim}")
        self.single_mask = single_mask
        self.num_mask_tokens = num_multimask_outputs + 1
        self.transformer = TwoWayTransformer(dim, num_heads=num_heads, mlp_dim=mlp_dim)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2),
            LayerNorm2d(dim // 4, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2),
            nn.GELU(),
        )
        self.fed = 1 if single_mask else self.num_mask_tokens
        self.output_hypernetworks_mlps = nn.ModuleList(
            HeadMLP(dim, dim, dim // 8) for _ in range(self.fed)
        )
        self.iou_prediction_head = HeadMLP(dim, iou_hidden, self.num_mask_tokens)
        self.likely_iou_gain = (
            nn.Parameter(torch.ones(self.num_mask_tokens)) if score_masks else None
        )
        self.high_res = (
            HighResolution(high_res_channels, dim // 4, dim // 8) if high_res_channels else None
        )

    def forward(
        self,
        embedding: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        share: Tensor | None = None,
        multimask_output: bool | None = True,
    ) -> tuple[Tensor, Tensor]:
        """Decode N prompts of one image, or one prompt of each of N images.

        Args:
            embedding: (1, dim, h, w), or (N, dim, h, w).
            image_pe: position embedding of the map, (1, dim, h, w).
            sparse: prompt tokens (N, n, dim).
            dense: map added to the embedding, (N or 1, dim, h, w) or (1, dim, 1, 1).
            share: `high_res.image_share` of the image(s), (1 or N, dim/4, 4h, 4w); None if the
                decoder has no high-resolution branch.
            multimask_output: the masks for an ambiguous prompt instead of the single one; None
                for all, the single one first, as training wants them.

        Returns:
            Logits (N, M, 4h, 4w) and predicted IoU (N, M); M is 1, or `num_multimask_outputs`, or
            both together.

        Raises:
            ValueError: masks that this decoder does not have, or a share that is missing or too
                much.
        """
        if multimask_output and self.single_mask:
            raise ValueError(
                "this mask decoder has only the single mask (single_mask=True): pass "
                "multimask_output=False, or build the model with single_mask=False"
            )
        if (share is None) != (self.high_res is None):
            raise ValueError(
                "a decoder with a high-resolution branch wants the image's share, one without "
                f"wants None; got {'none' if share is None else 'a share'}; encode the image with "
                "this model"
            )
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight[: self.fed]])
        tokens = torch.cat([own.expand(sparse.shape[0], -1, -1), sparse], dim=1)
        found, image = self.transformer(embedding + dense, image_pe, tokens)

        chosen = range(self.fed)
        if multimask_output is not None:
            chosen = chosen[1:] if multimask_output else chosen[:1]
        weights = torch.stack(
            [self.output_hypernetworks_mlps[i](found[:, 1 + i]) for i in chosen], dim=1
        )  # (N, M, dim/8)
        up = self._upscale(image.transpose(1, 2).unflatten(2, embedding.shape[-2:]), share)
        masks = (weights @ up.flatten(2)).unflatten(2, up.shape[-2:])
        iou = self.iou_prediction_head(found[:, 0])[:, chosen.start : chosen.stop]
        if self.likely_iou_gain is not None:
            gain = self.likely_iou_gain[chosen.start : chosen.stop]
            iou = iou + gain * likely_iou(masks.detach()).to(iou)
        return masks, iou

    def _upscale(self, image: Tensor, share: Tensor | None) -> Tensor:
        up = self.output_upscaling(image)  # (N, dim/8, 4h, 4w)
        return up if self.high_res is None or share is None else self.high_res(up, share)
