"""Parameters and multiply-adds of a model, the operators of the zoo counted."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Upstream's count for everything in a block between the matrix products, per token and channel
# (shift, mixes, scan, gates; its tool get_flops_backbone.py).
BI_WKV_MACS_PER_ELEMENT = 29
# The same of VRWKV6, by head size N: 7 N + 17 per token and channel, and the hyperbolic tangents of
# its low-rank maps per token; their products are matrix products.
WKV6_MACS_PER_HEAD_CHANNEL, WKV6_MACS_PER_ELEMENT, WKV6_MACS_PER_TOKEN = 7, 17, 224
# A norm with scale and shift costs two multiply-adds per element (the count of mmcv's tool).
NORM_MACS_PER_ELEMENT = 2


@dataclass(frozen=True)
class Complexity:
    """Size and cost of one forward pass of one image.

    Attributes:
        params: number of parameters.
        matmul: multiply-adds of linear layers, convolutions and attention products.
        operator: multiply-adds of the WKV operator and what surrounds it.
        norm: multiply-adds of the normalisations.
    """

    params: int
    matmul: int
    operator: int
    norm: int

    @property
    def macs(self) -> int:
        """All multiply-adds."""
        return self.matmul + self.operator + self.norm


def _numel(shape: Any) -> int:
    return int(torch.Size(shape).numel())


def _wkv6_macs(r: Any, u: Any) -> int:
    """Of tokens of the shape (B, T, C) and a bonus of the shape (heads, N)."""
    batch, tokens, channels = r
    per_token = channels * (WKV6_MACS_PER_HEAD_CHANNEL * u[1] + WKV6_MACS_PER_ELEMENT)
    return batch * tokens * (per_token + WKV6_MACS_PER_TOKEN)


def count_complexity(model: nn.Module, input_size: tuple[int, int, int]) -> Complexity:
    """Run one image through the model and count.

    Args:
        model: any module that takes images (1, C, H, W); it is run in evaluation mode.
        input_size: C, H, W.

    Returns:
        The counts. Matrix products inside attention are counted, biases and activations are not.
    """
    # Flops are twice the multiply-adds throughout, as torch counts them.
    norms = (torch.ops.aten.native_layer_norm, torch.ops.aten.native_group_norm)
    batch_norms = (
        torch.ops.aten.native_batch_norm,
        torch.ops.aten._native_batch_norm_legit_no_training,
    )
    formulas: dict[Any, Any] = {
        op: lambda x, *_, **__: 2 * NORM_MACS_PER_ELEMENT * _numel(x) for op in norms + batch_norms
    }
    wkv = torch.ops.vision.bi_wkv
    formulas[wkv] = lambda w, u, k, *_, **__: 2 * BI_WKV_MACS_PER_ELEMENT * _numel(k)
    wkv6 = torch.ops.vision.wkv6_bi
    formulas[wkv6] = lambda r, k, v, w, u, *_, **__: 2 * _wkv6_macs(r, u)
    first = next(model.parameters())
    image = torch.zeros(1, *input_size, device=first.device, dtype=first.dtype)
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(image)
    model.train(training)
    by_op = counter.get_flop_counts()["Global"]
    norm = sum(by_op.get(op, 0) for op in norms + batch_norms) // 2
    operator = sum(by_op.get(op, 0) for op in (wkv, wkv6)) // 2
    total = sum(by_op.values()) // 2
    params = sum(p.numel() for p in model.parameters())
    return Complexity(params, total - norm - operator, operator, norm)
