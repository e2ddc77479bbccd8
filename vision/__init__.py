"""Vision models of the RWKV family for PyTorch.

Importing makes the models known to timm (`timm.create_model("vrwkv_tiny_patch16_224")`) and does
nothing else. timm itself takes seconds to import, so it is not imported here: if it is loaded
already the models are registered now, else right after the program's own `import timm`.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from .version import __version__

__all__ = ["__version__"]


class _RegisterAfterTimm(MetaPathFinder):
    """Let the first `import timm` end with the registration of our models."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run_timm = spec.loader.exec_module

        def run_timm_and_register(module: ModuleType) -> None:
            run_timm(module)
            importlib.import_module("vision.models")

        spec.loader.exec_module = run_timm_and_register  # type: ignore[method-assign] # this import's loader only
        return spec


if "timm" in sys.modules:
    importlib.import_module("vision.models")
else:
    sys.meta_path.insert(0, _RegisterAfterTimm())
