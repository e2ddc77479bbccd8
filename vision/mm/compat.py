"""What mmengine 0.10, mmcv-lite 2.1 and mmseg 1.2 need to run on today's torch.

`install()` makes four repairs; each says what breaks and what ends it. `init_dist` and
`cpu_safe_config` are for the programs that start a run.
"""

import atexit
import functools
import importlib.metadata
import importlib.util
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log

from . import mmcv_ext

_installed = False


def install() -> None:
    """Repair the stack; to be called before mmcv.ops, mmseg or mmdet are imported. Idempotent."""
    global _installed
    if _installed:
        return
    mmcv_ext.install()
    _read_data_only()
    _find_packages_without_setuptools()
    # mmseg imports albumentations, which asks the network for its newest version at import.
    # Ends with mmseg or albumentations dropping either.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    _installed = True


def _read_data_only() -> None:
    """Let every checkpoint be read as data.

    Since torch 2.6 mmengine cannot read what it writes (its files hold more than tensors), and its
    loader from the network still unpickles anything. Ends when mmengine passes `weights_only` and
    saves plain data (open-mmlab/mmengine pull request 1650).
    """
    from mmengine.runner import checkpoint

    from .reading import load_from_local

    checkpoint.CheckpointLoader.register_scheme("", load_from_local, force=True)
    checkpoint.load_url = functools.partial(
        torch.hub.load_state_dict_from_url, weights_only=True, map_location="cpu"
    )


def is_installed(package: str) -> bool:
    """Whether a distribution or a module of this name is there."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(package)
        return spec is not None and spec.origin is not None
    return True


def package2module(package: str) -> str:
    """The name under which a distribution is imported: mmsegmentation gives mmseg."""
    for module, distributions in importlib.metadata.packages_distributions().items():
        if package in distributions and importlib.util.find_spec(module) is not None:
            if module == "tests":  # mmsegmentation ships its tests as a module of that name
                continue
            return module
    raise ValueError(f"can not infer the module name of {package}: it is not installed")


def get_installed_path(package: str) -> str:
    """Folder of a package, by its import name or its distribution's name.

    Raises:
        ModuleNotFoundError: there is none.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        if not is_installed(package):
            raise ModuleNotFoundError(f"{package} is not installed", name=package)
        spec = importlib.util.find_spec(package2module(package))
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{package} is a namespace package and has no one folder")
    return str(Path(spec.origin).parent)


def _find_packages_without_setuptools() -> None:
    """Replace mmengine's look-ups of packages, which need `pkg_resources`.

    setuptools 82 and later have none, and `_base_ = ["mmseg::..."]` then fails. Ends when mmengine
    reads importlib.metadata.
    """
    import mmengine.config.config  # noqa: F401 -- holds the names to replace
    import mmengine.utils.package_utils as original

    for replacement in (is_installed, get_installed_path, package2module):
        name = replacement.__name__
        old = getattr(original, name)
        for module_name, module in list(sys.modules.items()):
            if module_name.partition(".")[0].startswith("mm") and vars(module).get(name) is old:
                setattr(module, name, replacement)


def _rank_from_slurm() -> dict[str, str]:
    from subprocess import run

    nodes = os.environ["SLURM_NODELIST"]
    names = run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    ).stdout.split()
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_NTASKS"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", names[0]),
    }


def _rank_from_mpi() -> dict[str, str]:
    if "MASTER_ADDR" not in os.environ:
        raise ValueError(
            "launcher 'mpi' needs MASTER_ADDR, the address of the host of rank 0: "
            "mpirun -x MASTER_ADDR=... "
        )
    return {
        "RANK": os.environ["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": os.environ["OMPI_COMM_WORLD_SIZE"],
        "LOCAL_RANK": os.environ["OMPI_COMM_WORLD_LOCAL_RANK"],
    }


# launcher -> the variables that torchrun would have set
LAUNCHERS = {"pytorch": dict, "slurm": _rank_from_slurm, "mpi": _rank_from_mpi}
# launcher -> a variable that it sets itself
_SIGNS = {"pytorch": "LOCAL_RANK", "slurm": "SLURM_PROCID", "mpi": "OMPI_COMM_WORLD_RANK"}


def init_dist(launcher: str, timeout_s: float = 1800, backend: str | None = None) -> str | None:
    """Join the process group before the Runner does: nccl on CUDA, gloo on CPU.

    mmengine calls `torch.cuda.set_device` whatever the backend, which fails without a GPU; it
    leaves a group that is already there alone. Ends when mmengine asks the backend first.

    Args:
        launcher: none, pytorch (torchrun), slurm or mpi.
        timeout_s: how long ranks wait for one another, in seconds.
        backend: nccl or gloo; by default what fits the device.

    Returns:
        The backend, or None for the launcher "none".

    Raises:
        ValueError: no such launcher, or the process was not started by it.
    """
    if launcher == "none":
        return None
    if launcher not in LAUNCHERS:
        raise ValueError(f"no launcher {launcher!r}; there are none, {', '.join(LAUNCHERS)}")
    if torch.distributed.is_initialized():
        return str(torch.distributed.get_backend())
    if _SIGNS[launcher] not in os.environ:
        raise ValueError(
            f"launcher {launcher!r}, but {_SIGNS[launcher]} is not set: start with "
            "python -m torch.distributed.run (pytorch), srun (slurm) or mpirun (mpi), or choose "
            "launcher none"
        )
    os.environ.update(LAUNCHERS[launcher]())
    os.environ.setdefault("MASTER_PORT", "29500")  # torch.distributed's own default
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    atexit.register(_leave_group)
    return backend


def _leave_group() -> None:
    """Leave the process group at a clean end: gloo's threads otherwise abort the process now and
    then. After a crash, leaving could wait for the other ranks."""
    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        torch.distributed.destroy_process_group()


_SYNC_BATCH_NORMS = {"SyncBN", "MMSyncBN", "SyncBatchNorm"}


def _replace_sync_batch_norm(node: Any, where: str, changed: list[str]) -> None:
    """Turn SyncBN into BN in place, in a tree of dicts and lists."""
    if isinstance(node, dict):
        if node.get("type") in _SYNC_BATCH_NORMS:
            changed.append(f"{where}.type: {node['type']} -> BN")
            node["type"] = "BN"
        items: Any = node.items()
    elif isinstance(node, list | tuple):
        items = enumerate(node)
    else:
        return
    for key, value in items:
        _replace_sync_batch_norm(value, f"{where}.{key}", changed)


def cpu_safe_config(cfg: Any) -> list[str]:
    """Change, in place, what a config for GPUs asks and a CPU cannot give; with CUDA nothing.

    SyncBN becomes BN (torch has it on GPUs only; statistics are then per process), the wrapper of
    a distributed run gets no device ids, and the process group is gloo.

    Args:
        cfg: an mmengine Config.

    Returns:
        One line for each change, also logged.
    """
    if torch.cuda.is_available():
        return []
    changed: list[str] = []
    _replace_sync_batch_norm(cfg.get("model"), "model", changed)
    if cfg.get("sync_bn") is not None:
        changed.append(f"sync_bn: {cfg.sync_bn!r} -> None")
        cfg.sync_bn = None
    if cfg.get("launcher", "none") != "none":
        wrapper = cfg.get("model_wrapper_cfg")
        if wrapper is None:
            # what Runner.wrap_model builds when there is no model_wrapper_cfg
            wrapper = {
                "type": "MMDistributedDataParallel",
                "broadcast_buffers": False,
                "find_unused_parameters": cfg.get("find_unused_parameters", False),
            }
        if wrapper.get("device_ids", 0) is not None:
            wrapper["device_ids"] = None
            cfg.model_wrapper_cfg = wrapper
            changed.append("model_wrapper_cfg.device_ids: the local rank -> None")
        dist_cfg = cfg.get("env_cfg", {}).get("dist_cfg", {})
        if dist_cfg.get("backend", "gloo") != "gloo":
            changed.append(f"env_cfg.dist_cfg.backend: {dist_cfg['backend']} -> gloo")
            dist_cfg["backend"] = "gloo"
    for line in changed:
        print_log(f"no CUDA: {line}", "current", logging.WARNING)
    return changed
