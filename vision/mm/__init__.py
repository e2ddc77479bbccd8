"""The zoo in OpenMMLab: importing registers everything with mmengine's root registries.

The repairs that old mm needs on today's torch come first; then `_base_` configs, `Runner` and
mmseg's models work with the zoo's backbones, data sets, transforms and hooks by name.
"""

from . import compat

compat.install()

from . import (  # noqa: E402 -- compat must come before anything that imports mmcv.ops
    backbone,
    checkpoint,
    classifier,
    datasets,
    distillation,
    hooks,
    losses,
    mae,
    metrics,
    optim,
    pictures,
    promptable,
    promptable_data,
    promptable_metrics,
    resume,
    tiling,
    transforms,
)

__all__ = [
    "backbone",
    "checkpoint",
    "classifier",
    "compat",
    "datasets",
    "distillation",
    "hooks",
    "losses",
    "mae",
    "metrics",
    "optim",
    "pictures",
    "promptable",
    "promptable_data",
    "promptable_metrics",
    "resume",
    "tiling",
    "transforms",
]
