"""Which backend serves a call of an operator, and why another one cannot.

The first of these that names a backend wins: the `backend` argument of the call, the innermost
`use_backend(name)`, the environment variable `VISION_KERNELS_BACKEND`, which is read once, at the
first call of an operator. Without a name the first available backend of the operator's order for
the device serves. A backend that was named either
serves or raises; it is never replaced silently. A name given for all operators at once, by
`use_backend` or the environment, binds those that have a backend of this name.
"""

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AUTO",
    "ENVIRONMENT_VARIABLE",
    "Availability",
    "Backend",
    "BackendUnavailableError",
    "Operator",
    "list_backends",
    "operators",
    "read_environment",
    "use_backend",
]

ENVIRONMENT_VARIABLE = "VISION_KERNELS_BACKEND"
AUTO = "auto"
_EVERY_OPERATOR = "*"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why and what to do."""


def _always(device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: what callers write.
        forward: takes the operator's tensors and settings, returns its output.
        backward: takes the operator's tensors, the output where the operator saves it, the gradient
            of the output and the settings; returns the gradient of every tensor. It may not rely on
            anything else from `forward`.
        keeping: as `forward`, returns the output and a tensor that spares `backward` work, which
            takes it as `kept`, or does without it.
        probe: None if the backend runs on this device, else the reason and the cure in a phrase.
            Called at the first need and remembered per device: it may look for a compiler.
        dtypes: dtypes of computation that are served (`None`: all).
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., tuple[Tensor, ...]]
    probe: Callable[[torch.device], str | None] = _always
    dtypes: frozenset[torch.dtype] | None = None
    keeping: Callable[..., tuple[Any, Tensor]] | None = None


@dataclass(frozen=True)
class Availability:
    """A row of `list_backends`: `reason` is None where the backend is available."""

    op: str
    backend: str
    device: str
    reason: str | None
    default: bool


# Both are replaced, never changed in place: torch.compile guards on what it has read.
_operators: dict[str, "Operator"] = {}
_scope: dict[str, str] = {}
_environment: dict[str, str] | None = None


class Operator:
    """The backends of one operator and their order per device.

    Args:
        name: the operator's name, unique; the same word users write in `VISION_KERNELS_BACKEND`.
        backends: every implementation.
        order: for a device type ("cpu", "cuda", ...) the names to try in turn when nobody named
            one. The key "*" serves all other device types.

    Raises:
        ValueError: the order names a backend that is not there, or misses the key "*".
    """

    def __init__(
        self, name: str, backends: Sequence[Backend], order: Mapping[str, Sequence[str]]
    ) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self.order = {device: tuple(names) for device, names in order.items()}
        self._reasons: dict[tuple[str, str], str | None] = {}
        self.forget()
        missing = {n for names in self.order.values() for n in names} - set(self.backends)
        if missing or _EVERY_OPERATOR not in self.order:
            raise ValueError(
                f"the order of {name} needs the key '*' and only names out of "
                f"{', '.join(self.backends)}; it has the keys {', '.join(self.order)} and the "
                f"unknown names {sorted(missing)}"
            )
        _operators[name] = self

    def forget(self) -> None:
        """Choose again at the next call of every kind.

        `served` is replaced, not emptied: a choice that is being made belongs to the old one.
        """
        self.served: dict[Hashable, Backend] = {}

    def requested(self, argument: str | None = None) -> str:
        """Return the name that argument, `use_backend` or environment ask for, else `AUTO`.

        Args:
            argument: what the caller of the operator gave; None and "auto" name nothing.

        Raises:
            ValueError: no backend has that name.
        """
        if argument is not None and argument != AUTO:
            return self._known(argument, "the argument `backend`")
        named = _scope.get(self.name)
        if named is None:
            named = self._for_all(_scope.get(_EVERY_OPERATOR, AUTO), "use_backend")
        if named != AUTO:
            return named
        environment = _from_environment()
        if environment.get(self.name, AUTO) != AUTO:
            return self._known(environment[self.name], ENVIRONMENT_VARIABLE)
        return self._for_all(environment.get(_EVERY_OPERATOR, AUTO), ENVIRONMENT_VARIABLE)

    def _for_all(self, name: str, source: str) -> str:
        """Return a name that was given for all operators, `AUTO` if only others have it."""
        return name if _checked_name(name, _EVERY_OPERATOR, source) in self.backends else AUTO

    def resolve(self, name: str, device: torch.device, dtype: torch.dtype) -> Backend:
        """Return the backend that serves a call.

        Args:
            name: a backend, or `AUTO` for the first available one of this device's order.
            device: where the tensors are.
            dtype: the dtype of the computation.

        Raises:
            ValueError: no backend has that name.
            BackendUnavailableError: it cannot run on this device or in this dtype.
        """
        if name != AUTO:
            backend = self.backends[self._known(name, "the argument `backend`")]
            reason = self.why_not(backend, device, dtype)
            if reason is not None:
                others = [
                    other.name
                    for other in self.backends.values()
                    if self.why_not(other, device, dtype) is None
                ]
                raise BackendUnavailableError(
                    f"backend {name!r} of {self.name} cannot serve {dtype} on {device}: {reason}. "
                    f"Name one that can ({', '.join(others) or 'none'}) or none for the default; "
                    "`python -m vision.kernels` shows them all"
                )
            return backend
        reasons = {}
        for candidate in self._order_on(device):
            reason = self.why_not(self.backends[candidate], device, dtype)
            if reason is None:
                return self.backends[candidate]
            reasons[candidate] = reason
        raise BackendUnavailableError(
            f"no default backend of {self.name} can serve {dtype} on {device}: "
            + "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
            + ". Move the tensors to a device that has one; `python -m vision.kernels` shows them"
        )

    def why_not(
        self, backend: Backend, device: torch.device, dtype: torch.dtype | None = None
    ) -> str | None:
        """Return why `backend` cannot serve this device (and dtype, if given); None if it can."""
        key = (backend.name, str(device))
        if key not in self._reasons:
            self._reasons[key] = backend.probe(device)
        reason = self._reasons[key]
        served = backend.dtypes
        if reason is None and dtype is not None and served is not None and dtype not in served:
            return f"it computes in {', '.join(sorted(map(str, served)))} only; cast the inputs"
        return reason

    def _order_on(self, device: torch.device) -> tuple[str, ...]:
        return self.order.get(device.type, self.order[_EVERY_OPERATOR])

    def _known(self, name: str, source: str) -> str:
        if name not in self.backends:
            raise ValueError(
                f"{self.name} has no backend {name!r}, which {source} asks for; there are "
                f"{', '.join(self.backends)}, or 'auto' for the default of the device"
            )
        return name


def operators() -> dict[str, Operator]:
    """Return every operator by its name."""
    return dict(_operators)


def list_backends(devices: Sequence[str] | None = None) -> list[Availability]:
    """Say for every operator, backend and device whether it runs there, and if not, why.

    Args:
        devices: device names as torch writes them (default: the CPU and the accelerator, if any).

    Returns:
        One row each, in the order of registration; probes run that have not run before.
    """
    if devices is None:
        devices = ["cpu"]
        if torch.accelerator.is_available():
            devices.append(str(torch.accelerator.current_accelerator()))
    return [row for device in devices for row in _rows(torch.device(device))]


def _rows(device: torch.device) -> Iterator[Availability]:
    for op in _operators.values():
        reasons = {name: op.why_not(backend, device) for name, backend in op.backends.items()}
        served = next((n for n in op._order_on(device) if reasons[n] is None), None)
        for name, reason in reasons.items():
            yield Availability(op.name, name, str(device), reason, name == served)


class use_backend:
    """Name the backend of every call inside a `with` block.

    It holds for the whole process, so also for threads that run in the meantime; a backward pass
    keeps the backend of its forward pass, wherever it runs.

    Args:
        name: a backend; "auto" lifts the choice of an enclosing block.
        op: only for this operator (default: for all).

    Raises:
        ValueError: no such operator, or no operator (not this operator) has such a backend.

    Example:
        >>> with use_backend("reference"):
        ...     y = bi_wkv(w, u, k, v)
    """

    def __init__(self, name: str, op: str | None = None) -> None:
        self._key = _checked_operator(op)
        self._name = _checked_name(name, self._key, "use_backend")
        self._outer: list[dict[str, str]] = []

    def __enter__(self) -> "use_backend":
        global _scope
        self._outer.append(_scope)
        inner = {} if self._key == _EVERY_OPERATOR else dict(_scope)
        inner[self._key] = self._name
        _scope = inner
        _forget()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _scope
        _scope = self._outer.pop()
        _forget()


def _checked_operator(op: str | None) -> str:
    if op is None:
        return _EVERY_OPERATOR
    if op not in _operators:
        raise ValueError(f"there is no operator {op!r}; there are {', '.join(_operators)}")
    return op


def _checked_name(name: str, key: str, source: str) -> str:
    ops = list(_operators.values()) if key == _EVERY_OPERATOR else [_operators[key]]
    names = list(dict.fromkeys(n for op in ops for n in op.backends))
    if name != AUTO and name not in names:
        raise ValueError(
            f"no operator has a backend {name!r}, which {source} asks for; there are "
            f"{', '.join(names)}, or 'auto' for the default of the device"
        )
    return name


def read_environment() -> None:
    """Read the environment variable again, at the next call of an operator."""
    global _environment
    _environment = None
    _forget()


def _forget() -> None:
    for op in _operators.values():
        op.forget()


def _from_environment() -> dict[str, str]:
    """Read `torch` or `bi_wkv=torch,wkv6=triton`; names are checked by the operator concerned."""
    global _environment
    if _environment is not None:
        return _environment
    named = {}
    for item in os.environ.get(ENVIRONMENT_VARIABLE, "").split(","):
        if item.strip():
            op, equals, name = item.rpartition("=")
            named[op.strip() if equals else _EVERY_OPERATOR] = name.strip()
    _environment = named
    return named
