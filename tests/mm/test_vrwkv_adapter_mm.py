"""The adapter in OpenMMLab: layer decay leaves it out, the recipes are the published ones."""

from pathlib import Path

import pytest
from mmengine.config import Config
from torch import nn

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.mm.backbone import ZooBackbone
from vision.mm.optim import LayerDecayOptimWrapperConstructor

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "vrwkv_adapter"
RECIPES = {  # learning rate, layer decay, drop path, channels
    "tiny": (1.2e-4, 0.95, 0.1, 192),
    "small": (6e-5, 0.85, 0.2, 384),
    "base": (6e-5, 0.8, 0.3, 768),
    "large": (6e-5, 0.9, 0.4, 1024),
}


def test_layer_decay_leaves_the_adapter_at_the_full_rate() -> None:
    model = nn.ModuleDict(
        {
            "backbone": ZooBackbone("vrwkv_adapter_nano", (0, 1, 2, 3), depth=3),
            "decode_head": nn.Linear(2, 2),
        }
    )
    rules = {"decay_rate": 0.5, "norm_decay_mult": 0.0}
    optimizer = {"type": "AdamW", "lr": 1.0, "weight_decay": 0.1}
    groups = LayerDecayOptimWrapperConstructor({"optimizer": optimizer}, rules).groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in groups for p in g["params"]}
    assert set(rates) == set(names.values())
    assert rates["decode_head.weight"] == 1.0
    inner = "backbone.body.model."
    for name, rate in rates.items():
        own = name.removeprefix(inner)
        if own.startswith("backbone.blocks."):
            assert rate == 0.5 ** (3 - int(own.split(".")[2])), name
        elif own.startswith(("backbone.", "norm_pre.")):
            assert rate == 0.5**4, name
        else:
            assert rate == 1.0, name
    decays = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert decays[f"{inner}level_embed"] == decays[f"{inner}backbone.pos_embed"] == 0
    assert decays[f"{inner}norms.0.weight"] == 0
    assert decays[f"{inner}up.weight"] == 0.1


@pytest.mark.parametrize("size", RECIPES)
def test_recipes_are_the_published_ones(size: str) -> None:
    cfg = Config.fromfile(CONFIGS / f"vrwkv-adapter-{size}_upernet_8xb2-160k_ade20k-512x512.py")
    rate, decay, drop, channels = RECIPES[size]
    assert cfg.optim_wrapper.optimizer.lr == rate
    assert cfg.optim_wrapper.optimizer.weight_decay == 0.01
    assert cfg.optim_wrapper.paramwise_cfg.decay_rate == decay
    assert cfg.model.backbone.drop_path_rate == drop
    assert cfg.model.backbone.model_name == f"vrwkv_adapter_{size}"
    assert cfg.model.decode_head.in_channels == [channels] * 4
    assert cfg.model.decode_head.channels == 512
    assert cfg.model.test_cfg.stride == (341, 341)
    assert cfg.train_cfg.max_iters == 160_000
    assert cfg.train_dataloader.batch_size == 2
