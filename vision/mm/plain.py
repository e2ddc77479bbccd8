"""A checkpoint as plain data: tensors, numbers, strings, dicts, lists, tuples; and back.

`torch.load(weights_only=True)` reads what `to_plain` returns on any torch, with no list of
permitted classes.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_KIND = "__kind__"  # marks a dict that stands for another object


def _from_history(x: HistoryBuffer) -> dict[str, Any]:
    values, counts = x.data
    return {
        "log": torch.tensor(values, dtype=torch.float64),
        "count": torch.tensor(counts, dtype=torch.float64),
        "max_length": x.max_length,
    }


def _to_history(x: dict[str, Any]) -> HistoryBuffer:
    return HistoryBuffer(x["log"].cpu().numpy(), x["count"].cpu().numpy(), x["max_length"])


def _from_array(x: np.ndarray) -> dict[str, Any]:
    if x.dtype.kind not in "biuf":
        raise TypeError(f"an array of {x.dtype}")
    return {"data": torch.from_numpy(x.copy())}


# type -> its name, to a dict of plain data, and back
_KINDS: dict[type, tuple[str, Callable[[Any], dict[str, Any]], Callable[[dict[str, Any]], Any]]] = {
    HistoryBuffer: ("HistoryBuffer", _from_history, _to_history),
    np.ndarray: ("ndarray", _from_array, lambda x: x["data"].cpu().numpy()),
    Counter: ("Counter", lambda x: {"items": dict(x)}, lambda x: Counter(x["items"])),
    deque: (
        "deque",
        lambda x: {"items": list(x), "maxlen": x.maxlen},
        lambda x: deque(x["items"], x["maxlen"]),
    ),
    set: ("set", lambda x: {"items": sorted(x)}, lambda x: set(x["items"])),
}
_BACK = {name: back for name, _, back in _KINDS.values()}
_AS_IS = (torch.dtype, torch.device)  # torch reads them as data
_SCALARS = (bool, int, float, str)


def to_plain(x: Any, where: str = "checkpoint") -> Any:
    """Plain data that says the same as `x`.

    Args:
        x: what `torch.save` was to write.
        where: how errors name `x`.

    Raises:
        TypeError: there is an object in `x` that is not data; says where.
    """
    if x is None or type(x) in (*_SCALARS, bytes, torch.Tensor) or isinstance(x, _AS_IS):
        return x
    if isinstance(x, torch.nn.Parameter):
        return x.detach()
    if isinstance(x, np.generic):
        return to_plain(x.item(), where)
    if type(x) in _KINDS:
        name, convert, _ = _KINDS[type(x)]
        try:
            return {_KIND: name, **to_plain(convert(x), where)}
        except TypeError as e:
            raise TypeError(f"{where}: {e}") from e
    if isinstance(x, Mapping):
        plain: dict[Any, Any] = OrderedDict() if isinstance(x, OrderedDict) else {}
        for key, value in x.items():
            plain[to_plain(key, f"a key of {where}")] = to_plain(value, f"{where}[{key!r}]")
        if hasattr(x, "_metadata"):  # versions of the modules, in a state_dict
            plain._metadata = to_plain(x._metadata, f"{where}._metadata")  # type: ignore[attr-defined]
        return plain
    if isinstance(x, list | tuple):
        items = [to_plain(item, f"{where}[{i}]") for i, item in enumerate(x)]
        return items if isinstance(x, list) else tuple(items)
    if isinstance(x, Path):
        return str(x)
    for scalar in _SCALARS:  # subclasses of numbers and strings
        if isinstance(x, scalar):
            return scalar(x)
    raise TypeError(
        f"{where} is a {type(x).__module__}.{type(x).__qualname__}; a checkpoint takes tensors, "
        "numbers, strings, dicts, lists and tuples. Convert it in before_save_checkpoint"
    )


def from_plain(x: Any) -> Any:
    """The objects that `to_plain` had replaced."""
    if isinstance(x, dict):
        if _KIND in x:
            return _BACK[x[_KIND]]({key: from_plain(value) for key, value in x.items()})
        for key, value in x.items():  # in place: a state_dict keeps its _metadata
            x[key] = from_plain(value)
        return x
    if isinstance(x, list | tuple):
        items = [from_plain(item) for item in x]
        return items if isinstance(x, list) else tuple(items)
    return x
