"""An interrupted and resumed run is the run that was never interrupted."""

import random
import re
import signal
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vision.mm.reading import read_run_checkpoint
from vision.mm.resume import capture_rng, restore_rng, worker_init_fn


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Model, average, optimizer and schedule of a checkpoint, flat."""
    checkpoint = read_run_checkpoint(path)
    flat: dict[str, torch.Tensor] = {}
    for part in ("state_dict", "ema_state_dict"):
        flat.update({f"{part}.{k}": v for k, v in checkpoint[part].items()})
    for number, state in checkpoint["optimizer"]["state"].items():
        flat.update({f"optimizer.{number}.{k}": torch.as_tensor(v) for k, v in state.items()})
    flat["lr"] = torch.tensor([group["lr"] for group in checkpoint["optimizer"]["param_groups"]])
    flat["acc"] = torch.tensor(
        checkpoint["message_hub"]["log_scalars"]["train/loss"]["log"].tolist()
    )
    return flat


def assert_same(a: Path, b: Path) -> None:
    """Two checkpoints hold the same numbers to the last bit."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert len(first) > 30
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert different == []


def draws() -> list[float]:
    """A number from each generator."""
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),
            torch.rand(()).item()]  # fmt: skip


def test_rng_states_are_plain_and_complete(tmp_path):
    random.gauss(0, 1)  # leaves half a pair in each of the two
    np.random.randn()
    state = capture_rng()
    torch.save(state, tmp_path / "x.pth")
    first, second = draws(), draws()
    restore_rng(torch.load(tmp_path / "x.pth", weights_only=True))
    assert draws() == first
    assert draws() == second
    assert first != second


class Draws(Dataset):
    """Samples that are random numbers."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])


def test_workers_draw_anew_in_every_epoch_and_on_every_rank(monkeypatch):
    def two_epochs() -> torch.Tensor:
        torch.manual_seed(3)
        loader = DataLoader(Draws(), num_workers=2, worker_init_fn=worker_init_fn)
        return torch.cat([torch.cat(list(loader)), torch.cat(list(loader))])

    drawn = two_epochs()
    assert len(set(drawn.flatten().tolist())) == drawn.numel() == 24
    assert torch.equal(two_epochs(), drawn)
    monkeypatch.setenv("RANK", "1")
    assert not torch.isin(two_epochs(), drawn).any()


@pytest.mark.parametrize("workers", [0, 1])
def test_two_and_two_epochs_are_four(toy, tmp_path, workers):
    make = partial(toy.make_runner, length=4, workers=workers)
    make(tmp_path / "a").train()
    runner = make(tmp_path / "b", hooks=(toy.StopAt(12),))  # in the middle of the third epoch
    with pytest.raises(toy.Stopped):
        runner.train()
    draws()  # another process would be elsewhere
    runner = make(tmp_path / "b", resume=True)
    runner.train()
    assert_same(tmp_path / "a" / "epoch_4.pth", tmp_path / "b" / "epoch_4.pth")
    assert runner.train_dataloader.dataset.epoch == 3


@pytest.mark.parametrize(("first", "then"), [(0, 0), (1, 1), (0, 2)])
def test_four_and_four_iterations_are_eight(toy, tmp_path, first, then):
    """Also with another number of workers after the resume."""
    make = partial(toy.make_runner, length=8, by_epoch=False)
    make(tmp_path / "a", workers=first).train()
    runner = make(tmp_path / "b", workers=first, hooks=(toy.StopAt(6),))
    with pytest.raises(toy.Stopped):
        runner.train()
    seen = runner.model.seen[:4]
    draws()
    runner = make(tmp_path / "b", workers=then, resume=True)
    runner.train()
    assert_same(tmp_path / "a" / "iter_8.pth", tmp_path / "b" / "iter_8.pth")
    assert len(runner.model.seen) == 4
    # the first pass over the 40 samples takes five batches
    assert sorted(chain(*seen, runner.model.seen[0])) == list(range(40))


def test_iterations_with_a_sampler_that_ends(toy, tmp_path):
    """Twelve iterations are two passes and a bit, each in an order of its own."""
    make = partial(toy.make_runner, length=12, by_epoch=False, sampler="DefaultSampler")
    runner = make(tmp_path / "a")
    runner.train()
    passes = [list(chain(*runner.model.seen[i : i + 5])) for i in (0, 5)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(40))
    assert passes[0] != passes[1]
    stopped = make(tmp_path / "b", hooks=(toy.StopAt(9),))
    with pytest.raises(toy.Stopped):
        stopped.train()
    make(tmp_path / "b", resume=True).train()
    assert_same(tmp_path / "a" / "iter_12.pth", tmp_path / "b" / "iter_12.pth")


def test_a_resume_loads_no_earlier_data(toy, tmp_path, monkeypatch):
    make = partial(toy.make_runner, length=8, by_epoch=False)
    stopped = make(tmp_path, hooks=(toy.StopAt(6),))
    with pytest.raises(toy.Stopped):
        stopped.train()
    loaded = []
    get = toy.ToyDataset.__getitem__

    def counting(self, i):
        loaded.append(i)
        return get(self, i)

    runner = make(tmp_path, resume=True)
    monkeypatch.setattr(toy.ToyDataset, "__getitem__", counting)
    runner.train()
    assert len(loaded) == 4 * 8 + 2 * 40  # four batches, and two validations


def test_the_seed_of_an_unseeded_run_is_kept(toy, tmp_path):
    """randomness.seed=None: the loader is built before the checkpoint is read."""
    make = partial(toy.make_runner, length=3, seed=None)
    runner = make(tmp_path / "b", hooks=(toy.StopAt(10),))
    with pytest.raises(toy.Stopped):
        runner.train()
    sampler_seed = runner.train_dataloader.sampler.seed
    (tmp_path / "c").mkdir()
    path = tmp_path / "b" / "epoch_2.pth"
    for name in ("b", "c"):  # two continuations of one run
        runner = make(tmp_path / name, resume=True, load_from=str(path))
        runner.train()
        assert runner.train_dataloader.sampler.seed == sampler_seed
    assert_same(tmp_path / "b" / "epoch_3.pth", tmp_path / "c" / "epoch_3.pth")


def test_changes_that_end_exactness_are_said(toy, tmp_path, capsys):
    toy.make_runner(tmp_path, 1, exact=False).train()
    runner = toy.make_runner(tmp_path, 2, resume=True)
    runner._train_dataloader["batch_size"] = 4
    runner.train()
    log = "".join(capsys.readouterr())
    assert "saved without it" in log
    runner = toy.make_runner(tmp_path, 3, resume=True)
    runner.train()
    assert "the resume is not exact: batch size 4 -> 8" in "".join(capsys.readouterr())
    toy.make_runner(tmp_path / "c", 2, by_epoch=False, loop="IterBasedTrainLoop").train()
    assert "use train_cfg type ExactIterBasedTrainLoop" in "".join(capsys.readouterr())


# --- stopping ---


def log_of(folder: Path) -> str:
    """The logs of all runs in a work folder."""
    return "".join(p.read_text() for p in sorted(folder.rglob("*.log")))


def test_sigterm_to_all_processes_saves_at_the_iteration(toy, run_toy, tmp_path):
    """A scheduler's SIGTERM reaches the data loader's workers too."""
    options = ("--iters", "--length", 8, "--workers", 1)
    done = run_toy(tmp_path / "b", *options, "--signal-at", 4, "--group")
    assert done.returncode == 143, done.stderr
    assert "stopped by SIGTERM at epoch 0, iteration 4" in log_of(tmp_path / "b")
    assert re.search(r"--resume goes on from \S+/iter_5.pth", log_of(tmp_path / "b"))
    assert [p.name for p in (tmp_path / "b").glob("*.pth")] == ["iter_5.pth"]
    make = partial(toy.make_runner, length=8, by_epoch=False, workers=1, interval=100)
    make(tmp_path / "b", resume=True).train()
    make(tmp_path / "a").train()
    assert_same(tmp_path / "a" / "iter_8.pth", tmp_path / "b" / "iter_8.pth")


def test_sigint_in_an_epoch_goes_back_to_its_beginning(run_toy, tmp_path):
    done = run_toy(tmp_path, "--length", 3, "--signal-at", 7, "--signal", 2)
    assert done.returncode == 130, done.stderr
    log = log_of(tmp_path)
    assert "stopped by SIGINT at epoch 1, iteration 7" in log
    assert re.search(r"--resume goes on from \S+/epoch_1.pth", log)
    assert "Epoch(train) [2][4/5]" not in log


@pytest.fixture
def handlers_kept():
    """Signal handlers as they were."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("by_epoch", "at", "saved"),
    [(True, 4, "epoch_1.pth"), (True, 9, "epoch_2.pth"), (False, 3, "iter_4.pth")],
)
def test_a_signal_in_the_last_iteration_before_a_checkpoint(
    toy, tmp_path, by_epoch, at, saved, handlers_kept
):
    """The end of an epoch is reached and saved before the run stops."""

    hook = toy.SignalAt(at, signal.SIGTERM, False, 0)
    runner = toy.make_runner(tmp_path, 3 if by_epoch else 8, by_epoch=by_epoch, hooks=(hook,))
    with pytest.raises(SystemExit) as e:
        runner.train()
    assert e.value.code == 143
    assert (tmp_path / "last_checkpoint").read_text().endswith(saved)
    assert {n: signal.getsignal(n) for n in handlers_kept} == handlers_kept


def test_a_signal_in_validation_loses_nothing(toy, tmp_path, handlers_kept):
    """Iteration 2 has no checkpoint when its validation is interrupted, iteration 4 has."""

    class InVal(toy.Hook):
        def __init__(self, iteration: int) -> None:
            self.iteration = iteration
            self.batches = 0

        def before_val_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == self.iteration:
                self.batches += 1
                if batch_idx == 1:
                    signal.raise_signal(signal.SIGTERM)

    make = partial(toy.make_runner, length=8, by_epoch=False)
    make(tmp_path / "a").train()
    for iteration, batches in ((2, 5), (4, 2)):
        hook = InVal(iteration)
        runner = make(tmp_path / "b", hooks=(hook,), resume=True)
        with pytest.raises(SystemExit):
            runner.train()
        assert hook.batches == batches  # a validation that is not needed is cut short
        assert (tmp_path / "b" / f"iter_{iteration}.pth").is_file()
    make(tmp_path / "b", resume=True).train()
    assert_same(tmp_path / "a" / "iter_8.pth", tmp_path / "b" / "iter_8.pth")


def test_two_processes_stop_together_and_resume_exactly(run_toy, tmp_path):
    """Rank 1 alone gets the signal; both have random numbers of their own."""
    whole = run_toy(tmp_path / "a", "--length", 3, ranks=2)
    assert whole.returncode == 0, whole.stderr
    stopped = run_toy(tmp_path / "b", "--length", 3, "--signal-at", 4, "--rank", 1, ranks=2)
    assert stopped.returncode != 0
    assert "stopped by SIGTERM at epoch 1, iteration 4" in log_of(tmp_path / "b")
    assert len(set(re.findall(r"exitcode\s*:\s*(\d+)", stopped.stderr))) == 1
    assert re.search(r"exitcode\s*:\s*143", stopped.stderr)
    assert [p.name for p in (tmp_path / "b").glob("*.pth")] == ["epoch_1.pth"]
    resumed = run_toy(tmp_path / "b", "--length", 3, "--resume", ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    checkpoint = read_run_checkpoint(tmp_path / "b" / "epoch_3.pth")
    states = checkpoint["exact_resume"]["rng"]
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])
    assert_same(tmp_path / "a" / "epoch_3.pth", tmp_path / "b" / "epoch_3.pth")
