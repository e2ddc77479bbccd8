"""Run by test_cpu.py under the address sanitizer: every kernel on memory with nothing beyond."""

import ctypes
import sys

import torch

from vision.kernels import bi_wkv, cpu, gate, shift_mix, wkv6_bi
from vision.kernels.bi_wkv import OPERATOR


def main(path: str) -> None:
    """Use the library at `path`, which was compiled with the sanitizer."""
    library = ctypes.CDLL(path)
    for name, (result, arguments) in cpu._FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    cpu._load = lambda: library
    for kind in (b"avx512", b"avx2", b"generic"):
        if library.vision_cpu_use(kind):
            continue
        for tokens in (1, 31, 33, 49, 196, 197):
            for channels in (16, 23, 300):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    one_case(tokens, channels, dtype)
            for size in (1, 16, 23, 64):
                r, k, v, w = torch.randn(4, 1, tokens, 2 * size)
                wkv6_bi(r, k, v, w, torch.randn(2, size), backend="cpu")
    sys.stdout.write("all cases ran")


def one_case(tokens: int, channels: int, dtype: torch.dtype) -> None:
    """Run the operators that have backward passes."""
    k, v = (torch.randn(1, tokens, channels, dtype=dtype, requires_grad=True) for _ in range(2))
    for decay in (1.0, 1 / tokens):  # segments of few tokens, and of 64
        w, u = decay * torch.randn(2, channels)
        y = bi_wkv(w, u, k, v, backend="cpu")
        y.sum().backward()
        plain = OPERATOR.backends["cpu"]
        with torch.no_grad():
            plain.backward(w, u, k, v, plain.forward(w, u, k, v), torch.ones_like(v))
    gate(k, v, backend="cpu").sum().backward()
    edges = [channels * j // 4 for j in range(5)]
    mu = torch.rand(3, channels)
    torch.stack(shift_mix(k, mu, (1, tokens), edges=edges, backend="cpu")).sum().backward()


if __name__ == "__main__":
    main(sys.argv[1])
