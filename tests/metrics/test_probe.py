"""Probes of features: nearest neighbours and logistic regression, against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from vision.metrics.probe import (
    LinearProbe,
    accuracy,
    check_features,
    choose_penalty,
    knn_scores,
)


def blobs(
    count: int, spread: float, classes: int = 4, channels: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Features around one centre a class, and their labels; the centres are always the same."""
    centres = torch.randn(classes, channels, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.randn(count, channels, generator=generator)
    return (centres[labels] + spread * noise).double(), labels


@pytest.mark.parametrize("temperature", [0.07, 1.0, None])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_neighbours_against_scikit_learn(k: int, temperature: float | None) -> None:
    (x, y), (test, _) = blobs(300, 1.5), blobs(70, 1.5, seed=1)
    votes = knn_scores(x, y, test, k, temperature)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.ones_like(distance) if temperature is None else np.exp(-distance / temperature)

    judge = KNeighborsClassifier(k, weights=weights, metric="cosine", algorithm="brute")
    share = judge.fit(x.numpy(), y.numpy()).predict_proba(test.numpy())
    found = votes / votes.sum(1, keepdim=True)
    torch.testing.assert_close(found, torch.from_numpy(share), rtol=1e-6, atol=1e-9)


def test_many_test_features_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), (test, _) = blobs(300, 1.5), blobs(70, 1.5, seed=1)
    whole = knn_scores(x, y, test, 5)
    probe = LinearProbe(0.01).fit(x, y)
    monkeypatch.setattr("vision.metrics.probe._PART", 32)
    torch.testing.assert_close(knn_scores(x, y, test, 5), whole)
    again = LinearProbe(0.01).fit(x, y)
    torch.testing.assert_close(again.scores(test), probe.scores(test), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_linear_against_scikit_learn(penalty: float) -> None:
    (x, y), (test, _) = blobs(300, 1.5), blobs(70, 1.5, seed=1)
    scores = LinearProbe(penalty, max_iter=500).fit(x, y).scores(test).softmax(1)
    mean, deviation = x.mean(0), x.std(0, correction=0)
    judge = LogisticRegression(C=1 / (penalty * len(x)), max_iter=2000, tol=1e-8)
    judge.fit(((x - mean) / deviation).numpy(), y.numpy())
    wanted = judge.predict_proba(((test - mean) / deviation).numpy())
    torch.testing.assert_close(scores, torch.from_numpy(wanted), rtol=1e-3, atol=1e-4)


def test_labels_that_can_be_found_are_found() -> None:
    (x, y), (test, truth) = blobs(300, 0.1), blobs(70, 0.1, seed=1)
    penalty, tried = choose_penalty(x, y, [1e-4, 1e-2])
    assert set(tried) == {1e-4, 1e-2}
    assert penalty == 1e-4, "the first of equally good ones"
    assert accuracy(LinearProbe(penalty).fit(x, y).scores(test), truth)["top1"] == 100
    assert accuracy(knn_scores(x, y, test), truth)["top1"] == 100


def test_shuffled_labels_give_chance() -> None:
    (x, y), (test, truth) = blobs(600, 0.1), blobs(600, 0.1, seed=1)
    order = torch.Generator().manual_seed(3)
    y = y[torch.randperm(len(y), generator=order)]
    for scores in (LinearProbe(1e-2).fit(x, y).scores(test), knn_scores(x, y, test, 200)):
        # Of a class all get the same answer: 0 to 4 of four classes may be right.
        shuffled = truth[torch.randperm(len(truth), generator=order)]
        assert accuracy(scores, shuffled)["top1"] == pytest.approx(25, abs=8)


def test_the_penalty_is_chosen_by_what_was_held_out() -> None:
    """With more channels than samples, and most of them noise, a penalty must help."""
    x, y = blobs(60, 1.0)
    noise = 3 * torch.randn(60, 200, generator=torch.Generator().manual_seed(7)).double()
    x = torch.cat([x, noise], 1)
    best, tried = choose_penalty(x, y, [0.0, 1e-1, 1e3])
    assert tried[best] == max(tried.values())
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    tenth, rest = order[:6], order[6:]
    probe = LinearProbe(best).fit(x[rest], y[rest])
    assert tried[best] == accuracy(probe.scores(x[tenth]), y[tenth])["top1"]


def test_a_channel_that_never_changes() -> None:
    (x, y), (test, truth) = blobs(300, 0.1), blobs(70, 0.1, seed=1)
    x, test = (torch.cat([a, torch.full((len(a), 1), 3.0).double()], 1) for a in (x, test))
    test[:, -1] = 100  # unseen in training: it must not matter
    scores = LinearProbe(1e-3).fit(x, y).scores(test)
    assert accuracy(scores, truth)["top1"] == 100


def test_accuracy() -> None:
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])
    labels = torch.tensor([1, 2, 2, 3])  # a class that has no score is not found
    assert accuracy(scores, labels, (1, 2, 3, 5)) == {"top1": 50, "top2": 75, "top3": 75}


def test_bad_input() -> None:
    x, y = blobs(30, 1.0)
    with pytest.raises(ValueError, match=r"k wants 1 \.\. 30 .*got 31"):
        knn_scores(x, y, x, 31)
    with pytest.raises(ValueError, match="temperature wants a number above 0"):
        knn_scores(x, y, x, 3, -1.0)
    with pytest.raises(ValueError, match="1 of 30 training features are not finite"):
        LinearProbe(0.1).fit(x.index_fill(0, torch.tensor([4]), torch.nan), y)
    with pytest.raises(ValueError, match="1 of 30 test features are not finite"):
        knn_scores(x, y, x.index_fill(0, torch.tensor([4]), torch.inf))
    with pytest.raises(ValueError, match=r"got \(30, 8\) and \(29,\)"):
        check_features("training", x, y[:29])
    with pytest.raises(ValueError, match=r"got \(30, 2, 4\)"):
        check_features("test", x.unflatten(1, (2, 4)), y)
    with pytest.raises(ValueError, match="labels of 0 or more, got -4"):
        check_features("training", x, y - y.max() - 1)
    with pytest.raises(ValueError, match="two classes or more, got only 2"):
        LinearProbe(0.1).fit(x, torch.full((30,), 2))
    with pytest.raises(ValueError, match="penalty wants 0 or more"):
        LinearProbe(-1)
    with pytest.raises(ValueError, match="10 features or more, got 2 and 9"):
        choose_penalty(x[:9], y[:9], [0.1, 1.0])
