"""Checkpoints: plain, whole, and read as data only."""

import logging
import os
import shutil
from collections import Counter, OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch.serialization import get_unsafe_globals_in_checkpoint
from torch.testing import assert_close

from vision.mm.checkpoint import (
    AtomicCheckpointHook,
    newest_whole_checkpoint,
)
from vision.mm.plain import from_plain, to_plain
from vision.mm.reading import check_whole, read_run_checkpoint
from vision.models.checkpoint import CheckpointError

LOG = logging.getLogger("test_checkpoint")


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def states(path: Path) -> dict[str, torch.Tensor]:
    return read_run_checkpoint(path)["state_dict"]


# --- plain data ---


def test_plain_round_trip_is_readable_everywhere(tmp_path):
    norm = torch.nn.BatchNorm1d(2)
    original = {
        "history": HistoryBuffer([1.5, 2.5], [1, 2]),
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "scalars": [np.float64(0.1), np.bool_(True), np.int64(7), Path("/a")],
        "counter": Counter({2: 1}),
        "deque": deque([1, 2], 2),
        "set": {3, 1},
        "state": norm.state_dict(),
        "parameter": norm.weight,
        ("a", 1): None,
    }
    torch.save(to_plain(original), tmp_path / "x.pth")
    assert get_unsafe_globals_in_checkpoint(tmp_path / "x.pth") == []
    back = from_plain(torch.load(tmp_path / "x.pth", weights_only=True))
    assert isinstance(back["history"], HistoryBuffer)
    assert back["history"].data[0].tolist() == [1.5, 2.5]
    assert back["history"].data[1].tolist() == [1, 2]
    assert back["history"].mean() == original["history"].mean()
    np.testing.assert_array_equal(back["array"], original["array"])
    assert back["array"].dtype == np.int32
    assert back["scalars"] == [0.1, True, 7, "/a"]
    assert [type(x) for x in back["scalars"]] == [float, bool, int, str]
    assert back["counter"] == original["counter"]
    assert type(back["counter"]) is Counter
    assert back["deque"] == original["deque"]
    assert back["deque"].maxlen == 2
    assert back["set"] == {1, 3}
    assert type(back["state"]) is OrderedDict
    assert back["state"]._metadata == original["state"]._metadata
    assert type(back["parameter"]) is torch.Tensor
    assert back["a", 1] is None


def test_plain_names_the_place_of_what_is_not_data():
    with pytest.raises(TypeError, match=r"checkpoint\['meta'\]\[1\] is a .*Trap"):
        to_plain({"meta": [0, Trap(Path())]})
    with pytest.raises(TypeError, match=r"checkpoint\['a'\]: an array of object"):
        to_plain({"a": np.array([None])})


# --- reading ---


def test_hostile_pickle_is_refused_and_not_executed(tmp_path):
    sign = tmp_path / "executed"
    path = tmp_path / "bad.pth"
    torch.save({"state_dict": {}, "x": Trap(sign)}, path)
    with pytest.raises(CheckpointError, match="names code") as e:
        read_run_checkpoint(path)
    assert str(path) in str(e.value)
    assert not sign.exists()
    # the trap does work where it is sprung
    torch.load(path, weights_only=False)
    assert sign.exists()


def test_mmengine_loads_through_the_safe_reader(tmp_path, toy, monkeypatch):
    from mmengine.runner import load_checkpoint

    # torch's way to turn its default off must not reach this reader
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    sign = tmp_path / "executed"
    torch.save({"state_dict": {}, "x": Trap(sign)}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="names code"):
        load_checkpoint(torch.nn.Linear(1, 1), str(tmp_path / "bad.pth"))
    assert not sign.exists()


@pytest.mark.parametrize("name", ["__init__", "update", "__class__"])
def test_getattr_of_the_allow_list_reaches_four_methods_only(tmp_path, name):
    class Getattr:
        def __reduce__(self):
            return getattr, (HistoryBuffer, name)

    torch.save({"x": Getattr()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="refused"):
        read_run_checkpoint(tmp_path / "bad.pth")


def test_truncated_damaged_and_foreign_files_say_so(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": {"w": torch.arange(5000.0)}}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"a.pth \({len(whole) // 2:,} bytes\) is truncated"):
        read_run_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"\(0 bytes\) is not a checkpoint"):
        read_run_checkpoint(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="not a checkpoint: it begins with b'<html>"):
        read_run_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        read_run_checkpoint(path)
    # one wrong byte among the numbers: readable, and not whole
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    read_run_checkpoint(path)
    with pytest.raises(CheckpointError, match="checksum"):
        check_whole(path)


def test_missing_file_lists_what_is_near(tmp_path):
    (tmp_path / "epoch_3.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"in .* there are: epoch_3.pth"):
        read_run_checkpoint(tmp_path / "epoch_4.pth")
    (tmp_path / "run_a").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there are: .*run_a/"):
        read_run_checkpoint(tmp_path / "run_b" / "epoch_4.pth")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_run_checkpoint(tmp_path)


def test_config_text_of_a_checkpoint_is_not_executed_at_resume(tmp_path, toy):
    """mmengine's Runner.resume runs meta["config"] as a Python file."""
    toy.make_runner(tmp_path, 1, ema=False).train()
    path = tmp_path / "epoch_1.pth"
    checkpoint = torch.load(path, weights_only=True)
    sign = tmp_path / "executed"
    checkpoint["meta"]["config"] = f"import pathlib\npathlib.Path({str(sign)!r}).touch()\n"
    torch.save(checkpoint, path)
    runner = toy.make_runner(tmp_path, 2, resume=True, ema=False)
    runner.train()
    assert runner.epoch == 2
    assert not sign.exists()


def save(path: Path, saved_at: float) -> None:
    torch.save({"meta": {"saved_at": saved_at}, "state_dict": {"w": torch.ones(3000)}}, path)


def test_newest_whole_is_by_time_and_passes_over_damage(tmp_path, caplog):
    save(tmp_path / "epoch_9.pth", 1.0)  # of an earlier run in the same folder
    save(tmp_path / "epoch_2.pth", 2.0)
    save(tmp_path / "epoch_3.pth", 3.0)
    save(tmp_path / "epoch_4.pth", 4.0)
    save(tmp_path / "best_acc_epoch_4.pth", 9.0)
    cut = tmp_path / "epoch_4.pth"
    cut.write_bytes(cut.read_bytes()[:-100])
    flipped = bytearray((tmp_path / "epoch_3.pth").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (tmp_path / "epoch_3.pth").write_bytes(flipped)
    with caplog.at_level(logging.WARNING):
        assert newest_whole_checkpoint([tmp_path], LOG) == tmp_path / "epoch_2.pth"
    assert "epoch_4.pth (" in caplog.text
    assert "is truncated" in caplog.text
    assert "checksum" in caplog.text
    for name in ("epoch_2.pth", "epoch_9.pth"):
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole, 2 are damaged"):
        newest_whole_checkpoint([tmp_path], LOG)
    assert newest_whole_checkpoint([tmp_path / "nothing"], LOG) is None


def test_hook_refuses_what_it_cannot_keep():
    with pytest.raises(ValueError, match="backend_args"):
        AtomicCheckpointHook(backend_args={"backend": "petrel"})
    with pytest.raises(TypeError, match="intervall"):
        AtomicCheckpointHook(intervall=3)


# --- the hook in runs ---


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory) -> Path:
    """Three epochs with EMA and save_best, two checkpoints kept."""
    folder = tmp_path_factory.mktemp("finished")
    toy.make_runner(folder, 3, save_best="calls", max_keep=2).train()
    return folder


def test_files_are_plain_and_only_the_wanted_ones_stay(finished):
    files = sorted(p.name for p in finished.glob("*.pth"))
    assert files == ["best_calls_epoch_3.pth", "epoch_2.pth", "epoch_3.pth"]
    assert (finished / "last_checkpoint").read_text() == str(finished / "epoch_3.pth")
    assert not list(finished.glob(".*.tmp"))
    for name in files:
        assert get_unsafe_globals_in_checkpoint(finished / name) == []
    checkpoint = torch.load(finished / "epoch_3.pth", weights_only=True)
    assert isinstance(checkpoint["meta"]["cfg"], str)
    assert "ema_state_dict" in checkpoint
    assert checkpoint["ema_state_dict"]["steps"].item() == 15
    assert checkpoint["message_hub"]["runtime_info"]["keep_ckpt_ids"] == [2, 3]


def test_logged_histories_continue_after_a_resume(finished, toy, tmp_path):
    before = read_run_checkpoint(finished / "epoch_3.pth")["message_hub"]["log_scalars"]
    runner = toy.make_runner(
        tmp_path, 4, resume=True, load_from=str(finished / "epoch_3.pth"), save_best="calls"
    )
    runner.train()
    losses = runner.message_hub.get_scalar("train/loss").data[0]
    assert len(losses) == 20
    assert losses[:15].tolist() == from_plain(before)["train/loss"].data[0].tolist()
    assert runner.message_hub.get_info("best_score") == 3.0  # the metric starts again at 1


def test_plain_mmengine_files_can_be_resumed(toy, tmp_path):
    """They hold HistoryBuffer and numpy numbers, which the allow-list knows."""
    toy.make_runner(tmp_path, 1, checkpoint_hook="CheckpointHook", save_best="acc").train()
    path = tmp_path / "epoch_1.pth"
    assert get_unsafe_globals_in_checkpoint(path) != []
    history = read_run_checkpoint(path)["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(history, HistoryBuffer)
    runner = toy.make_runner(tmp_path, 2, resume=True, save_best="acc")
    runner.train()
    assert runner.iter == 10
    assert len(runner.message_hub.get_scalar("train/loss").data[0]) == 10
    assert get_unsafe_globals_in_checkpoint(tmp_path / "epoch_2.pth") == []


def test_resume_passes_over_a_stale_pointer_and_a_damaged_file(toy, tmp_path, capsys):
    toy.make_runner(tmp_path, 3, ema=False).train()
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_1.pth"))
    newest = tmp_path / "epoch_3.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    (tmp_path / ".epoch_3.pth.1.tmp").touch()
    capsys.readouterr()
    runner = toy.make_runner(tmp_path, 3, resume=True, ema=False, hooks=(toy.StopAt(10),))
    with pytest.raises(toy.Stopped):
        runner.train()
    log = capsys.readouterr()
    assert "resumed epoch: 2, iter: 10" in log.out + log.err
    assert f"skipped {newest}" in log.out + log.err
    assert not (tmp_path / ".epoch_3.pth.1.tmp").exists()


def test_resume_without_any_checkpoint_starts_and_with_a_lost_one_stops(toy, tmp_path):
    runner = toy.make_runner(tmp_path, 1, resume=True, ema=False)
    runner.train()
    assert runner.iter == 5
    (tmp_path / "epoch_1.pth").unlink()
    with pytest.raises(FileNotFoundError, match="which is gone"):
        toy.make_runner(tmp_path, 1, resume=True, ema=False).train()


def test_explicit_path_is_taken_even_if_a_newer_one_is_there(finished, toy, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    path = str(tmp_path / "copy" / "epoch_2.pth")
    runner = toy.make_runner(
        tmp_path / "copy", 3, resume=True, load_from=path, hooks=(toy.StopAt(10),)
    )
    with pytest.raises(toy.Stopped):
        runner.train()


@pytest.mark.parametrize("kind", ["last", "best"])
def test_death_in_the_middle_of_a_write_loses_nothing(kind, run_toy, toy, tmp_path):
    """The kernel kills the process when the third file of its kind reaches 12 kB."""
    done = run_toy(
        tmp_path, "--length", 4, "--max-keep", 1, "--save-best", "calls", "--die-in", kind,
        "--die-at", {"last": 5, "best": 3}[kind],
    )  # fmt: skip
    assert done.returncode == -25, done.stderr  # SIGXFSZ
    # "last" is written twice in an epoch: at its end, and with the new best score
    pointed = Path((tmp_path / "last_checkpoint").read_text())
    newest = {"last": tmp_path / "epoch_2.pth", "best": tmp_path / "epoch_3.pth"}[kind]
    assert pointed == newest
    check_whole(pointed)
    best = check_whole(tmp_path / "best_calls_epoch_2.pth")
    assert best["meta"]["epoch"] == 2
    leftovers = [p.stat().st_size for p in tmp_path.glob(".*.tmp")]
    assert leftovers == [12_000]  # the write was cut, not refused
    runner = toy.make_runner(tmp_path, 4, resume=True, max_keep=1, save_best="calls")
    runner.train()
    assert runner.epoch == 4
    assert not list(tmp_path.glob(".*.tmp"))
    assert sorted(p.name for p in tmp_path.glob("epoch_*.pth")) == ["epoch_4.pth"]


def test_a_kill_before_the_removal_of_an_old_file_is_made_up_for(toy, tmp_path):
    toy.make_runner(tmp_path, 2, max_keep=1, ema=False).train()
    # as if the process had died after epoch_2.pth and its pointer, before removing epoch_1.pth
    (tmp_path / "epoch_1.pth").write_bytes((tmp_path / "epoch_2.pth").read_bytes())
    runner = toy.make_runner(tmp_path, 3, max_keep=1, resume=True, ema=False)
    runner.train()
    assert sorted(p.name for p in tmp_path.glob("epoch_*.pth")) == ["epoch_3.pth"]


def test_state_of_ema_is_the_average(finished):
    checkpoint = read_run_checkpoint(finished / "epoch_3.pth")
    raw = checkpoint["ema_state_dict"]["module.layers.0.weight"]  # mmengine swaps the two
    average = checkpoint["state_dict"]["layers.0.weight"]
    best = states(finished / "best_calls_epoch_3.pth")["layers.0.weight"]
    assert not torch.equal(raw, average)
    assert_close(best, average, rtol=0, atol=0)
