"""Files that are there whole or not at all, whenever a process ends."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file so that whoever looks finds the old one or the new one, whole.

    Gives the path of a hidden file beside it, to be written inside the block. At the end it goes to
    the disk and takes the name; if the block fails it is removed, and the old file stays.

    Args:
        path: of the file; its folder is made if it is not there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk: give the space back
        raise
    if os.name == "posix":  # the new name, too, must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write bytes, or text as UTF-8, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def digest_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: str | Path) -> list[str]:
    """Delete what a killed `replacing` left in a folder; returns the names."""
    leftovers = sorted(Path(folder).glob(".*.tmp"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return [leftover.name for leftover in leftovers]


class Journal:
    """Results of a long work, one line of JSON each, from which the next run goes on.

    A line that the end of a process cut off is dropped.

    Args:
        path: of the file; what is there is read.
        settings: what the results depend on, plain JSON, the first line.

    Attributes:
        done: results so far, by name.

    Raises:
        ValueError: the file is of other settings, or no journal.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self.done: dict[str, Any] = {}
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        try:
            head, *rest = [json.loads(line) for line in lines[:-1]] or [settings]
            self.done = dict(rest)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is no journal of an earlier run ({error}); remove it to start anew"
            ) from error
        if head != settings:
            raise ValueError(
                f"{self.path} is of a run with {head}, this one has {settings}; remove it to start "
                "anew"
            )
        whole = b"".join(line + b"\n" for line in lines[:-1])
        write_whole(self.path, whole or json.dumps(settings) + "\n")

    def add(self, name: str, result: Any) -> None:
        """Keep a result, plain JSON, on the disk at once."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, result]) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[name] = result
