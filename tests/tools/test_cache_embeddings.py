"""tools/cache_embeddings.py: sizes told first, kill -9 and going on, bad images, other teachers."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from vision.data import read_image
from vision.sam.embedding_cache import EmbeddingCache
from vision.sam.teachers import create_teacher, pad_to_square

ROOT = Path(__file__).resolve().parents[2]
TEACHER = "efficientvit_b0"
SIDE = 64
Run = Callable[..., int]


def _make_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    (folder / "sub").mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (40 + i % 7, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("sub" if i % 2 else ".") / f"{i:04d}.png")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven images, three of them in a subfolder, and one that is none."""
    _make_images(tmp_path / "images", 7)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/cache_embeddings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _words(images: Path, out: Path) -> list[str]:
    sizes = ["--image-size", str(SIDE), "--shard-size", "3", "--device", "cpu"]
    return [TEACHER, str(images), "--out-dir", str(out), *sizes]


@pytest.fixture
def run(images: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the tool's main as a command line would; the cache goes to out/ beside the images."""

    def call(*args: str) -> int:
        words = _words(images, images.parent / "out")
        monkeypatch.setattr(sys, "argv", ["cache_embeddings", *words, *args])
        return tool.main()

    return call


def _times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_folder_to_cache(images: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 1
    said = capsys.readouterr()
    first, *_, last = said.out.splitlines()
    assert first.startswith("8 embeddings (64, 4, 4), float16: 0.000 GB; to write: 0.000 GB; free:")
    assert last.startswith("7 of 8 images done")
    assert "failed: broken.jpg: " in said.err
    assert "8/8" in said.err  # the bar
    cache = EmbeddingCache(images.parent / "out")
    cache.verify()
    names = [p.relative_to(images).as_posix() for p in sorted(images.rglob("*.png"))]
    assert sorted(cache.names) == sorted(names)
    teacher = create_teacher(TEACHER, SIDE)
    assert cache.teacher == teacher.identity
    for i, name in enumerate(cache.names):
        x, size = pad_to_square(read_image(images / name), SIDE)
        assert cache.sizes[i] == size
        assert torch.equal(cache[i], teacher(x[None], torch.tensor([size]))[0].half())


def test_second_run_does_only_what_is_left(
    images: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    before = _times(images.parent / "out")
    assert run() == 1  # the broken image is still broken, and nothing is computed
    assert _times(images.parent / "out") == before
    Image.new("RGB", (25, 35), "red").save(images / "broken.jpg")
    damaged = images.parent / "out" / "embeddings-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    assert run() == 0
    said = capsys.readouterr()
    assert "8 of 8 images done" in said.out
    assert "embeddings-00000.safetensors is damaged" in said.err
    after = _times(images.parent / "out")
    changed = {name for name in before if after[name] != before[name]}
    cache = EmbeddingCache(images.parent / "out")
    shard = cache.names.index("broken.jpg") // 3
    assert changed == {damaged.name, f"embeddings-{shard:05d}.safetensors"}
    cache.verify()


def test_kill_loses_one_shard_at_most(tmp_path: Path) -> None:
    _make_images(tmp_path / "images", 120)
    out = tmp_path / "out"
    command = [sys.executable, "tools/cache_embeddings.py", *_words(tmp_path / "images", out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(_times(out)) < 3:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    index = json.loads((out / "index.json").read_text())
    kept = _times(out)
    assert 40 > len(kept) >= len(index["shards"]) >= len(kept) - 1 >= 2
    named = {f"embeddings-{int(shard):05d}.safetensors" for shard in index["shards"]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    after = _times(out)
    assert {name: after[name] for name in named} == {name: kept[name] for name in named}
    assert len(after) == 40
    assert not list(out.glob(".*"))
    cache = EmbeddingCache(out)
    cache.verify()
    assert len(cache) == 120


def test_another_teacher_is_refused(run: Run) -> None:
    run()
    for args in (("--seed", "1"), ("--level", "1"), ("--shard-size", "2")):
        with pytest.raises(SystemExit, match=r"error: .* and not .*another folder"):
            run(*args)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--weights", "nowhere.pth"), r"nowhere\.pth"),
        (("--image-size", "60"), "multiple of 16"),
        (("--shard-size", "0"), "shard_size >= 1"),
    ],
)
def test_wrong_arguments(images: Path, run: Run, args: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        run(*args)
    assert not (images.parent / "out").exists()


def test_a_full_disk_is_noticed_before(
    images: Path, tool: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool.CacheWriter, "bytes_left", 10**18)
    with pytest.raises(SystemExit, match=r"error: .*1,000,000,000,000,000,000 bytes more"):
        run()
    assert not (images.parent / "out").exists()
