"""The number of the epoch, as the workers of a data loader have to know it."""

from typing import Any

import torch


class SharedEpoch:
    """A number in shared memory: persistent workers see what the main process sets."""

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._value.share_memory_()  # copy.deepcopy gives ordinary memory

    def __int__(self) -> int:
        return int(self._value)

    def set(self, epoch: int) -> None:
        """Set the number.

        Raises:
            ValueError: a negative epoch.
        """
        if epoch < 0:
            raise ValueError(f"epoch wants 0 or more, got {epoch}")
        self._value.fill_(epoch)
