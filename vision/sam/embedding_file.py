"""Image embeddings as files: encoded once, on a large machine perhaps, and prompted elsewhere."""

import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from vision.models.checkpoint import CheckpointError, check_fit, read_checkpoint, write_weights

from .model import STRIDE, ImageEmbedding, RwkvSam


def write_embedding(
    model: RwkvSam,
    embedding: ImageEmbedding,
    original_size: tuple[int, int],
    path: str | os.PathLike[str],
) -> None:
    """Write the embedding of one image, whole or not at all.

    Args:
        model: made the embedding; the file remembers a checksum of its weights.
        embedding: of one image.
        original_size: height and width of the image in pixels before resizing.
        path: new file ending in .safetensors, .pth or .pt.

    Raises:
        ValueError: another ending.
    """
    state = embedding.state_dict()
    state["original_size"] = torch.tensor(original_size)
    state["weights_checksum"] = torch.tensor(_checksum(model))
    write_weights(state, Path(path).expanduser())


def read_embedding(
    model: RwkvSam, path: str | os.PathLike[str]
) -> tuple[ImageEmbedding, tuple[int, int]]:
    """Read what `write_embedding` wrote.

    Args:
        model: shall take prompts for it.

    Returns:
        The embedding, of the model's device and dtype, and height and width of the original image.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a damaged file, no file of an embedding, or one of another model or of
            other weights.
    """
    state = read_checkpoint(Path(path))
    missing = [k for k in ("embedding", "input_size", "original_size") if k not in state]
    if missing or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is no file that Predictor.save_embedding wrote")
    height, width = (int(side) for side in state["input_size"].flatten())
    advice = "; load it with the model that saved it, or encode the image again with set_image"
    try:
        check_fit(state, _wanted(model, (height, width)), f"the image embedding {path}")
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{error}{advice}") from error
    if int(state.pop("weights_checksum")) != _checksum(model):
        raise CheckpointError(
            f"the image embedding {path} was made by a model of this size with other weights"
            f"{advice}"
        )
    rows, columns = (int(side) for side in state.pop("original_size"))
    embedding = ImageEmbedding.from_state_dict(state)
    return embedding.to(model.device, model.dtype), (rows, columns)


def _wanted(model: RwkvSam, input_size: tuple[int, int]) -> dict[str, Tensor]:
    """Names and shapes of an embedding of an image of `input_size` that fits the model."""
    h, w = (side // STRIDE for side in model.padded_size(input_size))
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (1, model.prompt_encoder.dim, h, w),
        "input_size": (2,),
        "original_size": (2,),
        "weights_checksum": (),
    }
    high_res = model.mask_decoder.high_res
    if high_res is not None:
        hidden = len(high_res.mix[0].get_parameter("weight"))
        shapes["share"] = (1, hidden, 4 * h, 4 * w)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _checksum(model: RwkvSam) -> int:
    """CRC-32 of the weights, rounded to bfloat16 so that a model keeps it when it is cast."""
    checksum = 0
    for value in model.state_dict().values():
        plain = value.detach().to("cpu", torch.bfloat16).flatten()
        checksum = zlib.crc32(plain.view(torch.uint8).numpy(), checksum)
    return checksum
