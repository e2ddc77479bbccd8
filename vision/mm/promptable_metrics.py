"""Quality of promptable segmentation for mmengine's evaluator."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor

from vision.data import boxes_of_masks
from vision.files import write_whole
from vision.metrics import boundary_iou, mask_iou
from vision.metrics.prompt_baselines import fill_boxes, grab_cut
from vision.sam.evaluation import PromptAnswers

_GRABCUT_SIDE = 512  # pixels


@METRICS.register_module()
class PromptedMaskIoU(BaseMetric):
    """How well the masks that prompts gave agree with the true ones, in percent.

    A value is the mean over the objects of a data set; with one object an image, as in DIS5K,
    COIFT, HRSOD and ThinObject5K, that is the mean over the images, as published. Samples of
    several data sets carry a string "dataset": each set's values are then named after it
    ("COIFT/box_mIoU"), and a plain name is the unweighted mean over the sets.

    Returns of `evaluate`: for each kind of prompt of the model's `PromptEvaluator` ("box", "click",
    "click3", ...) {"box_mIoU", "box_mBIoU" (boundary IoU), "box_rank"}; the rank is Spearman's
    correlation of expected and true IoU, times 100. "NoC85" is the mean number of clicks that reach
    an IoU of 0.85. With baselines, {"filled_box_mIoU", "filled_box_mBIoU", "grabcut_mIoU",
    "grabcut_mBIoU", "grabcut_fallbacks" (boxes that GrabCut could not work with, a number)}.

    Args:
        baselines: also judge the filled box and GrabCut from the box, the latter on images of at
            most 512 pixels a side, which takes a second an object.
        out_dir: folder for prompted_masks.md, a table, and prompted_masks.json, the values of every
            image and object; those of an evaluation before are replaced. None for no files.
        collect_device: "cpu" or "gpu", where results of several processes are gathered.
        prefix: put before the metric's names.
    """

    default_prefix = "sam"

    def __init__(
        self,
        baselines: bool = False,
        out_dir: str | None = None,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.baselines = baselines
        self.out_dir = out_dir

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Any]) -> None:
        """Keep the values of each image's objects."""
        count = len(data_samples)
        names = data_batch.get("name", [""] * count)
        sets = data_batch.get("dataset", [""] * count)
        for i, sample in enumerate(data_samples):
            answers: PromptAnswers = sample["answers"]
            true = sample["true"]
            kinds = {
                kind: {**_agreement(mask, true), "expected": answers.expected_iou[kind].tolist()}
                for kind, mask in answers.masks.items()
            }
            if self.baselines:
                image = data_batch["inputs"][i].permute(1, 2, 0).cpu().numpy()
                kinds |= _judge_baselines(np.ascontiguousarray(image), true)
            self.results.append(
                {
                    "name": names[i],
                    "dataset": sets[i],
                    "resize": answers.resize,
                    "kinds": kinds,
                    "clicks_needed": {
                        f"NoC{100 * target:g}": needed.tolist()
                        for target, needed in answers.clicks_needed.items()
                    },
                }
            )

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Means over the objects of each data set, and over the sets.

        Raises:
            ValueError: no image was evaluated.
        """
        if not results:
            raise ValueError("wanted at least one evaluated image, got none; look at the data set")
        sets: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for result in results:
            sets[result["dataset"]].append(result)
        rows = {name: _means(members) for name, members in sorted(sets.items())}
        average = {
            metric: float(np.mean([row[metric] for row in rows.values()]))
            for metric in next(iter(rows.values()))
        }
        if self.out_dir is not None:
            _write(Path(self.out_dir), results, rows, average)
        if len(rows) == 1:
            return average
        each = {f"{name}/{metric}": v for name, row in rows.items() for metric, v in row.items()}
        return {**average, **each}


def _agreement(masks: Tensor, true: Tensor) -> dict[str, list[float]]:
    return {"IoU": mask_iou(masks, true).tolist(), "BIoU": boundary_iou(masks, true).tolist()}


def _judge_baselines(image: np.ndarray, true: Tensor) -> dict[str, dict[str, list[float]]]:
    """Of the tight boxes of the objects of an image, uint8 (H, W, 3)."""
    boxes = boxes_of_masks(true)
    cut, fallbacks = grab_cut(image, boxes, max_side=_GRABCUT_SIDE)
    filled = fill_boxes(boxes, (image.shape[0], image.shape[1]))
    return {
        "filled_box": _agreement(filled, true),
        "grabcut": {**_agreement(cut, true), "fallbacks": fallbacks.tolist()},
    }


def _means(results: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics of one data set."""
    found: dict[str, float] = {}
    for kind in results[0]["kinds"]:
        values = {
            name: np.concatenate([r["kinds"][kind][name] for r in results])
            for name in results[0]["kinds"][kind]
        }
        found[f"{kind}_mIoU"] = 100 * float(values["IoU"].mean())
        found[f"{kind}_mBIoU"] = 100 * float(values["BIoU"].mean())
        if "expected" in values:
            found[f"{kind}_rank"] = 100 * _rank_correlation(values["expected"], values["IoU"])
        if "fallbacks" in values:
            found[f"{kind}_fallbacks"] = float(values["fallbacks"].sum())
    for name in results[0]["clicks_needed"]:
        found[name] = float(np.concatenate([r["clicks_needed"][name] for r in results]).mean())
    return found


def _write(
    folder: Path,
    results: list[dict[str, Any]],
    rows: dict[str, dict[str, float]],
    average: dict[str, float],
) -> None:
    """Write the table and the values of every object."""
    content = {"average": average, "datasets": rows, "images": results}
    write_whole(folder / "prompted_masks.json", json.dumps(content, indent=1) + "\n")
    counts = Counter(r["dataset"] for r in results)
    table = {f"{name or 'all'} ({counts[name]})": row for name, row in rows.items()}
    if len(rows) > 1:
        table["average of the sets"] = average
    cells = [["data set (images)", *average], ["---"] * (len(average) + 1)]
    cells += [[name, *(f"{value:.2f}" for value in row.values())] for name, row in table.items()]
    resizes = ", ".join(sorted({r["resize"] for r in results}))
    lines = [
        f"Images resized by {resizes}. Values in percent, but for NoC (clicks) and fallbacks "
        "(boxes).",
        "",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]
    write_whole(folder / "prompted_masks.md", "\n".join(lines) + "\n")


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation; 0 where one of the two does not vary."""
    from scipy.stats import rankdata

    ranks = [rankdata(x) for x in (a, b)]
    if any(r.std() == 0 for r in ranks):
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])
