"""The models that benchmarks/highres_seg.py measures: a backbone, alone or with a head."""

import dataclasses
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from benchmarks.measure import Call, Row

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD, TRAINING = "forward", "training step"
CLASSES = 150  # of ADE20K


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one row measures; height and width are in pixels."""

    model: str
    height: int
    width: int
    task: str = FORWARD
    head: str = "none"
    precision: str = "fp32"
    compiled: bool = False
    device: str = "cpu"
    threads: int = 1
    batch: int = 1

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width

    def matches(self, row: Row) -> bool:
        """Whether a row was measured with this setting."""
        return all(row[key] == value for key, value in dataclasses.asdict(self).items())


def backbone(name: str, hw: tuple[int, int]) -> tuple[nn.Module, dict[str, Any]]:
    """A backbone for images of this size, and the keywords that adapted it (none: it needs none).

    Windows keep their size: timm pads maps to multiples of it.
    """
    try:
        return timm.create_model(name, num_classes=0, img_size=hw), {"img_size": hw}
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise
    return timm.create_model(name, num_classes=0), {}


def with_head(name: str, hw: tuple[int, int], head: str) -> nn.Module:
    """An mmseg model of a backbone and a head: "upernet", or "fcn" for a linear classifier.

    A plain backbone, of one stride, gives four of its blocks to UPerNet through Feature2Pyramid.
    """
    from mmengine.config import Config
    from mmengine.registry import MODELS as REGISTRY
    from mmengine.registry import init_default_scope

    import vision.mm  # noqa: F401 -- registers the zoo with mmengine
    from vision.mm.compat import cpu_safe_config

    body, adapted = backbone(name, hw)
    info: Any = body.feature_info
    strides = [stage["reduction"] for stage in info]
    count, plain = len(info), len(set(strides)) == 1
    wanted = [count * (i + 1) // 4 - 1 for i in range(4)] if plain else range(count - 4, count)
    if head == "fcn":
        wanted = [count - 1]
    channels = [info[i]["num_chs"] for i in wanted]
    file = {"fcn": "linear_plain", "upernet": f"upernet_{'plain' if plain else 'pyramid'}"}[head]
    cfg = Config.fromfile(ROOT / "configs" / "_base_" / "models" / f"{file}.py")
    cpu_safe_config(cfg)
    model = cfg.model
    model.backbone.update(model_name=name, out_indices=tuple(wanted), **adapted)
    model.decode_head.num_classes = CLASSES
    if head == "fcn":
        model.decode_head.update(in_channels=channels[0], channels=channels[0])
    else:
        model.decode_head.in_channels = channels
        model.auxiliary_head.update(in_channels=channels[2], num_classes=CLASSES)
        if plain:
            rescales = [strides[0] / stride for stride in (4, 8, 16, 32)]
            model.neck.update(embed_dim=channels[0], rescales=rescales)
    init_default_scope("mmseg")
    return REGISTRY.build(model)


def build(setting: Setting) -> nn.Module:
    """The model of a row, on the CPU."""
    if setting.head == "none":
        return backbone(setting.model, setting.hw)[0]
    return with_head(setting.model, setting.hw, setting.head)


def pass_of(setting: Setting, model: nn.Module) -> Call:
    """The call that a row measures, its model moved to where and what it computes in."""
    device = torch.device(setting.device)
    dtype = DTYPES[setting.precision]
    training = setting.task == TRAINING
    model.to(device=device, dtype=torch.float32 if training else dtype).train(training)
    x = torch.randn(setting.batch, 3, *setting.hw, device=device)
    run = torch.compile(model) if setting.compiled else model
    if not training:
        x = x.to(dtype)
        return torch.inference_mode()(lambda: run(x))
    arguments = _labels(setting, model) if setting.head != "none" else ()

    def step() -> None:
        model.zero_grad(set_to_none=False)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = run(x, *arguments)
            if isinstance(out, dict):  # the losses of an mmseg model, beside its accuracies
                out = [value for key, value in out.items() if "loss" in key]
            loss = sum(leaf.float().square().mean() for leaf in tree_leaves(out))
        loss.backward()

    step()  # the gradients are there before memory is measured
    return step


def _labels(setting: Setting, model: nn.Module) -> tuple[Any, str]:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    for name, module in model.named_modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and not name.startswith("backbone."):
            module.eval()
    samples = []
    for _ in range(setting.batch):
        labels = torch.randint(CLASSES, (1, *setting.hw), device=setting.device)
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels)))
    return samples, "loss"
