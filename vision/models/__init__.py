"""Model families; importing this package registers their timm entry points."""

from . import vrwkv6
from .ran import ResidualAttentionNet
from .rwkv_sam import RwkvSamEncoder
from .vrwkv import VisionRWKV
from .vrwkv_adapter import BackboneAdapter

__all__ = ["BackboneAdapter", "ResidualAttentionNet", "RwkvSamEncoder", "VisionRWKV", "vrwkv6"]
