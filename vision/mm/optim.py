"""Mixed precision that fits the device, and learning rates that fall with depth."""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from mmengine.runner.amp import autocast
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Forward passes under autocast, without a gradient scaler: bfloat16 on any device.

    Args:
        dtype: type of the computation.
        **kwargs: as for OptimWrapper.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cast_dtype = dtype

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Context of a training step's forward pass."""
        with super().optim_context(model), autocast(dtype=self.cast_dtype):
            yield


@OPTIM_WRAPPERS.register_module()
def AutoAmpOptimWrapper(
    dtype: str | None = None, loss_scale: Any = "dynamic", **kwargs: Any
) -> OptimWrapper:
    """Mixed precision: float16 with a gradient scaler on CUDA, bfloat16 without one on a CPU.

    mmengine's AmpOptimWrapper refuses to run without a GPU.

    Args:
        dtype: float16 or bfloat16; by default what suits the device.
        loss_scale: as for AmpOptimWrapper; for float16.
        **kwargs: as for OptimWrapper.

    Raises:
        ValueError: no such type, or float16 on a CPU.
    """
    cuda = torch.cuda.is_available()
    dtype = dtype or ("float16" if cuda else "bfloat16")
    if dtype not in _DTYPES:
        raise ValueError(f"mixed precision knows {' and '.join(_DTYPES)}, got {dtype!r}")
    if dtype == "bfloat16":
        return AutocastOptimWrapper(dtype=torch.bfloat16, **kwargs)
    if not cuda:
        raise ValueError("mixed precision with float16 needs a GPU; on a CPU use dtype='bfloat16'")
    return AmpOptimWrapper(loss_scale=loss_scale, dtype=dtype, **kwargs)


def collect(model: nn.Module, method: str) -> list[tuple[str, Any]]:
    """What the outermost modules that have a method return, with the modules' names.

    Returns:
        (name and a dot, or nothing for the model itself; returned value), in order.
    """
    found: list[tuple[str, Any]] = []

    def visit(module: nn.Module, prefix: str) -> None:
        if hasattr(module, method):
            found.append((prefix, getattr(module, method)()))
            return
        for name, child in module.named_children():
            visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor:
    """Learning rates that fall with the distance from the output (arXiv:2106.08254).

    The model, or a part of it such as its backbone, says by `layer_ids()` at which depth each of
    its parameters lies, 0 at the input. A parameter at depth d gets `lr * decay_rate ** (L + 1 -
    d)` for L layers, and what no part places (heads, necks) the full `lr`. What `no_weight_decay()`
    of the model or of a part names does not decay. Frozen parameters are left out.

    Keys of `paramwise_cfg`:
        decay_rate: factor of one layer, in (0, 1].
        num_layers: L; by default read off the depths: when the deepest group is the final norm (or
            the model's own classifier), L + 1 is its depth, otherwise it is layer L.
        norm_decay_mult: factor of the weight decay for norms.
        bias_decay_mult: the same for biases outside norms.
        flat_decay_mult: the same for all other parameters of one dimension.

    Args:
        optim_wrapper_cfg: an optim_wrapper config without `constructor` and `paramwise_cfg`.
        paramwise_cfg: the keys above.

    Raises:
        ValueError: an unknown key, a decay_rate out of range, or no `lr`.
    """

    KEYS = ("decay_rate", "num_layers", "norm_decay_mult", "bias_decay_mult", "flat_decay_mult")

    def __init__(
        self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None
    ) -> None:
        self.wrapper_cfg = {"type": "OptimWrapper", **optim_wrapper_cfg}
        self.optimizer_cfg = dict(self.wrapper_cfg.pop("optimizer"))
        self.rules = dict(paramwise_cfg or {})
        unknown = [key for key in self.rules if key not in self.KEYS]
        if unknown:
            raise ValueError(
                f"LayerDecayOptimWrapperConstructor: paramwise_cfg has no {', '.join(unknown)}; "
                f"there are {', '.join(self.KEYS)}"
            )
        if not 0 < self.rules.get("decay_rate", 0) <= 1:
            raise ValueError(
                "LayerDecayOptimWrapperConstructor needs paramwise_cfg.decay_rate in (0, 1], got "
                f"{self.rules.get('decay_rate')}"
            )
        if "lr" not in self.optimizer_cfg:
            raise ValueError("LayerDecayOptimWrapperConstructor needs optimizer.lr")

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build optimizer and wrapper for a model, plain or wrapped for distributed training."""
        groups = self.groups(getattr(model, "module", model))
        self._log(groups)
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, "params": groups})
        return OPTIM_WRAPPERS.build(self.wrapper_cfg, default_args={"optimizer": optimizer})

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups: params, lr, weight_decay, lr_scale, layer (L + 1 for heads).

        Raises:
            ValueError: no part of the model tells depths, a part names a parameter that is not
                there, or a depth beyond num_layers + 1.
        """
        parameters = dict(model.named_parameters())
        depths = self._depths(model, parameters)
        top = self._top(depths, parameters)
        no_decay = {
            prefix + name for prefix, names in collect(model, "no_weight_decay") for name in names
        }
        norms = {
            f"{name}.{p}" if name else p
            for name, module in model.named_modules()
            if isinstance(module, _NORMS)
            for p, _ in module.named_parameters(recurse=False)
        }
        lr, decay = self.optimizer_cfg["lr"], self.optimizer_cfg.get("weight_decay", 0.0)
        members: dict[tuple[int, float], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                mult = self._decay_mult(name, parameter, name in norms, name in no_decay)
                members[depths.get(name, top), decay * mult].append(parameter)
        groups = []
        for (layer, weight_decay), params in sorted(members.items(), key=lambda item: item[0]):
            scale = self.rules["decay_rate"] ** (top - layer)
            groups.append(
                {
                    "params": params,
                    "lr": lr * scale,
                    "weight_decay": weight_decay,
                    "lr_scale": scale,
                    "layer": layer,
                }
            )
        return groups

    @staticmethod
    def _depths(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, int]:
        parts = collect(model, "layer_ids")
        if not parts:
            raise ValueError(
                f"no part of {type(model).__name__} has layer_ids(), which says the depth of each "
                "parameter; layer decay works with ZooBackbone and ImageClassifier"
            )
        depths = {prefix + name: depth for prefix, ids in parts for name, depth in ids.items()}
        strangers = sorted(depths.keys() - parameters.keys())
        if strangers:
            raise ValueError(f"layer_ids() names parameters that are not there: {strangers[:5]}")
        return depths

    def _top(self, depths: dict[str, int], parameters: dict[str, nn.Parameter]) -> int:
        """Depth of the full learning rate, L + 1."""
        deepest = max(depths.values())
        if "num_layers" in self.rules:
            top = self.rules["num_layers"] + 1
            if deepest > top:
                raise ValueError(
                    f"num_layers={self.rules['num_layers']}, but the model has layers up to "
                    f"{deepest}; leave num_layers out or say {deepest - 1}"
                )
            return top
        heads = parameters.keys() - depths.keys()
        has_matrix = any(parameters[n].ndim > 1 for n, depth in depths.items() if depth == deepest)
        # a group of vectors is the final norm, which learns at the pace of the head; and without
        # separate heads the deepest group is the head
        return deepest + 1 if heads and has_matrix else deepest

    def _decay_mult(self, name: str, parameter: nn.Parameter, is_norm: bool, never: bool) -> float:
        if never:
            return 0.0
        if is_norm:
            return self.rules.get("norm_decay_mult", 1.0)
        if name.rpartition(".")[2] == "bias":
            return self.rules.get("bias_decay_mult", 1.0)
        if parameter.ndim <= 1:
            return self.rules.get("flat_decay_mult", 1.0)
        return 1.0

    def _log(self, groups: list[dict[str, Any]]) -> None:
        lines = ["layer   lr scale         lr  weight decay  tensors     numbers"]
        for group in groups:
            numbers = sum(math.prod(p.shape) for p in group["params"])
            lines.append(
                f"{group['layer']:5d} {group['lr_scale']:10.4g} {group['lr']:10.3g} "
                f"{group['weight_decay']:13.3g} {len(group['params']):8d} {numbers:11,d}"
            )
        print_log("learning rates by layer:\n" + "\n".join(lines), "current", logging.INFO)
