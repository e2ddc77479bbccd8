"""The compiled CPU kernels: where their library is, why it cannot serve, how it is called.

`pip install` compiles kernels/csrc with a plain C compiler; nothing is compiled at run time.
"""

import ctypes
import functools
import hashlib
import importlib.machinery
import struct
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
# The widest vector: operators that need one whole vector of channels are given at least so many.
LANES = 16
# Dtypes of computation; inputs may also be bfloat16 and float16.
DTYPES = frozenset({torch.float32})
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CpuKernelError(RuntimeError):
    """The compiled kernels could not do a call; the message says why."""


# The calls of cpu.h: packing bytes takes a tenth of the time of filling a ctypes.Structure, which
# for a small image is as long as the work. Fields that are left out are null.
_BI_WKV = struct.Struct("@i3q18q104x")
_SHIFT_MIX = struct.Struct("@2i5q5qq3q3q8q")
_GATE = struct.Struct("@i6q")
_WKV6 = struct.Struct("@4q15qq")
MOST_MIXED = 8


def bi_wkv_call(k: Tensor, v: Tensor, y: Tensor, *gradients: Tensor) -> bytes:
    """Pack `bi_wkv_call` of cpu.h; the tensors must be kept alive by the caller.

    Args:
        k: keys (B, T, C), channels side by side, as in all of them.
        v: values, of the same dtype as k.
        y: the output.
        *gradients: of the output, the keys and the values.
    """
    fields: list[int] = []
    for x in (k, v, y, *gradients):
        batch, token, _ = x.stride()
        fields += (x.data_ptr(), batch, token)
    return _BI_WKV.pack(DTYPE_CODES[k.dtype], *k.shape, *fields, *[0] * (18 - len(fields)))


def shift_mix_call(
    x: Tensor,
    mu: Tensor,
    settings: tuple[int, int, int, Sequence[int]],
    mixed: Sequence[Tensor],
    gx: Tensor | None = None,
) -> bytes:
    """Pack `shift_mix_call` of cpu.h; the tensors must be kept alive by the caller.

    Args:
        x: tokens (B, T, C), channels side by side.
        mu: proportions, float32 (N, C).
        settings: height and width of the grid, how far to move, limits of the groups of channels.
        mixed: the N outputs, or their gradients.
        gx: where the gradient of x goes.
    """
    h, w, pixels, edges = settings
    count, channels = mu.shape
    fields = [count, x.shape[0], h, w, channels, pixels, *edges, mu.data_ptr()]
    for one in (x, gx):
        fields += (0, 0, 0) if one is None else (one.data_ptr(), *one.stride()[:2])
    for one in mixed:
        fields.append(one.data_ptr())
    return _SHIFT_MIX.pack(DTYPE_CODES[x.dtype], *fields, *[0] * (MOST_MIXED - count))


def gate_call(
    r: Tensor, y: Tensor, *, grad: int = 0, out: int = 0, gr: int = 0, gy: int = 0
) -> bytes:
    """Pack `gate_call` of cpu.h; the tensors must be kept alive by the caller.

    Args:
        r: the gate before its sigmoid.
        y: what it lets through, of the same dtype.
        grad: address of the gradient of the output.
        out: address of the output.
        gr: where the gradient of r goes.
        gy: where the gradient of y goes.
    """
    return _GATE.pack(DTYPE_CODES[r.dtype], r.data_ptr(), y.data_ptr(), grad, out, gr, gy)


def wkv6_call(u: Tensor, *tensors: Tensor) -> bytes:
    """Pack `wkv6_call` of cpu.h; the tensors must be kept alive by the caller.

    Args:
        u: bonus, float32 (H, N).
        *tensors: r, k, v, w and the output, float32 (B, T, C), channels side by side.
    """
    fields = [*tensors[0].shape[:2], *u.shape]
    for x in tensors:
        batch, token, _ = x.stride()
        fields += (x.data_ptr(), batch, token)
    return _WKV6.pack(*fields, u.data_ptr())


# The last argument of all that work is how many threads may be woken, as many as are worth it.
_FUNCTIONS: dict[str, tuple[type, list[type]]] = {
    "vision_cpu_kind": (c_char_p, []),
    "vision_cpu_use": (c_int, [c_char_p]),
    "vision_cpu_source": (c_char_p, []),
    "vision_bi_wkv": (c_int, [c_char_p, *[c_void_p] * 3, c_int64, c_int]),
    "vision_bi_wkv_grads": (c_int, [c_char_p, *[c_void_p] * 5, c_int64, c_int]),
    "vision_shift_mix_parts": (c_int64, [c_char_p]),
    "vision_shift_mix": (c_int, [c_char_p, c_int]),
    "vision_shift_mix_grads": (c_int, [c_char_p, c_void_p, c_int]),
    "vision_gate": (c_int, [c_char_p, c_int64, c_int]),
    "vision_gate_grads": (c_int, [c_char_p, c_int64, c_int]),
    "vision_wkv6": (c_int, [c_char_p, c_int]),
}


def source_digest(folder: Path) -> str:
    """Return a digest of the C sources below `folder`, the one that setup.py compiles in."""
    digest = hashlib.sha256()
    patterns = ("csrc/*.c", "csrc/*.h", "*/csrc/*_cpu.h")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _file() -> Path | None:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    return next((p for s in suffixes if (p := _FOLDER / f"_cpu{s}").exists()), None)


@functools.cache
def _load() -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
    path = _file()
    if path is None:
        return (
            "its C code was not compiled (was there no C compiler at installation?); install gcc "
            "or clang, then run `pip install --force-reinstall --no-deps` on this package, or "
            "`python setup.py build_ext --inplace` in a checkout"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded ({error}); compile it again on this machine"
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            return f"{path.name} has no function {name}; it is of another version, compile it again"
        function.restype, function.argtypes = result, arguments
    # A wheel has no sources to compare with.
    if (_FOLDER / "csrc").is_dir():
        compiled, now = library.vision_cpu_source().decode(), source_digest(_FOLDER)
        if compiled != now:
            return (
                f"{path.name} was compiled from other sources ({compiled}, they are {now} now); "
                "run `python setup.py build_ext --inplace`"
            )
    return library


def probe(device: torch.device) -> str | None:
    """Say why the compiled kernels cannot serve a device; None if they can."""
    if device.type != "cpu":
        return "it runs on the CPU only"
    library = _load()
    return library if isinstance(library, str) else None


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library.

    Raises:
        CpuKernelError: there is none, which `probe` tells beforehand.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise CpuKernelError(loaded)
    return loaded


def instruction_set() -> str:
    """Return the name of the instruction set in use: avx512, avx2 or generic."""
    return str(library().vision_cpu_kind().decode())


def use_instruction_set(name: str) -> None:
    """Use another instruction set from now on, for tests and comparisons.

    Raises:
        ValueError: there is no such set, or this machine does not have it.
    """
    if library().vision_cpu_use(name.encode()):
        raise ValueError(f"no instruction set {name!r} on this machine; 'generic' always works")


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to hand over: that of all tensors, float32 if they differ."""
    first = tensors[0].dtype
    for x in tensors:
        if x.dtype is not first:
            return torch.float32
    return first


def side_by_side(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Return tensors (B, T, C) in `dtype` with channels side by side, copied only if need be."""
    found = []
    for x in tensors:
        if x.dtype is not dtype:
            x = x.to(dtype)
        found.append(x if x.stride(-1) == 1 and x.numel() > 1 else x.contiguous())
    return found


def wide(*tensors: Tensor) -> list[Tensor]:
    """Return parameters in float32, their elements side by side, copied only if need be."""
    found = []
    for x in tensors:
        if x.dtype is not torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        found.append(x)
    return found


def failed(op: str) -> CpuKernelError:
    """Return the error for a function of the library that did not return 0."""
    return CpuKernelError(f"{op} found no memory for its scratch space; free some and try again")


def sum_of_parts(parts: Tensor, like: Tensor) -> Tensor:
    """Sum float64 partial gradients (parts, ...) into the shape and dtype of `like`."""
    return parts.sum(0).reshape(like.shape).to(like.dtype)
