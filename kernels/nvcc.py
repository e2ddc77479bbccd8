"""Compile a CUDA source with nvcc at its first use, once per machine, and load it.

Sources have no torch headers, so a build takes seconds and outlives torch releases. What was built
is kept in `$VISION_KERNELS_CACHE`, else in rwkv-vision below `$XDG_CACHE_HOME` or ~/.cache, under a
name that changes with the sources, the flags and the compiler.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CACHE_VARIABLE", "FLAGS", "CompileError", "build", "cache_folder", "find", "load"]

CACHE_VARIABLE = "VISION_KERNELS_CACHE"
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC")


class CompileError(RuntimeError):
    """A CUDA source could not be compiled or loaded; the message has the compiler's own words."""


def find() -> Path | None:
    """Return nvcc from `$CUDA_HOME`, the PATH or /usr/local/cuda*, the newest last of these."""
    places = [Path("/usr/local/cuda/bin/nvcc"), *sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"))]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        places.insert(0, Path(on_path))
    if os.environ.get("CUDA_HOME"):
        places.insert(0, Path(os.environ["CUDA_HOME"], "bin", "nvcc"))
    return next((place for place in places if place.is_file()), None)


def cache_folder() -> Path:
    """Return where libraries are kept; it need not exist."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE])
    above = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(above, "rwkv-vision")


def load(source: Path, architecture: str) -> ctypes.CDLL:
    """Return the library of a source, building it if it is not in the cache.

    Args:
        source: a .cu file.
        architecture: compute capability of the device without the point, such as "90".

    Raises:
        CompileError: there is no nvcc, the cache cannot be written, the compiler or loader fails.
    """
    path = build(source, architecture)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompileError(f"{path} cannot be loaded: {error}; delete it and try again") from error


def build(source: Path, architecture: str, flags: Sequence[str] = FLAGS) -> Path:
    """Return the path of a compiled source, building it if it is not in the cache.

    Several processes may call it at once: one builds, the others wait for it.

    Args:
        source: a .cu file; the headers beside it may be included.
        architecture: compute capability of the device without the point, such as "90".
        flags: given to nvcc besides the architecture.

    Raises:
        CompileError: there is no nvcc, the cache cannot be written, the compiler fails.
    """
    nvcc = find()
    if nvcc is None:
        raise CompileError(
            "nvcc was not found in CUDA_HOME, the PATH or /usr/local/cuda*; install the CUDA "
            "toolkit or set CUDA_HOME to it"
        )
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [str(nvcc), *flags, "-gencode", target]
    folder = cache_folder()
    path = folder / f"{source.stem}-sm_{architecture}-{_key(source, command)}.so"
    if not path.exists():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _only_one(path.with_suffix(".lock")):
                if not path.exists():
                    _compile([*command, str(source)], path)
        except OSError as error:
            raise CompileError(
                f"the cache folder {folder} cannot be written ({error}); set {CACHE_VARIABLE} to "
                "a folder that can"
            ) from error
    return path


def _key(source: Path, command: Sequence[str]) -> str:
    """Digest everything a library depends on."""
    digest = hashlib.sha256("\0".join(command).encode())
    digest.update(_version(Path(command[0])).encode())
    for path in [source, *sorted(source.parent.glob("*.h"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _version(nvcc: Path) -> str:
    return _run([str(nvcc), "--version"])


def _compile(command: Sequence[str], path: Path) -> None:
    """Build beside `path` and move there when all is well, so that nobody loads half a file."""
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        _run([*command, "-o", str(unfinished)])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr + done.stdout).strip()
        raise CompileError(f"`{' '.join(command)}` failed:\n{words}")
    return done.stdout


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Keep other processes out; the system lifts the lock of a process that dies."""
    import fcntl  # where there is none, neither is a GPU that this code runs on

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
