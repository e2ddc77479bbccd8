"""Resuming so that the run is the one that was never interrupted, and stopping in good order.

What holds, bit for bit, on the same machine, library versions, world size and batch size, with
deterministic operators:

- `EpochBasedTrainLoop` with `ExactResumeHook` and `worker_init_fn`, resumed at the end of an
  epoch, for any number of workers that stays the same and `persistent_workers=False`.
- `ExactIterBasedTrainLoop` with `ExactResumeHook`, resumed at any iteration, even with another
  number of workers.

It does not hold for gradients accumulated across the checkpoint, for ReduceOnPlateau schedules
(which step after validation), for hooks that draw random numbers in `after_val` and, as order and
augmentation then are other ones, for mmengine's own `IterBasedTrainLoop`.
"""

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, barrier, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import FUNCTIONS, HOOKS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info


def capture_rng() -> dict[str, Any]:
    """The states of this process's random number generators, as plain data."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert version == 3
    assert name == "MT19937"
    state: dict[str, Any] = {
        "python": torch.tensor(numbers, dtype=torch.int64),
        "python_gauss": gauss,
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": (int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Set the generators to what `capture_rng` found; tensors may lie on any device."""
    random.setstate((3, tuple(state["python"].tolist()), state["python_gauss"]))
    keys = state["numpy"].cpu().numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *state["numpy_rest"]))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _seed_process(*key: int) -> None:
    """Seed the three CPU generators from numbers; CUDA's are left alone."""
    words = np.random.SeedSequence(key).generate_state(6)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:4])
    torch.default_generator.manual_seed(int(words[4]) << 32 | int(words[5]))


def _obey_parent(parent: int) -> None:
    """Leave when the main process says so by SIGTERM; let others' SIGTERM pass."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _outlive_signals() -> None:
    """Let a worker survive a signal to the whole process group while the main process stops.

    A scheduler, or Ctrl-C, signals all processes; without its workers the main process could not
    finish the iteration. They leave with the main process in any case (torch watches that).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


@FUNCTIONS.register_module()
def worker_init_fn(worker_id: int) -> None:
    """Seed a data loader's worker anew in every epoch, and differently on every rank.

    mmengine's own function seeds with one number for the whole run; as workers start anew in every
    epoch, every epoch would then see the same augmentations. Use as
    `worker_init_fn=dict(type="worker_init_fn")`.

    Args:
        worker_id: number of the worker; torch has already put it into `torch.initial_seed()`,
            with a number that the main process drew at the start of the epoch.
    """
    _seed_process(torch.initial_seed(), int(os.environ.get("RANK", "0")))
    _outlive_signals()


def _order_of(dataloader: Any) -> Any:
    """The sampler that shuffles: of the batch sampler, or of the loader."""
    inner = getattr(dataloader.batch_sampler, "sampler", None)
    return dataloader.sampler if inner is None else inner


def _set_epoch(dataset: Any, epoch: int) -> None:
    """Tell a data set, and those that it wraps, the number of the epoch."""
    while dataset is not None:
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        dataset = getattr(dataset, "dataset", None)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Keep the random numbers and the order of the data through save and resume.

    The states of Python's, numpy's and torch's generators of every rank go into the checkpoint and
    come back before the first epoch after a resume. Validation does not disturb them. A data set
    with `set_epoch(epoch)` is told the epoch before each one.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None
        self._training: dict[str, Any] | None = None  # while validation runs
        self._of_all_ranks: list[dict[str, Any]] | None = None

    def before_checkpoint_on_all_ranks(self, runner: Any) -> None:
        """Collect the states of all ranks; called by AtomicCheckpointHook."""
        self._of_all_ranks = all_gather_object(self._training or capture_rng())

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put the states into a checkpoint that can be resumed from."""
        states, self._of_all_ranks = self._of_all_ranks, None
        if "optimizer" not in checkpoint:
            return
        if states is None:
            states = [self._training or capture_rng()]
            if get_world_size() > 1:
                runner.logger.warning(
                    "ExactResumeHook: the states of rank 0 only were saved, a resume will not be "
                    "exact; use AtomicCheckpointHook"
                )
        loader = runner.train_dataloader
        checkpoint["exact_resume"] = {
            "rng": states,
            "sampler_seed": getattr(_order_of(loader), "seed", None),
            "setup": self._setup(loader),
        }

    @staticmethod
    def _setup(loader: Any) -> dict[str, Any]:
        """What must stay the same for an exact resume."""
        return {
            "world size": get_world_size(),
            "batch size": getattr(loader.batch_sampler, "batch_size", None),
            "samples": len(loader.dataset),
            "torch": str(torch.__version__),  # it is a class of its own
        }

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Take the states from a checkpoint that is resumed from."""
        if not runner._resume:
            return
        self._to_restore = checkpoint.pop("exact_resume", None)
        if self._to_restore is None:
            runner.logger.warning(
                "ExactResumeHook: the checkpoint was saved without it; the run goes on with other "
                "random numbers"
            )

    def before_train(self, runner: Any) -> None:
        """Restore the order of the data."""
        loader = runner.train_dataloader
        if getattr(loader, "persistent_workers", False):
            runner.logger.warning(
                "ExactResumeHook: with persistent_workers=True the workers keep their random "
                "numbers and never hear of set_epoch; a resume will not be exact"
            )
        if type(runner.train_loop) is IterBasedTrainLoop:
            runner.logger.warning(
                "ExactResumeHook: IterBasedTrainLoop loads and drops all earlier data at a resume "
                "and is not exact; use train_cfg type ExactIterBasedTrainLoop"
            )
        if self._to_restore is None:
            return
        before, now = self._to_restore["setup"], self._setup(loader)
        changes = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
        if changes:
            runner.logger.warning(f"the resume is not exact: {', '.join(changes)}")
        if self._to_restore["sampler_seed"] is not None:
            # with randomness.seed=None the loader was built with a new seed
            _order_of(loader).seed = self._to_restore["sampler_seed"]

    def before_train_epoch(self, runner: Any) -> None:
        """Restore the random numbers, before the loader's iterator draws its seed."""
        _set_epoch(runner.train_dataloader.dataset, runner.epoch)
        if self._to_restore is not None:
            states = self._to_restore["rng"]
            if get_rank() < len(states):
                restore_rng(states[get_rank()])
            self._to_restore = None

    def before_val(self, runner: Any) -> None:
        """Set the training's states aside."""
        self._training = capture_rng()

    def after_val(self, runner: Any) -> None:
        """Go on as if there had been no validation."""
        if self._training is not None:
            restore_rng(self._training)
            self._training = None


class _SeededDataset(Dataset):
    """A data set whose sample depends on its place in the run only, not on the worker."""

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.key = (seed, rank)

    def __getitem__(self, place: tuple[int, int, int]) -> Any:
        """Sample for (batch, position in the batch, index in the data set)."""
        batch, position, index = place
        here = get_worker_info() is None  # the model's generators: leave them as they are
        before = capture_rng() if here else None
        _seed_process(*self.key, batch, position)
        try:
            return self.dataset[index]
        finally:
            if before is not None:
                before.pop("cuda", None)
                restore_rng(before)


class _Places:
    """A batch sampler without end that begins at any batch and numbers what it gives."""

    def __init__(self, batch_sampler: Any, order: Any, begin: int) -> None:
        self.batch_sampler, self.order, self.begin = batch_sampler, order, begin

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for batch, indices in enumerate(self._batches()):
            if batch >= self.begin:
                yield [(batch, position, index) for position, index in enumerate(indices)]

    def _batches(self) -> Iterator[list[int]]:
        for epoch in itertools.count():
            if hasattr(self.order, "set_epoch"):
                self.order.set_epoch(epoch)
            yield from self.batch_sampler


def _init_worker(worker_id: int, then: Callable[[int], None] | None) -> None:
    _outlive_signals()
    if then is not None:
        then(worker_id)


class _ReplayLoader:
    """A data loader that can begin at any batch without loading the earlier ones."""

    def __init__(self, loader: DataLoader, runner: Any) -> None:
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            raise ValueError(
                "ExactIterBasedTrainLoop needs a data set with indices, in batches; for an "
                "IterableDataset use IterBasedTrainLoop"
            )
        self._loader = loader
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return self.begin_at(0)

    def begin_at(self, batch: int) -> Iterator[Any]:
        """Batches from number `batch` on, without end; nothing starts before the first is asked."""
        old = self._loader
        places = _Places(old.batch_sampler, _order_of(old), batch)
        loader: DataLoader = DataLoader(
            _SeededDataset(old.dataset, self._runner.seed, get_rank()),
            batch_sampler=places,
            num_workers=old.num_workers,
            collate_fn=old.collate_fn,
            pin_memory=old.pin_memory,
            timeout=old.timeout,
            worker_init_fn=partial(_init_worker, then=old.worker_init_fn),
            multiprocessing_context=old.multiprocessing_context,
            # the loader's own draws must not come from the model's generator
            generator=torch.Generator().manual_seed(0),
            prefetch_factor=old.prefetch_factor,
        )
        yield from loader


@LOOPS.register_module()
class ExactIterBasedTrainLoop(IterBasedTrainLoop):
    """mmengine's IterBasedTrainLoop, exact and quick at a resume.

    A resume walks over the indices of the earlier batches and loads none of them. The random
    numbers of a sample depend on seed, rank, batch and position only, so the number of workers
    changes nothing. A data set that ends begins again without a pause.

    Arguments are those of IterBasedTrainLoop.
    """

    def __init__(self, runner: Any, dataloader: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(dataloader, dict):
            different = runner._randomness_cfg.get("diff_rank_seed", False)
            dataloader = runner.build_dataloader(
                dataloader, seed=runner.seed, diff_rank_seed=different
            )
        super().__init__(runner, _ReplayLoader(dataloader, runner), *args, **kwargs)

    def run(self) -> Any:
        """Launch training."""
        batches = self._resumed(self._iter)
        self.dataloader_iterator = batches
        try:
            return super().run()
        finally:
            batches.close()  # ends the workers

    def _resumed(self, done: int) -> Generator[Any, None, None]:
        # the base class drops the first `done` batches: it gets nothing to load
        yield from itertools.repeat(None, done)
        yield from self.dataloader.begin_at(done)


@HOOKS.register_module()
class InterruptHook(Hook):
    """Stop in good order on SIGTERM and SIGINT.

    The current iteration is finished. An iteration-based run then saves a checkpoint; an
    epoch-based one goes on from the last epoch's. The exit code is 128 + the signal's number. All
    ranks of a distributed run stop together. A second signal ends the process at once.
    """

    priority = "LOWEST"  # after the checkpoint hook

    def __init__(self) -> None:
        self._signal = 0
        self._handlers: dict[signal.Signals, Any] = {}

    def before_train(self, runner: Any) -> None:
        """Listen."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._note)

    def after_train(self, runner: Any) -> None:
        """Listen no more."""
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        signal.signal(number, self._handlers[signal.Signals(number)])

    def _asked(self) -> int:
        """The signal that any rank has got, or 0; the same on all ranks."""
        if get_world_size() == 1:
            return self._signal
        flag = torch.tensor(self._signal)
        all_reduce(flag, "max")
        return int(flag.item())

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Stop between two iterations."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            # the epoch is complete: after_train_epoch stops, with its checkpoint
            if not self.is_last_batch(runner, batch_idx) and (number := self._asked()):
                self._stop(runner, number)
        elif not self.is_last_train_iter(runner) and (number := self._asked()):
            self._save(runner, runner.iter + 1)
            self._stop(runner, number)

    @staticmethod
    def is_last_batch(runner: Any, batch_idx: int) -> bool:
        """Whether the batch is the last of its epoch."""
        return batch_idx + 1 == len(runner.train_dataloader)

    def after_train_epoch(self, runner: Any) -> None:
        """Stop between two epochs."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop) and (number := self._asked()):
            self._stop(runner, number)

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Stop inside a validation when nothing is lost by it."""
        # ranks may have different numbers of batches here, so they cannot ask each other
        if not self._handlers or get_world_size() > 1:
            return
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        if (by_epoch or self._is_saved(runner, runner.iter)) and self._signal:
            self._stop(runner, self._signal)

    def after_val(self, runner: Any) -> None:
        """Stop after a validation whose iteration has no checkpoint yet."""
        loop = runner.train_loop if self._handlers else None
        if loop is None or loop.iter >= loop.max_iters:  # nothing is left to stop
            return
        if number := self._asked():
            if not isinstance(loop, EpochBasedTrainLoop):
                self._save(runner, runner.iter)
            self._stop(runner, number)

    @staticmethod
    def _checkpoint_hook(runner: Any) -> CheckpointHook | None:
        return next((h for h in runner.hooks if isinstance(h, CheckpointHook)), None)

    def _is_saved(self, runner: Any, step: int) -> bool:
        hook = self._checkpoint_hook(runner)
        if hook is None or hook.last_ckpt is None:
            return False
        return os.path.basename(hook.last_ckpt) == hook.filename_tmpl.format(step)

    def _save(self, runner: Any, step: int) -> None:
        hook = self._checkpoint_hook(runner)
        if hook is None or hook.by_epoch or self._is_saved(runner, step):
            return
        hook._save_checkpoint_with_step(runner, step, {"epoch": runner.epoch, "iter": step})

    def _stop(self, runner: Any, number: int) -> None:
        hook = self._checkpoint_hook(runner)
        last = hook.last_ckpt if hook is not None else None
        where = f"from {last}" if last else "from the beginning: there is no checkpoint yet"
        runner.logger.warning(
            f"stopped by {signal.Signals(number).name} at epoch {runner.epoch}, iteration "
            f"{runner.iter}. The same command with --resume goes on {where}"
        )
        barrier()  # no rank goes while the main one still writes
        self.after_train(runner)
        raise SystemExit(128 + number)
