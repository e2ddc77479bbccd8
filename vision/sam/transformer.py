"""Two-way transformer between prompt tokens and an image (Segment Anything, arXiv:2304.02643)."""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention whose inner width may be smaller than that of its inputs.

    Args:
        dim: channels of queries, keys, values and output.
        num_heads: heads.
        downsample_rate: `dim` over the inner width.
    """

    def __init__(self, dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        inner = dim // downsample_rate
        if dim % downsample_rate or inner % num_heads:
            raise ValueError(
                f"attention wants dim / downsample_rate to be a multiple of num_heads, got "
                f"{dim} / {downsample_rate} and {num_heads}"
            )
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; a batch axis of 1 is shared by all and projected only once.

        Args:
            q: (N or 1, Lq, dim).
            k: (N or 1, Lk, dim).
            v: like k.

        Returns:
            (N, Lq, dim).
        """
        split = (self.num_heads, -1)
        q = self.q_proj(q).unflatten(-1, split).transpose(1, 2)
        k = self.k_proj(k).unflatten(-1, split).transpose(1, 2)
        v = self.v_proj(v).unflatten(-1, split).transpose(1, 2)
        if q.shape[0] == 1:
            q = q.expand(k.shape[0], -1, -1, -1)
        elif k.shape[0] == 1:
            k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with a ReLU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens attend to each other, then to the image, then the image to the tokens.

    Args:
        dim: channels.
        num_heads: heads of every attention.
        mlp_dim: hidden width of the tokens' feed-forward.
        first: whether it is the first block, which has no residual around its self-attention, for
            the tokens are their own position embedding there.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = Attention(dim, num_heads, downsample_rate=2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = Attention(dim, num_heads, downsample_rate=2)

    def forward(
        self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Update tokens (N, n, dim) and image (N or 1, L, dim); see `TwoWayTransformer`."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.norm1(tokens)
        place = image + image_pe
        tokens = tokens + self.cross_attn_token_to_image(tokens + token_pe, place, image)
        tokens = self.norm2(tokens)
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(place, tokens + token_pe, tokens)
        return tokens, self.norm4(image)


class TwoWayTransformer(nn.Module):
    """A few two-way blocks and a last look of the tokens at the image.

    Args:
        dim: channels.
        depth: number of blocks.
        num_heads: heads of every attention.
        mlp_dim: hidden width of the tokens' feed-forward.
    """

    def __init__(
        self, dim: int = 256, depth: int = 2, num_heads: int = 8, mlp_dim: int = 2048
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayBlock(dim, num_heads, mlp_dim, first=i == 0) for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(dim, num_heads, downsample_rate=2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Let N sets of tokens and the image look at each other.

        Args:
            image: map (N, dim, h, w), or (1, dim, h, w) shared by all: then everything that the
                tokens do not change yet is computed once.
            image_pe: its position embedding (1, dim, h, w).
            tokens: (N, n, dim).

        Returns:
            Tokens (N, n, dim) and image tokens (N, h*w, dim).
        """
        image = image.flatten(2).transpose(1, 2)
        image_pe = image_pe.flatten(2).transpose(1, 2)
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe)
        y = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + y), image
