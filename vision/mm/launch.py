"""From a config file and command line options to a runner: what the tools share."""

import argparse
import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from vision.models.checkpoint import CheckpointError

from .compat import cpu_safe_config, init_dist, is_installed

# Top-level keys that mmengine's Runner reads; others are a config's own variables.
RUNNER_KEYS = (
    "model", "work_dir", "train_dataloader", "val_dataloader", "test_dataloader", "train_cfg",
    "val_cfg", "test_cfg", "auto_scale_lr", "optim_wrapper", "param_scheduler", "val_evaluator",
    "test_evaluator", "default_hooks", "custom_hooks", "data_preprocessor", "load_from", "resume",
    "launcher", "env_cfg", "log_processor", "log_level", "visualizer", "default_scope",
    "randomness", "experiment_name", "custom_imports", "model_wrapper_cfg", "vis_backends",
    "tta_model", "tta_pipeline",
)  # fmt: skip
PARAMWISE_KEYS = (
    "lr_mult", "decay_mult", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult",
    "flat_decay_mult", "dwconv_decay_mult", "dcn_offset_lr_mult", "bypass_duplicate",
    "custom_keys", "decay_rate", "num_layers",
)  # fmt: skip


class ConfigError(ValueError):
    """A config file or a command line option cannot be right."""


@contextmanager
def errors_without_traceback() -> Iterator[None]:
    """End the program with the message alone when the user's input is at fault.

    Raises:
        SystemExit: instead of ConfigError, CheckpointError and FileNotFoundError.
    """
    try:
        yield
    except (ConfigError, CheckpointError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share."""
    parser.add_argument("config", help="config file, see configs/")
    parser.add_argument(
        "--work-dir", help="folder for logs and checkpoints; default work_dirs/NAME"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="override config entries, e.g. data_root=/data/camvid train_cfg.max_epochs=2",
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    # torchrun does not pass it any more, torch.distributed.launch does.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config, apply the options, check it, start the process group.

    Args:
        args: parsed arguments of `add_common_arguments`.

    Raises:
        FileNotFoundError: no such config; close names are listed.
        ConfigError: a key that is close to a known one but not it, a data folder that is missing or
            empty, or a detector without mmdet.
    """
    path = Path(args.config)
    if not path.is_file():
        known = [str(p) for p in Path("configs").rglob("*.py") if "_base_" not in p.parts]
        near = difflib.get_close_matches(args.config, known, n=3, cutoff=0.3)
        raise FileNotFoundError(f"no config file {path}; close ones: {', '.join(near) or 'none'}")
    cfg = Config.fromfile(path)
    merge_options(cfg, args.cfg_options)
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / path.stem)
    cfg.launcher = args.launcher
    check_keys(cfg)
    if cfg.get("default_scope") == "mmdet" and not is_installed("mmdet"):
        raise ConfigError(
            f"{path} is of a detector, which needs mmdet: pip install -e '.[detection]'"
        )
    init_dist(cfg.launcher)
    cpu_safe_config(cfg)
    return cfg


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Apply `--cfg-options`, also inside values that were built from a variable.

    mmengine expands `data_root` into the datasets when it reads the file, so an override of such
    a variable would change nothing; here the old value is replaced wherever it stands.

    Raises:
        ConfigError: a key that the config lacks while a close one exists.
    """
    for key, value in options.items():
        *parents, last = key.split(".")
        node: Any = cfg
        for name in parents:
            node = _child(node, name, key)
        if last not in node and not str(last).isdigit():
            near = difflib.get_close_matches(last, list(node), n=3, cutoff=0.7)
            if near:
                raise ConfigError(
                    f"--cfg-options {key}: the config has no {last!r} there; did you mean "
                    f"{' or '.join(near)}?"
                )
        if not parents and key == "data_root" and key in cfg:
            _replace(cfg._cfg_dict, "data_root", cfg.data_root, value)
    cfg.merge_from_dict(dict(options))


def _child(node: Any, name: str, key: str) -> Any:
    if isinstance(node, list | tuple):
        if not name.isdigit() or int(name) >= len(node):
            raise ConfigError(f"--cfg-options {key}: {name!r} is no index of a list of {len(node)}")
        return node[int(name)]
    if name in node:
        return node[name]
    near = difflib.get_close_matches(name, list(node), n=3, cutoff=0.5)
    raise ConfigError(
        f"--cfg-options {key}: the config has no {name!r}; "
        f"{'did you mean ' + ' or '.join(near) if near else 'there are ' + ', '.join(node)}?"
    )


def _replace(node: Any, name: str, old: Any, new: Any) -> None:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        if key == name and value == old:
            node[key] = new
        elif isinstance(value, dict | list):
            _replace(value, name, old, new)


def check_keys(cfg: Config) -> None:
    """Refuse misspelt keys that mmengine would pass over in silence.

    Raises:
        ConfigError: a top-level key close to one of the Runner's, or an unknown parameter rule.
    """
    for key in cfg:
        # Pipelines are variables of the data configs; test_pipeline only looks like tta_pipeline.
        known = key in RUNNER_KEYS or key in ("train_pipeline", "test_pipeline")
        if not known and (near := difflib.get_close_matches(key, RUNNER_KEYS, 1, 0.85)):
            raise ConfigError(
                f"config key {key!r} is not read by anything; did you mean {near[0]}?"
            )
    rules = (cfg.get("optim_wrapper") or {}).get("paramwise_cfg") or {}
    if unknown := [key for key in rules if key not in PARAMWISE_KEYS]:
        raise ConfigError(
            f"optim_wrapper.paramwise_cfg does not know {', '.join(unknown)}; "
            f"there are {', '.join(PARAMWISE_KEYS)}"
        )


def check_data(cfg: Config, *phases: str) -> None:
    """Look at the data folders before anything slow starts.

    Args:
        cfg: the whole config.
        *phases: which of train, val, test.

    Raises:
        ConfigError: a folder that is missing or empty; the message says how to name another.
    """
    for phase in phases:
        loader = cfg.get(f"{phase}_dataloader")
        for dataset in _datasets(loader.dataset if loader else None):
            root = Path(dataset.get("data_root") or "")
            parts = (dataset.get("data_prefix") or {}).values()
            for folder in [root / part for part in parts] or [root]:
                _check_folder(folder, f"{phase}_dataloader", str(dataset.get("data_root")))


def _datasets(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """The innermost dataset configs below wrappers such as RepeatDataset and ConcatDataset."""
    if not isinstance(dataset, Mapping):
        return
    if "dataset" in dataset:
        yield from _datasets(dataset["dataset"])
    elif "datasets" in dataset:
        for part in dataset["datasets"]:
            yield from _datasets(part)
    elif dataset.get("data_root"):
        yield dataset


def _check_folder(folder: Path, where: str, root: str) -> None:
    advice = (
        f"(data_root is {root!r}); name another with --cfg-options data_root=/path, "
        "or link it under data/"
    )
    if folder.is_file():
        return
    if not folder.is_dir():
        up = next((p for p in folder.parents if p.is_dir()), Path())
        there = ", ".join(sorted(p.name for p in up.iterdir())[:8])
        raise ConfigError(f"{where}: no folder {folder} {advice}; {up} holds {there or 'nothing'}")
    if not any(os.scandir(folder)):
        raise ConfigError(f"{where}: the folder {folder} is empty {advice}")
