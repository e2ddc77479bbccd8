"""Training labels with random errors, for experiments on robustness."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset


class LabelNoise(Dataset):
    """A classification data set with a share of its labels flipped, the same ones at every visit.

    Each label is replaced with probability `level`, by any of the other classes with equal
    probability (the noise of arXiv:1704.06904, section 4.1). Wrap the training set alone: a score
    is measured on clean labels.

    Args:
        dataset: map-style data set of dicts with a label; it is read only when asked for a sample.
        level: probability that a label is wrong, 0 .. 1.
        num_classes: number of classes, 2 or more.
        seed: of the choice which labels are flipped and to what.
        key: of the label in a sample.

    Attributes:
        shifts: integers (N,), what is added to each label, modulo `num_classes`; 0 keeps it.

    Raises:
        ValueError: a level that is no probability, or fewer than two classes.
    """

    def __init__(
        self, dataset: Any, level: float, num_classes: int, seed: int = 0, key: str = "label"
    ) -> None:
        if not 0 <= level <= 1:
            raise ValueError(f"level wants a probability, 0 .. 1, got {level}")
        if num_classes < 2:
            raise ValueError(f"label noise wants 2 classes or more, got {num_classes}")
        self.dataset, self.num_classes, self.key = dataset, num_classes, key
        rng = np.random.default_rng(seed)
        count = len(dataset)
        flipped = rng.random(count) < level
        self.shifts = np.where(flipped, rng.integers(1, num_classes, count), 0)

    def __len__(self) -> int:
        return len(self.shifts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        label = (sample[self.key] + int(self.shifts[index])) % self.num_classes
        return {**sample, self.key: label}
