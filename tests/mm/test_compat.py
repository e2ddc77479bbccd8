"""Old mm on today's torch: the stand-in for mmcv._ext, packages, processes, configs."""

import importlib.machinery
import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor
from torch.testing import assert_close

from vision.mm import compat, mmcv_ext


@pytest.fixture(scope="module")
def ops():
    """mmcv.ops on top of the stand-in."""
    compat.install()
    import mmcv.ops

    return mmcv.ops


def grads(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a weighted sum of `y`."""
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weight).sum(), inputs)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


# --- installing ---


def test_install_twice_keeps_one_stand_in_and_the_probes_answer_no(ops):
    from mmcv.utils.ext_loader import check_ops_exist
    from mmengine.utils.dl_utils import mmcv_full_available

    before = sys.modules[mmcv_ext.NAME]
    compat.install()
    assert mmcv_ext.install()
    assert sys.modules[mmcv_ext.NAME] is before
    assert isinstance(before, mmcv_ext.StandIn)
    assert not mmcv_full_available()
    assert not check_ops_exist()


def test_a_real_extension_wins(monkeypatch, tmp_path):
    (tmp_path / "_ext.py").touch()
    spec = importlib.machinery.ModuleSpec("mmcv", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.delitem(sys.modules, mmcv_ext.NAME, raising=False)
    assert not mmcv_ext.install()
    assert mmcv_ext.NAME not in sys.modules
    (tmp_path / "_ext.py").unlink()
    assert mmcv_ext.install()


def test_without_mmcv_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install mmengine mmcv-lite"):
        mmcv_ext.is_compiled()


def test_an_operator_without_stand_in_says_so_when_called(ops):
    mask = ops.PSAMask("collect", (3, 3))
    with pytest.raises(RuntimeError, match="'psamask_forward' exists only in mmcv's compiled"):
        mask(torch.zeros(1, 9, 2, 2))
    with pytest.raises(RuntimeError, match="pool_mode='max'"):
        ops.RoIAlign((2, 2), pool_mode="max")(torch.ones(1, 1, 4, 4), torch.zeros(1, 5))
    module = sys.modules[mmcv_ext.NAME]
    assert not hasattr(module, "__wrapped__")
    with pytest.raises(AttributeError, match="__file__"):
        _ = module.__file__


# --- the stand-in's operators ---


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_is_greedy_suppression(ops, offset):
    generator = torch.Generator().manual_seed(0)
    corner = torch.randint(0, 20, (60, 2), generator=generator).float()
    boxes = torch.cat([corner, corner + torch.randint(1, 9, (60, 2), generator=generator)], 1)
    scores = torch.rand(60, generator=generator)

    def iou(a: Tensor, b: Tensor) -> float:
        side = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2]) + offset).clamp(min=0)
        areas = [float((c[2:] - c[:2] + offset).prod()) for c in (a, b)]
        return float(side.prod()) / (sum(areas) - float(side.prod()))

    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i], boxes[j]) <= 0.3017 for j in kept):
            kept.append(i)
    _, found = ops.nms(boxes, scores, 0.3017, offset=offset)
    assert found.tolist() == kept
    assert len(kept) < 60


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_is_torchvisions(ops, aligned, ratio):
    from torchvision.ops import roi_align

    x = random(2, 3, 9, 8)
    rois = torch.tensor([[0, 1, 2, 14, 11], [1, 0, 0, 9, 16]], dtype=torch.float64)
    layer = ops.RoIAlign((3, 2), 0.5, ratio, aligned=aligned)
    y = layer(x, rois)
    expected = roi_align(x, rois, (3, 2), 0.5, ratio or -1, aligned)
    assert_close(y, expected)
    assert_close(grads(y, x), grads(expected, x))


def test_deform_conv_without_offset_is_a_convolution(ops):
    x, weight = random(2, 4, 7, 6), random(6, 2, 3, 3, seed=1)
    y = ops.deform_conv2d(x, torch.zeros(2, 18, 4, 3).double(), weight, 2, 1, 1, 2)
    expected = F.conv2d(x, weight, stride=2, padding=1, groups=2)
    assert_close(y, expected)
    assert_close(grads(y, x, weight), grads(expected, x, weight))


def test_deform_conv_offsets_are_rows_then_columns(ops):
    """An offset of a whole pixel moves the picture under the kernel."""
    x, weight = random(1, 1, 6, 6), random(1, 1, 1, 1, seed=1)
    offset = torch.zeros(1, 2, 6, 6).double()
    offset[:, 0] = 1  # down
    y = ops.deform_conv2d(x, offset, weight)
    assert_close(y[..., :5, :], (x * weight)[..., 1:, :])


def test_deform_conv_gradients(ops):
    x, offset, weight = random(2, 4, 5, 5), random(2, 36, 5, 5, seed=1), random(3, 4, 3, 3, seed=2)
    call = lambda x, o, w: ops.deform_conv2d(x, o, w, 1, 1, 1, 1, 2)  # noqa: E731 -- for gradcheck
    assert torch.autograd.gradcheck(call, (x, offset, weight), fast_mode=True)


@pytest.mark.parametrize("bias", [False, True])
def test_modulated_deform_conv(ops, bias):
    x, offset, weight = random(2, 4, 5, 5), random(2, 18, 5, 5, seed=1), random(4, 2, 3, 3, seed=2)
    mask, b = random(2, 9, 5, 5, seed=3), random(4, seed=4) if bias else None
    inputs = (x, offset, mask, weight) + ((b,) if bias else ())

    def call(x, offset, mask, weight, b=None):
        return ops.modulated_deform_conv2d(x, offset, mask, weight, b, 1, 1, 1, 2, 1)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    plain = call(x, torch.zeros_like(offset), torch.ones_like(mask), weight, b)
    assert_close(plain, F.conv2d(x, weight, b, padding=1, groups=2))
    half = call(x, torch.zeros_like(offset), torch.full_like(mask, 0.5), weight)
    assert_close(half, 0.5 * F.conv2d(x, weight, padding=1, groups=2))


@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(ops, weighted):
    x, target = random(5, 3), torch.tensor([0, 2, 1, 2, 0])
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64) if weighted else None
    y = ops.sigmoid_focal_loss(x, target, 2.0, 0.25, weight, "none")
    p, hit = x.sigmoid(), F.one_hot(target, 3).bool()
    expected = torch.where(hit, -0.25 * (1 - p) ** 2 * p.log(), -0.75 * p**2 * (1 - p).log()) * (
        weight[target][:, None] if weighted else 1
    )
    assert_close(y, expected)
    y = ops.sigmoid_focal_loss(x, target, 2.0, 0.25, weight, "mean")
    assert_close(grads(y, x), grads(expected.sum() / 5, x))


def test_sigmoid_focal_loss_of_background(ops):
    x, background = random(2, 3), torch.full((2,), 3)
    y = ops.sigmoid_focal_loss(x, background, 2.0, 0.25, None, "none")
    assert_close(y, -0.75 * x.sigmoid() ** 2 * (1 - x.sigmoid()).log())
    with pytest.raises(ValueError, match="no weight"):
        ops.sigmoid_focal_loss(x, background, 2.0, 0.25, torch.ones(3).double(), "none")


def test_ms_deform_attn_is_mmcvs_own_definition(ops):
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )

    shapes, starts = torch.tensor([[6, 5], [3, 2]]), torch.tensor([0, 30])
    value, places = random(2, 36, 3, 4), random(2, 7, 3, 2, 4, 2, seed=1)
    weights = random(2, 7, 3, 2, 4, seed=2)
    y = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, places, weights, 64)
    expected = multi_scale_deformable_attn_pytorch(value, shapes, places, weights)
    assert_close(y, expected)
    inputs = (value, places, weights)
    assert_close(grads(y, *inputs), grads(expected, *inputs))


# --- mmseg ---


@pytest.fixture(scope="module")
def mmseg_models():
    """mmseg's registry of models."""
    compat.install()
    import mmseg.models  # noqa: F401 -- registers the heads
    from mmengine.registry import MODELS

    return MODELS


COMMON = {"num_classes": 4, "norm_cfg": {"type": "BN"}, "align_corners": False, "channels": 8}
HEADS = {
    "UPerHead": {"in_channels": [4, 6, 8, 8], "in_index": [0, 1, 2, 3], "pool_scales": (1, 2)},
    "SegformerHead": {"in_channels": [4, 6, 8, 8], "in_index": [0, 1, 2, 3]},
    "FCNHead": {"in_channels": 6, "in_index": 1, "num_convs": 1},
}


@pytest.mark.parametrize("name", HEADS)
def test_mmseg_heads_train(mmseg_models, name):
    init_default_scope("mmseg")  # a run of an earlier test may have left another one
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    torch.manual_seed(0)
    head = mmseg_models.build({"type": f"mmseg.{name}", **COMMON, **HEADS[name]})
    maps = [torch.randn(2, c, 16 >> i, 16 >> i) for i, c in enumerate((4, 6, 8, 8))]
    labels = [
        SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 4, (1, 32, 32)))) for _ in "ab"
    ]
    loss = head.loss(maps, labels, {})["loss_ce"]
    loss.backward()
    assert torch.isfinite(loss)
    missing = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == [n for n in missing if n == "conv_seg.bias"] == []


NO_NETWORK = """
import os, socket
os.environ.pop("NO_ALBUMENTATIONS_UPDATE", None)
tried = []
def refuse(*args, **kwargs):
    tried.append(args)
    raise OSError("no network in this test")
socket.create_connection = socket.getaddrinfo = socket.socket.connect = refuse
import vision.mm
import mmseg.models, mmseg.datasets, mmseg.apis
assert not tried, tried
"""


def test_importing_asks_no_network(one_thread_environment):
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK],
        env=one_thread_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


# --- packages without pkg_resources ---


def test_packages_are_found_by_both_names(ops):
    import mmengine.utils as utils
    import mmseg

    folder = str(mmseg.__path__[0])
    assert utils.get_installed_path("mmseg") == folder
    assert utils.get_installed_path("mmsegmentation") == folder
    assert utils.is_installed("mmsegmentation")
    assert utils.is_installed("mmseg")
    assert not utils.is_installed("no_such_package")
    assert compat.package2module("mmsegmentation") == "mmseg"
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        utils.get_installed_path("no_such_package")


def test_a_config_may_inherit_from_mmseg(ops, tmp_path):
    config = tmp_path / "c.py"
    config.write_text("_base_ = ['mmseg::_base_/models/fcn_r50-d8.py']\n")
    assert Config.fromfile(config).model.decode_head.type == "FCNHead"


# --- processes and devices ---


def test_init_dist_says_what_is_wrong(monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert compat.init_dist("none") is None
    with pytest.raises(ValueError, match="no launcher 'torchrun'; there are none, pytorch"):
        compat.init_dist("torchrun")
    with pytest.raises(ValueError, match="LOCAL_RANK is not set: start with"):
        compat.init_dist("pytorch")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="needs MASTER_ADDR"):
        compat.init_dist("mpi")


def test_init_dist_translates_the_launchers_variables(monkeypatch):
    """A world of one process by mpi: what mmengine reads later is set too."""
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in values.items():
        monkeypatch.setenv(name, "to be replaced")
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{'SIZE' if name == 'WORLD_SIZE' else name}", value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "0")
    try:
        assert compat.init_dist("mpi", backend="gloo") == "gloo"
        assert compat.init_dist("mpi") == "gloo"  # a group that is there is kept
        assert torch.distributed.get_world_size() == 1
        assert {name: compat.os.environ[name] for name in values} == values
    finally:
        torch.distributed.destroy_process_group()


GPU_CONFIG = {
    "model": {
        "backbone": {"norm_cfg": {"type": "SyncBN", "requires_grad": True}},
        "heads": [{"norm_cfg": {"type": "SyncBN"}}, {"norm_cfg": {"type": "LN"}}],
    },
    "env_cfg": {"dist_cfg": {"backend": "nccl"}},
}


@pytest.mark.parametrize("launcher", ["none", "pytorch"])
def test_cpu_safe_config(monkeypatch, launcher):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = Config({**GPU_CONFIG, "launcher": launcher})
    changes = compat.cpu_safe_config(cfg)
    assert cfg.model.backbone.norm_cfg == {"type": "BN", "requires_grad": True}
    assert [head.norm_cfg.type for head in cfg.model.heads] == ["BN", "LN"]
    assert "model.heads.0.norm_cfg.type: SyncBN -> BN" in changes
    if launcher == "none":
        assert "model_wrapper_cfg" not in cfg
        assert len(changes) == 2
    else:
        assert cfg.model_wrapper_cfg.device_ids is None
        assert cfg.model_wrapper_cfg.type == "MMDistributedDataParallel"
        assert cfg.env_cfg.dist_cfg.backend == "gloo"
        assert len(changes) == 4
    assert compat.cpu_safe_config(cfg) == []


def test_cpu_safe_config_leaves_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = Config({**GPU_CONFIG, "launcher": "pytorch"})
    assert compat.cpu_safe_config(cfg) == []
    assert cfg.model.backbone.norm_cfg.type == "SyncBN"
