"""Promptable segmentation: RWKV-SAM and what is built on it."""

from .automatic import AutomaticMaskGenerator
from .model import ImageEmbedding, RwkvSam, build_sam, build_sam_compatible, create_sam, list_sams
from .predictor import Predictor

__all__ = [
    "AutomaticMaskGenerator",
    "ImageEmbedding",
    "Predictor",
    "RwkvSam",
    "build_sam",
    "build_sam_compatible",
    "create_sam",
    "list_sams",
]
