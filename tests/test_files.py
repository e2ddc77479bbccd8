"""Files that a failure leaves as they were."""

import os
from pathlib import Path

import pytest

from vision.files import remove_leftovers, replacing, write_whole


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
