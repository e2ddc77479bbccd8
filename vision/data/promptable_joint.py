"""Several sets of images with object masks as one: repeated, transformed, the broken left out."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .epoch import SharedEpoch
from .image_io import ImageReadError, LabelError
from .promptable import take_objects

_LOG = logging.getLogger(__name__)


class RepeatedSets:
    """Several data sets one after another, each as often as it is to count.

    Args:
        sets: what to join.
        repeats: how often each is gone through, 1 for all by default.

    Raises:
        ValueError: another number of repeats than sets, or one below 1.
    """

    def __init__(self, sets: Sequence[Any], repeats: Sequence[int] | None = None) -> None:
        repeats = [1] * len(sets) if repeats is None else list(repeats)
        if len(repeats) != len(sets) or min(repeats, default=0) < 1:
            raise ValueError(
                f"wanted {len(sets)} numbers of repeats, 1 or more, one a data set, got {repeats}"
            )
        self.sets = list(sets)
        self.lengths = [len(s) * n for s, n in zip(sets, repeats, strict=True)]

    def __len__(self) -> int:
        return sum(self.lengths)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the set that an index falls into, and the index within it.

        Raises:
            IndexError: past the end.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index} of {len(self)}")
        which = 0
        while index >= self.lengths[which]:
            index -= self.lengths[which]
            which += 1
        return which, index % len(self.sets[which])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample of the set that the index falls into.

        Raises:
            IndexError: past the end.
        """
        which, inner = self.locate(index)
        return self.sets[which][inner]


class TransformedSets:
    """Joined sets with a transform for each; what is random depends on seed, epoch and index alone.

    A repeated set gets other random numbers at each repeat.

    Args:
        joined: the sets.
        transforms: called with a sample and a NumPy generator, one a set; None leaves a set's
            samples as they are.
        max_masks: the most objects of an image; which ones is drawn anew in every epoch. None for
            all.
        seed: of all random choices.

    Raises:
        ValueError: another number of transforms than sets, or `max_masks` below 1.
    """

    def __init__(
        self,
        joined: RepeatedSets,
        transforms: Sequence[Callable[[dict[str, Any], np.random.Generator], Any] | None],
        max_masks: int | None = None,
        seed: int = 0,
    ) -> None:
        if len(transforms) != len(joined.sets):
            raise ValueError(
                f"wanted a transform for each of {len(joined.sets)} sets, got {len(transforms)}"
            )
        if max_masks is not None and max_masks < 1:
            raise ValueError(f"max_masks wants 1 or more, or None for all, got {max_masks}")
        self.joined, self.transforms = joined, list(transforms)
        self.max_masks, self.seed = max_masks, seed
        self._epoch = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """Make the samples of another epoch."""
        self._epoch.set(epoch)
        for members in self.joined.sets:
            if hasattr(members, "set_epoch"):
                members.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.joined)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, transformed."""
        which, inner = self.joined.locate(index)
        sample = self.joined.sets[which][inner]
        rng = np.random.default_rng((self.seed, int(self._epoch), index))
        transform = self.transforms[which]
        if transform is not None:
            sample = transform(sample, rng)
        count = len(sample["masks"])
        if self.max_masks is not None and count > self.max_masks:
            rows = np.sort(rng.choice(count, self.max_masks, replace=False))
            sample = take_objects(sample, rows)
        return sample


class SkipBroken:
    """A data set that gives the next good sample in place of a broken one.

    Broken are samples that raise ImageReadError or LabelError. Each is logged as a warning once and
    counted once, however often it is asked for. Workers of a data loader count for themselves.

    Args:
        dataset: of which samples may be broken.
        strict: raise at once, as an evaluation should.
        most: how many broken samples in a row are skipped.

    Attributes:
        broken: how many errors were met, by their class: "ImageReadError", "LabelError".

    Raises:
        ValueError: `most` is below 1.
    """

    def __init__(self, dataset: Any, strict: bool = False, most: int = 10) -> None:
        if most < 1:
            raise ValueError(f"most wants 1 broken sample in a row or more, got {most}")
        self.dataset, self.strict, self.most = dataset, strict, most
        self.broken: Counter[str] = Counter()
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample, or the next good one; after the last comes the first.

        Raises:
            ImageReadError: the sample is broken, with `strict`.
            LabelError: the same.
            IndexError: past the end.
            ValueError: more than `most` samples in a row are broken, or all are.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"no sample {index} of {len(self)}")
        tries = min(self.most + 1, len(self))
        for step in range(tries):
            try:
                return self.dataset[(index + step) % len(self)]
            except (ImageReadError, LabelError) as error:
                if self.strict:
                    raise
                self._report(error)
                last = error
        raise ValueError(
            f"{tries} samples in a row from number {index} of {len(self)} are broken, the last: "
            f"{last}; check the paths of the data"
        ) from last

    def _report(self, error: ValueError) -> None:
        message = str(error)  # begins with the file's name
        if message not in self._reported:
            self._reported.add(message)
            self.broken[type(error).__name__] += 1
            _LOG.warning("skipped a broken sample: %s", message)
