"""Reading checkpoint files: never more than data, and a plain word when a file is no good."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer

from vision.models.checkpoint import CheckpointError, read_checkpoint

_HISTORY_METHODS = ("min", "max", "current", "mean")


def _history_method(owner: object, name: str) -> Any:
    """The one use of `getattr` that mmengine's own files need, and no other."""
    if owner is HistoryBuffer and name in _HISTORY_METHODS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f"refused: getattr({owner!r}, {name!r})")


def _mmengine_globals() -> list[Any]:
    """What files of plain mmengine hold besides tensors: logged histories and numpy numbers.

    HistoryBuffer's state names its own methods, which pickle writes as getattr(HistoryBuffer, ...).
    Ends when mmengine saves plain numbers.
    """
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    names = ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1, numpy 2
    allowed: list[Any] = [
        HistoryBuffer,
        (_history_method, "builtins.getattr"),
        np.ndarray,
        np.dtype,
    ]
    allowed += [(multiarray._reconstruct, f"{name}._reconstruct") for name in names]
    allowed += [(multiarray.scalar, f"{name}.scalar") for name in names]
    allowed += [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")]
    return allowed


def read_run_checkpoint(
    path: str | Path, map_location: Any = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Read a checkpoint of a training run as data; nothing in it is ever executed.

    As `vision.models.checkpoint.read_checkpoint`, and besides it knows what plain mmengine saves:
    the logged histories and numpy numbers.

    Args:
        path: a file written by `torch.save`, or of safetensors.
        map_location: as for `torch.load`.
        mmap: map the tensors instead of reading them (a quick look at a large file).

    Raises:
        FileNotFoundError: there is no such file; says what lies near.
        CheckpointError: the file is truncated, is no checkpoint, or holds more than data.
    """
    checkpoint = read_checkpoint(path, map_location, mmap, _mmengine_globals())
    meta = checkpoint.get("meta")
    if isinstance(meta, dict) and "config" in meta:
        # Runner.resume executes this text as a Python file; files of mmengine call it "cfg"
        meta["config_text"] = meta.pop("config")
    return checkpoint


def check_whole(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the last byte and compare the checksums.

    Returns:
        The checkpoint, its tensors mapped from the file.

    Raises:
        FileNotFoundError, CheckpointError: as `read_run_checkpoint`, and for a wrong checksum.
    """
    checkpoint = read_run_checkpoint(path, mmap=True)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
        if bad is not None:
            raise CheckpointError(
                f"{path} ({Path(path).stat().st_size} bytes) is damaged: the checksum of {bad} "
                "does not match"
            )
    return checkpoint


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """mmengine's loader of local files, by `read_run_checkpoint`."""
    return read_run_checkpoint(filename, map_location)
