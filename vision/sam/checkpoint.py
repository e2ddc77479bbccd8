"""Weights from other code: Segment Anything's checkpoints and those of ovsam (RWKV-SAM)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vision.models.checkpoint import CheckpointError, check_fit, listing, unwrap_state_dict
from vision.models.rwkv_sam import checkpoint_filter_fn

from .model import RwkvSam

PARTS = ("encoder", "neck", "prompt_encoder", "mask_decoder")
# Parts of ovsam's model -> ours.
_OVSAM_PARTS = {
    "backbone": "encoder",
    "neck": "neck",
    "pe": "prompt_encoder",
    "mask_decoder": "mask_decoder",
}
_OVSAM_DECODER = [
    (r"^mask_decoder\.", ""),
    (r"^(hr|mr)_feat_proj\.", r"high_res.\1_proj."),
    (r"^mix_feat_proj\.", "high_res.mix."),
]
# Of the decoder, what Segment Anything's does not have.
_OURS = "high_res."


def prompt_encoder_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map the names of Segment Anything's prompt encoder (ovsam has the same) to ours.

    Raises:
        CheckpointError: an embedding of labels is missing.
    """
    rows = [f"point_embeddings.{i}.weight" for i in range(4)] + ["not_a_point_embed.weight"]
    missing = [row for row in (*rows, "no_mask_embed.weight") if row not in state]
    if missing:
        raise CheckpointError(
            f"the prompt encoder of the checkpoint lacks {listing(missing)}; it has "
            f"{listing(sorted(state)) or 'nothing'}"
        )
    mapped = {k: v for k, v in state.items() if k not in rows}
    mapped["label_embed.weight"] = torch.cat([state[row] for row in rows])
    mapped["no_mask_embed"] = mapped.pop("no_mask_embed.weight").flatten()
    frequencies = mapped.pop("pe_layer.positional_encoding_gaussian_matrix", None)
    return mapped if frequencies is None else {**mapped, "position.frequencies": frequencies}


def ovsam_decoder_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map the names of ovsam's RWKV-SAM mask decoder to ours."""
    mapped = {}
    for key, value in state.items():
        for pattern, name in _OVSAM_DECODER:
            key = re.sub(pattern, name, key)
        mapped[key] = value
    return mapped


def ovsam_neck_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map the names of ovsam's necks, of one map or of two, to ours."""
    rules = [(r"^out_proj1?\.", "projs.0."), (r"^out_proj2\.", "projs.1.")]
    mapped = {}
    for key, value in state.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        mapped[key] = value
    return mapped


def _parts(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split by the first word of the names, that of `PromptableSegmentor` left out."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        head, _, rest = key.removeprefix("sam.").partition(".")
        found.setdefault(head, {})[rest] = value
    return found


def _from_ovsam(parts: Mapping[str, Mapping[str, Tensor]], model: RwkvSam) -> dict[str, Any]:
    names = {**dict.fromkeys(parts), **_OVSAM_PARTS}
    mapped: dict[str, Any] = {names[part] or part: dict(state) for part, state in parts.items()}
    maps = {
        "neck": ovsam_neck_keys,
        "prompt_encoder": prompt_encoder_keys,
        "mask_decoder": ovsam_decoder_keys,
    }
    for part, rename in maps.items():
        if part in mapped:
            mapped[part] = rename(mapped[part])
    if "encoder" in mapped:
        inner = model.encoder.get_submodule("model")
        state = checkpoint_filter_fn(mapped["encoder"], inner)
        mapped["encoder"] = {f"model.{k}": v for k, v in state.items()}
    return mapped


def load_weights(
    model: RwkvSam,
    checkpoint: Mapping[str, Any],
    parts: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Load a checkpoint of ours (plain, or from `tools/train.py`) or of ovsam, strictly.

    Args:
        model: takes the weights.
        checkpoint: the file's content, see `vision.models.checkpoint.read_checkpoint`.
        parts: which of encoder, neck, prompt_encoder and mask_decoder to load (a distilled student
            has only the first two); None for all.

    Returns:
        The parts loaded.

    Raises:
        CheckpointError: a part is missing or does not fit; nothing is loaded then.
        ValueError: a part of another name.
    """
    wanted = PARTS if parts is None else parts
    if set(wanted) - set(PARTS):
        raise ValueError(f"parts are among {', '.join(PARTS)}; got {', '.join(wanted)}")
    found = _parts(unwrap_state_dict(checkpoint))
    if set(found) & {"backbone", "pe"}:
        found = _from_ovsam(found, model)
    elif "point_embeddings.0.weight" in found.get("prompt_encoder", {}):
        raise CheckpointError(
            "this is a checkpoint of Segment Anything, whose image encoder is another; "
            "load_sam_state_dict takes its prompt encoder and mask decoder"
        )
    unknown = sorted(set(found) - set(PARTS))
    if unknown and parts is None:
        raise CheckpointError(f"no part of this model is called {listing(unknown)}")
    state = {}
    for part in wanted:
        own = model.get_submodule(part) if getattr(model, part) is not None else None
        if own is None:
            continue
        if part not in found:
            raise CheckpointError(
                f"the checkpoint has {listing(sorted(found))}, wanted {part} too; "
                f"parts={tuple(sorted(set(found) & set(PARTS)))} loads only what is there"
            )
        check_fit(found[part], own.state_dict(), f"the checkpoint's {part}")
        state.update({f"{part}.{k}": v for k, v in found[part].items()})
    model.load_state_dict(state, strict=False)  # every part was compared above
    return tuple(wanted)


def load_sam_state_dict(model: RwkvSam, checkpoint: Mapping[str, Any]) -> None:
    """Load prompt encoder and mask decoder of a Segment Anything checkpoint, strictly.

    Its image encoder is left out; so are the heads of the masks that a `single_mask` decoder does
    not have. The high-resolution branch, which Segment Anything lacks, keeps its weights.

    Args:
        model: 256 channels, as Segment Anything's models of every size.
        checkpoint: the file's content.

    Raises:
        CheckpointError: a part is missing or does not fit; nothing is loaded then.
    """
    found = _parts(unwrap_state_dict(checkpoint))
    if not {"prompt_encoder", "mask_decoder"} <= set(found):
        raise CheckpointError(
            "wanted a Segment Anything checkpoint with prompt_encoder.* and mask_decoder.*, got "
            f"{listing(sorted(found))}"
        )
    prompts = prompt_encoder_keys(found["prompt_encoder"])
    check_fit(prompts, model.prompt_encoder.state_dict(), "Segment Anything's prompt encoder")
    own = model.mask_decoder.state_dict()
    decoder = found["mask_decoder"]
    if model.mask_decoder.single_mask:
        dropped = re.compile(r"output_hypernetworks_mlps\.[1-9]")
        decoder = {k: v for k, v in decoder.items() if not dropped.match(k)}
    same = {k: v for k, v in own.items() if not k.startswith(_OURS)}
    check_fit(decoder, same, "Segment Anything's mask decoder")
    model.prompt_encoder.load_state_dict(prompts)
    model.mask_decoder.load_state_dict({**own, **decoder})
