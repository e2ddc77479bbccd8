"""Prompts as tokens and maps: points, boxes and masks (Segment Anything, arXiv:2304.02643)."""

import math

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vision.data.prompt_sampling import SURE_LOGIT

# Rows of the label embedding; a padding point (label -1) takes the last one.
BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT, NOT_A_POINT = range(5)
CELL = 4  # side in pixels of what one logit of a mask prompt stands for


class PositionEmbedding(nn.Module):
    """Random Fourier features of a place in an image.

    Coordinates are divided by the longer side of the image, so that the upper left part of a
    square image and the same pixels as an image of their own have the same embedding.

    Args:
        dim: channels of the embedding, even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.randn(2, dim // 2))

    def forward(self, coords: Tensor, size: tuple[int, int]) -> Tensor:
        """Embed places.

        Args:
            coords: x, y in pixels, the centre of the first pixel at 0.5, (..., 2).
            size: height and width of the image in pixels.

        Returns:
            (..., dim) in the dtype of the buffer; computed in float32 at least.
        """
        dtype = torch.promote_types(self.frequencies.dtype, torch.float32)
        place = 2 * (coords.to(dtype) / max(size)) - 1
        phase = 2 * math.pi * (place @ self.frequencies.to(dtype))
        return torch.cat([phase.sin(), phase.cos()], dim=-1).to(self.frequencies.dtype)

    def grid(self, hw: tuple[int, int]) -> Tensor:
        """Embed the centres of the cells of a grid of height and width hw: (1, dim, h, w)."""
        h, w = hw
        options = {"device": self.frequencies.device, "dtype": torch.float32}
        y = (torch.arange(h, **options) + 0.5)[:, None].expand(h, w)  # type: ignore[call-overload] # dict of both
        x = (torch.arange(w, **options) + 0.5)[None].expand(h, w)  # type: ignore[call-overload] # dict of both
        return self(torch.stack([x, y], dim=-1), hw).permute(2, 0, 1)[None]


class PromptEncoder(nn.Module):
    """Turn points, boxes and masks into what the mask decoder attends to.

    Args:
        dim: channels of the tokens and of the image embedding.
        mask_channels: hidden width of the convolutions over a mask prompt.
        dense_boxes: a box of a prompt without a mask is a mask prompt as well, filled. Segment
            Anything's model knows a box by its corners only, and where these are has to be learnt
            from more images than a small data set has.
    """

    def __init__(self, dim: int = 256, mask_channels: int = 16, dense_boxes: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.dense_boxes = dense_boxes
        self.position = PositionEmbedding(dim)
        self.label_embed = nn.Embedding(5, dim)
        self.no_mask_embed = nn.Parameter(torch.randn(dim))
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, 2, stride=2),
            LayerNorm2d(mask_channels // 4, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, 2, stride=2),
            LayerNorm2d(mask_channels, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(mask_channels, dim, 1),
        )

    def embed_points(self, coords: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """Embed labelled points; a box is two of them, labelled 2 (top left) and 3.

        Args:
            coords: x, y in pixels, (N, P, 2); a pixel's index names its centre.
            labels: integers (N, P): 1 foreground, 0 background, 2 and 3 the top left and the
                bottom right corner of a box, -1 padding, whose place does not matter.
            size: height and width of the encoded image in pixels.

        Returns:
            (N, P, dim).
        """
        place = self.position(coords + 0.5, size)
        place = place.masked_fill((labels < 0)[..., None], 0.0)
        return place + self.label_embed(torch.remainder(labels, NOT_A_POINT + 1))

    def dense(
        self,
        masks: Tensor | None,
        with_mask: Tensor | None = None,
        points: tuple[Tensor, Tensor] | None = None,
        size: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Map that is added to the image embedding; see `forward`, where `points` hold the boxes'
        corners, too.
        """
        nothing = self.no_mask_embed.view(1, -1, 1, 1)
        every_mask = masks is not None and with_mask is None
        if self.dense_boxes and points is not None and not every_mask:
            drawn, boxed = filled_boxes(*points, size)
            if masks is not None and with_mask is not None:
                drawn = torch.where(with_mask.view(-1, 1, 1, 1), masks, drawn.to(masks))
                boxed = boxed | with_mask
            masks, with_mask = drawn, boxed
        if masks is None:
            return nothing
        embedded = self.mask_downscaling(masks.to(self.no_mask_embed.dtype))
        if with_mask is None:
            return embedded
        return torch.where(with_mask.view(-1, 1, 1, 1), embedded, nothing)

    def forward(
        self,
        points: tuple[Tensor, Tensor] | None,
        boxes: Tensor | None,
        masks: Tensor | None,
        size: tuple[int, int],
        with_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed N prompts; every kind is optional, and they may be mixed.

        Args:
            points: coordinates (N, P, 2) and labels (N, P); see `embed_points`. Prompts of fewer
                points are padded with label -1; prompts of which only some have a box give its
                corners as points.
            boxes: x0, y0, x1, y1 in pixels, (N, 4).
            masks: logits (N, 1, 4h, 4w) for an image embedding of h x w.
            size: height and width of the encoded image in pixels.
            with_mask: bool (N,), which of the prompts use their mask; None for all.

        Returns:
            Tokens (N, n, dim), and a map (N, dim, h, w) or, without masks, (1, dim, 1, 1); n is 0
            and N is 1 for the tokens if there is neither a point nor a box.

        Raises:
            ValueError: other shapes, or another number of prompts in one kind than in the other.
        """
        _check_prompts(points, boxes, masks)
        every = as_points(points, boxes)
        if every is None:
            return self.no_mask_embed.new_zeros(1, 0, self.dim), self.dense(masks, with_mask)
        return self.embed_points(*every, size), self.dense(masks, with_mask, every, size)


def as_points(
    points: tuple[Tensor, Tensor] | None, boxes: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Join points and boxes to points whose labels say what they are.

    Args:
        points: coordinates (N, P, 2) and labels (N, P), or None.
        boxes: x0, y0, x1, y1 (N, 4), or None.

    Returns:
        Coordinates (N, P, 2) and integer labels (N, P); None if both are.
    """
    coords, labels = [], []
    if points is not None:
        coords.append(points[0])
        labels.append(points[1].long())
    if boxes is not None:
        coords.append(boxes.unflatten(-1, (2, 2)))
        corners = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device)
        labels.append(corners.expand(len(boxes), 2))
    elif points is not None:
        # What the published decoder has seen: a padding point wherever no box comes.
        coords.append(torch.zeros_like(points[0][:, :1]))
        labels.append(torch.full_like(labels[0][:, :1], -1))
    return (torch.cat(coords, 1), torch.cat(labels, 1)) if coords else None


def filled_boxes(coords: Tensor, labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Draw the boxes among points as mask prompts.

    Args:
        coords: x, y in pixels, (N, P, 2); a pixel's index names its centre.
        labels: integers (N, P), 2 and 3 the corners of a box.
        size: height and width of the encoded image in pixels, multiples of 4.

    Returns:
        Logits (N, 1, height / 4, width / 4), and which prompts have a box, bool (N,). A pixel that
        the box covers by a share s has the logit 6 (2 s - 1).
    """
    is_corner = [labels == corner for corner in (TOP_LEFT, BOTTOM_RIGHT)]
    low, high = ((coords * where[..., None]).sum(1).float() for where in is_corner)
    shares = []
    for axis, side in ((1, size[0]), (0, size[1])):
        edge = CELL * torch.arange(side // CELL, device=coords.device, dtype=torch.float32)
        begin = torch.maximum(edge, low[:, axis, None])
        end = torch.minimum(edge + CELL, high[:, axis, None] + 1)
        shares.append((end - begin).clamp(min=0) / CELL)
    share = shares[0][:, None, :, None] * shares[1][:, None, None]
    return SURE_LOGIT * (2 * share - 1), is_corner[0].any(1) & is_corner[1].any(1)


def _check_prompts(
    points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
) -> None:
    counts = {}
    if points is not None:
        coords, labels = points
        if coords.ndim != 3 or coords.shape[-1] != 2 or labels.shape != coords.shape[:2]:
            raise ValueError(
                "points want coordinates (N, P, 2) and labels (N, P), got "
                f"{tuple(coords.shape)} and {tuple(labels.shape)}"
            )
        counts["points"] = len(coords)
    if boxes is not None:
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"boxes want (N, 4) as x0, y0, x1, y1, got {tuple(boxes.shape)}")
        counts["boxes"] = len(boxes)
    if masks is not None:
        if masks.ndim != 4 or masks.shape[1] != 1:
            raise ValueError(f"masks want logits (N, 1, 4h, 4w), got {tuple(masks.shape)}")
        counts["masks"] = len(masks)
    if len(set(counts.values())) > 1:
        raise ValueError(
            "points, boxes and masks of one call belong together, prompt by prompt: wanted the "
            f"same number N of each, got {counts}"
        )
