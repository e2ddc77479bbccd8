"""VRWKV6: Vision-RWKV with the data-dependent decay and matrix states of RWKV-6.

The network is `VisionRWKV`; its token mixer is `vision.layers.mixers.WKV6Mixer`. Papers:
arXiv:2403.02308 and arXiv:2404.05892. Published weights: OpenGVLab/Vision-RWKV, Apache-2.0.
"""

from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .vrwkv import create_vrwkv, map_checkpoint, published_cfg

__all__ = ["checkpoint_filter_fn"]

# Upstream's names in the token mixer -> ours.
_MIXER_MAP = [
    (r"\.mixer\.time_maa_([xwkvrg])$", r".mixer.shift_mix.\1"),
    (r"\.mixer\.time_maa_w1$", ".mixer.shift_mix.down"),
    (r"\.mixer\.time_maa_w2$", ".mixer.shift_mix.up"),
    (r"\.mixer\.time_decay$", ".mixer.decay"),
    (r"\.mixer\.time_decay_w1$", ".mixer.decay_down"),
    (r"\.mixer\.time_decay_w2$", ".mixer.decay_up"),
    (r"\.mixer\.time_faaaa$", ".mixer.bonus"),
    (r"\.mixer\.ln_x\.", ".mixer.head_norm."),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Map published and own checkpoints of VRWKV6 to our names; strict.

    As `vision.models.vrwkv.checkpoint_filter_fn`, with the names of this token mixer.

    Args:
        state_dict: checkpoint as read from the file.
        model: the `VisionRWKV` that will load the result.

    Raises:
        CheckpointError: keys that have no place in the model, keys the model misses, or a
            position embedding that is no square grid; the message lists them.
    """
    return map_checkpoint(state_dict, model, _MIXER_MAP)


default_cfgs = generate_default_cfgs(
    {
        "vrwkv6_nano_patch8_224.untrained": published_cfg(),
        "vrwkv6_tiny_patch16_224.in1k": published_cfg("vrwkv6_t_in1k_224.pth"),
        "vrwkv6_small_patch16_224.in1k": published_cfg("vrwkv6_s_in1k_224.pth"),
        "vrwkv6_base_patch16_224.in1k": published_cfg("vrwkv6_b_in1k_224.pth"),
    }
)


def _create_vrwkv6(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    args = {"mixer": "wkv6_bi", "channel_mixer": "head_channel_mix", "head_size": 64, **kwargs}
    return create_vrwkv(variant, pretrained, checkpoint_filter_fn, **args)


@register_model
def vrwkv6_nano_patch8_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV6-nano, 64 channels, 4 blocks, patches of 8: for tests and CPU examples. No weights."""
    args = {"patch_size": 8, "embed_dim": 64, "depth": 4, **kwargs}
    return _create_vrwkv6("vrwkv6_nano_patch8_224", pretrained, **args)


@register_model
def vrwkv6_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV6-T, 7.6 M parameters, 3 heads."""
    args = {"embed_dim": 192, "depth": 12, **kwargs}
    return _create_vrwkv6("vrwkv6_tiny_patch16_224", pretrained, **args)


@register_model
def vrwkv6_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV6-S, 27.7 M parameters, 6 heads."""
    args = {"embed_dim": 384, "depth": 12, "post_norm": True, "init_values": 1e-5, **kwargs}
    return _create_vrwkv6("vrwkv6_small_patch16_224", pretrained, **args)


@register_model
def vrwkv6_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VRWKV6-B, 104.9 M parameters, 12 heads."""
    args = {"embed_dim": 768, "depth": 12, "post_norm": True, "init_values": 1e-5, **kwargs}
    return _create_vrwkv6("vrwkv6_base_patch16_224", pretrained, **args)
