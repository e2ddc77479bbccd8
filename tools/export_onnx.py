"""Write RWKV-SAM as two ONNX files, and compare them with torch on real images.

    python tools/export_onnx.py rwkv_sam_small weights.safetensors onnx/ --images a.jpg b.png

The encoder takes an image of any size that is resized already, the decoder any number of prompts
and the size that the masks shall have. `examples/sam_onnx.py` runs them without torch.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import numpy as np
import torch

from vision.data import read_image
from vision.models.checkpoint import CheckpointError
from vision.sam import RwkvSam, create_sam, list_sams
from vision.sam.onnx import export_onnx
from vision.sam.transforms import resize_longest_side

LIMIT = 1e-3  # in logits


def differences(
    model: RwkvSam, sessions: list, image: np.ndarray, multimask: bool
) -> tuple[float, float]:
    """Largest differences between onnxruntime and torch in logits and in predicted IoU.

    Args:
        model: what was exported.
        sessions: of the encoder and of the decoder.
        image: uint8 (H, W, 3).
        multimask: what the decoder was exported with.
    """
    encoder, decoder = sessions
    resized = resize_longest_side(image, model.image_size)
    size, original = resized.shape[:2], image.shape[:2]
    x = torch.from_numpy(resized).permute(2, 0, 1)[None].float()
    found = encoder.run(None, {"image": x.numpy()})
    place = np.array([[0.3, 0.4], [0.6, 0.5], [0.5, 0.7]]) * size[::-1]
    coords = np.stack([place, np.zeros_like(place)], axis=1).astype(np.float32)
    labels = np.tile(np.array([1, -1], np.float32), (len(place), 1))
    h, w = found[0].shape[-2:]
    names = [node.name for node in decoder.get_inputs()]
    inputs = {
        "embedding": found[0],
        "point_coords": coords,
        "point_labels": labels,
        "mask_input": np.zeros((len(place), 1, 4 * h, 4 * w), np.float32),
        "has_mask_input": np.zeros(len(place), np.float32),
        "input_size": np.array(size, np.int64),
        "orig_im_size": np.array(original, np.int64),
        **dict(zip(names[7:], found[1:], strict=True)),
    }
    masks, iou, _ = decoder.run(None, inputs)
    with torch.no_grad():
        points = (torch.from_numpy(coords[:, :1]), torch.ones(len(place), 1))
        low_res, wanted_iou = model.predict_masks(
            model.encode_image(x), points, multimask_output=multimask
        )
        wanted = model.upscale_masks(low_res, size, original)
    return (
        float(np.abs(masks - wanted.numpy()).max()),
        float(np.abs(iou - wanted_iou.numpy()).max()),
    )


def main() -> int:
    """Export and compare; the exit status is 1 if an image differs by more than the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"one of {', '.join(list_sams())}")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="weights; none: random ones")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--images", type=Path, nargs="+", default=[], help="to compare on")
    parser.add_argument("--single-mask", action="store_true", help="one mask a prompt, not three")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    import onnxruntime

    try:
        images = [read_image(path) for path in args.images]
        model = create_sam(args.model, args.checkpoint)
        paths = export_onnx(model, args.out_dir, not args.single_mask, args.overwrite)
    except (CheckpointError, FileExistsError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    for path in paths:
        print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    sessions = [onnxruntime.InferenceSession(str(path)) for path in paths]
    worst = 0.0
    for path, image in zip(args.images, images, strict=True):
        logits, iou = differences(model, sessions, image, not args.single_mask)
        print(f"{path.name}: logits differ by {logits:.1e}, predicted IoU by {iou:.1e}")
        worst = max(worst, logits)
    if worst > LIMIT:
        print(f"error: wanted a difference of at most {LIMIT}, got {worst:.1e}", file=sys.stderr)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
