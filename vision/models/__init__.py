"""Model families; importing this package registers their timm entry points."""

from .vrwkv import VisionRWKV

__all__ = ["VisionRWKV"]
