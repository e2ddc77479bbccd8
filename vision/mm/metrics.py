"""Metrics of classification for mmengine's evaluator."""

from collections.abc import Sequence
from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS


@METRICS.register_module()
class TopKAccuracy(BaseMetric):
    """Share of images whose label is among the k classes of the highest scores.

    Args:
        topk: the values of k.
        collect_device: "cpu" or "gpu", where results of several processes are gathered.
        prefix: put before the metric's names.

    Returns of `evaluate`: {"top1": percent, ...}.
    """

    default_prefix = "accuracy"

    def __init__(
        self, topk: Sequence[int] = (1, 5), collect_device: str = "cpu", prefix: str | None = None
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep, for each image, whether the label is among the first k."""
        for sample in data_samples:
            # A tie counts for the label only up to its place among equal scores.
            order = sample["scores"].argsort(descending=True, stable=True)
            rank = int((order == sample["label"]).nonzero())
            self.results.append([rank < k for k in self.topk])

    def compute_metrics(self, results: list[list[bool]]) -> dict[str, float]:
        """Percentages over all images."""
        hits = zip(*results, strict=True)
        return {
            f"top{k}": 100 * sum(hit) / len(results) for k, hit in zip(self.topk, hits, strict=True)
        }
