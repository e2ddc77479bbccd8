"""Operators with several backends: the formula once, the fastest available code at each call.

`python -m vision.kernels` says which backends there are and which of them run on this machine.
"""

from .bi_wkv import bi_wkv
from .deform_attn import deform_attn
from .dispatch import Availability, BackendUnavailableError, list_backends, use_backend
from .gate import gate
from .shift_mix import shift_mix
from .wkv6 import wkv6_bi

__all__ = [
    "Availability",
    "BackendUnavailableError",
    "bi_wkv",
    "deform_attn",
    "gate",
    "list_backends",
    "shift_mix",
    "use_backend",
    "wkv6_bi",
]
