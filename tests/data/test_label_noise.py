"""Label noise: how many labels are wrong, which, and how they spread over the classes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vision.data import LabelNoise


class Labels:
    """Sample i has label i modulo the classes."""

    def __init__(self, count: int, classes: int) -> None:
        self.count, self.classes = count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        index = range(self.count)[index]
        return {"image": index, "label": index % self.classes}


def labels(noisy: LabelNoise) -> np.ndarray:
    return np.array([noisy[i]["label"] for i in range(len(noisy))])


@pytest.mark.parametrize("level", [0.1, 0.3, 0.5, 0.7])
def test_transition_frequencies(level: float) -> None:
    """The paper's matrix: 1 - level on the diagonal, level / 9 everywhere else."""
    count, classes = 40_000, 10
    found = labels(LabelNoise(Labels(count, classes), level, classes))
    matrix = np.zeros((classes, classes))
    np.add.at(matrix, (np.arange(count) % classes, found), classes / count)
    want = np.full((classes, classes), level / (classes - 1))
    np.fill_diagonal(want, 1 - level)
    # Five standard deviations of a frequency among 4,000.
    spread = 5 * np.sqrt(want * (1 - want) * classes / count)
    assert (np.abs(matrix - want) <= spread).all()


def test_seed_decides() -> None:
    one, same, other = (labels(LabelNoise(Labels(500, 10), 0.5, 10, seed)) for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_sample_keeps_its_label() -> None:
    noisy = LabelNoise(Labels(100, 10), 0.5, 10)
    assert [noisy[7]["label"] for _ in range(5)] == [noisy[7]["label"]] * 5
    assert noisy[-1] == noisy[99]
    assert noisy[12]["image"] == 12


@given(st.integers(2, 20), st.integers(1, 60), st.integers(0, 2**31))
def test_ends_of_the_scale(classes: int, count: int, seed: int) -> None:
    clean = Labels(count, classes)
    true = np.arange(count) % classes
    assert np.array_equal(labels(LabelNoise(clean, 0.0, classes, seed)), true)
    wrong = labels(LabelNoise(clean, 1.0, classes, seed))
    assert (wrong != true).all()
    assert wrong.min() >= 0
    assert wrong.max() < classes


@pytest.mark.parametrize(("level", "classes"), [(-0.1, 10), (1.5, 10), (0.5, 1)])
def test_wrong_arguments(level: float, classes: int) -> None:
    with pytest.raises(ValueError, match="wants"):
        LabelNoise(Labels(10, 10), level, classes)
