"""Mixed precision by device, and learning rates by depth."""

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from torch import nn

from vision.mm.optim import AutoAmpOptimWrapper, AutocastOptimWrapper, collect


class Backbone(nn.Module):
    """Embedding, three blocks and, unless it is left out, a final norm."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 6))
        self.embed = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(3)
        )
        self.gamma = nn.Parameter(torch.ones(6))  # of the last block
        self.norm = nn.LayerNorm(6) if norm else nn.Identity()

    def layer_ids(self) -> dict[str, int]:
        ids = {"pos_embed": 0, "embed.weight": 0, "embed.bias": 0, "gamma": 3}
        for i in range(3):
            ids.update({f"blocks.{i}.{j}.{p}": i + 1 for j in (0, 1) for p in ("weight", "bias")})
        if isinstance(self.norm, nn.LayerNorm):
            ids.update({"norm.weight": 4, "norm.bias": 4})
        return ids

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}


class Model(BaseModel):
    """A backbone with a head."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.backbone = Backbone(norm)
        self.head = nn.Linear(6, 2)

    def forward(self, x, y=None, mode="tensor"):
        for block in self.backbone.blocks:
            x = block(x)
        self.dtype = x.dtype
        x = self.head(x).float()
        return {"loss": nn.functional.cross_entropy(x, y)} if mode == "loss" else x


def build(model: nn.Module, optimizer: dict | None = None, **rules) -> OptimWrapper:
    return build_optim_wrapper(
        model,
        {
            "type": "OptimWrapper",
            "optimizer": optimizer or {"type": "AdamW", "lr": 0.1, "weight_decay": 0.05},
            "constructor": "LayerDecayOptimWrapperConstructor",
            "paramwise_cfg": {"decay_rate": 0.5, **rules},
        },
    )


def table(wrapper: OptimWrapper, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Name of a parameter -> (lr, weight decay)."""
    names = {id(p): n for n, p in model.named_parameters()}
    rows: dict[str, tuple[float, float]] = {}
    for group in wrapper.optimizer.param_groups:
        for p in group["params"]:
            assert names[id(p)] not in rows
            rows[names[id(p)]] = (group["lr"], group["weight_decay"])
    return rows


RULES = {"norm_decay_mult": 0.0, "bias_decay_mult": 0.2, "flat_decay_mult": 0.4}
EXPECTED = {
    "backbone.pos_embed": (0.1 / 16, 0.0),
    "backbone.embed.weight": (0.1 / 16, 0.05),
    "backbone.embed.bias": (0.1 / 16, 0.01),
    "backbone.blocks.0.0.weight": (0.1 / 8, 0.0),
    "backbone.blocks.0.0.bias": (0.1 / 8, 0.0),
    "backbone.blocks.0.1.weight": (0.1 / 8, 0.05),
    "backbone.blocks.0.1.bias": (0.1 / 8, 0.01),
    "backbone.blocks.1.0.weight": (0.1 / 4, 0.0),
    "backbone.blocks.1.0.bias": (0.1 / 4, 0.0),
    "backbone.blocks.1.1.weight": (0.1 / 4, 0.05),
    "backbone.blocks.1.1.bias": (0.1 / 4, 0.01),
    "backbone.blocks.2.0.weight": (0.1 / 2, 0.0),
    "backbone.blocks.2.0.bias": (0.1 / 2, 0.0),
    "backbone.blocks.2.1.weight": (0.1 / 2, 0.05),
    "backbone.blocks.2.1.bias": (0.1 / 2, 0.01),
    "backbone.gamma": (0.1 / 2, 0.02),
    "backbone.norm.weight": (0.1, 0.0),
    "backbone.norm.bias": (0.1, 0.0),
    "head.weight": (0.1, 0.05),
    "head.bias": (0.1, 0.01),
}


def approx(rows: dict[str, tuple[float, float]]) -> dict[str, object]:
    return {name: pytest.approx(row, rel=1e-12, abs=1e-15) for name, row in rows.items()}


def test_rates_and_decays_of_every_parameter():
    model = Model()
    assert table(build(model, **RULES), model) == approx(EXPECTED)


def test_a_wrapped_model_has_the_same_groups():
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = Model()
    assert table(build(Wrapper(model), **RULES), model) == approx(EXPECTED)


def test_without_a_final_norm_the_last_block_is_a_layer_below_the_head():
    model = Model(norm=False)
    expected = {name: row for name, row in EXPECTED.items() if "backbone.norm" not in name}
    assert table(build(model, **RULES), model) == approx(expected)
    assert table(build(model, **RULES, num_layers=3), model) == approx(expected)


def test_frozen_parameters_are_left_out():
    model = Model()
    model.backbone.embed.requires_grad_(False)
    expected = {name: row for name, row in EXPECTED.items() if ".embed." not in name}
    assert table(build(model, **RULES), model) == approx(expected)


def test_without_rules_all_decay_but_what_the_model_names():
    model = Model()
    rows = table(build(model), model)
    assert {name for name, row in rows.items() if row[1] != 0.05} == {"backbone.pos_embed"}


def test_a_model_that_places_its_own_head():
    class Whole(Model):
        def layer_ids(self) -> dict[str, int]:
            ids = {f"backbone.{name}": depth for name, depth in self.backbone.layer_ids().items()}
            return {**ids, "head.weight": 4, "head.bias": 4}

    model = Whole()
    rows = table(build(model, norm_decay_mult=0.0), model)
    assert rows["head.weight"] == pytest.approx((0.1, 0.05))
    assert rows["backbone.blocks.2.1.weight"] == pytest.approx((0.05, 0.05))
    assert rows["backbone.pos_embed"] == pytest.approx((0.1 / 16, 0.0))  # asked of the part
    assert [prefix for prefix, _ in collect(model, "layer_ids")] == [""]


def test_zoo_models_say_their_depths():
    """The backbone of a segmentor and a classifier of the zoo, by their own layer_ids."""
    from mmengine.registry import MODELS

    zoo = MODELS.build(
        {
            "type": "ZooBackbone",
            "model_name": "vit_tiny_patch16_224",
            "out_indices": [11],
            "img_size": 32,
        }
    )
    model = nn.ModuleDict({"backbone": zoo, "head": nn.Linear(2, 2)})
    rows = table(build(model, norm_decay_mult=0.0), model)
    assert rows["head.weight"][0] == pytest.approx(0.1)
    for name, (lr, _) in rows.items():
        if "blocks." in name:
            block = int(name.partition("blocks.")[2].partition(".")[0])
            assert lr == pytest.approx(0.1 * 0.5 ** (12 - block)), name
    first = [row for name, row in rows.items() if "patch_embed" in name or "pos_embed" in name]
    assert [row[0] for row in first] == [pytest.approx(0.1 * 0.5**13)] * 3
    assert [row[1] for name, row in rows.items() if "pos_embed" in name] == [0.0]


def test_schedules_keep_the_ratios():
    from mmengine.optim import CosineAnnealingLR

    model = Model()
    wrapper = build(model, **RULES)
    schedule = CosineAnnealingLR(wrapper, T_max=4, by_epoch=False)
    for _ in range(2):
        wrapper.step()
        schedule.step()
    halved = {name: (lr / 2, decay) for name, (lr, decay) in EXPECTED.items()}
    assert table(wrapper, model) == approx(halved)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"norm_decay": 0}, "paramwise_cfg has no norm_decay; there are decay_rate"),
        ({"decay_rate": 1.5}, r"decay_rate in \(0, 1\], got 1.5"),
        ({"decay_rate": 0}, "got 0"),
        ({"num_layers": 2}, "layers up to 4; leave num_layers out or say 3"),
    ],
)
def test_wrong_rules_are_errors(rules, message):
    with pytest.raises(ValueError, match=message):
        build(Model(), **rules)


def test_a_model_that_cannot_say_its_depths_is_an_error():
    with pytest.raises(ValueError, match=r"no part of Linear has layer_ids\(\)"):
        build(nn.Linear(2, 2))
    model = Model()
    model.backbone.layer_ids = lambda: {"nothing.weight": 0}
    with pytest.raises(ValueError, match=r"not there: \['backbone\.nothing\.weight"):
        build(model)
    with pytest.raises(ValueError, match=r"needs optimizer\.lr"):
        build(Model(), optimizer={"type": "AdamW"})


def test_the_table_is_logged(tmp_path):
    MMLogger.get_instance("layer_decay", log_file=str(tmp_path / "log"))
    build(Model(), **RULES)
    text = (tmp_path / "log").read_text()
    assert "learning rates by layer" in text
    rows = [line.split() for line in text.splitlines() if line.split()[0].isdigit()]
    assert sum(int(row[4]) for row in rows) == len(EXPECTED)
    assert rows[0][:3] == ["0", "0.0625", "0.00625"]


# --- mixed precision ---


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_mixed_precision_on_a_cpu_is_bfloat16_and_trains(no_gpu):
    torch.manual_seed(0)
    model = Model()
    wrapper = build_optim_wrapper(
        model,
        {
            "type": "AutoAmpOptimWrapper",
            "optimizer": {"type": "SGD", "lr": 0.1},
            "clip_grad": {"max_norm": 1.0},
            "accumulative_counts": 2,
        },
    )
    assert isinstance(wrapper, AutocastOptimWrapper)
    batch = {"x": torch.randn(8, 6), "y": torch.arange(8) % 2}
    before = model.head.weight.detach().clone()
    losses = [float(model.train_step(batch, wrapper)["loss"]) for _ in range(20)]
    assert model.dtype == torch.bfloat16
    assert model.head.weight.dtype == torch.float32
    assert model.head.weight.grad is None or model.head.weight.grad.dtype == torch.float32
    assert not torch.equal(model.head.weight, before)
    assert losses[-1] < losses[0]
    model(batch["x"])
    assert model.dtype == torch.float32  # outside of a training step nothing is cast


def test_mixed_precision_that_a_cpu_has_not_is_an_error(no_gpu):
    optimizer = sgd(Model())
    with pytest.raises(ValueError, match="needs a GPU; on a CPU use dtype='bfloat16'"):
        AutoAmpOptimWrapper(dtype="float16", optimizer=optimizer)
    with pytest.raises(ValueError, match="knows float16 and bfloat16, got 'fp16'"):
        AutoAmpOptimWrapper(dtype="fp16", optimizer=optimizer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_mixed_precision_on_a_gpu():
    model = Model().cuda()
    batch = {"x": torch.randn(8, 6).cuda(), "y": (torch.arange(8) % 2).cuda()}
    for dtype, kind in ((None, AmpOptimWrapper), ("bfloat16", AutocastOptimWrapper)):
        wrapper = AutoAmpOptimWrapper(dtype=dtype, optimizer=sgd(model))
        assert type(wrapper) is kind
        model.train_step(batch, wrapper)
        assert model.dtype == (torch.bfloat16 if dtype else torch.float16)
