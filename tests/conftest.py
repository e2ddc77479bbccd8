"""Fixtures that every test folder shares."""

import os
from pathlib import Path

import hypothesis
import pytest

# The same examples in every run, so that a change is judged by what it changes; a search for new
# ones is `HYPOTHESIS_PROFILE=search python -m pytest`.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Tests that run side by side (-n auto) have a core each; threads that wait for each other while
# another process has their core make everything slower many times over.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# albumentations asks the network for its newest version at import unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of golden files and real data: `$VISION_SHARED`, or ../shared beside the checkout."""
    folder = Path(os.environ.get("VISION_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no golden files or real data: {folder} is missing (set VISION_SHARED)")
    return folder
