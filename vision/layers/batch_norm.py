"""Batch normalisation that spans the GPUs of a distributed run."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` while several GPUs train together, `nn.BatchNorm2d` otherwise.

    `nn.SyncBatchNorm` refuses a CPU in a distributed run, also before the first step.

    Args:
        num_features: channels C of the maps (B, C, H, W).
        **kwargs: as for `nn.BatchNorm2d`.
    """

    process_group = None  # that of all processes; nn.SyncBatchNorm reads it
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a map (B, C, H, W)."""
        if self.training and spans_processes(x.device):
            return nn.SyncBatchNorm.forward(self, x)  # type: ignore[arg-type] # same attributes
        return super().forward(x)


def spans_processes(device: torch.device) -> bool:
    """Say whether several processes train together on devices of this kind, and it is no CPU."""
    if device.type == "cpu" or not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_world_size() > 1
