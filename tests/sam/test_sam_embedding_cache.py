"""Caches of embeddings: what is written, what a reader gets, damage, and going on after a stop."""

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from vision.sam import embedding_cache
from vision.sam.embedding_cache import CacheError, CacheWriter, EmbeddingCache, cache_bytes
from vision.sam.teachers import unpadded_cells

SHAPE = (8, 4, 4)
TEACHER = {"name": "t", "weights": "abc", "image_size": 64}
NAMES = [f"sub/{i}.jpg" for i in range(7)]
SIZES = [(64, 64), (33, 64), (64, 16), (1, 64), (64, 48), (20, 64), (64, 64)]


def _writer(folder: Path, **changes: Any) -> CacheWriter:
    options = {"teacher": TEACHER, "shape": SHAPE, "images": NAMES, "shard_size": 3, **changes}
    return CacheWriter(folder, **options)


def _embeddings() -> torch.Tensor:
    return torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(0)) * 3 + 1


def _write(writer: CacheWriter, *shards: int, without: tuple[int, ...] = ()) -> None:
    x = _embeddings()
    for shard in shards or writer.todo:
        rows = range(3 * shard, min(3 * shard + 3, 7))
        writer.write(
            shard,
            [None if i in without else x[i] for i in rows],
            [None if i in without else SIZES[i] for i in rows],
        )


def test_what_was_written_is_read(tmp_path: Path) -> None:
    _write(_writer(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"embeddings-0000{i}.safetensors" for i in range(3)),
        "index.json",
    ]
    cache = EmbeddingCache(tmp_path)
    assert (cache.names, cache.sizes, cache.shape) == (NAMES, SIZES, SHAPE)
    assert cache.teacher == TEACHER
    for i in (6, 0, 4):
        assert cache[i].dtype == torch.float16
        assert torch.equal(cache[i], _embeddings()[i].half())
    with pytest.raises(IndexError):
        cache[7]
    cache.verify()


def test_one_embedding_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is mapped, and only one row of it asked for."""
    asked = []

    class Spy:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> "Spy":
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def get_slice(self, name: str) -> Any:
            asked.append(name)
            return self.file.get_slice(name)

    _write(_writer(tmp_path))
    monkeypatch.setattr(embedding_cache, "safe_open", Spy)
    assert torch.equal(EmbeddingCache(tmp_path)[4], _embeddings()[4].half())
    assert asked == ["embeddings"]


def test_statistics_are_those_of_the_unpadded_cells(tmp_path: Path) -> None:
    x = _embeddings()
    x[:, 2] = 0.1  # a channel that never varies
    writer = _writer(tmp_path)
    for shard in range(3):
        rows = range(3 * shard, min(3 * shard + 3, 7))
        writer.write(shard, [x[i] for i in rows], [SIZES[i] for i in rows])
    mean, std = EmbeddingCache(tmp_path).statistics()
    cells = unpadded_cells(torch.tensor(SIZES), 64, 4)
    values = x.half().double().permute(0, 2, 3, 1)[cells]
    torch.testing.assert_close(mean.double(), values.mean(0), rtol=1e-6, atol=1e-6)
    wanted = values.std(0, correction=0)
    wanted[2] = 1
    torch.testing.assert_close(std.double(), wanted, rtol=1e-6, atol=1e-6)


def test_sizes_are_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_bytes(111_860, (256, 64, 64)) == 234_587_422_720
    writer = _writer(tmp_path / "new" / "folder")
    assert writer.bytes_left == 7 * 8 * 4 * 4 * 2
    usage = namedtuple("usage", "total used free")
    free = {"bytes": 7 * 256}
    monkeypatch.setattr(
        embedding_cache.shutil, "disk_usage", lambda _: usage(10**9, 0, free["bytes"])
    )
    assert writer.check_space() == 7 * 256
    assert not (tmp_path / "new").exists()
    free["bytes"] -= 1
    with pytest.raises(CacheError, match=r"wants 1,792 bytes more, and the disk has 1,791"):
        writer.check_space()
    _write(writer, 1)
    assert writer.bytes_left == 4 * 256
    writer.check_space()
    _write(writer)
    size = sum(p.stat().st_size for p in (tmp_path / "new" / "folder").glob("*.safetensors"))
    assert cache_bytes(7, SHAPE) < size < cache_bytes(7, SHAPE) + 3 * 1000


def test_going_on_keeps_what_is_whole(tmp_path: Path) -> None:
    _write(_writer(tmp_path), 0, 2)
    with pytest.raises(CacheError, match=r"1 of 3 shards are not written"):
        EmbeddingCache(tmp_path)
    (tmp_path / ".embeddings-00001.safetensors.7.tmp").write_bytes(b"left by a kill")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    writer = _writer(tmp_path)
    assert (writer.todo, writer.damaged) == ([1], [])
    _write(writer)
    assert not list(tmp_path.glob(".*"))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    EmbeddingCache(tmp_path).verify()
    assert _writer(tmp_path).todo == []


@pytest.mark.parametrize("damage", ["flipped", "short", "missing"])
def test_damage_is_found_and_mended(tmp_path: Path, damage: str) -> None:
    _write(_writer(tmp_path))
    path = tmp_path / "embeddings-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flipped" else data[:-300])
    cache = EmbeddingCache(tmp_path)
    with pytest.raises(CacheError, match=r"embeddings-00001\.safetensors is (damaged|missing)"):
        cache.verify()
    if damage != "flipped":
        with pytest.raises(CacheError, match=r"embeddings-00001\.safetensors cannot be read"):
            cache[3]
    assert torch.equal(cache[0], _embeddings()[0].half())
    writer = _writer(tmp_path)
    assert writer.todo == [1]
    assert "embeddings-00001" in writer.damaged[0]
    _write(writer)
    EmbeddingCache(tmp_path).verify()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": {**TEACHER, "weights": "abd"}}, "weights 'abc' and not 'abd'"),
        ({"teacher": {**TEACHER, "image_size": 32}}, "image_size 64 and not 32"),
        ({"shape": (8, 2, 2)}, r"shape \[8, 4, 4\] and not \[8, 2, 2\]"),
        ({"shard_size": 2}, "shard_size 3 and not 2"),
        ({"images": [*NAMES[1:], "new.jpg"]}, "1 images that are gone, and lacks 1 new"),
    ],
)
def test_another_teacher_wants_another_folder(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    _write(_writer(tmp_path), 0)
    before = (tmp_path / "index.json").read_bytes()
    with pytest.raises(CacheError, match=f"{said}.*another folder"):
        _writer(tmp_path, **changes)
    assert (tmp_path / "index.json").read_bytes() == before


def test_images_that_could_not_be_read_are_left_out(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    _write(writer, without=(1, 3, 4, 5))  # a whole shard, too
    cache = EmbeddingCache(tmp_path)
    assert cache.names == [NAMES[i] for i in (0, 2, 6)]
    assert cache.sizes == [SIZES[i] for i in (0, 2, 6)]
    assert torch.equal(cache[1], _embeddings()[2].half())
    assert cache.statistics()[0].isfinite().all()
    cache.verify()
    writer = _writer(tmp_path)
    assert writer.left_out == {0: [NAMES[1]], 1: NAMES[3:6]}
    writer.forget(1)
    assert writer.todo == [1]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    x, sizes = list(_embeddings()[:3]), SIZES[:3]
    with pytest.raises(ValueError, match="has 3 images, got 2"):
        writer.write(0, x[:2], sizes[:2])
    with pytest.raises(ValueError, match=r"sub/2\.jpg, got \(8, 4, 3\)"):
        writer.write(0, [*x[:2], x[2][..., :3]], sizes)
    with pytest.raises(ValueError, match=r"sub/1\.jpg reaches 7e\+04, which float16"):
        writer.write(0, [x[0], torch.full(SHAPE, 7e4), x[2]], sizes)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="got 0, 3"):
        _writer(tmp_path, images=[])


@pytest.mark.parametrize("text", ["", "[1]", json.dumps({"teacher": {}})])
def test_no_index(tmp_path: Path, text: str) -> None:
    with pytest.raises(FileNotFoundError, match="cache_embeddings"):
        EmbeddingCache(tmp_path)
    (tmp_path / "index.json").write_text(text)
    for make in (EmbeddingCache, _writer):
        with pytest.raises(CacheError, match=r"index\.json is no index"):
            make(tmp_path)
