"""Predict images with a trained model: labels, or coloured overlays and masks as PNG.

    python tools/predict.py CONFIG CHECKPOINT photo.jpg folder/ --out-dir predictions

Classification writes predictions.json, segmentation NAME_overlay.png and NAME_mask.png (class
indices) for each image. An image that cannot be read is reported at the end; the rest is done.

--tile predicts large images in tiles that overlap, so that memory does not grow with the image:

    python tools/predict.py CONFIG CHECKPOINT satellite.tif --tile 1024 --overlap 256
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.data import ImageReadError, list_images, overlay, palette, read_image
from vision.mm.inference import Predictor, top_classes
from vision.mm.tiling import add_tile_arguments, tiles_of
from vision.models.checkpoint import CheckpointError


def main() -> int:
    """Predict all images; the exit status is 1 if one could not be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file that the model was trained with")
    parser.add_argument("checkpoint", help="checkpoint of tools/train.py")
    parser.add_argument("inputs", nargs="+", type=Path, help="images or folders")
    parser.add_argument("--out-dir", type=Path, default=Path("predictions"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--opacity", type=float, default=0.5, help="of the overlay, 0 to 1")
    add_tile_arguments(parser)
    args = parser.parse_args()
    tiles = tiles_of(parser, args)

    try:
        files = [(root, f) for p in args.inputs for root, f in named_images(p)]
        predictor = Predictor(args.config, args.checkpoint, args.device, tiles)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    colours = np.array(predictor.palette or palette(len(predictor.classes)), np.uint8)
    labels, failed = {}, []
    for root, path in tqdm(files, unit="image"):
        try:
            image = read_image(path)
        except ImageReadError as error:
            failed.append(str(error))
            continue
        found = predictor(image)
        if predictor.segments:
            mask = found.numpy().astype(np.uint8)
            # Names keep their folder, so that two images of one name do not meet.
            stem = args.out_dir / path.relative_to(root).with_suffix("")
            stem.parent.mkdir(parents=True, exist_ok=True)
            picture = overlay(image, mask, colours, args.opacity)
            Image.fromarray(picture).save(f"{stem}_overlay.png")
            Image.fromarray(mask).save(f"{stem}_mask.png")
        else:
            labels[str(path)] = top_classes(found, predictor.classes)
    if not predictor.segments:
        (args.out_dir / "predictions.json").write_text(json.dumps(labels, indent=2) + "\n")
        for name, best in list(labels.items())[:20]:
            print(f"{name}: {best[0]['class']} ({best[0]['score']:.1%})")
    print(f"{len(files) - len(failed)} of {len(files)} images done, see {args.out_dir}")
    for message in failed:
        print(f"not read: {message}", file=sys.stderr)
    return 1 if failed else 0


def named_images(path: Path) -> list[tuple[Path, Path]]:
    """(folder that names are relative to, image) for an image or a folder of images."""
    if path.is_dir():
        return [(path, file) for file in list_images(path)]
    if not path.is_file():
        raise FileNotFoundError(f"no image or folder {path}")
    return [(path.parent, path)]


if __name__ == "__main__":
    sys.exit(main())
