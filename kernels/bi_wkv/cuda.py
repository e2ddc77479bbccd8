"""Bi-WKV by CUDA code that nvcc compiles at its first use (csrc/bi_wkv.cu says how it works)."""

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import nvcc
from ..cpu import DTYPE_CODES, DTYPES, common_dtype, side_by_side, wide

__all__ = ["DTYPES", "SOURCE", "CudaKernelError", "Plan", "backward", "forward", "probe"]

SOURCE = Path(__file__).parent / "csrc" / "bi_wkv.cu"
# Tokens of a segment, fixed in segment.h.
_LENGTH = 8
# Up to so many tokens one block holds them all; above, the passes over chunks win.
_MOST_RESIDENT = 512
# Threads of a block that leave room for a second one on the same multiprocessor.
_FORWARD_THREADS, _BACKWARD_THREADS = 448, 320
_BYTES_OF_SUM = 12


class CudaKernelError(RuntimeError):
    """The GPU refused a kernel; the message has CUDA's own words."""


class Rows(ctypes.Structure):
    """`rows` of csrc/bi_wkv_cuda.h: a tensor (B, T, C) whose channels lie side by side."""

    _fields_ = [("data", c_void_p), ("batch", c_int64), ("token", c_int64)]

    @classmethod
    def of(cls, x: Tensor) -> "Rows":
        """Describe a tensor; it must be kept alive by the caller."""
        return cls(x.data_ptr(), x.stride(0), x.stride(1))


class _Call(ctypes.Structure):
    """`bi_wkv_cuda_call` of csrc/bi_wkv_cuda.h."""

    _fields_ = [
        *[(name, c_int32) for name in ("dtype", "width", "segments", "device")],
        *[(name, c_int64) for name in ("batch", "tokens", "channels", "chunks")],
        *[(name, c_void_p) for name in ("w", "u")],
        *[(name, Rows) for name in ("k", "v", "gy", "y", "gk", "gv")],
        *[(name, c_void_p) for name in ("sums", "grad_sums", "parts")],
    ]


@dataclass(frozen=True)
class Plan:
    """How tokens and channels are laid out on thread blocks.

    Attributes:
        width: channels of a block.
        segments: segments of 8 tokens of a block.
        chunks: blocks along the tokens. One: a single launch ("resident"); more: "split".
    """

    width: int
    segments: int
    chunks: int

    @classmethod
    def resident(cls, tokens: int, threads: int = _FORWARD_THREADS) -> "Plan":
        """Give all tokens of some channels to one block, of at most `threads` if that is wide."""
        segments = max(2, -(-tokens // _LENGTH))
        width = next((width for width in (32, 16) if width * segments <= threads), 8)
        return cls(width, segments, 1)

    @classmethod
    def split(cls, tokens: int, width: int = 16, segments: int = 16) -> "Plan":
        """Cut the tokens into chunks."""
        return cls(width, segments, -(-tokens // (segments * _LENGTH)))

    @classmethod
    def of(cls, tokens: int, threads: int) -> "Plan":
        """Return the plan for a number of tokens."""
        return cls.resident(tokens, threads) if tokens <= _MOST_RESIDENT else cls.split(tokens)


@dataclass(frozen=True)
class Launcher:
    """A compiled csrc/bi_wkv.cu and the stream its work goes to."""

    library: ctypes.CDLL
    stream: int | None

    def outputs(self, plan: Plan, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute as `forward`."""
        dtype = common_dtype(k, v)
        call, keep = _prepare(plan, dtype, w, u, k=k, v=v)
        y = torch.empty(v.shape, dtype=dtype, device=v.device)
        call.y = Rows.of(y)
        sums = _sums(plan, k)
        call.sums = sums.data_ptr()
        self._launch("vision_bi_wkv", call, [*keep, sums])
        return y.to(v.dtype)

    def gradients(
        self, plan: Plan, w: Tensor, u: Tensor, k: Tensor, v: Tensor, gy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute as `backward`."""
        dtype = common_dtype(k, v, gy)
        call, keep = _prepare(plan, dtype, w, u, k=k, v=v, gy=gy)
        gk, gv = (torch.empty(k.shape, dtype=dtype, device=k.device) for _ in range(2))
        call.gk, call.gv = Rows.of(gk), Rows.of(gv)
        sums, grad_sums = _sums(plan, k), _sums(plan, k)
        call.sums, call.grad_sums = sums.data_ptr(), grad_sums.data_ptr()
        batch, _, channels = k.shape
        parts = torch.empty(2, batch * plan.chunks, channels, device=k.device)
        call.parts = parts.data_ptr()
        self._launch("vision_bi_wkv_grads", call, [*keep, sums, grad_sums])
        gw, gu = parts.sum(1, dtype=torch.float64)
        return gw.to(w.dtype), gu.to(u.dtype), gk.to(k.dtype), gv.to(v.dtype)

    def _launch(self, name: str, call: _Call, keep: list[Tensor]) -> None:
        """Start the work; `keep` holds what the call points to until then."""
        status = getattr(self.library, name)(call, self.stream)
        if status:
            raise CudaKernelError(f"bi_wkv could not start: {error_text(self.library, status)}")


def _prepare(
    plan: Plan, dtype: torch.dtype, w: Tensor, u: Tensor, **tensors: Tensor
) -> tuple[_Call, list[Tensor]]:
    """Return a call with its inputs, and the tensors it points to."""
    w, u = wide(w, u)
    rows = dict(zip(tensors, side_by_side(dtype, *tensors.values()), strict=True))
    batch, tokens, channels = rows["k"].shape
    call = _Call(
        dtype=DTYPE_CODES[dtype],
        width=plan.width,
        segments=plan.segments,
        device=w.device.index or 0,
        batch=batch,
        tokens=tokens,
        channels=channels,
        chunks=plan.chunks,
        w=w.data_ptr(),
        u=u.data_ptr(),
        **{name: Rows.of(x) for name, x in rows.items()},
    )
    return call, [w, u, *rows.values()]


def _sums(plan: Plan, k: Tensor) -> Tensor:
    """Make room for the sums of every chunk, none where there is only one."""
    batch, _, channels = k.shape
    count = 2 * batch * plan.chunks * channels if plan.chunks > 1 else 0
    return torch.empty(count * _BYTES_OF_SUM, dtype=torch.uint8, device=k.device)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the functions of csrc/bi_wkv.cu."""
    for name in ("vision_bi_wkv", "vision_bi_wkv_grads"):
        getattr(library, name).argtypes = [POINTER(_Call), c_void_p]
        getattr(library, name).restype = c_int
    library.vision_bi_wkv_probe.argtypes = [c_int]
    library.vision_bi_wkv_probe.restype = c_int
    library.vision_cuda_error.argtypes = [c_int]
    library.vision_cuda_error.restype = c_char_p
    return library


def error_text(library: ctypes.CDLL, status: int) -> str:
    """Return CUDA's words for a status."""
    return str(library.vision_cuda_error(status).decode())


@functools.cache
def _library(architecture: str) -> ctypes.CDLL:
    return declare(nvcc.load(SOURCE, architecture))


def _library_for(device: torch.device) -> ctypes.CDLL:
    major, minor = torch.cuda.get_device_capability(device)
    return _library(f"{major}{minor}")


def probe(device: torch.device) -> str | None:
    """Say why CUDA code cannot serve a device; None if it can. Compiles it if need be."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "it runs on NVIDIA GPUs only"
    if not torch.cuda.is_available():
        return "torch finds no usable NVIDIA GPU; look at nvidia-smi and torch.cuda.is_available()"
    try:
        library = _library_for(device)
    except nvcc.CompileError as error:
        return str(error)
    with torch.cuda.device(device):
        status = library.vision_bi_wkv_probe(torch.cuda.current_device())
    if status:
        words = error_text(library, status)
        return f"the GPU refuses the compiled code ({words}); update its driver"
    return None


def _launcher(device: torch.device) -> Launcher:
    return Launcher(_library_for(device), torch.cuda.current_stream(device).cuda_stream)


def forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute Bi-WKV on the current stream of k's device.

    Args:
        w: decay per token, (C,).
        u: bonus of the token itself, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).

    Returns:
        (B, T, C), contiguous, in v's dtype.

    Raises:
        CudaKernelError: the GPU refused the kernel.
    """
    with torch.cuda.device(k.device):
        plan = Plan.of(k.shape[1], _FORWARD_THREADS)
        return _launcher(k.device).outputs(plan, w, u, k, v)


def backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, y: Tensor, gy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of Bi-WKV on the current stream of k's device.

    Args:
        w: decay per token, (C,).
        u: bonus of the token itself, (C,).
        k: keys, (B, T, C).
        v: values, (B, T, C).
        y: the output, unused: it is computed again, unrounded.
        gy: gradient of the output, (B, T, C).

    Returns:
        Gradients of w, u, k, v, each in its input's dtype. Those of w and k are the small rest of
        float32 sums that cancel where the weights grow with the distance by more than about e^20
        over the sequence (w·T < -20, no trained model so far); the backend "torch" keeps more.

    Raises:
        CudaKernelError: the GPU refused the kernel.
    """
    with torch.cuda.device(k.device):
        plan = Plan.of(k.shape[1], _BACKWARD_THREADS)
        return _launcher(k.device).gradients(plan, w, u, k, v, gy)
