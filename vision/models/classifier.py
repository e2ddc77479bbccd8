"""What backbones that end in tokens share: pooling, a linear classifier, recomputation."""

from collections.abc import Iterable

import torch
from timm.layers import global_pool_nlc, trunc_normal_
from torch import Tensor, nn

POOLS = ("", "avg", "max", "avgmax")
HEAD_NAMES = ("head.weight", "head.bias")


class TokenClassifier(nn.Module):
    """Base of backbones whose classifier is one linear layer on pooled tokens.

    A subclass builds its layers, and calls `_add_head` last.

    Args:
        num_classes: outputs of the classifier; 0 for none.
        global_pool: avg, max, avgmax, or "" to keep the tokens.
        num_features: channels of the tokens.
        head_hidden_size: channels that the classifier is fed.
    """

    def __init__(
        self, num_classes: int, global_pool: str, num_features: int, head_hidden_size: int
    ) -> None:
        super().__init__()
        self._set_pool(global_pool)
        self.num_classes = num_classes
        self.num_features = num_features
        self.head_hidden_size = head_hidden_size
        self.grad_checkpointing = False

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in POOLS:
            raise ValueError(
                f"no global_pool {global_pool!r}; there are {', '.join(map(repr, POOLS))}"
            )
        self.global_pool = global_pool

    def _add_head(self, drop_rate: float) -> None:
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head()

    def _make_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = nn.Linear(self.head_hidden_size, self.num_classes)
        init_linear([head])
        return head

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: keep only the inputs of the blocks for the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer (an Identity when there are no classes)."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one.

        Args:
            num_classes: outputs of the new classifier; 0 for none.
            global_pool: new pooling; None keeps the present one.

        Raises:
            ValueError: an unknown pooling.
        """
        if global_pool is not None:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = self._make_head().to(like.device, like.dtype)

    def _classify(self, x: Tensor, pre_logits: bool, before: nn.Module | None = None) -> Tensor:
        """Tokens (B, L, C) to logits, or to what the classifier is fed."""
        x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=0)
        x = self.head_drop(x if before is None else before(x))
        return x if pre_logits else self.head(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, L, C) to logits (B, num_classes), or to what the classifier is fed.

        With `global_pool=""` the token axis stays.
        """
        return self._classify(x, pre_logits)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to tokens (B, L, C), or to what `forward_head` takes."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def init_linear(modules: Iterable[nn.Module]) -> None:
    """Truncated normal weights of deviation 0.02 and no bias, for the linear layers among them."""
    for module in modules:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
