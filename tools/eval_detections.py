"""Judge masks that a model gives for the boxes of an external detector.

    python tools/eval_detections.py rwkv_sam_small weights.safetensors \\
        instances_val2017.json val2017/ coco_vitdet.json --out masks.json

The detector's boxes come as a COCO results file: [{image_id, category_id, bbox: [x, y, width,
height], score}, ...]. Each box gives one mask, whose score is the detector's. Prints COCO's AP of
the masks and boundary AP (dilation 0.02) in percent, and writes the masks as a COCO results file.
After a stop, the same command goes on with the images that are left.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import numpy as np
import torch
from tqdm import tqdm

from vision.data import ImageReadError
from vision.data.coco_file import read_coco
from vision.data.rle import encode_masks
from vision.files import Journal, digest_of_file, write_whole
from vision.metrics.coco_ap import check_results, mask_ap
from vision.models.checkpoint import CheckpointError
from vision.sam.model import create_sam, list_sams
from vision.sam.predictor import Predictor

Detection = dict[str, Any]


def main() -> None:
    """Predict, write and judge all masks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help=f"one of {', '.join(list_sams())}")
    parser.add_argument("checkpoint", type=Path, help="the model's weights")
    parser.add_argument("annotations", type=Path, help="COCO annotation file")
    parser.add_argument("images", type=Path, help="folder that its file names are relative to")
    parser.add_argument("detections", type=Path, help="COCO results file with boxes")
    parser.add_argument("--out", type=Path, default=Path("masks.json"))
    parser.add_argument("--boxes-at-once", type=int, default=64, help="bounds the memory")
    parser.add_argument(
        "--max-dets", type=int, default=100, help="that count, an image and category (LVIS: 300)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if min(args.boxes_at_once, args.max_dets) < 1:
        sys.exit("error: --boxes-at-once and --max-dets want 1 or more")
    try:
        coco = read_coco(args.annotations, ("images", "annotations", "categories"))
        detections = read_detections(args.detections, coco)
        files = image_files(args.images, coco, detections)
        predictor = Predictor(create_sam(args.model, args.checkpoint).to(args.device))
        inputs = (args.checkpoint, args.detections)
        journal = Journal(
            args.out.with_name(f"{args.out.name}.part"),
            {"model": args.model, "digests": [digest_of_file(path) for path in inputs]},
        )
        with tqdm(total=len(detections), unit="box") as bar:
            for path, boxes in files.items():
                if str(path) not in journal.done:
                    journal.add(
                        str(path), predict_masks(predictor, path, boxes, args.boxes_at_once)
                    )
                bar.update(len(boxes))
    except (CheckpointError, FileNotFoundError, ImageReadError, ValueError) as error:
        sys.exit(f"error: {error}")
    masks = [mask for path in files for mask in journal.done[str(path)]]
    write_whole(args.out, json.dumps(masks))
    journal.path.unlink()
    print(f"{len(masks)} masks in {len(files)} images, see {args.out}")
    for name, ratio in (("masks", None), ("boundary", 0.02)):
        found = mask_ap(coco, masks, ratio, args.max_dets)
        print(f"{name}: " + ", ".join(f"{metric} {value:.2f}" for metric, value in found.items()))


def read_detections(path: Path, coco: dict[str, Any]) -> list[Detection]:
    """Read and check a COCO results file with boxes.

    Raises:
        ValueError: no such file, no results file, or ids that the annotations lack.
    """
    try:
        detections = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"wanted a COCO results file, got {path} ({error})") from error
    try:
        check_results(detections, coco, "bbox")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for index, one in enumerate(detections):
        box = np.asarray(one["bbox"], float)
        if box.shape != (4,) or not np.isfinite(box).all() or min(box[2:]) < 0:
            raise ValueError(
                f"{path}: wanted a bbox x, y, width, height, got {one['bbox']} of detection {index}"
            )
    return detections


def image_files(
    folder: Path, coco: dict[str, Any], detections: Sequence[Detection]
) -> dict[Path, list[Detection]]:
    """Group the detections by the file of their image.

    Raises:
        ValueError: files that are not there.
    """
    names = {image["id"]: image["file_name"] for image in coco["images"]}
    groups: dict[Path, list[Detection]] = defaultdict(list)
    for one in detections:
        groups[folder / names[one["image_id"]]].append(one)
    missing = [str(path) for path in groups if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(groups)} images are not there: {', '.join(missing[:5])}"
        )
    return groups


def predict_masks(
    predictor: Predictor, path: Path, boxes: Sequence[Detection], at_once: int
) -> list[Detection]:
    """Give the masks of the boxes of one image as COCO results, `at_once` at a time."""
    predictor.set_image(path)
    found = []
    for start in range(0, len(boxes), at_once):
        some = boxes[start : start + at_once]
        corners = np.array([one["bbox"] for one in some], float)
        corners[:, 2:] += corners[:, :2]
        masks, _, _ = predictor.predict(box=corners, multimask_output=False)
        rles = encode_masks(torch.from_numpy(masks[:, 0]))
        kept = ("image_id", "category_id", "score")
        found += [
            {**{key: one[key] for key in kept}, "segmentation": rle}
            for one, rle in zip(some, rles, strict=True)
        ]
    return found


if __name__ == "__main__":
    main()
