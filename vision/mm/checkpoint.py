"""Checkpoints that survive a kill at any moment, and the choice of the one to resume from."""

import os
import re
import time
from collections import deque
from collections.abc import Iterable
from logging import Logger
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from vision.files import remove_leftovers, write_whole
from vision.models.checkpoint import CheckpointError, check_fit

from .plain import from_plain, to_plain
from .reading import check_whole, read_run_checkpoint

POINTER = "last_checkpoint"  # mmengine's name


@register_backend("atomic", force=True)
class AtomicBackend(LocalBackend):
    """mmengine's local files, written by `write_atomic`."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes to a file."""
        write_whole(filepath, obj)


class _RemoveLater:
    """A file backend that notes what is to be removed instead of removing it."""

    def __init__(self, backend: AtomicBackend) -> None:
        self.backend = backend
        self.paths: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.paths.append(path)


def newest_whole_checkpoint(
    folders: Iterable[str | Path],
    logger: Logger,
    templates: Iterable[str] = ("epoch_{}.pth", "iter_{}.pth"),
) -> Path | None:
    """The checkpoint that was saved last among those that can be read to the last byte.

    What is skipped, and why, goes to the log. The pointer file is not asked: a kill between the
    writing of a checkpoint and of the pointer leaves it behind.

    Args:
        folders: where to look.
        logger: gets one warning for each damaged file.
        templates: file names, with {} for the number of the epoch or iteration.

    Returns:
        None when there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    patterns = [re.compile(re.escape(t).replace(r"\{\}", r"\d+")) for t in templates]
    found: list[tuple[float, Path]] = []
    damaged: list[str] = []
    for folder in dict.fromkeys(Path(f).resolve() for f in folders):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not any(p.fullmatch(path.name) for p in patterns) or not path.is_file():
                continue
            try:
                # a look at the numbers; the tensors stay on the disk
                meta = read_run_checkpoint(path, mmap=True).get("meta", {})
            except (CheckpointError, RuntimeError) as e:
                damaged.append(str(e))
                logger.warning(f"resume: skipped {path}: {e}")
                continue
            found.append((meta.get("saved_at", path.stat().st_mtime), path))
    for _, path in sorted(found, reverse=True):
        try:
            check_whole(path)
        except CheckpointError as e:
            damaged.append(str(e))
            logger.warning(f"resume: skipped {path}: {e}")
        else:
            return path
    if damaged:
        raise CheckpointError(
            f"no checkpoint is whole, {len(damaged)} are damaged: " + "; ".join(damaged)
        )
    return None


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, safe against a kill at any moment.

    - A checkpoint, a best checkpoint and the pointer `last_checkpoint` appear whole or not at all;
      the pointer after its file, and what they replace is removed after both.
    - The files hold plain data (`plain.to_plain`): every torch reads them with `weights_only`.
    - `resume=True` without a path takes the newest whole checkpoint of the work folder.

    Arguments are those of CheckpointHook, without `backend_args` and `file_client_args`: the files
    are local.
    """

    # set by the base class in before_train
    keep_ckpt_ids: deque[int]
    file_backend: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("backend_args", "file_client_args"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"AtomicCheckpointHook writes local files and takes no {name}")
        super().__init__(*args, **kwargs)
        if self.args:
            raise TypeError(f"AtomicCheckpointHook has no argument {', '.join(self.args)}")
        self.backend_args = {"backend": "atomic"}

    def before_run(self, runner: Any) -> None:
        """Choose the checkpoint to resume from; runs before the Runner loads one."""
        if not runner._resume or runner._load_from is not None:
            return
        chosen: list[Any] = [None]
        if is_main_process():
            chosen[0] = self._choose(runner)
        broadcast_object_list(chosen)
        if chosen[0] is not None:
            runner._load_from = chosen[0]

    def _choose(self, runner: Any) -> str | None:
        folders = [Path(runner.work_dir)]
        if self.out_dir is not None and Path(self.out_dir) != folders[0]:
            folders.append(Path(self.out_dir) / folders[0].name)
        pointer = folders[0] / POINTER
        pointed = pointer.read_text().strip() if pointer.is_file() else ""
        if pointed:
            folders.append(Path(pointed).parent)
        templates = {"epoch_{}.pth", "iter_{}.pth", self.filename_tmpl}
        path = newest_whole_checkpoint(folders, runner.logger, templates)
        if path is None:
            if pointed:
                raise FileNotFoundError(
                    f"{pointer} names {pointed}, which is gone, and no other checkpoint is there; "
                    f"remove {pointer} to start from the beginning"
                )
            runner.logger.warning(
                f"resume: no checkpoint in {', '.join(map(str, folders))}; training starts from "
                "the beginning"
            )
            return None
        if pointed and Path(pointed).resolve() != path:
            runner.logger.warning(f"resume: {pointer} names {pointed}, the newest whole is {path}")
        return str(path)

    def before_train(self, runner: Any) -> None:
        """Prepare the folder."""
        super().before_train(runner)
        if is_main_process():
            for folder in {runner.work_dir, self.out_dir}:
                names = remove_leftovers(folder)
                if names:
                    runner.logger.warning(f"removed what a killed run left: {', '.join(names)}")

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint plain, after the other hooks have added theirs."""
        checkpoint["meta"]["saved_at"] = time.time()
        plain = to_plain(checkpoint)
        checkpoint.clear()
        checkpoint.update(plain)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Bring back the logged histories; a resumed run must fit its checkpoint.

        Raises:
            CheckpointError: the checkpoint belongs to another model. mmengine would pass over it.
        """
        if runner._resume:
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            check_fit(checkpoint["state_dict"], model.state_dict(), "the checkpoint to resume from")
        for key in ("meta", "message_hub", "param_schedulers", "optimizer"):
            if key in checkpoint:
                checkpoint[key] = from_plain(checkpoint[key])

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        hub = runner.message_hub
        kept: list[int] = []
        if self.max_keep_ckpts > 0:
            kept = [*(i for i in self.keep_ckpt_ids if i != step), step]
            # what is about to go stays on the list inside the file: a run that is killed before
            # the removal removes it when it resumes
            hub.update_info("keep_ckpt_ids", kept)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = os.path.join(self.out_dir, name)
        hub.update_info("last_ckpt", self.last_ckpt)
        # every rank takes part here; save_checkpoint runs on the main process only
        runner.call_hook("before_checkpoint_on_all_ranks")
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
        )
        if is_main_process():
            write_whole(Path(runner.work_dir) / POINTER, self.last_ckpt)
        if self.max_keep_ckpts > 0:
            outdated = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids = deque(kept[-self.max_keep_ckpts :], self.max_keep_ckpts)
            hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
            if is_main_process():
                for old in outdated:
                    path = Path(self.out_dir) / self.filename_tmpl.format(old)
                    path.unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, Any]) -> None:
        backend = self.file_backend
        self.file_backend = later = _RemoveLater(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        best = {getattr(self, "best_ckpt_path", None)}
        best.update(getattr(self, "best_ckpt_path_dict", {}).values())
        for path in later.paths:
            if path not in best:  # the same name may have been written anew
                backend.remove(path)
