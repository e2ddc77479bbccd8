"""Fixtures for the tests of vision.mm."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOY = Path(__file__).with_name("toy_run.py")


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    """The module toy_run.py beside this file."""
    spec = importlib.util.spec_from_file_location("toy_run", TOY)
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_run"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def one_thread_environment(repo_root: Path) -> dict[str, str]:
    """Environment of a subprocess that imports the checkout and keeps to one core."""
    return {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run_toy(
    one_thread_environment: dict[str, str],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run toy_run.py as a program, in a session of its own; `ranks` > 1 starts that many."""

    def run(*args: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            args = (*args, "--launcher", "pytorch")
        command = [*start, str(TOY), *map(str, args)]
        process = subprocess.Popen(
            command,
            env=one_thread_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks, then itself
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in one order, so that runs can be compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
