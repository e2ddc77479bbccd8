"""What the Triton backends share: where they run, how tile shapes are chosen.

Triton is imported at the first call of a kernel, never at import.
"""

import os
import shutil
import sys
from collections.abc import Callable, Hashable, Sequence
from importlib.util import find_spec
from typing import TypeVar, cast

import torch
from torch import Tensor

__all__ = ["DTYPES", "LAUNCH", "ceil_div", "check_item", "choose", "is_interpreted", "probe"]

DTYPES = frozenset([torch.float32])
# Triton 3.9 asks for an explicit choice; products that are added are wanted fused.
LAUNCH = {"enable_fp_fusion": True}

Tiles = TypeVar("Tiles")
_chosen: dict[Hashable, object] = {}


def is_interpreted() -> bool:
    """Return whether Triton kernels run in Triton's interpreter, on any device."""
    language = sys.modules.get("triton.language")
    if language is None:
        return os.environ.get("TRITON_INTERPRET") == "1"
    # What was read when Triton was imported; its own functions keep it.
    return type(language.sum).__name__ == "InterpretedFunction"


def probe(device: torch.device) -> str | None:
    """Say why Triton kernels cannot run on a device; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if is_interpreted():
        return None
    if device.type != "cuda" or not torch.cuda.is_available():
        return (
            "it needs a CUDA or ROCm device, or the interpreter (TRITON_INTERPRET=1 set before "
            "triton is imported)"
        )
    if "CC" not in os.environ and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "triton compiles its launcher at the first call; install gcc or set CC"
    return None


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def check_item(op: str, x: Tensor) -> None:
    """Check that a kernel can count the elements of one item of (B, T, C) in 31 bits.

    Raises:
        ValueError: there are 2^30 or more.
    """
    if x.shape[1] * x.shape[2] >= 1 << 30:
        raise ValueError(
            f"the backend 'triton' of {op} takes less than 2^30 elements an item, got {x.shape[1]} "
            f"tokens of {x.shape[2]} channels; call it for some of the channels at a time"
        )


def choose(key: Hashable, candidates: Sequence[Tiles], run: Callable[[Tiles], object]) -> Tiles:
    """Return the fastest tile shapes, measured once per key.

    In the interpreter and while a CUDA graph is captured nothing is measured.

    Args:
        key: what the choice depends on.
        candidates: tile shapes; the first is the default.
        run: launches the kernels with given tile shapes.
    """
    if key not in _chosen:
        if is_interpreted() or len(candidates) == 1 or torch.cuda.is_current_stream_capturing():
            return candidates[0]
        from triton.testing import do_bench

        times = [do_bench(lambda c=c: run(c), warmup=5, rep=20) for c in candidates]
        _chosen[key] = candidates[times.index(min(times))]
    return cast(Tiles, _chosen[key])
