"""Reading weights from files that others wrote: safe, strict, and clear when it fails."""

import difflib
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision.files import replacing
from vision.layers.pos_embed import resample_pos_embed


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or its keys do not fit the model."""


# Where the weights lie in files of timm, mmengine and facebookresearch/mae.
_CONTAINERS = ("state_dict", "model")
# What torch's reader raises for bytes that are no checkpoint.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors")
_NEXT = (
    "copy or download it again, or take the checkpoint before it (--resume without a path finds "
    "the newest whole one)"
)


def read_checkpoint(
    path: str | Path,
    map_location: Any = "cpu",
    mmap: bool = False,
    safe_globals: Sequence[Any] = (),
) -> dict[str, Any]:
    """Read a checkpoint file as data; nothing in it is ever executed.

    Args:
        path: file ending in .safetensors, or written by `torch.save`.
        map_location: as for `torch.load`.
        mmap: map the tensors instead of reading them (a quick look at a large file).
        safe_globals: what a pickle may name besides tensors, numbers, strings and containers; as
            for `torch.serialization.safe_globals`.

    Returns:
        The dictionary in the file.

    Raises:
        FileNotFoundError: there is no such file; says which checkpoints lie near.
        CheckpointError: the file is truncated, is no checkpoint, or holds more than data.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"the checkpoint {path} {kind}; {_nearby(path)}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    about = f"{path} ({path.stat().st_size:,} bytes)"
    archive = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        head = file.read(24)
    if head[:2] == b"PK" and not archive:
        raise CheckpointError(
            f"{about} is truncated: its writer or its copy was cut off before the end; {_NEXT}"
        )
    try:
        with torch.serialization.safe_globals(list(safe_globals)):
            # Files before torch 1.6 are no archives and cannot be mapped.
            content = torch.load(
                path, map_location=map_location, weights_only=True, mmap=mmap and archive
            )
    except _UNREADABLE as error:
        if archive and isinstance(error, RuntimeError):
            if "PytorchStreamReader" in str(error) or "storage has wrong byte size" in str(error):
                raise CheckpointError(f"{about} is damaged: {error}; {_NEXT}") from error
            raise
        # A whole archive, or a bare pickle.
        if isinstance(error, pickle.UnpicklingError) and (archive or head[:1] == pickle.PROTO):
            raise CheckpointError(
                f"{about} was not read: it names code, and a checkpoint is data only. Loading it "
                "as torch did before 2.6 would run that code. If you trust its origin, convert it "
                f"once to plain tensors where it was written. What was refused: {_refused(error)}"
            ) from error
        raise CheckpointError(
            f"{about} is not a checkpoint: it begins with {head!r}. A file of this kind is often "
            f"an error page or a pointer that a download left; {_NEXT} ({_refused(error)})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{about} holds a {type(content).__name__}, wanted a dictionary of parameters"
        )
    return content


def _refused(error: Exception) -> str:
    """What torch refused, without its advice to load the file all the same."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("Check the")]
    last = lines[-1] if lines else type(error).__name__
    return last.strip().removeprefix("WeightsUnpickler error: ").partition(" Please use")[0]


def _nearby(path: Path) -> str:
    """What is to be found near a path that is missing."""
    folder = next((p for p in (path, *path.parents) if p.is_dir()), None)
    if folder is None:
        return "no folder of this path exists"
    if folder not in (path, path.parent):
        names = sorted(p.name + "/" for p in folder.iterdir() if p.is_dir())
    else:
        names = sorted(p.name for p in folder.iterdir() if p.suffix in _SUFFIXES)
    close = difflib.get_close_matches(path.name, names, n=5, cutoff=0.3)
    close += [name for name in names if name not in close]
    return f"in {folder} there are: {listing(close, 10) or 'no checkpoints'}"


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated or not a checkpoint: {error}; "
            f"{_NEXT}"
        ) from error


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the parameters in a checkpoint dictionary and drop a `module.` prefix (DDP).

    Raises:
        CheckpointError: the dictionary holds something that is no tensor, or nothing at all.
    """
    for key in _CONTAINERS:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    others = [key for key, value in checkpoint.items() if not isinstance(value, Tensor)]
    if others or not checkpoint:
        found = f"entries that are no tensors: {listing(others)}" if others else "nothing"
        raise CheckpointError(
            f"wanted a dictionary name -> tensor (or one under {' or '.join(_CONTAINERS)}), "
            f"found {found}"
        )
    return {key.removeprefix("module."): value for key, value in checkpoint.items()}


def with_weights_of_file(
    kwargs: Mapping[str, Any], read: Callable[[str | Path], Mapping[str, Any]] = read_checkpoint
) -> dict[str, Any]:
    """Read the file that `pretrained_cfg_overlay` names, for timm's `build_model_with_cfg`.

    timm's own reader neither names a truncated file nor says what was refused.

    Args:
        kwargs: of a model's entry point, with `pretrained=True`.
        read: reader of the file.

    Returns:
        The arguments, with the weights in the overlay if it names a file.
    """
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if not overlay.get("file"):
        return dict(kwargs)
    weights = unwrap_state_dict(read(overlay["file"]))
    return {**kwargs, "pretrained_cfg_overlay": {**overlay, "state_dict": weights}}


@contextmanager
def fetching(model_name: str, page: str) -> Iterator[None]:
    """Say what to do when a hub cannot be reached from inside of the block.

    Args:
        model_name: what is being created.
        page: where its file can be downloaded by hand.

    Raises:
        RuntimeError: in the place of the hub's errors.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    offline = (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, ConnectionError)
    try:
        yield
    except offline as error:
        raise RuntimeError(
            f"could not fetch the published weights of {model_name} from the hub (no network?). On "
            "a machine that has one, download the file named in model.pretrained_cfg from "
            f"{page}, then pass its path: timm.create_model({model_name!r}, pretrained=True, "
            "pretrained_cfg_overlay=dict(file='path/to/file.pth'))"
        ) from error


def split_prefix(
    state: Mapping[str, Tensor], stem: str, network: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split a checkpoint into the entries of one network, prefix removed, and the rest.

    Args:
        state: the checkpoint's parameters.
        stem: pattern of the name that every such network has exactly once, the prefix left out.
        network: what the message calls the network.

    Raises:
        CheckpointError: no entry or several have that name.
    """
    found = [m for m in (re.search(rf"(?:^|\.)({stem})$", key) for key in state) if m]
    if len(found) != 1:
        plain = stem.replace("\\", "").replace("?:", "").replace("?", "")
        raise CheckpointError(
            f"wanted the weights of one {network}, with one {plain}; found {len(found)} among "
            f"{len(state)} keys: {listing(state)}"
        )
    prefix = found[0].string[: found[0].start(1)]
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    outside = {k: v for k, v in state.items() if not k.startswith(prefix)}
    return inside, outside


def rename(
    state: Mapping[str, Tensor],
    rules: Sequence[tuple[str, str]],
    left_out: re.Pattern[str] | None = None,
) -> dict[str, Tensor]:
    """Give a checkpoint's parameters other names.

    Args:
        state: name -> tensor.
        rules: patterns and what replaces them, applied to each name one after the other.
        left_out: parameters whose old name this matches are dropped.
    """
    renamed = {}
    for key, value in state.items():
        if left_out is not None and left_out.match(key):
            continue
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    return renamed


def check_names(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], head: Sequence[str], options: str
) -> None:
    """Compare a checkpoint's names with a model's; the classifier may lack on either side.

    Args:
        state: the checkpoint's parameters.
        wanted: the model's.
        head: names of the classifier's weight and bias.
        options: arguments of the model that decide about names, for the message.

    Raises:
        CheckpointError: the message lists the names that do not fit.
    """
    unknown = sorted(set(state) - set(wanted) - set(head))
    missing = sorted(set(wanted) - set(state) - set(head))
    if unknown or missing:
        raise CheckpointError(
            "the checkpoint does not fit this model.\n"
            f"{_misfits(unknown, missing)}\n"
            f"Check the model's size and options ({options})."
        )


def fit_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample the position embedding of a square grid (1, tokens, C) to another one.

    Args:
        pos_embed: of the checkpoint.
        grid: rows and columns of the model.

    Raises:
        CheckpointError: it is no square, so that its rows and columns are not known.
    """
    tokens = pos_embed.shape[1]
    if tokens == grid[0] * grid[1]:
        return pos_embed
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(
            f"the position embedding has {tokens} tokens, no square grid; give the model the "
            "checkpoint's own img_size"
        )
    return resample_pos_embed(pos_embed, (side, side), grid)


def _misfits(unknown: Sequence[str], missing: Sequence[str]) -> str:
    return (
        f"  not in the model ({len(unknown)}): {listing(unknown) or '-'}\n"
        f"  not in the checkpoint ({len(missing)}): {listing(missing) or '-'}"
    )


def check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], name: str) -> None:
    """Compare a checkpoint's parameters with a model's `state_dict()`.

    Args:
        state: the checkpoint's parameters.
        wanted: the model's.
        name: what the message calls the checkpoint.

    Raises:
        CheckpointError: the message lists the keys and shapes that do not fit.
    """
    unknown, missing = sorted(set(state) - set(wanted)), sorted(set(wanted) - set(state))
    shapes = [
        f"{k} {tuple(v.shape)}, wanted {tuple(wanted[k].shape)}"
        for k, v in state.items()
        if k in wanted and v.shape != wanted[k].shape
    ]
    if shapes or unknown or missing:
        raise CheckpointError(
            f"{name} does not fit the model.\n"
            f"{_misfits(unknown, missing)}\n"
            f"  of another shape ({len(shapes)}): {listing(shapes, 4) or '-'}"
        )


def listing(names: Iterable[str], most: int = 12) -> str:
    """The names in a row for a message, shortened past `most`."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def write_weights(state_dict: Mapping[str, Tensor], path: str | Path) -> None:
    """Write plain tensors to a .safetensors or a `torch.save` file, whole or not at all.

    Args:
        state_dict: name -> tensor.
        path: new file; the ending chooses the format.

    Raises:
        ValueError: an ending that is neither .safetensors nor .pth nor .pt.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"wanted a name ending in .safetensors, .pth or .pt, got {path.name!r}")
    plain = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    with replacing(path) as part:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(plain, part)
        else:
            torch.save(plain, part)
