"""First values of the decay, bonus and mix parameters of the RWKV-4 family (arXiv:2305.13048).

Three modes, as Vision-RWKV names them: "fancy" spreads the channels from local to global by depth
(the published models), "local" starts with strong decay and no shift, "global" with none and half.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def depth_ratio(layer: int, depth: int) -> float:
    """Place of a layer in the network, 0 for the first and 1 for the last; 0 if there is one."""
    return layer / (depth - 1) if depth > 1 else 0.0


def _channel_ramp(dim: int) -> Tensor:
    return torch.arange(dim, dtype=torch.float32) / dim


def _fancy_spatial(dim: int, layer: int, depth: int) -> dict[str, Tensor]:
    up = depth_ratio(layer, depth)
    down = 1.0 - layer / depth  # 1 at the first layer, 1/depth at the last
    place = torch.arange(dim, dtype=torch.float32) / max(dim - 1, 1)
    zigzag = ((torch.arange(dim) + 1) % 3 - 1) * 0.5
    ramp = _channel_ramp(dim)
    return {
        "decay": -5 + 8 * place ** (0.7 + 1.3 * up),
        "bonus": math.log(0.3) + zigzag,
        "k": ramp**down,
        "v": ramp**down + 0.3 * up,
        "r": ramp ** (0.5 * down),
    }


def _constant_spatial(wkv: float, mix: float) -> Callable[[int, int, int], dict[str, Tensor]]:
    def values(dim: int, layer: int, depth: int) -> dict[str, Tensor]:
        first = {name: torch.full((dim,), wkv) for name in ("decay", "bonus")}
        return first | {name: torch.full((dim,), mix) for name in ("k", "v", "r")}

    return values


SPATIAL_INIT: dict[str, Callable[[int, int, int], dict[str, Tensor]]] = {
    "fancy": _fancy_spatial,
    "local": _constant_spatial(wkv=1.0, mix=1.0),
    "global": _constant_spatial(wkv=0.0, mix=0.5),
}


def spatial_init(mode: str, dim: int, layer: int, depth: int) -> dict[str, Tensor]:
    """First values of a spatial mix: decay, bonus, and the mix proportions k, v, r, each (dim,).

    Raises:
        ValueError: `mode` is not fancy, local or global.
    """
    if mode not in SPATIAL_INIT:
        raise ValueError(f"no init mode {mode!r}; there are {', '.join(SPATIAL_INIT)}")
    return SPATIAL_INIT[mode](dim, layer, depth)


def channel_init(mode: str, dim: int, layer: int, depth: int) -> dict[str, Tensor]:
    """First mix proportions k and r of a channel mix, each (dim,).

    Raises:
        ValueError: `mode` is not fancy, local or global.
    """
    proportion = spatial_init(mode, dim, layer, depth)["k"]
    return {"k": proportion, "r": proportion}
