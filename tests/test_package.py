"""What users install and run first."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

from vision import version

ROOT = Path(__file__).resolve().parents[1]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that are loaded after a statement, in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == "", "importing says nothing"
    return set(done.stdout.split())


def test_imports_stay_light() -> None:
    heavy = {"timm", "mmengine", "mmseg", "mmcv", "albumentations", "sklearn", "matplotlib"}
    assert not loaded_by("import vision, vision.kernels, vision.data") & heavy
    assert not loaded_by("import vision.models") & (heavy - {"timm"})


@pytest.mark.parametrize(
    "statement",
    [
        "import vision, timm",
        "import timm, vision",
        "import vision.layers, timm",
        "import vision.models.vrwkv, timm",
        "import vision; from timm.layers import DropPath; import timm",
    ],
)
def test_models_are_registered_in_any_order(statement: str) -> None:
    loaded_by(f"{statement}\nassert 'vrwkv_tiny_patch16_224' in timm.list_models('vrwkv*')")


def test_every_folder_is_packaged() -> None:
    packages = set(find_packages(str(ROOT), include=["vision", "vision.*"]))
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "vision").glob("**/__init__.py")
    }
    assert folders <= packages
    assert {"vision.kernels", "vision.kernels.bi_wkv", "vision.mm"} <= packages


def test_ci_runs_the_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    test_command = 'pip install -e ".[demo,test,dev]" && python -m pytest -n auto --dist loadfile'
    assert test_command in readme
    install, test = (part.strip() for part in test_command.split("&&"))
    lines = [line.strip() for line in script.splitlines()]
    assert install in lines
    assert test in lines


def test_readme_names_files_that_exist() -> None:
    import re

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"(?:tools|configs|docs|benchmarks)/[\w./-]+", readme):
        assert (ROOT / name.rstrip(".")).exists(), name


def test_the_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = version.git_commit()
    if (ROOT / ".git").exists() and shutil.which("git"):
        assert found is not None
        assert re.fullmatch(r"[0-9a-f]{40}\+?", found)
    monkeypatch.setenv("PATH", str(tmp_path))  # a machine without git
    assert version.git_commit() is None
