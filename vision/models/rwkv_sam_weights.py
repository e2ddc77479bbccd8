"""Weights of RWKV-SAM's encoder under other names: the authors' and our own checkpoints."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vision.layers.pos_embed import resample_pos_embed

from .checkpoint import CheckpointError, listing, unwrap_state_dict

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
    r"^(neck|pe|prompt_encoder|mask_decoder|decode_head|auxiliary_head|data_preprocessor)\."
)


def _strip_prefix(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split into the encoder's entries, prefix removed, and the rest."""
    stems = [k for k in state_dict if re.search(r"(^|\.)stem\.conv1\.weight$", k)]
    if len(stems) != 1:
        raise CheckpointError(
            "wanted the weights of one RWKV-SAM encoder, with one stem.conv1.weight; "
            f"found {len(stems)} among {len(state_dict)} keys: {listing(state_dict)}"
        )
    prefix = stems[0].removesuffix("stem.conv1.weight")
    inside = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    outside = {k: v for k, v in state_dict.items() if not k.startswith(prefix)}
    return inside, outside


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
    inside, outside = _strip_prefix(unwrap_state_dict(state_dict))
    mapped: dict[str, Tensor] = {}
    for part, rules in ((inside, _KEY_MAP + _HEAD_MAP), (outside, _HEAD_MAP)):
        for key, value in part.items():
            if _NOT_ENCODER.match(key):
                continue
            for pattern, name in rules:
                key = re.sub(pattern, name, key)
            mapped[key] = value.flatten() if ".shift_mix." in key else value

    wanted = model.state_dict()
    unmapped = sorted(set(mapped) - set(wanted) - {"head.weight", "head.bias"})
    missing = sorted(k for k in set(wanted) - set(mapped) if not k.startswith("head."))
    if unmapped or missing:
        raise CheckpointError(
            f"the checkpoint does not fit this model.\n"
            f"  not in the model ({len(unmapped)}): {listing(unmapped) or '-'}\n"
            f"  not in the checkpoint ({len(missing)}): {listing(missing) or '-'}\n"
            "Check the model's size and options (attn_type, depth, use_pos_embed, final_stage, "
            "init_values)."
        )
    if "pos_embed" in mapped:
        mapped["pos_embed"] = _fit_grid(mapped["pos_embed"], model.grid_size)
    return mapped


def _fit_grid(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a position embedding (1, tokens, C) of a square grid to another one."""
    tokens = pos_embed.shape[1]
    if tokens == grid[0] * grid[1]:
        return pos_embed
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(
            f"the position embedding has {tokens} tokens, no square grid; give the model the "
            "checkpoint's own img_size"
        )
    return resample_pos_embed(pos_embed, (side, side), grid)
