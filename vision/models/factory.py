"""Models of timm by name, with errors that say what was wanted."""

import difflib
from typing import Any

import timm
from torch import nn

from .checkpoint import CheckpointError

__all__ = ["check_model_name", "make_model"]


def check_model_name(name: str) -> None:
    """Raise if timm knows no such model.

    Args:
        name: a model's name, with the tag of its weights or without.

    Raises:
        ValueError: with the closest names.
    """
    if timm.is_model(name.split(".")[0]):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4)
    raise ValueError(
        f"timm has no model {name!r}; close names: {', '.join(near) or 'none'} "
        "(timm.list_models('vrwkv*') lists the zoo's)"
    )


def make_model(name: str, **options: Any) -> nn.Module:
    """Do as `timm.create_model`, for what a user typed.

    Args:
        name: a model's name.
        **options: passed to `timm.create_model`.

    Raises:
        ValueError: no such model, an option it does not have, or weights of another shape.
        CheckpointError: weights of the zoo's that do not fit it.
        FileNotFoundError: no such weights file.
    """
    check_model_name(name)
    try:
        return timm.create_model(name, **options)
    except CheckpointError:
        raise
    except (RuntimeError, TypeError) as error:  # shapes of weights; an option it does not have
        raise ValueError(f"could not make {name} with {options}: {error}") from error
