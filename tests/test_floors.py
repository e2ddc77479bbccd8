"""A file imports only from its own floor or from a lower one."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    ("vision.kernels",),
    ("vision.layers",),
    ("vision.models",),
    ("vision.sam", "vision.data", "vision.losses", "vision.metrics"),
    ("vision.mm",),
    ("tools", "benchmarks", "configs", "examples"),
)
MM = {"mmengine", "mmseg", "mmcv", "mmdet"}
NOT_IN_KERNELS = {"timm", *MM, "albumentations", "cv2", "sklearn"}


def _files() -> list[Path]:
    # vision/kernels is a link to kernels/.
    tops = ("kernels", "vision", "tools", "benchmarks", "examples", "configs")
    found = [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]
    return [p for p in found if p.relative_to(ROOT).parts[:2] != ("vision", "kernels")]


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("vision", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts)


def _imports(source: str, module: str) -> set[str]:
    """Return what a module imports, at any depth of its code, as absolute names.

    Args:
        source: its text.
        module: its dotted name, with `.__init__` if it is one.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def _floor(name: str) -> int | None:
    for height, packages in enumerate(FLOORS):
        if any(name == p or name.startswith(p + ".") for p in packages):
            return height
    return None


def _broken(source: str, module: str) -> list[str]:
    """Say which imports of a module break the rules."""
    own = _floor(module)
    broken = []
    for name in sorted(_imports(source, module)):
        top = name.split(".")[0]
        height = _floor(name)
        if own is not None and height is not None and height > own:
            broken.append(f"{module} imports {name} from a higher floor")
        if top in ("tools", "benchmarks", "configs", "examples") and not module.startswith(top):
            broken.append(f"{module} imports {name}, which nobody may")
        if top in MM and own is not None and own < 4:
            broken.append(f"{module} imports {name}: only vision/mm may")
        if module.startswith("vision.kernels") and top in NOT_IN_KERNELS:
            broken.append(f"{module} imports {name}: kernels need torch alone")
    return broken


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_the_floors(path: Path) -> None:
    assert _broken(path.read_text(), _module(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vision.kernels.bi_wkv.__init__", "from ...layers import block"),
        ("vision.kernels.scan", "def f():\n    import timm.layers"),
        ("vision.layers.block", "from ..models.vrwkv import VRWKV"),
        ("vision.layers.block", "from .. import models"),
        ("vision.models.vrwkv", "import vision.sam.predictor"),
        ("vision.models.vrwkv", "from mmengine.model import BaseModule"),
        ("vision.data.scenes", "from vision.mm import backbone"),
        ("vision.mm.backbone", "from tools.train import main"),
    ],
)
def test_the_check_finds(module: str, source: str) -> None:
    assert _broken(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("vision.kernels.bi_wkv.__init__", "from ..dispatch import Backend"),
        ("vision.layers.mixers", "from ..kernels import bi_wkv"),
        ("vision.mm.backbone", "import timm, mmengine\nfrom vision.models import vrwkv"),
        ("vision.data.scenes", "from ..losses import dice"),
        ("tools.train", "from mmengine.runner import Runner"),
    ],
)
def test_the_check_lets_pass(module: str, source: str) -> None:
    assert not _broken(source, module)
