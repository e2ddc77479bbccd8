"""Weights of RWKV-SAM's encoder under other names: the authors' and our own checkpoints."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .checkpoint import check_names, fit_pos_embed, rename, split_prefix, unwrap_state_dict
from .classifier import HEAD_NAMES

# The authors' names inside the backbone -> ours, in order.
_KEY_MAP = [
    (r"^stem\.norm1\.", "stem.norm."),
    (r"^conv_stages\.", "stages."),
    (r"^conv_final_pool\.", "pool."),
    (r"^final_norm\.", "norm."),
    (r"^final_layer\.", "final_stage."),
    # A convolution in the stack of blocks is wrapped to work on tokens.
    (r"^layers\.(\d+)\.(pre_norm|conv\d_)", r"blocks.\1.conv.\2"),
    (r"^layers\.", "blocks."),
    (r"\.pre_norm\.", ".norm."),
    (r"\.conv1_1x1\.", ".expand."),
    (r"\.conv2_kxk\.", ".depthwise."),
    (r"\.conv3_1x1\.", ".project."),
    (r"\.shortcut\.expand\.", ".shortcut.proj."),
    (r"^(blocks\.\d+)\.layer_scale_([12])$", r"\1.ls\2.gamma"),
    (r"^(blocks\.\d+)\.attn\.spatial_decay$", r"\1.mixer.decay"),
    (r"^(blocks\.\d+)\.attn\.spatial_first$", r"\1.mixer.bonus"),
    (r"^(blocks\.\d+)\.attn\.spatial_mix_([kvr])$", r"\1.mixer.shift_mix.\2"),
    (r"^(blocks\.\d+)\.mlp\.spatial_mix_([kr])$", r"\1.channel_mix.shift_mix.\2"),
    (r"^(blocks\.\d+)\.attn\.", r"\1.mixer."),
    (r"^(blocks\.\d+)\.mlp\.", r"\1.channel_mix."),
    (r"^(blocks\.\d+)\.ln([12])\.", r"\1.norm\2."),
    (r"^(blocks\.\d+)\.ffn\.w0\.", r"\1.channel_mix.gate."),
    (r"^(blocks\.\d+)\.ffn\.w1\.", r"\1.channel_mix.value."),
    (r"^(blocks\.\d+)\.ffn\.w2\.", r"\1.channel_mix.output."),
]
_HEAD_MAP = [(r"^head\.fc\.", "head.")]
# Parts of checkpoints that are no part of the encoder.
_NOT_ENCODER = re.compile(
    r"^(sam\.)?(neck|pe|prompt_encoder|mask_decoder)\."
    r"|^(decode_head|auxiliary_head|data_preprocessor)\."
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Any) -> dict[str, Tensor]:
    """Map the authors' and our own checkpoints to the names of `RwkvSamEncoder`; strict.

    Accepts our own files (plain, or from `tools/train.py`) and those of HarborYuan/ovsam: the
    encoder alone, a classifier (`backbone.*`, `head.fc.*`), a whole RWKV-SAM (its neck, prompt
    encoder and mask decoder are left out). The position embedding is resampled to the model's
    grid. A checkpoint without a head gives no head keys.

    Args:
        state_dict: checkpoint as read from the file.
        model: the `RwkvSamEncoder` that will load the result.

    Raises:
        CheckpointError: keys that have no place in the model, keys the model misses, or a
            position embedding that is no square grid; the message lists them.
    """
    inside, outside = split_prefix(
        unwrap_state_dict(state_dict), r"stem\.conv1\.weight", "RWKV-SAM encoder"
    )
    mapped = rename(inside, _KEY_MAP + _HEAD_MAP, _NOT_ENCODER)
    mapped |= rename(outside, _HEAD_MAP, _NOT_ENCODER)
    mapped = {k: v.flatten() if ".shift_mix." in k else v for k, v in mapped.items()}
    options = "attn_type, depth, use_pos_embed, final_stage, init_values"
    check_names(mapped, model.state_dict(), HEAD_NAMES, options)
    if "pos_embed" in mapped:
        mapped["pos_embed"] = fit_pos_embed(mapped["pos_embed"], model.grid_size)
    return mapped
