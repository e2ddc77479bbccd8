"""Fixtures that every test folder shares."""

import os
from pathlib import Path

import pytest

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
