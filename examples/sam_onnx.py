"""Promptable segmentation with onnxruntime, numpy and Pillow alone: no torch, no compiler.

python tools/export_onnx.py rwkv_sam_small weights.safetensors onnx/      # once, with torch
python examples/sam_onnx.py onnx/ photo.jpg --point 320,200 --out mask.png
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


class OnnxSam:
    """The two files that `tools/export_onnx.py` wrote.

    Args:
        folder: has encoder.onnx and decoder.onnx.
        image_size: longest side in pixels to which images are resized, the model's.
    """

    def __init__(self, folder: Path, image_size: int = 1024) -> None:
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(str(folder / name))
            for name in ("encoder.onnx", "decoder.onnx")
        )
        self.image_size = image_size

    def set_image(self, image: Image.Image) -> None:
        """Encode an image."""
        scale = self.image_size / max(image.size)
        self.original = image.size[::-1]
        width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
        self.scale = np.array([width, height], np.float32) / image.size
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(resized, np.float32).transpose(2, 0, 1)[None]
        self.input_size = (height, width)
        self.found = self.encoder.run(None, {"image": pixels})

    def predict(
        self, points: list[tuple[float, float, int]], box: tuple[float, ...] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits (M, H, W) and predicted IoU (M,) of one object.

        Args:
            points: x, y in pixels of the image, and 1 for the object or 0 for the background.
            box: x0, y0, x1, y1 in pixels of the image.
        """
        prompt = list(points)
        # The corners of a box are points of the labels 2 and 3; without one, a padding point.
        prompt += [(*box[:2], 2), (*box[2:], 3)] if box else [(0, 0, -1)]
        prompt = np.array(prompt, np.float32)[None]
        height, width = self.found[0].shape[-2:]
        inputs = {
            "embedding": self.found[0],
            "point_coords": (prompt[..., :2] * self.scale).astype(np.float32),
            "point_labels": prompt[..., 2],
            "mask_input": np.zeros((1, 1, 4 * height, 4 * width), np.float32),
            "has_mask_input": np.zeros(1, np.float32),
            "input_size": np.array(self.input_size, np.int64),
            "orig_im_size": np.array(self.original, np.int64),
        }
        if len(self.found) > 1:
            inputs["share"] = self.found[1]
        masks, iou, _ = self.decoder.run(None, inputs)
        return masks[0], iou[0]


def numbers(text: str, *counts: int) -> tuple[float, ...]:
    """Numbers by comma, as many as one of `counts` says."""
    found = tuple(map(float, text.split(",")))
    if len(found) not in counts:
        raise ValueError
    return found


def point(text: str) -> tuple[float, float, int]:
    """x,y or x,y,label as x, y, label."""
    x, y, label = (*numbers(text, 2, 3), 1)[:3]
    return x, y, int(label)


def box(text: str) -> tuple[float, ...]:
    """x0,y0,x1,y1."""
    return numbers(text, 4)


def main() -> None:
    """Write the best mask of the prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--point", type=point, action="append", default=[], help="x,y[,label]")
    parser.add_argument("--box", type=box, help="x0,y0,x1,y1")
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("mask.png"))
    args = parser.parse_args()
    if not args.point and args.box is None:
        parser.error("give a --point or a --box")
    missing = [n for n in ("encoder.onnx", "decoder.onnx") if not (args.folder / n).is_file()]
    if missing:
        parser.error(
            f"{args.folder} lacks {' and '.join(missing)}; tools/export_onnx.py writes both"
        )
    try:
        image = Image.open(args.image).convert("RGB")
    except OSError as error:  # missing, no image, cut off
        parser.error(f"cannot read the image {args.image}: {error}")
    sam = OnnxSam(args.folder, args.image_size)
    sam.set_image(image)
    masks, iou = sam.predict(args.point, args.box)
    best = int(iou.argmax())
    Image.fromarray(masks[best] > 0).save(args.out)
    print(f"wrote {args.out}, predicted IoU {iou[best]:.2f}")


if __name__ == "__main__":
    main()
