"""A teacher's embeddings of a folder of images, computed once: shards of float16 with an index.

`index.json` says which teacher made the embeddings, which images there are, and of each shard its
checksum and the sizes of its images before padding. A shard is a safetensors file with
"embeddings" (N, D, h, w) and sums for `EmbeddingCache.statistics`. Shards are written before the
index names them, each file whole or not at all, so that a kill loses the shard in work at most.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vision.files import digest_of_file, remove_leftovers, write_whole
from vision.models.checkpoint import listing

from .teachers import unpadded_cells

INDEX = "index.json"
_KEYS = {"teacher", "shape", "shard_size", "images", "shards"}
Progress = Callable[[Iterable[int]], Iterable[int]]


class CacheError(RuntimeError):
    """A cache of embeddings is damaged, unfinished, or not the one that is wanted."""


def cache_bytes(count: int, shape: Sequence[int]) -> int:
    """Bytes on disk of so many embeddings (D, h, w); an index and headers come to it."""
    return count * 2 * torch.Size(shape).numel()


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"embeddings-{shard:05d}.safetensors"


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; tools/cache_embeddings.py writes such a folder")
    try:
        index = json.loads(path.read_bytes())
    except ValueError as error:
        raise CacheError(f"{path} is no index of embeddings: {error}") from error
    if not isinstance(index, dict) or set(index) != _KEYS:
        raise CacheError(f"{path} is no index of embeddings; wanted {', '.join(sorted(_KEYS))}")
    return index


def _damage(folder: Path, index: Mapping[str, Any], shard: int) -> str | None:
    """What is wrong with a shard that the index names; None if nothing is."""
    path = _shard_path(folder, shard)
    if not path.is_file():
        return f"{path} is missing"
    if digest_of_file(path) != index["shards"][str(shard)]["sha256"]:
        return f"{path} is damaged: its checksum is not that of the index"
    return None


class CacheWriter:
    """Write the cache of a list of images, or go on with one.

    Args:
        folder: of the cache; made if it is not there.
        teacher: `Teacher.identity`.
        shape: of one embedding, (D, h, w).
        images: names of the images, in order.
        shard_size: images a shard.
        progress: wraps the numbers of the shards whose checksums are compared at the start.

    Raises:
        CacheError: the folder has embeddings of another teacher or of other images.
        ValueError: no images, or no room in a shard.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        teacher: Mapping[str, Any],
        shape: Sequence[int],
        images: Sequence[str],
        shard_size: int = 64,
        progress: Progress = iter,
    ) -> None:
        if not images or shard_size < 1:
            raise ValueError(f"wanted images and shard_size >= 1, got {len(images)}, {shard_size}")
        self.folder = Path(folder)
        self.index: dict[str, Any] = {
            "teacher": dict(teacher),
            "shape": list(shape),
            "shard_size": shard_size,
            "images": list(images),
            "shards": {},
        }
        self.damaged: list[str] = []  # what was found wrong and will be written again
        if (self.folder / INDEX).is_file():
            before = _read_index(self.folder)
            self._check_same(before)
            for shard in progress(sorted(map(int, before["shards"]))):
                wrong = _damage(self.folder, before, shard)
                if wrong is None:
                    self.index["shards"][str(shard)] = before["shards"][str(shard)]
                else:
                    self.damaged.append(wrong)
            remove_leftovers(self.folder)

    def _check_same(self, before: Mapping[str, Any]) -> None:
        old, new = before["teacher"], self.index["teacher"]
        other = [
            f"{key} {old.get(key)!r} and not {new.get(key)!r}"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        other += [
            f"{key} {before[key]} and not {self.index[key]}"
            for key in ("shape", "shard_size")
            if before[key] != self.index[key]
        ]
        gone, more = (
            set(a["images"]) - set(b["images"])
            for a, b in ((before, self.index), (self.index, before))
        )
        if gone or more:
            other.append(f"{len(gone)} images that are gone, and lacks {len(more)} new ones")
        if other:
            raise CacheError(
                f"{self.folder} has embeddings of {'; '.join(other)}. Ask for the same, or choose "
                "another folder"
            )

    def images_of(self, shard: int) -> list[str]:
        """Names of a shard's images."""
        size = self.index["shard_size"]
        return self.index["images"][shard * size : (shard + 1) * size]

    @property
    def todo(self) -> list[int]:
        """Numbers of the shards that are not written yet."""
        count = -(-len(self.index["images"]) // self.index["shard_size"])
        return [shard for shard in range(count) if str(shard) not in self.index["shards"]]

    @property
    def left_out(self) -> dict[int, list[str]]:
        """By shard, the images that could not be read when it was written."""
        found = {}
        for key, entry in self.index["shards"].items():
            names = zip(self.images_of(int(key)), entry["sizes"], strict=True)
            if None in entry["sizes"]:
                found[int(key)] = [name for name, size in names if size is None]
        return found

    def forget(self, shard: int) -> None:
        """Have a shard written again."""
        del self.index["shards"][str(shard)]

    @property
    def bytes_left(self) -> int:
        """Bytes that are still to be written."""
        return cache_bytes(sum(len(self.images_of(s)) for s in self.todo), self.index["shape"])

    def check_space(self) -> int:
        """Free bytes of the disk.

        Raises:
            CacheError: fewer than what is still to be written.
        """
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(there).free
        if free < self.bytes_left:
            raise CacheError(
                f"{self.folder} wants {self.bytes_left:,} bytes more, and the disk has {free:,}; "
                "make room, or take fewer images"
            )
        return free

    def write(
        self,
        shard: int,
        embeddings: Sequence[Tensor | None],
        sizes: Sequence[tuple[int, int] | None],
    ) -> None:
        """Write a shard, then the index that names it.

        Args:
            shard: its number.
            embeddings: of each of its images, (D, h, w); None for one that could not be read.
            sizes: height and width in pixels of each before padding, or None.

        Raises:
            ValueError: another number of images, another shape, or values beyond float16.
        """
        names = self.images_of(shard)
        if not len(names) == len(embeddings) == len(sizes):
            raise ValueError(f"shard {shard} has {len(names)} images, got {len(embeddings)}")
        shape = tuple(self.index["shape"])
        rows = []
        for name, embedding in zip(names, embeddings, strict=True):
            if embedding is None:
                continue
            if tuple(embedding.shape) != shape:
                raise ValueError(f"wanted {shape} for {name}, got {tuple(embedding.shape)}")
            row = embedding.detach().to("cpu", torch.float16)
            if not row.isfinite().all():
                raise ValueError(
                    f"the embedding of {name} reaches {float(embedding.abs().max()):.3g}, which "
                    "float16 cannot hold; take another level of the teacher"
                )
            rows.append(row)
        stack = torch.stack(rows) if rows else torch.empty(0, *shape, dtype=torch.float16)
        known = torch.tensor([size for size in sizes if size is not None]).view(-1, 2)
        cells = unpadded_cells(known, self.index["teacher"]["image_size"], shape[1])
        values = stack.double().permute(0, 2, 3, 1)[cells]  # (cells of all images, D)
        data = save(
            {
                "embeddings": stack,
                "count": torch.tensor([len(values)]),
                "sum": values.sum(0),
                "square_sum": values.square().sum(0),
            }
        )
        write_whole(_shard_path(self.folder, shard), data)
        self.index["shards"][str(shard)] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "sizes": [size and list(size) for size in sizes],
        }
        write_whole(self.folder / INDEX, json.dumps(self.index))


class EmbeddingCache:
    """Embeddings on disk, read one by one; images that could not be read are not among them.

    Args:
        folder: what `CacheWriter` wrote.

    Attributes:
        teacher: identity of the teacher, see `vision.sam.teachers.create_teacher`.
        shape: of one embedding, (D, h, w).
        names: of the images.
        sizes: height and width of each in pixels before padding.

    Raises:
        FileNotFoundError: there is no cache.
        CacheError: no index, or an unfinished cache.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._index = index = _read_index(self.folder)
        self.teacher: dict[str, Any] = index["teacher"]
        self.shape: tuple[int, ...] = tuple(index["shape"])
        self.names: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self._places: list[tuple[int, int]] = []  # shard and row
        size, images = index["shard_size"], index["images"]
        self._shards = range(-(-len(images) // size))
        missing = [shard for shard in self._shards if str(shard) not in index["shards"]]
        if missing:
            raise CacheError(
                f"{self.folder} is unfinished: {len(missing)} of {len(self._shards)} shards are "
                "not written; run tools/cache_embeddings.py again"
            )
        for shard in self._shards:
            rows = index["shards"][str(shard)]["sizes"]
            names = images[shard * size : (shard + 1) * size]
            read = [(n, (s[0], s[1])) for n, s in zip(names, rows, strict=True) if s is not None]
            self.names += [name for name, _ in read]
            self.sizes += [size for _, size in read]
            self._places += [(shard, row) for row in range(len(read))]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """One embedding, float16 (D, h, w); of its shard nothing else is read.

        Raises:
            IndexError: no image of that number.
            CacheError: the shard is missing or cut off.
        """
        shard, row = self._places[index]
        return self._read(shard, lambda file: file.get_slice("embeddings")[row])

    def verify(self, progress: Progress = iter) -> None:
        """Compare the checksums of all shards.

        Args:
            progress: wraps the numbers of the shards.

        Raises:
            CacheError: names what is missing or damaged.
        """
        found = [_damage(self.folder, self._index, shard) for shard in progress(self._shards)]
        wrong = [damage for damage in found if damage is not None]
        if wrong:
            raise CacheError(
                f"{listing(wrong, 4)}; tools/cache_embeddings.py writes these shards again"
            )

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the unpadded cells, float32 (D,).

        A channel that never varies has the deviation 1.
        """
        sums = [
            self._read(
                shard, lambda file: [file.get_tensor(k) for k in ("count", "sum", "square_sum")]
            )
            for shard in self._shards
        ]
        count, total, squares = (torch.stack(column).sum(0) for column in zip(*sums, strict=True))
        mean = total / count
        variance = squares / count - mean.square()
        # Below this the difference is rounding.
        constant = variance <= 1e-12 * mean.square()
        return mean.float(), variance.masked_fill(constant, 1).sqrt().float()

    def _read(self, shard: int, read: Callable[[Any], Any]) -> Any:
        path = _shard_path(self.folder, shard)
        try:
            with safe_open(path, framework="pt") as file:
                return read(file)
        except (OSError, SafetensorError) as error:
            raise CacheError(
                f"the shard {path} cannot be read: {error}; tools/cache_embeddings.py writes it "
                "again"
            ) from error
