"""Files that a failure leaves as they were."""

import os
from pathlib import Path

import pytest

from vision.files import Journal, remove_leftovers, replacing, write_whole


def test_write_whole_keeps_the_old_file_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    write_whole(path, "old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_leftovers_only_are_removed(tmp_path: Path) -> None:
    for name in (".epoch_1.pth.77.tmp", "epoch_1.pth", "notes.tmp"):
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == [".epoch_1.pth.77.tmp"]
    assert sorted(os.listdir(tmp_path)) == ["epoch_1.pth", "notes.tmp"]


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x"

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(path.parent) == []
    with replacing(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["x"]


def test_a_journal_goes_on_after_any_end(tmp_path: Path) -> None:
    """Cut off at every byte it has the results whose lines are whole, and takes the rest anew."""
    path, settings = tmp_path / "deep" / "out.part", {"model": "a", "sizes": [1, 2]}
    journal = Journal(path, settings)
    results = {"one": [1.5, None], "two\n": {"ü": "x"}, "three": []}
    ends = [path.stat().st_size]
    for name, result in results.items():
        journal.add(name, result)
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        again = Journal(path, settings)
        kept = sum(end <= size for end in ends[1:])
        assert again.done == dict(list(results.items())[:kept])
        for name in list(results)[kept:]:
            again.add(name, results[name])
        assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="remove it to start anew"):
        Journal(path, {**settings, "model": "b"})
    assert path.read_bytes() == whole
    for broken in ("no json\n", '{"model": "a", "sizes": [1, 2]}\n7\n', '["a"]\n'):
        path.write_text(broken)
        with pytest.raises(ValueError, match="remove it to start anew"):
            Journal(path, settings)
        assert path.read_text() == broken
