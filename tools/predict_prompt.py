"""Segment what points and boxes point at in one image: an overlay and masks as PNG.

    python tools/predict_prompt.py rwkv_sam_small weights.safetensors photo.jpg \
        --point 320,200 --point 40,60,0 --box 10,20,300,400

Coordinates are pixels of the image. All points and one --box describe one object; several boxes
are an object each and take no points. Writes NAME_overlay.png and NAME_mask.png (0 and 255), or
NAME_1_mask.png, NAME_2_mask.png, ... for several objects.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import numpy as np
import torch
from PIL import Image, ImageDraw

from vision.data import overlay, palette, read_image
from vision.models.checkpoint import CheckpointError
from vision.sam.model import create_sam, list_sams
from vision.sam.predictor import Predictor


def point(text: str) -> tuple[float, ...]:
    """x,y or x,y,label as x, y, label."""
    numbers = [float(number) for number in text.split(",")]
    x, y, label = numbers if len(numbers) == 3 else [*numbers, 1.0]
    return x, y, label


def box(text: str) -> tuple[float, ...]:
    """x0,y0,x1,y1."""
    x0, y0, x1, y1 = map(float, text.split(","))
    return x0, y0, x1, y1


def check_prompts(args: argparse.Namespace, width: int, height: int) -> None:
    """Raise a ValueError about prompts that cannot be meant."""
    if not args.point and not args.box:
        raise ValueError("wanted a prompt: --point x,y[,label] or --box x0,y0,x1,y1")
    if args.point and len(args.box) > 1:
        raise ValueError("several --box are an object each and take no --point; run them apart")
    for x, y in [p[:2] for p in args.point] + [c for b in args.box for c in (b[:2], b[2:])]:
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(f"{x:g},{y:g} lies outside of the image of {width} x {height} pixels")


def predict(args: argparse.Namespace, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks (N, C, H, W) of N objects, and how good the model thinks they are, (N, C)."""
    predictor = Predictor(create_sam(args.model, args.checkpoint).to(args.device))
    predictor.set_image(image)
    coords = [[p[:2] for p in args.point]] if args.point else None
    labels = [[p[2] for p in args.point]] if args.point else None
    # One point alone may mean a part or the whole; other prompts say what they want.
    ambiguous = len(args.point) == 1 and not args.box
    several = args.candidates or (ambiguous and not predictor.model.mask_decoder.single_mask)
    masks, iou, _ = predictor.predict(coords, labels, args.box or None, None, several)
    return masks, iou


def draw(args: argparse.Namespace, image: np.ndarray, masks: np.ndarray) -> Image.Image:
    """Masks (N, H, W) and prompts over the image; later objects lie over earlier ones."""
    labels = np.zeros(image.shape[:2], np.int64)
    for index, mask in enumerate(masks, start=1):
        labels[mask] = index
    canvas = Image.fromarray(overlay(image, labels, palette(len(masks) + 1), skip=(0,)))
    pen = ImageDraw.Draw(canvas)
    radius = 2 + max(canvas.size) // 200
    for corners in args.box:
        pen.rectangle(corners, outline="yellow", width=1 + radius // 3)
    for x, y, label in args.point:
        place = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(place, "lime" if label else "red", "white")
    return canvas


def main() -> int:
    """Take for each object the mask that the model thinks best; write and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"one of {', '.join(list_sams())}")
    parser.add_argument("checkpoint", type=Path, help="the model's weights")
    parser.add_argument("image", type=Path)
    many = {"action": "append", "default": []}
    parser.add_argument("--point", type=point, help="x,y[,0 if not on the object]", **many)
    parser.add_argument("--box", type=box, help="x0,y0,x1,y1", **many)
    parser.add_argument("--candidates", action="store_true", help="write all three masks as well")
    parser.add_argument("--out", type=Path, default=Path("prompts"), help="folder")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    found: dict[str, tuple[np.ndarray, float]] = {}  # file name -> mask and predicted IoU
    try:
        image = read_image(args.image)
        check_prompts(args, image.shape[1], image.shape[0])
        masks, iou = predict(args, image)
        best = iou.argmax(axis=1)
        for i, k in enumerate(best):
            name = args.image.stem + (f"_{i + 1}" if len(best) > 1 else "")
            found[f"{name}_mask.png"] = masks[i, k], iou[i, k]
            for c in range(len(iou[i]) if args.candidates else 0):
                found[f"{name}_candidate{c + 1}.png"] = masks[i, c], iou[i, c]
        overlay_name = f"{args.image.stem}_overlay.png"
        present = [name for name in (overlay_name, *found) if (args.out / name).exists()]
        if present and not args.overwrite:
            raise ValueError(f"{args.out / present[0]} exists; --overwrite replaces it")
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (mask, score) in found.items():
        Image.fromarray(mask.astype(np.uint8) * 255).save(args.out / name)
        print(f"{args.out / name}: predicted IoU {score:.3f}, {mask.mean():.1%} of the image")
    draw(args, image, masks[range(len(best)), best]).save(args.out / overlay_name)
    print(args.out / overlay_name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
