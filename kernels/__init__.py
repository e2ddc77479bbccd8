"""Operators with several backends: the formula once, the fastest available code at each call.

`python -m vision.kernels` says which backends there are and which of them run on this machine.
"""

from .bi_wkv import bi_wkv
from .dispatch import Availability, BackendUnavailableError, list_backends, use_backend

__all__ = ["Availability", "BackendUnavailableError", "bi_wkv", "list_backends", "use_backend"]
