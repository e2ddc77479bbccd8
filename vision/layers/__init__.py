"""Blocks and token mixers, shared by every RWKV-like model of the zoo."""

# First: its import ends with that of vision.models (see vision/__init__.py), which needs the
# modules below, so it must not happen halfway through one of them.
import timm  # noqa: F401

from .attention import Attention
from .block import Block
from .channel_mix import CHANNEL_MIXERS, ChannelMix, GeGLU, HeadChannelMix, build_channel_mixer
from .conv import MBConv, MBConvBlock
from .mixers import MIXERS, BiWKVMixer, WKV6Mixer, build_mixer
from .pos_embed import resample_pos_embed
from .shift_mix import SHIFTS, ShiftMix, q_shift, single_shift

__all__ = [
    "CHANNEL_MIXERS",
    "MIXERS",
    "SHIFTS",
    "Attention",
    "BiWKVMixer",
    "Block",
    "ChannelMix",
    "GeGLU",
    "HeadChannelMix",
    "MBConv",
    "MBConvBlock",
    "ShiftMix",
    "WKV6Mixer",
    "build_channel_mixer",
    "build_mixer",
    "q_shift",
    "resample_pos_embed",
    "single_shift",
]
