"""What the operators share: checks of arguments, precision, the way from a call to its backend.

Two ways lead there. A graph that is traced (torch.compile, export, fake tensors, modes) gets one
node, the custom operator of the package. A plain eager call goes by `Seam`: the wrapping of a
custom operator costs 40 µs, more than a small gate itself.

Between two calls the data of a model passes through the caches of the processor, so a call finds
little of its own code there and each Python function on its way costs 2 µs. Therefore a call like
an earlier one repeats neither its checks nor the choice of a backend.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling as _is_dynamo

from .dispatch import Backend, Operator

__all__ = ["Seam", "check_tensors", "compute_dtype", "is_eager"]

_PLAIN = (Tensor, torch.nn.Parameter)
# So many kinds of calls are remembered: images of every size must not fill the memory.
_MOST_KINDS = 256
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensors(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that all are floating point tensors on one device, that of the last one.

    Args:
        op: the operator's name for the message.
        tensors: by the names the caller knows.

    Raises:
        TypeError: an argument is not a floating point tensor of 16, 32 or 64 bits.
        ValueError: they are on several devices.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op} needs a tensor for {name}, got {type(x).__name__}")
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"{op} needs {name} in float32, float64, bfloat16 or float16, got {x.dtype}; "
                f"convert it, for example with {name}.float()"
            )
    if len({x.device for x in tensors.values()}) == 1:
        return
    *_, last = tensors
    device = tensors[last].device
    for name, x in tensors.items():
        if x.device != device:
            raise ValueError(
                f"{op} needs all tensors on one device; {name} is on {x.device}, {last} on "
                f"{device}: move {name} with {name}.to({last}.device)"
            )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype an operator computes in: float64 if an input is float64, else float32."""
    for x in tensors:  # a generator would take twice the time, which small operators feel
        if x.dtype is torch.float64:
            return torch.float64
    return torch.float32


def is_eager(*tensors: Tensor) -> bool:
    """Say whether these are plain tensors and nothing traces or watches the operators on them."""
    for x in tensors:
        if type(x) not in _PLAIN:
            return False
    return not (_is_dynamo() or _is_tracing() or _len_torch_dispatch_stack())


class Seam:
    """How calls of one operator reach a backend outside of traced graphs.

    Args:
        operator: the operator.
        instead: name of the function of ordinary torch operators, for a second derivative.
        saves_output: the backward functions of the backends take the output before its gradient.
        several: the output is a list of tensors, and so is its gradient.
    """

    def __init__(
        self, operator: Operator, instead: str, *, saves_output: bool = False, several: bool = False
    ) -> None:
        self.operator = operator
        self.instead = instead
        self.saves_output = saves_output
        self.several = several

    def call(
        self,
        check: Callable[..., None],
        backend: str | None,
        tensors: Sequence[Tensor],
        *settings: Hashable,
    ) -> Any:
        """Make a call, if it is an eager one.

        Args:
            check: raises where tensors and settings do not fit; not asked again for a call whose
                tensors have the dtypes, shapes and devices of an earlier one.
            backend: the backend that the caller names.
            tensors: the operator's tensors, or what the caller took for such.
            *settings: what the backend's functions take after the tensors.

        Returns:
            The output, contiguous, a list if there are several. None where the call belongs into
            a traced graph, or is to be exported.

        Raises:
            ValueError: no backend has that name.
            BackendUnavailableError: the backend that was asked for cannot run here.
        """
        eager = not (_is_dynamo() or _is_tracing() or _len_torch_dispatch_stack())
        kind, differentiable = [backend, *settings], False
        if eager:
            for x in tensors:
                if type(x) not in _PLAIN:
                    eager = False
                    break
                kind += (x.dtype, x.shape, x.device)
                differentiable = differentiable or x.requires_grad
        operator = self.operator
        serving = operator.served.get(tuple(kind)) if eager else None
        if serving is None or operator.backends[serving.name] is not serving:
            check(*tensors, *settings)
            serving = self._choose(backend, tensors, tuple(kind)) if eager else None
            if serving is None:
                return None
        # Forward mode goes there too, to be refused.
        if (differentiable and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
            output = _Eager.apply(self, serving, settings, *tensors)
            return list(output) if self.several else output
        output = serving.forward(*tensors, *settings)
        return [y.contiguous() for y in output] if self.several else output.contiguous()

    def _choose(
        self, backend: str | None, tensors: Sequence[Tensor], kind: Hashable
    ) -> Backend | None:
        """Choose the backend for a call and remember it; None if it is to be exported."""
        operator = self.operator
        if len(operator.served) >= _MOST_KINDS:
            operator.forget()
        served = operator.served
        name, dtype = operator.requested(backend), compute_dtype(*tensors)
        serving = operator.resolve(name, tensors[0].device, dtype)
        if serving.name == "export":
            return None
        served[kind] = serving
        return serving

    def refuse(self, ctx: Any, *grads: Any) -> NoReturn:
        """Be the backward function of the backward operator.

        Raises:
            RuntimeError: always, since the operator is differentiable once.
        """
        raise RuntimeError(
            f"{self.operator.name} is differentiable once, a second derivative was asked for; use "
            f"{self.instead}, which is made of ordinary torch operators"
        )


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, seam: Seam, serving: Backend, settings: Sequence[Any], *tensors: Tensor
    ) -> Any:
        kept: Sequence[Tensor] = ()
        if serving.keeping is None:
            output = serving.forward(*tensors, *settings)
        else:
            output, *kept = serving.keeping(*tensors, *settings)
        output = [y.contiguous() for y in output] if seam.several else output.contiguous()
        ctx.call = seam, serving, settings, len(kept)
        ctx.save_for_backward(*tensors, *[output] * seam.saves_output, *kept)
        return tuple(output) if seam.several else output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # A node of its own is needed only to refuse what might be asked of it later.
        run = _EagerBackward.apply if torch.is_grad_enabled() else _run_backward
        return None, None, None, *run(ctx.call, len(grads), *ctx.saved_tensors, *grads)


def _run_backward(call: tuple[Any, ...], outputs: int, *tensors: Tensor) -> Any:
    seam, serving, settings, keeps = call
    saved, grads = tensors[:-outputs], tensors[-outputs:]
    given: Sequence[Any] = [grads] if seam.several else grads
    if keeps:
        return serving.backward(*saved[:-1], *given, *settings, kept=saved[-1])
    return serving.backward(*saved, *given, *settings)


class _EagerBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[Any, ...], outputs: int, *tensors: Tensor) -> Any:
        ctx.seam = call[0]
        return _run_backward(call, outputs, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        ctx.seam.refuse(ctx, *grads)
