"""A stand-in for `mmcv._ext`, the compiled half of mmcv, on top of torch and torchvision.

mmcv publishes no compiled build for today's torch, and `mmcv.ops`, `mmseg.models` and
`mmdet.models` do not import without `mmcv._ext`. The stand-in follows the extension's own calling
convention (outputs are arguments, written in place), so mmcv's Python classes stay as they are.

It ends when mmcv ships wheels for the torch in use: a real `mmcv._ext` always wins.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "mmcv._ext"


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes that non-maximum suppression keeps, best score first.

    Args:
        bboxes: corners x1, y1, x2, y2, (N, 4).
        scores: (N,).
        iou_threshold: a box that overlaps a better one by more than this is dropped.
        offset: 0 or 1, what a side is longer than x2 - x1.
    """
    from torchvision.ops import nms as torchvision_nms

    # a side of x2 - x1 + offset is the side of a box whose far corner lies `offset` further
    boxes = bboxes + bboxes.new_tensor([0, 0, offset, offset])
    return torchvision_nms(boxes, scores, iou_threshold)


def _average_mode(pool_mode: int) -> None:
    if pool_mode != 1:
        raise RuntimeError(
            "roi_align with pool_mode='max' exists only in compiled mmcv; use pool_mode='avg' or "
            "install mmcv with its extension (pip install mmcv, not mmcv-lite)"
        )


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average RoI align of `input` (B, C, H, W) for `rois` (N, 5) into `output` (N, C, h, w)."""
    from torchvision.ops import roi_align

    _average_mode(pool_mode)
    size = (aligned_height, aligned_width)
    # torchvision takes -1 for "as many samples as fit", mmcv 0
    ratio = sampling_ratio if sampling_ratio > 0 else -1
    output.copy_(roi_align(input, rois, size, spatial_scale, ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of `roi_align_forward` with respect to its input, added to `grad_input`."""
    from torchvision.ops import roi_align

    _average_mode(pool_mode)
    ratio = sampling_ratio if sampling_ratio > 0 else -1
    with torch.enable_grad():
        # the operator is linear in its input: any point gives the gradient
        x = torch.zeros_like(grad_input, requires_grad=True)
        y = roi_align(x, rois, (aligned_height, aligned_width), spatial_scale, ratio, aligned)
    grad_input += torch.autograd.grad(y, x, grad_output)[0]


def _add_grads(
    inputs: tuple[Tensor, ...],
    call: Callable[..., Tensor],
    grad_output: Tensor,
    outputs: tuple[Tensor, ...],
) -> None:
    """Add the gradients of `call(*inputs)` to `outputs`."""
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        y = call(*leaves)
    for out, grad in zip(outputs, torch.autograd.grad(y, leaves, grad_output), strict=True):
        out += grad


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: Any,
) -> None:
    """Deformable convolution (arXiv:1703.06211) of `input` (B, C, H, W) into `output`."""
    output.copy_(_deform_conv(input, offset, weight, **geometry))


def _deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    *,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
    scale: float = 1.0,
) -> Tensor:
    # torchvision reads the groups off the shapes of weight and offset; im2col_step is a matter of
    # speed only
    from torchvision.ops import deform_conv2d

    return scale * deform_conv2d(
        input,
        offset,
        weight,
        stride=(dH, dW),
        padding=(padH, padW),
        dilation=(dilationH, dilationW),
    )


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: Any,
) -> None:
    """Gradients of `deform_conv_forward` with respect to input and offset, added in place."""
    _add_grads(
        (input, offset),
        lambda x, o: _deform_conv(x, o, weight, **geometry),
        grad_output,
        (grad_input, grad_offset),
    )


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: Any,
) -> None:
    """Gradient of `deform_conv_forward` with respect to the weight, added in place."""
    _add_grads(
        (torch.zeros_like(grad_weight),),  # linear in the weight: any point gives the gradient
        lambda w: _deform_conv(input, offset, w, **geometry),
        grad_output,
        (grad_weight,),
    )


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **geometry: Any,
) -> None:
    """Modulated deformable convolution (arXiv:1811.11168) of `input` into `output`."""
    output.copy_(_modulated_deform_conv(input, offset, mask, weight, bias, **geometry))


def _modulated_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> Tensor:
    from torchvision.ops import deform_conv2d

    return deform_conv2d(
        input,
        offset,
        weight,
        bias if with_bias else None,
        stride=(stride_h, stride_w),
        padding=(pad_h, pad_w),
        dilation=(dilation_h, dilation_w),
        mask=mask,
    )


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    **geometry: Any,
) -> None:
    """All gradients of `modulated_deform_conv_forward`, added in place."""
    inputs = [input, offset, mask, weight]
    outputs = [grad_input, grad_offset, grad_mask, grad_weight]
    if geometry["with_bias"]:
        inputs.append(bias)
        outputs.append(grad_bias)

    def call(x: Tensor, o: Tensor, m: Tensor, w: Tensor, b: Tensor = bias) -> Tensor:
        return _modulated_deform_conv(x, o, m, w, b, **geometry)

    _add_grads(tuple(inputs), call, grad_output, tuple(outputs))


def _sigmoid_focal_loss(
    input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float
) -> Tensor:
    from torchvision.ops import sigmoid_focal_loss

    num_classes = input.size(1)
    # class `num_classes` is the background: a row without a one
    one_hot = F.one_hot(target, num_classes + 1)[:, :num_classes].to(input)  # (N, num_classes)
    loss = sigmoid_focal_loss(input, one_hot, alpha=alpha, gamma=gamma)
    if not weight.numel():
        return loss
    if bool((target == num_classes).any()):
        raise ValueError(
            "sigmoid_focal_loss takes a weight per class, and a target is background "
            f"(class {num_classes}), for which there is no weight; weight the loss outside"
        )
    return loss * weight[target][:, None]


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (arXiv:1708.02002) of every logit of `input` (N, classes) into `output`."""
    output.copy_(_sigmoid_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of each loss by its own logit, added to `grad_input` (N, classes)."""
    with torch.enable_grad():
        x = input.detach().requires_grad_()
        loss = _sigmoid_focal_loss(x, target, weight, gamma, alpha).sum()
    grad_input += torch.autograd.grad(loss, x)[0]


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (arXiv:2010.04159) by `grid_sample`.

    Args:
        value: tokens of all levels, (B, sum of h*w, heads, C).
        spatial_shapes: h and w of each level, (levels, 2).
        level_start_index: first token of each level, (levels,).
        sampling_locations: x, y in 0..1, (B, queries, heads, levels, points, 2).
        attention_weights: (B, queries, heads, levels, points).
        im2col_step: a matter of speed of the compiled operator; unused.

    Returns:
        (B, queries, heads * C).
    """
    B, _, heads, C = value.shape
    queries, points = sampling_locations.size(1), sampling_locations.size(4)
    grids = (2 * sampling_locations - 1).transpose(1, 2).flatten(0, 1)
    # (B * heads, queries, levels, points, 2)
    weights = attention_weights.transpose(1, 2).flatten(0, 1)  # (B * heads, queries, levels, p)
    out = value.new_zeros(B * heads, C, queries)
    for level, ((h, w), start) in enumerate(
        zip(spatial_shapes.tolist(), level_start_index.tolist(), strict=True)
    ):
        x = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(B * heads, C, h, w)
        sampled = F.grid_sample(x, grids[:, :, level], align_corners=False)
        # (B * heads, C, queries, points)
        assert sampled.shape[-2:] == (queries, points)
        out = out + (sampled * weights[:, None, :, level]).sum(-1)
    return out.view(B, heads * C, queries).transpose(1, 2).contiguous()


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of `ms_deform_attn_forward`, added in place."""
    _add_grads(
        (value, sampling_locations, attention_weights),
        lambda v, s, a: ms_deform_attn_forward(
            v, spatial_shapes, level_start_index, s, a, im2col_step
        ),
        grad_output,
        (grad_value, grad_sampling_loc, grad_attn_weight),
    )


OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        nms,
        roi_align_forward,
        roi_align_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        ms_deform_attn_forward,
        ms_deform_attn_backward,
    )
}


class StandIn(ModuleType):
    """A module that has every operator of mmcv; those not in `OPS` raise when they are called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
        if name in OPS:
            return OPS[name]

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise RuntimeError(
                f"the operator {name!r} exists only in mmcv's compiled extension, and mmcv-lite "
                "has none. Install mmcv with its extension (pip uninstall mmcv-lite; pip install "
                "-U openmim; mim install mmcv) or choose a model that does not use it; torchvision "
                f"stands in for {', '.join(sorted(OPS))}"
            )

        return missing


def is_compiled() -> bool:
    """Whether the installed mmcv has its own extension."""
    mmcv = importlib.util.find_spec("mmcv")
    if mmcv is None:
        raise ModuleNotFoundError(
            "vision.mm needs mmengine, mmcv-lite and mmsegmentation, and mmcv is not installed: "
            "pip install mmengine mmcv-lite mmsegmentation",
            name="mmcv",
        )
    finder = importlib.machinery.PathFinder
    return finder.find_spec("_ext", list(mmcv.submodule_search_locations or ())) is not None


def install() -> bool:
    """Put the stand-in in place of `mmcv._ext`; leave a real extension alone.

    Returns:
        Whether the stand-in serves.
    """
    present = sys.modules.get(NAME)
    if present is not None:
        return isinstance(present, StandIn)
    if is_compiled():
        return False
    module = StandIn(NAME, __doc__)
    # a spec without a loader: mmcv's and mmengine's probes go on answering "not compiled"
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    sys.modules[NAME] = module
    return True
