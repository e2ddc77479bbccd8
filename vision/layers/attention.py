"""Self-attention as a token mixer."""

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention over all tokens (arXiv:2010.11929); its cost grows with T^2.

    Args:
        dim: channels C.
        layer: index of the block in the network; attention is the same in every block.
        depth: number of blocks in the network; unused as well.
        num_heads: heads that share the channels.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(self, dim: int, layer: int, depth: int, *, num_heads: int = 6) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(
                f"attention needs channels in equal heads, got {dim} channels for num_heads="
                f"{num_heads}; choose a divisor of {dim}"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Mix tokens (B, T, C); the grid hw does not matter."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, heads, T, C / heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))
