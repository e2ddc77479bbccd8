"""Weights of VRWKV-Adapter under other names: the published files and our own."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from timm.models.vision_transformer import checkpoint_filter_fn as vit_filter_fn
from torch import Tensor

from vision.layers.mixers import WKV6Mixer

from . import vrwkv, vrwkv6
from .checkpoint import check_names, rename, split_prefix, unwrap_state_dict

# Upstream's names of the adapter -> ours.
_KEY_MAP = [
    *(
        rule
        for i in range(3)
        for rule in (
            (rf"^spm\.stem\.{3 * i}\.(\w+)$", rf"spm.stages.0.{i}.conv.\1"),
            (rf"^spm\.stem\.{3 * i + 1}\.(\w+)$", rf"spm.stages.0.{i}.norm.\1"),
            (rf"^spm\.conv{i + 2}\.0\.(\w+)$", rf"spm.stages.{i + 1}.conv.\1"),
            (rf"^spm\.conv{i + 2}\.1\.(\w+)$", rf"spm.stages.{i + 1}.norm.\1"),
        )
    ),
    *((rf"^spm\.fc{i + 1}\.", f"spm.projs.{i}.") for i in range(4)),
    *((rf"^norm{i + 1}\.", f"norms.{i}.") for i in range(4)),
    (r"\.extractor\.", ".extractors.0."),
    (r"\.extra_extractors\.0\.", ".extractors.1."),
    (r"\.extra_extractors\.1\.", ".extractors.2."),
    (r"\.attn\.sampling_offsets\.", ".attn.offsets."),
    (r"\.attn\.attention_weights\.", ".attn.weights."),
    (r"\.attn\.value_proj\.", ".attn.value."),
    (r"\.attn\.output_proj\.", ".attn.output."),
    (r"\.ffn\.dwconv\.dwconv\.", ".ffn.dwconv."),
]
_ADAPTER = re.compile(r"^(level_embed$|spm\.|interactions\.|up\.|norm[1-4]\.|norms\.)")
_NORM_PRE = [(r"^(?:layers|blocks)\.0\.ln0\.", "norm_pre.")]
# The final norm, the classifier, and heads around the adapter, none of which it has.
_LEFT_OUT = re.compile(
    r"^((ln1|norm|head|pre_logits|fc_norm)\."
    r"|(decode_head|auxiliary_head|neck|rpn_head|roi_head|data_preprocessor)\.)"
)


def _backbone_filter(backbone: Any) -> Callable[[dict[str, Tensor], Any], dict[str, Tensor]]:
    if not isinstance(backbone, vrwkv.VisionRWKV):
        return vit_filter_fn
    if isinstance(backbone.blocks[0].mixer, WKV6Mixer):
        return vrwkv6.checkpoint_filter_fn
    return vrwkv.checkpoint_filter_fn


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Map published and own checkpoints to the names of `BackboneAdapter`; strict.

    Accepts our own files (plain, or from `tools/train.py`), OpenGVLab's segmentation and detection
    models (their heads are left out), and files of the plain backbone, which training starts from:
    then the adapter keeps the values it has, and so does the layer scale if the file has none.
    The backbone's final norm and classifier are left out.

    Args:
        state_dict: checkpoint as read from the file.
        model: the `BackboneAdapter` that will load the result.

    Raises:
        CheckpointError: keys that have no place in the model, keys the model misses, or a
            position embedding that is no square grid; the message lists them.
    """
    state = unwrap_state_dict(state_dict)
    whole = any(re.search(r"(^|\.)level_embed$", key) for key in state)
    stem = r"level_embed" if whole else r"patch_embed\.proj(?:ection)?\.weight"
    inside, outside = split_prefix(state, stem, "VRWKV-Adapter" if whole else "plain backbone")
    inside = {key.removeprefix("backbone."): value for key, value in (inside | outside).items()}
    inside = {key: value for key, value in inside.items() if not _LEFT_OUT.match(key)}
    inside = rename(inside, _NORM_PRE)
    own = {k for k in inside if _ADAPTER.match(k) or k.startswith("norm_pre.")}
    if not isinstance(model.backbone, vrwkv.VisionRWKV):
        own = {k for k in own if not k.startswith("norm_pre.")}
    mapped = rename({k: inside[k] for k in own}, _KEY_MAP)
    plain = {k: v for k, v in inside.items() if k not in own}
    wanted = model.state_dict()
    if not whole:
        kept = {k for k in wanted if not k.startswith(("backbone.", "norm_pre."))}
        mapped |= {k: wanted[k] for k in kept}
        if not any("gamma" in k for k in plain):
            scales = {k: v for k, v in wanted.items() if re.search(r"\.ls[12]\.gamma$", k)}
            plain |= {k.removeprefix("backbone."): v for k, v in scales.items()}
    plain = _backbone_filter(model.backbone)(plain, model.backbone)
    mapped |= {f"backbone.{k}": v for k, v in plain.items()}
    check_names(mapped, wanted, (), "the backbone's, conv_width, interactions, extra_extractors")
    return mapped
