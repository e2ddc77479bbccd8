"""Model families; importing this package registers their timm entry points."""

from .ran import ResidualAttentionNet
from .vrwkv import VisionRWKV

__all__ = ["ResidualAttentionNet", "VisionRWKV"]
