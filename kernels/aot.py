"""`python -m vision.kernels.aot [--json]`: compile all Triton kernels, without a GPU.

What the compiler says of registers, spilled bytes and shared memory is printed for each kernel.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import triton_support
from .bi_wkv import triton_kernel as bi_wkv
from .deform_attn import triton_kernel as deform_attn
from .gate import triton_kernel as gate
from .shift_mix import triton_kernel as shift_mix
from .wkv6 import triton_kernel as wkv6

__all__ = ["Usage", "compile_all"]

# CUDA compute capabilities and dtypes of the data.
TARGETS = tuple((arch, dtype) for arch in (80, 90) for dtype in ("bf16", "fp32"))
# What a kernel reads and writes in float32 whatever the dtype of the data.
_FLOAT32 = frozenset(
    f"{name}_ptr"
    for name in (
        *("w", "u", "mu", "gw", "gu", "gmu", "lefts", "rights", "g_lefts", "borders", "g_borders"),
        *("states", "g_states", "decays", "y_sides", "gr_sides", "gk_sides", "gw_sides"),
        *("locations", "g_locations", "sums", "scale"),
    )
)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs.

    Attributes:
        name: operator, kernel and what tells its variants apart.
        arch: CUDA compute capability times 10.
        dtype: of the data, as Triton writes it.
        registers: per thread.
        stack: bytes per thread, registers that were spilled among them.
        shared: bytes per program.
    """

    name: str
    arch: int
    dtype: str
    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class _Variant:
    name: str
    kernel: Any
    constants: Mapping[str, int | bool | None]
    num_warps: int
    types: Mapping[str, Any] = field(default_factory=dict)  # that names do not tell


def compile_all(targets: Sequence[tuple[int, str]] = TARGETS) -> list[Usage]:
    """Compile every Triton kernel with its default tile shapes.

    Args:
        targets: pairs of compute capability times 10 and dtype ("bf16", "fp16", "fp32").

    Raises:
        RuntimeError: Triton runs as an interpreter.
    """
    if triton_support.is_interpreted():
        raise RuntimeError("Triton interprets and cannot compile; unset TRITON_INTERPRET")
    return [_compiled(variant, *target) for target in targets for variant in _variants()]


def _variants() -> Iterator[_Variant]:
    yield from _bi_wkv_variants()
    yield from _shift_mix_variants()
    yield from _gate_variants()
    yield from _wkv6_variants()
    yield from _deform_attn_variants()


def _bi_wkv_variants() -> Iterator[_Variant]:
    from .bi_wkv import triton_jit as jit

    def variant(kernel: Any, tiles: bi_wkv.Tiles, suffix: str = "", **more: bool) -> _Variant:
        constants = {
            "PLAIN_GROUP": tiles.plain_group,
            "GROUP": tiles.group,
            "SEGMENTS": tiles.segments,
            "BLOCK_C": tiles.block_c,
            **more,
        }
        name = f"bi_wkv {kernel.__name__}{suffix}"
        return _Variant(name, kernel, constants, tiles.num_warps)

    forward, backward = bi_wkv.FORWARD, bi_wkv.BACKWARD
    yield variant(jit.summary_kernel, forward)
    yield variant(jit.summary_kernel, backward, " of backward")
    carry = {"BLOCK_C": forward.block_c}
    yield _Variant("bi_wkv carry_kernel", jit.carry_kernel, carry, num_warps=1)
    for suffix, resident in ((" resident", True), (" split", False)):
        yield variant(jit.output_kernel, forward, suffix, RESIDENT=resident)
        yield variant(jit.gradient_summary_kernel, backward, suffix, RESIDENT=resident)
    yield variant(jit.gradient_kernel, backward)


def _shift_mix_variants() -> Iterator[_Variant]:
    from .shift_mix import triton_jit as jit

    for kernel, tiles in (
        (jit.forward_kernel, shift_mix.FORWARD),
        (jit.backward_kernel, shift_mix.BACKWARD),
    ):
        constants = {"N": 8, "BLOCK_T": tiles.block_t, "BLOCK_C": tiles.block_c}
        yield _Variant(f"shift_mix {kernel.__name__}", kernel, constants, tiles.num_warps)


def _gate_variants() -> Iterator[_Variant]:
    from .gate import triton_jit as jit

    tiles = gate.DEFAULT
    for kernel in (jit.forward_kernel, jit.backward_kernel):
        name = f"gate {kernel.__name__}"
        yield _Variant(name, kernel, {"BLOCK": tiles.block}, tiles.num_warps)


def _wkv6_variants() -> Iterator[_Variant]:
    from .wkv6 import triton_jit as jit

    def variant(kernel: Any, tiles: wkv6.Tiles, suffix: str = "", warps: int = 0) -> _Variant:
        # Heads of 64 channels, as in all published models.
        constants = tiles.constants(kernel, 64)
        name = f"wkv6_bi {kernel.__name__}{suffix}"
        return _Variant(name, kernel, constants, warps or tiles.num_warps)

    yield variant(jit.carry_kernel, wkv6.FORWARD, warps=1)
    for kernel in (jit.states_kernel, jit.output_kernel):
        yield variant(kernel, wkv6.FORWARD)
        yield variant(kernel, wkv6.BACKWARD, " of backward")
    yield variant(jit.gradient_kernel, wkv6.BACKWARD)


def _deform_attn_variants() -> Iterator[_Variant]:
    from .deform_attn import triton_jit as jit

    # Three levels and heads of 64 channels, as in the adapter of the small model.
    tiles = deform_attn.DEFAULT
    constants = tiles.constants(3, 64)
    sides = {"sides": ("i32",) * 6}

    def variant(
        kernel: Any, constants: Mapping[str, Any], suffix: str = "", **types: str
    ) -> _Variant:
        name = f"deform_attn {kernel.__name__}{suffix}"
        return _Variant(name, kernel, constants, tiles.num_warps, {**sides, **types})

    yield variant(jit.forward_kernel, constants)
    yield variant(jit.backward_kernel, {**constants, "scale_ptr": None})
    yield variant(jit.backward_kernel, constants, " of integers", sums_ptr="*i64")


def _compiled(variant: _Variant, arch: int, dtype: str) -> Usage:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def type_of(name: str) -> Any:
        if name in variant.constants:
            return "constexpr"
        if name in variant.types:
            return variant.types[name]
        if name.endswith("_ptr"):
            return "*fp32" if name in _FLOAT32 else f"*{dtype}"
        return "i32"

    signature = {name: type_of(name) for name in variant.kernel.arg_names}
    compiled = triton.compile(
        ASTSource(variant.kernel, signature, dict(variant.constants)),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": variant.num_warps, **triton_support.LAUNCH},
    )
    return Usage(variant.name, arch, dtype, **_resources(compiled.asm["cubin"], triton.__file__))


def _resources(cubin: bytes, triton_file: str) -> dict[str, int]:
    """Ask cuobjdump, which Triton's wheel contains, for what a binary needs."""
    tool = Path(triton_file).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def number(key: str) -> int:
        found = re.search(rf"\b{key}:(\d+)", text)
        assert found is not None, text
        return int(found[1])

    return {"registers": number("REG"), "stack": number("STACK"), "shared": number("SHARED")}


def main() -> None:
    """Print the table, or JSON rows."""
    parser = argparse.ArgumentParser(description="Compile all Triton kernels without a GPU.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    rows = [asdict(usage) for usage in compile_all()]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'name':44}{'arch':>6}{'dtype':>7}{'registers':>11}{'stack':>7}{'shared':>8}")
    for row in rows:
        print("{name:44}{arch:6}{dtype:>7}{registers:11}{stack:7}{shared:8}".format(**row))


if __name__ == "__main__":
    main()
