"""RWKV-SAM as two ONNX files: an encoder run once an image, a decoder run once a prompt.

Only operators of ONNX itself are used. `examples/sam_onnx.py` uses them without torch.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from vision.files import replacing

from .model import STRIDE, RwkvSam

ENCODER, DECODER = "encoder.onnx", "decoder.onnx"


class OnnxEncoder(nn.Module):
    """Image to embedding, normalisation and padding included.

    Args:
        model: what to export.
    """

    def __init__(self, model: RwkvSam) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image (1, 3, H, W), RGB, 0 .. 255, resized already, to the embedding
        (1, dim, h, w) and, if there is a high-resolution branch, the share (1, M, 4h, 4w).
        """
        found = self.model.encode_image(image)
        return (found.embedding,) if found.share is None else (found.embedding, found.share)


class OnnxDecoder(nn.Module):
    """Prompts of one image to masks of the image's original size.

    Args:
        model: what to export.
        multimask_output: three masks a prompt instead of one.
    """

    def __init__(self, model: RwkvSam, multimask_output: bool) -> None:
        super().__init__()
        self.model = model
        self.multimask_output = multimask_output

    def forward(
        self,
        embedding: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        input_size: Tensor,
        orig_im_size: Tensor,
        share: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode N prompts.

        Args:
            embedding: (1, dim, h, w).
            point_coords: x, y in pixels of the resized image, (N, P, 2), float.
            point_labels: (N, P), float: 1 foreground, 0 background, 2 and 3 the corners of a box,
                -1 padding; prompts without a box end with one point of label -1.
            mask_input: logits (N, 1, 4h, 4w); what it holds does not matter where it is not used.
            has_mask_input: (N,), float, 1 where `mask_input` is used, else 0.
            input_size: height and width of the resized image, int64 (2,).
            orig_im_size: height and width wanted, int64 (2,).
            share: the encoder's second output.

        Returns:
            Logits (N, M, *orig_im_size), predicted IoU (N, M), logits (N, M, 4h, 4w).
        """
        model, prompts = self.model, self.model.prompt_encoder
        h, w = embedding.shape[-2:]
        size, points = (STRIDE * h, STRIDE * w), (point_coords, point_labels.long())
        sparse = prompts.embed_points(*points, size)
        dense = prompts.dense(mask_input, has_mask_input > 0, points, size)
        place = prompts.position.grid((h, w))
        low_res, iou = model.mask_decoder(
            embedding, place, sparse, dense, share, self.multimask_output
        )
        height, width = _sizes(input_size, size)
        masks = model.upscale_masks(low_res, (height, width), _sizes(orig_im_size))
        return masks, iou, low_res


def _sizes(size: Tensor, most: tuple[int, int] | None = None) -> tuple[int, int]:
    """Read a height and a width out of a tensor, in a way that an exported graph keeps open."""
    height, width = size.tolist()  # int() would fix them
    for i, side in enumerate((height, width)):
        torch._check(side >= 1)
        if most is not None:
            torch._check(side <= most[i])
    return height, width


def export_onnx(
    model: RwkvSam,
    folder: str | os.PathLike[str],
    multimask_output: bool = True,
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Write encoder.onnx and decoder.onnx.

    Image size, number of prompts and of points, and the original size stay open.

    Args:
        model: in float32 on the CPU.
        folder: is made if it is not there.
        multimask_output: three masks a prompt instead of one.
        overwrite: replace files that are there.

    Returns:
        The two paths.

    Raises:
        FileExistsError: a file is there already, and `overwrite` is off.
    """
    root = Path(folder)
    paths = root / ENCODER, root / DECODER
    there = [str(path) for path in paths if path.exists()]
    if there and not overwrite:
        raise FileExistsError(f"{', '.join(there)} exists; pass overwrite=True to replace it")
    root.mkdir(parents=True, exist_ok=True)
    model = model.eval()
    image = torch.rand(1, 3, 6 * STRIDE, 9 * STRIDE) * 255
    names = ["embedding", "share"][: 1 if model.mask_decoder.high_res is None else 2]
    with torch.no_grad():
        found = OnnxEncoder(model)(image)
    if model.pad_to_square:
        shapes: dict[str, Any] = {"image": None}
        image = torch.rand(1, 3, model.image_size, model.image_size) * 255
    else:
        shapes = {"image": {2: Dim("height", min=2), 3: Dim("width", min=2)}}
    _write(OnnxEncoder(model), (image,), paths[0], ["image"], names, shapes)

    count, points = 3, 2
    h, w = found[0].shape[-2:]
    inputs = {
        "embedding": found[0],
        "point_coords": torch.rand(count, points, 2) * 64,
        "point_labels": torch.ones(count, points),
        "mask_input": torch.zeros(count, 1, 4 * h, 4 * w),
        "has_mask_input": torch.zeros(count),
        "input_size": torch.tensor(image.shape[-2:]),
        "orig_im_size": torch.tensor([200, 300]),
        **dict(zip(names[1:], found[1:], strict=True)),
    }
    n, p = Dim("prompts"), Dim("points")
    dh, dw = Dim("h"), Dim("w")
    shapes = {
        "embedding": {2: dh, 3: dw},
        "point_coords": {0: n, 1: p},
        "point_labels": {0: n, 1: p},
        "mask_input": {0: n, 2: 4 * dh, 3: 4 * dw},
        "has_mask_input": {0: n},
        "input_size": None,
        "orig_im_size": None,
        **{name: {2: 4 * dh, 3: 4 * dw} for name in names[1:]},
    }
    decoder = OnnxDecoder(model, multimask_output)
    outputs = ["masks", "iou_predictions", "low_res_masks"]
    _write(decoder, tuple(inputs.values()), paths[1], list(inputs), outputs, shapes)
    return paths


def _write(
    module: nn.Module,
    args: tuple[Tensor, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    shapes: dict[str, Any],
) -> None:
    with torch.no_grad(), warnings.catch_warnings(), replacing(path) as part:
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter's own libraries
        torch.onnx.export(
            module,
            args,
            part,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
