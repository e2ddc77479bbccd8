"""How good a trained segmentor is at other resolutions than its own, whole or tile by tile.

    python benchmarks/resolution_accuracy.py --sides 90 180 360 720 --tile 180 \\
        --model VRWKV configs/vrwkv/vrwkv-nano_fcn_1xb2-44e_camvid-180x240.py vrwkv.pth \\
        --model ViT configs/vit/vit-nano_fcn_1xb2-44e_camvid-180x240.py vit.pth \\
        --cfg-options data_root=/path/to/camvid
    python benchmarks/resolution_accuracy.py --sides 128 512 2048 4096 --tile 128 --images 4 \\
        --model VRWKV configs/vrwkv/vrwkv-nano_segformer_1xb8-16e_digit-scenes-128.py scenes.pth

`--sides` are shorter sides in pixels. Images of files are resized to them; predictions are enlarged
to the annotation, where they are judged. Digit scenes are made anew at every side, with more digits
of the same size in pixels, so that a large scene is a wide one. `--tile` also judges prediction in
overlapping tiles of that side, as a model that must keep to its training size would work.

Each row of the JSON: mean IoU and mean boundary IoU over the classes (sums over all images; the
boundary is 2 % of the diagonal wide, 4 pixels in scenes), the share of an object's pixels that were
found by the object's size (connected regions; the mean over objects), and seconds an image by the
thread's own time at one thread. A row that fails holds its error; rows that are there already are
not measured again.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import numpy as np
import torch
from measure import Report, Row, environment, markdown_table, read_rows, threads
from mmengine.config import Config, DictAction
from torch import Tensor
from tqdm import tqdm

from vision.files import digest_of_file
from vision.metrics.masks import boundary_dilation, mask_boundary
from vision.mm.launch import (
    ConfigError,
    check_data,
    check_keys,
    errors_without_traceback,
    merge_options,
)
from vision.mm.reading import read_run_checkpoint

IGNORED = 255
# Limits of the square root of an object's area in pixels, and their names in the rows.
SIZES = (0, 16, 32, 96, float("inf"))
SIZE_NAMES = ("below 16 px", "16 to 32 px", "32 to 96 px", "above 96 px")
_DIGITS = (20, 64)  # heights of the digits of a scene, pixels
_SCENE = 128  # side of the scene that has 2 to 8 digits


class Judge:
    """Sums over images that the figures of a row come from.

    Args:
        classes: number of classes.
        background: a class whose regions are no objects; None if all are.
        dilation: width of the boundary in pixels; None for 2 % of an image's diagonal.
    """

    def __init__(
        self, classes: int, background: int | None = None, dilation: int | None = None
    ) -> None:
        self.background = background
        self.dilation = dilation
        self.sums = torch.zeros(2, 2, classes, dtype=torch.float64)  # area, boundary; shared, any
        self.found: dict[str, list[float]] = defaultdict(list)

    def add(self, pred: Tensor, true: Tensor) -> None:
        """Compare an image.

        Args:
            pred: class indices, int64 (H, W).
            true: as `pred`; 255 is not judged.
        """
        judged = true != IGNORED
        for c in range(self.sums.shape[2]):
            masks = torch.stack([(pred == c) & judged, true == c])
            if not masks.any():
                continue
            for kind, (a, b) in enumerate((masks, mask_boundary(masks, self.dilation) & judged)):
                self.sums[kind, :, c] += torch.tensor([(a & b).sum(), (a | b).sum()])
            if c != self.background:
                self._add_objects(masks[0].numpy(), masks[1].numpy())

    def _add_objects(self, pred: np.ndarray, true: np.ndarray) -> None:
        from scipy import ndimage

        regions, count = ndimage.label(true, np.ones((3, 3)))
        areas = np.bincount(regions.ravel(), minlength=count + 1)[1:]
        hits = np.bincount(regions[pred], minlength=count + 1)[1:]
        for area, hit in zip(areas.tolist(), hits.tolist(), strict=True):
            for name, (low, high) in zip(SIZE_NAMES, pairwise(SIZES), strict=True):
                if low <= area**0.5 < high:
                    self.found[name].append(hit / area)

    def row(self) -> Row:
        """Return the figures in percent; classes that never occur are left out of the means."""
        shared, either = self.sums[:, 0], self.sums[:, 1]
        means = [
            100 * (shared[k] / either[k])[either[k] > 0].mean().item() for k in range(len(shared))
        ]
        objects = {
            name: {"found": 100 * float(np.mean(shares)), "objects": len(shares)}
            for name, shares in self.found.items()
        }
        return {"mIoU": means[0], "mBIoU": means[1], "objects": objects}


def test_config(path: Path, options: dict[str, Any], side: int, images: int | None) -> Config:
    """Return a config whose test images have a shorter side of so many pixels.

    Raises:
        ConfigError: a config without a test set of labelled images, or a key that nothing reads.
    """
    cfg = Config.fromfile(path)
    merge_options(cfg, options)
    check_keys(cfg)
    dataset = cfg.get("test_dataloader", {}).get("dataset", {})
    if "pipeline" not in dataset:
        raise ConfigError(f"{path} has no test_dataloader.dataset.pipeline; wanted a segmentor's")
    if dataset["type"] == "DigitSceneSegmentation":
        digits = [round(n * (side / _SCENE) ** 2) for n in (2, 8)]
        low, high = (n / side for n in _DIGITS)
        dataset.update(
            size=side,
            length=images or dataset["length"],
            num_digits=tuple(min(255, max(1, n)) for n in digits),
            scale=(min(low, 0.5), min(high, 1.0)),
        )
        return cfg
    if images is not None:
        dataset["indices"] = images
    resize = {"type": "Resize", "scale": (10**6, side), "keep_ratio": True}
    steps = [step for step in dataset["pipeline"] if step["type"] != "Resize"]
    first = 1 + next((i for i, step in enumerate(steps) if "LoadImage" in step["type"]), -1)
    dataset["pipeline"] = [*steps[:first], resize, *steps[first:]]
    return cfg


def measure(cfg: Config, checkpoint: Path, tile: int | None, what: str) -> Row:
    """Judge a model on the test images of its config."""
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    from vision.mm.inference import Predictor

    predictor = Predictor(cfg, checkpoint, "cpu", None if tile is None else (tile, None))
    init_default_scope(cfg.get("default_scope", "mmseg"))
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    classes = list(dataset.metainfo["classes"])
    scenes = cfg.test_dataloader.dataset.type == "DigitSceneSegmentation"
    judge = Judge(
        len(classes),
        classes.index("background") if "background" in classes else None,
        boundary_dilation(_SCENE, _SCENE) if scenes else None,  # objects do not grow with a scene
    )
    seconds, pixels = [], 0
    for index in tqdm(range(len(dataset)), desc=what, leave=False):
        data = dataset[index]
        pixels = data["inputs"].shape[-2] * data["inputs"].shape[-1]
        true = data["data_samples"].gt_sem_seg.data[0].long()
        begin = time.thread_time()
        with torch.inference_mode():
            found = predictor.model.test_step(pseudo_collate([data]))[0]
        seconds.append(time.thread_time() - begin)
        judge.add(found.pred_sem_seg.data[0], true)
    return {
        **judge.row(),
        "images": len(dataset),
        "megapixels": pixels / 1e6,
        "seconds": float(np.median(seconds)),
    }


def settings(args: argparse.Namespace) -> Iterator[tuple[str, Path, Path, int, int | None]]:
    """Yield name, config, checkpoint, side and tile of every row."""
    for side in args.sides:
        for name, config, checkpoint in args.model:
            yield name, Path(config), Path(checkpoint), side, None
            if args.tile is not None and side > args.tile:
                yield name, Path(config), Path(checkpoint), side, args.tile


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of rows."""
    head = ["side", "model", "in tiles of", "mIoU", "mBIoU", *SIZE_NAMES, "s / image"]
    lines = []
    for row in rows:
        tile = "whole" if row["tile"] is None else str(row["tile"])
        figures = ["failed"] * (len(head) - 3)
        if row["error"] is None:
            sizes = [row["objects"].get(name) for name in SIZE_NAMES]
            figures = [f"{row['mIoU']:.1f}", f"{row['mBIoU']:.1f}"]
            figures += [f"{s['found']:.0f} ({s['objects']})" if s else "" for s in sizes]
            figures.append(f"{row['seconds']:.2f}")
        lines.append([str(row["side"]), row["model"], tile, *figures])
    return markdown_table(head, lines)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw mean IoU and mean boundary IoU over the side, and mean IoU over the time."""
    from matplotlib.figure import Figure

    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["error"] is None:
            how = "whole" if row["tile"] is None else f"tiles of {row['tile']}"
            lines[f"{row['model']}, {how}"].append(row)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (("side", "mIoU"), ("side", "mBIoU"), ("seconds", "mIoU"))
    labels = {"side": "shorter side, pixels", "seconds": "seconds an image, one thread"}
    for ax, (x, y) in zip(axes, panels, strict=True):
        for name, found in lines.items():
            found = sorted(found, key=lambda row: row[x])
            ax.plot([row[x] for row in found], [row[y] for row in found], "o-", label=name)
        ax.set(xlabel=labels[x], ylabel=f"{y}, %", xscale="log")
        ax.grid(alpha=0.3)
    sides = sorted({row["side"] for row in rows})
    for ax in axes[:2]:
        ax.set_xticks(sides, [str(side) for side in sides])
        ax.set_xticks([], minor=True)
    if lines:
        axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Measure what is not there yet; print and draw everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        nargs=3,
        action="append",
        required=True,
        metavar=("NAME", "CONFIG", "CHECKPOINT"),
        help="a trained segmentor; once for each",
    )
    parser.add_argument("--sides", type=int, nargs="+", required=True, help="in pixels")
    parser.add_argument("--tile", type=int, help="side of the tiles in pixels; default: none")
    parser.add_argument("--images", type=int, help="judge so many; default: the whole test set")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, help="for all")
    parser.add_argument("--out", type=Path, default=Path("resolution_accuracy.json"))
    args = parser.parse_args()
    if min([*args.sides, args.tile or 1, args.images or 1]) < 1:
        sys.exit("error: --sides, --tile and --images want 1 or more")
    for _, config, checkpoint in args.model:
        for path in (config, checkpoint):
            if not Path(path).is_file():
                sys.exit(f"error: no file {path}")
    with errors_without_traceback():  # a look, before anything slow
        for _, config, checkpoint in args.model:
            check_data(
                test_config(Path(config), args.cfg_options, args.sides[0], args.images), "test"
            )
            read_run_checkpoint(checkpoint, mmap=True)
    report = Report(args.out, environment(torch.device("cpu")))
    report.rows = read_rows(args.out) if args.out.exists() else []
    wanted = []
    for name, config, checkpoint, side, tile in settings(args):
        labels = {
            "model": name,
            "config": config.name,
            "checkpoint": digest_of_file(checkpoint),
            "side": side,
            "tile": tile,
            "limit": args.images,
        }
        wanted.append(labels)
        if any(labels.items() <= row.items() and row["error"] is None for row in report.rows):
            continue
        what = f"{name} at {side} px" + ("" if tile is None else f" in tiles of {tile} px")
        row: Row = {"error": None}
        try:
            with threads(1):
                cfg = test_config(config, args.cfg_options, side, args.images)
                row.update(measure(cfg, checkpoint, tile, what))
        except Exception as error:  # noqa: BLE001 -- a failed row is written with its error
            row["error"] = f"{type(error).__name__}: {error}"
            print(f"{what}: {row['error']}", file=sys.stderr)
        report.rows = [old for old in report.rows if not labels.items() <= old.items()]
        report.add([{**labels, **row}])
    rows = [r for labels in wanted for r in report.rows if labels.items() <= r.items()]
    print(table(rows))
    picture = args.out.with_suffix(".png")
    draw(picture, rows)
    print(f"\nwrote {args.out} and {picture}")
    if any(row["error"] for row in rows):
        sys.exit("some rows failed, see above")


if __name__ == "__main__":
    main()
