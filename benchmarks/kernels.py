"""Time and extra memory of the operators beside what a block cannot do without.

    python benchmarks/kernels.py                      # CPU, or the GPU where there is one
    python benchmarks/kernels.py --quick --ops bi_wkv,exp --shapes 1x1024x192
    python benchmarks/kernels.py --read benchmarks/results/kernels-cpu.json

Every backend of every operator but "reference", forward alone and with backward, by autograd and
for bi_wkv also by direct calls, next to
scaled_dot_product_attention, exp(k), copies, and the matrix products of a block at the same
(B, T, C). On the CPU by the thread's own time at one thread, then by the clock on the wall at
`--threads`; on the GPU by events. Writes rows of JSON as they are measured and draws a PNG beside.
"""

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels_report import (
    BOTH,
    FLOOR,
    FORWARD,
    PASSES,
    SHAPES,
    TORCH,
    Shape,
    draw,
    summary,
)
from benchmarks.measure import (
    Call,
    Case,
    CudaTimer,
    HostTimer,
    Report,
    Timer,
    environment,
    keep_freed_memory,
    read_rows,
    side_by_side,
    threads,
)
from vision.kernels import bi_wkv, deform_attn, gate, shift_mix, wkv6_bi
from vision.kernels.dispatch import AUTO, Backend, operators

Function = Callable[..., Tensor | list[Tensor]]

DTYPES = ("float32", "bfloat16", "float16", "float64")
RESULTS = Path(__file__).parent / "results"
HEAD = 64  # channels of an attention head
# Besides "reference", backends that take time and memory in the square of the number of tokens.
_QUADRATIC = {"wkv6_bi": {"export"}}
POINTS = 4  # samples that a head of deformable attention takes of a map
MIXED = 3  # copies that the spatial mix makes: receptance, key, value


# --- competitors ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where competitors meet: (B, T, C), the dtype of the tokens, the device."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device

    @property
    def wide(self) -> torch.dtype:
        """The dtype of parameters, as under autocast, and of the computation."""
        return torch.promote_types(self.dtype, torch.float32)

    def normal(self, *shape: int) -> Tensor:
        """Draw a tensor."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def tokens(self, count: int) -> list[Tensor]:
        """Draw tensors (B, T, C)."""
        return [self.normal(*self.shape) for _ in range(count)]


@dataclass(frozen=True)
class Op:
    """What is measured in every setting.

    Attributes:
        make: for a setting and the name of a backend, the function and its inputs.
        traffic: for each direction to measure how many tensors (B, T, C) it must read and write;
            0 where that says nothing.
    """

    make: Callable[[Setting, str], tuple[Function, list[Tensor]]]
    traffic: Mapping[str, int]


def _bi_wkv(at: Setting, backend: str) -> tuple[Function, list[Tensor]]:
    _, tokens, channels = at.shape
    # The decays that published models start from.
    w = torch.linspace(-5, 3, channels, device=at.device, dtype=at.wide) / tokens
    u = torch.randn(channels, device=at.device, dtype=at.wide) / tokens
    return functools.partial(bi_wkv, backend=backend), [w, u, *at.tokens(2)]


def _wkv6_bi(at: Setting, backend: str) -> tuple[Function, list[Tensor]]:
    channels = at.shape[2]
    if channels % HEAD:
        raise ValueError(f"wkv6_bi needs whole heads of {HEAD} channels, got {channels}")
    r, k, v = at.tokens(3)
    # Decays between those that published models start from.
    w = (torch.linspace(-6, -1, channels, device=at.device) + at.normal(*at.shape)).to(at.wide)
    u = torch.randn(channels // HEAD, HEAD, device=at.device, dtype=at.wide)
    return functools.partial(wkv6_bi, backend=backend), [r, k, v, w, u]


def grid(tokens: int) -> tuple[int, int]:
    """Return height and width of the squarest grid of so many tokens."""
    height = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    return height, tokens // height


def _shift_mix(at: Setting, backend: str) -> tuple[Function, list[Tensor]]:
    _, tokens, channels = at.shape
    mu = torch.rand(MIXED, channels, device=at.device, dtype=at.wide)
    edges = [channels * j // 4 for j in range(5)]
    function = functools.partial(shift_mix, hw=grid(tokens), edges=edges, backend=backend)
    return function, [*at.tokens(1), mu]


def _shift_mix_copy(at: Setting, backend: str) -> tuple[Function, list[Tensor]]:
    batch, tokens, channels = at.shape
    # Half of the tensors that shift_mix touches is read here, and half written.
    return torch.clone, [at.normal(1 + MIXED, batch, tokens, channels)[: (1 + MIXED) // 2]]


def _gate(at: Setting, backend: str) -> tuple[Function, list[Tensor]]:
    return functools.partial(gate, backend=backend), at.tokens(2)


def _deform_attn(at: Setting, backend: str) -> tuple[Function, list[Tensor]]:
    batch, tokens, channels = at.shape
    if channels % HEAD:
        raise ValueError(f"deform_attn needs whole heads of {HEAD} channels, got {channels}")
    height, width = grid(tokens)
    # What an injector does: patches look at maps of twice, once and half their resolution.
    shapes = [(2 * height, 2 * width), (height, width), ((height + 1) // 2, (width + 1) // 2)]
    pixels, heads = sum(h * w for h, w in shapes), channels // HEAD
    spread = (batch, tokens, heads, len(shapes), POINTS)
    inputs = [
        at.normal(batch, pixels, heads, HEAD),
        torch.rand((*spread, 2), device=at.device, dtype=at.wide),
        at.normal(*spread).flatten(3).softmax(-1).unflatten(3, spread[3:]),
    ]
    return functools.partial(deform_attn, shapes=shapes, backend=backend), inputs


def _sdpa(at: Setting, backend: str) -> tuple[Function, list[Tensor]]:
    channels = at.shape[2]
    if channels % HEAD:
        raise ValueError(f"attention needs whole heads of {HEAD} channels, got {channels}")
    heads = [x.unflatten(2, (channels // HEAD, HEAD)).transpose(1, 2) for x in at.tokens(3)]
    return F.scaled_dot_product_attention, heads


def _matmuls(at: Setting, backend: str) -> tuple[Function, list[Tensor]]:
    channels = at.shape[2]
    sizes = [(channels, channels)] * 5 + [(4 * channels, channels), (channels, 4 * channels)]

    def block(x: Tensor, *weights: Tensor) -> list[Tensor]:
        *squares, up, down = weights
        return [F.linear(x, square) for square in squares] + [F.linear(F.linear(x, up), down)]

    return block, [*at.tokens(1), *(at.normal(*size) / math.sqrt(size[1]) for size in sizes)]


OPS = {
    "bi_wkv": Op(_bi_wkv, {FORWARD: 3, BOTH: 9, PASSES: 9, FLOOR: 9}),
    "wkv6_bi": Op(_wkv6_bi, {FORWARD: 5, BOTH: 14}),
    "shift_mix": Op(_shift_mix, {FORWARD: 1 + MIXED, BOTH: 3 + 2 * MIXED}),
    "gate": Op(_gate, {FORWARD: 3, BOTH: 8}),
    "deform_attn": Op(_deform_attn, {FORWARD: 0, BOTH: 0}),
    "sdpa": Op(_sdpa, {FORWARD: 0, BOTH: 0}),
    "matmuls": Op(_matmuls, {FORWARD: 0, BOTH: 0}),
    "exp": Op(lambda at, backend: (torch.exp, at.tokens(1)), {FORWARD: 2}),
    "copy": Op(lambda at, backend: (torch.clone, at.tokens(1)), {FORWARD: 2}),
    "shift_mix_copy": Op(_shift_mix_copy, {FORWARD: 1 + MIXED}),
}


def _call(direction: str, function: Function, inputs: list[Tensor]) -> Call:
    """Return a call that gives back all it makes: outputs, and gradients."""
    if direction == FORWARD:
        return torch.no_grad()(lambda: function(*inputs))
    leaves = [x.requires_grad_() for x in inputs]

    def outputs() -> list[Tensor]:
        made = function(*leaves)
        return [made] if isinstance(made, Tensor) else made

    grads = [torch.randn_like(y) for y in outputs()]

    def both() -> list[Tensor]:
        made = outputs()
        return [*made, *torch.autograd.grad(made, leaves, grads)]

    return both


def _passes(backend: Backend, inputs: list[Tensor]) -> Call:
    """Return a call of a backend's own functions, as autograd calls them."""
    grad = torch.randn_like(inputs[-1])

    def passes() -> list[Tensor]:
        if backend.keeping is None:
            y = backend.forward(*inputs)
            return [y, *backend.backward(*inputs, y, grad)]
        y, kept = backend.keeping(*inputs)
        return [y, kept, *backend.backward(*inputs, y, grad, kept=kept)]

    return passes


class _Nothing(torch.autograd.Function):
    """A function of four inputs, as bi_wkv is, that computes nothing."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[-1].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return (grad,) * len(ctx.saved_tensors)


def _beside_empty_graph(call: Call) -> Call:
    """Return the call and a graph of one empty function: what torch takes for any function."""
    leaves = [torch.zeros(1, requires_grad=True) for _ in range(4)]
    grad = torch.ones(1)

    def both() -> list[Tensor]:
        return [*call(), *torch.autograd.grad(_Nothing.apply(*leaves), leaves, grad)]

    return both


def _backends(name: str, at: Setting) -> dict[str, bool]:
    """Return what to compare and whether it is the default; what is O(T²) is left out."""
    op = operators().get(name)
    if op is None:
        return {TORCH: True}
    served = op.resolve(AUTO, at.device, at.wide).name
    slow = {"reference"} | _QUADRATIC.get(name, set())
    return {backend: backend == served for backend in op.backends if backend not in slow}


def _make(name: str, at: Setting, backend: str, direction: str) -> Call:
    function, inputs = OPS[name].make(at, backend)
    if direction in (PASSES, FLOOR):
        passes = _passes(operators()[name].resolve(backend, at.device, at.wide), inputs)
        return passes if direction == PASSES else _beside_empty_graph(passes)
    return _call(direction, function, inputs)


def cases(names: Sequence[str], at: Setting) -> Iterator[Case]:
    """Yield the competitors of a setting."""
    for name in names:
        op = OPS[name]
        for backend, default in _backends(name, at).items():
            for direction, tensors in op.traffic.items():
                labels = {
                    "op": name,
                    "backend": backend,
                    "default": default,
                    "direction": direction,
                    "shape": list(at.shape),
                    "dtype": str(at.dtype).removeprefix("torch."),
                    "device": at.device.type,
                }

                make = functools.partial(_make, name, at, backend, direction)
                yield Case(labels, make, tensors * math.prod(at.shape) * at.dtype.itemsize)


def run(
    names: Sequence[str],
    settings: Sequence[Setting],
    most_threads: int,
    seconds: float,
    report: Report,
) -> None:
    """Measure and write down as it goes."""
    device = settings[0].device
    passes: list[tuple[Timer, int]] = [(CudaTimer(), torch.get_num_threads())]
    if device.type == "cpu":
        passes = [(HostTimer("thread"), 1), (HostTimer("wall"), most_threads)]
    for timer, count in passes:
        with threads(count):
            for at in settings:
                rows = side_by_side(list(cases(names, at)), timer, device, seconds)
                report.add([{**row, "threads": count} for row in rows])
                print(f"{at.shape} {at.dtype} by {timer.name} clock: done", file=sys.stderr)


# --- command line --------------------------------------------------------------------------------


def _shape(text: str) -> Shape:
    batch, tokens, channels = map(int, text.split("x"))
    return batch, tokens, channels


def _names(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in choices]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there are {', '.join(choices)}")
        return names

    return parse


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--ops", type=_names(list(OPS)), default=list(OPS), help="by comma")
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="BxTxC", help="tokens")
    parser.add_argument("--dtypes", type=_names(DTYPES), help="by comma, default float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="for the clock on the wall"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each competitor")
    parser.add_argument(
        "--quick", action="store_true", help="two short shapes, a tenth of the time"
    )
    parser.add_argument("--out", type=Path, help="default benchmarks/results/kernels-DEVICE.json")
    parser.add_argument("--read", type=Path, help="measure nothing: print and draw these rows")
    args = parser.parse_args(argv)
    args.shapes = args.shapes or (SHAPES[:2] if args.quick else SHAPES)
    args.dtypes = args.dtypes or ["float32"]
    args.seconds *= 0.1 if args.quick else 1
    args.out = args.read or args.out or RESULTS / f"kernels-{args.device}.json"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write, print and draw."""
    args = parse_args(argv)
    if args.read is None:
        device = torch.device(args.device)
        settings = [Setting(s, getattr(torch, d), device) for d in args.dtypes for s in args.shapes]
        run(args.ops, settings, args.threads, args.seconds, Report(args.out, environment(device)))
    rows = read_rows(args.out)
    print(summary(rows))
    draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    keep_freed_memory()
    main()
