"""Model families; importing this package registers their timm entry points."""

from .ran import ResidualAttentionNet
from .rwkv_sam import RwkvSamEncoder
from .vrwkv import VisionRWKV

__all__ = ["ResidualAttentionNet", "RwkvSamEncoder", "VisionRWKV"]
