"""Reading checkpoint files: never more than data, and a plain word when a file is no good."""

import difflib
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from vision.models.checkpoint import CheckpointError
from vision.models.checkpoint import read_checkpoint as read_weights

SUFFIXES = (".pth", ".pt", ".bin")
_HISTORY_METHODS = ("min", "max", "current", "mean")


def _history_method(owner: object, name: str) -> Any:
    """The one use of `getattr` that mmengine's own files need, and no other."""
    if owner is HistoryBuffer and name in _HISTORY_METHODS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(f"refused: getattr({owner!r}, {name!r})")


@contextmanager
def _mmengine_globals() -> Iterator[None]:
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
    with torch.serialization.safe_globals(allowed):
        yield


def _nearby(path: Path) -> str:
    """What is to be found near a path that is missing."""
    folder = path.parent
    while not folder.is_dir():
        if folder == folder.parent:
            return "no folder of this path exists"
        folder = folder.parent
    if folder != path.parent:
        names = sorted(p.name + "/" for p in folder.iterdir() if p.is_dir())
    else:
        names = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
    if not names:
        return f"{folder} holds no checkpoint"
    close = difflib.get_close_matches(path.name, names, n=5, cutoff=0.3)
    close += [name for name in names if name not in close]
    more = ", ..." if len(close) > 10 else ""
    return f"in {folder} there are: {', '.join(close[:10])}{more}"


_NEXT = (
    "Take the previous checkpoint (--resume without a path picks the newest whole one by itself)."
)


def _refused(error: Exception) -> str:
    """What torch refused, without its advice to load the file all the same."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("Check the")]
    return lines[-1].strip().removeprefix("WeightsUnpickler error: ").partition(" Please use")[0]


def read_run_checkpoint(
    path: str | Path, map_location: Any = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Read a checkpoint of a training run as data; nothing in it is ever executed.

    More than `vision.models.checkpoint.read_checkpoint`, for weights, it knows what mmengine
    saves. Tensors, numbers, strings and containers are read, and of mmengine's own files the logged
    histories and numpy numbers; whatever else a pickle names is refused.

    Args:
        path: a file written by `torch.save`, or of safetensors.
        map_location: as for `torch.load`.
        mmap: map the tensors instead of reading them (a quick look at a large file).

    Raises:
        FileNotFoundError: there is no such file; says what lies near.
        CheckpointError: the file is truncated, is no checkpoint, or holds more than data.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"the checkpoint {path} {kind}; {_nearby(path)}")
    if path.suffix == ".safetensors":
        return read_weights(path)
    size = path.stat().st_size
    archive = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        head = file.read(24)
    about = f"{path} ({size} bytes)"
    if head[:2] == b"PK" and not archive:
        raise CheckpointError(
            f"{about} is truncated: its writer or its copy was cut off before the end. {_NEXT}"
        )
    try:
        with _mmengine_globals():
            # files before torch 1.6 are no archives and cannot be mapped
            checkpoint = torch.load(
                path, map_location=map_location, weights_only=True, mmap=mmap and archive
            )
    except (pickle.UnpicklingError, EOFError) as e:
        # a whole archive, or a bare pickle, that does not pass
        if archive or head[:1] == pickle.PROTO:
            raise CheckpointError(
                f"{about} was not read: it names code, and a checkpoint is data only. Loading it "
                "as torch did before 2.6 would run that code. If you trust its origin, convert it "
                f"once to plain tensors where it was written. What was refused: {_refused(e)}"
            ) from e
        raise CheckpointError(
            f"{about} is not a checkpoint: it begins with {head!r}. A file of this kind is often "
            f"an error page or a pointer that a download left. {_NEXT} ({e})"
        ) from e
    except RuntimeError as e:
        if "PytorchStreamReader" in str(e) or "storage has wrong byte size" in str(e):
            raise CheckpointError(f"{about} is damaged: {e}. {_NEXT}") from e
        raise
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{about} holds a {type(checkpoint).__name__}, not a checkpoint")
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
                f"does not match. {_NEXT}"
            )
    return checkpoint


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """mmengine's loader of local files, by `read_run_checkpoint`."""
    return read_run_checkpoint(filename, map_location)
