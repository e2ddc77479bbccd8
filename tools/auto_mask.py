"""Segment everything in an image or in the images of a folder, without prompts.

    python tools/auto_mask.py rwkv_sam_small weights.safetensors folder/ --out-dir masks

Writes masks.json, a COCO file with run-length masks and scores of all images. With --format png,
for each image NAME.masks.png (16-bit; 0 is no object, small objects lie over large ones) and
NAME.overlay.png. Run it again to go on after a stop: images that are done are skipped. An image
that fails is reported at the end; the rest is done, and the exit status is 1.
"""

import argparse
import inspect
import io
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vision.data import ImageReadError, list_images, overlay, palette, read_image
from vision.files import write_whole
from vision.models.checkpoint import CheckpointError
from vision.sam.amg_results import coco_dataset, coco_image, instance_map
from vision.sam.automatic import AutomaticMaskGenerator
from vision.sam.model import create_sam, list_sams

ARGUMENTS = inspect.signature(AutomaticMaskGenerator).parameters.values()
OPTIONS = {p.name: p.default for p in ARGUMENTS if type(p.default) in (int, float)}
# Names keep folder and ending, so that two images of one name do not meet.
RESULTS = {"coco": "parts/{}.json", "png": "{}.masks.png"}


def main() -> int:
    """Segment all images; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"one of {', '.join(list_sams())}")
    parser.add_argument("checkpoint", type=Path, help="the model's weights")
    parser.add_argument("input", type=Path, help="an image or a folder of images")
    parser.add_argument("--out-dir", type=Path, default=Path("masks"))
    parser.add_argument("--format", choices=RESULTS, default="coco")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group = parser.add_argument_group("arguments of vision.sam.automatic.AutomaticMaskGenerator")
    for option, default in OPTIONS.items():
        flag = f"--{option.replace('_', '-')}"
        group.add_argument(flag, type=type(default), default=default, help=f"default: {default:g}")
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in OPTIONS}
    try:
        root, files = args.input.parent, [args.input]
        if not args.input.is_file():
            root, own = args.input, args.out_dir.resolve()
            files = [p for p in list_images(root) if own not in p.resolve().parents]
        model = create_sam(args.model, args.checkpoint).to(args.device)
        generator = AutomaticMaskGenerator(model, output_mode="coco_rle", **options)
        settings = {"model": args.model, "checkpoint": str(args.checkpoint.resolve()), **options}
        check_settings(args.out_dir / "settings.json", settings)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    result = RESULTS[args.format]
    results = {p: args.out_dir / result.format(p.relative_to(root)) for p in files}
    todo = [path for path in files if not results[path].exists()]
    failed = []
    for path in tqdm(todo, unit="image", initial=len(files) - len(todo), total=len(files)):
        name = path.relative_to(root).as_posix()
        try:
            image = read_image(path)
            records = generator.generate(image)
        except (ImageReadError, MemoryError, torch.OutOfMemoryError) as error:
            failed.append(f"{name}: {error}")
        else:
            if args.format == "png":
                write_pictures(results[path], image, records)
            else:
                described = coco_image(name, image.shape[:2], records)
                write_whole(results[path], json.dumps(described))
    if args.format == "coco":
        parts = (json.loads(part.read_bytes()) for part in results.values() if part.exists())
        write_whole(args.out_dir / "masks.json", json.dumps(coco_dataset(parts)))
    print(f"{len(files) - len(failed)} of {len(files)} images done, see {args.out_dir}")
    for message in failed:
        print(f"failed: {message}", file=sys.stderr)
    return 1 if failed else 0


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Keep the settings beside the results; ValueError if these come from other settings."""
    if not path.exists():
        write_whole(path, json.dumps(settings))
    before = json.loads(path.read_bytes())
    other = [f"{k}={before.get(k)}" for k in settings if before.get(k) != settings[k]]
    if other:
        raise ValueError(
            f"{path.parent} has results with {', '.join(other)}; use these, or another --out-dir"
        )


def write_pictures(path: Path, image: np.ndarray, records: list[dict[str, Any]]) -> None:
    """Write overlay and instance ids; the ids come last, so that they mean that both are done."""
    ids = instance_map(image.shape[:2], records)
    picture = overlay(image, ids, palette(len(records) + 1), skip=(0,))
    beside = path.with_suffix("").with_suffix(".overlay.png")
    for place, pixels in ((beside, picture), (path, ids)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        write_whole(place, file.getvalue())


if __name__ == "__main__":
    sys.exit(main())
