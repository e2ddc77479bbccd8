"""Any timm model of the zoo (or of timm) as a backbone of an OpenMMLab model."""

from typing import Any

import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.models import group_parameters
from timm.models._features import FeatureGetterNet
from torch import Tensor

import vision  # noqa: F401 -- registers the models
from vision.models.factory import check_model_name
from vision.models.feature_maps import feature_maps


def timm_weights(checkpoint: str | None) -> dict[str, Any]:
    """Keywords for `timm.create_model` that load a weights file; none for random weights.

    Args:
        checkpoint: path of a weights file, "published" for the weights that timm would fetch, or
            None.
    """
    if checkpoint is None:
        return {"pretrained": False}
    if checkpoint == "published":
        return {"pretrained": True}
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": checkpoint}}


@MODELS.register_module()
class ZooBackbone(BaseModule):
    """Feature maps of a timm model, by name.

    Args:
        model_name: name as in `timm.list_models()`.
        out_indices: stages (or blocks, for plain models) whose output is returned.
        norm: apply the final norm to every output (plain models only).
        checkpoint: weights file to start from, "published", or None for random weights.
        frozen: keep the backbone's weights, and its norms in evaluation mode.
        grad_checkpointing: recompute the blocks in the backward pass to save memory.
        **model_args: passed to `timm.create_model` (img_size, drop_path_rate, patch_size, ...).

    Raises:
        ValueError: no model of that name; close names are listed.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: tuple[int, ...] | list[int],
        norm: bool = False,
        checkpoint: str | None = None,
        frozen: bool = False,
        grad_checkpointing: bool = False,
        **model_args: Any,
    ) -> None:
        super().__init__()
        check_model_name(model_name)
        weights = timm_weights(checkpoint)
        out_indices = tuple(out_indices)
        if norm:
            model = timm.create_model(model_name, num_classes=0, **weights, **model_args)
            self.body = FeatureGetterNet(model, out_indices=out_indices, norm=True)
        else:
            self.body = timm.create_model(
                model_name, features_only=True, out_indices=out_indices, **weights, **model_args
            )
        self.channels: list[int] = self.body.feature_info.channels()
        self.strides: list[int] = self.body.feature_info.reduction()
        self.frozen = frozen
        if grad_checkpointing:
            self._model.set_grad_checkpointing()
        if frozen:
            self.requires_grad_(False)

    @property
    def _model(self) -> Any:
        return getattr(self.body, "model", self.body)

    def train(self, mode: bool = True) -> "ZooBackbone":
        """Set training mode; a frozen backbone stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) to maps (B, C_i, H_i, W_i), one for each of `out_indices`."""
        return tuple(feature_maps(self.body, x))

    def layer_ids(self) -> dict[str, int]:
        """Depth of every parameter, 0 at the input, for layer-wise learning rates."""
        return parameter_depths(self, self._model)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the model asks not to decay."""
        return names_without_decay(self, self._model)


def _prefix(outer: torch.nn.Module, inner: torch.nn.Module) -> str:
    for name, module in outer.named_modules():
        if module is inner:
            return f"{name}." if name else ""
    raise AssertionError("the timm model is part of its wrapper")


def parameter_depths(outer: torch.nn.Module, model: Any) -> dict[str, int]:
    """Depth of each parameter of a timm `model`, under its name in `outer`.

    What the model names by `beside_layers()`, as an adapter does, has no depth.

    Raises:
        ValueError: the model has no `group_matcher`.
    """
    if not hasattr(model, "group_matcher"):
        raise ValueError(f"{type(model).__name__} has no group_matcher; layer decay needs one")
    prefix = _prefix(outer, model)
    depths = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    beside: set[str] = getattr(model, "beside_layers", set)()
    return {prefix + name: int(depth) for name, depth in depths.items() if name not in beside}


def names_without_decay(outer: torch.nn.Module, model: torch.nn.Module) -> set[str]:
    """What a timm `model` asks not to decay, under the names in `outer`."""
    prefix = _prefix(outer, model)
    return {prefix + name for name in getattr(model, "no_weight_decay", set)()}
