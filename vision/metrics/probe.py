"""How good features are with the network as it is: nearest neighbours, a linear classifier."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PART = 4096  # rows that are compared, or classified, at once: bounds the memory
_HELD_OUT = 0.1  # share of the training features that chooses the penalty


def check_features(name: str, features: Tensor, labels: Tensor) -> None:
    """Check what a probe is fed.

    Args:
        name: what the message calls them.
        features: (N, C).
        labels: integers (N,), 0 or more.

    Raises:
        ValueError: other shapes, no row, numbers that are not finite, or labels below 0.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"wanted {name} features (N, C) with labels (N,), at least one, got "
            f"{tuple(features.shape)} and {tuple(labels.shape)}"
        )
    bad = int((~features.isfinite().all(1)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(features)} {name} features are not finite numbers")
    if labels.min() < 0:
        raise ValueError(f"wanted {name} labels of 0 or more, got {int(labels.min())}")


def knn_scores(
    train: Tensor, labels: Tensor, test: Tensor, k: int = 20, temperature: float | None = 0.07
) -> Tensor:
    """Let the k nearest training features vote, by cosine similarity (arXiv:1805.01978).

    Args:
        train: features (N, C).
        labels: of `train`, integers 0 .. classes - 1, (N,).
        test: features (M, C).
        k: number of neighbours.
        temperature: a neighbour of similarity s has exp(s / temperature) votes; None: one vote.

    Returns:
        Votes of each class, (M, classes).

    Raises:
        ValueError: k is not in 1 .. N, a temperature that is not above 0, or bad features.
    """
    check_features("training", train, labels)
    check_features("test", test, torch.zeros(len(test), dtype=torch.int64))
    if not 1 <= k <= len(train):
        raise ValueError(f"k wants 1 .. {len(train)} (the training features), got {k}")
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature wants a number above 0, got {temperature}")
    train = F.normalize(train, dim=1)
    votes = []
    for part in F.normalize(test, dim=1).split(_PART):
        similarity, index = (part @ train.T).topk(k, 1)
        # Less 1: the same ratios, and no overflow.
        weight = (
            torch.ones_like(similarity)
            if temperature is None
            else ((similarity - 1) / temperature).exp()
        )
        found = weight.new_zeros(len(part), int(labels.max()) + 1)
        votes.append(found.scatter_add_(1, labels[index], weight))
    return torch.cat(votes)


class LinearProbe:
    """Multinomial logistic regression on standardised features, fitted by L-BFGS.

    Minimises mean cross entropy + penalty / 2 * the sum of the squared weights; the bias is free.

    Args:
        penalty: of the weights, 0 or more.
        max_iter: most steps of L-BFGS.

    Raises:
        ValueError: a negative penalty.
    """

    def __init__(self, penalty: float, max_iter: int = 200) -> None:
        if penalty < 0:
            raise ValueError(f"penalty wants 0 or more, got {penalty}")
        self.penalty = penalty
        self.max_iter = max_iter

    def fit(self, features: Tensor, labels: Tensor) -> "LinearProbe":
        """Learn from features (N, C) with labels (N,); classes are 0 .. the largest label.

        Raises:
            ValueError: bad features, or a single class.
        """
        check_features("training", features, labels)
        classes = int(labels.max()) + 1
        if len(labels.unique()) < 2:
            raise ValueError(f"wanted labels of two classes or more, got only {int(labels[0])}")
        self._mean = features.mean(0)
        # What is the same in all features stays 0.
        deviation = features.std(0, correction=0)
        self._scale = torch.where(deviation > 0, 1 / deviation, 0)
        weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
        bias = features.new_zeros(classes, requires_grad=True)
        self._layer = (weight, bias)
        parts = list(zip(self._standard(features).split(_PART), labels.split(_PART), strict=True))
        optimizer = torch.optim.LBFGS(
            self._layer, max_iter=self.max_iter, history_size=10, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            total = self.penalty / 2 * weight.square().sum()
            total.backward()
            total = total.detach()
            for x, y in parts:
                one = F.cross_entropy(F.linear(x, weight, bias), y, reduction="sum") / len(labels)
                one.backward()
                total += one.detach()
            return total

        optimizer.step(loss)
        return self

    def scores(self, features: Tensor) -> Tensor:
        """Logits (M, classes) of features (M, C)."""
        with torch.no_grad():
            return F.linear(self._standard(features), *self._layer)

    def _standard(self, features: Tensor) -> Tensor:
        return (features - self._mean) * self._scale


def choose_penalty(
    features: Tensor, labels: Tensor, penalties: Sequence[float], seed: int = 0
) -> tuple[float, dict[float, float]]:
    """Choose the penalty of a `LinearProbe` that is best on a tenth of the training features.

    Args:
        features: (N, C), at least 10.
        labels: (N,).
        penalties: to choose from; of two equally good ones the first.
        seed: of the choice of the tenth.

    Returns:
        The penalty, and the top-1 of each in percent.

    Raises:
        ValueError: no penalty, or fewer than 10 features.
    """
    check_features("training", features, labels)
    if not penalties or len(features) < 10:
        raise ValueError(
            f"wanted penalties, and 10 features or more, got {len(penalties)} and {len(features)}"
        )
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    order = order.to(features.device)
    cut = round(_HELD_OUT * len(features))
    tenth, rest = order[:cut], order[cut:]
    found: dict[float, float] = {}
    for penalty in penalties:
        probe = LinearProbe(penalty).fit(features[rest], labels[rest])
        found[penalty] = accuracy(probe.scores(features[tenth]), labels[tenth])["top1"]
    return max(found, key=lambda p: found[p]), found


def accuracy(scores: Tensor, labels: Tensor, topk: Sequence[int] = (1,)) -> dict[str, float]:
    """Share of the samples whose label is among the k best scores, in percent.

    Args:
        scores: (M, classes).
        labels: (M,); a class without a score is never found.
        topk: each at most the number of classes, else it is left out.

    Returns:
        {"top1": ..., ...}.
    """
    result: dict[str, Any] = {}
    for k in topk:
        if k <= scores.shape[1]:
            hits = (scores.topk(k, 1).indices == labels[:, None]).any(1)
            result[f"top{k}"] = 100 * float(hits.double().mean())
    return result
